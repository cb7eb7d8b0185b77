"""What lies in a source folder: scans, their label maps, splits, and the meaning of the label values.

    nnU-Net, MSD   imagesTr/ (split "train"), imagesVa/ ("validation"), imagesTs/ ("test"), labelsTr/ ..., dataset.json
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
from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.config import LabelsConfig, RecipeConfig
from pgl_ray.files import ct, dicom, dicom_masks, identity, stated, structures
from pgl_ray.files.accounts import one_of, unused
from pgl_ray.files.dicom_headers import Kept
from pgl_ray.files.recipe import draw_split, find_scans
from pgl_ray.files.source import Fault, Found, Source, volume_files
from pgl_ray.files.splits import with_table
from pgl_ray.files.stated import CHANNEL
from pgl_ray.files.walk import LOST, Tree, walk

NNUNET = ("imagesTr", "imagesVa", "imagesTs")
LABEL_FOLDERS = ("labels", "labelsTr", "labelsVa", "labelsTs")


class Layout(NamedTuple):
    """What a source folder holds.

    Attributes:
        scans: sorted by scan_id.
        names: organ name -> label value; may be empty.
        faults: files that should be used and cannot be.
        left_out: files and folders that are none of prepare's business, such as localisers.
        missing: what the data set has and the folder has not, in words.
        label_folders: folders whose name says that labels lie in them.
    """

    scans: list[Source]
    names: dict[str, int]
    faults: list[Fault]
    left_out: list[Fault]
    missing: list[str]
    label_folders: list[str]


def read_layout(
    source: str,
    labels: LabelsConfig,
    recipe: RecipeConfig | None = None,
    series: tuple[str, ...] = (),
    kept: Kept | None = None,
    known: Collection[str] = (),
) -> Layout:
    """Finds the scans of a source folder.

    Args:
        series: UIDs or descriptions of the DICOM series to take; none: all.
        kept: headers of DICOM files that are known already.
        known: files and folders that the store's scans were made from; of copies, these stay.

    Raises:
        ValueError: no such folder, no volume in it, or a table, dataset.json or series that cannot be used.
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
    tree = walk(root)
    if recipe.parts:
        found = find_scans(root, tree, recipe, names)
    else:
        found = find_by_folders(root, tree, names, series, kept, known)
        refuse_empty(found, f"source={root}")
        there = {name: {ct.bare_name(path) for path in volume_files(tree, root / name)} for name in NNUNET}
        if any(there.values()):
            found.missing.extend(stated.absent(root / "dataset.json", there))
    scans, faults = [replace(scan, ignored=ignored) for scan in with_ids(found)], found.faults
    if recipe.split_sizes:
        scans = draw_split(scans, recipe)
    if labels.table:
        scans, untold, said = with_table(scans, root / labels.table, names)
        faults += untold
        found.left_out.extend(said)
    scans.sort(key=lambda scan: scan.scan_id)
    found.seen.update((str(root / "dataset.json"), str(root / (labels.table or "dataset.json"))))
    left_out = [*found.left_out, *unused(tree, found)]
    folders = [str(root / name) for name in LABEL_FOLDERS if str(root / name) in tree.folders]
    return Layout(scans, names, sorted(faults), sorted(left_out), found.missing, folders)


# -- layouts that are known -------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Images and their label maps: their folders, the split, and the parts of the scans' ids before their own."""

    images: Path
    labels: Path | None
    split: str
    above: tuple[str, ...] = ()


