"""Door: CT files -> store. Ray Data converts one scan per task; a bad scan is written down and the others go on.

Every whole scan carries its own record, so the same command continues a run that was killed: what lies in the store
already is recognised by its file's size and time, or by its hash, and is left alone.
"""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pgl_ray.config import FailedRun, PrepareConfig, command
from pgl_ray.data import store
from pgl_ray.data.layout import Fault, Layout, Source, read_layout

PEAK_BYTES_PER_VOXEL = 16  # of a conversion, label map included
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
        seconds: wall time.
    """

    store: str
    index: str
    num_scans: int
    converted: int
    skipped: int
    failed: tuple[Fault, ...]
    seconds: float


@dataclass(frozen=True)
class Task:
    """A scan to convert, unless its files have the hash of what the store has under its scan_id."""

    source: Source
    known: store.ScanRecord | None


def run(config: PrepareConfig) -> Result:
    """Converts what is new or changed, and writes the index; what cannot be converted is in the result.

    Raises:
        ValueError: no volume in the source, or source and store do not agree.
        FailedRun: the disk is full.
    """
    began = time.monotonic()
    folder = os.path.abspath(config.store)
    layout = read_layout(config.source, config.labels, config.recipe, config.series)
    names = _agreed_names(config, layout)
    if not Path(folder, "store.json").is_file():
        store.write_settings(folder, names or {}, config.hu_window)

    # what is new or changed
    records = store.read_records(folder)
    pairs = [(source, records.get(source.scan_id)) for source in layout.scans]
    stored = [source for source, record in pairs if record and _unchanged(source, record)]
    known = {source.scan_id for source in stored}
    tasks = [Task(source, record) for source, record in pairs if source.scan_id not in known]
    print(f"prepare: {len(layout.scans)} scans in {config.source}, {len(tasks)} new or changed", flush=True)
    _tell(layout, folder)

    # convert
    converted, failed = 0, list(layout.faults)
    with _part_folder(folder), closing(_outcomes(config, folder, tasks, names)) as outcomes:
        for source, status, reason in _watched(outcomes, len(tasks)):
            if status == "disk full":
                raise FailedRun(f"disk full at {folder}: free some space, then the same command goes on from here")
            if status == "failed":
                failed.append(Fault(source.image, reason))
            else:
                stored.append(source)
                converted += status == "converted"

    # index
    failed.sort()
    names = _finish(folder, stored, names)
    index = store.write_index(folder, names, config.hu_window)
    store.write_aside(Path(folder, "failed.jsonl"), _json_lines(failed))
    path, seconds = str(Path(folder, "index.parquet")), time.monotonic() - began
    return Result(folder, path, len(index.scans), converted, len(stored) - converted, tuple(failed), seconds)


# -- what to do -------------------------------------------------------------------------------------------------------


def _agreed_names(config: PrepareConfig, layout: Layout) -> dict[str, int] | None:
    """Organ names of source and store; none: nobody names them, so they will be called by the values found.

    Raises:
        ValueError: the store has another HU window or other names.
    """
    known: dict[str, int] = {}
    if Path(config.store, "store.json").is_file():
        known, window = store.read_settings(config.store)
        if window != config.hu_window:
            raise ValueError(
                f"hu_window={config.hu_window}: store {config.store} has {window}: use that or another store"
            )
    if layout.names and known and layout.names != known:
        raise ValueError(
            f"labels of {config.source} are {layout.names}, those of store {config.store} {known}: use another"
        )
    names = layout.names or known
    unnamed = any(scan.label for scan in layout.scans) and names == _names_of_values(names.values())
    return None if unnamed else names


def _tell(layout: Layout, folder: str) -> None:
    """Prints what is missing and what is left out; left_out.jsonl has all of it."""
    for missing in layout.missing:
        print(f"prepare: missing: {missing}")
    for path, reason in layout.left_out[:NUM_SHOWN]:
        print(f"prepare: left out: {path}: {reason}")
    if len(layout.left_out) > NUM_SHOWN:
        print(f"prepare: {len(layout.left_out)} left out in all, see {folder}/left_out.jsonl", flush=True)
    store.write_aside(Path(folder, "left_out.jsonl"), _json_lines(layout.left_out))


def _json_lines(faults: Iterable[Fault]) -> bytes:
    return "".join(json.dumps(fault._asdict()) + "\n" for fault in faults).encode()


def _names_of_values(values) -> dict[str, int]:
    return {f"label_{value}": value for value in sorted(values)}


def _unchanged(source: Source, record: store.ScanRecord) -> bool:
    try:
        return (record.source, record.source_size, record.source_mtime_ns) == (source.image, *source.stamp())
    except OSError:  # the task will say what is wrong
        return False


# -- converting -------------------------------------------------------------------------------------------------------


def _outcomes(
    config: PrepareConfig, folder: str, tasks: list[Task], names: dict[str, int] | None
) -> Iterator[tuple[Source, str, str]]:
    """Converts in parallel; yields (source, status, reason) as scans are done."""
    if not tasks:
        return
    from pgl_ray.train import launch  # here, because it takes torch along, and a run with nothing to do need not wait

    launch.connect(config.ray)
    import ray.data

    options = {"hu_window": config.hu_window, "chunk": config.chunk}
    dataset = ray.data.from_items([{"task": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
    work = partial(convert, tasks=tasks, folder=folder, names=names, options=options)
    for row in dataset.map(work, num_cpus=1, memory=_memory_per_task(tasks)).iter_rows():
        yield tasks[row["task"]].source, row["status"], row["reason"]


def _memory_per_task(tasks: list[Task]) -> float:
    """Memory to reserve per conversion in bytes, by the largest file's header; at most what a node has."""
    import ray

    try:
        largest = max((task.source for task in tasks), key=lambda source: source.stamp()[0])
        need = PEAK_BYTES_PER_VOXEL * largest.num_voxels()
    except (ValueError, OSError):  # it will fail as a scan, with this reason
        need = 0
    return float(min(need, max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])))


