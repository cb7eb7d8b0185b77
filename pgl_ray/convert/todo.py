"""What of a source folder is new or changed since it went into the store; what was renamed, and what is gone."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.config import PrepareConfig
from pgl_ray.data import store
from pgl_ray.files import identity, walk
from pgl_ray.files.layout import Layout
from pgl_ray.files.source import Fault, Source

# A scan to convert, unless its files have the hash of what the store has under its scan_id.
Task = tuple[Source, store.ScanRecord | None]


def known_sources(place: store.Place) -> set[str]:
    """What the scans of a store were made from, as its index says it, or else they do themselves."""
    try:
        return {scan.source for scan in store.read_index(place.url).scans}
    except ValueError:
        records = store.read_records(place.url) if store.scan_names(place) else {}
        return {record.source for record in records.values()}


class Todo(NamedTuple):
    """What a run has to do.

    Attributes:
        tasks: scans to convert.
        stored: sources whose scans lie in the store unchanged.
        renamed: id -> ids that the store has the same source under.
        unlabelled: ids of scans of the store that have a label map while their source has none any more; they stay as
            they are.
    """

    tasks: list[Task]
    stored: list[Source]
    renamed: dict[str, list[str]]
    unlabelled: list[str]


def what_to_do(layout: Layout, records: dict[str, store.ScanRecord], only: dict[str, str] | None) -> Todo:
    """What of a source folder is new or changed.

    Args:
        layout: of the folder.
        records: of the store's scans.
        only: scans to convert whatever the store has of them, and no others, each with what it is made from.
    """
    if only is not None:
        own = _own_sources(layout, only)
        bare = {one.scan_id for one in own if one.scan_id in records and _losing_labels(one, records, [])}
        return Todo([(source, None) for source in own if source.scan_id not in bare], [], {}, sorted(bare))
    renamed = _renamed(layout, records)
    losing = {
        source.scan_id: losers
        for source in layout.scans
        if (losers := _losing_labels(source, records, renamed.get(source.scan_id, [])))
    }
    renamed = {new: olds for new, olds in renamed.items() if new not in losing}
    scans = [source for source in layout.scans if source.scan_id not in losing]
    moving = {old for olds in renamed.values() for old in olds}
    pairs = [(one, None if one.scan_id in moving else records.get(one.scan_id)) for one in scans]
    stored = [source for source, record in pairs if record and _unchanged(source, record)]
    whole = {source.scan_id for source in stored}
    tasks = [(source, record) for source, record in pairs if source.scan_id not in whole]
    tasks.sort(key=lambda task: task[1] is not None)  # what replaces a scan last: it takes the index away
    return Todo(tasks, stored, renamed, sorted({scan_id for losers in losing.values() for scan_id in losers}))


def _losing_labels(source: Source, records: dict[str, store.ScanRecord], olds: list[str]) -> list[str]:
    """Scans of the store whose label maps would go if a source without one were converted in their place."""
    own = records.get(source.scan_id)
    same = [*([own] if own and own.source == source.image else []), *(records[old] for old in olds)]
    return [record.scan_id for record in same if record.label_metadata and not source.label]


def _own_sources(layout: Layout, only: dict[str, str]) -> list[Source]:
    """The sources of scans that the store has under these ids; a scan's own or none."""
    sources = []
    for scan_id, path in only.items():
        own = [source for source in layout.scans if source.image == path]
        named = [source for source in own if source.scan_id == scan_id]
        sources += named or [replace(source, scan_id=scan_id) for source in own if len(own) == 1 and not source.slices]
    return sources


def _renamed(layout: Layout, records: dict[str, store.ScanRecord]) -> dict[str, list[str]]:
    """id -> ids of other scans of the store that were made from the same source."""
    by_path, by_mark = defaultdict(list), defaultdict(list)
    for record in records.values():
        by_path[record.source].append(record)
        if mark := identity.series_mark(record.scan_id):
            by_mark[mark].append(record)
    renamed, images = {}, {source.scan_id: source.image for source in layout.scans}
    for source in layout.scans:
        mark = identity.series_mark(source.scan_id) if source.slices else ""
        near = {record.scan_id: record for record in (*by_path[source.image], *by_mark.get(mark, ()))}
        own = near.pop(source.scan_id, None)
        others = [record for record in near.values() if images.get(record.scan_id) != record.source]
        olds = [one.scan_id for one in others if _is_same_source(source, mark, one, own, layout.faults)]
        if olds:
            renamed[source.scan_id] = olds
    return renamed


def _is_same_source(
    source: Source, mark: str, record: store.ScanRecord, own: store.ScanRecord | None, faults: Sequence[Fault]
) -> bool:
    stored_mark = identity.series_mark(record.scan_id)
    if not source.slices or not stored_mark:
        return record.source == source.image and (not source.slices or _unchanged(source, record))
    if stored_mark != mark or record.source == source.image:
        return stored_mark == mark
    # slices that came or went may have moved the folder that holds all of them; one mark may stand for several series
    if Path(record.source).is_relative_to(source.image):
        return any(path.startswith(f"{record.source}/") for path in source.paths())
    waits = any(Path(fault.source).is_relative_to(record.source) for fault in faults)
    return Path(source.image).is_relative_to(record.source) and not own and not waits


def vanished(config: PrepareConfig, layout: Layout, records: Iterable[store.ScanRecord]) -> Iterator[str]:
    """Scans that were made from this source folder and whose files are gone. Of DICOM, whose folder may stay, the
    series that is not found any more, unless it was not looked for or cannot be used."""
    root, present = Path(config.source).resolve(), {source.scan_id for source in layout.scans}
    faulty = {fault.source for fault in layout.faults}
    for record in records:
        path = Path(record.source)
        if record.scan_id in present or not path.is_relative_to(root):
            continue
        if not path.exists() or (path.is_dir() and not config.series and record.source not in faulty):
            yield record.scan_id


def shares_folder(source: Source, scans: Sequence[Source]) -> bool:
    """Whether another volume lies in a scan's folder: then what is no CT was only taken along. What has a label map, or
    lies in a folder that is called images, should be one."""
    folder = Path(source.image).parent
    if source.label or folder.name in walk.IMAGE_FOLDERS:
        return False
    return any(one is not source and folder in (Path(one.image), Path(one.image).parent) for one in scans)


def _unchanged(source: Source, record: store.ScanRecord) -> bool:
    try:
        return (record.source, record.source_size, record.source_mtime_ns) == (source.image, *source.stamp())
    except OSError:  # the task will say what is wrong
        return False
