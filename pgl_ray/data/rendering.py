"""What was sampled, done to voxels: a box is read, clipped, normalised, resized and flipped."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pgl_ray.data import kernels

AIR = -1024  # HU outside a scan


def normalise(voxels: np.ndarray, window: tuple[float, float], mean: float, std: float) -> np.ndarray:
    """Clips HU to the window, then subtracts the scan's mean and divides by its standard deviation (Sec. 5.1).

    Args:
        voxels: HU, any shape.
        window: HU bounds.
        mean, std: of the scan's clipped voxels, HU; a std below 1 HU (a blank scan) counts as 1, for float16's range.

    Returns:
        float32 of the same shape.
    """
    clipped = np.clip(voxels.astype(np.float32), *window)
    return (clipped - np.float32(mean)) / np.float32(max(std, 1.0))


class Stored(Protocol):
    """An array that boxes are read of, as `data.array_reader.ArrayReader`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In voxels."""

    def read_boxes(self, boxes: Any, /) -> list[np.ndarray]:
        """The voxels of each of several boxes, int [3, 2], inside the array."""


def read_padded(reader: Stored, box: np.ndarray, fill: int) -> np.ndarray:
    """Reads a box that may reach beyond the array; voxels outside are `fill`.

    Args:
        reader: of the array.
        box: int [3, 2].
        fill: value outside.
    """
    return read_all_padded(reader, [box], fill)[0]


def read_all_padded(reader: Stored, boxes: Sequence[np.ndarray], fill: int) -> list[np.ndarray]:
    """`read_padded` of several boxes in one go: what they share is read once."""
    boxes = [np.asarray(box).tolist() for box in boxes]  # a crop's few numbers are quicker in plain Python
    insides = [
        [[min(max(edge, 0), size) for edge in axis] for axis, size in zip(box, reader.shape, strict=True)]
        for box in boxes
    ]
    voxels = reader.read_boxes(insides)
    return [_padded(*each, fill) for each in zip(voxels, insides, boxes, strict=True)]


def _padded(voxels: np.ndarray, inside: list[list[int]], box: list[list[int]], fill: int) -> np.ndarray:
    if inside == box:
        return voxels
    padded = np.full([stop - start for start, stop in box], fill, voxels.dtype)
    starts = [first - start for (first, _), (start, _) in zip(inside, box, strict=True)]
    padded[tuple(slice(s, s + n) for s, n in zip(starts, voxels.shape, strict=True))] = voxels
    return padded


def render(
    crop: np.ndarray, size: tuple[int, int, int], flip: np.ndarray, window: tuple[float, float], mean: float, std: float
) -> np.ndarray:
    """Window, z-score, linear resize and flip of a crop in one compiled pass.

    The resize has the half-pixel convention (align_corners=False), which keeps box coordinates linear, as Eq. 6 needs.

    Args:
        crop: [d, h, w] of whole or real numbers, HU.
        size: P (D, H, W).
        flip: bool [3].
        window, mean, std: as in `normalise`.

    Returns:
        float32 [D, H, W]; `batch_views.resize_and_flip(normalise(crop))` to 1e-5.
    """
    tables = [_table(old, new, bool(back)) for old, new, back in zip(crop.shape, size, flip, strict=True)]
    scale = 1 / max(std, 1.0)
    numbers = [np.float32(value) for value in (*window, scale, -mean * scale)]
    view, item = np.empty(size, np.float32), crop.itemsize
    if crop.strides[2] != item or min(crop.strides) < item:
        crop = np.ascontiguousarray(crop)
    (planes, rows, _), (depth, height, width) = (step // item for step in crop.strides), crop.shape
    line = as_strided(crop, ((depth - 1) * planes + (height - 1) * rows + width,), (item,))
    kernels.load().resize(line, planes, rows, height, width, *numbers, *tables, view)
    return view


def to_half(view: np.ndarray, out: np.ndarray) -> None:
    """Writes float32 voxels, none of them nan, as float16.

    Args:
        view: float32, any shape, C order.
        out: float16 of the same shape, C order.
    """
    kernels.load().to_half(view.reshape(-1).view(np.uint32), out.reshape(-1).view(np.uint16))


def resize_labels(crop: np.ndarray, size: tuple[int, int, int], flip: np.ndarray) -> np.ndarray:
    """Resizes a crop of labels to the nearest voxel, in the same convention, then flips it.

    Args:
        crop: [d, h, w].
        size: P (D, H, W).
        flip: bool [3].

    Returns:
        [D, H, W] of the crop's type.
    """
    axes = [_nearest(old, new, bool(back)) for old, new, back in zip(crop.shape, size, flip, strict=True)]
    return crop[np.ix_(*axes)]


@lru_cache(maxsize=1024)
def _nearest(old: int, new: int, back: bool) -> np.ndarray:
    """Voxel that each of a resized axis shows."""
    at = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new))
    places = np.minimum(at.astype(np.int64), old - 1)
    return places[::-1] if back else places


@lru_cache(maxsize=1024)
def _table(old: int, new: int, back: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear resize of one axis in the half-pixel convention: (first voxel, second voxel, weight of the second)."""
    ratio = np.float64(np.float32(old) / np.float32(new))  # float32 with one rounding, as torch's fused multiply-add
    at = np.maximum((ratio * (np.arange(new) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(at.astype(np.int64), old - 1)
    weight = np.minimum(at - first.astype(np.float32), np.float32(1))
    parts = first.astype(np.uint64), np.minimum(first + 1, old - 1).astype(np.uint64), weight
    return tuple(np.ascontiguousarray(part[::-1] if back else part) for part in parts)
