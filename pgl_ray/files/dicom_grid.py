"""One DICOM series as slices on a regular grid, read exactly or refused with the reason.

The geometry is checked here, because ITK silently stretches a missing slice and unshears a gantry tilt. The frames of
an enhanced (multi-frame) file are slices as those of single files are, where each has its place.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgl_ray.files import dicom, dicom_pixels
from pgl_ray.files import dicom_values as values
from pgl_ray.files.dicom_values import Refused, Tagged
from pgl_ray.files.geometry import LPS_TO_RAS
from pgl_ray.files.structure_header import whole

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import Dataset

POSITION_TOLERANCE = 0.1  # how far a slice may lie from its place in the regular grid, in slice distances
NOTED_DEVIATION = 0.02  # the same from which it is said
SPACING_MM = (0.005, 50.0)  # pixels of a CT, from micro CT to far beyond what a clinical one has
LARGEST_STEP_MM = 100.0  # between slices
CONVERTERS = "dcm2niix, or emf2sf of dcm4che"
GROUPS = {  # of an enhanced file's functional groups: what of them stands in a single slice's header
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}


class Grid(NamedTuple):
    """A series on a regular grid.

    Attributes:
        name: in messages.
        files: path of each slice, in order; an enhanced file's occurs once per frame.
        frames: number of each slice in its file.
        shape: columns, rows, slices.
        affine: (column, row, slice, 1) -> RAS+ mm.
        unspecified: whether its unit is "US", so that its values have to show that they are HU.
        notes: what is worth saying of it; a sentence each.
    """

    name: str
    files: list[str]
    frames: list[int]
    shape: tuple[int, int, int]
    affine: np.ndarray
    unspecified: bool
    notes: tuple[str, ...]


def read_grid(folder: str | os.PathLike, slices: tuple[str, ...], as_hu: bool = True) -> Grid:
    """Checks the headers of a series and orders its slices.

    Args:
        as_hu: whether its values have to be HU; else they may be of any kind, as those of a mask.

    Raises:
        ValueError: not one parallel, evenly spaced, untilted stack of CT slices; the message says what to do.
    """
    if not slices:
        raise ValueError(f"{folder}: no DICOM slice in it")
    places, acquisitions, name, unspecified, lossy = [], [], str(folder), False, False
    for file in slices:
        path = os.path.join(folder, file)
        try:
            header = dicom.read(path, stop_before_pixels=True)
            number = header.get("SeriesNumber")
            name = str(folder) if number is None else f"{folder}: series {number}"
            for k, frame in enumerate(frames(header)):
                (values.encoding if as_hu else values.stored_encoding)(frame)
                unspecified |= as_hu and values.is_unspecified(frame)
                places.append((file, k, _slice_geometry(frame)))
                acquisitions.append(_acquisition(frame))
            lossy |= dicom_pixels.is_lossy(header, dicom_pixels.syntax_of(header))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except Refused as error:
            raise ValueError(f"{name}: {file}: {error}") from None
        except Exception as error:  # see find
            raise ValueError(dicom.unreadable(path, error)) from None
    try:
        order, affine, notes = _ordered([(_frame_name(slices, file, k), one) for file, k, one in places])
        _check_phases([acquisitions[k] for k in order])
    except Refused as error:
        raise ValueError(f"{name}: {error}") from None
    if lossy and not as_hu:
        raise ValueError(
            f"{name}: compressed with loss (as JPEG), so its values are not what was written: take the original"
        )
    if lossy:
        notes.append("its pixels were compressed with loss (as JPEG), so its HU are not what the scanner measured")
    (rows, columns), ordered = places[0][2].size, [places[k] for k in order]
    files, numbers = [file for file, *_ in ordered], [k for _, k, _ in ordered]
    return Grid(name, files, numbers, (columns, rows, len(files)), affine, unspecified, tuple(notes))


def _frame_name(slices: tuple[str, ...], file: str, frame: int) -> str:
    return file if len(slices) > 1 else f"{file} frame {frame + 1}" if frame else file


def frames(header: "Dataset") -> list[Tagged]:
    """The header of every frame of a file, `get` by keyword: the file's own, or what an enhanced file's functional
    groups make of it.

    Raises:
        Refused: several frames without a place for each.
    """
    count, groups = whole(header.get("NumberOfFrames") or 1), header.get("PerFrameFunctionalGroupsSequence")
    if count == 1 and not groups:
        return [header]
    if count is None:
        raise Refused("has no valid NumberOfFrames: mend the header, or take the original series")
    if not groups or len(groups) != count:
        raise Refused(
            f"{count} frames in one file, without a place for each: convert it to single slices or NIfTI first "
            f"({CONVERTERS})"
        )
    common = {element.keyword: element.value for element in header if element.keyword and element.VR != "SQ"}
    common |= _of_groups(header.get("SharedFunctionalGroupsSequence") or [])
    return [common | _of_groups([one]) for one in groups]


def _of_groups(groups: Iterable["Dataset"]) -> dict[str, Any]:
    elements = {}
    for group in groups:
        for name, tags in GROUPS.items():
            for item in group.get(name) or []:
                elements |= {tag: item.get(tag) for tag in tags if item.get(tag) is not None}
        if group.get("RealWorldValueMappingSequence"):
            elements["RealWorldValueMappingSequence"] = group.get("RealWorldValueMappingSequence")
    return elements


class Geometry(NamedTuple):
    """Where a slice lies."""

    size: tuple[int, int]  # rows, columns
    spacing: np.ndarray  # between rows, between columns, mm
    directions: np.ndarray  # [2, 3]: along a row, along a column, LPS
    position: np.ndarray  # [3], LPS mm


def _slice_geometry(header: Tagged) -> Geometry:
    vectors = []
    for tag, count in (("PixelSpacing", 2), ("ImageOrientationPatient", 6), ("ImagePositionPatient", 3)):
        try:
            value = np.array([float(number) for number in header.get(tag) or ()])
        except (TypeError, ValueError):
            value = np.zeros(0)
        if value.shape != (count,) or not np.isfinite(value).all():
            raise Refused(f"has no valid {tag}, so its place is unknown: take the original series")
        vectors.append(value)
    spacing, directions = vectors[0], vectors[1].reshape(2, 3)
    if not (spacing > 0).all() or not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise Refused(f"PixelSpacing {spacing} or ImageOrientationPatient {vectors[1]} is impossible: mend the header")
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        low, high = SPACING_MM
        raise Refused(
            f"PixelSpacing {spacing} mm lies outside {low:g} to {high:g}, is it in another unit? mend the header"
        )
    return Geometry((int(header.get("Rows")), int(header.get("Columns"))), spacing, directions, vectors[2])


def _ordered(slices: list[tuple[str, Geometry]]) -> tuple[list[int], np.ndarray, list[str]]:
    """The slices' order along the normal, the affine of (column, row, slice, 1) to RAS+ mm, and notes."""
    if len(slices) == 1:
        raise Refused("1 slice is not a volume: leave this series out, or find its other slices")
    first = slices[0][1]
    for what, differs in (
        ("size", lambda one: one.size != first.size),
        ("pixel spacing", lambda one: not np.allclose(one.spacing, first.spacing, rtol=1e-3)),
        ("orientation", lambda one: not np.allclose(one.directions, first.directions, atol=1e-3)),
    ):
        other = next((file for file, one in slices if differs(one)), None)
        if other:
            raise Refused(f"{slices[0][0]} and {other} differ in {what}: it holds several stacks, separate them")
    normal = np.cross(*first.directions)
    order = sorted(range(len(slices)), key=lambda k: (float(slices[k][1].position @ normal), slices[k][0]))
    files, positions = [slices[k][0] for k in order], np.array([slices[k][1].position for k in order])
    along = positions @ normal
    notes = _check_spacing(files, along)
    step = (positions[-1] - positions[0]) / (len(files) - 1)
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    if drift > first.spacing.min():
        angle = np.degrees(np.arctan2(drift, along[-1] - along[0]))
        raise Refused(
            f"slices drift sideways by {drift:.1f} mm (gantry tilt, about {angle:.0f} degrees): resample it to a "
            "straight grid first; of the two files that dcm2niix writes, take the one whose name ends in _Tilt or "
            "_Tilt_1, for the other is still sheared"
        )
    affine = np.eye(4)
    along_row, along_column = first.directions * first.spacing[::-1, None]
    affine[:3] = np.c_[along_row, along_column, step, positions[0]]
    return order, LPS_TO_RAS @ affine, notes


