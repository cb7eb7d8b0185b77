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

import errno
import heapq
import json
import math
import os
import pickle
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pgl_ray.config import FailedRun, PrepareConfig, RayConfig, StoreConfig, build
from pgl_ray.data import chunks, store
from pgl_ray.files import identity
from pgl_ray.files.accounts import grouped, json_lines
from pgl_ray.files.kept_headers import Kept
from pgl_ray.files.layout import Fault, Layout, Source, read_layout
from pgl_ray.files.notes import NOTES_FILE, keep_notes
from pgl_ray.files.plausible import LabelMap
from pgl_ray.files.resample import resample
from pgl_ray.files.source import counted, some
from pgl_ray.train.progress import Stage, num_of

PEAK_BYTES_PER_VOXEL = 8  # of a conversion, label map included (tests/benchmarks/test_prepare_cost.py)
PEAK_BYTES_PER_RESAMPLED = 10  # voxel of the result, beside the source's own
NUM_LARGEST = 8  # files whose headers say how much memory a conversion takes
HEADERS = "dicom_headers.parquet"  # in the store: what is known of DICOM files
MAX_TRIES = 3
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NUM_SHOWN = 10  # failures that the closing lines name; failed.jsonl has all


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


@dataclass(frozen=True)
class Verified:
    """What a look at every byte of a store found.

    Attributes:
        store: its folder.
        num_scans: scans that were read.
        damaged: scan_id -> what is wrong with it.
        index: what is wrong with index.parquet; "" = nothing.
        seconds: wall time.
    """

    store: str
    num_scans: int
    damaged: dict[str, str]
    index: str
    seconds: float


# A scan to convert, unless its files have the hash of what the store has under its scan_id. A plain tuple, because a
# class of the module that is run as __main__ cannot be unpickled in a worker.
Task = tuple[Source, store.ScanRecord | None]


def run(config: PrepareConfig, only: dict[str, str] | None = None) -> Result:
    """Converts what is new or changed, and writes the index; what cannot be converted is in the result.

    Args:
        config: what to convert.
        only: scans to convert whatever the store has of them, each with the file or folder that it is made from, and
            no others; none: what is new or changed.

    Raises:
        ValueError: no volume in the source, no label where labels are named, or source and store do not agree.
        FailedRun: the disk is full, or another prepare writes into the store.
    """
    began = time.monotonic()
    place = store.open_place(config.store)
    _settings(config)  # looking through a large source takes minutes: what does not agree is said before
    kept = _kept_headers(place)
    known = _known_sources(place)
    layout = read_layout(config.source, config.labels, config.recipe, config.series, kept, known)
    try:
        with place.locked() as token:
            if kept.changed:
                place.write(HEADERS, [kept.packed()])
            return _run(config, place, layout, token, only, began)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(place.url) from error


def _known_sources(place: store.Place) -> set[str]:
    """What the scans of a store were made from, as its index says it; nothing where that cannot be read."""
    try:
        return {scan.source for scan in store.read_index(place.url).scans}
    except ValueError:
        return set()


def _kept_headers(place: store.Place) -> Kept:
    try:
        return Kept(place.read(HEADERS))
    except (FileNotFoundError, NotADirectoryError):
        return Kept()


def _disk_full(folder: str) -> FailedRun:
    return FailedRun(f"disk full at {folder}: free some space, then the same command goes on from here")


