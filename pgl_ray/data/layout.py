"""What lies in a source folder: scans, their label maps, splits, and the meaning of the label values.

    nnU-Net, MSD   imagesTr/ (split "train"), imagesTs/ ("test"), labelsTr/, labelsTs/, dataset.json
    plain          images/ or volumes anywhere below the folder, labels/; split "train" where there is labels/
    data sets      folders of the kinds above below the folder: their volumes without labels, whose values mean
                   something else in each of them; prepare them one by one to keep labels
A label map has its volume's path below their folders, or its name. A table may say otherwise about splits.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.config import LabelsConfig
from pgl_ray.data import ct

CHANNEL = "_0000"  # nnU-Net's suffix of the first, and in CT only, channel


@dataclass(frozen=True)
class Source:
    """One scan to convert.

    Attributes:
        scan_id: the file's name without suffix; with its folders, joined by "__", where the name occurs twice.
        image, label: absolute paths.
        split: "" where nothing is said.
        labelled: annotated label values; None = all that have a name.
    """

    scan_id: str
    image: str
    label: str | None
    split: str
    labelled: tuple[int, ...] | None = None

    def files(self) -> list[Path]:
        """All files that the scan is made from."""
        return [file for path in (self.image, self.label) if path for file in ct.files_of(Path(path))]

    def stamp(self) -> tuple[int, int]:
        """Bytes of all files, and the newest one's time in ns."""
        stats = [file.stat() for file in self.files()]
        return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)

    def digest(self) -> str:
        """sha256 of the file's bytes; of several files, that of their hashes."""
        digests = []
        for file in self.files():
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class Fault(NamedTuple):
    """A file that cannot be used, and why."""

    source: str
    reason: str


class Layout(NamedTuple):
    """A source folder's scans sorted by scan_id, organ name -> value (may be empty), unusable files, and folders of
    label maps that are left out."""

    scans: list[Source]
    names: dict[str, int]
    faults: list[Fault]
    left_out: list[str]


def read_layout(source: str, labels: LabelsConfig) -> Layout:
    """Finds the scans of a source folder.

    Raises:
        ValueError: no such folder, no volume in it, two files of one name, or a table or dataset.json that cannot be
            used.
    """
    root = Path(source).resolve()
    if not root.is_dir():
        raise ValueError(f"source={source}: no such folder")
    found, faults = {}, []
    folders, left_out, inner = _folders(root), [], []
    if not folders:
        nested = [one for below in _data_sets(root) for one in _folders(below)]
        left_out = [str(label_folder) for _, label_folder, _ in nested if label_folder.is_dir()]
        inner = [folder for images, label_folder, _ in nested for folder in (images, label_folder)]
        folders = [(images, None, "") for images, _, _ in nested]
        folders.append((root, root / "labels", "train" if (root / "labels").is_dir() else ""))
    for images, label_folder, split in folders:
        without = [label_folder] if label_folder else []
        volumes = _volumes(images, [*without, *(inner if images == root else [])])
        maps = _volumes(label_folder) if label_folder else {}
        counts = Counter(parts[-1] for parts in volumes)
        for parts, path in volumes.items():
            if not path.is_file():
                faults.append(Fault(str(path), "a link to a file that is not there"))
                continue
            label = maps.pop(parts, None) or (maps.pop(parts[-1:], None) if counts[parts[-1]] == 1 else None)
            found["__".join(images.relative_to(root).parts), *parts] = Source(
                "", str(path), label and str(label), split
            )
        faults += [Fault(str(path), "label map without a volume of its name") for path in maps.values()]
    if not found and not faults:
        raise ValueError(f"source={source}: no volume in it ({', '.join(ct.SUFFIXES)})")
    names = labels.names or _dataset_names(root / "dataset.json")
    if len(set(names.values())) < len(names):
        raise ValueError(f"labels.names={names}: two organs have one value")
    scans = _with_ids(found)
    if labels.table:
        scans, untold = _with_table(scans, root / labels.table, names)
        faults += untold
    return Layout(sorted(scans, key=lambda scan: scan.scan_id), names, sorted(faults), left_out)


