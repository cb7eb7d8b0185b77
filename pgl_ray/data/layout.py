"""What lies in a source folder: scans, their label maps, splits, and the meaning of the label values.

    nnU-Net, MSD   imagesTr/ (split "train"), imagesTs/ ("test"), labelsTr/, labelsTs/, dataset.json
    plain          images/ or volumes anywhere below the folder, labels/; split "train" where there is labels/
    data sets      folders of the kinds above below the folder: their volumes without labels, whose values mean
                   something else in each of them; prepare them one by one to keep labels
    recipe         patterns of a public data set (data_prep/*.yaml)
A volume is a file, or the slices of a DICOM series. A label map has its volume's path below their folders, or its name;
structure sets (RTSTRUCT, SEG) belong to the series that they name, and a folder of DICOM slices in labels/ is a label
map, too. A table may say otherwise about splits.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.config import LabelsConfig, RecipeConfig
from pgl_ray.data import ct, dicom, dicom_masks, stated, structures
from pgl_ray.data.recipe import draw_split, find_scans
from pgl_ray.data.source import Fault, Found, Source, volume_files
from pgl_ray.data.splits import with_table
from pgl_ray.data.stated import CHANNEL

NNUNET = ("imagesTr", "imagesTs")


class Layout(NamedTuple):
    """What a source folder holds.

    Attributes:
        scans: sorted by scan_id.
        names: organ name -> label value; may be empty.
        faults: files that should be used and cannot be.
        left_out: files and folders that are none of prepare's business, such as localisers.
        missing: what the data set has and the folder has not, in words.
    """

    scans: list[Source]
    names: dict[str, int]
    faults: list[Fault]
    left_out: list[Fault]
    missing: list[str]


def read_layout(
    source: str, labels: LabelsConfig, recipe: RecipeConfig | None = None, series: tuple[str, ...] = ()
) -> Layout:
    """Finds the scans of a source folder.

    Args:
        series: UIDs or descriptions of the DICOM series to take; none: all.

    Raises:
        ValueError: no such folder, no volume in it, two files of one name, or a table, dataset.json or series that
            cannot be used.
    """
    root, recipe = Path(source).resolve(), recipe or RecipeConfig()
    if not root.is_dir():
        raise ValueError(f"source={source}: no such folder")
    if series and recipe.parts:
        raise ValueError(f"series={list(series)}: a recipe says where its scans lie: leave series out")
    stated_names, ignored = ({}, None) if recipe.parts or labels.names else stated.organs(root / "dataset.json")
    names = labels.names or stated_names
    if len(set(names.values())) < len(names):
        raise ValueError(f"labels.names={names}: two organs have one value")
    found = find_scans(root, recipe, names) if recipe.parts else _by_folders(root, names, series)
    scans, faults = [replace(scan, ignored=ignored) for scan in _with_ids(found.scans)], found.faults
    if recipe.split_sizes:
        scans = draw_split(scans, recipe)
    if labels.table:
        scans, untold, said = with_table(scans, root / labels.table, names)
        faults += untold
        found.left_out.extend(said)
    scans.sort(key=lambda scan: scan.scan_id)
    return Layout(scans, names, sorted(faults), sorted(found.left_out), found.missing)


# -- layouts that are known -------------------------------------------------------------------------------------------


def _by_folders(root: Path, names: dict[str, int], series: tuple[str, ...]) -> Found:
    found = Found({}, [], [], [])
    folders, inner = _folders(root), []
    if not folders:
        nested = [one for below in _data_sets(root) for one in _folders(below)]
        reason = "labels of one of several data sets, whose values differ: prepare it alone to keep them"
        found.left_out.extend(Fault(str(labels), reason) for _, labels, _ in nested if labels.is_dir())
        inner = [folder for images, label_folder, _ in nested for folder in (images, label_folder)]
        folders = [(images, None, "") for images, _, _ in nested]
        folders.append((root, root / "labels", "train" if (root / "labels").is_dir() else ""))
    else:
        there = {name: {parts[-1] for parts in _volumes(root / name)} for name in NNUNET}
        found.missing.extend(stated.absent(root / "dataset.json", there))
    objects = dicom.find(root)
    found.faults.extend(Fault(path, reason) for path, reason in objects.unreadable)
    found.left_out.extend(Fault(path, reason) for path, reason in objects.left_out)
    chosen, assigned = _chosen(objects.series, series, root), structures.assign(objects.contours, objects.series, names)
    found.faults.extend(Fault(path, reason) for path, reason in assigned.faults)
    found.left_out.extend(Fault(path, reason) for path, reason in assigned.left_out)
    for images, label_folder, split in folders:
        without = [*([label_folder] if label_folder else []), *(inner if images == root else [])]
        volumes = _volumes(images, without)
        maps = _label_maps(label_folder) if label_folder else {}
        masks = _masks(label_folder, maps, found) if label_folder else {}
        volumes = _without_channels(images, volumes, maps)
        counts = Counter(parts[-1] for parts in volumes)
        key = "__".join(images.relative_to(root).parts)
        for parts, path in volumes.items():
            if not path.is_file():
                found.faults.append(Fault(str(path), "a link to a file that is not there"))
                continue
            label = maps.pop(parts, None) or (maps.pop(parts[-1:], None) if counts[parts[-1]] == 1 else None)
            label = label or maps.pop((*parts[:-1], parts[-1].removesuffix(CHANNEL)), None)
            found.scans[key, *parts] = Source(
                "", str(path), label and str(label), split, label_slices=masks.get(label, ())
            )
        here = [one for one in chosen if _below(Path(one.folder), images, without)]
        for one, name in zip(here, series_names(here, images)):
            label = maps.pop(Path(one.folder).relative_to(images).parts, None) or maps.pop((name,), None)
            if doubt := objects.doubt(one):
                found.faults.append(Fault(one.folder, doubt))
                continue
            slices = masks.get(label, ())
            scan = Source("", one.folder, label and str(label), split, slices=one.slices, label_slices=slices)
            _add(found, (key, name), scan, assigned.sets.get(objects.series.index(one), []), assigned.notes, names)
        found.faults.extend(Fault(str(path), "label map without a volume of its name") for path in maps.values())
    labels = {scan.label for scan in found.scans.values() if scan.label_slices}
    found.left_out[:] = [fault for fault in found.left_out if str(Path(fault.source).parent) not in labels]
    used = {path for scan in found.scans.values() for path in scan.structures}
    used |= {fault.source for fault in (*found.left_out, *found.faults)}
    for one in objects.contours:
        if one.path not in used:
            found.left_out.append(Fault(one.path, "structures of a series that is not used"))
    if not found.scans and not found.faults:
        others = "; ".join(f"{path}: {reason}" for path, reason in found.left_out[:5])
        found_too = f"; found {others}" if others else ""
        raise ValueError(f"source={root}: no volume in it ({', '.join(ct.SUFFIXES)}, DICOM){found_too}")
    return found


def _masks(label_folder: Path, maps: dict[tuple[str, ...], Path], found: Found) -> dict[Path | None, tuple[str, ...]]:
    """Adds the DICOM label maps below a folder of labels to its label maps; their slices by their folders."""
    masks, faults = dicom_masks.find(label_folder)
    found.faults.extend(Fault(*fault) for fault in faults)
    for parts, mask in masks.items():
        if parts in maps:
            found.faults.append(Fault(str(mask.folder), f"a label map beside {maps[parts].name}: keep one of them"))
        else:
            maps[parts] = mask.folder
    return {mask.folder: mask.slices for mask in masks.values()}


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


def _below(path: Path, folder: Path, without: Sequence[Path]) -> bool:
    return path.is_relative_to(folder) and not any(path.is_relative_to(other) for other in without)


def _volumes(folder: Path, without: Sequence[Path] = ()) -> dict[tuple[str, ...], Path]:
    """Volumes below a folder by their path in it, the last part without suffix.

    Raises:
        ValueError: two files of one name.
    """
    volumes: dict[tuple[str, ...], Path] = {}
    for path in volume_files(folder):
        if not _below(path, folder, without):
            continue
        parts = (*path.relative_to(folder).parts[:-1], ct.bare_name(path))
        if parts in volumes:
            raise ValueError(f"{volumes[parts]} and {path} are of one name: keep one of them")
        volumes[parts] = path
    return volumes


def _without_channels(
    images: Path, volumes: dict[tuple[str, ...], Path], maps: Container[tuple[str, ...]]
) -> dict[tuple[str, ...], Path]:
    """Volumes in nnU-Net's folders without its suffix of the channel. Case numbers, as in MSD, look like it: they are
    those that a label map has too, or that follow one name alone.

    Raises:
        ValueError: a scan of several channels.
    """
    numbers: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    for parts, path in volumes.items():
        match = re.fullmatch(r"(.+)_(\d{4})", parts[-1])
        if match and parts not in maps:
            numbers[*parts[:-1], match[1]][match[2]] = path
    alike = len(numbers) > 1 and len({tuple(sorted(found)) for found in numbers.values()}) == 1
    short = dict(volumes)
    for bare, found in numbers.items():
        if CHANNEL[1:] not in found:
            continue
        if len(found) > 1 and (bare in maps or alike):
            first, other = sorted(found.values())[:2]
            raise ValueError(
                f"{first} and {other.name} are channels of one scan (nnU-Net's), expected CT alone: keep one"
            )
        if len(found) == 1 and images.name in NNUNET and bare not in volumes:
            short[bare] = short.pop((*bare[:-1], f"{bare[-1]}{CHANNEL}"))
    return short


def _label_maps(folder: Path) -> dict[tuple[str, ...], Path]:
    """Label maps by their path in a folder; of 3D Slicer's segmentations also without ".seg"."""
    maps = _volumes(folder)
    return {_short(parts, ".seg", maps): path for parts, path in maps.items()}


