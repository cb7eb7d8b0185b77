"""Resampling a scan to another voxel size; only where prepare is asked for it, for the paper does not."""

import math

import numpy as np
from scipy import ndimage

MAX_VOXELS = 2e9  # 4 GB as int16, twenty times a usual thorax and abdomen of 1 mm slices


def resample(
    volume: np.ndarray, label: np.ndarray | None, affine: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Volume by linear interpolation (order 1), label by the nearest voxel, on a grid of exactly the given spacing.

    The new grid begins at the same outer edge of the first voxel and covers the field of view to half a voxel. Along an
    axis that gets coarser by a ratio r, a Gaussian of sigma (r - 1) / 2 old voxels keeps fine structures from aliasing,
    as in scikit-image's resize. Voxels beyond the border repeat it.

    Args:
        volume: int16 [D, H, W], HU.
        label: [D, H, W], or none.
        affine: [4, 4], voxel index (d, h, w, 1) -> RAS+ mm.
        spacing_mm: (D, H, W).

    Returns:
        The three of them on the new grid; volume and affine are the old ones where the spacing is so already.

    Raises:
        ValueError: as new_shape.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = np.asarray(spacing_mm) / spacing
    if np.allclose(ratio, 1, atol=1e-6):
        return volume, label, affine
    shape = new_shape(volume.shape, affine, spacing_mm)
    smooth = smoothed(volume, ratio)
    offset = (ratio - 1) / 2  # the middle of new voxel 0 in old voxel indices
    grid = {"offset": offset, "output_shape": shape, "mode": "nearest"}
    moved = ndimage.affine_transform(smooth, ratio, order=1, output=np.float32, **grid)
    if label is not None:
        label = ndimage.affine_transform(label, ratio, order=0, **grid)
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = offset
    return np.rint(moved).astype(np.int16), label, affine @ step


def smoothed(volume: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """A volume whose axes will get coarser by `ratio`, without what would alias; see `resample`."""
    for axis, r in enumerate(ratio):
        if r > 1:
            volume = ndimage.gaussian_filter1d(volume, (r - 1) / 2, axis, output=np.float32, mode="nearest")
    return volume


def new_shape(
    shape: tuple[int, ...], affine: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Shape of a scan that is resampled.

    Raises:
        ValueError: a single voxel along an axis that had several, or more than MAX_VOXELS.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    new = tuple(max(1, round(size * own / wanted)) for size, own, wanted in zip(shape, spacing, spacing_mm))
    wanted = f"spacing_mm={list(map(float, spacing_mm))} makes shape {new} (D, H, W) of a scan of {tuple(shape)}"
    if any(size == 1 < old for size, old in zip(new, shape)):
        raise ValueError(f"{wanted}, 1 voxel along an axis: take a smaller spacing, or leave the scan out")
    if math.prod(new) > max(MAX_VOXELS, math.prod(shape)):
        raise ValueError(f"{wanted}, more than {MAX_VOXELS:.0e} voxels: take a larger spacing")
    return new


def onto_grid(label: np.ndarray, affine: np.ndarray, like: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A label map on another grid of the same axes, by the nearest voxel.

    Args:
        label: [D, H, W].
        affine, like: [4, 4], of the label and of the other grid, voxel index -> RAS+ mm.
        shape: of the other grid.
    """
    step = np.linalg.inv(affine) @ like
    return ndimage.affine_transform(label, step[:3, :3], step[:3, 3], shape, order=0, mode="nearest")
