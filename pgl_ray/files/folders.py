"""The scans of a folder that no recipe describes, each with its label map, and a reason for all that is left out."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.files import ct, dicom, dicom_masks, identity, structures
from pgl_ray.files.accounts import one_of
from pgl_ray.files.header_cache import HeaderCache
from pgl_ray.files.source import Fault, Inventory, Source, volume_files
from pgl_ray.files.stated import CHANNEL
from pgl_ray.files.walk import LOST, NNUNET, Tree


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
    cache: HeaderCache | None = None,
    known: Collection[str] = (),
    asked: bool = True,
) -> Inventory:
    """Finds the scans of a folder that no recipe describes; arguments as of read_layout.

    Args:
        asked: whether the names are the source's own or the user's: then structures of these names must be usable.
            Where they are but the store's, a scan whose structures cannot be used is taken without a label (what the
            store has of it with a label stays: `what_to_do`).

    Raises:
        ValueError: a series that is not there.
    """
    objects = dicom.find(root, tree, cache, known)
    inventory, parts = Inventory({}, [], [], [], set()), _parts(root, tree, objects)
    chosen, assigned = _chosen(objects.series, series, root), structures.assign(objects.contours, objects.series, names)
    faults = (*tree.faults, *objects.unreadable, *(assigned.faults if asked else ()))
    inventory.faults.extend(Fault(path, reason) for path, reason in faults)
    left_out = (*tree.left_out, *objects.left_out, *assigned.left_out, *(() if asked else assigned.faults))
    inventory.left_out.extend(Fault(path, reason) for path, reason in left_out)
    inner = [folder for part in parts for folder in (part.images, part.labels) if folder and part.images != root]
    sets = {id(one): assigned.sets.get(k, []) for k, one in enumerate(objects.series)}
    for part in parts:
        without = [*([part.labels] if part.labels else []), *(inner if part.images == root else [])]
        if part.labels and part.above and len(parts) > 1 and not _is_known(root, part.images):
            reason = "labels of one of several data sets, whose values differ: prepare it alone to keep them"
            inventory.left_out.extend(Fault(path, reason) for path in tree.below(part.labels))
            part = part._replace(labels=None, split="")
        maps = _label_maps(tree, part.labels, known, inventory) if part.labels else {}
        masks = _masks(tree, part.labels, maps, inventory) if part.labels else {}
        _take_volumes(_volumes(tree, part.images, without, known, inventory), part, maps, masks, inventory)
        part_series = [one for one in chosen if _below(Path(one.folder), part.images, without)]
        for one, scan, place in _scans_of_series(part_series, objects, part, maps, masks, inventory):
            _add(inventory, place, scan, sets[id(one)], assigned.notes, names, asked)
        inventory.faults.extend(Fault(str(path), "label map without a volume of its name") for path in maps.values())
    labels = {scan.label for scan in inventory.scans.values() if scan.label_slices}
    inventory.left_out[:] = [fault for fault in inventory.left_out if str(Path(fault.source).parent) not in labels]
    inventory.seen.update(path for one in inventory.scans.values() for path in one.paths())
    _note_rest(root, tree, parts, objects, chosen, inventory)
    return inventory


def _take_volumes(
    volumes: dict[tuple[str, ...], Path],
    part: Part,
    maps: dict[tuple[str, ...], Path],
    masks: dict[Path | None, tuple[str, ...]],
    inventory: Inventory,
) -> None:
    """Adds the volumes that are files, with their label maps."""
    volumes = _without_channels(part.images, volumes, maps, inventory)
    counts = Counter(place[-1] for place in volumes)
    for place, path in volumes.items():
        label = _label_of(maps, place, counts[place[-1]] == 1)
        inventory.scans[(*part.above, *place)] = Source(
            "", str(path), label and str(label), part.split, label_slices=masks.get(label, ())
        )


def _scans_of_series(
    series: list[dicom.Series],
    objects: dicom.Objects,
    part: Part,
    maps: dict[tuple[str, ...], Path],
    masks: dict[Path | None, tuple[str, ...]],
    inventory: Inventory,
) -> Iterator[tuple[dicom.Series, Source, tuple[str, ...]]]:
    """The DICOM series of a part that can be used, each with its scan and the scan's key."""
    num_series = Counter(one.folder for one in series)
    num_folders = Counter(Path(folder).name for folder in num_series)
    for one in series:
        place = Path(one.folder).relative_to(part.images).parts
        label = _label_of(maps, (*place, one.id_part), False)
        if not label and num_series[one.folder] == 1:
            label = _label_of(maps, place or (part.images.name,), num_folders[Path(one.folder).name] == 1)
        inventory.seen.update(one.paths())
        if doubt := objects.doubt(one):
            inventory.faults.append(Fault(one.folder, doubt))
            continue
        notes, masked = tuple((one.folder, note) for note in one.notes), masks.get(label, ())
        scan = Source(
            "", one.folder, label and str(label), part.split, slices=one.slices, label_slices=masked, notes=notes
        )
        yield one, scan, (*part.above, *place, one.id_part)


