"""Contours of a DICOM structure set (RTSTRUCT) on a CT's grid, one ROI at a time.

A voxel belongs to a ROI where its centre lies inside an odd number of the ROI's contours on its slice, so that inner
contours and keyholes are holes (DICOM PS3.3, C.8.8.6). Own code, for no library fits: rt-utils needs OpenCV
and rounds the points to pixels, platipy holds pydicom below 3, dcmrtstruct2nii takes one series in one folder.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pgl_ray.files.structure_header import CLOSED, check_whole, roi_names, whole

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import Dataset

TOLERANCE = 0.2  # how far a contour may lie from its slice, in slice distances


@dataclass
class Placed:
    """A structure on a CT's grid.

    Attributes:
        pieces: (axis, slice, mask bool [the two other axes]).
        notes: what of it is not used, and why.
        refused: why nothing of it is used, "" where it is.
    """

    pieces: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""


class Roi:
    """A ROI of a structure set: its name, how messages call it, and its contours."""

    def __init__(self, name: str, title: str, contours: Iterable) -> None:
        self.name, self.title, self._contours = name, title, list(contours)

    def place(self, to_index: np.ndarray, shape: tuple[int, int, int]) -> Placed:
        """Fills the closed contours.

        Args:
            to_index: [4, 4], LPS mm -> voxel index of the grid (three axes in any order).
            shape: of the grid.
        """
        placed = Placed()
        kinds = Counter(str(one.get("ContourGeometricType") or "of no type") for one in self._contours)
        closed = [one for one in self._contours if str(one.get("ContourGeometricType")) in CLOSED]
        for kind, count in kinds.items():
            if kind not in CLOSED:
                verbs = ("is", "bounds") if count == 1 else ("are", "bound")
                placed.notes.append(f"{_contours(count)} {verbs[0]} {kind}, which {verbs[1]} no area")
        points, seen, copies = [], set(), 0
        for number, contour in enumerate(closed, 1):
            try:
                points_mm = _points(contour)
            except ValueError as error:
                placed.refused = f"its contour {number} is broken ({error})"
                return placed
            if len(points_mm) < 3:
                placed.notes.append(
                    f"its contour {number} has {len(points_mm)} point{'s' * (len(points_mm) != 1)}, no area"
                )
                continue
            if points_mm.tobytes() in seen:  # it would undo itself, for what lies in two contours is a hole
                copies += 1
                continue
            seen.add(points_mm.tobytes())
            points.append(np.c_[points_mm, np.ones(len(points_mm))] @ to_index.T[:, :3])
        if copies:
            placed.notes.append(f"{_contours(copies)} {_verb(copies, 'stands', 'stand')} there twice, taken once")
        if points:
            _place(points, shape, placed)
        elif not placed.notes:
            placed.notes.append("is empty")
        return placed


def rois(structures: "Dataset") -> list[Roi]:
    """The ROIs of a structure set, drawn or not, by number.

    Args:
        structures: pydicom's data set.

    Raises:
        ValueError: it is cut off.
    """
    check_whole(structures)
    contours = defaultdict(list)
    names = roi_names(structures)
    for roi in structures.get("ROIContourSequence") or []:
        contours[whole(roi.get("ReferencedROINumber"))].extend(roi.get("ContourSequence") or [])
    unnamed = [number for number in contours if not names.get(number)]
    named = [
        Roi(name, f"structure {name!r} (ROI {number})", contours[number]) for number, name in names.items() if name
    ]
    return named + [Roi("", f"ROI {number}", contours[number]) for number in unnamed]


def _points(contour: "Dataset") -> np.ndarray:
    """Points [N, 3] of a contour, LPS mm."""
    try:
        values = contour.get("ContourData")
        values = np.array([float(one) for one in ([] if values is None else np.atleast_1d(values))])
    except (TypeError, ValueError):
        raise ValueError("its points are no numbers") from None
    if len(values) % 3:
        raise ValueError(f"{len(values)} numbers, which are no points of 3")
    if not np.isfinite(values).all():
        raise ValueError("its points are not finite")
    stated = whole(contour.get("NumberOfContourPoints"))
    if stated is not None and stated != len(values) // 3:
        raise ValueError(f"{len(values) // 3} points, its header says {stated}")
    return values.reshape(-1, 3)


def _place(contours: list[np.ndarray], shape: tuple[int, int, int], placed: Placed) -> None:
    """Puts contours [N, 3] in voxel indices on their slices."""
    axis = int(np.argmin([np.median([np.ptp(points[:, axis]) for points in contours]) for axis in range(3)]))
    across = [other for other in range(3) if other != axis]
    size = tuple(shape[other] for other in across)
    slices, between, beyond, wide = defaultdict(list), [], [], 0
    for points in contours:
        height = float(points[:, axis].mean())
        if np.abs(points[:, axis] - round(height)).max() > TOLERANCE:
            between.append(height)
        elif not 0 <= round(height) < shape[axis]:
            beyond.append(round(height))
        else:
            slices[round(height)].append(points[:, across])
            wide += bool((points[:, across] < -1).any() or (points[:, across] > size).any())
    if len(between) > (len(contours) - len(between)):
        placed.refused = (
            f"{len(between)} of its {_contours(len(contours))} {_verb(len(between), 'lies', 'lie')} between the CT's "
            f"slices, as at slice {between[0]:.2f}: draw it on this CT"
        )
        return
    if not slices:
        placed.refused = f"it lies at slice {_span(beyond)} of {shape[axis]}, outside its CT: is it another's?"
        return
    if reason := gaps(slices, "contours"):
        placed.refused = reason
        return
    placed.pieces = [(axis, place, inside_of(polygons, size)) for place, polygons in sorted(slices.items())]
    if not any(mask.any() for _, _, mask in placed.pieces):
        outside = wide == sum(map(len, slices.values()))
        placed.refused = (
            "it lies beside its CT: is it another's?" if outside else "no voxel's centre lies in its contours"
        )
        return
    for count, what in (
        (len(between), f"at slice {', '.join(f'{height:.2f}' for height in between[:5])}, between the CT's slices"),
        (len(beyond), f"at slice {_span(beyond)} of {shape[axis]}, outside the CT"),
    ):
        if count:
            placed.notes.append(f"{_contours(count)} {what}, {_verb(count, 'is', 'are')} not used")
    if wide:
        verbs = ("reaches", "is") if wide == 1 else ("reach", "are")
        placed.notes.append(f"{_contours(wide)} {verbs[0]} beyond the CT's field of view, and {verbs[1]} cut there")


def gaps(slices: Iterable[int], what: str) -> str:
    """Why slices are too few for a structure: of more than two, most lie about equally far apart, and further than one;
    "" where they do not.

    Args:
        slices: the numbers of those that have something of it.
        what: they have.
    """
    steps = np.diff(sorted(slices)).tolist()
    if len(steps) < 2:
        return ""
    step, slack = statistics.median_low(steps), int(len(steps) > 2)  # of three slices only an even pattern is one
    if step == 1 or 2 * sum(abs(one - step) <= slack for one in steps) <= len(steps):  # whole, or a few lesions
        return ""
    return f"only one slice in {step} has {what}: interpolate them to all slices first"


def _contours(count: int) -> str:
    return f"{count} contour{'s' * (count != 1)}"


def _verb(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _span(places: list[int]) -> str:
    if not places:
        return ""
    return f"{min(places)}" if min(places) == max(places) else f"{min(places)} to {max(places)}"


def inside_of(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Cells whose centres lie inside an odd number of the polygons (scan-line filling, even-odd rule).

    Args:
        polygons: [N, 2] each, (row, column) in cell indices, where cell centres are whole numbers.
        shape: rows, columns.
    """
    toggles = np.zeros((shape[0], shape[1] + 1), np.int32)
    rows = np.arange(shape[0])[:, None]
    for polygon in polygons:
        (row_a, col_a), (row_b, col_b) = polygon.T, np.roll(polygon, -1, axis=0).T
        line, edge = np.nonzero((row_a <= rows) != (row_b <= rows))
        share = (line - row_a[edge]) / (row_b[edge] - row_a[edge])
        column = np.ceil(col_a[edge] + share * (col_b[edge] - col_a[edge]))
        np.add.at(toggles, (line, column.clip(0, shape[1]).astype(int)), 1)
    return np.cumsum(toggles, axis=1)[:, :-1] % 2 == 1