def _run(
    config: PrepareConfig, place: store.Place, layout: Layout, token: str, only: dict[str, str] | None, began: float
) -> Result:
    folder, known, names = place.url, _settings(config), _agreed_names(config, layout)
    _check_labels(config, layout)
    if known is None:
        store.write_settings(
            folder, names or {}, config.hu_window, encoding=config.encoding, spacing_mm=config.spacing_mm
        )

    # what is new or changed
    records = store.read_records(folder)
    for name in set(store.scan_names(place)) - set(records):
        inside = place.names(f"scans/{name}")
        if inside and "zarr.json" not in inside:  # a bucket keeps what a killed run had of a scan
            place.remove(f"scans/{name}")
    sources = layout.scans if only is None else _own_sources(layout, only)
    renamed = _renamed(sources, records) if only is None else {}
    moving = {old for olds in renamed.values() for old in olds}
    pairs = [(one, None if one.scan_id in moving else records.get(one.scan_id)) for one in sources]
    stored = [source for source, record in pairs if only is None and record and _unchanged(source, record)]
    whole = {source.scan_id for source in stored}
    tasks = [(source, record if only is None else None) for source, record in pairs if source.scan_id not in whole]
    what = "new or changed" if only is None else "to convert again"
    print(f"prepare: {counted(len(layout.scans), 'scan')} in {config.source}, {len(tasks)} {what}", flush=True)
    for missing in layout.missing:
        print(f"prepare: missing: {missing}", flush=True)
    place.write("left_out.jsonl", [json_lines(layout.left_out)])

    # convert
    converted, failed, notes = 0, list(layout.faults), {}
    stage = Stage("prepare:", "scan", len(tasks), starts=True)
    with closing(_outcomes(config, folder, token, tasks, names)) as outcomes, stage:
        for source, status, reason, said, record in stage.each(outcomes, lambda: num_of(failed, "failed")):
            if status == "disk full":
                raise _disk_full(folder)
            if status == "label map" and _beside_another(source, layout.scans):
                layout.left_out.append(Fault(source.image, reason.removeprefix(f"{source.image}: ")))
                continue
            if status in ("failed", "label map"):
                failed.append(Fault(source.image, reason))
                continue
            converted += status == "converted"
            notes |= {source.scan_id: said} if status == "converted" else {}
            elsewhere = record.source != source.image and os.path.exists(record.source)
            records[source.scan_id] = record
            if elsewhere:  # it stays what it is
                notes[source.scan_id] = [
                    _note_of(
                        source,
                        f"holds the same as scan {record.scan_id!r}, which the store "
                        f"has from {record.source}: taken once",
                    )
                ]
            else:
                stored.append(source)
    there = {source.scan_id for source in stored}
    for new, olds in renamed.items():
        for old in olds if new in there else ():
            print(f"prepare: renamed: {old} -> {new}", flush=True)
            if old not in there:
                place.remove(f"scans/{old}")
                del records[old]

    # index
    for name in set(store.scan_names(place)) - set(records):
        if not place.names(f"scans/{name}"):  # a stray file
            continue
        mend = f"its zarr.json is damaged: python -m pgl_ray.prepare repair store={folder}"
        failed.append(Fault(f"{folder}/scans/{name}", mend))
    failed.sort()
    _note(place, notes)
    names = finish_store(folder, records, stored, names)
    _tell_same_content(records, {source.scan_id for source in layout.scans})
    others = {"encoding": config.encoding, "spacing_mm": config.spacing_mm}
    preparations = _preparations(config, known)
    with place.joined(token):  # or another prepare has taken over, whose index it is now
        index = store.write_index(folder, names, config.hu_window, records, preparations=preparations, **others)
    place.write("failed.jsonl", [json_lines(failed)])
    place.write("left_out.jsonl", [json_lines(sorted(layout.left_out))])
    gone = () if only is not None else tuple(sorted(_vanished(config, layout, records.values())))
    seconds, path, skipped = time.monotonic() - began, f"{folder}/index.parquet", len(stored) - converted
    left_out = tuple(layout.left_out) if only is None else ()
    return Result(folder, path, len(index.scans), converted, skipped, tuple(failed), gone, seconds, left_out)


def _check_labels(config: PrepareConfig, layout: Layout) -> None:
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
    raise ValueError(
        f"source={config.source}: {given}, and no scan has a label: name label maps as their scans, or "
        "leave the labels out"
    )


def _own_sources(layout: Layout, only: dict[str, str]) -> list[Source]:
    """The sources of scans that the store has under these ids; a scan's own or none."""
    found = []
    for scan_id, path in only.items():
        own = [source for source in layout.scans if source.image == path]
        named = [source for source in own if source.scan_id == scan_id]
        found += named or [replace(source, scan_id=scan_id) for source in own if len(own) == 1 and not source.slices]
    return found


