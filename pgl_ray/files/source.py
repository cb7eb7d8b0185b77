"""A scan that can be converted: the files it is made from, and how they are read."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgl_ray.files import ct, itk, slicer, structures
from pgl_ray.files.walk import Tree

NUM_NAMED = 5  # of things that a message names


class Reading(NamedTuple):
    """What was read of a source.

    Attributes:
        scan: the CT.
        label: uint8 or uint16 [D, H, W]; none where it has none, or none could be used.
        labelled: label values that are annotated; none: what the source says, all that have a name if it says nothing.
        notes: (file, what is worth saying of it, as a structure that could not be used).
        unasked: (file, structures in it that nobody asked for).
    """

    scan: ct.Scan
    label: np.ndarray | None
    labelled: tuple[int, ...] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    unasked: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Source:
    """One scan to convert.

    Attributes:
        scan_id: see identity.
        image: absolute path of the file, or of the folder of a DICOM series.
        label: absolute path of a label map, of the first structure set, or of the folder of the masks or label slices.
        split: "" where nothing is said.
        labelled: annotated label values; None = all that have a name.
        slices: paths of the DICOM files in `image`.
        masks: (file below `label`, value) of the masks of single organs.
        label_slices: names in `label` of the DICOM slices that are the label map.
        structures: absolute paths of the DICOM structure sets (RTSTRUCT, SEG) that label it.
        notes: (file, what is worth saying of it).
        ignored: value in label maps of voxels that nobody annotated (nnU-Net's "ignore").
    """

    scan_id: str
    image: str
    label: str | None
    split: str
    labelled: tuple[int, ...] | None = None
    slices: tuple[str, ...] = ()
    masks: tuple[tuple[str, int], ...] = ()
    label_slices: tuple[str, ...] = ()
    structures: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    ignored: int | None = None

    def read(self, names: dict[str, int] | None) -> Reading:
        """The scan, its label map if it has one, and what is worth saying of both.

        Args:
            names: organ name -> label value, which structures and named segments need.

        Raises:
            ValueError: see ct.read_scan, ct.read_label, ct.read_masks, slicer.by_names.
        """
        scan = ct.read_scan(self.image, self.slices)
        notes = (*self.notes, *((self.image, note) for note in scan.notes))
        if self.structures:
            filled = structures.read_structures(self.structures, names or {}, scan.affine, scan.voxels.shape)
            label = ct.smallest(filled.label) if filled.values else None
            return Reading(scan, label, filled.values, (*notes, *filled.notes), tuple(filled.unasked))
        if not self.label:
            return Reading(scan, None, notes=notes)
        if self.masks:
            return Reading(scan, ct.read_masks(self.label, dict(self.masks), scan), notes=notes)
        label = ct.read_label(self.label, scan, self.label_slices)
        label, note, labelled = slicer.by_names(label, self.label, names or {})
        notes += ((self.label, note),) if note else ()
        if self.ignored is not None and (num := int(np.count_nonzero(label == self.ignored))):
            raise ValueError(
                f"{self.label}: {num} voxels are marked as not annotated (dataset.json's ignore, {self.ignored}), "
                "which a store cannot keep: annotate them, or leave this label map out"
            )
        return Reading(scan, label, labelled, notes)

    def extent(self) -> tuple[int, float]:
        """Number of voxels, and the size of one in mm^3, from the headers only.

        Raises:
            ValueError: see ct.extent.
        """
        return ct.extent(self.image, self.slices)

    def files(self) -> list[Path]:
        """All files that the scan is made from."""
        return [Path(path) for path in self.paths()]

    def paths(self) -> list[str]:
        """Of all files that the scan is made from; an archive has millions of them, so they are texts."""
        images = [f"{self.image}/{name}" for name in self.slices] or list(map(str, files_of(Path(self.image))))
        parts = self.label_slices or [name for name, _ in self.masks]
        labels = list(self.structures) or [f"{self.label}/{name}" for name in parts]
        return images + (labels or (list(map(str, files_of(Path(self.label)))) if self.label else []))

    def stamp(self) -> tuple[int, int]:
        """Bytes of all files, and what tells them from those that may take their place: a hash below 2^63 over the
        path, bytes and times of each, which files that change places alter. The time of the last rename is among
        these: where only that differs, the price is one reading for the digest."""
        paths = self.paths()
        stats = [os.stat(path) for path in paths]
        size = sum(stat.st_size for stat in stats)
        rows = [(path, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in zip(paths, stats)]
        return size, int.from_bytes(hashlib.sha256(repr(rows).encode()).digest()[:8]) >> 1

    def digest(self, with_values: bool = True) -> str:
        """sha256 of the file's bytes; of several files, that of their hashes and of the values of masks, which earlier
        versions left out."""
        digests = []
        for file in self.files():
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        if len(digests) == 1:
            return digests[0]
        values = [str(value) for _, value in self.masks] if with_values else []
        return hashlib.sha256("".join([*digests, *values]).encode()).hexdigest()


class Fault(NamedTuple):
    """A file that is not used, and why."""

    source: str
    reason: str


class Inventory(NamedTuple):
    """Scans by the parts of their ids, what goes into Layout, and paths of other files that are accounted for."""

    scans: dict[tuple[str, ...], Source]
    faults: list[Fault]
    left_out: list[Fault]
    missing: list[str]
    seen: set[str]


def volume_files(tree: Tree, folder: Path, without: Sequence[Path] = ()) -> list[Path]:
    """Volume files below a folder; links that lead nowhere are among them."""
    return [path for path in map(Path, tree.below(folder, without)) if ct.is_volume(path)]


def files_of(path: Path) -> list[Path]:
    """The files that a volume is made of: itself, and what a header apart from its voxels belongs to."""
    if path.suffix.lower() != ".hdr":
        return itk.files_of(path)
    return [path, *(image for suffix in (".img", ".IMG") if (image := path.with_suffix(suffix)).is_file())]


def counted(num: int, what: str) -> str:
    """1 scan, 2 scans."""
    return f"{num} {what}{'s' * (num != 1)}"


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