def _check_spacing(files: list[str], along: np.ndarray) -> list[str]:
    """Refuses duplicate, missing and unevenly spaced slices; says where they are not quite even.

    Args:
        along: places along the normal in mm, ascending.
    """
    gaps, tolerance = np.diff(along), 1e-3
    starts = np.flatnonzero(np.r_[True, gaps > tolerance])  # of the slices at each place
    copies = np.diff(np.r_[starts, len(files)])
    if len(copies) == 1:
        raise Refused(f"{len(files)} slices at one position: a time series, not a volume, leave it out")
    if copies.min() > 1 and copies.min() == copies.max():
        raise Refused(
            f"{copies[0]} slices at each of {len(copies)} positions, as {files[0]} and {files[1]}: several phases or "
            "copies in one series, separate them"
        )
    if copies.max() > 1:
        place = starts[copies.argmax()]
        raise Refused(f"{files[place]} and {files[place + 1]} lie at one position: keep one of them")
    distance = float(np.median(gaps))
    if not SPACING_MM[0] <= distance <= LARGEST_STEP_MM:
        raise Refused(
            f"slices lie {distance:.3g} mm apart, outside {SPACING_MM[0]:g} to {LARGEST_STEP_MM:g}: is "
            "ImagePositionPatient in another unit? mend the header"
        )
    even = along[0] + (along[-1] - along[0]) / (len(files) - 1) * np.arange(len(files))
    deviation = float(np.abs(along - even).max())
    varying = f"distances between slices vary from {gaps.min():.3g} to {gaps.max():.3g} mm"
    if deviation <= POSITION_TOLERANCE * distance:
        if deviation <= max(NOTED_DEVIATION * distance, 0.01):
            return []
        return [f"{varying} and are stored as even ones"]
    missing = np.rint(gaps / distance).astype(int) - 1
    if np.abs(gaps / distance - missing - 1).max() <= POSITION_TOLERANCE and missing.min() >= 0:
        place = int(np.argmax(missing > 0))
        many = bool(missing.sum() > 1)
        raise Refused(
            f"{missing.sum()} slice{'s are' if many else ' is'} missing, {'the first ' * many}between {files[place]} "
            f"and {files[place + 1]} (distance {gaps[place]:.3g} mm, elsewhere {distance:.3g}): copy the whole series "
            "again"
        )
    raise Refused(
        f"{varying}: resample it to even ones first; of the two files that dcm2niix writes, take the one whose name "
        "ends in _Eq_1, for the other has the uneven slices; or leave it out"
    )


