"""Two pictures of what a frozen encoder's features know of places: what point matching finds, and features as colours.

For the encoder that is judged and, beside it, for random weights. The scans are the first two test scans with a body
that share the most organs, whatever any encoder makes of them.
"""

from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from pgl_ray.data.voxel_statistics import BODY_HU
from pgl_ray.judge import components, matching
from pgl_ray.judge.decoder import LabelledScan
from pgl_ray.judge.readings import StandardisedMaps
from pgl_ray.pages.figures import style
from pgl_ray.pages.label_pictures import organ_color
from pgl_ray.pages.slices import AXIAL, CORONAL, DISPLAY_HU, Plane, draw_letters, draw_slice
from pgl_ray.pages.slices import slice_of as cut

MATCHING, FEATURES = "matching.png", "features.png"
NUM_ORGANS = 8  # that are searched in the picture, the largest of the first scan
NUM_SCANS = 4  # that colours are fitted on
THIN_MM = 12.0  # what is thinner is no body
BAR_MM = 100.0  # length of the scale bar
HALO = (patheffects.withStroke(linewidth=2.2, foreground="black"),)


class Places(NamedTuple):
    """A scan with places along its own axes.

    Attributes:
        title: of its panels.
        volume: int16 HU [D, H, W].
        spacing_mm: (D, H, W).
        at_mm: organ -> [3].
    """

    title: str
    volume: np.ndarray
    spacing_mm: np.ndarray
    at_mm: dict[str, np.ndarray]

    @property
    def body(self) -> np.ndarray:
        """Box [3, 2] around the body."""
        extent = ndimage.find_objects(in_body(self.volume, self.spacing_mm).astype(int))[0]
        return np.array([(part.start, part.stop) for part in extent])


class Search(NamedTuple):
    """What one encoder found in the second scan.

    Attributes:
        title: of its row.
        matched_mm: organ -> [3], along the second scan's axes.
    """

    title: str
    matched_mm: dict[str, np.ndarray]


class Colored(NamedTuple):
    """An axial slice as CT and in the colours of several encoders' features.

    Attributes:
        title: of its row.
        image: HU [H, W].
        organs: [H, W], the number of each voxel's organ, 0 outside.
        body: bool [H, W].
        unit_mm: of the scan (D, H, W).
        colors: per encoder [h, w, 3] in [0, 1], at every `step`-th voxel.
        step: voxels.
    """

    title: str
    image: np.ndarray
    organs: np.ndarray
    body: np.ndarray
    unit_mm: np.ndarray
    colors: list[np.ndarray]
    step: int


# -- what is drawn ----------------------------------------------------------------------------------------------------


def draw(
    scans: list[LabelledScan], names: list[str], size: tuple[int, int, int], encoders: dict[str, StandardisedMaps]
) -> dict[str, Figure]:
    """Both pictures, by the names of their files.

    Args:
        scans: labelled test scans, two of which have a body and share an organ.
        names: of the classes, background first.
        size: of the training views.
        encoders: title -> maps, the judged one first.
    """
    first, second, *others = in_order(scans)
    numbers = {organ: number for number, organ in enumerate(names)}
    source, target = (
        Places(
            scan.record.scan_id,
            scan.volume,
            np.array(scan.record.spacing_mm),
            {organ: (voxel + 0.5) * scan.record.spacing_mm for organ, voxel in matching.centroids(scan, names).items()},
        )
        for scan in (first, second)
    )
    searches = [Search(title, _match(maps, first, second, names, size)) for title, maps in encoders.items()]
    slices = _slices(first, second)
    fitted = [first, second, *others][:NUM_SCANS]
    titles = list(encoders)[::-1]  # random weights beside the CT
    colors = [components.axial_colors(encoders[title], fitted, slices, size) for title in titles]
    rows = [_colored(scan, at, [one[k] for one in colors]) for k, (scan, at) in enumerate(zip((first, second), slices))]
    return {
        MATCHING: matches(source, target, searches, numbers),
        FEATURES: features(rows, titles),
    }


