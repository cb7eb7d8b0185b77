"""DICOM: the CT series below a folder, and one series as slices on a regular grid.

Headers are read by pydicom, pixels by SimpleITK's GDCM, which decodes every transfer syntax that CT comes in. The
geometry is checked here, because ITK silently stretches a missing slice and unshears a gantry tilt.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = (".dcm", ".dicom", ".ima")
AIR = -1024  # HU of voxels outside the reconstruction
PADDING = -(2**15)  # HU that read_hu gives padding, below every measured one
HIGHEST_TISSUE = 3071  # of 12-bit CT
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
POSITION_TOLERANCE = 0.1  # how far a slice may lie from its place in the regular grid, in slice distances
RT_STRUCTURE_SET, DIRECTORY = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.1.3.10"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
HEADER = ("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
HEADER += ("SamplesPerPixel", "StructureSetROISequence", "ROIContourSequence", "ReferencedFrameOfReferenceSequence")
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")  # contours that bound a surface


class Series(NamedTuple):
    """A CT series: its UID, number and description, the folder that all its files lie below, and their paths in it."""

    uid: str
    number: str
    description: str
    folder: str
    slices: tuple[str, ...]


class Contours(NamedTuple):
    """A structure set (RTSTRUCT): its path, the UIDs of the series it is drawn on, and the names of the structures
    that have closed contours."""

    path: str
    series: frozenset[str]
    organs: tuple[str, ...]


class Found(NamedTuple):
    """What lies below a folder: CT series, structure sets, (path, reason) of other DICOM objects that are no CT volume,
    and (path, reason) of DICOM files that cannot be read."""

    series: list[Series]
    contours: list[Contours]
    left_out: list[tuple[str, str]]
    unreadable: list[tuple[str, str]]

    def doubt(self, series: Series) -> str:
        """The reason of a file that cannot be read and lies beside a series' slices, of which it may be one, or ""."""
        folders = {os.path.dirname(os.path.join(series.folder, name)) for name in series.slices}
        reasons = [reason for path, reason in self.unreadable if os.path.dirname(path) in folders]
        return f"{reasons[0]}, or remove it if it is no slice of this series" if reasons else ""


def find(folder: Path) -> Found:
    """Groups the DICOM files below a folder, with or without extension, by series.

    Raises:
        ValueError: there is DICOM, and pydicom is not installed.
    """
    found, slices, others = Found([], [], [], []), defaultdict(list), defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not is_dicom(path):
            continue
        try:
            header = read(path, stop_before_pixels=True, specific_tags=list(HEADER))
            uid, kind = str(header.get("SeriesInstanceUID", "")), str(header.get("SOPClassUID", ""))
            if kind == RT_STRUCTURE_SET:
                found.contours.append(_contours(path, header))
            elif reason := _no_ct(header, kind):
                others[uid, reason].append(path)
            elif header.file_meta.get("MediaStorageSOPClassUID") != DIRECTORY:
                number, description = (str(header.get(tag, "")) for tag in ("SeriesNumber", "SeriesDescription"))
                slices[uid].append((path, number, description))
        except ImportError:
            raise ValueError(f"{path}: DICOM needs pydicom: pip install 'pgl_ray[dicom]'") from None
        except Exception as error:  # pydicom has no common base for what a damaged header can cause
            found.unreadable.append((str(path), unreadable(path, error)))
    for uid, files in slices.items():
        below = os.path.commonpath([path.parent for path, *_ in files])
        names = tuple(sorted(os.path.relpath(path, below) for path, *_ in files))
        found.series.append(Series(uid, *files[0][1:], below, names))
    for (_, reason), files in others.items():
        found.left_out.append((str(files[0]), f"{reason} ({len(files)} file{'s' * (len(files) > 1)})"))
    return found


def is_dicom(path: Path) -> bool:
    """Whether a file has a DICOM suffix, or DICOM's mark at byte 128; a file that cannot be opened may be DICOM."""
    if path.name.lower().endswith(SUFFIXES):
        return not path.is_dir()  # a link that leads nowhere is told of as unreadable
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return True


def only_series(folder: str | Path) -> tuple[str, ...]:
    """The slices of the one CT series below a folder.

    Raises:
        ValueError: none or several, or a file beside it that cannot be read.
    """
    found = find(Path(folder))
    if len(found.series) != 1:
        other = "; ".join(f"{path}: {reason}" for path, reason in found.left_out) or "no DICOM file"
        listed = ", ".join(f"{one.number} in {one.folder}" for one in found.series) or f"none ({other})"
        raise ValueError(f"{folder}: expected one CT series, found {listed}: name the folder of one series")
    if doubt := found.doubt(found.series[0]):
        raise ValueError(doubt)
    below = found.series[0].folder
    return tuple(os.path.relpath(os.path.join(below, name), folder) for name in found.series[0].slices)


