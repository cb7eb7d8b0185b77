"""What DICOM objects that hold structures, RTSTRUCT (contours) and SEG (segmentations), say in their headers."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import Dataset

RT_STRUCTURE_SET, SEGMENTATION = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.66.4"
KINDS = (RT_STRUCTURE_SET, SEGMENTATION)
HEADER = ("StructureSetROISequence", "ROIContourSequence", "ReferencedFrameOfReferenceSequence", "FrameOfReferenceUID")
HEADER += ("SegmentSequence", "ReferencedSeriesSequence", "PatientID")
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")  # contours that bound a surface


class Contours(NamedTuple):
    """A structure set (RTSTRUCT, or SEG): its path, the UIDs of the series it is drawn on, the names of the structures
    that have closed contours or are segments, the UIDs of its frames of reference, its patient, the names of those that
    have none, why it cannot be read ("": it can), and why it is not used though it can."""

    path: str
    series: frozenset[str]
    organs: tuple[str, ...]
    frames: frozenset[str] = frozenset()
    patient: str = ""
    undrawn: tuple[str, ...] = ()
    broken: str = ""
    unused: str = ""


def summarise(path: Path, header: "Dataset") -> Contours:
    """The header of a structure set; damage within it is `broken`, and nothing is raised."""
    try:
        is_seg = str(header.get("SOPClassUID", "")) == SEGMENTATION
        organs, undrawn = (_segments(header), ()) if is_seg else _drawn(header)
        series, frames, unused = _references(header)
        patient = str(header.get("PatientID") or "")
        return Contours(str(path), series, organs, frames, patient, undrawn, unused=unused)
    except Exception as error:  # pydicom has no common base for what a damaged header can cause
        return broken(path, str(error) or type(error).__name__)


def broken(path: Path, reason: str) -> Contours:
    """A structure set that cannot be read."""
    return Contours(str(path), frozenset(), (), broken=" ".join(reason.split())[:200])


def key_of(name: str) -> str:
    """A structure's name as it is compared: capitals, outer blanks and the way that accents are composed do not
    matter."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def near(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that may be meant by a name: they differ in blanks, underscores and the like, or in how their
    bytes were read."""
    return [other for other in names if _letters(other) == _letters(name) and key_of(other) != key_of(name)]


def _letters(name: str) -> str:
    for charset in ("cp1252", "latin-1"):
        try:
            name = name.encode(charset).decode()  # UTF-8 without its SpecificCharacterSet
            break
        except UnicodeError:
            continue
    return "".join(letter for letter in key_of(name) if letter.isalnum())


def check_whole(header: "Dataset") -> None:
    """Refuses a structure set that is cut off: pydicom leaves out the sequence that the file ends in, or gives those of
    its items that are there. To be called before the sequences are looked at.

    Raises:
        ValueError: it is.
    """
    for sequence in ("StructureSetROISequence", "ROIContourSequence"):
        if sequence not in header:
            raise ValueError(f"no {sequence} in it")
        raw = header.get_item(sequence)  # not yet parsed
        if raw.is_raw and isinstance(raw.value, bytes) and raw.length not in (len(raw.value), 0xFFFFFFFF):
            raise ValueError(f"{len(raw.value)} of {raw.length} bytes of its {sequence}")


def _drawn(header: "Dataset") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the ROIs that have closed contours, and of those that have none."""
    check_whole(header)
    names = roi_names(header)
    drawn = [
        names.get(whole(roi.get("ReferencedROINumber")), "")
        for roi in header.get("ROIContourSequence") or []
        if any(str(contour.get("ContourGeometricType")) in CLOSED for contour in roi.get("ContourSequence") or [])
    ]
    closed = tuple(dict.fromkeys(name for name in drawn if name))
    return closed, tuple(dict.fromkeys(name for name in names.values() if name and name not in closed))


def roi_names(header: "Dataset") -> dict[int | None, str]:
    """ROI number -> name; "" where several ROIs of different names have one number."""
    names: dict[int | None, str] = {}
    for roi in header.get("StructureSetROISequence") or []:
        number, name = whole(roi.get("ROINumber")), str(roi.get("ROIName") or "").strip()
        names[number] = name if names.get(number, name) == name else ""
    return names


def whole(value: Any) -> int | None:
    """A whole number as DICOM writes it; none where it is not one."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _segments(header: "Dataset") -> tuple[str, ...]:
    return tuple(dict.fromkeys(segment_names(header).values()))


def segment_names(header: "Dataset") -> dict[int | None, str]:
    """Segment number -> label."""
    segments = header.get("SegmentSequence") or []
    return {whole(one.get("SegmentNumber")): str(one.get("SegmentLabel") or "").strip() for one in segments}


def _references(header: "Dataset") -> tuple[frozenset[str], frozenset[str], str]:
    """UIDs of the series that structures are drawn on, and of their frames of reference; why these are unknown, or "".
    Of several frames that a set lists, each with its series, that counts in which its ROIs are drawn."""
    listed: dict[str, set[str]] = defaultdict(set)  # frame -> its series
    for frame in header.get("ReferencedFrameOfReferenceSequence") or []:
        studies = frame.get("RTReferencedStudySequence") or []
        inside = [one for study in studies for one in study.get("RTReferencedSeriesSequence") or []]
        listed[_uid(frame, "FrameOfReferenceUID")] |= {_uid(one, "SeriesInstanceUID") for one in inside}
    drawn = _frames_of_rois(header)
    known = drawn & listed.keys() or {frame for frame in listed if listed[frame]}
    direct = {_uid(one, "SeriesInstanceUID") for one in header.get("ReferencedSeriesSequence") or []}
    series = direct.union(*(listed[frame] for frame in known))
    frames = drawn & listed.keys() or {_uid(header, "FrameOfReferenceUID"), *drawn, *listed}
    num, unused = max(len(drawn), len(known)), ""
    if num > 1:
        unused = (
            f"{num} frames of reference, and not a single one that its structures are drawn in: write a set for each"
        )
    return frozenset(series - {""}), frozenset(frames - {""}), unused


def _frames_of_rois(header: "Dataset") -> set[str]:
    """UIDs of the frames of reference that the ROIs with contours state for themselves."""
    contours = header.get("ROIContourSequence") or []
    drawn = {whole(one.get("ReferencedROINumber")) for one in contours if one.get("ContourSequence")}
    rois = [one for one in header.get("StructureSetROISequence") or [] if whole(one.get("ROINumber")) in drawn]
    return {_uid(one, "ReferencedFrameOfReferenceUID") for one in rois} - {""}


def _uid(item: "Dataset", tag: str) -> str:
    return str(item.get(tag) or "")
