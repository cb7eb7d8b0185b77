"""python -m pgl_ray.embed init=RUN index=STORE output=DIR [a.b=c ...]: a vector per CT of a frozen encoder.

`input=CTs` takes files instead of a store. One scan is in memory at a time, in each of the processes; what is finished
is kept, so the same command continues an interrupted one and adds what is new.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("embed")

import json
import os
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgl_ray import api
from pgl_ray.config import EmbedConfig, FailedRun
from pgl_ray.data.durable import check_writable, put_in_place, write_aside
from pgl_ray.data.place import open_place
from pgl_ray.data.store import Index
from pgl_ray.data.system import num_cores
from pgl_ray.files.accounts import skipped
from pgl_ray.files.scans import ScanFile, StoredScan, scan_files, stored_scans
from pgl_ray.files.source import Fault
from pgl_ray.judge import vectors
from pgl_ray.judge.embedding import NO_MEMORY, Embedder, made_by, made_of
from pgl_ray.judge.features import ScanEncoder, spacing_of
from pgl_ray.judge.readings import NUM_VIEWS
from pgl_ray.model.inference import pick_device
from pgl_ray.pages import embed_page
from pgl_ray.train.progress import Stage, num_of

PAGE, STATISTICS = "embed.html", "preparation.npz"
FEW = 32  # scans for which Ray is not started
EVERY_S = 10.0  # between two writes of what is finished
BYTES_PER_VOXEL = 24  # of a scan while it is encoded, maps included
PROCESS_BYTES = 10**9  # of a process beside that
NUM_NAMED = 5  # names in a line


class Result(NamedTuple):
    """What was done.

    Attributes:
        output: folder.
        num_scans: in the table.
        num_finished_before: of them.
        num_features: length of a vector.
        reading: state of BatchNorm in words.
        seconds: of embedding only, without the start of Ray and the page.
    """

    output: str
    num_scans: int
    num_finished_before: int
    num_features: int
    reading: str
    seconds: float


def run(config: EmbedConfig) -> Result:
    """Writes embeddings.parquet, embed.html and, with `dense`, dense/SCAN_ID.zarr.

    Raises:
        ValueError: scans, weights or output cannot be used.
        FailedRun: some scans failed; the others are in the table.
    """
    index = api.open_store(config.index) if config.index else None
    output = Path(config.output)
    if config.input:
        scans, faults, left_out = scan_files(Path(config.input), without=[output])
    else:
        scans, faults, left_out = stored_scans(index), [], []
    check_writable(f"output={config.output}", output.absolute())
    encoder, reading = _encoder(config, index, output)
    spacing = spacing_of(config.spacing, encoder)
    names = tuple(encoder.names[level] for level in encoder.levels(config.maps))
    facts = vectors.about(config, encoder, names, reading)
    before = _finished(config, output, scans, facts, spacing)
    todo = [scan for scan in scans if scan.scan_id not in before]
    known = f", {len(before)} of them done before" if before else ""
    print(f"embed: {len(scans)} scan{'s' * (len(scans) != 1)}{known}; maps {', '.join(names)}; {reading}", flush=True)

    folder = str(output) if config.dense else None
    rows, failed, label_maps, seconds = dict(before), {}, {}, 0.0
    if todo:
        work = encoder, names, spacing, folder
        with Stage("embed:", "scan", len(todo), starts=True) as stage:
            fresh, failed, label_maps, seconds = _embedded(config, work, todo, output, facts, stage)
        rows |= fresh
    if config.input and len(scans) == 1 and not rows and not faults:
        (reason,) = (label_maps | failed).values()
        raise (FailedRun if reason == NO_MEMORY else ValueError)(f"input={config.input}: {reason}")
    failed |= {fault.source: fault.reason.removeprefix(f"{fault.source}: ") for fault in faults}
    ordered = [rows[scan.scan_id] for scan in scans if scan.scan_id in rows]
    _note(ordered)
    if rows:
        _finish(output, ordered, facts, {scan.scan_id for scan in scans}, spacing)
    for line in skipped(starmap(Fault, failed.items()), [*left_out, *starmap(Fault, label_maps.items())]):
        print(f"embed: {line}", flush=True)
    if not rows:
        raise FailedRun(_failures(label_maps | failed, len(scans) + len(faults)))
    scans_by_id = {scan.scan_id: scan for scan in scans if scan.scan_id in rows}
    page = embed_page.make_page(ordered, scans_by_id, encoder, spacing, config.pictures, facts)
    write_aside(output / PAGE, page.encode())
    if failed:
        raise FailedRun(f"{_failures(failed, len(scans) + len(faults))}; the others are in {output / vectors.TABLE}")
    return Result(str(output), len(ordered), len(before), len(ordered[0]["vector"]), reading, seconds)


# -- the encoder ------------------------------------------------------------------------------------------------------


def _encoder(config: EmbedConfig, index: Index | None, output: Path) -> tuple[ScanEncoder, str]:
    """The encoder that embeds scans, and a description of its BatchNorm.

    Statistics that were estimated once are stored with the table: a store that has grown since would give others, and
    then no vector could be compared with those of before.
    """
    options = {"hu_window": config.hu_window, "size": config.size, "seed": config.seed, "spacing": config.spacing}
    encoder = api.load_encoder(config.init, index, **options, reestimate=False)
    if encoder.reading == "none":
        return encoder, "no BatchNorm"
    if index is None:
        return encoder, "BatchNorm as trained"
    views = [config.seed, *(spacing_of(config.spacing, encoder) or ())]
    key, path = json.dumps([encoder.hash, index.store, *views]), output / STATISTICS
    reading = f"BatchNorm re-estimated on {NUM_VIEWS} views of {index.store}"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                statistics = {name: file[name] for name in file.files if name != "key"}
                return encoder.with_statistics(statistics), f"{reading}, kept in {path.name}"
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # none there, or damaged
    encoder = api.load_encoder(config.init, index, **options)
    aside = path.with_name(f".part{os.getpid()}.npz")
    try:
        np.savez(aside, key=key, **encoder.statistics())
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return encoder, reading


# -- embedding --------------------------------------------------------------------------------------------------------


def _embedded(
    config: EmbedConfig,
    work: tuple,
    todo: list[StoredScan | ScanFile],
    output: Path,
    facts: dict[str, Any],
    stage: Stage,
) -> tuple[dict[str, dict], dict[str, str], dict[str, str], float]:
    """Rows of new scans, why others have none, which are label maps, and seconds.

    Label maps beside CTs are none of this door's business, so they are left out and no failure. What is finished is
    written every few seconds.
    """
    rows, failed, label_maps, waiting = {}, {}, {}, []
    began = saved_at = None
    try:
        for row in _rows(config, work, todo):
            if began is None:  # Ray is running
                began = saved_at = row
                continue
            if "failed" not in row and config.dense and not made_of(output, row["scan_id"]):
                row["failed"] = f"its maps are not in {output}: all nodes must share that folder"
            if "failed" in row:
                (label_maps if "no_ct" in row else failed)[row["scan_id"]] = row["failed"]
            else:
                rows[row["scan_id"]] = row
                waiting.append(row)
            if time.monotonic() - saved_at > EVERY_S:
                saved_at = time.monotonic()
                vectors.write_part(output, waiting, facts)
                waiting = []
            stage.advance(num_of(failed | label_maps, "left out"))
    finally:  # an interrupted call keeps what it has
        vectors.write_part(output, waiting, facts)
    return rows, failed, label_maps, time.monotonic() - began


def _rows(config: EmbedConfig, work: tuple, todo: list[StoredScan | ScanFile]) -> Iterator[Any]:
    """First the time at which the processes were asked for their first scan, then a row per scan."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    local = len(todo) <= FEW or torch.cuda.is_available()
    if not address and (config.workers == 1 or (config.workers is None and local) or len(todo) == 1):
        embedder = Embedder(*work, device=str(pick_device("auto")))
        yield time.monotonic()
        for scan in todo:
            yield embedder.row(scan)
        return
    yield from _on_ray(config, work, todo, bool(address))


