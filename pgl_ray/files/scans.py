"""Scans to be read one after the other, whether they lie in a store or as files: an id, a stamp, and the voxels."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgl_ray.data.scan_files import open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.files import ct, dicom
from pgl_ray.files.accounts import unused
from pgl_ray.files.folders import find_by_folders
from pgl_ray.files.layout import refuse_empty, with_ids
from pgl_ray.files.source import Fault, files_of
from pgl_ray.files.walk import Tree, walk

NUM_PLACES, PLACE_BYTES = 16, 4096  # of a file, that tell it from another one of the same name, size and time


@dataclass(frozen=True)
class StoredScan:
    """A scan of a store.

    Attributes:
        store: path or URL.
        record: of the index.
    """

    store: str
    record: ScanRecord

    @property
    def scan_id(self) -> str:
        """Its name in the store."""
        return self.record.scan_id

    @property
    def source(self) -> str:
        """What it was made from."""
        return self.record.source

    def stamp(self) -> str:
        """Changes where voxels or geometry do."""
        fields = [self.record.content_hash, self.record.affine, self.record.spacing_mm]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def num_voxels(self) -> int:
        """Of the stored array."""
        return int(np.prod(self.record.shape))

    def size(self) -> int:
        """What grows with the scan."""
        return self.num_voxels()

    def read(self) -> ct.Scan:
        """The scan in the stored orientation.

        Raises:
            ValueError, OSError: damaged or gone.
        """
        record = self.record
        voxels = open_volume(self.store, record).read(np.array([(0, size) for size in record.shape]))
        affine = np.array(record.affine).reshape(4, 4)
        others = record.orientation, record.rounding_error_hu, record.num_padding
        return ct.Scan(voxels, affine, tuple(record.spacing_mm), *others)


@dataclass(frozen=True)
class ScanFile:
    """A CT outside of a store.

    Attributes:
        scan_id: its name without suffix, or the folder's of a DICOM series.
        path: a file, or a folder of DICOM.
        slices: of a series, its files in that folder.
    """

    scan_id: str
    path: Path
    slices: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where it lies."""
        return str(self.path)

    def stamp(self) -> str:
        """Changes where a file's name, size, time or bytes at some places do: another patient's file may have all but
        the last."""
        digest = hashlib.sha256()
        for file in self._files():
            stat = file.stat()
            digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
            with file.open("rb") as opened:
                for place in range(0, stat.st_size, max(PLACE_BYTES, stat.st_size // NUM_PLACES)):
                    opened.seek(place)
                    digest.update(opened.read(PLACE_BYTES))
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        return [self.path / name for name in self.slices] if self.path.is_dir() else files_of(self.path)

    def num_voxels(self) -> int:
        """As its headers say."""
        return ct.extent(self.path, self.slices)[0]

    def size(self) -> int:
        """What grows with the scan, roughly: bytes of its files, 0 where they are gone."""
        return sum(file.stat().st_size for file in self._files() if file.exists())

    def read(self) -> ct.Scan:
        """The scan in the stored orientation; errors as of `ct.read_scan`."""
        return ct.read_scan(self.path, self.slices)


def stored_scans(index: Index) -> list[StoredScan]:
    """All scans of a store, by scan_id."""
    return [StoredScan(index.store, record) for record in index.scans]


class Listed(NamedTuple):
    """CTs of a file or folder, files that should be CTs and cannot be used, and files that are no CT."""

    scans: list[ScanFile]
    faults: list[Fault]
    left_out: list[Fault]


def scan_files(
    source: Path,
    key: str = "input",
    without: Iterable[Path] = (),
    trim: Callable[[Tree], tuple[Tree, list[Fault]]] = lambda tree: (tree, []),
) -> Listed:
    """The CTs of a file or folder, found and named as prepare and predict do it.

    Args:
        source: file or folder.
        key: what the user gave it as, for messages.
        without: folders that are not looked into, as that of results.
        trim: what is looked at of a folder's files, and what to say of the others.

    Raises:
        ValueError: nothing there, or no CT.
    """
    if not source.exists():
        raise ValueError(f"{key}={source} does not exist")
    if not source.is_dir():
        if ct.is_volume(source):
            return Listed([ScanFile(ct.bare_name(source), source)], [], [])
        if dicom.is_dicom(source):
            return Listed([_series_of(source.absolute(), key)], [], [])
        raise ValueError(f"{key}={source}: not a supported format ({', '.join(ct.SUFFIXES)}, DICOM): convert it")
    folder = source.resolve()
    tree, others = trim(walk(folder, without=[path.resolve() for path in without]).by_roles())
    inventory = find_by_folders(folder, tree, {})
    inventory.left_out.extend([*unused(tree, inventory), *others])
    refuse_empty(inventory, f"{key}={source}")
    scans = [ScanFile(one.scan_id, Path(one.image), tuple(one.slices)) for one in with_ids(inventory)]
    return Listed(scans, sorted(inventory.faults), sorted(inventory.left_out))


def _series_of(path: Path, key: str) -> ScanFile:
    """The series that a DICOM file belongs to."""
    objects = dicom.find(path.parent)
    for one in objects.series:
        if str(path) in one.paths():
            if doubt := objects.doubt(one):
                raise ValueError(doubt)
            return ScanFile(path.parent.name, Path(one.folder), tuple(one.slices))
    why = dict((*objects.left_out, *objects.unreadable)).get(str(path), "no slice of a CT series")
    raise ValueError(f"{key}={path}: {why.removeprefix(f'{path}: ')}")


def one_scan(source: Path, key: str, without: Iterable[Path] = ()) -> ScanFile:
    """The one CT at a path, apart from what lies in the folders `without`.

    Raises:
        ValueError: as `scan_files`; several of them, or one that cannot be used.
    """
    scans, faults, _ = scan_files(source, key, without)
    if len(scans) == 1:
        return scans[0]
    if not scans:
        raise ValueError(f"{key}={source}: {faults[0].source}: {faults[0].reason}")
    names = ", ".join(scan.scan_id for scan in scans[:3]) + (", ..." if len(scans) > 3 else "")
    raise ValueError(f"{key}={source} holds {len(scans)} scans ({names}): name one of them")