def _folders(root: Path) -> list[tuple[Path, Path, str]]:
    """(images, labels, split) where the folder is one data set, else none; the folders need not exist."""
    if (root / "imagesTr").is_dir() or (root / "imagesTs").is_dir():
        return [(root / "imagesTr", root / "labelsTr", "train"), (root / "imagesTs", root / "labelsTs", "test")]
    if (root / "images").is_dir():
        return [(root / "images", root / "labels", "train" if (root / "labels").is_dir() else "")]
    return []


def _data_sets(root: Path) -> list[Path]:
    """Folders below the root that are data sets of their own."""
    return sorted(
        {path.parent for name in ("images", "imagesTr", "imagesTs") for path in root.rglob(name) if path.is_dir()}
    )


def _volumes(folder: Path, without: Sequence[Path] = ()) -> dict[tuple[str, ...], Path]:
    """Volumes below a folder by their path in it, the last part without suffix and nnU-Net's channel."""
    volumes: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)  # macOS writes "._name" beside name
        if hidden or not ct.is_volume(path) or path.is_dir() or any(path.is_relative_to(other) for other in without):
            continue
        parts = (*below.parts[:-1], ct.bare_name(path))
        if parts in volumes:
            raise ValueError(f"{volumes[parts]} and {path} are of one name: keep one of them")
        volumes[parts] = path
    if folder.name in ("imagesTr", "imagesTs") and all(parts[-1].endswith(CHANNEL) for parts in volumes):
        return {(*parts[:-1], parts[-1].removesuffix(CHANNEL)): path for parts, path in volumes.items()}
    return volumes


def _with_ids(found: dict[tuple[str, ...], Source]) -> list[Source]:
    """Names the scans: (image folder, *path in it) -> name, or the joined path where a name occurs twice."""
    counts = Counter(parts[-1] for parts in found)
    several = len({parts[0] for parts in found}) > 1
    ids = {
        p: p[-1] if counts[p[-1]] == 1 else "__".join(part for part in (p if several else p[1:]) if part) for p in found
    }
    return [replace(source, scan_id=ids[parts]) for parts, source in found.items()]


def _dataset_names(path: Path) -> dict[str, int]:
    """Organ names of a dataset.json: nnU-Net's {"liver": 1} or MSD's {"1": "liver"}; empty without the file."""
    if not path.is_file():
        return {}
    try:
        stated = dict(json.loads(path.read_text())["labels"])
        if all(str(key).isdecimal() for key in stated):
            stated = {name: value for value, name in stated.items()}
        names = {str(name): int(value) for name, value in stated.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no label map name -> value in it ({error!r}): give labels.names={{organ: 1}}"
        ) from None
    return {name: value for name, value in names.items() if value}


def _with_table(scans: list[Source], path: Path, names: dict[str, int]) -> tuple[list[Source], list[Fault]]:
    """Splits and labelled organs from a table; labelled scans that it does not know cannot be used."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = {next(iter(row.values())): row for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels.table={path}: cannot be read ({error})") from None
    columns = reader.fieldnames or []
    told, untold = [], []
    for scan in scans:
        row = rows.get(scan.scan_id)
        if row is None and scan.label and "labelled_organs" in columns:
            untold.append(Fault(scan.image, f"has a label map but no row {scan.scan_id!r} in {path.name}"))
            continue
        if "split" in columns:
            scan = replace(scan, split=(row and row["split"]) or "")
        if row and "labelled_organs" in columns:
            organs = (row["labelled_organs"] or "").split()
            unknown = [organ for organ in organs if organ not in names]
            if unknown:
                raise ValueError(f"labels.table={path}: {scan.scan_id}: organ {unknown[0]!r} is none of {list(names)}")
            scan = replace(scan, labelled=tuple(sorted(names[organ] for organ in organs)))
        told.append(scan)
    return told, untold
