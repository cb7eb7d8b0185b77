"""What a dataset.json of nnU-Net or MSD says: organs, counts, channels."""

import json
from pathlib import Path
from typing import Any

from pgl_ray.files import ct, identity
from pgl_ray.files.source import some

OTHER_MODALITIES = ("MR", "T1", "T2", "FLAIR", "PET", "PT", "US", "ADC", "DWI")
CHANNEL = "_0000"  # nnU-Net's suffix of the first, and in CT only, channel


def read(path: Path) -> dict[str, Any]:
    """A dataset.json; empty without the file.

    Raises:
        ValueError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): mend or remove it") from None


def organs(path: Path) -> tuple[dict[str, int], int | None]:
    """Organ name -> label value, and the value of voxels that nobody annotated (nnU-Net's "ignore").

    nnU-Net writes {"liver": 1}, MSD {"1": "liver"}.

    Raises:
        ValueError: no such map in the file, or regions, which have several values.
    """
    if not path.is_file():
        return {}, None
    labels = read(path).get("labels")
    mend = "give labels.names={ORGAN: VALUE}"
    if not isinstance(labels, dict):
        raise ValueError(f"{path}: no label map name -> value in it: {mend}")
    if all(str(key).isdecimal() for key in labels):
        labels = {str(name): value for value, name in labels.items()}
    labels = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in labels.items()
    }
    regions = {name: value for name, value in labels.items() if isinstance(value, list)}
    if regions:
        raise ValueError(
            f"{path}: regions of several values ({', '.join(f'{name} {value}' for name, value in regions.items())}), "
            f"expected one name per value: {_mend_of_regions(labels)}"
        )
    try:
        names = {str(name): int(value) for name, value in labels.items()}
    except (ValueError, TypeError):
        raise ValueError(f"{path}: labels {labels} are no names with values: {mend}") from None
    ignored = names.pop("ignore", None)
    return {name: value for name, value in names.items() if value}, ignored


def ignored(path: Path) -> int | None:
    """The value of voxels that nobody annotated, as `organs` reads it, of a file that need not name organs."""
    try:
        labels = read(path).get("labels")
        by_name = labels if "ignore" in labels else {name: value for value, name in labels.items()}
        value = by_name["ignore"]
        return int(value[0] if isinstance(value, list) else value)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def _mend_of_regions(labels: dict[str, Any]) -> str:
    """Names for every value of the regions; what has none of its own is called by the regions it is in."""
    single = {value: name for name, value in labels.items() if not isinstance(value, list) and name != "ignore"}
    values = sorted({one for value in labels.values() if isinstance(value, list) for one in value})
    inside = {
        one: [name for name, value in labels.items() if isinstance(value, list) and one in value] for one in values
    }
    names = {value: single.get(value) or f"{'_'.join(inside[value])}_{value}" for value in {*values, *single} if value}
    return f"labels.names='{{{', '.join(f'{name}: {value}' for value, name in sorted(names.items()))}}}'"


def absent(path: Path, volume_names: dict[str, set[str]]) -> list[str]:
    """Training and test volumes that a dataset.json lists (MSD) or counts (nnU-Net) and that are not there.

    Args:
        volume_names: imagesTr and imagesTs -> names of the volumes in them, without suffix.

    Raises:
        ValueError: its volumes are not CT.
    """
    stated, missing = read(path), []
    channels = stated.get("channel_names") or stated.get("modality") or {}
    channels = [str(name) for name in (channels.values() if isinstance(channels, dict) else [channels])]
    if len(channels) > 1 or any(name.upper().startswith(OTHER_MODALITIES) for name in channels):
        raise ValueError(f"{path}: its volumes are {', '.join(channels)}, expected CT alone")
    for key, folder in (("Training", "imagesTr"), ("Test", "imagesTs")):
        listed, number = stated.get(key.lower()), stated.get(f"num{key}")
        if isinstance(listed, list):
            paths = [str(one["image"] if isinstance(one, dict) and "image" in one else one) for one in listed]
            ids = {_case(ct.bare_name(Path(one.replace("\\", "/")))) for one in paths}
            gone = sorted(ids - set(map(_case, volume_names[folder])))
            if gone:
                missing.append(f"{len(gone)} of {len(ids)} volumes of {folder} that dataset.json lists: {some(gone)}")
        elif isinstance(number, int) and len(volume_names[folder]) < number:
            missing.append(
                f"{number - len(volume_names[folder])} of {number} volumes of {folder} that dataset.json counts"
            )
    return missing


def _case(name: str) -> str:
    return identity.plain(name).removesuffix(CHANNEL)
