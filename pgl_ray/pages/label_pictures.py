"""Organs painted on slices: predicted against true labels, and a scan with its labels."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pgl_ray.pages.figures import style
from pgl_ray.pages.slices import AXIAL, CORONAL, DISPLAY_HU, SAGITTAL, draw_letters, draw_slice, slice_of

ORGAN_COLORS = (  # Okabe-Ito, then of Tol's muted scheme what stays apart from it; figures number the organs, too
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
    *("#882255", "#999933", "#332288", "#AA4499", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#88CCEE"),
)


class Overlay(NamedTuple):
    """One axial slice of an evaluated scan; arrays [H, W], cut to the body.

    Attributes:
        image: HU.
        true: label values.
        predictions: (title, label values, where it is wrong) per run.
        unit_mm: of the scan, (D, H, W).
    """

    image: np.ndarray
    true: np.ndarray
    predictions: list[tuple[str, np.ndarray, np.ndarray]]
    unit_mm: np.ndarray


def organ_color(number: int) -> str:
    """Colour of the organ with this number in the legend, from 1 on."""
    return ORGAN_COLORS[(number - 1) % len(ORGAN_COLORS)]


@style
def overlay(slices: Overlay, values: tuple[int, ...]) -> Figure:
    """Image, true and predicted labels; wrong voxels are outlined.

    Args:
        slices: the slices.
        values: label values; the k-th has the legend's number k, from 1 on.
    """
    panels = [("scan", None, None), ("true", slices.true, None), *slices.predictions]
    height, width = slices.image.shape[0] * slices.unit_mm[1], slices.image.shape[1] * slices.unit_mm[2]
    columns, rows = min(len(panels), 4), math.ceil(len(panels) / 4)
    figure = Figure(figsize=(2.4 * columns, rows * (2.4 * height / width + 0.25)))
    for k, (title, label, wrong) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, k + 1)
        draw_slice(ax, slices.image, AXIAL, slices.unit_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
        ax.set_title(title)
        if label is None:
            draw_letters(ax, AXIAL, np.zeros(3, bool))
            continue
        draw_slice(ax, _paint(label, values), AXIAL, slices.unit_mm, interpolation="nearest")
        if wrong is not None and wrong.any():
            y, x = (np.arange(size) + 0.5 for size in wrong.shape)
            ax.contour(x, y, wrong, [0.5], colors="white", linewidths=0.6)
        _numbers(ax, label, values, NUMBER_IN / 2.2 * width / slices.unit_mm[1:])
    return figure


def _paint(label: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """RGBA [rows, columns, 4] of label values; the k-th value has the legend's number k, from 1 on."""
    paint = np.zeros((*label.shape, 4))
    for number, value in enumerate(values, 1):
        paint[label == value] = to_rgba(organ_color(number), 0.55)
    return paint


def _numbers(ax: Axes, label: np.ndarray, values: tuple[int, ...], apart: np.ndarray) -> None:
    """The legend's numbers, each on its organ, large organs first; one that has no room beside the others is left out.

    Args:
        ax: to draw in.
        label: [rows, columns].
        values: the k-th has number k, from 1 on.
        apart: least distance of two numbers in voxels (rows, columns).
    """
    organ_voxels = {number: np.argwhere(label == value) for number, value in enumerate(values, 1)}
    taken = np.empty((0, 2))
    for number, places in sorted(organ_voxels.items(), key=lambda item: -len(item[1])):
        if len(places) < 12:
            continue
        free = places[(np.abs((places[:, None] - taken) / apart) >= 1).any(2).all(1)]
        if not len(free):
            continue
        row, column = at = free[((free - places.mean(0)) ** 2).sum(1).argmin()]
        taken = np.vstack([taken, at])
        text = ax.text(column + 0.5, row + 0.5, str(number), color="white", fontsize=6, ha="center", va="center")
        text.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="black")])


