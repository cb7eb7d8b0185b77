"""CT slices by series, as their headers say and where these cannot be trusted by where they lie.

A series is one patient's: patient, study, series and frame of reference agree, and where the series has no UID, or one
UID stands for several volumes, also the folder. Copies of slices and scouts are left out, by name.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import NamedTuple

from pgl_ray.files.dicom_headers import Header

FEW = 0.1  # share of a series' slices up to which others are a scout's, not a second stack's
SAME_DIRECTION = 0.98  # cosine of the angle, 10 degrees, up to which two orientations are one with an error


class Group(NamedTuple):
    """The slices of a series: paths in their order, the header of the first, and what is worth saying."""

    paths: list[str]
    header: Header
    notes: tuple[str, ...]


def group(
    headers: dict[str, Header], sizes: dict[str, int], known: Collection[str] = ()
) -> tuple[list[Group], list[tuple[str, str]]]:
    """Groups slices by series.

    Args:
        headers: of the slices, by path.
        sizes: bytes of each.
        known: folders of the series that a store holds; of copies, theirs stay.

    Returns:
        The series, and (path, reason) of slices that are left out.
    """
    headers, series, left_out = _with_frames(headers), defaultdict(list), []
    for path, one in headers.items():
        key = (one.person, one.study, one.series, one.frame)
        series[key if one.series else (*key, os.path.dirname(path))].append(path)
    people = defaultdict(set)
    for person, _, uid, *_ in series:
        people[uid].add(person)
    groups = []
    for (_, _, uid, *_), paths in series.items():
        notes = []
        if uid and len(people[uid]) > 1:
            notes.append("its SeriesInstanceUID is also that of another patient's slices: taken apart")
        single = _without_copies(paths, headers, sizes, known, left_out)
        folders = _by_folder(single, headers)
        if len(folders) > 1:
            notes.append(
                "its SeriesInstanceUID is also that of slices in another folder, at the same places: taken apart"
            )
        for part in folders:
            main = _without_scouts(part, headers, left_out)
            groups.append(Group(main, headers[main[0]], tuple(notes)))
    groups = _without_lone_scouts(groups, left_out)
    return sorted(groups, key=lambda one: one.paths[0]), left_out


def _with_frames(headers: dict[str, Header]) -> dict[str, Header]:
    """The headers without their frames of reference where about every slice of a series has one of its own, as some
    tools for anonymising leave them."""
    frames, counts = defaultdict(set), Counter()
    for header in headers.values():
        frames[header.person, header.study, header.series].add(header.frame)
        counts[header.person, header.study, header.series] += 1
    loose = {key for key, uids in frames.items() if len(uids) > max(2, counts[key] / 2)}
    if not loose:
        return headers
    return {
        path: header._replace(frame="") if (header.person, header.study, header.series) in loose else header
        for path, header in headers.items()
    }


def _without_copies(
    paths: list[str],
    headers: dict[str, Header],
    sizes: dict[str, int],
    known: Collection[str],
    left_out: list[tuple[str, str]],
) -> list[str]:
    """Leaves out what is the same byte for byte. A file stays rather than another where its folder is known to the
    store, then where its folder has more of the series, then by the shorter name."""
    alike = defaultdict(list)
    for path in paths:
        alike[headers[path].instance, headers[path].position, sizes[path]].append(path)
    if len(alike) == len(paths):
        return paths
    counts = Counter(os.path.dirname(path) for path in paths)

    def rank(path: str) -> tuple:
        folder = os.path.dirname(path)
        return folder not in known, -counts[folder], len(folder), folder, len(path), path

    copies = {}
    for same in alike.values():
        firsts: dict[str, str] = {}
        for path in sorted(same, key=rank) if len(same) > 1 else ():
            first = firsts.setdefault(_content(path), path)
            if first != path:
                copies[path] = first
    left_out.extend((path, f"a copy, byte for byte, of: {first}") for path, first in copies.items())
    return [path for path in paths if path not in copies]


def _content(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # it is no copy then, and reading it will say why not
        return path


def _by_folder(paths: list[str], headers: dict[str, Header]) -> list[list[str]]:
    """The slices in one, or folder by folder where different ones of several folders have one place or one UID, or of
    several stacks one number."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    keys = [lambda one: one.instance, lambda one: one.position and (one.position, one.directions)]
    if min(map(len, folders.values())) > 1:
        keys.append(lambda one: one.place)
    for key in keys if len(folders) > 1 else ():
        seen: dict[object, str] = {}
        for folder, files in folders.items():
            if any(seen.setdefault(key(headers[path]), folder) != folder for path in files if key(headers[path])):
                return list(folders.values())
    return [paths]


def _without_scouts(paths: list[str], headers: dict[str, Header], left_out: list[tuple[str, str]]) -> list[str]:
    """Leaves out the few slices that have another size, or lie across the others."""
    kinds: list[tuple[Header, list[str]]] = []
    for path in paths:
        header = headers[path]
        same = next((files for other, files in kinds if other.size == header.size and _parallel(other, header)), None)
        if same is None:
            kinds.append((header, [path]))
        else:
            same.append(path)
    main = max((files for _, files in kinds), key=len)
    others = [path for _, files in kinds for path in files if files is not main]
    if not others or len(others) > max(1, FEW * len(main)) or len(main) < 3:
        return paths
    reason = f"a scout or the like: of another size or orientation than the {len(main)} slices of its series"
    left_out.extend((path, reason) for path in others)
    return main


def _parallel(one: Header, other: Header) -> bool:
    if one.directions == other.directions:
        return True
    normals = _normal(one.directions), _normal(other.directions)
    if not all(normals):
        return True  # reading it says what is wrong
    return abs(sum(a * b for a, b in zip(*normals))) > SAME_DIRECTION


def _normal(directions: str) -> tuple[float, float, float] | None:
    try:
        a, b, c, d, e, f = map(float, directions.split("\\"))
    except ValueError:
        return None
    return b * f - c * e, c * d - a * f, a * e - b * d


def _without_lone_scouts(groups: list[Group], left_out: list[tuple[str, str]]) -> list[Group]:
    """Leaves out single slices that say they belong to a series of many and have a frame of reference of their own."""

    def key(one: Group) -> tuple[str, str, str]:
        return one.header.person, one.header.study, one.header.series

    largest = defaultdict(int)
    for one in groups:
        if one.header.series:
            largest[key(one)] = max(largest[key(one)], len(one.paths))
    stay = []
    for one in groups:
        if len(one.paths) == 1 and largest[key(one)] > 2 and one.header.frame:
            left_out.append((one.paths[0], "a scout or the like: of its series, in another frame of reference"))
        else:
            stay.append(one)
    return stay
