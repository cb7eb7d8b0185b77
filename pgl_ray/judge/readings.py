"""One preparation for every encoder that is judged, random ones too: how its BatchNorm normalises.

A random encoder's running statistics are 0 and 1, a trained one's are those of its training: judged like that, they are
not in the same state, and a random network with BatchNorm off is the stronger one. So statistics are estimated again
for every encoder on the same unlabelled views, and the readings as trained and with BatchNorm off are given, too.
"""

import copy
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pgl_ray.config import CropConfig, FailedRun
from pgl_ray.data.random_numbers import generator
from pgl_ray.data.rendering import AIR, read_padded, render
from pgl_ray.data.sampling import sample_prior
from pgl_ray.data.scan_files import open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.data.voxel_statistics import BODY_HU
from pgl_ray.files.resample import smoothed
from pgl_ray.model.device import Net
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import triple

Reading = Literal["reestimated", "trained", "off"]
READINGS: tuple[Reading, ...] = ("reestimated", "trained", "off")
IN_WORDS = {"reestimated": "BatchNorm re-estimated", "trained": "BatchNorm as trained", "off": "BatchNorm off"}
NUM_VIEWS = 64  # that statistics are estimated on
AT_A_TIME = 8  # views per forward pass


def unlabelled_views(
    index: Index,
    scans: list[ScanRecord],
    size: tuple[int, int, int],
    seed: int,
    spacing_mm: tuple[float, float, float] | None = None,
) -> Tensor:
    """Plain crops around the body, the same ones for every encoder.

    Args:
        index: of the store.
        scans: to draw from: in turn, or, of more than there are views, as far apart in the list as they can be.
        size: of a view (D, H, W).
        seed: of the draws.
        spacing_mm: voxel size (D, H, W) that the views have; none: that of the scans.

    Returns:
        float32 [NUM_VIEWS, 1, D, H, W], z-scored.

    Raises:
        ValueError: no scans.
    """
    if not scans:
        raise ValueError(f"{index.store} has no scan to estimate BatchNorm's statistics on: choose another split=...")
    views = []
    for number in range(NUM_VIEWS):
        scan = scans[number * max(len(scans), NUM_VIEWS) // NUM_VIEWS % len(scans)]
        scales = np.divide(spacing_mm or scan.spacing_mm, scan.spacing_mm)
        extent = triple(max(1, round(length * by)) for length, by in zip(size, scales.tolist()))
        crops = CropConfig(size=extent, crop_scale=(1.0, 1.0), flip_prob=0.0, foreground=True)
        prior = sample_prior(generator(seed, 1, scan.scan_id, number), scan.shape, crops, scan.foreground_box)
        margin = np.ceil(2 * np.maximum(scales - 1, 0)).astype(np.int64)  # four sigma
        start, stop = prior.box.T  # what is around it is smoothed in, as far as the scan goes
        first = np.minimum(start, np.maximum(start - margin, 0))
        box = np.stack([first, np.maximum(stop, np.minimum(stop + margin, scan.shape))], 1)
        crop = smoothed(read_padded(open_volume(index.store, scan), box, AIR), scales)
        crop = crop[tuple(slice(by, by + length) for by, length in zip(start - first, extent))]
        views.append(render(crop, size, prior.flip, index.hu_window, scan.mean_hu, scan.std_hu))
    return torch.from_numpy(np.stack(views))[:, None]


def norms(module: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


@torch.no_grad()
def read_as(encoder: Net, reading: Reading, views: Tensor) -> Net:
    """A copy of an encoder in eval mode, its BatchNorm in one of three states.

    Args:
        encoder: left as it is.
        reading: reestimated: mean and variance of `views`; trained: those it holds; off: 0 and 1.
        views: [N, 1, D, H, W], for reestimated.

    Returns:
        The copy, on the encoder's device. An encoder without BatchNorm reads the same in all states.
    """
    encoder = _unsync(copy.deepcopy(encoder))
    layers = norms(encoder)
    if reading == "trained" or not layers:
        return encoder.eval()
    for layer in layers:
        layer.reset_running_stats()
    if reading == "reestimated":
        device = next(encoder.parameters()).device
        for layer in layers:
            layer.momentum = None  # the plain mean over passes
            layer.train()
        encoder.train()
        for batch in views.split(AT_A_TIME):
            encoder(batch.to(device))
    return encoder.eval()


def _unsync(encoder: Net) -> Net:
    """The same with BatchNorm in the place of SyncBatchNorm, which would wait for workers that do not judge."""
    for parent in list(encoder.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.SyncBatchNorm):
                settings = part.num_features, part.eps, part.momentum, part.affine, part.track_running_stats
                plain = nn.BatchNorm3d(*settings).to(next(part.buffers()))
                plain.load_state_dict(part.state_dict())
                setattr(parent, name, plain.train(part.training))
    return encoder


@torch.no_grad()
def reestimate(encoder: nn.Module, views: Tensor) -> None:
    """Gives an encoder's BatchNorm the statistics of unlabelled views, in place; all else of it stays.

    Args:
        encoder: on the device to compute on.
        views: [N, 1, D, H, W], from `unlabelled_views`.
    """
    for layer, estimated in zip(norms(encoder), norms(read_as(encoder, "reestimated", views)), strict=True):
        for name, buffer in layer.named_buffers(recurse=False):
            buffer.copy_(estimated.get_buffer(name))


def possible(encoder: nn.Module, trained: bool) -> tuple[Reading, ...]:
    """Readings that differ: a random encoder was not trained, and one without BatchNorm has one state."""
    if not norms(encoder):
        return ("trained",)
    return READINGS if trained else ("reestimated", "off")


def in_words(readings: Iterable[str]) -> dict[str, str]:
    """What the readings of an encoder are called; an encoder without BatchNorm has only one.

    Args:
        readings: all its readings.
    """
    return {"trained": "no BatchNorm"} if list(readings) == ["trained"] else IN_WORDS


def body_points(volume: np.ndarray, spacing_mm: tuple[float, ...], every_mm: float) -> np.ndarray:
    """Voxels on a grid inside the body, closed over small air spaces.

    Args:
        volume: HU [D, H, W].
        spacing_mm: voxel size.
        every_mm: about the distance of neighbouring points.

    Returns:
        int64 [points, 3].
    """
    from scipy import ndimage

    step = [max(1, round(every_mm / size)) for size in spacing_mm]
    first = [min(by // 2, length - 1) for by, length in zip(step, volume.shape)]  # a scan may be thinner than a step
    coarse = volume[tuple(slice(start, None, by) for start, by in zip(first, step))] > BODY_HU
    closed = ndimage.binary_closing(np.pad(coarse, 1, mode="edge"), iterations=1)[1:-1, 1:-1, 1:-1] | coarse
    return np.argwhere(closed) * step + first


class StandardisedMaps(nn.Module):
    """An encoder whose maps have mean 0 and standard deviation 1 per channel over unlabelled views; frozen.

    What a judge's distances and first layers see of a channel does not depend on the scale an encoder happens to give
    it. A constant channel becomes 0. The attributes are the encoder's, of the maps that it computes.
    """

    def __init__(self, encoder: Encoder | ResEncoder, views: Tensor):
        """
        Args:
            encoder: in eval mode, as `read_as` gives it.
            views: [N, 1, D, H, W].

        Raises:
            FailedRun: maps that are not finite.
        """
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.last, num = encoder.last, encoder.last + 1
        self.strides, self.centers = encoder.strides[:num], encoder.centers[:num]
        self.channels = encoder.channels[:num]
        device = next(encoder.parameters()).device
        batches = [[one.flatten(2) for one in self.plain(batch.to(device))] for batch in views.split(AT_A_TIME)]
        self.scaling = []
        for maps in zip(*batches):
            mean = torch.stack([one.mean((0, 2)) for one in maps]).mean(0)
            if not mean.isfinite().all():
                raise FailedRun("the encoder's features are not finite")
            std = torch.stack([(one - mean[:, None]).square().mean((0, 2)) for one in maps]).mean(0).sqrt()
            scale = torch.where(std > 1e-4 * mean.abs(), 1 / std, 0)
            self.scaling.append((mean[:, None, None, None], scale[:, None, None, None]))

    @torch.no_grad()
    def plain(self, x: Tensor) -> list[Tensor]:
        """The encoder's own maps."""
        return self.encoder(x)

    def train(self, mode: bool = True) -> "StandardisedMaps":
        """Stays in eval mode."""
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Standardised maps of [N, 1, D, H, W], as many as the encoder gives."""
        return [(one - mean) * scale for one, (mean, scale) in zip(self.plain(x), self.scaling)]