def _renamed(sources: list[Source], records: dict[str, store.ScanRecord]) -> dict[str, list[str]]:
    """id -> ids of other scans of the store that were made from the same source."""
    by_path, by_mark = defaultdict(list), defaultdict(list)
    for record in records.values():
        by_path[record.source].append(record)
        if mark := identity.series_mark(record.scan_id):
            by_mark[mark].append(record)
    found = {}
    for source in sources:
        mark = identity.series_mark(source.scan_id) if source.slices else ""
        near = {record.scan_id: record for record in (*by_path[source.image], *by_mark.get(mark, ()))}
        near.pop(source.scan_id, None)
        olds = [scan_id for scan_id, record in near.items() if _is_same_source(source, mark, record)]
        if olds:
            found[source.scan_id] = olds
    return found


def _is_same_source(source: Source, mark: str, record: store.ScanRecord) -> bool:
    if not source.slices:
        return record.source == source.image
    theirs = identity.series_mark(record.scan_id)
    if theirs:  # slices that came or went may have moved the folder that holds all of them
        one, other = Path(source.image), Path(record.source)
        return theirs == mark and (one.is_relative_to(other) or other.is_relative_to(one))
    return record.source == source.image and _unchanged(source, record)


def verify(config: StoreConfig) -> Verified:
    """Reads every byte of a store while no prepare writes into it.

    Raises:
        ValueError: no store there.
    """
    began = time.monotonic()
    store.read_settings(config.store)
    place, damaged = store.open_place(config.store), {}
    index, fault = _read_index(place)
    names = sorted({*store.scan_names(place), *index})
    looks = [(name, name in index) for name in names]
    checked = in_parallel(partial(_check, folder=place.url), looks, config.ray)
    with closing(checked) as outcomes, Stage("prepare verify:", "scan", len(names), starts=True) as stage:
        for row in stage.each(outcomes, lambda: num_of(damaged, "damaged")):
            if row["reason"]:
                damaged[names[row["task"]]] = row["reason"]
    records = {name: record for name, record in store.read_records(place.url).items() if name not in damaged}
    if not fault and {name: record for name, record in index.items() if name not in damaged} != records:
        fault = "does not agree with the scans' own records: prepare did not come to its end"
    if not fault and (why := chunks.damage(place)):
        fault = f"is whole, {chunks.FILE} beside it is damaged ({why})"
    return Verified(place.url, len(names), damaged, fault, time.monotonic() - began)


def _read_index(place: store.Place) -> tuple[dict[str, store.ScanRecord], str]:
    """The index' records, and what is wrong with it."""
    try:
        content = place.read("index.parquet")
        scans = store.read_table(content)
        # some bytes (page statistics) have no checksum and are never read; the same pyarrow writes them the same
        fault = "" if content == store.table_of(scans) or not store.made_here(place.url) else "is damaged"
        return {record.scan_id: record for record in scans}, fault
    except FileNotFoundError:
        return {}, "is missing: prepare did not come to its end"
    except Exception as error:  # pyarrow's own, of several kinds
        return {}, f"is damaged ({' '.join(str(error).split())})"


def _check(row: dict, folder: str) -> dict:
    """Checks one scan, (scan_id, whether the index has it); runs in a Ray task. Returns task, and what is damaged."""
    (name, listed), reason = pickle.loads(row["item"]), ""
    try:
        if listed or "zarr.json" in store.open_place(folder).names(f"scans/{name}"):
            store.check_scan(folder, name)  # else what a killed run left in a bucket: no scan yet
    except Exception as error:  # damage may show as anything
        reason = str(error) or type(error).__name__
    return {"task": row["task"], "reason": reason}


