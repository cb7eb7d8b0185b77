"""Segmentations of 3D Slicer (.seg.nrrd) by the names of their segments, whose values differ from file to file."""

import re
from pathlib import Path

import numpy as np

from pgl_ray.data.voxel_statistics import count_labels
from pgl_ray.files import detached
from pgl_ray.files.structure_header import key_of, near, whole


def by_names(
    label: np.ndarray, path: str | Path, names: dict[str, int]
) -> tuple[np.ndarray, str, tuple[int, ...] | None]:
    """Gives the voxels of segments that are asked for by name the values of these names.

    Args:
        label: uint8 or uint16 [D, H, W], with the file's own values.
        path: of the file; whatever is no segmentation of 3D Slicer keeps its values.
        names: organ name -> label value; capitals and outer blanks do not matter. Where no segment has such a name, as
            "Segment_1" has none, the values stay.

    Returns:
        uint8 or uint16 [D, H, W]; what is worth saying of it, "" where nothing is; and the values that are annotated,
        those that have a voxel, for what is not drawn is unlabelled, not absent (None: the file is no segmentation).

    Raises:
        ValueError: a segment without a name in `names` beside one that has one, or near to one; two segments of one
            value.
    """
    if not detached.is_segmentation(Path(path)):
        return label, "", None
    present, stated = set(count_labels(label)), {}
    for name, value in _segments(Path(path)):
        if value in present and stated.setdefault(value, name) != name:
            raise ValueError(
                f"{path}: its segments {stated[value]!r} and {name!r} have one value, {value}: in 3D Slicer export it "
                "as a label map (Segmentations, Export to files)"
            )
    if not stated:
        return label, "", tuple(sorted(present))
    values = {value: _value_of(stated.get(value, ""), names) for value in sorted(present)}
    known = [stated[value] for value, new in values.items() if new]
    strange = [value for value, new in values.items() if not new]
    hints = {value: alike[0] for value in strange if value in stated and (alike := near(stated[value], names))}
    if strange and (known or hints):
        first = next(iter(hints), strange[0])
        what = (
            f"its segment {stated[first]!r}, value {first}," if first in stated else f"its value {first}, no segment's,"
        )
        why = f"{hints[first]!r}: is that meant" if hints else f"{known[0]!r}, another of its segments"
        raise ValueError(f"{path}: {what} is none of {names}, which has {why}: give it a name of these, or delete it")
    if not known:
        listed = ", ".join(f"{name!r} ({value})" for value, name in sorted(stated.items()))
        note = f"labels.names has none of its segments {listed}: they are taken by these values"
        return label, note, tuple(sorted(present))
    table = np.zeros(max(present) + 1, label.dtype if max(names.values()) <= np.iinfo(label.dtype).max else np.uint16)
    for value, new in values.items():
        table[value] = new
    renumbered = np.empty(label.shape, table.dtype)
    for part, target in zip(label, renumbered):  # an index takes 8 bytes a voxel
        target[:] = table[part]
    return renumbered, "", tuple(sorted(set(values.values())))


def _segments(path: Path) -> list[tuple[str, int | None]]:
    """Name and value of each segment; 3D Slicer's value of one that states none is 1."""
    keys = detached.read_header(path).keys
    starts = dict.fromkeys(match[0] for key in keys if (match := re.match(r"Segment\d+_", key)))
    names = [keys.get(f"{start}Name") or keys.get(f"{start}ID", "") for start in starts]
    return [(name, whole(keys.get(f"{start}LabelValue", 1))) for name, start in zip(names, starts)]


def _value_of(name: str, names: dict[str, int]) -> int:
    """The value of an organ's name; 0 where it has none, or several that differ only in capitals."""
    alike = {value for other, value in names.items() if key_of(other) == key_of(name)}
    return names.get(name) or (alike.pop() if len(alike) == 1 else 0)
