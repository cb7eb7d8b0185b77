"""The records of a store's scans, once all are converted: what needs no new conversion, and scans that are the same."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from pgl_ray.convert.agreement import names_of_values
from pgl_ray.data import store
from pgl_ray.files import detached
from pgl_ray.files.source import Source, counted, some


def same_content(records: dict[str, store.ScanRecord], scan_ids: set[str]) -> list[list[store.ScanRecord]]:
    """Groups of scans that hold the same voxels, where one of each was looked at now; first those in two splits."""
    same = defaultdict(list)
    for record in records.values():
        same[record.content_hash].append(record)
    groups = [group for group in same.values() if len(group) > 1 and scan_ids & {record.scan_id for record in group}]
    return sorted(groups, key=lambda group: len({record.split for record in group}) == 1)


def changes(before: dict[str, store.ScanRecord], records: dict[str, store.ScanRecord]) -> list[str]:
    """Lines on the splits and annotated organs of stored scans that a run has changed, a line per kind."""
    scans = defaultdict(list)
    for scan_id, old in before.items():
        new = records.get(scan_id, old)
        if new.split != old.split:
            scans[f"split {old.split or 'none'} -> {new.split or 'none'}"].append(scan_id)
        if old.labelled and new.labelled != old.labelled:  # a run that was killed has not filled it in
            scans[f"labelled {list(old.labelled)} -> {list(new.labelled)}"].append(scan_id)
    return [f"changed: {what} of {counted(len(ids), 'stored scan')}: {some(ids)}" for what, ids in scans.items()]


def finish_store(
    folder: str, records: dict[str, store.ScanRecord], sources: list[Source], names: dict[str, int] | None
) -> dict[str, int]:
    """Updates what needs no new conversion in the records: path, split, labelled organs; returns the organ names."""
    by_id = {source.scan_id: source for source in sources}
    unnamed = names is None
    if unnamed:
        names = names_of_values({value for record in records.values() for value in record.label_voxels})
    for record in list(records.values()):
        source, new = by_id.get(record.scan_id), record
        if source:
            new = replace(new, source=source.image, split=source.split)
        if record.label_metadata and (source or unnamed):
            stated = source.labelled if source else None
            if source and _is_drawn(source):  # no more than what was filled, whatever a table says
                filled = {*record.label_voxels}
                if source.structures or record.source_label_metadata:  # resampling may cost an organ its voxels
                    filled |= {*record.labelled}
                stated = tuple(sorted(filled if stated is None else filled & {*stated}))
            new = replace(new, labelled=tuple(sorted(names.values())) if stated is None else stated)
        if new != record:
            store.update_record(folder, new)
            records[new.scan_id] = new
    return names


def _is_drawn(source: Source) -> bool:
    """Whether its label is of structures, each drawn or not: then one that is not drawn is unlabelled, not absent."""
    return bool(source.structures) or (bool(source.label) and detached.is_segmentation(Path(source.label)))
