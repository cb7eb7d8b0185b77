"""A view pair in its scan, as the network saw it, and aligned; and the places that are compared."""

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from pgl_ray.pages.figures import style
from pgl_ray.pages.slices import (
    AXIAL,
    AXIS_ENDS,
    CORONAL,
    DISPLAY_HU,
    VIEW_COLORS,
    Plane,
    draw_letters,
    draw_slice,
    frame,
    frame_overlap,
    height_per_width,
    region_in_view,
    slice_of,
)
from pgl_ray.prior import Geometry, Prior, interpolation_matrices, overlap_box, scan_to_view

VIEW_DISPLAY_HU = (-500.0, 325.0)  # views differ in brightness by design: a wider window keeps both readable


class ViewPair(NamedTuple):
    """Two views of one scan with what is known of them.

    Attributes:
        views: two float32 arrays [D, H, W], as the network saw them.
        boxes: two int arrays [3, 2], scan frame.
        flips: two bool arrays [3].
        volume: int16 [D, H, W], the whole scan, HU.
        spacing_mm: of the scan.
        mean_hu, std_hu: of the scan; the views are (HU - mean) / std.
        region: float32 [D, H, W] of the views' size, the overlap as rendered from the scan, z-scored.
    """

    views: tuple[np.ndarray, np.ndarray]
    boxes: tuple[np.ndarray, np.ndarray]
    flips: tuple[np.ndarray, np.ndarray]
    volume: np.ndarray
    spacing_mm: np.ndarray
    mean_hu: float
    std_hu: float
    region: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        """int [3, 2], the common region of both crops, scan frame."""
        return overlap_box(*self.boxes)

    def z_scored(self, window_hu: tuple[float, float]) -> np.ndarray:
        """A window in HU as z-scores of this scan, [2]."""
        return (np.array(window_hu) - self.mean_hu) / self.std_hu


def cut_region(view: np.ndarray, box: np.ndarray, flip: np.ndarray, region: np.ndarray) -> np.ndarray:
    """A scan-frame region cut out of a view, un-flipped, on a grid of the view's size.

    It is the aligner's own interpolation (prior.py) at output stride 1, where a voxel's centre lies at its middle.

    Args:
        view: [D, H, W].
        box, flip: the view's prior.
        region: [3, 2], scan frame.
    """
    geometry = Geometry(view.shape, (1, 1, 1), (0.5, 0.5, 0.5))
    box, flip, region = (torch.as_tensor(np.array(value))[None] for value in (box, flip, region))
    matrices = interpolation_matrices(box, flip.bool(), region, geometry)
    values = torch.from_numpy(np.ascontiguousarray(view, dtype=np.float32))
    return torch.einsum("dhw,id,jh,kw->ijk", values, *(m[0] for m in matrices)).numpy()