def _no_ct(header, kind: str) -> str:
    """Why an object is no slice of a CT volume; empty where it is one."""
    modality = header.get("Modality")
    if kind.startswith(SECONDARY_CAPTURE):
        return "secondary capture, not a CT image"
    if header.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY:
        return ""
    if modality != "CT":
        return f"modality {modality or 'unknown'}, not CT"
    if "LOCALIZER" in (header.get("ImageType") or []):
        return "localiser, not a volume"
    if (header.get("SamplesPerPixel") or 1) != 1:
        return "colour picture, not CT values"
    return ""


def _contours(path: Path, header) -> Contours:
    series = [
        str(one.SeriesInstanceUID)
        for frame in header.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for one in study.get("RTReferencedSeriesSequence") or []
    ]
    names = {int(roi.ROINumber): str(roi.ROIName).strip() for roi in header.get("StructureSetROISequence") or []}
    drawn = [
        names[int(roi.ReferencedROINumber)]
        for roi in header.get("ROIContourSequence") or []
        if any(contour.get("ContourGeometricType") in CLOSED for contour in roi.get("ContourSequence") or [])
    ]
    return Contours(str(path), frozenset(series), tuple(drawn))


def read(path: str | Path, **options) -> Any:
    """pydicom's data set of a file; its remarks on values against the standard are left out."""
    import warnings

    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        force = str(path).lower().endswith(SUFFIXES)  # old files have no preamble
        header = pydicom.dcmread(path, force=force, **options)
    if not header or ("SOPClassUID" not in header and "MediaStorageSOPClassUID" not in header.file_meta):
        raise ValueError("no DICOM object in it")
    return header


def unreadable(path: str | Path, reason: Any) -> str:
    """The message of a damaged file."""
    detail = " ".join(str(reason).split()) or type(reason).__name__
    return f"{path}: not a readable DICOM file ({detail[:120]}): it is cut off or damaged, copy it again"


# -- one series -------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """A series on a regular grid: its name in messages, its files in order, (columns, rows, slices), and the affine
    from (column, row, slice, 1) to RAS+ mm."""

    name: str
    files: list[str]
    shape: tuple[int, int, int]
    affine: np.ndarray


def read_grid(folder: str | Path, slices: tuple[str, ...]) -> Grid:
    """Checks the headers of a series and orders its slices.

    Raises:
        ValueError: not one parallel, evenly spaced, untilted stack of CT slices; the message says what to do.
    """
    if not slices:
        raise ValueError(f"{folder}: no DICOM slice in it")
    headers, name = [], str(folder)
    for file in slices:
        path = os.path.join(folder, file)
        try:
            header = read(path, stop_before_pixels=True)
            number = header.get("SeriesNumber")
            name = str(folder) if number is None else f"{folder}: series {number}"
            headers.append((file, header, _slice_geometry(header)))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except Refused as error:
            raise ValueError(f"{name}: {file}: {error}") from None
        except Exception as error:  # see find
            raise ValueError(unreadable(path, error)) from None
    try:
        files, affine = _ordered([(file, geometry) for file, _, geometry in headers])
    except Refused as error:
        raise ValueError(f"{name}: {error}") from None
    first = headers[0][1]
    return Grid(name, files, (int(first.Columns), int(first.Rows), len(files)), affine)


class Refused(ValueError):
    """A reason without the file's name."""


class _Geometry(NamedTuple):
    size: tuple[int, int]  # rows, columns
    spacing: np.ndarray  # between rows, between columns, mm
    directions: np.ndarray  # [2, 3]: along a row, along a column, LPS
    position: np.ndarray  # [3], LPS mm


def _slice_geometry(header) -> _Geometry:
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise Refused(f"{header.NumberOfFrames} frames in one file (enhanced CT): convert it to single-frame CT first")
    if not header.get("Rows") or not header.get("Columns"):
        raise Refused("has no picture: leave this file out")
    if int(header.get("BitsStored") or 0) <= 8:
        raise Refused(f"{header.get('BitsStored')} bits per pixel are too few for HU: take the original series")
    if header.get("RescaleIntercept") is None or header.get("RescaleType", "HU") not in ("HU", "", None):
        kind = header.get("RescaleType")
        reason = f"pixels are in {kind}" if kind not in (None, "HU") else "has no RescaleIntercept"
        raise Refused(f"{reason}, so its values are not HU: take the original series")
    values = []
    for tag, count in (("PixelSpacing", 2), ("ImageOrientationPatient", 6), ("ImagePositionPatient", 3)):
        try:
            value = np.array([float(number) for number in header.get(tag) or ()])
        except (TypeError, ValueError):
            value = np.zeros(0)
        if value.shape != (count,) or not np.isfinite(value).all():
            raise Refused(f"has no valid {tag}, so its place is unknown: take the original series")
        values.append(value)
    spacing, directions = values[0], values[1].reshape(2, 3)
    if not (spacing > 0).all() or not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise Refused(f"PixelSpacing {spacing} or ImageOrientationPatient {values[1]} is impossible: mend the header")
    return _Geometry((int(header.Rows), int(header.Columns)), spacing, directions, values[2])