def repair(config: StoreConfig) -> tuple[Verified, dict[str, str]]:
    """Converts the damaged scans again, each from the files it was made from, and writes the index anew.

    Returns:
        What was damaged, and what could not be mended: scan_id -> reason.

    Raises:
        ValueError, FailedRun: as verify and run.
    """
    found = verify(config)
    if not (found.damaged or found.index):
        return found, {}
    place, reasons = store.open_place(config.store), {}
    known = _read_index(place)[0] | store.read_records(place.url)
    wanted = {name: known[name].source for name in found.damaged if name in known}
    left = dict.fromkeys(found.damaged, "nothing is left that says where it was made from: prepare its folder again")
    for said in store.read_settings(config.store).preparations:
        values = said | {"store": config.store, "ray": config.ray.model_dump()}
        try:
            result = run(build(PrepareConfig, values), only={name: wanted[name] for name in left if name in wanted})
        except ValueError as error:  # its source folder is gone
            reasons[said["source"]] = str(error)
        else:
            reasons |= {fault.source: fault.reason for fault in result.failed}
        for name in list(left):
            if name in wanted and _is_whole(config.store, name):
                del left[name]
    for name in left.keys() & wanted.keys():
        mine = [why for path, why in reasons.items() if Path(wanted[name]).is_relative_to(path)]
        why = "; ".join(mine) or ("prepare its folder again" if os.path.exists(wanted[name]) else "it is gone")
        left[name] = f"{wanted[name]}, which it was made from, cannot be used: {why}"
    return found, left


def _is_whole(folder: str, scan_id: str) -> bool:
    try:
        store.check_scan(folder, scan_id)
    except (ValueError, RuntimeError):
        return False
    return True


# -- what to do -------------------------------------------------------------------------------------------------------


def _settings(config: PrepareConfig) -> store.Settings | None:
    """Settings of a store that is there already.

    Raises:
        ValueError: it has another HU window, encoding or spacing, or store.json is damaged.
    """
    if "store.json" not in store.open_place(config.store).names(""):
        return None
    known = store.read_settings(config.store)
    for key in ("hu_window", "encoding", "spacing_mm"):
        ours, theirs = getattr(config, key), getattr(known, key)
        if ours != theirs:
            raise ValueError(f"{key}={ours}: store {config.store} has {theirs}: use that or another store")
    return known


def _agreed_names(config: PrepareConfig, layout: Layout) -> dict[str, int] | None:
    """Organ names of source and store; none: nobody names them, so they will be called by the values found.

    Raises:
        ValueError: the store has other names.
    """
    settings = _settings(config)
    known = settings.labels if settings else {}
    if layout.names and known and layout.names != known:
        raise ValueError(
            f"labels of {config.source} are {layout.names}, those of store {config.store} {known}: use another"
        )
    names = layout.names or known
    unnamed = any(scan.label for scan in layout.scans) and names == _names_of_values(names.values())
    return None if unnamed else names


def _preparations(config: PrepareConfig, known: store.Settings | None) -> tuple[dict[str, Any], ...]:
    """What the store was made with so far, one config per source folder, the newest of each."""
    ours, earlier = config.model_dump(mode="json", exclude={"store", "ray"}), known.preparations if known else ()
    if any(said["source"] == config.source for said in earlier):
        return tuple(ours if said["source"] == config.source else said for said in earlier)
    return (*earlier, ours)


def _vanished(config: PrepareConfig, layout: Layout, records: Iterable[store.ScanRecord]) -> Iterator[str]:
    """Scans that were made from this source folder and whose files are gone. Of DICOM, whose folder may stay, the
    series that is not found any more, unless it was not looked for or cannot be used."""
    root, found = Path(config.source).resolve(), {source.scan_id for source in layout.scans}
    faulty = {fault.source for fault in layout.faults}
    for record in records:
        path = Path(record.source)
        if record.scan_id in found or not path.is_relative_to(root):
            continue
        if not path.exists() or (path.is_dir() and not config.series and record.source not in faulty):
            yield record.scan_id


def _tell_same_content(records: dict[str, store.ScanRecord], here: set[str]) -> None:
    """Prints which scans hold the same voxels, where one of them was looked at now."""
    same = defaultdict(list)
    for record in records.values():
        same[record.content_hash].append(record)
    groups = [group for group in same.values() if len(group) > 1 and here & {record.scan_id for record in group}]
    groups.sort(key=lambda group: len({record.split for record in group}) == 1)  # two splits first
    for group in groups[:NUM_SHOWN]:
        listed = ", ".join(f"{one.scan_id} ({one.split or 'no split'})" for one in group[:NUM_SHOWN])
        split = ", in two splits" if len({record.split for record in group}) > 1 else ""
        print(f"prepare: note: the same voxels{split}: {listed}{' ...' * (len(group) > NUM_SHOWN)}", flush=True)
    if len(groups) > NUM_SHOWN:
        print(f"prepare: {counted(len(groups), 'group')} of scans with the same voxels in all", flush=True)