def _short(parts: tuple[str, ...], end: str, others: Container[tuple[str, ...]]) -> tuple[str, ...]:
    """A name without its end, unless another file has that name."""
    short = (*parts[:-1], parts[-1].removesuffix(end))
    return parts if short in others else short


def _chosen(found: list[dicom.Series], wanted: tuple[str, ...], root: Path) -> list[dicom.Series]:
    """The series that the user names.

    Raises:
        ValueError: a name that no series has.
    """
    for name in wanted:
        if not any(name in (one.uid, one.description) for one in found):
            known = ", ".join(sorted({repr(one.description or one.uid) for one in found})) or "no CT series"
            raise ValueError(f"series={name!r}: none of that UID or description in {root}; there: {known}")
    return [one for one in found if not wanted or one.uid in wanted or one.description in wanted]


def series_names(found: list[dicom.Series], images: Path) -> list[str]:
    """The folder's path, with the series' number, and if need be the end of its UID, where it holds several."""
    names = ["__".join(Path(one.folder).relative_to(images).parts) or images.name for one in found]
    for extend in (lambda one: f"series{one.number}", lambda one: one.uid[-12:]):
        counts = Counter(names)
        names = [f"{name}__{extend(one)}" if counts[name] > 1 else name for name, one in zip(names, found)]
    return names


