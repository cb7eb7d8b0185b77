"""Figures of the report: curves, bars, view pairs with their overlap, predicted against true labels.

Functions return matplotlib Figures, built without pyplot; `to_png` and `to_svg` turn one into a data URI. Stored
volumes run along S, P, L (files/ct.py): rows = H, columns = W is the axial slice as radiologists see it, and rows = D
upwards is the coronal one with the head up.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pgl_ray.prior import Geometry, Prior, interpolation_matrices, overlap_box, scan_to_view

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")  # Okabe-Ito
VIEW_COLORS, OVERLAP_COLOR = ("#56B4E9", "#E69F00"), "#F0E442"
ORGAN_COLORS = (  # Okabe-Ito, then of Tol's muted scheme what stays apart from it; figures number the organs, too
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
    *("#882255", "#999933", "#332288", "#AA4499", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#88CCEE"),
)
DISPLAY_HU = (-200.0, 300.0)  # soft tissue; for the eye alone
VIEW_DISPLAY_HU = (-500.0, 325.0)  # views differ in brightness by design: a wider window keeps both readable
AXIS_ENDS = (("I", "S"), ("A", "P"), ("R", "L"))  # what lies at the low and high end of D, H, W
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "pgl_ray",
    "figure.constrained_layout.use": True,
}
MARK_COLOR = "#808080"  # of levels; seen on white and on black
WORSE_TO_BETTER = LinearSegmentedColormap.from_list("worse to better", ["#a6a6a6", "#E69F00", "#0072B2"])
style = matplotlib.rc_context(STYLE)


class Plane(NamedTuple):
    """A slicing plane: the axis it is perpendicular to, and the axes drawn as rows and columns."""

    name: str
    through: int
    row: int
    column: int
    origin: str


AXIAL, CORONAL = Plane("axial", 0, 1, 2, "upper"), Plane("coronal", 1, 0, 2, "lower")
SAGITTAL = Plane("sagittal", 2, 0, 1, "lower")


class Series(NamedTuple):
    """One line of a plot."""

    x: list[float]
    y: list[float]
    color: str
    dashed: bool = False


class Mark(NamedTuple):
    """A level that a plot's lines are to be held against, such as chance."""

    y: float
    text: str


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


# -- geometry ---------------------------------------------------------------------------------------------------------


def region_in_view(region: np.ndarray, box: np.ndarray, flip: np.ndarray, view_size: np.ndarray) -> np.ndarray:
    """A scan-frame region [3, 2] in a view's edge coordinates, start < stop."""
    corners = [scan_to_view(region[:, end].astype(float), box, flip, view_size) for end in (0, 1)]
    return np.sort(np.stack(corners, -1), axis=-1)


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


# -- data URIs --------------------------------------------------------------------------------------------------------


@style
def to_bytes(figure: Figure, kind: str, **options: Any) -> bytes:
    """The figure as a file of `kind`, png or svg."""
    sink = io.BytesIO()
    figure.savefig(sink, format=kind, **options)
    return sink.getvalue()


def to_png(figure: Figure, dpi: int = 150) -> str:
    """The figure as a PNG's data URI."""
    return data_uri(to_bytes(figure, "png", dpi=dpi), "image/png")


DARK = {"#ffffff": "#16181c", "#000000": "#e2e2e2", "#333333": "#cccccc", "#555555": "#b0b5bb", "#eeeeee": "#2b3037"}
DARK["#0072b2"] = "#3a9ad9"  # of lines; style.html has the same for the legends beside them
IN_THE_DARK = "<style>@media screen and (prefers-color-scheme: dark) {{ svg {{ fill: {} }} {} }}</style></svg>".format(
    DARK["#000000"],  # text that is black, which matplotlib does not say
    " ".join(
        f'[style*="{what}: {bright}"] {{ {what}: {dark} !important }}'
        for bright, dark in DARK.items()
        for what in ("fill", "stroke")
    ),
)


def to_svg(figure: Figure) -> str:
    """With a second set of colours, which browsers take where the page is dark."""
    drawn = to_bytes(figure, "svg", metadata={"Date": None}).rstrip()
    return data_uri(drawn.removesuffix(b"</svg>") + IN_THE_DARK.encode(), "image/svg+xml")