def find_by_folders(
    root: Path,
    tree: Tree,
    names: dict[str, int],
    series: tuple[str, ...] = (),
    kept: Kept | None = None,
    known: Collection[str] = (),
) -> Found:
    """Finds the scans of a folder that no recipe describes; arguments as of read_layout.

    Raises:
        ValueError: a series that is not there.
    """
    objects = dicom.find(root, tree, kept, known)
    found, parts = Found({}, [], [], [], set()), _parts(root, tree, objects)
    found.faults.extend(Fault(path, reason) for path, reason in (*tree.faults, *objects.unreadable))
    found.left_out.extend(Fault(path, reason) for path, reason in (*tree.left_out, *objects.left_out))
    inner = [folder for part in parts for folder in (part.images, part.labels) if folder and part.images != root]
    chosen, assigned = _chosen(objects.series, series, root), structures.assign(objects.contours, objects.series, names)
    found.faults.extend(Fault(path, reason) for path, reason in assigned.faults)
    found.left_out.extend(Fault(path, reason) for path, reason in assigned.left_out)
    places, asked = {id(one): k for k, one in enumerate(objects.series)}, set(map(id, chosen))
    for part in parts:
        without = [*([part.labels] if part.labels else []), *(inner if part.images == root else [])]
        if part.labels and part.above and len(parts) > 1 and not _is_known(root, part.images):
            reason = "labels of one of several data sets, whose values differ: prepare it alone to keep them"
            found.left_out.extend(Fault(path, reason) for path in tree.below(part.labels))
            part = part._replace(labels=None, split="")
        maps = _label_maps(tree, part.labels, known, found) if part.labels else {}
        masks = _masks(part.labels, maps, found) if part.labels else {}
        volumes = _without_channels(part.images, _volumes(tree, part.images, without, known, found), maps, found)
        counts = Counter(place[-1] for place in volumes)
        for place, path in volumes.items():
            label = _label_of(maps, place, counts[place[-1]] == 1)
            found.scans[(*part.above, *place)] = Source(
                "", str(path), label and str(label), part.split, label_slices=masks.get(label, ())
            )
        here = [one for one in chosen if _below(Path(one.folder), part.images, without)]
        alone = Counter(one.folder for one in here)
        for one in here:
            place = Path(one.folder).relative_to(part.images).parts
            label = _label_of(maps, (*place, one.id_part), False)
            if not label and alone[one.folder] == 1:
                label = _label_of(maps, place or (part.images.name,), True)
            found.seen.update(one.paths())
            if doubt := objects.doubt(one):
                found.faults.append(Fault(one.folder, doubt))
                continue
            notes = tuple((one.folder, note) for note in one.notes)
            masked = masks.get(label, ())
            scan = Source(
                "", one.folder, label and str(label), part.split, slices=one.slices, label_slices=masked, notes=notes
            )
            sets = assigned.sets.get(places[id(one)], [])
            _add(found, (*part.above, *place, one.id_part), scan, sets, assigned.notes, names)
        found.faults.extend(Fault(str(path), "label map without a volume of its name") for path in maps.values())
    labels = {scan.label for scan in found.scans.values() if scan.label_slices}
    found.left_out[:] = [fault for fault in found.left_out if str(Path(fault.source).parent) not in labels]
    found.seen.update(path for one in found.scans.values() for path in one.paths())
    told = found.seen | {fault.source for fault in (*found.left_out, *found.faults)}
    for part in parts:
        reason = "in labels/, but no label map (NIfTI, NRRD, MHA, DICOM)"
        others = [path for path in (tree.below(part.labels) if part.labels else ()) if path not in told]
        found.left_out.extend(Fault(path, reason) for path in others if not ct.is_volume(Path(path)))
    told.update(fault.source for fault in found.left_out)
    for one in objects.contours:
        if one.path not in told:
            found.left_out.append(Fault(one.path, "structures of a series that is not used"))
    for one in objects.series:
        reason = _beside(parts) if id(one) in asked else "of a series that was not asked for"
        found.left_out.extend(Fault(path, reason) for path in one.paths() if path not in told)
    told.update(fault.source for fault in found.left_out)
    found.left_out.extend(
        Fault(str(path), _beside(parts)) for path in volume_files(tree, root) if str(path) not in told
    )
    return found


def refuse_empty(found: Found, given: str) -> None:
    """Refuses a folder without anything to use.

    Raises:
        ValueError: there is neither a scan nor a file that should be one.
    """
    if not found.scans and not found.faults:
        others = "; ".join(f"{path}: {reason}" for path, reason in sorted(found.left_out)[:5])
        found_too = f"; found {others}" if others else ""
        raise ValueError(f"{given}: no volume in it ({', '.join(ct.SUFFIXES)}, DICOM){found_too}")


def _beside(parts: list[Part]) -> str:
    names = " and ".join(part.images.name + "/" for part in parts)
    return f"beside {names}, where the data set lies: prepare its folder by itself"


def _label_of(maps: dict[tuple[str, ...], Path], place: tuple[str, ...], by_name: bool) -> Path | None:
    """Takes a scan's label map: of its path, of its id, or of its bare name."""
    channel = (*place[:-1], place[-1].removesuffix(CHANNEL))
    for key in (place, (identity.scan_id(place),), *((place[-1:],) if by_name else ()), channel):
        if key in maps:
            return maps.pop(key)
    return None


