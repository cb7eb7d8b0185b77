"""Views as tensors: what the renderers left to do of a whole batch, on any device."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl_ray.config import IntensityConfig
from pgl_ray.data.hu_codes import hu_of_codes
from pgl_ray.splitmix import STEP, counter, mix


def finish(
    batch: dict[str, torch.Tensor], size: tuple[int, int, int], intensity: IntensityConfig, hu_window: Sequence[float]
) -> dict[str, torch.Tensor]:
    """What the renderer of a batch left to do, where the batch's tensors lie; the views are the same to float16's
    rounding.

    Args:
        batch: of a PairRenderer.
        size: P (D, H, W), of the views.
        intensity: its ranges.
        hu_window: of the store.
    """
    done = {}
    for view in ("1", "2"):
        if "crop_" + view in batch:
            crops, prior = batch["crop_" + view], (batch["box_" + view], batch["flip_" + view])
            if crops.dtype == torch.uint8:
                crops = _hu_of_codes(tuple(hu_window), crops.device)[crops.int()]
            done["view_" + view] = render_each(crops, *prior, size, hu_window, batch["scaling"])
        if "intensity_" + view in batch:
            params = batch["intensity_" + view], batch["noise_seed_" + view]
            views = done.get("view_" + view, batch.get("view_" + view))
            done["view_" + view] = apply_intensities(views, *params, intensity.blur_sigma[1])
    return batch | done if done else batch


@lru_cache(maxsize=4)
def _hu_of_codes(hu_window: tuple[float, float], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(hu_of_codes(hu_window)).to(device)


def render_each(
    crops: Tensor, box: Tensor, flip: Tensor, size: tuple[int, int, int], window: Sequence[float], scaling: Tensor
) -> Tensor:
    """`rendering.render` of crops of any sizes, on any device: along each axis one product with a matrix per crop.

    Args:
        crops: [N, 1, d, h, w], HU, each in the first corner of its array.
        box: int [N, 3, 2], whose lengths are the crops'.
        flip: [N, 3], not 0 where flipped.
        size: P (D, H, W).
        window: HU bounds.
        scaling: float32 [N, 2], mean and standard deviation in HU.

    Returns:
        float32 [N, 1, D, H, W], as there to 1e-4.
    """
    views = crops.float().clamp(*window)
    length = box[..., 1] - box[..., 0]
    z, y, x = (
        _matrices(length[:, axis], flip[:, axis], views.shape[2 + axis], size[axis])[:, None] for axis in range(3)
    )
    views = (z @ views.flatten(3)).unflatten(3, views.shape[3:])
    views = y[:, None] @ views @ x[:, None].mT
    mean, std = scaling[:, :, None, None, None, None].unbind(1)
    return (views - mean) / std.clamp_min(1)


def _matrices(length: Tensor, flip: Tensor, num: int, new: int) -> Tensor:
    """`rendering`'s tables of a batch, float32 [N, new, num]; voxels from `length` on weigh nothing."""
    at = torch.arange(new, device=length.device, dtype=torch.float64) + 0.5
    ratio = (length.float() / new).double()
    at = (ratio[:, None] * at - 0.5).float().clamp_min(0)
    at = torch.where(flip.bool()[:, None], at.flip(1), at)
    at = torch.minimum(at, (length - 1).float()[:, None])
    return (1 - (at[:, :, None] - torch.arange(num, device=length.device)).abs()).clamp_min(0)


def apply_intensities(views: Tensor, intensity: Tensor, noise_seed: Tensor, max_sigma: float) -> Tensor:
    """`intensity_ops.apply_intensity` of a whole batch with each view's own parameters, on any device.

    Every operation runs on all views, with neutral parameters where it was not drawn, so that nothing waits for the
    device. Agrees with it to 1e-4.

    Args:
        views: [N, 1, D, H, W], z-scored.
        intensity: [N, 4] of noise_std, blur_sigma, gain, gamma.
        noise_seed: int64 [N].
        max_sigma: at least the largest blur_sigma.

    Returns:
        float32 [N, 1, D, H, W].
    """
    noise_std, sigma, gain, gamma = intensity.float()[:, :, None, None, None, None].unbind(1)
    out = views.float() + noise_std * noise(noise_seed, views.shape[1:])
    out = _blur_each(out, sigma, max(1, round(3 * max_sigma)))
    low, high = out.amin((1, 2, 3, 4), keepdim=True), out.amax((1, 2, 3, 4), keepdim=True)
    out = (out * gain).clamp(low, high)
    low, high = out.amin((1, 2, 3, 4), keepdim=True), out.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return torch.where(gamma == 1, out, ((out - low) / span).clamp(0, 1) ** gamma * span + low)


def noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers from seeds, the same on every device to float32's rounding.

    A counter through splitmix64 (Steele et al. 2014), then Box and Muller's transform of two 24-bit halves.

    Args:
        seeds: int64 [N].
        shape: of each view.

    Returns:
        float32 [N, *shape].
    """
    num = math.prod(shape)
    bits = mix(mix(seeds)[:, None] - STEP + counter(-(-num // 2), seeds.device))
    length = ((bits >> 40) & 0xFFFFFF).float().add_(1).div_(2**24).log_().mul_(-2).sqrt_()
    angle = ((bits >> 12) & 0xFFFFFF).float().mul_(2 * math.pi / 2**24)
    drawn = torch.stack([length * torch.cos(angle), length * torch.sin(angle)], 1)
    return drawn.flatten(1)[:, :num].reshape(len(seeds), *shape)


def _blur_each(views: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """`intensity_ops.blur`, a sigma per view, [N, 1, 1, 1, 1]; 0: none. The kernel is as long as each sigma's own."""
    at = torch.arange(-radius, radius + 1, device=views.device)
    reach = torch.floor(3 * sigma + 0.5).clamp_min(1)
    taps = torch.exp(-0.5 * (at / sigma.clamp_min(1e-3)) ** 2) * (at.abs() <= reach)
    taps = taps / taps.sum(-1, keepdim=True)  # [N, 1, 1, 1, taps]
    for axis in (2, 3, 4):
        pad, size = [0] * 6, views.shape[axis]
        pad[2 * (4 - axis)] = pad[2 * (4 - axis) + 1] = radius
        padded = F.pad(views, pad, mode="replicate")
        views = sum(taps[..., i, None] * padded.narrow(axis, i, size) for i in range(2 * radius + 1))
    return views


def resize_and_flip(crop: np.ndarray, size: tuple[int, int, int], flip: np.ndarray) -> Tensor:
    """Resizes a crop to the view size in the half-pixel convention, then flips it, as `rendering.render`.

    Args:
        crop: float32 [d, h, w].
        size: P (D, H, W).
        flip: bool [3].

    Returns:
        float32 [D, H, W].
    """
    tensor = torch.from_numpy(np.ascontiguousarray(crop))[None, None]
    tensor = F.interpolate(tensor, size=size, mode="trilinear", align_corners=False)[0, 0]
    return tensor.flip([axis for axis in range(3) if flip[axis]])
