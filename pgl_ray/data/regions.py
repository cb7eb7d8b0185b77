"""Parts of scans that several pairs each are cropped from, so that what is read once serves all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pgl_ray.config import CropConfig, ViewsConfig
from pgl_ray.data.sampling import sample_pairs

REGION_SCALE = 2  # a region's size as a multiple of the view size
REGIONS_MIXED = 16  # regions whose pairs are shuffled with one another; up to 31 at an epoch's end


def sample_regions(
    u: np.ndarray, shape: np.ndarray, chunk: np.ndarray, views: CropConfig, body: np.ndarray | None = None
) -> np.ndarray:
    """Draws the parts of scans that several pairs each are cropped from. They are made of whole chunks, so nothing is
    decoded that no pair can show.

    Args:
        u: [N, 3], uniform random numbers.
        shape: of the scans, int [N, 3].
        chunk: of their arrays, int [N, 3].
        views: size, scales and foreground.
        body: the scans' foreground boxes, int [N, 3, 2]; with `views.foreground` a region holds a voxel of them.

    Returns:
        int64 [N, 3, 2], inside the scan: REGION_SCALE times the view size, or more where crops may be as large, in
        whole chunks; a rest of the scan that is smaller than a chunk is taken along.
    """
    least = np.ceil(max(REGION_SCALE, views.crop_scale[1]) * np.asarray(views.size)).astype(np.int64)
    length = -(-least // chunk) * chunk
    room = np.maximum(shape - length, 0)
    if views.foreground and body is not None:
        middle = body[..., 0] + (u * (body[..., 1] - body[..., 0])).astype(np.int64)
        start = np.clip(middle - length // 2, 0, room)
    else:
        start = (u * (room + 1)).astype(np.int64)
    start = np.minimum((start + chunk // 2) // chunk, room // chunk) * chunk
    stop = start + length
    return np.stack([start, np.where(stop + chunk > shape, shape, stop)], -1)


def sample_pairs_in(
    region: np.ndarray,
    u: np.ndarray,
    views: ViewsConfig,
    body: np.ndarray | None = None,
    shared_box: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`sample_pairs` inside regions as if they were the scans; the boxes are in the scan frame.

    Args:
        region: int [N, 3, 2], by `sample_regions`.
        u, views, body, shared_box: as in `sample_pairs`; where a region and the foreground box have nothing in common,
            the whole region is the foreground.
    """
    origin = region[..., :1]
    if body is not None:
        inside = np.clip(body, origin, region[..., 1:])
        held = (inside[..., 0] < inside[..., 1]).all(-1)[:, None, None]
        body = np.where(held, inside, region) - origin
    boxes, flips = sample_pairs(u, region[..., 1] - region[..., 0], views, body, shared_box)
    return boxes + origin[:, None], flips


class Region(NamedTuple):
    """A part of a scan in memory, to be read as the scan is.

    Attributes:
        voxels: of the part.
        start: of the part in the scan.
        shape: of the scan.
    """

    voxels: np.ndarray
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    def read_boxes(self, boxes: Sequence[list[list[int]]]) -> list[np.ndarray]:
        """Voxels of boxes that lie inside the part, int [3, 2] in the scan frame; cuts of `voxels`, not copies."""
        d, h, w = self.start
        return [self.voxels[a - d : b - d, e - h : f - h, p - w : q - w] for (a, b), (e, f), (p, q) in boxes]
