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

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.config import LabelsConfig, RecipeConfig
from pgl_ray.files import ct, identity, stated
from pgl_ray.files.accounts import unused
from pgl_ray.files.folders import find_by_folders
from pgl_ray.files.header_cache import HeaderCache
from pgl_ray.files.recipe import draw_split, find_scans
from pgl_ray.files.source import Fault, Inventory, Source, volume_files
from pgl_ray.files.splits import with_table
from pgl_ray.files.walk import LABEL_FOLDERS, NNUNET, walk


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
    cache: HeaderCache | None = None,
    known: Collection[str] = (),
    stored: dict[str, int] | None = None,
) -> Layout:
    """Finds the scans of a source folder.

    Args:
        series: UIDs or descriptions of the DICOM series to take; none: all.
        cache: headers of DICOM files that are known already.
        known: files and folders that the store's scans were made from; of copies, these stay.
        stored: organ names of the store; they become the layout's where neither labels nor dataset.json name any.

    Raises:
        ValueError: no such folder, no volume in it, or a table, dataset.json or series that cannot be used.
    """
    root, recipe = Path(source).resolve(), recipe or RecipeConfig()
    if not root.is_dir():
        raise ValueError(f"source={source}: no such folder")
    if series and recipe.parts:
        raise ValueError(f"series={list(series)}: a recipe says where its scans lie: leave series out")
    stated_names, ignored = _stated(root, bool(recipe.parts or labels.names))
    names = labels.names or stated_names or stored or {}
    if len(set(names.values())) < len(names):
        raise ValueError(f"labels.names={names}: two organs have one value")
    tree = walk(root) if recipe.parts else walk(root).by_roles()
    if recipe.parts:
        inventory = find_scans(root, tree, recipe, names)
    else:
        inventory = find_by_folders(root, tree, names, series, cache, known, asked=bool(labels.names or stated_names))
        refuse_empty(inventory, f"source={root}")
        volume_names = {name: {ct.bare_name(path) for path in volume_files(tree, root / name)} for name in NNUNET}
        if any(volume_names.values()):
            inventory.missing.extend(stated.absent(root / "dataset.json", volume_names))
    scans, faults = [replace(scan, ignored=ignored) for scan in with_ids(inventory)], inventory.faults
    if recipe.split_sizes:
        scans, undrawn = draw_split(scans, recipe)
        inventory.missing.extend(undrawn)
    if labels.table:
        scans, table_faults, table_notes = with_table(scans, root / labels.table, names)
        faults += table_faults
        inventory.left_out.extend(table_notes)
    scans.sort(key=lambda scan: scan.scan_id)
    inventory.seen.update((str(root / "dataset.json"), str(root / (labels.table or "dataset.json"))))
    left_out = [*inventory.left_out, *unused(tree, inventory)]
    folders = [str(root / name) for name in LABEL_FOLDERS if str(root / name) in tree.folders]
    return Layout(scans, names, sorted(faults), sorted(left_out), inventory.missing, folders)


def _stated(root: Path, given: bool) -> tuple[dict[str, int], int | None]:
    """What dataset.json says of organs and of voxels that nobody annotated.

    Args:
        given: whether the organs are given elsewhere.

    Raises:
        ValueError: as stated.organs, where there may be label maps.
    """
    path = root / "dataset.json"
    if given:
        return {}, stated.ignored(path)
    try:
        return stated.organs(path)
    except ValueError:
        if any((root / name).is_dir() for name in LABEL_FOLDERS):
            raise
        return {}, None


def refuse_empty(inventory: Inventory, given: str) -> None:
    """Refuses a folder without anything to use.

    Raises:
        ValueError: there is neither a scan nor a file that should be one.
    """
    if not inventory.scans and not inventory.faults:
        others = "; ".join(f"{path}: {reason}" for path, reason in sorted(inventory.left_out)[:5])
        hint = f"; found {others}" if others else ""
        raise ValueError(f"{given}: no volume in it ({', '.join(ct.SUFFIXES)}, DICOM){hint}")


def with_ids(inventory: Inventory) -> list[Source]:
    """Names the scans that have no name yet, by the parts of their ids; two of one id cannot be used."""
    named: dict[str, Source] = {}
    for parts, scan in inventory.scans.items():
        scan = scan if scan.scan_id else replace(scan, scan_id=identity.scan_id(parts))
        other = named.setdefault(scan.scan_id, scan)
        if other is not scan:
            inventory.faults.append(
                Fault(scan.image, f"its id is {scan.scan_id!r}, as that of {other.image}: rename one")
            )
    return list(named.values())