WIDTH_IN, HEIGHT_IN = 10.0, 3.2  # of a montage, and of one of its two rows at most
GAP_IN, TITLE_IN, LINE_IN, NUMBER_IN = 0.08, 0.4, 0.17, 0.13  # between panels; above them; of the legend; of a number
LEAST_IN = 1.0  # of a panel's column, for its title


@style
def montage(volume: np.ndarray, numbers: np.ndarray, spacing_mm: np.ndarray, organs: list[str]) -> Figure:
    """Slices of a scan with its labels: three axial ones, a coronal and a sagittal one, each plain and painted, all of
    them as many mm to the inch.

    Args:
        volume: int16 [D, H, W], HU.
        numbers: [D, H, W], the legend's number of each voxel, 0 outside the organs.
        spacing_mm: (D, H, W).
        organs: names, the k-th one has number k, from 1 on.
    """
    labelled = [np.flatnonzero(numbers.any(tuple(k for k in range(3) if k != axis))) for axis in range(3)]
    labelled = [indices if len(indices) else np.arange(n) for indices, n in zip(labelled, volume.shape)]
    middles = [indices[len(indices) // 2] for indices in labelled]
    cuts = [(AXIAL, labelled[0][int((len(labelled[0]) - 1) * share)]) for share in (0.2, 0.5, 0.8)]
    cuts += [(CORONAL, middles[1]), (SAGITTAL, middles[2])]
    sizes_mm = [[volume.shape[axis] * spacing_mm[axis] for axis in (plane.column, plane.row)] for plane, _ in cuts]
    wide, tall = np.array(sizes_mm).T
    scale = min((WIDTH_IN - GAP_IN * (len(cuts) - 1)) / wide.sum(), HEIGHT_IN / tall.max())  # inches per mm
    columns, height = np.maximum(wide * scale, LEAST_IN), tall.max() * scale
    names = [f"{number} {name.replace('_', ' ')}" for number, name in enumerate(organs, 1)]
    per_line = max(1, min(6, len(names), int(WIDTH_IN / (0.5 + 0.075 * max(map(len, names), default=0)))))
    legend = LINE_IN * math.ceil(len(names) / per_line) + GAP_IN
    whole = WIDTH_IN, legend + 2 * height + GAP_IN + TITLE_IN
    figure = Figure(figsize=whole, layout="none")
    left = (WIDTH_IN - columns.sum() - GAP_IN * (len(cuts) - 1)) / 2
    for k, (plane, index) in enumerate(cuts):
        middle = left + columns[:k].sum() + GAP_IN * k + columns[k] / 2
        title = f"{plane.name}\n{'DHW'[plane.through]} = {index} of {volume.shape[plane.through]}"
        top = whole[1] - TITLE_IN + 0.05
        figure.text(middle / whole[0], top / whole[1], title, ha="center", va="bottom", fontsize=7, linespacing=1.1)
        image, label = (slice_of(array, plane, index + 0.5) for array in (volume, numbers))
        size = np.array([wide[k], tall[k]]) * scale
        for row in (0, 1):  # the lower one is painted
            centre = middle, legend + height / 2 + (1 - row) * (height + GAP_IN)
            ax = figure.add_axes([*((centre - size / 2) / whole), *(size / whole)])
            draw_slice(ax, image, plane, spacing_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
            if row:
                values = tuple(range(1, len(organs) + 1))
                draw_slice(ax, _paint(label, values), plane, spacing_mm, interpolation="nearest")
                _numbers(ax, label, values, NUMBER_IN / (scale * spacing_mm[[plane.row, plane.column]]))
            else:
                draw_letters(ax, plane, np.zeros(3, bool))
    patches = [Rectangle((0, 0), 1, 1, fc=organ_color(number)) for number in range(1, len(organs) + 1)]
    figure.legend(patches, names, loc="lower center", ncols=per_line, frameon=False, fontsize=7, borderaxespad=0)
    return figure
