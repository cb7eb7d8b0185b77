"""What the header of a DICOM file says of what the file is.

Patients' names and numbers are kept only as hashes.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pgl_ray.files import identity, structure_header

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import FileDataset

SUFFIXES = (".dcm", ".dicom", ".ima")
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
DIRECTORY = "1.2.840.10008.1.3.10"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DEFLATED = "1.2.840.10008.1.2.1.99"
TAGS = ("SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SamplesPerPixel", "Rows", "Columns")
TAGS += ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber")
TAGS += (
    "SeriesDescription",
    "FrameOfReferenceUID",
    "InstanceNumber",
    "ImageOrientationPatient",
    "ImagePositionPatient",
)
NUMBERS = ("SamplesPerPixel", "Rows", "Columns")  # that are no text
VRS = b"AE AS AT CS DA DS DT FL FD IS LO LT OB OW PN SH SL SQ SS ST TM UI UL UN US UT".split()


class Header(NamedTuple):
    """A file, as far as grouping it needs.

    Attributes:
        kind: "slice" of a CT, "structures", "other" DICOM, "damaged" DICOM, "blank" (nothing in it), "gzip" (of
            DICOM), "archive", or "" (no DICOM).
        reason: why another object is no slice, or a file is damaged.
        patient, person: hashes of PatientID, and of it or else of name and birth date; "" where there is nothing.
        study, series, frame, instance: UIDs.
        place: number of the slice in its series.
        number, description: of the series.
        size, directions, position: "rows x columns", orientation and position as they are written.
    """

    kind: str
    reason: str = ""
    patient: str = ""
    person: str = ""
    study: str = ""
    series: str = ""
    frame: str = ""
    instance: str = ""
    place: str = ""
    number: str = ""
    description: str = ""
    size: str = ""
    directions: str = ""
    position: str = ""


def read_header(path: str) -> Header:
    """What a file is.

    Raises:
        ImportError: it is DICOM, and pydicom is not installed.
    """
    named = path.lower().endswith(SUFFIXES)
    try:
        with open(path, "rb") as file:
            begin = file.read(140)
            if not begin.strip(b"\0"):
                return _damaged(path, "nothing in it") if named else Header("blank")
            if begin[:2] == b"\x1f\x8b":
                return Header("gzip" if _is_gzipped_dicom(path) else "archive")
            if begin[128:132] != b"DICM" and not named and not _looks_bare(begin):
                return Header("archive" if path.lower().endswith((".zip", ".tar", ".7z", ".rar")) else "")
            file.seek(0)
            header, whole = _parsed(file)
    except ImportError:
        raise
    except OSError as error:  # it may be read the next time, so this is not kept
        return _damaged(path, error)._replace(kind="unopened")
    except Exception as error:  # pydicom has no common base for what a damaged header can cause
        return _by_meta(path, error)
    if not _class_of(header):
        if begin[128:132] != b"DICM" and not named:
            return Header("")
        return _by_meta(path, "no DICOM object in it")
    return _described(path, header, whole)


def _parsed(file: BinaryIO) -> tuple[Any, bool]:
    """The header, and whether the file goes on to the end of its pixels."""
    import warnings

    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(TAGS))
    if header.file_meta.get("TransferSyntaxUID") == DEFLATED:
        return header, True  # its end shows when it is read
    big = header.original_encoding[1] is False
    place, head = file.tell(), file.read(12)
    if len(head) < 12 or head[:2] != (b"\x7f\xe0" if big else b"\xe0\x7f"):
        return header, False
    explicit = head[4:6] in (b"OW", b"OB", b"OF", b"OD")
    length = int.from_bytes(head[8:12] if explicit else head[4:8], "big" if big else "little")
    end = place + (12 if explicit else 8) + length
    return header, length == 0xFFFFFFFF or end <= os.fstat(file.fileno()).st_size


def _class_of(header: "FileDataset") -> str:
    return str(_text(header, "SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")


def _described(path: str, header: "FileDataset", whole: bool) -> Header:
    kind, text = _class_of(header), {tag: _text(header, tag) for tag in TAGS}
    series = text["SeriesInstanceUID"]
    if kind in structure_header.KINDS:
        return Header("structures", series=series)
    if reason := _no_ct(text, kind):
        return Header("other", reason, series=series)
    if not whole:
        return _damaged(path, "it ends before its pixels do")._replace(series=series)
    patient = text["PatientID"] and identity.digest(text["PatientID"])[:16]
    name = text["PatientName"].rstrip("^ ").casefold() + text["PatientBirthDate"]
    return Header(
        "slice",
        patient=patient,
        person=patient or (name and identity.digest(name)[:16]),
        study=text["StudyInstanceUID"],
        series=series,
        frame=text["FrameOfReferenceUID"],
        instance=text["SOPInstanceUID"],
        place=text["InstanceNumber"],
        number=text["SeriesNumber"],
        description=text["SeriesDescription"],
        size=f"{text['Rows']} x {text['Columns']}",
        directions=text["ImageOrientationPatient"],
        position=text["ImagePositionPatient"],
    )


def _text(header: "FileDataset", tag: str) -> str:
    """A value as text, several with backslashes between. Plain bytes are taken as they stand, for pydicom's conversion
    costs as much as the reading."""
    from pydicom.datadict import tag_for_keyword

    try:
        raw = header.get_item(tag_for_keyword(tag))
        if raw is None or raw.value is None:
            return ""
        if tag not in NUMBERS and isinstance(raw.value, bytes) and raw.value.isascii():
            return raw.value.decode("ascii").strip(" \0")
        value = header.get(tag)
    except KeyError:
        return ""
    except Exception:  # a value that its type does not allow; reading the series will say so
        return ""
    several = tag in ("ImageOrientationPatient", "ImagePositionPatient") and not isinstance(value, (str, float))
    return "\\".join(map(str, value)) if several else str("" if value is None else value).strip()


def _no_ct(text: dict[str, str], kind: str) -> str:
    """Why an object is no slice of a CT volume; empty where it is one."""
    modality = text["Modality"]
    if kind.startswith(SECONDARY_CAPTURE):
        return "secondary capture, not a CT image"
    if kind == DIRECTORY:
        return "an index of DICOM files"
    if modality != "CT" and (modality or kind not in CT_CLASSES):
        return f"modality {modality or 'unknown'}, not CT"
    if "LOCALIZER" in [part.strip() for part in text["ImageType"].split("\\")]:
        return "localiser, not a volume"
    if text["SamplesPerPixel"] not in ("", "1"):
        return "colour picture, not CT values"
    if kind and kind not in CT_CLASSES and not (text["Rows"] or text["Columns"]):
        return "no picture in it (raw data, or a maker's own object)"
    return ""


def _by_meta(path: str, error: Any) -> Header:
    """A file whose data cannot be read, by what its meta header says."""
    import pydicom

    try:
        kind = str(pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID") or "")
    except Exception:  # no meta header, or a damaged one
        kind = ""
    if kind in structure_header.KINDS:
        return Header("structures")
    if kind and kind not in CT_CLASSES:
        return Header("other", "an index of DICOM files" if kind == DIRECTORY else "a DICOM object that is no CT image")
    return _damaged(path, error)


def _damaged(path: str, reason: Any) -> Header:
    if os.path.basename(path).upper() == "DICOMDIR":  # a name that the standard keeps for it
        return Header("other", "an index of DICOM files")
    return Header("damaged", unreadable(path, reason))


def unreadable(path: str | Path, reason: Any) -> str:
    """The message of a damaged file."""
    detail = " ".join(str(reason).split()) or type(reason).__name__
    return f"{path}: not a readable DICOM file ({detail[:120]}): it is cut off or damaged, copy it again"


def _looks_bare(begin: bytes) -> bool:
    """Whether bytes look like the first element of a data set without preamble: of group 2 or 8, in either order of
    bytes, with a type that there is or the length of a short value."""
    for order in ("little", "big"):
        group, element = (int.from_bytes(begin[at : at + 2], order) for at in (0, 2))
        if (group == 2 and element <= 0x16) or (group == 8 and element <= 0x20):
            length = int.from_bytes(begin[4:8], order)
            return begin[4:6] in VRS or (length % 2 == 0 and length <= 128)
    return False


def _is_gzipped_dicom(path: str) -> bool:
    import gzip
    import zlib

    try:
        with gzip.open(path) as file:
            begin = file.read(132)
    except (OSError, EOFError, zlib.error):
        return path.lower().endswith((".dcm.gz", ".ima.gz", ".dicom.gz"))
    return begin[128:] == b"DICM" or _looks_bare(begin)


# -- what is kept -----------------------------------------------------------------------------------------------------