def _beside_another(source: Source, scans: Sequence[Source]) -> bool:
    """Whether another volume lies in a scan's folder: then what is no CT was only taken along."""
    folder = Path(source.image).parent
    return any(one is not source and folder in (Path(one.image), Path(one.image).parent) for one in scans)


def _note_of(source: Source, text: str) -> dict[str, Any]:
    return {"source": source.image, "reason": text, "shown": True}


def _names_of_values(values: Iterable[int]) -> dict[str, int]:
    return {f"label_{value}": value for value in sorted(values)}


def _unchanged(source: Source, record: store.ScanRecord) -> bool:
    try:
        return (record.source, record.source_size, record.source_mtime_ns) == (source.image, *source.stamp())
    except OSError:  # the task will say what is wrong
        return False


# -- converting -------------------------------------------------------------------------------------------------------


def _outcomes(
    config: PrepareConfig, folder: str, token: str, tasks: list[Task], names: dict[str, int] | None
) -> Iterator[tuple[Source, str, str, list[dict], store.ScanRecord | None]]:
    """Converts in parallel; yields (source, status, reason, notes, record) as scans are done."""
    options = {key: getattr(config, key) for key in ("hu_window", "chunk", "encoding", "compression", "spacing_mm")}
    work = partial(convert, folder=folder, token=token, names=names, options=options)
    peak = partial(_largest_peak, [source for source, _ in tasks], config.spacing_mm)
    with closing(in_parallel(work, tasks, config.ray, peak)) as rows:
        for row in rows:
            record = pickle.loads(row["record"])
            yield tasks[row["task"]][0], row["status"], row["reason"], json.loads(row["notes"]), record


