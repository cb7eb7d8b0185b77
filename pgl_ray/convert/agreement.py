"""Whether a source folder and the store that it goes into agree on names, HU window, encoding and voxel size."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pgl_ray.config import PrepareConfig
from pgl_ray.data import chunks, store, store_settings
from pgl_ray.data.own_files import SYSTEM
from pgl_ray.files.layout import Layout
from pgl_ray.files.notes import NOTES_FILE
from pgl_ray.files.source import some
from pgl_ray.paths import is_url

WRITTEN = ("index.parquet", chunks.FILE, "failed.jsonl", "left_out.jsonl", NOTES_FILE)  # into a store, beside its scans


def check_places(config: PrepareConfig) -> None:
    """Refuses a store in a folder or below a URL where other things lie, and a source that is the store's own.

    Raises:
        ValueError: names what is in the way.
    """
    place, source = store.open_place(config.store), f"source={config.source}"
    if not is_url(config.store):
        path, target = Path(config.source).resolve(), Path(config.store).resolve()
        if path == target:
            raise ValueError(f"{source} is the store's own folder, too: give another store=..., new or empty")
        if path.is_relative_to(target / "scans") or path.is_relative_to((target / "scans").resolve()):
            raise ValueError(f"{source} lies in the scans/ of store={config.store}: give another store=..., or source")
    names = place.names("")
    if "store.json" in names or not {"scans", *WRITTEN} & {*names}:
        return
    taken = [f"scans/{name}" for name in store.scan_names(place) if not name.startswith(SYSTEM)]
    if taken and store.read_records(place.url):  # of a store whose store.json was damaged, and deleted
        return
    taken += ["scans"] if place.is_file("scans") else []
    if taken := [*taken, *(name for name in WRITTEN if name in names)]:
        raise ValueError(
            f"store={config.store} is no store and holds {some(taken)}, which pgl_ray has not written: "
            "give another store=..., new or empty"
        )


def check_labels(config: PrepareConfig, layout: Layout) -> None:
    """Refuses a source without any label where labels are named.

    Raises:
        ValueError: there is none.
    """
    if config.recipe.parts or layout.faults or any(scan.label for scan in layout.scans):
        return
    if config.labels.names:
        given = f"labels.names names {some(list(config.labels.names))}"
    elif layout.label_folders:
        given = f"there is {some(layout.label_folders)}"
    else:
        return
    near = sorted(layout.left_out, key=lambda fault: "label" not in fault.source.lower())[:1]
    unused = "".join(f"; not used: {fault.source}: {fault.reason}" for fault in near)
    raise ValueError(
        f"source={config.source}: {given}, and no scan has a label: label maps are looked for in labels/ beside "
        "images/ (labelsTr/ beside imagesTr/), under their scans' names: put them there, or leave "
        f"{'labels.names' if config.labels.names else 'the labels'} out{unused}"
    )


def settings_of(config: PrepareConfig) -> store_settings.Settings | None:
    """Settings of a store that is there already.

    Raises:
        ValueError: it has another HU window, encoding or spacing, or store.json is damaged.
    """
    if "store.json" not in store.open_place(config.store).names(""):
        return None
    known = store.read_settings(config.store)
    for key in ("hu_window", "encoding", "spacing_mm"):
        given, stored = getattr(config, key), getattr(known, key)
        if given != stored:
            raise ValueError(f"{key}={given}: store {config.store} has {stored}: use that or another store")
    return known


def stored_names(config: PrepareConfig) -> dict[str, int]:
    """Organ names that a store was given; empty: no store is there, or its organs are called by their values.

    Raises:
        ValueError: as settings_of.
    """
    known = settings_of(config)
    return known.labels if known and known.labels != names_of_values(known.labels.values()) else {}


def agreed_names(config: PrepareConfig, layout: Layout) -> dict[str, int] | None:
    """Organ names of source and store; none: nobody names them, so they will be called by the values found.

    Raises:
        ValueError: the store has other names.
    """
    settings = settings_of(config)
    known = settings.labels if settings else {}
    if layout.names and known and layout.names != known:  # networks that learned from it have its classes
        raise ValueError(
            f"labels of {config.source} are {layout.names}, those of store {config.store} {known}: use another store"
        )
    names = layout.names or known
    unnamed = any(scan.label for scan in layout.scans) and names == names_of_values(names.values())
    return None if unnamed else names


def check_repeated(config: PrepareConfig) -> None:
    """Refuses to go on without what an earlier run took this source's splits, labels or scans from.

    Raises:
        ValueError: it had a table, a recipe's parts or a drawn split, and this one has not.
    """
    known = settings_of(config)
    for earlier in known.preparations if known else ():
        recipe, series = earlier.get("recipe", {}), {*earlier.get("series", ())}
        others = config.recipe.parts and recipe.get("parts") and recipe.get("name") != config.recipe.name
        if earlier["source"] != config.source or others or (series and config.series and not series & {*config.series}):
            continue
        table, name = earlier.get("labels", {}).get("table"), recipe.get("name") or "without a name"
        for given, again, what in (
            (table, config.labels.table, f"labels.table={table}"),
            (recipe.get("parts"), config.recipe.parts, f"recipe.parts of the recipe {name}"),
            (
                recipe.get("split_sizes"),
                config.recipe.split_sizes or config.labels.table,
                f"recipe.split_sizes={recipe.get('split_sizes')}",
            ),
        ):
            if given and not again:
                raise ValueError(
                    f"store={config.store} was prepared from source={config.source} with {what}: give it again or "
                    "another, or prepare into another store"
                )


def preparations(config: PrepareConfig, known: store_settings.Settings | None) -> tuple[dict[str, Any], ...]:
    """What the store was made with so far, the newest config of each source folder, its series and recipe; of one
    folder the newest last."""
    new, earlier = config.model_dump(mode="json", exclude={"store", "ray"}), known.preparations if known else ()
    of_folder = [one for one in earlier if one["source"] == config.source]
    if of_folder and _identity(of_folder[-1]) == _identity(new):
        return tuple(new if _identity(one) == _identity(new) else one for one in earlier)
    return (*(one for one in earlier if _identity(one) != _identity(new)), new)


def _identity(preparation: dict[str, Any]) -> tuple[str, list[str], str]:
    return preparation["source"], preparation.get("series", []), preparation.get("recipe", {}).get("name", "")


def names_of_values(values: Iterable[int]) -> dict[str, int]:
    """What organs are called that nobody names."""
    return {f"label_{value}": value for value in sorted(values)}
