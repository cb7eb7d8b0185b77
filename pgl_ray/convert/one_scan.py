"""One scan: files -> store, in a Ray task; and the memory that it takes."""

import heapq
import json
import math
import os
import pickle
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from pgl_ray.config import PrepareConfig
from pgl_ray.convert import parallel
from pgl_ray.convert.todo import Task
from pgl_ray.data import scan_files, store, voxel_statistics
from pgl_ray.data.durable import DISK_FULL
from pgl_ray.files.plausible import LabelMap
from pgl_ray.files.resample import resample
from pgl_ray.files.source import Source

PEAK_BYTES_PER_VOXEL = 8  # of a conversion, label map included (tests/benchmarks/test_prepare_cost.py)
PEAK_BYTES_PER_RESAMPLED = 10  # voxel of the result, besides the source's own
NUM_LARGEST = 8  # files whose headers say how much memory a conversion takes
MAX_TRIES = 3


def outcomes(
    config: PrepareConfig, folder: str, token: str, tasks: list[Task], names: dict[str, int] | None
) -> Iterator[tuple[Source, str, str, list[dict], store.ScanRecord | None]]:
    """Converts in parallel; yields (source, status, reason, notes, record) as scans are done."""
    options = {key: getattr(config, key) for key in ("hu_window", "chunk", "encoding", "compression", "spacing_mm")}
    work = partial(convert, folder=folder, token=token, names=names, options=options)
    peak = partial(_largest_peak, [source for source, _ in tasks], config.spacing_mm)
    with closing(parallel.in_parallel(work, tasks, config.ray, peak)) as rows:
        for row in rows:
            record = pickle.loads(row["record"])
            yield tasks[row["task"]][0], row["status"], row["reason"], json.loads(row["notes"]), record


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
    answer = {"task": row["task"], "status": status, "reason": reason, "notes": json.dumps(notes)}
    return answer | {"record": pickle.dumps(record)}


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
    was_moved = bool(source.masks) and source.digest(with_values=False) == (known and known.source_hash)
    if known and known.source != source.image and not was_moved:
        raise ValueError(
            f"{source.image}: the store has another {source.scan_id!r}, from {known.source}: rename it, or prepare it "
            "into another store"
        )
    reading = source.read(names)
    scan, label = reading.scan, reading.label
    unknown = (
        sorted(set(voxel_statistics.count_labels(label)) - set(names.values())) if label is not None and names else []
    )
    if unknown:
        mend = "prepare into another store, with them in labels.names"  # a store keeps its names
        raise ValueError(f"{source.label}: label values {unknown} are not among {names}: {mend}")
    voxels, affine, read_label = scan.voxels, scan.affine, label
    if options["spacing_mm"]:
        voxels, label, affine = resample(voxels, label, affine, options["spacing_mm"])
    record = scan_files.write_scan(
        folder,
        source.scan_id,
        voxels,
        affine,
        label=label,
        labelled=reading.labelled or (),
        source_label=None if label is read_label else read_label,
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