def _add(
    found: Found, key: tuple[str, ...], scan: Source, sets: list[dicom.Contours], said: dict[str, str], names: dict
) -> None:
    """Adds a DICOM scan with the structure sets that label it.

    Args:
        sets: that belong to its series and have structures which are asked for, drawn or not.
        said: path of a set -> what to say of its use.
        names: organ name -> label value.
    """
    asked = {structures.key_of(name) for name in names}
    drawn = [one for one in sets if asked & {structures.key_of(organ) for organ in one.organs}]
    clash = structures.conflict(drawn, names)
    if clash or (scan.label and drawn):
        paths = ", ".join(filter(None, [scan.label, *(one.path for one in drawn)]))
        what = f" of {clash!r}" if clash else ""
        found.faults.append(Fault(scan.image, f"has several labels{what} ({paths}): keep one of them"))
        return
    if scan.label:
        found.left_out.extend(Fault(one.path, "draws nothing of what is asked for") for one in sets)
    elif sets:
        paths, notes = (
            tuple(one.path for one in sets),
            tuple((one.path, said[one.path]) for one in sets if one.path in said),
        )
        split = scan.split or ("train" if drawn else "")
        scan = replace(scan, label=paths[0], structures=paths, split=split, notes=notes)
    found.scans[key] = scan


def _with_ids(found: dict[tuple[str, ...], Source]) -> list[Source]:
    """Names the scans: (image folder, *path in it) -> name, or the joined path where a name occurs twice."""
    counts = Counter(parts[-1] for parts in found)
    several = len({parts[0] for parts in found}) > 1
    ids = {
        p: p[-1] if counts[p[-1]] == 1 else "__".join(part for part in (p if several else p[1:]) if part) for p in found
    }
    return [replace(source, scan_id=ids[parts]) for parts, source in found.items()]
