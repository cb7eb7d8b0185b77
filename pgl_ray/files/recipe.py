"""Public data sets: scans found by a recipe's patterns, what of the set is missing, its split (data_prep/*.yaml)."""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from pgl_ray.config import PartConfig, RecipeConfig
from pgl_ray.files import identity
from pgl_ray.files.source import Fault, Inventory, Source, counted, some, volume_files
from pgl_ray.files.walk import Tree


def find_scans(root: Path, tree: Tree, recipe: RecipeConfig, names: dict[str, int]) -> Inventory:
    """Finds what the recipe's parts describe below a folder.

    Raises:
        ValueError: nothing of it there, or two files of one name.
    """
    inventory, used = Inventory({}, [], [], [], set()), set()
    files = {path.relative_to(root).as_posix(): path for path in volume_files(tree, root)}
    for part in recipe.parts:
        scans = _part(inventory, part, recipe.prefix, files, names, used)
        _note_missing(inventory, part, recipe, scans)
    if not inventory.scans:
        where = " or ".join(part.images for part in recipe.parts)
        raise ValueError(f"source={root}: no scan of {recipe.name} in it, expected {where}; get it: {recipe.origin}")
    inventory.seen.update(path for scan in inventory.scans.values() for path in scan.paths())
    inventory.faults.extend(Fault(path, reason) for path, reason in tree.faults)
    inventory.left_out.extend(Fault(path, reason) for path, reason in tree.left_out)
    unused = sorted(files.keys() - used)
    inventory.left_out.extend(Fault(str(files[name]), "a volume that the recipe has no use for") for name in unused)
    return inventory


def _part(
    inventory: Inventory, part: PartConfig, prefix: str, files: dict[str, Path], names: dict[str, int], used: set[str]
) -> dict[str, Source]:
    """The scans of a part by {id}; `used` takes the files that belong to it."""
    scans, wanted, pattern = {}, set(_ids(part)), _regex(part.images)
    for name, path in files.items():
        match = pattern.fullmatch(name)
        if not match or (wanted and match["id"] not in wanted):
            continue
        if match["id"] in scans:
            raise ValueError(f"{scans[match['id']].image} and {path} are of one name: keep one of them")
        used.add(name)
        if not path.is_file():
            inventory.faults.append(Fault(str(path), "a link to a file that is not there"))
            continue
        label, labelled, masks = None, None, ()
        if part.labels:
            label_name = part.labels.replace("**/", match.groupdict().get("above") or "").replace("{id}", match["id"])
            organs = {label_name.replace("{organ}", organ): value for organ, value in names.items()}
            here = {file: value for file, value in organs.items() if file in files}
            present = {file: value for file, value in here.items() if files[file].is_file()}
            used.update(here)
            if "{organ}" in part.labels:
                gone = here.keys() - present.keys()
                inventory.faults.extend(Fault(str(files[one]), "a link to a file that is not there") for one in gone)
            if present and "{organ}" in part.labels:
                label = os.path.commonpath([files[file].parent for file in present])
                masks = tuple((os.path.relpath(files[file], label), value) for file, value in present.items())
                labelled = tuple(sorted(present.values()))
            elif present or label_name in files:
                label = str(files[label_name])
                used.add(label_name)
        scans[match["id"]] = Source("", str(path), label, part.split, labelled, masks=masks)
    ids = {one: identity.plain(prefix + one) for one in scans}
    for one, scan in scans.items():
        other = inventory.scans.setdefault((ids[one],), replace(scan, scan_id=ids[one]))
        if other.image != scan.image:
            reason = f"its id {ids[one]!r} is that of {other.image}, too: rename one of them"
            inventory.faults.append(Fault(scan.image, reason))
    return scans


def _regex(pattern: str) -> re.Pattern:
    """{id} is a name without slashes, a leading **/ any folders, * anything without slashes."""
    text = re.escape(pattern).replace(re.escape("{id}"), "(?P<id>[^/]+)", 1).replace(re.escape("{id}"), "(?P=id)")
    text = text.replace(re.escape("**/"), "(?P<above>(?:.*/)?)")
    return re.compile(text.replace(re.escape("*"), "[^/]*"))


def _ids(part: PartConfig) -> list[str]:
    """Spells out `case_000-209`."""
    ids = []
    for one in part.ids:
        match = re.fullmatch(r"(.*?)(\d+)-(\d+)", one)
        if match:
            width, (low, high) = len(match[2]), (int(match[2]), int(match[3]))
            ids += [f"{match[1]}{number:0{width}}" for number in range(low, high + 1)]
        else:
            ids.append(one)
    return ids


def _note_missing(inventory: Inventory, part: PartConfig, recipe: RecipeConfig, scans: dict[str, Source]) -> None:
    """Says what of a part is not there, by name where the recipe names its scans."""
    ids = _ids(part)
    if part.num_scans and len(scans) < part.num_scans:
        absent = sorted(set(ids) - scans.keys()) if len(ids) == part.num_scans else []
        listed = f" ({some(absent)} not there)" if absent else ""
        inventory.missing.append(
            f"{len(scans)} of {part.num_scans} scans {part.images} found{listed}; get the others: {recipe.origin}"
        )
    if part.num_scans and len(scans) > part.num_scans:
        inventory.missing.append(
            f"nothing, but {len(scans)} scans {part.images} found, {recipe.name} has {part.num_scans}: all are taken; "
            "move those of other sets out of source"
        )
    bare = [name for name, scan in scans.items() if part.labels and not scan.label]
    if bare:
        inventory.missing.append(f"{len(bare)} label maps {part.labels} ({some(bare)}); get them: {recipe.origin}")
    if recipe.split_sizes and part.num_scans and len(scans) - len(bare) != part.num_scans and part.labels:
        inventory.missing.append("the split is drawn from the labelled scans that are there, it is not the whole set's")


def draw_split(scans: list[Source], recipe: RecipeConfig) -> tuple[list[Source], list[str]]:
    """Splits the labelled scans, but for those of a test folder: these stay "test". The order comes from a hash of seed
    and scan_id, so that a scan which is missing or added moves hardly any other one to another split.

    Returns:
        All scans, and what is missing for the draw because test scans are not drawn.
    """
    labelled = [scan for scan in scans if scan.label]
    drawable = [scan.scan_id for scan in labelled if scan.split != "test"]
    order = sorted(drawable, key=lambda scan_id: hashlib.sha256(f"{recipe.split_seed} {scan_id}".encode()).digest())
    splits = [split for split, size in recipe.split_sizes.items() for _ in range(size)]
    missing, num_test = [], len(labelled) - len(drawable)
    if num_test and len(order) < len(splits):
        missing.append(
            f"recipe.split_sizes={recipe.split_sizes} draws {counted(len(splits), 'scan')}, {len(order)} with labels "
            f"can be drawn: {counted(num_test, 'scan')} of a test folder {'stays' if num_test == 1 else 'stay'} test"
        )
    splits += splits[-1:] * (len(order) - len(splits))
    drawn = dict(zip(order, splits))
    return [replace(scan, split=drawn.get(scan.scan_id, scan.split)) for scan in scans], missing