def data_uri(content: bytes, mime: str) -> str:
    """A file's content as a data URI, which a page holds within itself."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


# -- curves and bars --------------------------------------------------------------------------------------------------


@style
def curves(
    lines: list[Series],
    title: str,
    bounds: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    marks: Sequence[Mark] = (),
) -> Figure:
    """Lines over steps; on a log scale zeros leave gaps, and zeros alone are shown on a linear one. Marks are dotted
    lines with a word; one that lies beyond the bounds is left out."""
    figure = Figure(figsize=(3.6, 2.2))
    ax = figure.add_subplot(title=title, xlabel="step")
    for line in lines:
        marker = "." if len(line.x) < 30 else None
        ax.plot(line.x, line.y, color=line.color, ls="--" if line.dashed else "-", lw=1.2, marker=marker, ms=4)
    log = log and any(y > 0 for line in lines for y in line.y)
    for mark in (mark for mark in marks if mark.y > 0 or not log):
        ax.axhline(mark.y, color=MARK_COLOR, lw=1, ls=":", zorder=1)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": True}
        ax.annotate(mark.text, (1, mark.y), (-2, 2), ha="right", fontsize=6.5, color=MARK_COLOR, **at)
    if log:
        ax.set_yscale("log", nonpositive="mask")
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    ax.set_ylim(*bounds)
    return figure


@style
def organ_bars(organs: list[str], runs: list[tuple[str, list[float], list[float]]]) -> Figure:
    """Bars with error bars, an organ below the other, as wide as a telephone's screen.

    Args:
        organs: names.
        runs: (colour, Dice per organ, its standard error per organ); NaN draws nothing.
    """
    width = 0.8 / len(runs)
    figure = Figure(figsize=(4.8, 0.7 + len(organs) * (0.1 + 0.1 * max(2, len(runs)))))
    ax = figure.add_subplot(xlabel="Dice, higher is better", xlim=(0, 1))
    for k, (color, dice, error) in enumerate(runs):
        y = np.arange(len(organs)) + (k - (len(runs) - 1) / 2) * width
        ax.barh(y, dice, width * 0.92, color=color, xerr=error, ecolor="#333333", error_kw={"lw": 0.8, "capsize": 1.5})
    ax.set_yticks(range(len(organs)), [organ.replace("_", " ") for organ in organs])
    ax.set_ylim(len(organs) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_axisbelow(True)
    return figure


# -- slices -----------------------------------------------------------------------------------------------------------


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


def draw_letters(ax: Axes, plane: Plane, flip: np.ndarray) -> None:
    """Anatomical directions at the four edges; a flipped axis has them swapped."""
    column, row = (AXIS_ENDS[axis][:: -1 if flip[axis] else 1] for axis in (plane.column, plane.row))
    top, bottom = row if plane.origin == "upper" else row[::-1]
    for x, y, letter in ((0, 0.5, column[0]), (1, 0.5, column[1]), (0.5, 1, top), (0.5, 0, bottom)):
        inwards = ((0.5 - x) * 12, (0.5 - y) * 10)  # points
        options = {"color": "white", "fontsize": 6.5, "ha": "center", "va": "center"}
        text = ax.annotate(letter, (x, y), inwards, xycoords="axes fraction", textcoords="offset points", **options)
        text.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="black")])


def _frame(ax: Axes, box: np.ndarray, plane: Plane, color: str, width: float) -> None:
    """A box [3, 2] of the frame that the axes are drawn in, as a rectangle."""
    (left, right), (low, high) = box[plane.column], box[plane.row]
    ax.add_patch(Rectangle((left, low), right - left, high - low, fill=False, ec=color, lw=width))


def _frame_overlap(ax: Axes, box: np.ndarray, plane: Plane) -> None:
    """As `_frame`; tinted and dashed, so that the crop's edge shows where both coincide."""
    (left, right), (low, high) = box[plane.column], box[plane.row]
    options = {"ec": OVERLAP_COLOR, "fc": (*to_rgba(OVERLAP_COLOR)[:3], 0.1), "lw": 1.2, "ls": (0, (3, 2))}
    ax.add_patch(Rectangle((left, low), right - left, high - low, **options))