def standardise(region: np.ndarray) -> np.ndarray:
    """Mean 0, standard deviation 1: what the views' brightness and contrast changes leave comparable."""
    return (region - region.mean()) / max(float(region.std()), 1e-6)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r over all voxels; 0 for a constant array."""
    return float((standardise(first) * standardise(second)).mean())


@style
def pair_in_scan(pair: ViewPair) -> Figure:
    """The scan through the overlap's middle with both crop boxes and their overlap, both slices at one scale."""
    middle = pair.overlap.mean(-1)
    reach = np.stack([*pair.boxes, np.stack([np.zeros(3), pair.volume.shape], -1)])  # crops may stand out
    reach = np.stack([reach[..., 0].min(0) - 1, reach[..., 1].max(0) + 1], -1)
    sizes = (reach[:, 1] - reach[:, 0]).astype(int)
    height = max(height_per_width(sizes, plane, pair.spacing_mm) for plane in (AXIAL, CORONAL))
    figure = Figure(figsize=(5.6, 2.7 * height + 0.3))
    for k, plane in enumerate((AXIAL, CORONAL)):
        ax = figure.add_subplot(1, 2, k + 1)
        image = slice_of(pair.volume, plane, middle[plane.through])
        draw_slice(ax, image, plane, pair.spacing_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
        draw_letters(ax, plane, np.zeros(3, bool))
        for box, color in zip(pair.boxes, VIEW_COLORS):
            frame(ax, box, plane, color, 1.4)
        frame_overlap(ax, pair.overlap, plane)
        ax.set_xlim(*reach[plane.column])
        ax.set_ylim(*(reach[plane.row, ::-1] if plane.origin == "upper" else reach[plane.row]))
        axis = "DH"[plane.through]
        ax.set_title(f"{plane.name}, {axis} = {int(middle[plane.through])} of {pair.volume.shape[plane.through]}")
    return figure


@style
def pair_as_seen(pair: ViewPair) -> Figure:
    """Both views as the network saw them, sliced where the overlap's middle lies, with the overlap in their frame; all
    slices at one scale."""
    low, high = pair.z_scored(VIEW_DISPLAY_HU)
    size = np.array(pair.views[0].shape)
    sizes_mm = np.array([(box[:, 1] - box[:, 0]) * pair.spacing_mm for box in pair.boxes])
    units_mm, highest = sizes_mm / size, sizes_mm.max(0)
    heights, widths = [highest[plane.row] for plane in (AXIAL, CORONAL)], sizes_mm[:, 2]
    figure = Figure(figsize=(5.6, 5.5 * sum(heights) / sum(widths) + 0.5))
    grid = figure.add_gridspec(2, 2, height_ratios=heights, width_ratios=widths)
    for k, (view, box, flip) in enumerate(zip(pair.views, pair.boxes, pair.flips)):
        region = region_in_view(pair.overlap, box, flip, size)
        flipped = ", ".join("–".join(ends) for axis, ends in enumerate(AXIS_ENDS) if flip[axis])
        titles = (f"view {k + 1}: " + (f"flipped {flipped}" if flipped else "not flipped"), None)
        for row, plane in enumerate((AXIAL, CORONAL)):
            ax = figure.add_subplot(grid[row, k], title=titles[row])
            image = slice_of(view, plane, region[plane.through].mean())
            draw_slice(ax, image, plane, units_mm[k], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            draw_letters(ax, plane, flip)
            frame(ax, np.stack([np.zeros(3), size], -1), plane, VIEW_COLORS[k], 2.5)
            frame_overlap(ax, region, plane)
    return figure


@style
def pair_aligned(pair: ViewPair, plane: Plane) -> Figure:
    """The overlap from the scan and from both views, on one grid: each, both as a checkerboard, and their difference.

    Five panels in a row, or one below the other where a plane is so thin that they would be stripes.
    """
    unit_mm = (pair.overlap[:, 1] - pair.overlap[:, 0]) * pair.spacing_mm / np.array(pair.region.shape)
    first, second = (standardise(cut_region(*one, pair.overlap)) for one in zip(pair.views, pair.boxes, pair.flips))
    low, high = (pair.z_scored(DISPLAY_HU) - pair.region.mean()) / max(float(pair.region.std()), 1e-6)
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    panels = (
        ("scan", standardise(pair.region), gray),
        ("view 1, aligned", first, gray),
        ("view 2, aligned", second, gray),
        ("checkerboard of both", np.where(_checkers(pair.region.shape, unit_mm), first, second), gray),
        ("view 1 - view 2", first - second, {"cmap": "PuOr_r", "vmin": -2, "vmax": 2}),
    )
    proportion = height_per_width(pair.region.shape, plane, unit_mm)
    rows, columns = (5, 1) if proportion < 0.3 else (1, 5)
    figure = Figure(figsize=(9, rows * (8.8 / columns * proportion + 0.25)))
    for k, (title, volume, options) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, k, title=title)
        image = slice_of(volume, plane, volume.shape[plane.through] / 2)
        draw_slice(ax, image, plane, unit_mm, interpolation="nearest", **options)
    return figure


PLACES = {
    "before": "not aligned: cell j of view 1 against cell j of view 2",
    "cell": "aligned, centers=cell (the paper's reading)",
    "receptive_field": "aligned, centers=receptive_field",
}


@style
def places(
    views: list[np.ndarray],
    priors: list[Prior],
    compared: dict[str, list[np.ndarray]],
    window: tuple[float, float],
    spacing_mm: np.ndarray,
) -> Figure:
    """Which places of a scan are compared, drawn on both views: a row of axial slices per way of aligning.

    Args:
        views: two float32 arrays [D, H, W].
        priors: theirs.
        compared: key of `PLACES` -> for either view the scan coordinates [3, d, h, w] that its features look at.
        window: of the views' values that is shown.
        spacing_mm: of the scan.
    """
    size = np.array(views[0].shape)
    sizes_mm = np.array([(prior.box[:, 1] - prior.box[:, 0]) * spacing_mm for prior in priors])
    units_mm, widths = sizes_mm / size, sizes_mm[:, 2]
    overlap = overlap_box(*(prior.box for prior in priors))
    figure = Figure(figsize=(6, len(compared) * (5.8 * max(sizes_mm[:, 1]) / sum(widths) + 0.3) + 0.4))
    grid = figure.add_gridspec(len(compared), 2, width_ratios=widths)
    figure.suptitle(
        "one line = two features that are compared; circle: where view 1's looks, cross: where view 2's looks",
        fontsize=8,
    )
    for row, (name, coordinates) in enumerate(compared.items()):
        first, second = (_some_places(scan_points) for scan_points in coordinates)
        colors = matplotlib.colormaps["hsv"](np.linspace(0, 1, len(first), endpoint=False))
        for k, (view, prior) in enumerate(zip(views, priors)):
            ax = figure.add_subplot(grid[row, k])
            ax.set_title(f"view {k + 1}, {PLACES[name]}" if k == 0 else f"view {k + 1}", fontsize=7)
            middle = region_in_view(overlap, prior.box, prior.flip, size)[0].mean()
            low, high = window
            draw_slice(ax, slice_of(view, AXIAL, middle), AXIAL, units_mm[k], cmap="gray", vmin=low, vmax=high)
            draw_letters(ax, AXIAL, prior.flip)
            circles, crosses = (scan_to_view(points, prior.box, prior.flip, size) for points in (first, second))
            for circle, cross, color in zip(circles, crosses, colors):
                ax.plot(*np.stack([circle, cross]).T[[2, 1]], color=color, lw=0.7)
            ax.scatter(*circles.T[[2, 1]], s=42, marker="o", facecolors="none", edgecolors=colors, linewidths=1.1)
            ax.scatter(*crosses.T[[2, 1]], s=26, marker="x", c=colors, linewidths=1.1)
            ax.set_xlim(0, size[2])
            ax.set_ylim(size[1], 0)
    return figure


def _some_places(scan_points: np.ndarray) -> np.ndarray:
    """At most 6 x 6 places of the middle plane: [3, d, h, w] -> [n, 3]."""
    plane = scan_points[:, scan_points.shape[1] // 2]
    steps = [-(-n // 6) for n in plane.shape[1:]]
    return plane[:, :: steps[0], :: steps[1]].reshape(3, -1).T


def _checkers(shape: tuple[int, ...], unit_mm: np.ndarray, num_tiles: int = 6) -> np.ndarray:
    """bool [D, H, W], alternating in tiles that are cubes in mm."""
    tile_mm = max(size * unit for size, unit in zip(shape, unit_mm)) / num_tiles
    tiles = [((np.arange(size) + 0.5) * unit // tile_mm).astype(int) for size, unit in zip(shape, unit_mm)]
    return (tiles[0][:, None, None] + tiles[1][:, None] + tiles[2]) % 2 == 0