def _note_rest(
    root: Path, tree: Tree, parts: list[Part], objects: dicom.Objects, chosen: list[dicom.Series], inventory: Inventory
) -> None:
    """Says of all that is neither used nor spoken of yet why it is left out."""
    accounted = inventory.seen | {fault.source for fault in (*inventory.left_out, *inventory.faults)}

    def leave_out(path: str, reason: str) -> None:
        if path not in accounted:
            inventory.left_out.append(Fault(path, reason))

    for part in parts:
        for path in tree.below(part.labels) if part.labels else ():
            if not ct.is_volume(Path(path)):
                leave_out(path, "in labels/, but no label map (NIfTI, NRRD, MHA, DICOM)")
    accounted.update(fault.source for fault in inventory.left_out)
    for one in objects.contours:
        leave_out(one.path, "structures of a series that is not used")
    asked = set(map(id, chosen))
    for one in objects.series:
        for path in one.paths():
            leave_out(path, _outside_reason(parts) if id(one) in asked else "of a series that was not asked for")
    accounted.update(fault.source for fault in inventory.left_out)
    for path in volume_files(tree, root):
        leave_out(str(path), _outside_reason(parts))


def _outside_reason(parts: list[Part]) -> str:
    names = " and ".join(part.images.name + "/" for part in parts)
    return f"beside {names}, where the data set lies: prepare its folder by itself"


def _label_of(maps: dict[tuple[str, ...], Path], place: tuple[str, ...], by_name: bool) -> Path | None:
    """Takes a scan's label map: of its path, of its id, or of its bare name."""
    channel = (*place[:-1], place[-1].removesuffix(CHANNEL))
    for key in (place, (identity.scan_id(place),), *((place[-1:],) if by_name else ()), channel):
        if key in maps:
            return maps.pop(key)
    return None


def _masks(
    tree: Tree, label_folder: Path, maps: dict[tuple[str, ...], Path], inventory: Inventory
) -> dict[Path | None, tuple[str, ...]]:
    """Adds the DICOM label maps below a folder of labels to its label maps; their slices by their folders."""
    masks, faults = dicom_masks.find(label_folder, tree)
    inventory.faults.extend(Fault(*fault) for fault in faults)
    for parts, mask in masks.items():
        if parts in maps:
            inventory.faults.append(Fault(str(mask.folder), f"a label map beside {maps[parts].name}: keep one of them"))
        else:
            maps[parts] = mask.folder
    return {mask.folder: mask.slices for mask in masks.values()}


def _parts(root: Path, tree: Tree, objects: dicom.Objects) -> list[Part]:
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
    parts = []
    for suffix, split in (("Tr", "train"), ("Va", "validation"), ("Ts", "test")):
        images, labels = root / f"images{suffix}", root / f"labels{suffix}"
        if suffix == "Va" and str(labels) not in tree.folders:
            split = ""
        if str(images) in holding:
            parts.append(Part(images, labels, split, () if suffix == "Tr" else (images.name,)))
    if not parts and str(root / "images") in holding:
        split = "train" if str(root / "labels") in tree.folders else ""
        parts.append(Part(root / "images", root / "labels", split))
    return parts


def _is_known(root: Path, images: Path) -> bool:
    return images == root or images.parent == root


def _below(path: Path, folder: Path, without: Sequence[Path]) -> bool:
    return path.is_relative_to(folder) and not any(path.is_relative_to(other) for other in without)


