"""Door: CT files -> store. Ray Data converts one scan per task; a bad scan is written down and the others go on.

    python -m pgl_ray.prepare source=... store=...     converts what is new or changed
    python -m pgl_ray.prepare verify store=...         reads every chunk, names damaged scans
    python -m pgl_ray.prepare repair store=...         converts those again

Every whole scan carries its own record, so the same command continues a run that was killed: what lies in the store
already is recognised by its file's size and time, or by its hash, and is left alone.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("prepare")

import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl_ray.config import FailedRun, PrepareConfig, StoreConfig, build
from pgl_ray.convert import finish
from pgl_ray.convert.agreement import (
    agreed_names,
    check_labels,
    check_places,
    check_repeated,
    preparations,
    settings_of,
    stored_names,
)
from pgl_ray.convert.leftovers import cleared_records, remove_renamed, unreadable
from pgl_ray.convert.one_scan import outcomes
from pgl_ray.convert.todo import Todo, known_sources, shares_folder, vanished, what_to_do
from pgl_ray.convert.whole import Verified, is_whole, look_through, read_index
from pgl_ray.data import store, store_settings
from pgl_ray.data.durable import DISK_FULL
from pgl_ray.data.place import Place
from pgl_ray.files.accounts import grouped, json_lines
from pgl_ray.files.header_cache import HeaderCache
from pgl_ray.files.layout import Layout, read_layout
from pgl_ray.files.notes import NOTES_FILE, keep_notes
from pgl_ray.files.source import Fault, counted, some
from pgl_ray.train.progress import Stage, num_of

HEADERS = "dicom_headers.parquet"  # in the store: what is known of DICOM files
NUM_NAMED = 10  # failures that the closing lines name; failed.jsonl has all


@dataclass(frozen=True)
class Result:
    """What a run of prepare did.

    Attributes:
        store: its folder.
        index: path of the index.
        num_scans: scans in the store now.
        converted, skipped: scans written now, and scans that lay in the store unchanged.
        failed: files that could not be used; also in failed.jsonl.
        vanished: scans of this source folder that lie in the store while their files are gone.
        unlabelled: scans that stay in the store as they are, for their source has no label map any more.
        seconds: wall time.
        left_out: files that were not used, and why; also in left_out.jsonl.
    """

    store: str
    index: str
    num_scans: int
    converted: int
    skipped: int
    failed: tuple[Fault, ...]
    vanished: tuple[str, ...]
    seconds: float
    left_out: tuple[Fault, ...] = ()
    unlabelled: tuple[str, ...] = ()


def run(config: PrepareConfig, only: dict[str, str] | None = None) -> Result:
    """Converts what is new or changed, and writes the index; what cannot be converted is in the result.

    Args:
        config: what to convert.
        only: scans to convert whatever the store has of them, each with the file or folder that it is made from, and
            no others; none: what is new or changed.

    Raises:
        ValueError: no volume in the source, no label where labels are named, source and store do not agree, or other
            things lie where the store would.
        FailedRun: the disk is full, or another prepare writes into the store.
    """
    began = time.monotonic()
    place = store.open_place(config.store)
    if only is None:
        check_places(config)
    stored = stored_names(config)  # looking through a large source takes minutes: what does not agree is said before
    if only is None:
        check_repeated(config)
    cache = _read_header_cache(place)
    known = known_sources(place)
    layout = read_layout(config.source, config.labels, config.recipe, config.series, cache, known, stored)
    if layout.names is stored and any(scan.label for scan in layout.scans):
        print(f"prepare: labels.names is not given: those of the store are taken, {stored}", flush=True)
    try:
        with place.locked() as token:
            if cache.changed:
                place.write(HEADERS, [cache.packed()])
            return _run(config, place, layout, token, only, began)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(place.url) from error


def _read_header_cache(place: store.Place) -> HeaderCache:
    try:
        return HeaderCache(place.read(HEADERS))
    except (FileNotFoundError, NotADirectoryError):
        return HeaderCache()


def _disk_full(folder: str) -> FailedRun:
    return FailedRun(f"disk full at {folder}: free some space, then the same command goes on from here")


def _run(
    config: PrepareConfig, place: Place, layout: Layout, token: str, only: dict[str, str] | None, began: float
) -> Result:
    folder, known, names = place.url, settings_of(config), agreed_names(config, layout)
    check_labels(config, layout)
    if known is None:
        store_settings.write_settings(
            folder, names or {}, config.hu_window, encoding=config.encoding, spacing_mm=config.spacing_mm
        )

    # what is new or changed
    records = cleared_records(place)
    before, todo = dict(records), what_to_do(layout, records, only)
    what = "new or changed" if only is None else "to convert again"
    print(f"prepare: {counted(len(layout.scans), 'scan')} in {config.source}, {len(todo.tasks)} {what}", flush=True)
    for missing in layout.missing:
        print(f"prepare: missing: {missing}", flush=True)
    place.write("left_out.jsonl", [json_lines(layout.left_out)])

    # convert
    converted, failed, notes = _convert(config, place, layout, token, todo, records, names)
    failed += remove_renamed(place, todo, records)

    # index
    failed = sorted([*failed, *unreadable(place, records)])
    _note(place, notes)
    names = finish.finish_store(folder, records, todo.stored, names, Path(config.source).resolve())
    for line in [*finish.changes(before, records), *finish.uncounted(records, todo.stored)]:
        print(f"prepare: {line}", flush=True)
    _tell_same_content(finish.same_content(records, {source.scan_id for source in layout.scans}))
    others = {"encoding": config.encoding, "spacing_mm": config.spacing_mm}
    others["preparations"] = known.preparations if known and only is not None else preparations(config, known)
    with place.joined(token):  # or another prepare has taken over, whose index it is now
        index = store.write_index(folder, names, config.hu_window, records, **others)
    place.write("failed.jsonl", [json_lines(failed)])
    place.write("left_out.jsonl", [json_lines(sorted(layout.left_out))])
    gone = () if only is not None else tuple(sorted(vanished(config, layout, records.values())))
    seconds, path = time.monotonic() - began, f"{folder}/index.parquet"
    skipped, bare = len(todo.stored) - converted + len(todo.unlabelled), tuple(todo.unlabelled)
    left_out = tuple(layout.left_out) if only is None else ()
    return Result(folder, path, len(index.scans), converted, skipped, tuple(failed), gone, seconds, left_out, bare)


def _convert(
    config: PrepareConfig,
    place: store.Place,
    layout: Layout,
    token: str,
    todo: Todo,
    records: dict[str, store.ScanRecord],
    names: dict[str, int] | None,
) -> tuple[int, list[Fault], dict[str, list[dict[str, Any]]]]:
    """Converts; adds to the records and to what is stored. How many were converted, failures, notes by scan_id."""
    converted, failed, notes = 0, list(layout.faults), {}
    stage = Stage("prepare:", "scan", len(todo.tasks), starts=True)
    with closing(outcomes(config, place.url, token, todo.tasks, names)) as done, stage:
        for source, status, reason, scan_notes, record in stage.each(done, lambda: num_of(failed, "failed")):
            if status == "disk full":
                raise _disk_full(place.url)
            if status == "label map" and shares_folder(source, layout.scans):
                layout.left_out.append(Fault(source.image, reason.removeprefix(f"{source.image}: ")))
                continue
            if status in ("failed", "label map"):
                failed.append(Fault(source.image, reason))
                continue
            converted += status == "converted"
            notes |= {source.scan_id: scan_notes} if status == "converted" else {}
            records[source.scan_id] = record
            if record.source != source.image and os.path.exists(record.source):  # it stays what it is
                text = f"holds the same as scan {record.scan_id!r}, which the store has from {record.source}: "
                notes[source.scan_id] = [{"source": source.image, "reason": f"{text}taken once", "shown": True}]
            else:
                todo.stored.append(source)
    return converted, failed, notes


def verify(config: StoreConfig) -> Verified:
    """Reads every byte of a store while no prepare writes into it.

    Raises:
        ValueError: no store there.
    """
    return look_through(config)


def repair(config: StoreConfig) -> tuple[Verified, dict[str, str]]:
    """Converts the damaged scans again, each from the files it was made from, and writes the index anew.

    Returns:
        What was damaged, and what could not be mended: scan_id -> reason.

    Raises:
        ValueError, FailedRun: as verify and run.
    """
    verified = verify(config)
    if not (verified.damaged or verified.index):
        return verified, {}
    place, reasons = store.open_place(config.store), {}
    known = read_index(place)[0] | store.read_records(place.url)
    wanted = {name: known[name].source for name in verified.damaged if name in known}
    left = dict.fromkeys(verified.damaged, "nothing is left that says where it was made from: prepare its folder again")
    for preparation in reversed(store_settings.read_settings(config.store).preparations):  # the newest first
        values = preparation | {"store": config.store, "ray": config.ray.model_dump()}
        try:
            result = run(build(PrepareConfig, values), only={name: wanted[name] for name in left if name in wanted})
        except ValueError as error:  # its source folder is gone
            reasons[preparation["source"]] = str(error)
        else:
            reasons |= {fault.source: fault.reason for fault in result.failed}
            reasons |= {wanted[name]: "its label map is gone: put it back" for name in result.unlabelled}
        for name in list(left):
            if name in wanted and is_whole(config.store, name):
                del left[name]
    for name in left.keys() & wanted.keys():
        its_reasons = [why for path, why in reasons.items() if Path(wanted[name]).is_relative_to(path)]
        why = "; ".join(its_reasons) or ("prepare its folder again" if os.path.exists(wanted[name]) else "it is gone")
        left[name] = f"{wanted[name]}, which it was made from, cannot be used: {why}"
    return verified, left


# -- what is said ----------------------------------------------------------------------------------------------------


def _note(place: Place, notes: dict[str, list[dict[str, Any]]]) -> None:
    """Prints what was said of scans as they were converted, but for matters of course, and keeps it."""
    printed = [line for scan_notes in notes.values() for line in scan_notes if line["shown"]]
    for line in printed[:NUM_NAMED]:
        print(f"prepare: note: {line['source']}: {line['reason']}")
    if len(printed) > NUM_NAMED:
        print(f"prepare: {len(printed)} notes in all, see {place.url}/{NOTES_FILE}", flush=True)
    keep_notes(place, notes)


def _tell_same_content(groups: list[list[store.ScanRecord]]) -> None:
    """Prints which scans hold the same voxels."""
    for group in groups[:NUM_NAMED]:
        listed = ", ".join(f"{one.scan_id} ({one.split or 'no split'})" for one in group[:NUM_NAMED])
        split = ", in two splits" if len({record.split for record in group}) > 1 else ""
        print(f"prepare: note: the same voxels{split}: {listed}{' ...' * (len(group) > NUM_NAMED)}", flush=True)
    if len(groups) > NUM_NAMED:
        print(f"prepare: {counted(len(groups), 'group')} of scans with the same voxels in all", flush=True)


def describe(result: Result) -> str:
    """The closing line.

    Raises:
        FailedRun: some files could not be used; the first of them are printed before.
    """
    done = f"{result.converted} converted, {result.skipped} already there"
    if result.vanished:
        names = f"{', '.join(result.vanished[:NUM_NAMED])}{' ...' * (len(result.vanished) > NUM_NAMED)}"
        which, verb = ("its", "stays") if len(result.vanished) == 1 else ("their", "stay")
        gone = f"{counted(len(result.vanished), 'scan')} {verb} in the store while {which} files are gone"
        print(f"prepare: {gone}: {names}")
    if num := len(result.unlabelled):
        scans = f"{counted(num, 'scan')} whose label map is gone stay with it, in their split"
        print(f"prepare: {scans}: {some([*result.unlabelled])}")
        print(
            f"prepare: put it back, or delete its scan's folder in {result.store}/scans to take it without", flush=True
        )
    for line in grouped(result.left_out):
        print(f"prepare: {line}")
    if result.left_out:
        print(f"prepare: all of them in {result.store}/left_out.jsonl", flush=True)
    if not result.failed:
        return f"prepare: {done}, {counted(result.num_scans, 'scan')} in {result.index}, {result.seconds:.0f} s"
    for fault in result.failed[:NUM_NAMED]:
        print(f"  failed: {fault.source}: {fault.reason.removeprefix(fault.source + ': ')}", file=sys.stderr)
    raise FailedRun(f"{counted(len(result.failed), 'file')} failed (all in {result.store}/failed.jsonl), {done}")


def describe_verified(verified: Verified) -> str:
    """The closing line; FailedRun, after a line on stderr for each, where something is damaged."""
    for name, reason in verified.damaged.items():
        print(f"  damaged: scan {name!r}: {reason.split(': python -m')[0]}", file=sys.stderr)
    if verified.index:
        print(f"  index.parquet {verified.index}", file=sys.stderr)
    if verified.damaged or verified.index:
        also = ", and the index" * bool(verified.index)
        raise FailedRun(
            f"{len(verified.damaged)} of {verified.num_scans} scans are damaged{also}: "
            f"python -m pgl_ray.prepare repair store={verified.store}"
        )
    verb = "is" if verified.num_scans == 1 else "are"
    scans = f"{counted(verified.num_scans, 'scan')} in {verified.store}"
    return f"prepare verify: {scans} {verb} whole, {verified.seconds:.0f} s"


def describe_repaired(done: tuple[Verified, dict[str, str]]) -> str:
    """The closing line; FailedRun, after a line on stderr for each, where scans could not be mended."""
    verified, left = done
    for name, reason in left.items():
        print(f"  not mended: scan {name!r}: {reason}", file=sys.stderr)
    if left:
        raise FailedRun(f"{len(left)} of {len(verified.damaged)} damaged scans could not be converted again")
    names = f" ({', '.join(sorted(verified.damaged))})" if verified.damaged else ""
    return f"prepare repair: {len(verified.damaged)} of {counted(verified.num_scans, 'scan')} converted again{names}"