def convert(row: dict, tasks: list[Task], folder: str, names: dict[str, int] | None, options: dict[str, Any]) -> dict:
    """Converts one scan; runs in a Ray task.

    Args:
        row: "task", the place in `tasks`.
        folder: of the store, absolute.
        names: organ name -> label value; none: any value may occur.
        options: hu_window and chunk.

    Returns:
        task, status ("converted", "unchanged", "failed", "disk full"), and the reason of a failure.
    """
    task = tasks[row["task"]]
    status, reason = "failed", ""
    try:
        if _tries(folder, row["task"]) > MAX_TRIES:
            raise ValueError(f"its worker died {MAX_TRIES} times: out of memory, or a library crashed on it")
        status = _convert(task, folder, names, options)
    except OSError as error:
        status, reason = ("disk full" if error.errno in DISK_FULL else "failed"), str(error)
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # whatever else a damaged file may cause must not stop the other scans
        reason = f"{type(error).__name__}: {error}"
    return {"task": row["task"], "status": status, "reason": reason}


@contextmanager
def _part_folder(folder: str) -> Iterator[None]:
    """Empties and offers STORE/.part, where scans lie until they are whole."""
    part = Path(folder, ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tries(folder: str, task: int) -> int:
    """Counts the starts of a task, because Ray starts it for ever when its worker dies by it."""
    path = Path(folder, ".part", f"{task}.tries")
    with path.open("ab") as file:
        file.write(b".")
    return path.stat().st_size


def _convert(task: Task, folder: str, names: dict[str, int] | None, options: dict[str, Any]) -> str:
    source = task.source
    size, time_ns = source.stamp()
    digest = source.digest()
    if task.known and digest == task.known.source_hash:
        store.update_record(folder, replace(task.known, source_size=size, source_mtime_ns=time_ns))
        return "unchanged"
    if task.known and task.known.source != source.image:
        raise ValueError(
            f"{source.image}: the store has another {source.scan_id!r}, from {task.known.source}: rename it"
        )
    scan, label = source.read(names)
    unknown = sorted(set(store.count_labels(label)) - set(names.values())) if label is not None and names else []
    if unknown:
        raise ValueError(f"{source.label}: label values {unknown} are not among {names}: add them to labels.names")
    store.write_scan(
        folder,
        source.scan_id,
        scan.voxels,
        scan.affine,
        label=label,
        split=source.split,
        orientation=scan.orientation,
        rounding_error_hu=scan.rounding_error_hu,
        num_padding=scan.num_padding,
        source=source.image,
        source_size=size,
        source_mtime_ns=time_ns,
        source_hash=digest,
        **options,
    )
    return "converted"


def _finish(folder: str, sources: list[Source], names: dict[str, int] | None) -> dict[str, int]:
    """Updates what needs no new conversion in the records: path, split, labelled organs; returns the organ names."""
    records, by_id = store.read_records(folder), {source.scan_id: source for source in sources}
    unnamed = names is None
    if unnamed:
        names = _names_of_values({value for record in records.values() for value in record.label_voxels})
    for record in records.values():
        source, new = by_id.get(record.scan_id), record
        if source:
            new = replace(new, source=source.image, split=source.split)
        if record.label_metadata and (source or unnamed):
            stated = source.labelled if source else None
            new = replace(new, labelled=tuple(sorted(names.values())) if stated is None else stated)
        if new != record:
            store.update_record(folder, new)
    return names


def _watched(outcomes: Iterator, total: int) -> Iterator:
    """Shows scans done, rate and time left: one line in a terminal, a line every ten seconds elsewhere."""
    live = sys.stdout.isatty()
    first = shown = time.monotonic()
    for done, outcome in enumerate(outcomes):
        yield outcome
        now = time.monotonic()
        if not done:
            first = shown = now  # the rate leaves out Ray's start
        elif now - shown > (1 if live else 10):
            shown, rate = now, done / (now - first)
            left = time.strftime("%H:%M:%S", time.gmtime((total - done - 1) / rate))
            line = f"  {done + 1}/{total} scans, {rate:.2g} scans/s, {left} left"
            print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", flush=True)
    if live:
        print(end="\r\x1b[K")


def describe(result: Result) -> str:
    """The closing line.

    Raises:
        FailedRun: some files could not be used; the first of them are printed before.
    """
    done = f"{result.converted} converted, {result.skipped} already there"
    if not result.failed:
        return f"prepare: {done}, {result.num_scans} scans in {result.index}, {result.seconds:.0f} s"
    for fault in result.failed[:NUM_SHOWN]:
        print(f"  failed: {fault.source}: {fault.reason.removeprefix(fault.source + ': ')}", file=sys.stderr)
    raise FailedRun(f"{len(result.failed)} files failed (all in {result.store}/failed.jsonl), {done}")


def main() -> None:
    command("prepare", PrepareConfig, run, describe)


if __name__ == "__main__":
    main()
