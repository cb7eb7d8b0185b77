"""DICOM: what lies below a folder, by series; and the reading of a file's header.

Headers are read by pydicom, pixels by SimpleITK's GDCM, which decodes every transfer syntax that CT comes in.
"""

import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pgl_ray.files import dicom_series, identity, structure_header
from pgl_ray.files.dicom_headers import SUFFIXES, Header, read_header, unreadable
from pgl_ray.files.header_cache import HeaderCache
from pgl_ray.files.structure_header import Contours
from pgl_ray.files.walk import LOST, Tree, walk

AIR = -1024  # HU of voxels outside the reconstruction
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")  # files that are never DICOM


class Series(NamedTuple):
    """A CT series: its UID, number and description, the folder that all its files lie below, their paths in it, the
    UID of its frame of reference, (a hash of) its patient, the end of its id, and what is worth saying of it."""

    uid: str
    number: str
    description: str
    folder: str
    slices: tuple[str, ...]
    frame: str = ""
    patient: str = ""
    id_part: str = ""
    notes: tuple[str, ...] = ()

    def paths(self) -> list[str]:
        """Of all its files."""
        return [os.path.join(self.folder, name) for name in self.slices]


class Objects(NamedTuple):
    """What lies below a folder: CT series, structure sets, (path, reason) of other DICOM objects that are no CT volume
    and of copies and scouts, (path, reason) of DICOM files that cannot be read, and the series that those belong to, as
    far as it is known."""

    series: list[Series]
    contours: list[Contours]
    left_out: list[tuple[str, str]]
    unreadable: list[tuple[str, str]]
    belongs: dict[str, str]

    def doubt(self, series: Series) -> str:
        """The reason of a file that cannot be read and lies next to a series' slices, of which it may be one, or ""."""
        if not self.unreadable:
            return ""
        folders = {os.path.dirname(path) for path in series.paths()}
        inside = f"{series.folder}/" if len(folders) > 1 else None
        for path, reason in self.unreadable:
            near = os.path.dirname(path) in folders or (inside and path.startswith(inside))
            if near and self.belongs.get(path) in (None, "", series.uid):
                return f"{reason}, or remove it if it is no slice of this series"
        return ""


def find(
    folder: Path, tree: Tree | None = None, cache: HeaderCache | None = None, known: Collection[str] = ()
) -> Objects:
    """Groups the DICOM files below a folder, with or without extension, by series.

    Args:
        tree: what lies below the folder; none: it is looked at.
        cache: headers that are known already.
        known: folders of the series that the store holds.

    Raises:
        ValueError: there is DICOM, and pydicom is not installed.
    """
    tree = tree or walk(os.path.abspath(folder))
    files = [(path, tree.files[path]) for path in tree.below(folder) if not path.lower().endswith(VOLUMES)]
    try:
        headers = (cache or HeaderCache()).headers(files)
    except ImportError:
        raise ValueError(f"{folder}: DICOM needs pydicom: pip install 'pgl_ray[dicom]'") from None
    objects, slices = Objects([], [], [], [], {}), {}
    for path, header in headers.items():
        if header.kind == "slice":
            slices[path] = header
        elif header.kind == "structures":
            objects.contours.append(_structures(path))
        else:
            _note(objects, path, header, tree.files[path])
    groups, left_out = dicom_series.group(slices, {path: tree.files[path][0] for path in slices}, known)
    objects.left_out.extend(left_out)
    objects.series.extend(_series(one) for one in groups)
    _note_gzipped([path for path, header in headers.items() if header.kind == "gzip"], objects)
    _note_blank([path for path, header in headers.items() if header.kind == "blank"], slices, objects)
    objects.left_out.sort()
    objects.unreadable.sort()
    return objects


