"""DICOM: the CT series below a folder, and one series as slices on a regular grid.

Headers are read by pydicom, pixels by SimpleITK's GDCM, which decodes every transfer syntax that CT comes in. The
geometry is checked here, because ITK silently stretches a missing slice and unshears a gantry tilt.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.data import structure_header
from pgl_ray.data.structure_header import Contours

SUFFIXES = (".dcm", ".dicom", ".ima")
AIR = -1024  # HU of voxels outside the reconstruction
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
DIRECTORY = "1.2.840.10008.1.3.10"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
HEADER = ("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
HEADER += ("SamplesPerPixel", *structure_header.HEADER)


class Series(NamedTuple):
    """A CT series: its UID, number and description, the folder that all its files lie below, their paths in it, the
    UID of its frame of reference, and its patient."""

    uid: str
    number: str
    description: str
    folder: str
    slices: tuple[str, ...]
    frame: str = ""
    patient: str = ""


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
            if kind in structure_header.KINDS:
                found.contours.append(structure_header.summarise(path, header))
            elif reason := _no_ct(header, kind):
                others[uid, reason].append(path)
            elif header.file_meta.get("MediaStorageSOPClassUID") != DIRECTORY:
                number, description = (str(header.get(tag, "")) for tag in ("SeriesNumber", "SeriesDescription"))
                frame, patient = (str(header.get(tag) or "") for tag in ("FrameOfReferenceUID", "PatientID"))
                slices[uid].append((path, number, description, frame, patient))
        except ImportError:
            raise ValueError(f"{path}: DICOM needs pydicom: pip install 'pgl_ray[dicom]'") from None
        except Exception as error:  # pydicom has no common base for what a damaged header can cause
            if structure_header.is_structures(path):
                found.contours.append(structure_header.broken(path, str(error)))
            else:
                found.unreadable.append((str(path), unreadable(path, error)))
    for uid, files in slices.items():
        below = os.path.commonpath([path.parent for path, *_ in files])
        names = tuple(sorted(os.path.relpath(path, below) for path, *_ in files))
        _, number, description, frame, patient = files[0]
        found.series.append(Series(uid, number, description, below, names, frame, patient))
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