def _on_ray(config: EmbedConfig, work: tuple, todo: list[StoredScan | ScanFile], shared: bool) -> Iterator[Any]:
    """An actor per core, or per GPU; each is given a scan when it is done with the one before."""
    from pgl_ray.train import launch, nodes

    launch.connect(config.ray)
    import ray

    cluster = nodes.cluster()
    gpus, cores = int(cluster.limit("GPU")), int(cluster.limit("CPU"))
    asked = cluster.memory(PROCESS_BYTES + BYTES_PER_VOXEL * _most_voxels(todo))
    need = int(asked.get("memory", 0))
    if not shared and not config.ray.num_cpus:
        cores = num_cores()  # ours has 4 by name at least
    fit = cluster.room(asked) if need else len(todo)
    wanted = min(config.workers or gpus or cores, len(todo))
    num = min(wanted, fit)
    if num < wanted:
        print(f"embed: {num} of {wanted} processes: each needs {need / 1e9:.1f} GB", flush=True)
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "memory": need, "max_restarts": 0}
    work[0].network.cpu()
    refs, remote = [ray.put(part) for part in work], ray.remote(Embedder).options(**options)

    def actor() -> Any:
        return remote.remote(*refs, device="cuda" if gpus else "cpu")

    yield time.monotonic()
    waiting, busy = deque(todo), {}
    for _ in range(num):
        embedder, scan = actor(), waiting.popleft()
        busy[embedder.row.remote(scan)] = embedder, scan
    while busy:
        (ready, *_), _ = ray.wait(list(busy))
        embedder, scan = busy.pop(ready)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            yield {"scan_id": scan.scan_id, "failed": f"its process died, perhaps for want of memory: {first}"}
            embedder = actor()
        if waiting:
            scan = waiting.popleft()
            busy[embedder.row.remote(scan)] = embedder, scan