def _note(objects: Objects, path: str, header: Header, stamp: tuple[int, int]) -> None:
    """Says what a file is that is no slice."""
    if header.kind == "damaged" or (header.kind == "unopened" and (stamp != LOST or path.lower().endswith(SUFFIXES))):
        objects.unreadable.append((path, header.reason))
        objects.belongs[path] = header.series
    elif header.kind == "unopened":
        objects.left_out.append((path, "a link to a file that is not there"))
    elif header.kind == "other":
        objects.left_out.append((path, header.reason))
    elif header.kind == "archive":
        objects.left_out.append((path, "an archive: unpack it, if there are scans in it"))


def _note_gzipped(paths: list[str], objects: Objects) -> None:
    """Gzipped DICOM, in a line per folder."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    for folder, files in folders.items():
        count = "1 file is" if len(files) == 1 else f"{len(files)} files are"
        objects.unreadable.append(
            (files[0], f"{folder}: {count} gzipped DICOM: unzip with gunzip, then type this again")
        )


def _note_blank(paths: list[str], slices: dict[str, Header], objects: Objects) -> None:
    """A file of nothing may be a slice where it lies next to slices that are named alike."""
    suffixes = defaultdict(set)
    for path in slices if paths else ():
        suffixes[os.path.dirname(path)].add(os.path.splitext(path)[1].lower())
    for path in paths:
        if os.path.splitext(path)[1].lower() in suffixes[os.path.dirname(path)]:
            objects.unreadable.append((path, unreadable(path, "nothing in it")))
        else:
            objects.left_out.append((path, "nothing in it"))


def _structures(path: str) -> Contours:
    try:
        header = read(path, stop_before_pixels=True, specific_tags=["SOPClassUID", *structure_header.HEADER])
    except Exception as error:  # pydicom has no common base for what a damaged header can cause
        return structure_header.broken(Path(path), str(error))
    contours = structure_header.summarise(Path(path), header)
    return contours._replace(patient=contours.patient and identity.digest(contours.patient.strip())[:16])


def _series(group: dicom_series.Group) -> Series:
    below = os.path.commonpath({os.path.dirname(path) for path in group.paths})
    names = tuple(sorted(path[len(below) :].lstrip("/") for path in group.paths))
    head = group.header
    return Series(
        head.series,
        head.number,
        head.description,
        below,
        names,
        head.frame,
        head.patient,
        identity.series_part(head.number, head.person, head.study, head.series, head.frame),
        group.notes,
    )


def is_dicom(path: Path) -> bool:
    """Whether a file has a DICOM suffix, DICOM's mark at byte 128, or begins as DICOM without a preamble does; a file
    that cannot be opened may be DICOM."""
    if path.name.lower().endswith(SUFFIXES):
        return not path.is_dir()  # a link that leads nowhere is reported as unreadable
    return path.is_file() and read_header(str(path)).kind not in ("", "blank", "archive", "gzip")


def only_series(folder: str | Path) -> tuple[str, ...]:
    """The slices of the one CT series below a folder.

    Raises:
        ValueError: none or several, or a file next to it that cannot be read.
    """
    objects = find(Path(folder))
    if len(objects.series) != 1:
        other = "; ".join(f"{path}: {reason}" for path, reason in objects.left_out) or "no DICOM file"
        listed = ", ".join(f"{one.number} in {one.folder}" for one in objects.series) or f"none ({other})"
        raise ValueError(f"{folder}: expected one CT series, found {listed}: name the folder of one series")
    if doubt := objects.doubt(objects.series[0]):
        raise ValueError(doubt)
    below = objects.series[0].folder
    return tuple(os.path.relpath(os.path.join(below, name), folder) for name in objects.series[0].slices)


def read(path: str | Path, **options: Any) -> Any:
    """pydicom's data set of a file; its remarks on values against the standard are left out."""
    import warnings

    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path, force=True, **options)  # old files have no preamble
    if not header or ("SOPClassUID" not in header and "MediaStorageSOPClassUID" not in header.file_meta):
        raise ValueError("no DICOM object in it")
    return header
