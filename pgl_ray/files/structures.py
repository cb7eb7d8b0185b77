"""Structure sets (RTSTRUCT, SEG) as the label map of a CT: which belongs to which series, and what is filled.

No structure is lost silently: what is not used is named with the reason, and a broken structure, or a broken set, costs
its own label and never the CT.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.files import contours, dicom, segments
from pgl_ray.files.dicom_values import Refused
from pgl_ray.files.geometry import LPS_TO_RAS
from pgl_ray.files.structure_header import SEGMENTATION, Contours, key_of, near

NUM_NAMED = 8  # of structures that a message names


class Labelled(NamedTuple):
    """Structures as a label map.

    Attributes:
        label: uint16, of the grid; 0 where nothing is.
        values: label values of which something was filled, ascending.
        notes: (path, what of it could not be used, or only in part, and why).
        unasked: (path, structures that nobody asked for).
    """

    label: np.ndarray
    values: tuple[int, ...]
    notes: list[tuple[str, str]]
    unasked: list[tuple[str, str]]


def read_structures(
    paths: Sequence[str], names: dict[str, int], affine: np.ndarray, shape: tuple[int, int, int]
) -> Labelled:
    """Fills the structures that are asked for; those of one name are joined. Where structures of different names
    overlap, the larger value stands, as tumour in organ.

    Args:
        paths: structure sets of one CT.
        names: structure name -> label value. Capitals and outer blanks do not matter.
        affine: [4, 4], voxel index (three axes in any order, 1) -> RAS+ mm.
        shape: of the grid.
    """
    labelled = Labelled(np.zeros(shape, np.uint16), (), [], [])
    by_key = defaultdict(list)
    for path in paths:
        try:
            inside = _open(path)
        except ValueError as error:
            labelled.notes.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        for one in inside:
            by_key[key_of(one.name)].append((path, one))
        _note_unasked(path, [one.name or one.title for one in inside], names, labelled)
    to_index, values = np.linalg.inv(affine) @ LPS_TO_RAS, set()
    for value, name in sorted((value, name) for name, value in names.items()):
        pieces, refused, alike = [], False, [other for other in names if key_of(other) == key_of(name)]
        for path, one in by_key[key_of(name)]:
            if len(alike) > 1 and one.name in alike and one.name != name:
                continue  # names that differ only in capitals, and ROIs that do
            placed = one.place(to_index, shape)
            labelled.notes.extend((path, f"{one.title}: {note}") for note in placed.notes)
            if placed.refused:
                refused = True
                labelled.notes.append((path, f"{one.title}: {placed.refused}; {name!r} is unlabelled in this scan"))
            pieces += placed.pieces
        if not refused and _write(labelled.label, value, pieces):
            values.add(value)
    return labelled._replace(values=tuple(sorted(values)))


def _open(path: str) -> list[Any]:
    """The structures of a set.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        dataset = dicom.read(path)
        if str(dataset.get("SOPClassUID", "")) == SEGMENTATION:
            return segments.segments(dataset)
        return contours.rois(dataset)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # see dicom.find
        raise ValueError(dicom.unreadable(path, error)) from None


def _write(label: np.ndarray, value: int, pieces: list[tuple[int, int, np.ndarray]]) -> bool:
    """Whether a voxel was filled."""
    filled = False
    for axis, place, mask in pieces:
        np.moveaxis(label, axis, 0)[place][mask] = value
        filled |= bool(mask.any())
    return filled


def _note_unasked(path: str, present: list[str], names: dict[str, int], labelled: Labelled) -> None:
    asked = {key_of(name) for name in names}
    others = list(dict.fromkeys(name for name in present if key_of(name) not in asked))
    if others:
        labelled.unasked.append((path, f"not asked for: {_some(others)}"))
    have = {key_of(name) for name in present}
    for name in names:
        if key_of(name) not in have and (alike := near(name, others)):
            labelled.notes.append(
                (path, f"{name!r} is not in it, but {_some(alike)}: is it meant? name it as it stands there")
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(repr(name) for name in names[:NUM_NAMED]) + more


# -- which belongs to which series ------------------------------------------------------------------------------------


class Assigned(NamedTuple):
    """Structure sets of the series.

    Attributes:
        sets: number of a series in the list -> its sets that have a structure which is asked for, drawn or not.
        notes: path of a set -> what to say of its use.
        left_out: (path, reason) of sets that are not used.
        faults: (path, reason) of sets that cannot be read.
    """

    sets: dict[int, list[Contours]]
    notes: dict[str, str]
    left_out: list[tuple[str, str]]
    faults: list[tuple[str, str]]


def assign(sets: Sequence[Contours], series: Sequence[dicom.Series], names: dict[str, int]) -> Assigned:
    """Gives every structure set to the series that it names, or, where that is not here, to the only one in its frame
    of reference.

    Args:
        names: organ name -> label value.
    """
    assigned, asked = Assigned(defaultdict(list), {}, [], []), {key_of(name) for name in names}
    for one in sets:
        if one.broken:
            reason = f"its structures cannot be read ({one.broken}), so it labels no scan: copy it again"
            (assigned.faults if names else assigned.left_out).append((one.path, reason))
            continue
        if one.unused:
            assigned.left_out.append((one.path, one.unused))
            continue
        matched, note = _series_of(one, series)
        if isinstance(matched, str):
            assigned.left_out.append((one.path, matched))
        elif not asked & {key_of(organ) for organ in one.organs + one.undrawn}:
            hints = [f"{_some(alike)} for {name!r}" for name in names if (alike := near(name, one.organs))]
            hint = f" (is {hints[0]} meant?)" if hints else ""
            what = f"structures {_some(one.organs)}" if one.organs else "no closed contours or segments in it"
            assigned.left_out.append(
                (one.path, what + f"{hint}: name those to use, labels.names={{NAME: 1}}" * bool(one.organs))
            )
        else:
            for number in matched:
                assigned.sets[number].append(one)
            if note:
                assigned.notes[one.path] = note
    return assigned


def _series_of(one: Contours, series: Sequence[dicom.Series]) -> tuple[list[int] | str, str]:
    """Numbers of the series that a set belongs to, or why none; and what to say of it."""
    named = [k for k, other in enumerate(series) if other.uid in one.series]
    named = [k for k in named if one.patient and series[k].patient == one.patient] or named
    if len(named) > len({series[k].uid for k in named}):
        return f"contours of a series whose UID occurs {len(named)} times: separate these", ""
    if named:
        return named, ""
    close = [k for k, other in enumerate(series) if other.frame and other.frame in one.frames]
    strange = [k for k in close if one.patient and series[k].patient not in ("", one.patient)]
    close = [k for k in close if k not in strange]
    if len(close) == 1:
        why = "it names a series that is not here" if one.series else "it names no series"
        return close, f"{why}: taken for the only one in its frame of reference"
    others = f", and {len(close)} series lie in its frame of reference" if close else ""
    if strange and not close:
        others = ", and that in its frame of reference is of another patient (PatientID)"
    return f"contours of a series that is not here{others}", ""


def conflict(sets: Sequence[Contours], names: dict[str, int]) -> str:
    """A structure that is asked for and stands in several sets; "" where there is none."""
    seen: set[str] = set()
    for one in sets:
        organs = {key_of(organ) for organ in one.organs}
        for name in names:
            if key_of(name) in organs & seen:
                return name
        seen |= organs
    return ""