def _most_voxels(todo: list[StoredScan | ScanFile]) -> int:
    """Of the largest scan; of files that of the most bytes, by its header."""
    try:
        return max(todo, key=lambda scan: scan.size()).num_voxels()
    except (ValueError, OSError):  # it will fail as a scan, with the reason
        return 0


# -- what is there already --------------------------------------------------------------------------------------------


def _finished(
    config: EmbedConfig,
    output: Path,
    scans: list[StoredScan | ScanFile],
    facts: dict[str, Any],
    spacing: tuple[float, float, float] | None,
) -> dict[str, dict]:
    """Rows of an earlier call that still hold: the same encoder and maps, and a scan that is what it was."""
    earlier, faults = vectors.read_earlier(output, facts)
    for fault in faults:
        print(f"embed: note: {fault}: made anew", flush=True)
    names, finished = sorted(one["name"] for one in facts["maps"]), {}
    for scan in scans:
        row = earlier.get(scan.scan_id)
        try:
            whole = row is not None and row["scan_hash"] == scan.stamp()
        except OSError:  # the file is gone or unreadable: its row of today will say so
            whole = False
        if whole and config.dense:
            wanted = {"maps": names} | made_by(row["encoder_hash"], row["scan_hash"], spacing)
            whole = made_of(output, scan.scan_id) == wanted
        if whole:
            finished[scan.scan_id] = row
    return finished


def _finish(
    output: Path,
    rows: list[dict],
    facts: dict[str, Any],
    asked: set[str],
    spacing: tuple[float, float, float] | None,
) -> None:
    """Writes the table; says what of an earlier one is not in it, and which maps beside it are not of its making."""
    replaced, gone = vectors.write_table(output, rows, facts, asked)
    if replaced:
        what = f"{output / vectors.TABLE} held vectors of another encoder, window (size=), maps or spacing"
        print(f"embed: note: {what}: it is replaced", flush=True)
    if gone:
        print(f"embed: note: no longer in the table, for they are not asked for: {_some(gone)}", flush=True)
    current = {f"{row['scan_id']}.zarr": row for row in rows}
    there = sorted(open_place(output).names("dense"))
    left = [name for name in there if name not in current]
    if left:
        print(f"embed: note: {output / 'dense'} holds maps of scans that are not in the table: {_some(left)}")
    other = [name for name in there if name in current and not _made_alike(output, current[name], spacing)]
    if other:
        what = f"{output / 'dense'} holds maps of another encoder, scan or voxel size than the table"
        print(f"embed: note: {what}, which dense=true makes anew: {_some(other)}")


def _made_alike(output: Path, row: dict, spacing: tuple[float, float, float] | None) -> bool:
    """Whether a scan's maps were made as its row was."""
    wanted = made_by(row["encoder_hash"], row["scan_hash"], spacing)
    return wanted.items() <= made_of(output, row["scan_id"]).items()


# -- what is said -----------------------------------------------------------------------------------------------------


def _note(rows: list[dict]) -> None:
    """In what scans are unlike those of the training, a line per kind."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for note in row["notes"]:
            kinds.setdefault(" ".join(note.split()[:3]), []).append((row["scan_id"], note))
    for noted in kinds.values():
        first, note = noted[0]
        mend = "; spacing=weights resamples them" if note.startswith("its voxels are") else ""
        print(f"embed: note: {len(noted)} of {len(rows)} scans, {first} for one: {note}{mend}", flush=True)


def _failures(failed: dict[str, str], num: int) -> str:
    return f"{len(failed)} of {num} scans failed: {_some([Path(name).name for name in failed])}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")


def describe(result: Result) -> str:
    """The closing line."""
    before = f", {result.num_finished_before} of them done before" if result.num_finished_before else ""
    scans = f"{result.num_scans} scan{'s' * (result.num_scans != 1)}{before}"
    table = Path(result.output, vectors.TABLE)
    each = f"{result.num_features} features each in {table}, {result.reading}"
    return f"embed: {scans}, {each}, {result.seconds:.1f} s"