def _volumes(
    tree: Tree, folder: Path, without: Sequence[Path], known: Collection[str], inventory: Inventory
) -> dict[tuple[str, ...], Path]:
    """Volumes below a folder by their path in it, the last part without suffix; of files of one name the one that
    counts, where they hold the same."""
    volumes: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in volume_files(tree, folder, without):
        if tree.files[str(path)] == LOST:
            inventory.faults.append(Fault(str(path), "a link to a file that is not there"))
            continue
        parts = (*path.relative_to(folder).parts[:-1], ct.bare_name(path))
        volumes[tuple(map(identity.plain, parts))].append(path)
    return {parts: path for parts, paths in volumes.items() if (path := one_of(paths, known, inventory))}


def _without_channels(
    images: Path, volumes: dict[tuple[str, ...], Path], maps: dict[tuple[str, ...], Path], inventory: Inventory
) -> dict[tuple[str, ...], Path]:
    """Volumes in nnU-Net's folders without its suffix of the channel. Case numbers, as in MSD, look like it: they are
    those that a label map has too, or that follow a single name.

    Raises:
        ValueError: a scan of several channels.
    """
    numbers: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    for parts, path in volumes.items():
        match = re.fullmatch(r"(.+)_(\d{4})", parts[-1])
        if match and parts not in maps:
            numbers[*parts[:-1], match[1]][match[2]] = path
    alike = len(numbers) > 1 and len({tuple(sorted(channels)) for channels in numbers.values()}) == 1
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
                inventory.faults.append(Fault(str(path), f"of one name with {short[bare]}: rename one"))
            else:
                short[bare] = path
    return short


def _label_maps(tree: Tree, folder: Path, known: Collection[str], inventory: Inventory) -> dict[tuple[str, ...], Path]:
    """Label maps by their path in a folder; of 3D Slicer's segmentations without ".seg"."""
    maps = _volumes(tree, folder, (), known, inventory)
    return {_short(parts, ".seg", maps): path for parts, path in maps.items()}


def _short(parts: tuple[str, ...], end: str, others: Container[tuple[str, ...]]) -> tuple[str, ...]:
    """A name without its end, unless another file has that name."""
    short = (*parts[:-1], parts[-1].removesuffix(end))
    return parts if short in others else short


def _chosen(series: list[dicom.Series], wanted: tuple[str, ...], root: Path) -> list[dicom.Series]:
    """The series that the user names.

    Raises:
        ValueError: a name that no series has.
    """
    for name in wanted:
        if not any(name in (one.uid, one.description) for one in series):
            known = ", ".join(sorted({repr(one.description or one.uid) for one in series})) or "no CT series"
            raise ValueError(f"series={name!r}: none of that UID or description in {root}; there: {known}")
    return [one for one in series if not wanted or one.uid in wanted or one.description in wanted]


def _add(
    inventory: Inventory,
    key: tuple[str, ...],
    scan: Source,
    sets: list[dicom.Contours],
    set_notes: dict[str, str],
    names: dict,
    must: bool,
) -> None:
    """Adds a DICOM scan with the structure sets that label it.

    Args:
        sets: that belong to its series and have structures which are asked for, drawn or not.
        set_notes: path of a set -> what to say of its use.
        names: organ name -> label value.
        must: whether sets that contradict each other are a fault; else none of them is used.
    """
    asked = {structures.key_of(name) for name in names}
    drawn = [one for one in sets if asked & {structures.key_of(organ) for organ in one.organs}]
    clash = structures.conflict(drawn, names)
    if clash and not must and not scan.label:
        reason = f"beside another with {clash!r}, which labels.names does not ask for: used for no label"
        inventory.left_out.extend(Fault(one.path, reason) for one in sets)
        sets, drawn = [], []
    elif clash or (scan.label and drawn):
        paths = ", ".join(filter(None, [scan.label, *(one.path for one in drawn)]))
        what = f" of {clash!r}" if clash else ""
        inventory.faults.append(Fault(scan.image, f"has several labels{what} ({paths}): keep one of them"))
        return
    if scan.label:
        inventory.left_out.extend(Fault(one.path, "draws nothing of what is asked for") for one in sets)
    elif sets:
        paths, notes = (
            tuple(one.path for one in sets),
            tuple((one.path, set_notes[one.path]) for one in sets if one.path in set_notes),
        )
        split = scan.split or ("train" if drawn else "")
        scan = replace(scan, label=paths[0], structures=paths, split=split, notes=(*scan.notes, *notes))
    inventory.scans[key] = scan
