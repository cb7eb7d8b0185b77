"""STORE/store.json: what holds for all scans of a store."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pgl_ray.data.place import open_place

FORMAT = 3
WRITERS = (
    "pgl_ray",
    "zarr",
    "numcodecs",
    "numpy",
    "pyarrow",
    "scipy",
    "nibabel",
    "SimpleITK",
    "pydicom",
)  # whose versions count


@dataclass(frozen=True)
class Settings:
    """What holds for all scans of a store.

    Attributes:
        labels: organ name -> label value.
        hu_window: of the statistics, of the views and of 8-bit codes.
        encoding: "int16" or "uint8".
        spacing_mm: that all scans were resampled to (D, H, W); none: each has its own.
        preparations: config of every prepare that added to the store, one per source folder, series and recipe.
    """

    labels: dict[str, int]
    hu_window: tuple[float, float]
    encoding: str = "int16"
    spacing_mm: tuple[float, float, float] | None = None
    preparations: tuple[dict[str, Any], ...] = ()


def data_sets(settings: Settings) -> tuple[dict[str, str], ...]:
    """What `Index.data_sets` holds."""
    recipes = [preparation.get("recipe", {}) for preparation in settings.preparations]
    sets = [{key: recipe.get(key, "") for key in ("name", "licence", "origin")} for recipe in recipes]
    return tuple(one for number, one in enumerate(sets) if one not in sets[:number])


def read_settings(store: str | Path) -> Settings:
    """What store.json says.

    Raises:
        ValueError: no store there, one of another format, or store.json is damaged.
    """
    place = open_place(store)
    try:
        content = place.read("store.json")
    except FileNotFoundError:
        raise ValueError(
            f"{str(store)!r} is not a store (no store.json): make one with python -m pgl_ray.prepare"
        ) from None
    try:
        stored = json.loads(content)
        known = stored["format"]
        if known == FORMAT:
            spacing, (low, high) = stored["spacing_mm"], stored["hu_window"]
            if spacing:
                d, h, w = spacing
                spacing = d, h, w
            return Settings(stored["labels"], (low, high), stored["encoding"], spacing, tuple(stored["preparations"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"store.json of {str(store)!r} is damaged: delete it, then prepare the same folders again; scans that are "
            "there stay"
        ) from None
    raise ValueError(
        f"store {str(store)!r} has format {known}, this version reads {FORMAT}: prepare the same folders into a new one"
    )


def write_settings(store: str | Path, labels: dict[str, int], hu_window: tuple[float, float], **others: Any) -> None:
    """Writes store.json; `others` are the further fields of Settings."""
    low, high = hu_window
    settings = Settings(labels, (low, high), **others)
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    values = {"format": FORMAT, **dataclasses.asdict(settings), "labels": ordered, "versions": _versions()}
    open_place(store).write("store.json", [json.dumps(values, indent=2, ensure_ascii=False).encode()])


def _versions() -> dict[str, str]:
    versions = {}
    for name in WRITERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # pgl_ray run from a checkout, pydicom not installed
            continue
    return versions


def made_here(store: str | Path) -> bool:
    """Whether this environment has the versions that the store was written with."""
    return json.loads(open_place(store).read("store.json"))["versions"] == _versions()