# -- a view pair ------------------------------------------------------------------------------------------------------


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
            _frame(ax, box, plane, color, 1.4)
        _frame_overlap(ax, pair.overlap, plane)
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
            _frame(ax, np.stack([np.zeros(3), size], -1), plane, VIEW_COLORS[k], 2.5)
            _frame_overlap(ax, region, plane)
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
    for row, (name, found) in enumerate(compared.items()):
        first, second = (_some_places(scan_points) for scan_points in found)
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


def height_per_width(shape: tuple[int, ...], plane: Plane, unit_mm: np.ndarray) -> float:
    """Height of a plane's slices as a multiple of their width."""
    return shape[plane.row] * unit_mm[plane.row] / (shape[plane.column] * unit_mm[plane.column])


def _checkers(shape: tuple[int, ...], unit_mm: np.ndarray, num_tiles: int = 6) -> np.ndarray:
    """bool [D, H, W], alternating in tiles that are cubes in mm."""
    tile_mm = max(size * unit for size, unit in zip(shape, unit_mm)) / num_tiles
    tiles = [((np.arange(size) + 0.5) * unit // tile_mm).astype(int) for size, unit in zip(shape, unit_mm)]
    return (tiles[0][:, None, None] + tiles[1][:, None] + tiles[2]) % 2 == 0


# -- predicted against true labels ------------------------------------------------------------------------------------


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
def overlay(shown: Overlay, values: tuple[int, ...]) -> Figure:
    """Image, true and predicted labels; wrong voxels are outlined.

    Args:
        shown: the slices.
        values: label values; the k-th has the legend's number k, from 1 on.
    """
    panels = [("scan", None, None), ("true", shown.true, None), *shown.predictions]
    height, width = shown.image.shape[0] * shown.unit_mm[1], shown.image.shape[1] * shown.unit_mm[2]
    columns, rows = min(len(panels), 4), math.ceil(len(panels) / 4)
    figure = Figure(figsize=(2.4 * columns, rows * (2.4 * height / width + 0.25)))
    for k, (title, label, wrong) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, k + 1)
        draw_slice(ax, shown.image, AXIAL, shown.unit_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
        ax.set_title(title)
        if label is None:
            draw_letters(ax, AXIAL, np.zeros(3, bool))
            continue
        draw_slice(ax, _paint(label, values), AXIAL, shown.unit_mm, interpolation="nearest")
        if wrong is not None and wrong.any():
            y, x = (np.arange(size) + 0.5 for size in wrong.shape)
            ax.contour(x, y, wrong, [0.5], colors="white", linewidths=0.6)
        _numbers(ax, label, values, NUMBER_IN / 2.2 * width / shown.unit_mm[1:])
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
    found = {number: np.argwhere(label == value) for number, value in enumerate(values, 1)}
    taken = np.empty((0, 2))
    for number, places in sorted(found.items(), key=lambda item: -len(item[1])):
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
    labelled = [found if len(found) else np.arange(n) for found, n in zip(labelled, volume.shape)]
    middles = [found[len(found) // 2] for found in labelled]
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


# -- sweeps -----------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """A setting of a sweep: its name, and its values on a scale, or as categories in their order."""

    name: str
    values: list[float]
    labels: list[str] | None
    log: bool = False

    @property
    def places(self) -> np.ndarray:
        """Each trial's place from 0 to 1."""
        values = np.log10(self.values) if self.log else np.asarray(self.values, float)
        low, high = values.min(), values.max()
        return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _score_colors(scores: list[float]) -> np.ndarray:
    low, high = min(scores), max(scores)
    return WORSE_TO_BETTER((np.array(scores) - low) / (high - low) if high > low else np.ones(len(scores)))


@style
def parallel_coordinates(
    axes: list[Axis], scores: list[float], ended: list[bool], judge: str, merits: list[float]
) -> Figure:
    """A line per trial through its settings to its score, grey to blue as it is better by its merit; dashed where it
    was stopped early."""
    last = Axis(judge, scores, None)
    all_axes, colors = [*axes, last], _score_colors(merits)
    figure = Figure(figsize=(max(4.0, 1.7 * len(all_axes)), 3.0))
    ax = figure.add_subplot(xlim=(-0.15, len(all_axes) - 0.75), ylim=(-0.06, 1.06))
    places = np.stack([axis.places for axis in all_axes], 1)
    for k in np.argsort(merits):
        ax.plot(places[k], color=colors[k], lw=1.4, ls="-" if ended[k] else "--", marker=".", ms=4)
    for k, axis in enumerate(all_axes):
        ax.axvline(k, color="#999999", lw=0.8, zorder=0)
        ticks = dict(zip(axis.places, axis.labels or [f"{value:.3g}" for value in axis.values]))
        shown = ticks if axis.labels else {place: ticks[place] for place in (min(ticks), max(ticks))}
        for place, text in shown.items():
            ax.text(
                k + 0.03,
                place,
                text,
                fontsize=7,
                va="center",
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
            )
    ax.set_xticks(range(len(all_axes)), [axis.name for axis in all_axes])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    return figure


@style
def setting_scores(
    axis: Axis,
    scores: list[float],
    ended: list[bool],
    means: list[tuple[float, float, float | None]],
    judge: str,
    limits: tuple[float, float],
) -> Figure:
    """Scores over one setting.

    Args:
        axis: the setting.
        scores: of the trials.
        ended: whether each ran to its end; the others are hollow.
        means: (value, mean score of the trials that ended, half its 95 % interval or none).
        judge: name of the score, and what is good.
        limits: of the scores that are shown, those of all settings.
    """
    figure = Figure(figsize=(3.6, 2.4))
    ax = figure.add_subplot(title=axis.name, ylabel=judge, ylim=limits)
    if axis.log:
        ax.set_xscale("log")
    for done, face in ((True, "#0072B2"), (False, "none")):
        points = [(x, y) for x, y, end in zip(axis.values, scores, ended) if end == done]
        if points:
            ax.scatter(*zip(*points), s=16, facecolors=face, edgecolors="#0072B2", linewidths=0.8, zorder=3)
    for value, mean, reach in means:
        ax.errorbar(value, mean, yerr=reach, color="#D55E00", marker="_", ms=12, capsize=3, lw=1.2, zorder=4)
    if axis.labels:
        ticks = dict(zip(axis.values, axis.labels))
        ax.set_xticks(list(ticks), list(ticks.values()), rotation=20 if len(ticks) > 3 else 0)
        ax.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    return figure


@style
def trial_curves(lines: list[tuple[list[float], list[float], bool]], merits: list[float], judge: str) -> Figure:
    """The judged figure of every trial over its training in percent, grey to blue as it is better by its merit; dashed
    where it was stopped early."""
    figure, colors = Figure(figsize=(5.4, 2.8)), _score_colors(merits)
    ax = figure.add_subplot(xlabel="percent of the judged training", ylabel=f"best {judge}")
    for k in np.argsort(merits):
        x, y, ended = lines[k]
        ax.plot(x, y, color=colors[k], lw=1.2, ls="-" if ended else "--", marker="." if len(x) < 30 else None, ms=4)
    return figure


@style
def arms_over(x_name: str, lines: list[tuple[str, str, list[float], list[float], list[float]]], title: str) -> Figure:
    """Mean Dice per arm over a setting, with error bars.

    Args:
        x_name: name of the setting.
        lines: (arm, colour, values of the setting, means, errors).
        title: of the figure.
    """
    figure = Figure(figsize=(4.4, 2.8))
    ax = figure.add_subplot(title=title, xlabel=x_name, ylabel="Dice in %, higher is better")
    values = sorted({x for line in lines for x in line[2]})
    place = {x: k for k, x in enumerate(values)}
    for k, (arm, color, x, mean, error) in enumerate(lines):
        shift = 0.06 * (k - (len(lines) - 1) / 2)
        at = [place[value] + shift for value in x]
        ax.errorbar(at, mean, yerr=error, color=color, marker="o", ms=3, lw=1.2, capsize=2, label=arm)
    ax.set_xticks(
        range(len(values)), [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
    )
    ax.legend(fontsize=7, frameon=False)
    return figure
