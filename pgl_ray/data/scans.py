"""Scans to be read one after the other, whether they lie in a store or as files: an id, a stamp, and the voxels."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgl_ray.data import ct, dicom, itk
from pgl_ray.data.layout import series_names
from pgl_ray.data.store import Index, ScanRecord, open_volume


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
        return self.record.scan_id

    @property
    def source(self) -> str:
        """What it was made from."""
        return self.record.source

    def stamp(self) -> str:
        """Changes where voxels or geometry do."""
        said = [self.record.content_hash, self.record.affine, self.record.spacing_mm]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def num_voxels(self) -> int:
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
        return str(self.path)

    def stamp(self) -> str:
        """Changes where a file's name, size or time does."""
        found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _files(self) -> list[Path]:
        return [self.path / name for name in self.slices] if self.path.is_dir() else itk.files_of(self.path)

    def num_voxels(self) -> int:
        return ct.num_voxels(self.path, self.slices)

    def size(self) -> int:
        """What grows with the scan, roughly: bytes of its files, 0 where they are gone."""
        return sum(file.stat().st_size for file in self._files() if file.exists())

    def read(self) -> ct.Scan:
        """The scan in the stored orientation; errors as of `ct.read_scan`."""
        return ct.read_scan(self.path, self.slices)


def stored_scans(index: Index) -> list[StoredScan]:
    """All scans of a store, by scan_id."""
    return [StoredScan(index.store, record) for record in index.scans]


def scan_files(source: Path, key: str = "input") -> list[ScanFile]:
    """A CT file, or the CTs at the top level of a folder and the DICOM series below it.

    Args:
        source: file or folder.
        key: what the user gave it as, for messages.

    Raises:
        ValueError: nothing there, no CT, or two of one name.
    """
    if not source.exists():
        raise ValueError(f"{key}={source} does not exist")
    if not source.is_dir():
        if not ct.is_volume(source):
            raise ValueError(f"{key}={source}: not a supported format ({', '.join(ct.SUFFIXES)}): convert it")
        return [ScanFile(ct.bare_name(source), source)]
    files = [
        ScanFile(ct.bare_name(path), path)
        for path in sorted(source.iterdir())
        if ct.is_volume(path) and not path.is_dir()
    ]
    found = dicom.find(source).series
    files += [
        ScanFile(name, Path(one.folder), tuple(one.slices)) for one, name in zip(found, series_names(found, source))
    ]
    if not files:
        suffixes = ", ".join(ct.SUFFIXES)
        raise ValueError(f"{key}={source} holds no CT ({suffixes}) at its top level, nor DICOM below")
    twice = [name for name, count in Counter(one.scan_id for one in files).items() if count > 1]
    if twice:
        raise ValueError(f"{key}={source} holds several scans named {', '.join(twice)}: rename all but one of each")
    return files


def one_scan(source: Path, key: str) -> ScanFile:
    """The one CT at a path.

    Raises:
        ValueError: as `scan_files`; several of them.
    """
    found = scan_files(source, key)
    if len(found) > 1:
        names = ", ".join(one.scan_id for one in found[:3]) + (", ..." if len(found) > 3 else "")
        raise ValueError(f"{key}={source} holds {len(found)} scans ({names}): name one of them")
    return found[0]