def with_ids(found: Found) -> list[Source]:
    """Names the scans that have no name yet, by the parts of their ids; two of one id cannot be used."""
    named: dict[str, Source] = {}
    for parts, scan in found.scans.items():
        scan = scan if scan.scan_id else replace(scan, scan_id=identity.scan_id(parts))
        other = named.setdefault(scan.scan_id, scan)
        if other is not scan:
            found.faults.append(Fault(scan.image, f"its id is {scan.scan_id!r}, as that of {other.image}: rename one"))
    return list(named.values())


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


def _parts(root: Path, tree: Tree, objects: dicom.Found) -> list[Part]:
    """The folders of images and labels. Folders called so without a scan in them, as a viewer's, are none."""
    scans = [str(path) for path in volume_files(tree, root)] + [path for one in objects.series for path in one.paths()]
    holding: set[str] = set()
    for path in scans:
        while (path := path.rpartition("/")[0]) not in holding and len(path) >= len(str(root)):
            holding.add(path)
    if known := _known_parts(root, tree, holding):
        return known
    above = {Path(path).parent for path in holding if path.rpartition("/")[2] in ("images", "imagesTr", "imagesTs")}
    nested = [part for folder in sorted(above) for part in _known_parts(folder, tree, holding)]
    inner = [part._replace(above=part.images.relative_to(root).parts) for part in nested]
    labelled = str(root / "labels") in tree.folders
    return [*inner, Part(root, root / "labels", "train" if labelled else "")]


def _known_parts(root: Path, tree: Tree, holding: set[str]) -> list[Part]:
    """The parts of a folder that is one data set, else none. Scans for training, and those of images/, are called by
    their path in the folder of images, others also by that folder's name."""
    found = []
    for suffix, split in (("Tr", "train"), ("Va", "validation"), ("Ts", "test")):
        images, labels = root / f"images{suffix}", root / f"labels{suffix}"
        if suffix == "Va" and str(labels) not in tree.folders:
            split = ""
        if str(images) in holding:
            found.append(Part(images, labels, split, () if suffix == "Tr" else (images.name,)))
    if not found and str(root / "images") in holding:
        split = "train" if str(root / "labels") in tree.folders else ""
        found.append(Part(root / "images", root / "labels", split))
    return found


def _is_known(root: Path, images: Path) -> bool:
    return images == root or images.parent == root


def _below(path: Path, folder: Path, without: Sequence[Path]) -> bool:
    return path.is_relative_to(folder) and not any(path.is_relative_to(other) for other in without)


def _volumes(
    tree: Tree, folder: Path, without: Sequence[Path], known: Collection[str], found: Found
) -> dict[tuple[str, ...], Path]:
    """Volumes below a folder by their path in it, the last part without suffix; of files of one name the one that
    counts, where they hold the same."""
    volumes: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in volume_files(tree, folder, without):
        if tree.files[str(path)] == LOST:
            found.faults.append(Fault(str(path), "a link to a file that is not there"))
            continue
        parts = (*path.relative_to(folder).parts[:-1], ct.bare_name(path))
        volumes[tuple(map(identity.plain, parts))].append(path)
    return {parts: path for parts, paths in volumes.items() if (path := one_of(paths, known, found))}


def _without_channels(
    images: Path, volumes: dict[tuple[str, ...], Path], maps: dict[tuple[str, ...], Path], found: Found
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
    for bare, channels in numbers.items():
        if CHANNEL[1:] not in channels:
            continue
        if len(channels) > 1 and (bare in maps or alike):
            first, other = sorted(channels.values())[:2]
            raise ValueError(
                f"{first} and {other.name} are channels of one scan (nnU-Net's), expected CT alone: keep one"
            )
        if len(channels) == 1 and images.name in NNUNET:
            path = short.pop((*bare[:-1], f"{bare[-1]}{CHANNEL}"))
            if bare in short:
                found.faults.append(Fault(str(path), f"of one name with {short[bare]}: rename one"))
            else:
                short[bare] = path
    return short


def _label_maps(tree: Tree, folder: Path, known: Collection[str], found: Found) -> dict[tuple[str, ...], Path]:
    """Label maps by their path in a folder; of 3D Slicer's segmentations without ".seg"."""
    maps = _volumes(tree, folder, (), known, found)
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
        scan = replace(scan, label=paths[0], structures=paths, split=split, notes=(*scan.notes, *notes))
    found.scans[key] = scan
