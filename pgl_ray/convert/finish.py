"""The records of a store's scans, once all are converted: what needs no new conversion, and scans that are the same."""

from collections import defaultdict
from collections.abc import Iterable
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


def uncounted(records: dict[str, store.ScanRecord], sources: list[Source]) -> list[str]:
    """A line on label maps of other folders that count for no organ, in a list; [] where there are none."""
    here = {source.scan_id for source in sources}
    ids = [one.scan_id for one in records.values() if one.label_voxels and not one.labelled and one.scan_id not in here]
    why = "where their prepare did not come to its end, and no table says so, prepare their folder again"
    return [f"label maps of {counted(len(ids), 'scan')} count for no organ ({some(ids)}): {why}"] if ids else []


def finish_store(
    folder: str, records: dict[str, store.ScanRecord], sources: list[Source], names: dict[str, int] | None, root: Path
) -> dict[str, int]:
    """Updates what needs no new conversion in the records: path, split, labelled organs; returns the organ names.

    Where nobody names the organs, label maps are annotated for all that those of their own folder `root` hold: what
    only other folders have is unlabelled in them, not absent.
    """
    by_id = {source.scan_id: source for source in sources}
    if names is None:
        names = _names_in(records.values())
        own = _names_in(
            record for record in records.values() if record.scan_id in by_id or Path(record.source).is_relative_to(root)
        )
    else:
        own = names
    annotated = tuple(sorted(own.values()))
    for record in list(records.values()):
        source, new = by_id.get(record.scan_id), record
        if source:
            new = replace(new, source=source.image, split=source.split)
        if record.label_metadata and source:
            stated = source.labelled
            if _is_drawn(source):  # no more than what was filled, whatever a table says
                filled = {*record.label_voxels}
                if source.structures or record.source_label_metadata:  # resampling may cost an organ its voxels
                    filled |= {*record.labelled}
                stated = tuple(sorted(filled if stated is None else filled & {*stated}))
            new = replace(new, labelled=annotated if stated is None else stated)
        if new != record:
            store.update_record(folder, new)
            records[new.scan_id] = new
    return names


def _names_in(records: Iterable[store.ScanRecord]) -> dict[str, int]:
    return names_of_values({value for record in records for value in record.label_voxels})


def _is_drawn(source: Source) -> bool:
    """Whether its label is of structures, each drawn or not: then one that is not drawn is unlabelled, not absent."""
    return bool(source.structures) or (bool(source.label) and detached.is_segmentation(Path(source.label)))
