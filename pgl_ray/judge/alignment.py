"""Where compared features look, by views of coordinate ramps, and how far apart these places are."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pgl_ray.data.batch_views import resize_and_flip
from pgl_ray.model.pgl import Pair, align, valid_bins
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, Prior, clamped_bins, interpolation_matrices

EXACT = 0.01  # voxels; float32 coordinates of a scan of 1000 slices


@torch.no_grad()
def centre_taps(encoder: Encoder) -> None:
    """Turns an encoder into one that passes on the voxel under each kernel's centre, times a power of two."""
    for part in encoder.eval().modules():
        if isinstance(part, nn.Conv3d):
            part.weight.zero_()
            if part.bias is not None:
                part.bias.zero_()
            middle = [size // 2 for size in part.kernel_size]
            for out in range(part.out_channels):
                part.weight[(out, out % part.in_channels, *middle)] = 1
        elif isinstance(part, nn.BatchNorm3d):
            nn.init.ones_(part.weight), nn.init.zeros_(part.bias), nn.init.zeros_(part.get_buffer("running_mean"))
            part.get_buffer("running_var").fill_(1 - part.eps)
        elif isinstance(part, nn.InstanceNorm3d):
            # no weights make it the identity
            part.forward = lambda x: x  # type: ignore[method-assign, assignment]


def pair_of_ramps(priors: list[tuple[Prior, Prior]], size: tuple[int, int, int]) -> Pair:
    """Views with three channels, the scan coordinates (D, H, W) of what each voxel shows: [N, 3, D, H, W]."""
    views = [torch.stack([_ramps(pair[i], size) for pair in priors]) for i in (0, 1)]
    boxes = [torch.from_numpy(np.stack([pair[i].box for pair in priors])) for i in (0, 1)]
    flips = [torch.from_numpy(np.stack([pair[i].flip for pair in priors])) for i in (0, 1)]
    return Pair(*views, *boxes, *flips)


def _ramps(prior: Prior, size: tuple[int, int, int]) -> Tensor:
    """One view of the three ramps, made as a CT's view is."""
    voxels = [np.arange(*axis, dtype=np.float32) + 0.5 for axis in prior.box]
    ramps = np.meshgrid(*voxels, indexing="ij")
    return torch.stack([resize_and_flip(ramp, size, prior.flip) for ramp in ramps])


@torch.no_grad()
def look(encoder: Encoder, pair: Pair) -> Tensor:
    """Where each cell of the last map looks: scan coordinates [2N, 3, d, h, w], the first views, then the second."""
    ramps = pair.views
    shift = 1 - ramps.min()  # ReLU passes what is positive
    seen = encoder(ramps.flatten(0, 1).unsqueeze(1) + shift)[-1][:, 0]
    one = encoder(torch.ones_like(ramps[:1, :1]))[-1][0, 0]  # what the blocks' sums multiply by
    return (seen / one - shift).unflatten(0, ramps.shape[:2])


class Residuals(NamedTuple):
    """Of one batch: residuals [N, 3, bins...] in voxels, valid [N, bins...], clamped [N, 3], allowed [N, 3]."""

    residual: Tensor
    spacing_mm: Tensor
    valid: Tensor
    clamped: Tensor
    allowed: Tensor


def residuals_of(maps: Tensor, pair: Pair, geometry: Geometry, spacing_mm: Tensor, exact: bool) -> Residuals:
    """How far apart a batch's compared features look.

    Args:
        maps: from `look`.
        pair: the views of ramps, whose priors the aligner is given.
        geometry: of the map.
        spacing_mm: [N, 3] of the scans.
        exact: whether the geometry's centres are those of receptive fields.
    """
    first, second = align(maps, interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)).chunk(2)
    clamped = torch.stack(
        [axis.float().mean(1) for axis in clamped_bins(pair.boxes, pair.flips, pair.regions, geometry)], 1
    )
    # a view voxel is S / P scan voxels; the middle of a cell lies (s - 1) / 2 view voxels off its receptive field's
    zoom = (pair.boxes[..., 1] - pair.boxes[..., 0]) / torch.tensor(geometry.view_size)
    off = torch.zeros(3) if exact else (torch.tensor(geometry.output_stride) - 1) / 2
    enlarged = (1 - zoom).clamp_min(0) / 2  # an enlarged crop repeats its outermost half voxel
    one, two = (zoom * off + enlarged).chunk(2)
    means = clamped.unflatten(0, (2, -1)).mean(0)
    return Residuals((first - second).abs(), spacing_mm, valid_bins(pair, geometry), means, one + two + EXACT)


def summary_of(parts: list[Residuals]) -> dict[str, Any]:
    """Figures of one convention over all pairs; lists run over D, H, W."""
    residual, spacing, valid, clamped, allowed = (torch.cat(each) for each in zip(*parts, strict=True))
    mm = residual * spacing[:, :, None, None, None]
    inside = valid[:, None].expand_as(residual)

    def figures(values: Tensor) -> dict[str, list[float]]:
        unclamped = [values[:, axis][inside[:, axis]] for axis in range(3)]
        return {
            "mean": values.mean((0, 2, 3, 4)).tolist(),
            "max": values.amax((0, 2, 3, 4)).tolist(),
            "mean_not_clamped": [each.mean().item() if len(each) else None for each in unclamped],
            "max_not_clamped": [each.max().item() if len(each) else None for each in unclamped],
        }

    excess = (residual - allowed[:, :, None, None, None])[inside]
    return {
        "voxels": figures(residual),
        "mm": figures(mm),
        "clamped_share": clamped.mean(0).tolist(),
        "bins_clamped_in_no_axis": valid.float().mean().item(),
        "allowed_voxels": allowed.amax(0).tolist(),
        "excess_voxels": max(0.0, excess.max().item()) if len(excess) else 0.0,
        "passed": len(excess) > 0 and bool((excess <= 0).all()),
    }
