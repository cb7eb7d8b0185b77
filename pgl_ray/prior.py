"""The prior of a view, and what follows from two of them: the contract between the data and the model.

Frames (axis order D, H, W everywhere; a box is half-open, in edge coordinates, so size = stop - start):
  scan     stored voxels
  view     after crop, resize to size P, and flip
  feature  the encoder's map; n = P / output stride
Boxes are arrays [..., 3, 2] of (start, stop); flips are booleans [..., 3].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:  # rendering processes, which need priors but no tensors, start without torch
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")  # either library's, the same for all arguments
Number = TypeVar("Number")
Axes: TypeAlias = "tuple[Tensor, Tensor, Tensor]"  # one per axis: D, H, W


@dataclass(frozen=True)
class Prior:
    """What the augmentation did to one view; sampled first, then applied.

    Attributes:
        box: int [3, 2], the crop in scan voxels; it may reach beyond a scan that is smaller than the crop.
        flip: bool [3], axes along which the resized crop was flipped.
    """

    box: np.ndarray
    flip: np.ndarray


class Geometry(NamedTuple):
    """What the aligner must know of view and encoder.

    Attributes:
        view_size: P per axis, in view voxels.
        output_stride: s per axis, in view voxels per feature cell.
        center: per axis, the view edge coordinate of feature cell 0's centre: 0.5 for a ResNet's symmetric kernels
            (its cells sit at s * j + 0.5), s / 2 for the paper's RoIAlign reading (the middle of the cell).
    """

    view_size: tuple[int, int, int]
    output_stride: tuple[int, int, int]
    center: tuple[float, float, float]


def triple(values: Iterable[Number]) -> tuple[Number, Number, Number]:
    """One value per axis (D, H, W), of whatever gives three."""
    d, h, w = values
    return d, h, w


def overlap_box(box_1: Array, box_2: Array) -> Array:
    """Common region of two boxes of one scan.

    Args:
        box_1, box_2: [..., 3, 2] numpy arrays or tensors, scan frame.

    Returns:
        [..., 3, 2] of the same kind; an axis without overlap has stop <= start.
    """
    lib = _library(box_1)
    start = lib.maximum(box_1[..., 0], box_2[..., 0])
    stop = lib.minimum(box_1[..., 1], box_2[..., 1])
    return lib.stack([start, stop], -1)


def _library(array: Any) -> Any:
    """numpy for its arrays and numbers, else torch."""
    if isinstance(array, (np.ndarray, np.generic)):  # torch.compile cannot trace a union of them
        return np
    import torch

    return torch


def volume_of(box: Array) -> Array:
    """Voxels of a box [..., 3, 2]; 0 where an axis is empty."""
    return (box[..., 1] - box[..., 0]).clip(0).prod(-1)


def overlap_share(box_1: np.ndarray, box_2: np.ndarray, of: Literal["smaller", "union"]) -> np.ndarray:
    """Overlap of two boxes as a share of the smaller one's volume, or of the union.

    Args:
        box_1, box_2: [..., 3, 2] in the scan frame.
        of: see above.
    """
    common, first, second = volume_of(overlap_box(box_1, box_2)), volume_of(box_1), volume_of(box_2)
    if of == "union":
        return common / (first + second - common)
    return common / np.minimum(first, second)


def scan_to_view(point: Array, box: Array, flip: Array, view_size: Array) -> Array:
    """Maps scan edge coordinates to view edge coordinates.

    Args:
        point: [..., 3], scan frame.
        box, flip: the view's prior, [..., 3, 2] and [..., 3].
        view_size: [3].
    """
    scaled = (point - box[..., 0]) * (view_size / (box[..., 1] - box[..., 0]))
    return _library(scaled).where(flip, view_size - scaled, scaled)


def view_to_scan(point: Array, box: Array, flip: Array, view_size: Array) -> Array:
    """Inverse of `scan_to_view`."""
    unflipped = _library(point).where(flip, view_size - point, point)
    return unflipped * ((box[..., 1] - box[..., 0]) / view_size) + box[..., 0]


def interpolation_matrices(box: "Tensor", flip: "Tensor", region: "Tensor", geometry: Geometry) -> Axes:
    """FlipAlign and CSAlign of one view's features as one matrix per axis (Eq. 4 to 7).

    Row k of an axis' matrix holds the linear weights that read the feature map in bin k. The region has as many bins
    as the feature map has cells, so RoIAlign (of sampling ratio 1) followed by the resize is this one interpolation.
    Bins beyond the outermost feature centres are clamped to them.

    Args:
        box: [N, 3, 2] the views' boxes, scan frame.
        flip: bool [N, 3].
        region: [N, 3, 2] what to align (the overlap), scan frame.
        geometry: of view and encoder.

    Returns:
        Three float32 tensors [N, n, n], axes D, H, W: bin x feature cell.
    """

    def matrix(index: "Tensor") -> "Tensor":
        num = index.shape[1]
        cells = _library(index).arange(num, device=index.device, dtype=index.dtype)
        return (1 - (index.clamp(0, num - 1).unsqueeze(-1) - cells).abs()).clamp_min(0)  # linear interpolation

    return triple(map(matrix, feature_coordinates(box, flip, region, geometry)))


def clamped_bins(box: "Tensor", flip: "Tensor", region: "Tensor", geometry: Geometry) -> Axes:
    """Whether a bin's middle lies beyond the outermost feature centres of a view.

    Args:
        box, flip, region, geometry: as in `interpolation_matrices`.

    Returns:
        Three bool tensors [N, n], axes D, H, W.
    """
    axes = feature_coordinates(box, flip, region, geometry)
    return triple((index < 0) | (index > index.shape[1] - 1) for index in axes)


def clamped_shares(box: "Tensor", flip: "Tensor", geometry: Geometry) -> tuple[float, float, float]:
    """Share of the clamped bins of pairs' overlaps along D, H and W, the mean of pairs, views and bins.

    Args:
        box: [N, 2, 3, 2] the two views' boxes, scan frame.
        flip: bool [N, 2, 3].
        geometry: as in `interpolation_matrices`.
    """
    region = overlap_box(box[:, 0], box[:, 1])
    clamped = clamped_bins(box.flatten(0, 1), flip.flatten(0, 1), region.repeat_interleave(2, 0), geometry)
    return triple(axis.float().mean().item() for axis in clamped)


def feature_coordinates(box: "Tensor", flip: "Tensor", region: "Tensor", geometry: Geometry) -> Axes:
    """Continuous feature index of the middle of every bin of a region, flips undone, not clamped.

    Returns:
        Three float32 tensors [N, n], axes D, H, W; cell j's centre has index j.
    """

    torch = _library(box)

    def along(axis: int) -> "Tensor":
        size, stride, center = geometry.view_size[axis], geometry.output_stride[axis], geometry.center[axis]
        num = size // stride
        start, stop = region[:, axis, 0].float(), region[:, axis, 1].float()
        bins = (torch.arange(num, device=box.device) + 0.5) / num
        point = start[:, None] + bins * (stop - start)[:, None]  # scan frame
        first, length = box[:, axis, 0].float()[:, None], (box[:, axis, 1] - box[:, axis, 0]).float()[:, None]
        view = (point - first) * (size / length)  # Eq. 5, and Eq. 6's factor P / S
        view = torch.where(flip[:, axis, None], size - view, view)  # the flipped view's own coordinates
        return (view - center) / stride

    return triple(map(along, range(3)))