def in_parallel(
    work: Callable[[dict], dict],
    items: list[tuple],
    config: RayConfig,
    peak: Callable[[], int] | None = None,
) -> Iterator[dict]:
    """Calls `work` with {"task": number, "item": pickled item} in Ray tasks, one per core; yields the answers.

    Every task gets its own item alone, for a list of DICOM series fills a hundred megabytes. `peak` says the
    memory that one may take, in bytes.
    """
    if not items:
        return
    from pgl_ray.train import launch, nodes  # here: they take torch along, and a run with nothing to do need not wait

    launch.connect(config)
    import ray.data

    here = nodes.cluster()
    own = {"CPU": 1.0, **(here.memory(peak()) if peak else {})}
    # a cluster of our own on this machine has at least 4 CPUs by name, for the trainings' sake
    ours = not (config.address or os.environ.get("RAY_ADDRESS"))
    cores = config.num_cpus or os.cpu_count() or 1
    if not ours:  # all nodes' that can come; Ray Data asks for as many as it has tasks for
        cores = len(items) if here.unknown else max(1, here.room(own))
        nodes.ask_for(own, min(cores, len(items)))
    rows = [{"task": i, "item": pickle.dumps(item)} for i, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    yield from dataset.map(
        work, num_cpus=1, memory=own.get("memory"), compute=ray.data.TaskPoolStrategy(size=min(cores, len(rows)))
    ).iter_rows()


def _largest_peak(sources: Sequence[Source], spacing_mm: tuple[float, float, float] | None) -> int:
    """Memory that a conversion may take in bytes, by the largest files' headers."""
    return max(peak_bytes(source, spacing_mm) for source in heapq.nlargest(NUM_LARGEST, sources, key=_num_bytes))


def _num_bytes(source: Source) -> int:
    try:
        return source.stamp()[0]
    except OSError:  # it will fail as a scan, with this reason
        return 0


def peak_bytes(source: Source, spacing_mm: tuple[float, float, float] | None) -> int:
    """Memory that a conversion takes, by the source's header; 0 where that cannot be read."""
    try:
        num, voxel_mm3 = source.extent()
    except (ValueError, OSError):  # it will fail as a scan, with this reason
        return 0
    result = num * voxel_mm3 / math.prod(spacing_mm) if spacing_mm else 0
    return int(PEAK_BYTES_PER_VOXEL * num + PEAK_BYTES_PER_RESAMPLED * result)


def convert(row: dict, folder: str, token: str, names: dict[str, int] | None, options: dict[str, Any]) -> dict:
    """Converts one scan; runs in a Ray task.

    Args:
        row: "task", its number in this run, and "item", the pickled Task.
        folder: of the store, absolute, or its URL.
        token: of the run's lock.
        names: organ name -> label value; none: any value may occur.
        options: hu_window, chunk, encoding, compression and spacing_mm.

    Returns:
        task, status ("converted", "unchanged", "failed", "label map", "disk
        full"), the reason of a failure, notes (JSON: a list
        of source, reason, and whether it is shown), and the scan's pickled record or None.
    """
    task, status, reason, notes, record = pickle.loads(row["item"]), "failed", "", [], None
    try:
        with store.open_place(folder).joined(token):
            if _tries(folder, row["task"]) > MAX_TRIES:
                raise ValueError(f"its worker died {MAX_TRIES} times: out of memory, or a library crashed on it")
            status, notes, record = _convert(task, folder, names, options)
    except OSError as error:
        status, reason = ("disk full" if error.errno in DISK_FULL else "failed"), str(error)
    except ValueError as error:
        status, reason = ("label map" if isinstance(error, LabelMap) else "failed"), str(error)
    except Exception as error:  # whatever else a damaged file may cause must not stop the other scans
        reason = f"{type(error).__name__}: {error}"
    said = {"task": row["task"], "status": status, "reason": reason, "notes": json.dumps(notes)}
    return said | {"record": pickle.dumps(record)}


def _tries(folder: str, task: int) -> int:
    """Counts the starts of a task, because Ray starts it for ever when its worker dies by it."""
    place, key = store.open_place(folder, synced=False), f".part/tries/{task}"
    place.write(f"{key}/{uuid.uuid4().hex}", [])
    return len(place.names(key))


def _convert(
    task: Task, folder: str, names: dict[str, int] | None, options: dict[str, Any]
) -> tuple[str, list[dict[str, Any]], store.ScanRecord]:
    source, known = task
    size, time_ns = source.stamp()
    digest = source.digest()
    if known and digest == known.source_hash:
        if known.source == source.image or not os.path.exists(known.source):
            known = replace(known, source_size=size, source_mtime_ns=time_ns)
            store.update_record(folder, known)
        return "unchanged", [], known
    if known and known.source != source.image:
        raise ValueError(
            f"{source.image}: the store has another {source.scan_id!r}, from {known.source}: rename it, or prepare it "
            "into another store"
        )
    reading = source.read(names)
    scan, label = reading.scan, reading.label
    unknown = sorted(set(store.count_labels(label)) - set(names.values())) if label is not None and names else []
    if unknown:
        raise ValueError(f"{source.label}: label values {unknown} are not among {names}: add them to labels.names")
    voxels, affine, own = scan.voxels, scan.affine, label
    if options["spacing_mm"]:
        voxels, label, affine = resample(voxels, label, affine, options["spacing_mm"])
    record = store.write_scan(
        folder,
        source.scan_id,
        voxels,
        affine,
        label=label,
        labelled=reading.labelled or (),
        source_label=None if label is own else own,
        source_affine=scan.affine,
        split=source.split,
        orientation=scan.orientation,
        rounding_error_hu=scan.rounding_error_hu,
        num_padding=scan.num_padding,
        source=source.image,
        source_size=size,
        source_mtime_ns=time_ns,
        source_hash=digest,
        **{key: options[key] for key in ("hu_window", "chunk", "encoding", "compression")},
    )
    notes = [{"source": path, "reason": reason, "shown": True} for path, reason in reading.notes]
    notes += [{"source": path, "reason": what, "shown": False} for path, what in reading.unasked]
    return "converted", notes, record


def _note(place: store.Place, notes: dict[str, list[dict[str, Any]]]) -> None:
    """Prints what was said of scans as they were converted, but for matters of course, and keeps it."""
    shown = [line for said in notes.values() for line in said if line["shown"]]
    for line in shown[:NUM_SHOWN]:
        print(f"prepare: note: {line['source']}: {line['reason']}")
    if len(shown) > NUM_SHOWN:
        print(f"prepare: {len(shown)} notes in all, see {place.url}/{NOTES_FILE}", flush=True)
    keep_notes(place, notes)


def finish_store(
    folder: str, records: dict[str, store.ScanRecord], sources: list[Source], names: dict[str, int] | None
) -> dict[str, int]:
    """Updates what needs no new conversion in the records: path, split, labelled organs; returns the organ names."""
    by_id = {source.scan_id: source for source in sources}
    unnamed = names is None
    if unnamed:
        names = _names_of_values({value for record in records.values() for value in record.label_voxels})
    for record in list(records.values()):
        source, new = by_id.get(record.scan_id), record
        if source:
            new = replace(new, source=source.image, split=source.split)
        if record.label_metadata and (source or unnamed):
            stated = source.labelled if source else None
            if source and source.structures:  # no more than what was filled, whatever a table says
                filled = {*record.labelled, *record.label_voxels}
                stated = record.labelled if stated is None else tuple(value for value in stated if value in filled)
            new = replace(new, labelled=tuple(sorted(names.values())) if stated is None else stated)
        if new != record:
            store.update_record(folder, new)
            records[new.scan_id] = new
    return names


def describe(result: Result) -> str:
    """The closing line.

    Raises:
        FailedRun: some files could not be used; the first of them are printed before.
    """
    done = f"{result.converted} converted, {result.skipped} already there"
    if result.vanished:
        names = f"{', '.join(result.vanished[:NUM_SHOWN])}{' ...' * (len(result.vanished) > NUM_SHOWN)}"
        which, verb = ("its", "stays") if len(result.vanished) == 1 else ("their", "stay")
        gone = f"{counted(len(result.vanished), 'scan')} {verb} in the store while {which} files are gone"
        print(f"prepare: {gone}: {names}")
    for line in grouped(result.left_out):
        print(f"prepare: {line}")
    if result.left_out:
        print(f"prepare: all of them in {result.store}/left_out.jsonl", flush=True)
    if not result.failed:
        return f"prepare: {done}, {counted(result.num_scans, 'scan')} in {result.index}, {result.seconds:.0f} s"
    for fault in result.failed[:NUM_SHOWN]:
        print(f"  failed: {fault.source}: {fault.reason.removeprefix(fault.source + ': ')}", file=sys.stderr)
    raise FailedRun(f"{counted(len(result.failed), 'file')} failed (all in {result.store}/failed.jsonl), {done}")


def describe_verified(found: Verified) -> str:
    """The closing line; FailedRun, after a line on stderr for each, where something is damaged."""
    for name, reason in found.damaged.items():
        print(f"  damaged: scan {name!r}: {reason.split(': python -m')[0]}", file=sys.stderr)
    if found.index:
        print(f"  index.parquet {found.index}", file=sys.stderr)
    if found.damaged or found.index:
        raise FailedRun(
            f"{len(found.damaged)} of {found.num_scans} scans are damaged{', and the index' * bool(found.index)}: "
            f"python -m pgl_ray.prepare repair store={found.store}"
        )
    verb = "is" if found.num_scans == 1 else "are"
    scans = f"{counted(found.num_scans, 'scan')} in {found.store}"
    return f"prepare verify: {scans} {verb} whole, {found.seconds:.0f} s"


def describe_repaired(done: tuple[Verified, dict[str, str]]) -> str:
    """The closing line; FailedRun, after a line on stderr for each, where scans could not be mended."""
    found, left = done
    for name, reason in left.items():
        print(f"  not mended: scan {name!r}: {reason}", file=sys.stderr)
    if left:
        raise FailedRun(f"{len(left)} of {len(found.damaged)} damaged scans could not be converted again")
    names = f" ({', '.join(sorted(found.damaged))})" if found.damaged else ""
    return f"prepare repair: {len(found.damaged)} of {counted(found.num_scans, 'scan')} converted again{names}"