def _ordered(slices: list[tuple[str, _Geometry]]) -> tuple[list[str], np.ndarray]:
    """Files in the order of their place along the normal, and the affine of (column, row, slice, 1) to RAS+ mm."""
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
    slices = sorted(slices, key=lambda one: (float(one[1].position @ normal), one[0]))
    files, positions = [file for file, _ in slices], np.array([one.position for _, one in slices])
    along = positions @ normal
    _check_spacing(files, along)
    step = (positions[-1] - positions[0]) / (len(files) - 1)
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    if drift > first.spacing.min():
        angle = np.degrees(np.arctan2(drift, along[-1] - along[0]))
        raise Refused(
            f"slices drift sideways by {drift:.1f} mm (gantry tilt, about {angle:.0f} degrees): resample it to a "
            "straight grid first, for instance with dcm2niix"
        )
    affine = np.eye(4)
    along_row, along_column = first.directions * first.spacing[::-1, None]
    affine[:3] = np.c_[along_row, along_column, step, positions[0]]
    return files, LPS_TO_RAS @ affine


def _check_spacing(files: list[str], along: np.ndarray) -> None:
    """Refuses duplicate, missing and unevenly spaced slices.

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
    even = along[0] + (along[-1] - along[0]) / (len(files) - 1) * np.arange(len(files))
    if np.abs(along - even).max() <= POSITION_TOLERANCE * distance:
        return
    missing = np.rint(gaps / distance).astype(int) - 1
    if np.abs(gaps / distance - missing - 1).max() <= POSITION_TOLERANCE and missing.min() >= 0:
        place = int(np.argmax(missing > 0))
        raise Refused(
            f"slices are missing ({missing.sum()}), the first between {files[place]} and {files[place + 1]} "
            f"(distance {gaps[place]:.3g} mm, elsewhere {distance:.3g}): copy the whole series again"
        )
    raise Refused(
        f"distances between slices vary from {gaps.min():.3g} to {gaps.max():.3g} mm: resample it to even ones first, "
        "or leave it out"
    )


def read_hu(folder: str | Path, file: str, shape: tuple[int, int]) -> np.ndarray:
    """One slice in HU, what the file declares as padding as PADDING.

    Returns:
        int32 or float64 [columns, rows]; lossless for integer slopes.

    Raises:
        ValueError: the file is cut off, damaged, or of another size.
    """
    import SimpleITK as sitk

    path = os.path.join(folder, file)
    try:
        header = read(path)  # with its pixels, so that a file that is cut off is noticed
        if "PixelData" not in header:
            raise ValueError("no pixels in it")
        compressed = header.file_meta.get("TransferSyntaxUID") and header.file_meta.TransferSyntaxUID.is_compressed
        need = shape[0] * shape[1] * (int(header.BitsAllocated) // 8)
        if not compressed and len(header.PixelData) < need:
            raise ValueError(f"{len(header.PixelData)} bytes of pixels, {need} expected")
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(path)
        with _decoders_words() as words:
            values = sitk.GetArrayFromImage(reader.Execute())[0].T
            if b"Corrupt" in words():
                raise ValueError("its JPEG stream is corrupt")
    except MemoryError:
        raise
    except Exception as error:  # pydicom's and ITK's errors have no common base
        raise ValueError(unreadable(path, _itk_reason(error))) from None
    if values.shape != tuple(shape):
        raise ValueError(unreadable(path, f"picture of {values.shape}, its header says {tuple(shape)}"))
    padding = _padding(header)
    if padding is None:
        return values
    return np.where((values >= padding[0]) & (values <= padding[1]), np.int32(PADDING), values)


def _itk_reason(error: Exception) -> str:
    return "its pixels cannot be decoded" if "sitk::ERROR" in str(error) else str(error) or type(error).__name__


def _padding(header) -> tuple[float, float] | None:
    """HU range of the pixels that the file declares as padding; none where it could be tissue, as in files with 0."""
    if header.get("PixelPaddingValue") is None:
        return None
    slope, intercept = float(header.get("RescaleSlope") or 1), float(header.RescaleIntercept)
    ends = [header.get(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [int(end) for end in ends if end is not None]
    low, high = (bound(end * slope + intercept for end in ends) for bound in (min, max))
    return (low, high) if high <= AIR or low > HIGHEST_TISSUE else None


@contextmanager
def _decoders_words() -> Iterator[Callable[[], bytes]]:
    """Catches what GDCM's JPEG decoders write to the process's stderr: chatter at every 12-bit slice, and that a stream
    is corrupt, where they nevertheless give a picture."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def words() -> bytes:
            file.seek(0)
            return file.read()

        try:
            os.dup2(file.fileno(), 2)
            yield words
        finally:
            os.dup2(kept, 2)
            os.close(kept)
