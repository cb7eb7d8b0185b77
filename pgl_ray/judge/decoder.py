"""The frozen decoder: a light decoder learns organs from a frozen encoder's maps, in under a minute on a CPU.

It has more room between a random encoder and one that was trained with labels than a linear probe of voxels has.
"""

from typing import Any

import numpy as np
import torch

from pgl_ray.data.store import Index, ScanRecord, class_lookup, open_label, open_volume
from pgl_ray.data.views import normalise
from pgl_ray.judge.readings import AIR, StandardisedMaps
from pgl_ray.model.inference import segment
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.metrics import organ_metrics
from pgl_ray.model.segmenter import LightSegmenter

STEPS, BATCH, LR = 450, 4, 3e-3
SHIFT = 4  # a patch's middle is a voxel of an organ, moved by up to size / SHIFT
OVERLAP = 0.25  # of the windows that test scans are segmented in


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
        found = [np.argwhere(self.target == k) for k in np.flatnonzero(self.labelled)[1:]]
        self.voxels = [voxels for voxels in found if len(voxels)]


def train_decoder(
    maps: StandardisedMaps, scans: list[LabelledScan], size: tuple[int, int, int], seed: int, steps: int = STEPS
) -> LightSegmenter:
    """A light decoder on frozen maps: AdamW, Dice + cross-entropy of weight 1, patches around organs.

    Args:
        maps: the encoder.
        scans: to learn from.
        size: of the patches (D, H, W).
        seed: of initial weights and patches.
        steps: of BATCH patches.

    Returns:
        Encoder and decoder, in eval mode.

    Raises:
        ValueError: no organ is drawn in any of the scans.
    """
    scans = [scan for scan in scans if scan.voxels]
    if not scans:
        raise ValueError("no organ occurs in the labelled scans to learn from: raise num_scans or choose another seed")
    rng, device = np.random.default_rng((seed, 2)), next(maps.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LightSegmenter(maps, len(scans[0].labelled)).to(device)
    decoder = model.decoder.train()
    adamw = torch.optim.AdamW(decoder.parameters(), LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: (1 - step / steps) ** 0.9)
    for _ in range(steps):
        patches = [draw_patch(rng, scans[rng.integers(len(scans))], size) for _ in range(BATCH)]
        x, target, labelled = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*patches))
        at = [slice(rng.integers(2), None, 2) for _ in range(2)]  # every second voxel of H and W is loss enough
        logits = model(x[:, None])[..., at[0], at[1]]
        adamw.zero_grad(set_to_none=True)
        segmentation_loss(logits, target[:, None, :, at[0], at[1]].long(), "multiclass", labelled, 1.0).backward()
        adamw.step()
        schedule.step()
    return model.eval()


def draw_patch(
    rng: np.random.Generator, scan: LabelledScan, size: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A patch around a voxel of a random organ; what lies outside the scan is air and background.

    Returns:
        Voxels float32 and classes uint8 [D, H, W], and bool [classes] of those that are annotated.
    """
    voxels = scan.voxels[rng.integers(len(scan.voxels))]
    reach = np.array(size) // SHIFT
    middle = voxels[rng.integers(len(voxels))] + rng.integers(-reach, reach + 1)
    room = np.array(scan.volume.shape) - size
    start = np.clip(middle - np.array(size) // 2, np.minimum(room, 0), np.maximum(room, 0))
    inside = tuple(slice(max(0, s), s + n) for s, n in zip(start, size))
    short = [(max(0, -s), max(0, s + n - whole)) for s, n, whole in zip(start, size, scan.volume.shape)]
    crop = np.pad(scan.volume[inside], short, constant_values=AIR)
    return normalise(crop, *scan.scaling), np.pad(scan.target[inside], short), scan.labelled


def score_decoder(
    model: LightSegmenter, scans: list[LabelledScan], names: list[str], size: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Segments whole scans in windows and scores them.

    Args:
        model: from `train_decoder`.
        scans: labelled.
        names: of the classes, background first.
        size: of the windows.

    Returns:
        A row per scan and annotated organ: scan_id, organ, dice, iou, hd_mm, hd95_mm, ..., as `metrics.organ_metrics`.
    """
    rows = []
    for scan in scans:
        air = float(normalise(np.array(AIR), *scan.scaling))
        found = segment(model, normalise(scan.volume, *scan.scaling), size, "multiclass", air, OVERLAP)
        organs = {names[k]: int(k) for k in np.flatnonzero(scan.labelled)[1:]}
        axes = np.array(scan.record.affine).reshape(4, 4)[:3, :3]
        scores = organ_metrics(found, scan.target, organs, axes, "multiclass")
        rows += [{"scan_id": scan.record.scan_id, "organ": organ, **score} for organ, score in scores.items()]
    return rows