def _acquisition(header: Tagged) -> int | None:
    """A slice's AcquisitionNumber; none where there is none, or it is no whole number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, on a text that is no number
        return whole(header.get("AcquisitionNumber"))


def _check_phases(acquisitions: list[int | None]) -> None:
    """Refuses slices of several phases that lie between each other: their acquisitions take turns, where those of a
    table that moves on follow each other.

    Args:
        acquisitions: number of each slice in order.
    """
    changes, numbers = sum(one != other for one, other in pairwise(acquisitions)), {*acquisitions}
    if None not in numbers and 2 * changes > len(acquisitions) - 1 and changes >= len(numbers) > 1:
        named = ", ".join(map(str, sorted(numbers)[:5])) + ", ..." * (len(numbers) > 5)
        raise Refused(
            f"{len(numbers)} acquisitions (AcquisitionNumber {named}) whose slices lie between each other's: several "
            "phases in one series, separate them"
        )


def read_slices(folder: str | os.PathLike, grid: Grid, as_hu: bool = True) -> Iterator[np.ndarray]:
    """The slices of a grid in order.

    Args:
        as_hu: whether to give HU, what the file declares as padding as values.PADDING; else stored values.

    Yields:
        Integers or float64 [columns, rows]; lossless.

    Raises:
        ValueError: a file is cut off, damaged, of another size, or its values are in doubt.
    """
    held = None, []
    for file, number in zip(grid.files, grid.frames):
        path = os.path.join(folder, file)
        try:
            if held[0] != file:
                held = file, _read_file(path, as_hu)
            yield held[1][number].T
        except MemoryError:
            raise
        except Refused as error:
            raise ValueError(f"{grid.name}: {file}: {error}") from None
        except Exception as error:  # pydicom's and ITK's errors have no common base
            raise ValueError(dicom.unreadable(path, error)) from None


def _read_file(path: str, as_hu: bool) -> list[np.ndarray]:
    dataset = dicom.read(path)  # with its pixels, so that a file that is cut off is noticed
    headers = frames(dataset)
    kinds = [(values.encoding if as_hu else values.stored_encoding)(one) for one in headers]
    pixels = []
    for bits, header, of in zip(dicom_pixels.frames_bits(dataset, kinds[0], len(kinds)), headers, kinds):
        of = dicom_pixels.with_own_sign(dataset, header, of)
        pixels.append(values.to_hu(bits, of) if as_hu else values.stored_values(bits, of)[0])
    return pixels
