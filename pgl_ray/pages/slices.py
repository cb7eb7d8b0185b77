"""Slices of volumes, with letters for the anatomy's directions and boxes.

Stored volumes run along S, P, L (files/ct.py): rows = H, columns = W is the axial slice as radiologists see it, and
rows = D upwards is the coronal one with the head up.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from pgl_ray.prior import scan_to_view

VIEW_COLORS, OVERLAP_COLOR = ("#56B4E9", "#E69F00"), "#F0E442"
WINDOWS = {"soft tissue": (-200, 300), "lung": (-1000, 200), "bone": (-200, 1000), "all": (-1024, 1000)}
DISPLAY_HU = (-200.0, 300.0)  # soft tissue; for display only
AXIS_ENDS = (("I", "S"), ("A", "P"), ("R", "L"))  # what lies at the low and high end of D, H, W


class Plane(NamedTuple):
    """A slicing plane: the axis it is perpendicular to, and the axes drawn as rows and columns."""

    name: str
    through: int
    row: int
    column: int
    origin: str


AXIAL, CORONAL = Plane("axial", 0, 1, 2, "upper"), Plane("coronal", 1, 0, 2, "lower")
SAGITTAL = Plane("sagittal", 2, 0, 1, "lower")


def region_in_view(region: np.ndarray, box: np.ndarray, flip: np.ndarray, view_size: np.ndarray) -> np.ndarray:
    """A scan-frame region [3, 2] in a view's edge coordinates, start < stop."""
    corners = [scan_to_view(region[:, end].astype(float), box, flip, view_size) for end in (0, 1)]
    return np.sort(np.stack(corners, -1), axis=-1)


def slice_of(volume: np.ndarray, plane: Plane, position: float) -> np.ndarray:
    """The slice that holds edge coordinate `position`; rows and columns as the plane says."""
    index = int(np.clip(np.floor(position), 0, volume.shape[plane.through] - 1))
    return np.take(volume, index, axis=plane.through)


def draw_slice(ax: Axes, image: np.ndarray, plane: Plane, unit_mm: np.ndarray, **options: Any) -> None:
    """Draws a slice in its own edge coordinates at the anatomy's proportions; unit_mm [3] is a voxel's size."""
    rows, columns = image.shape[:2]
    extent = (0, columns, rows, 0) if plane.origin == "upper" else (0, columns, 0, rows)
    aspect = unit_mm[plane.row] / unit_mm[plane.column]
    ax.imshow(image, origin=plane.origin, extent=extent, aspect=aspect, **options)
    ax.set_axis_off()


def even_step(shape: Sequence[int], spacing_mm: Sequence[float] | np.ndarray, most: int) -> list[int]:
    """Which voxels are shown, so that there are at most so many and their spacing gets as even as can be."""
    step = [1, 1, 1]
    while math.prod(-(-length // by) for length, by in zip(shape, step)) > most:
        step[int(np.argmin(np.asarray(spacing_mm) * step))] += 1
    return step


def draw_letters(ax: Axes, plane: Plane, flip: np.ndarray) -> None:
    """Anatomical directions at the four edges; a flipped axis has them swapped."""
    column, row = (AXIS_ENDS[axis][:: -1 if flip[axis] else 1] for axis in (plane.column, plane.row))
    top, bottom = row if plane.origin == "upper" else row[::-1]
    for x, y, letter in ((0, 0.5, column[0]), (1, 0.5, column[1]), (0.5, 1, top), (0.5, 0, bottom)):
        inwards = ((0.5 - x) * 12, (0.5 - y) * 10)  # points
        options = {"color": "white", "fontsize": 6.5, "ha": "center", "va": "center"}
        text = ax.annotate(letter, (x, y), inwards, xycoords="axes fraction", textcoords="offset points", **options)
        text.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="black")])


def frame(ax: Axes, box: np.ndarray, plane: Plane, color: str, width: float) -> None:
    """A box [3, 2] of the frame that the axes are drawn in, as a rectangle."""
    (left, right), (low, high) = box[plane.column], box[plane.row]
    ax.add_patch(Rectangle((left, low), right - left, high - low, fill=False, ec=color, lw=width))


def frame_overlap(ax: Axes, box: np.ndarray, plane: Plane) -> None:
    """As `frame`; tinted and dashed, so that the crop's edge shows where both coincide."""
    (left, right), (low, high) = box[plane.column], box[plane.row]
    options = {"ec": OVERLAP_COLOR, "fc": (*to_rgba(OVERLAP_COLOR)[:3], 0.1), "lw": 1.2, "ls": (0, (3, 2))}
    ax.add_patch(Rectangle((left, low), right - left, high - low, **options))


def height_per_width(shape: tuple[int, ...], plane: Plane, unit_mm: np.ndarray) -> float:
    """Height of a plane's slices as a multiple of their width."""
    return shape[plane.row] * unit_mm[plane.row] / (shape[plane.column] * unit_mm[plane.column])