def in_order(scans: list[LabelledScan]) -> list[LabelledScan]:
    """The first two scans with a body that share the most organs, then the others with one: only they are searched."""
    scans = [scan for scan in scans if matching.has_body(scan)]
    organs = [set(np.unique(scan.target[scan.target > 0])) & set(np.flatnonzero(scan.labelled)) for scan in scans]
    pairs = [(i, j) for i in range(len(scans)) for j in range(i + 1, len(scans))]
    chosen = max(pairs, key=lambda pair: len(organs[pair[0]] & organs[pair[1]]))  # of equals the first
    return [*(scans[i] for i in chosen), *(scan for i, scan in enumerate(scans) if i not in chosen)]


def _match(
    maps: StandardisedMaps, source: LabelledScan, target: LabelledScan, names: list[str], size: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Organ -> where it is found, of the largest organs of the source."""
    rows = matching.organ_errors(maps, [source, target], names, size)
    rows = [row for row in rows if row["source_id"] == source.record.scan_id]
    voxels = {row["organ"]: np.count_nonzero(source.target == names.index(row["organ"])) for row in rows}
    largest = sorted(sorted(voxels, key=voxels.get)[-NUM_ORGANS:], key=names.index)
    return {
        row["organ"]: np.array(row["found_mm"])
        for row in sorted(rows, key=lambda r: names.index(r["organ"]))
        if row["organ"] in largest
    }


def in_body(volume: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """bool [D, H, W], the largest part above air, its slices' holes filled; what is thin, as the table, is cut off."""
    solid = np.stack([ndimage.binary_fill_holes(one) for one in volume > BODY_HU])
    reach = [2 * max(1, round(THIN_MM / 2 / size)) + 1 for size in spacing_mm]
    parts, num = ndimage.label(ndimage.maximum_filter(ndimage.minimum_filter(solid, reach), reach))
    if not num:
        return np.ones(volume.shape, bool)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1


def _slices(first: LabelledScan, second: LabelledScan) -> list[int]:
    """Of each scan the axial slice through the middle of the organ that is largest in both."""
    both = [np.bincount(scan.target.ravel(), minlength=len(first.labelled)) * scan.labelled for scan in (first, second)]
    organ = int(np.minimum(*both)[1:].argmax()) + 1
    return [round(float(np.flatnonzero((scan.target == organ).any((1, 2))).mean())) for scan in (first, second)]


def _colored(scan: LabelledScan, at: int, colors: list[np.ndarray]) -> Colored:
    title = f"{scan.record.scan_id}, D = {at} of {len(scan.volume)}"
    unit_mm = np.array(scan.record.spacing_mm)
    body, step = in_body(scan.volume, unit_mm)[at], components.slice_step(scan.volume.shape)
    return Colored(title, scan.volume[at], scan.target[at], body, unit_mm, colors, step)


# -- point matching ---------------------------------------------------------------------------------------------------


@style
def matches(source: Places, target: Places, searches: list[Search], numbers: dict[str, int]) -> Figure:
    """Organ centroids of one scan and where each encoder finds them in another: a row per encoder.

    Places are drawn onto one coronal and one axial slice; the errors beside them are those in space.

    Args:
        source: with the centroids that are asked for.
        target: with the true ones.
        searches: what the encoders found.
        numbers: organ -> its number in legends.
    """
    planes = (CORONAL, AXIAL)
    organs = [organ for organ in searches[0].matched_mm if organ in target.at_mm]
    boxes = {id(scan): with_margin(scan.body, scan.volume.shape) for scan in (source, target)}
    sizes_mm = [(boxes[id(scan)][:, 1] - boxes[id(scan)][:, 0]) * scan.spacing_mm for scan in (source, target)]
    widths = [size[2] for size in sizes_mm] * len(planes)  # all slices at one scale
    scale, errors_in = 8.6 / sum(widths), 1.6  # inches per mm; inches of the column of errors
    height = scale * max(size[plane.row] for size in sizes_mm for plane in planes)
    figure = Figure(figsize=(8.8 + errors_in, len(searches) * (height + 0.5) + 0.35))
    grid = figure.add_gridspec(len(searches), 5, width_ratios=[*widths, errors_in / scale])
    for row, search in enumerate(searches):
        for k, (plane, scan) in enumerate((plane, scan) for plane in planes for scan in (source, target)):
            ax = figure.add_subplot(grid[row, k])
            middle = np.mean([scan.at_mm[organ] for organ in organs], 0) / scan.spacing_mm
            image = cut(scan.volume, plane, middle[plane.through])
            draw_slice(ax, image, plane, scan.spacing_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
            draw_letters(ax, plane, np.zeros(3, bool))
            crop(ax, boxes[id(scan)], plane)
            verb = "asked in" if scan is source else "found in"
            ax.set_title(f"{verb} {scan.title},\n{plane.name}", fontsize=7)
            for organ in organs:
                color = organ_color(numbers[organ])
                if scan is source:
                    _mark(ax, plane, scan, scan.at_mm[organ], color, "o", filled=True)
                else:
                    _line(ax, plane, scan, scan.at_mm[organ], search.matched_mm[organ], color)
            if k == 0:
                _bar(ax, plane, scan.spacing_mm)
        errors = {organ: np.linalg.norm(search.matched_mm[organ] - target.at_mm[organ]) for organ in organs}
        _errors(figure.add_subplot(grid[row, 4]), search.title, errors, numbers)
    figure.legend(
        handles=[_handle("o", True, "asked"), _handle("o", False, "true place"), _handle("X", True, "found place")],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def _at(plane: Plane, scan: Places, place_mm: np.ndarray) -> tuple[float, float]:
    """A place in the edge coordinates that a slice is drawn in."""
    at = place_mm / scan.spacing_mm
    return at[plane.column], at[plane.row]


def _mark(ax: Axes, plane: Plane, scan: Places, place_mm: np.ndarray, color: str, marker: str, filled: bool) -> None:
    edge, width = ("black", 0.6) if filled else (color, 1.5)
    face = color if filled else "none"
    ax.plot(*_at(plane, scan, place_mm), marker, ms=6, mfc=face, mec=edge, mew=width, clip_on=False, zorder=3)


def _line(ax: Axes, plane: Plane, scan: Places, true_mm: np.ndarray, matched_mm: np.ndarray, color: str) -> None:
    """The error: from the true place to the found one."""
    ends = np.array([_at(plane, scan, place) for place in (true_mm, matched_mm)])
    (drawn,) = ax.plot(*ends.T, color=color, lw=1.1, zorder=2)
    drawn.set_path_effects(HALO)
    _mark(ax, plane, scan, true_mm, color, "o", filled=False)
    _mark(ax, plane, scan, matched_mm, color, "X", filled=True)


def with_margin(box: np.ndarray, shape: tuple[int, ...], margin: float = 0.03) -> np.ndarray:
    """A box [3, 2] of a volume and a little of what is around it, as a share of its width."""
    aside = margin * (box[2, 1] - box[2, 0])
    return np.clip(box + np.array([-aside, aside]), 0, np.array(shape)[:, None])


def crop(ax: Axes, box: np.ndarray, plane: Plane) -> None:
    """Shows only a box [3, 2] of a volume."""
    ax.set_xlim(*box[plane.column])
    ax.set_ylim(*(box[plane.row, ::-1] if plane.origin == "upper" else box[plane.row]))
    ax.set_anchor("N")


def _bar(ax: Axes, plane: Plane, unit_mm: np.ndarray) -> None:
    """A scale bar in the lower left corner."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, y = left + 0.04 * (right - left), bottom + 0.05 * (top - bottom)
    ax.plot([x, x + BAR_MM / unit_mm[plane.column]], [y, y], color="white", lw=2, solid_capstyle="butt")
    text = ax.annotate(f"{BAR_MM:.0f} mm", (x, y), (0, 3), textcoords="offset points", color="white")
    text.set(fontsize=6.5, path_effects=HALO)


def _errors(ax: Axes, title: str, errors: dict[str, float], numbers: dict[str, int]) -> None:
    """A column of organs and their errors."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    head = title.replace(", ", "\n").replace(": ", "\n").replace(" error", "\nerror")
    ax.text(0, 1, head, va="top", fontsize=7.5, fontweight="bold", transform=ax.transAxes)
    lines = 1.4 + head.count("\n") + 1
    for k, (organ, error) in enumerate(errors.items()):
        y = -(k + lines) * 10  # points below the top
        options = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "fontsize": 7}
        ax.annotate("■", (0, 1), (0, y), color=organ_color(numbers[organ]), **options)
        ax.annotate(organ.replace("_", " "), (0, 1), (9, y), **options)
        ax.annotate(f"{error:.0f} mm", (1, 1), (0, y), ha="right", **options)


def _handle(marker: str, filled: bool, label: str) -> Line2D:
    face = "#777777" if filled else "none"
    return Line2D([], [], marker=marker, ls="none", mfc=face, mec="#333333", ms=5.5, label=label)


# -- features as colours ----------------------------------------------------------------------------------------------


@style
def features(rows: list[Colored], encoders: list[str]) -> Figure:
    """A slice of several scans: CT, then each encoder's features as colours, all at one scale; organs are outlined.

    Args:
        rows: a scan each.
        encoders: titles, in the order of the rows' colours.
    """
    boxes = [with_margin(np.array([(0, 1), *_reach(row.body)]), (1, *row.image.shape)) for row in rows]
    sizes_mm = [(box[:, 1] - box[:, 0]) * row.unit_mm for box, row in zip(boxes, rows)]
    widest = max(size[2] for size in sizes_mm)
    heights = [size[1] / widest for size in sizes_mm]
    figure = Figure(figsize=(2.9 * (1 + len(encoders)), 2.9 * sum(heights) + 0.2 * len(rows) + 0.35))
    grid = figure.add_gridspec(len(rows), 1 + len(encoders), height_ratios=heights)
    for number, (row, box) in enumerate(zip(rows, boxes)):
        panels = [
            (row.title, None),
            *((title.replace(": ", "\n").replace(", ", "\n"), one) for title, one in zip(encoders, row.colors)),
        ]
        for k, (title, colors) in enumerate(panels):
            ax = figure.add_subplot(grid[number, k])
            draw_slice(ax, row.image, AXIAL, row.unit_mm, cmap="gray", vmin=DISPLAY_HU[0], vmax=DISPLAY_HU[1])
            if colors is not None:
                _paint(ax, row, colors)
            crop(ax, box, AXIAL)
            if colors is None:
                draw_letters(ax, AXIAL, np.zeros(3, bool))
                _bar(ax, AXIAL, row.unit_mm)
            for organ in np.unique(row.organs[row.organs > 0]):
                y, x = (np.arange(size) + 0.5 for size in row.organs.shape)
                outline = "white" if colors is not None else organ_color(int(organ))
                ax.contour(x, y, row.organs == organ, [0.5], colors=outline, linewidths=0.8)
            if k == 0 or number == 0:
                ax.set_title(title)
    return figure


def _reach(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and last row and column of a mask, half-open; all of it where it is empty."""
    extents = ndimage.find_objects(mask.astype(int)) or [tuple(slice(0, size) for size in mask.shape)]
    return [(part.start, part.stop) for part in extents[0]]


def _paint(ax: Axes, row: Colored, colors: np.ndarray) -> None:
    """Colours over the body, black outside of it."""
    coarse = np.minimum(np.arange(row.image.shape[0]) // row.step, colors.shape[0] - 1)
    across = np.minimum(np.arange(row.image.shape[1]) // row.step, colors.shape[1] - 1)
    painted = colors[np.ix_(coarse, across)] * row.body[..., None]
    draw_slice(ax, painted, AXIAL, row.unit_mm, interpolation="nearest")
