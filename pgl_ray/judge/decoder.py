"""The frozen decoder: a light decoder learns organs from a frozen encoder's maps, in under a minute on a CPU.

It has more room between a random encoder and one that was trained with labels than a linear probe of voxels has.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl_ray.data.rendering import AIR, normalise
from pgl_ray.data.scan_files import open_label, open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index, class_lookup
from pgl_ray.judge.dense import dense_maps
from pgl_ray.judge.readings import StandardisedMaps
from pgl_ray.model import device as on
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.metrics import organ_metrics
from pgl_ray.model.segmenter import LightDecoder, light_levels, silence
from pgl_ray.prior import triple

STEPS, BATCH, LR = 450, 4, 3e-3
JITTER = 8  # voxels by which a part's middle is moved from a voxel of an organ
SLAB, HALO = 8, 3  # cells of the coarsest map along D that are decoded at a time, and beside them


class LabelledScan:
    """A scan in memory.

    Attributes:
        record: of the index.
        volume: int16 HU [D, H, W].
        target: uint8 class index [D, H, W].
        labelled: bool [classes], annotated in this scan; background's is true.
        scaling: HU window, mean and standard deviation.
        voxels: per annotated organ that occurs, int64 [voxels, 3].
    """

    def __init__(self, index: Index, record: ScanRecord):
        whole = np.array([(0, size) for size in record.shape])
        self.record, self.volume = record, open_volume(index.store, record).read(whole)
        lookup = class_lookup(index.label_values)
        self.target = lookup[open_label(index.store, record).read(whole)].astype(np.uint8)
        self.labelled = np.zeros(len(index.label_values) + 1, bool)
        self.labelled[[0, *(lookup[value] for value in record.labelled)]] = True
        self.scaling = index.hu_window, record.mean_hu, record.std_hu
        organ_voxels = [np.argwhere(self.target == k) for k in np.flatnonzero(self.labelled)[1:]]
        self.voxels = [voxels for voxels in organ_voxels if len(voxels)]


def read_maps(encoder: StandardisedMaps, scan: LabelledScan, size: tuple[int, int, int]) -> list[Tensor]:
    """The maps of a whole scan that the light decoder takes, finest first."""
    device = next(encoder.parameters()).device
    volume = torch.from_numpy(normalise(scan.volume, *scan.scaling)).to(device)
    air = float(normalise(np.array(AIR), *scan.scaling))
    return dense_maps(encoder, volume, size, light_levels(encoder.strides), air)


def train_decoder(
    encoder: StandardisedMaps, scans: list[LabelledScan], size: tuple[int, int, int], seed: int, steps: int = STEPS
) -> LightDecoder:
    """A light decoder on the frozen maps of whole scans: AdamW, Dice + cross-entropy of weight 1, parts around organs.

    The scans' maps are computed once and kept, 2 bytes a value.

    Args:
        encoder: in eval mode.
        scans: to learn from.
        size: of the parts of a scan that a step sees (D, H, W), rounded up to the coarsest stride.
        seed: of initial weights and parts.
        steps: of BATCH parts.

    Returns:
        The decoder, in eval mode.

    Raises:
        ValueError: no organ is drawn in any of the scans.
    """
    scans = [scan for scan in scans if scan.voxels]
    if not scans:
        raise ValueError("no organ occurs in the labelled scans to learn from: raise num_scans or choose another seed")
    rng, device = np.random.default_rng((seed, 2)), next(encoder.parameters()).device
    levels = light_levels(encoder.strides)
    channels, strides = [encoder.channels[i] for i in levels], [encoder.strides[i] for i in levels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = LightDecoder(channels, strides, len(scans[0].labelled))
    # a GPU would look for the fastest convolutions of each slab's own size
    decoder = (on.lay_out(decoder, device) if device.type == "cpu" else decoder.to(device)).train()
    maps = [read_maps(encoder, scan, size) for scan in scans]
    size = triple(int(-(-length // by) * by) for length, by in zip(size, strides[-1]))
    adamw = torch.optim.AdamW(decoder.parameters(), LR)
    silence(decoder.head, np.any([scan.labelled[1:] for scan in scans], 0).tolist(), adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: (1 - step / steps) ** 0.9)
    for _ in range(steps):
        parts = [draw_part(rng, scans[i], maps[i], strides, size) for i in rng.integers(len(scans), size=BATCH)]
        several, target, labelled = zip(*parts)
        odd = [int(rng.integers(2)) for _ in range(2)]  # every second voxel of H and W is loss enough
        at = [torch.arange(first, length, by) for first, length, by in zip((0, *odd), size, (1, 2, 2))]
        logits = decoder.at([torch.stack(one).float() for one in zip(*several)], at)
        target, labelled = (torch.from_numpy(np.stack(part)).to(device) for part in (target, labelled))
        seen = target[:, None, :, odd[0] :: 2, odd[1] :: 2].long()
        adamw.zero_grad(set_to_none=True)
        segmentation_loss(logits, seen, "multiclass", labelled, 1.0).backward()
        adamw.step()
        schedule.step()
    return decoder.eval()


def draw_part(
    rng: np.random.Generator,
    scan: LabelledScan,
    maps: list[Tensor],
    strides: list[tuple[int, int, int]],
    size: tuple[int, int, int],
) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """A part of a scan around a voxel of a random organ; what lies beyond the scan is 0 in maps and background.

    Returns:
        Per map [C, d, h, w], classes uint8 [D, H, W], and bool [classes] of those that are annotated.
    """
    voxels, coarse = scan.voxels[rng.integers(len(scan.voxels))], np.array(strides[-1])
    middle = voxels[rng.integers(len(voxels))] + rng.integers(-JITTER, JITTER + 1, 3)
    room = -(-np.maximum(np.array(scan.target.shape) - size, 0) // coarse) * coarse  # the last part may reach beyond
    start = np.clip(middle - np.array(size) // 2, 0, room) // coarse * coarse
    parts = []
    for one, stride in zip(maps, strides):
        first, num = start // stride, np.array(size) // stride
        part = one[(slice(None), *(slice(a, a + n) for a, n in zip(first, num)))]
        short = [n for axis in (2, 1, 0) for n in (0, int(num[axis]) - part.shape[axis + 1])]
        parts.append(F.pad(part, short))
    target = scan.target[tuple(slice(a, a + n) for a, n in zip(start, size))]
    target = np.pad(target, [(0, n - have) for n, have in zip(size, target.shape)])
    return parts, target, scan.labelled


@torch.no_grad()
def decode(decoder: LightDecoder, maps: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Class index of every voxel of a scan, uint8 [D, H, W], in slabs of slices, so that no logits of all are kept."""
    step, halo, out = SLAB * decoder.strides[-1][0], HALO * decoder.strides[-1][0], np.empty(shape, np.uint8)
    for start in range(0, shape[0], step):
        first, last = max(0, start - halo), min(shape[0], start + step + halo)
        slab = [one[None, :, first // s[0] : -(-last // s[0])].float() for one, s in zip(maps, decoder.strides)]
        logits = decoder(slab, (last - first, *shape[1:]))
        classes = logits[0, :, start - first : min(start + step, shape[0]) - first].argmax(0)
        out[start : start + step] = classes.to(torch.uint8).cpu().numpy()
    return out


def score_decoder(
    encoder: StandardisedMaps,
    decoders: list[LightDecoder],
    scans: list[LabelledScan],
    names: list[str],
    size: tuple[int, int, int],
) -> list[list[dict[str, Any]]]:
    """Segments whole scans and scores them; each scan's maps are computed once.

    Args:
        encoder: of the decoders.
        decoders: from `train_decoder`.
        scans: labelled.
        names: of the classes, background first.
        size: of the training views.

    Returns:
        Per decoder a row per scan and annotated organ: scan_id, organ, dice, iou, hd_mm, hd95_mm, ..., as
        `metrics.organ_metrics`.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in decoders]
    for scan in scans:
        maps = read_maps(encoder, scan, size)
        organs = {names[k]: int(k) for k in np.flatnonzero(scan.labelled)[1:]}
        axes = np.array(scan.record.affine).reshape(4, 4)[:3, :3]
        for decoder, scored in zip(decoders, rows):
            classes = decode(decoder, maps, scan.volume.shape)
            scores = organ_metrics(classes, scan.target, organs, axes, "multiclass")
            scored += [{"scan_id": scan.record.scan_id, "organ": organ, **score} for organ, score in scores.items()]
    return rows
