"""Run folders, checkpoints, and what is read back from them.

A run folder holds run.json (door, config, versions), config.yaml, metrics.jsonl, events.jsonl, TensorBoard events,
checkpoint_<step> folders (state.pt, and checkpoint.json with its sha256), and for fine-tuning best.pt. A checkpoint
folder gets its name when all of it is on the disk, so what has the name is whole. Runs of earlier versions have Ray
Train's snapshot of which checkpoints count instead; they are read, and continued, too. A run in a bucket is worked on
in copies of its folder (see bucket.py): what is asked of the run as a whole takes its URL, all else a folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

import pgl_ray
from pgl_ray.config import FailedRun, FinetuneConfig, PretrainConfig, build, to_yaml, without_gone
from pgl_ray.data.durable import put_in_place, write_aside
from pgl_ray.data.system import lock_file
from pgl_ray.train import bucket
from pgl_ray.train.bucket import EVENTS, MANIFEST, METRICS, NAME, SNAPSHOT, STATE
from pgl_ray.train.track import Tracker

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

T = TypeVar("T")
PREFIX = {"pretrain": "online.encoder.", "finetune": "encoder."}  # of the encoder's keys, by door
KEPT = 2  # newest checkpoints: where one is damaged, the one before is there
RETRY_S = 600.0  # that storage may fail before the run ends
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between two tries
FULL = (errno.ENOSPC, errno.EDQUOT)
# what a continued run may change
MAY_DIFFER = {
    "ray",
    "train",
    "health",
    "stream.on_error",
    "stream.max_skipped_share",
    "stream.on_gpu",
    *("stream.augment_on", "stream.resize_on"),  # the same in earlier versions
    "accumulate",
    "probe",
}


# -- run folders ------------------------------------------------------------------------------------------------------


def open_run(config: PretrainConfig | FinetuneConfig, door: str, facts: dict[str, Any]) -> str:
    """Creates the run's folder, or checks that an existing one belongs to the same config.

    Args:
        config: the door's.
        door: its name.
        facts: what else run.json records; "plan", the identity of the run's plan, must stay the same.

    Returns:
        The folder's absolute path, or its URL.

    Raises:
        ValueError: the folder holds another run or other files.
    """
    mirror = bucket.mirror(config.run)
    folder = mirror.folder if mirror else Path(config.run).absolute()
    place = mirror.url if mirror else str(folder)
    taken = mirror.match() if mirror else folder.is_file() or (folder.exists() and any(folder.iterdir()))
    wanted = json.loads(config.model_dump_json())
    if (folder / "run.json").exists():
        found = json.loads((folder / "run.json").read_text())
        if found["door"] != door:
            raise ValueError(f"run={config.run} is a {found['door']} run: choose another run=...")
        skip = MAY_DIFFER | {"run", "index"}
        stored, gone = without_gone(type(config), found["config"])
        with contextlib.suppress(ValueError):  # a setting that no version has known
            stored = json.loads(build(type(config), stored).model_dump_json())  # with the defaults of later settings
        names = _differences({k: v for k, v in wanted.items() if k not in skip}, stored)
        names += [f"{path} ({value} there, {was.value} here)" for path, (value, was) in gone.items()]
        changed = sorted(name for name in names if not {name.split(" ")[0], name.split(".")[0]} & MAY_DIFFER)
        if changed:
            raise ValueError(f"run={config.run} was started with another {', '.join(changed)}: choose another run=...")
        if found["plan"] != facts["plan"]:
            raise ValueError(
                f"run={config.run} was started on other scans than index={config.index} has now: choose another run=..."
            )
        return place
    if taken:
        raise ValueError(f"run={config.run} exists and is not a run of pgl_ray: choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"door": door, "config": wanted, "versions": versions(), "started": started, **facts}
    write_json(folder / "run.json", record)
    write_aside(folder / "config.yaml", to_yaml(config).encode())
    if mirror:
        mirror.put("run.json", "config.yaml")
    return place


def _differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = [_differences(wanted[k], found.get(k), f"{path}.{k}" if path else k) for k in wanted]
        return [name for part in names for name in part]
    return [] if wanted == found else [f"{path} ({found} there, {wanted} here)"]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one step."""
    write_aside(path, json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def alone(run: str) -> Iterator[tuple[Path, int] | None]:
    """One process at a time trains a run; the kernel frees the lock of a killed one. Gives what `recover` found.

    In a bucket, a killed one's lock is taken over after half a minute.

    Raises:
        ValueError: another process has the run.
        FailedRun: see `recover`.
    """
    mirror = bucket.mirror(run)
    with mirror.locked() if mirror else _locked(run) as token:
        _HELD[run] = token
        try:
            yield recover(run, token)
        finally:
            del _HELD[run]


_HELD: dict[str, str | None] = {}  # runs that this process has for itself, with the tokens of those in buckets


def held(run: str) -> str | None:
    """Token of the lock that this process has on a run in a bucket; none for a folder."""
    return _HELD.get(run)


@contextlib.contextmanager
def _locked(run: str) -> Iterator[None]:
    with lock_file(Path(run) / "run.lock") as lock:
        if not lock.take():
            lock.file.seek(0)
            holder = lock.file.read().strip() or "another process"
            raise ValueError(f"run={run} is being trained by {holder}: wait for it, or end it")
        lock.warn(f"run={run}")
        lock.file.truncate(0)
        lock.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.file.flush()
        yield


def committed(run: str | Path) -> tuple[Path, int] | None:
    """The newest checkpoint that was written to its end, and its step."""
    found = checkpoints(run)
    return found[-1] if found else None


def committed_step(run: str | Path) -> int:
    """Step at which the run continues; 0 for a new one. A run may lie in a bucket."""
    mirror = bucket.mirror(run)
    if mirror:
        return max(mirror.steps(), default=0)
    found = committed(run)
    return found[1] if found else 0


def checkpoints(run: str | Path) -> list[tuple[Path, int]]:
    """All checkpoints that were written to their end, with their steps, the newest last."""
    run = Path(run)
    named = {int(found[1]): place for place in run.glob("checkpoint_*") if (found := NAME.fullmatch(place.name))}
    old = _named_by_ray(run)
    whole = [step for step, place in named.items() if (place / MANIFEST).exists() or place.name in old]
    return [(named[step], step) for step in sorted(whole)]


def _named_by_ray(run: Path) -> set[str]:
    """Names of a run of an earlier version's checkpoints: of them only those in Ray Train's snapshot were whole.

    Ray does not write it aside: where it was cut off, all folders with a state are named, damaged ones among them.
    """
    try:
        snapshot = json.loads((run / SNAPSHOT).read_text())
    except FileNotFoundError:
        return set()
    except ValueError:
        return {state.parent.name for state in run.glob(f"checkpoint_*/{STATE}")}
    results = [*snapshot.get("checkpoint_results", []), snapshot["latest_checkpoint_result"]]
    return {result["checkpoint_dir_name"] for result in results if result}


def recover(run: str | Path, token: str | None = None) -> tuple[Path, int] | None:
    """The newest checkpoint whose bytes are those that were written, and its step; to be called before training.

    Damaged ones that are newer are renamed to *.damaged and noted, what a killed writer left is removed, and the
    checkpoints of an earlier version become ones of this version. Storage that fails is tried again for RETRY_S.

    Of a run in a bucket this is done to the working copy, and then in the bucket, where earlier workers write no more.

    Args:
        run: folder or URL.
        token: see `held`.

    Raises:
        FailedRun: there are checkpoints, all of them damaged; or another driver has taken the run over.
    """
    mirror = bucket.mirror(run)

    def work() -> tuple[Path, int] | None:
        if not mirror:
            return _recover(Path(run))
        mirror.claim(token)
        mirror.pull(damage_of)
        found = _recover(mirror.folder)
        mirror.push()
        return found

    return _patiently(work, f"run={run} cannot be read")


@contextlib.contextmanager
def joined(run: str, rank: int) -> Iterator[str]:
    """While it lasts, a worker works on the run: yields its folder, of a run in a bucket this machine's working copy,
    which holds what the worker continues from; what the worker writes is brought to the bucket.

    Raises:
        FailedRun: the bucket fails for RETRY_S, or no driver has the run.
    """
    mirror = bucket.mirror(run)
    if not mirror:
        yield run
        return
    _patiently(lambda: mirror.join(rank, damage_of), f"run={run} cannot be read")
    try:
        with mirror.kept_up():
            yield str(mirror.folder)
    except BaseException:
        with contextlib.suppress(OSError, ValueError, FailedRun):
            mirror.push_files()
        raise
    _patiently(mirror.push_files, f"run={run} cannot be written")


def _recover(run: Path) -> tuple[Path, int] | None:
    for left in [place for place in run.glob("checkpoint_*") if place.suffix in (".part", ".old")]:
        place = left.with_suffix("")
        if left.suffix == ".old" and not place.exists() and not damage_of(left):
            put_in_place(left, place)  # killed before another one took its place
        else:
            shutil.rmtree(left)
    damaged: list[tuple[Path, str]] = []
    found = checkpoints(run)
    for place, step in found:
        if not (place / MANIFEST).exists():
            write_json(place / MANIFEST, {"step": step})
    (run / SNAPSHOT).unlink(missing_ok=True)  # or Ray Train would miss what is deleted from now on
    while found:
        place, step = found.pop()
        fault = damage_of(place)
        if not fault:
            for bad, why in damaged:
                _set_aside(bad, ".damaged")
                note(run, f"checkpoint {bad.name} is damaged ({why}): continuing from {place.name}")
            return place, step
        damaged.append((place, fault))
    if damaged:
        told = f"all {len(damaged)} checkpoints are damaged ({damaged[0][1]})"
        raise FailedRun(f"run={bucket.shown(run)}: {told}: take a new run=...")
    return None


def damage_of(place: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, or none."""
    try:
        expected = json.loads((place / MANIFEST).read_text()).get("sha256")
        with (place / STATE).open("rb") as file:
            if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return f"{STATE} has another sha256 than when it was written"
        return None if expected else _zip_damage(place / STATE)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return f"{MANIFEST} is no JSON"


def _zip_damage(path: Path) -> str | None:
    """What the CRC-32 inside a file of torch.save say, which torch writes and does not check; none if all is well."""
    if not zipfile.is_zipfile(path):
        return "no zip file, or cut off"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged zip file raises a dozen kinds
        return f"{type(error).__name__}: {error}"
    return f"the CRC of {bad} is wrong" if bad else None


def _set_aside(place: Path, suffix: str) -> Path:
    aside = place.with_name(place.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    return place.rename(aside)


def _patiently(work: Callable[[], T], what: str) -> T:
    """What `work` returns, tried again for RETRY_S where storage fails."""
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return work()
        except OSError as error:
            refused = isinstance(error, PermissionError) and not error.filename  # by a bucket: waiting will not help
            if refused or time.monotonic() - began > RETRY_S:
                raise FailedRun(f"{what}: {error}") from error
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def note(run: str | Path, text: str) -> None:
    """Adds a line that the user should read to the run's events; the driver shows it. What cannot be written is written
    with the next one."""
    print(f"  {text}", flush=True)  # on the driver's console, or in a worker's log
    with _UNWRITTEN_LOCK:
        lines = _UNWRITTEN.setdefault(str(run), [])
        lines.append(json.dumps({"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "text": text}))
        with contextlib.suppress(OSError):
            path = bucket.events_file(run)
            path.parent.mkdir(exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write("".join(line + "\n" for line in lines).encode())
            del _UNWRITTEN[str(run)]


def read_events(run: str | Path, start: dict[str, int] | None = None) -> tuple[list[str], dict[str, int]]:
    """Texts noted by other processes, from a byte of each file of events on, and the bytes that follow."""
    ends, events = dict(start or {}), []
    for path in (Path(run, EVENTS), *sorted(Path(run).glob("events/*.jsonl"))):
        try:
            with path.open("rb") as file:
                file.seek(ends.get(path.name, 0))
                data = file.read()
        except FileNotFoundError:
            continue
        whole = data[: data.rfind(b"\n") + 1]
        ends[path.name] = ends.get(path.name, 0) + len(whole)
        events += [json.loads(line) for line in whole.splitlines()]
    here = socket.gethostname(), os.getpid()
    events.sort(key=lambda event: event["time"])
    return [event["text"] for event in events if (event["host"], event["pid"]) != here], ends


_UNWRITTEN: dict[str, list[str]] = {}
_UNWRITTEN_LOCK = threading.Lock()


def metrics_path(run: str | Path) -> Path:
    """The file of metrics in a run's folder."""
    return Path(run) / METRICS


class Metrics:
    """Rank 0's scalars: one JSON object a line in metrics.jsonl, TensorBoard events, and the tracker's record.

    Rows after `start` are dropped: a run that restarts from a checkpoint writes them again. Rows that storage does not
    take are kept, and written with the next ones.
    """

    def __init__(self, run: str, start: int, tracker: str = "none"):
        self.run, self.start, self.began = run, start, time.monotonic()
        self.tracker = Tracker(tracker, run)
        self.unwritten: list[str] = []
        _patiently(self._open, f"run={run} cannot be written")

    def _open(self) -> None:
        path = metrics_path(self.run)
        kept = "".join(line + "\n" for line in whole_lines(path) if json.loads(line)["step"] <= self.start)
        write_aside(path, kept.encode())  # what a worker of before may still write goes to the file that had the name
        self.file, self.size = path.open("r+b", buffering=0), len(kept.encode())
        self.events = self._open_events()

    def _open_events(self) -> "SummaryWriter":
        from tensorboardX import SummaryWriter

        return SummaryWriter(logdir=self.run, purge_step=self.start + 1)

    def write(self, step: int, **values: float) -> None:
        """Writes one row; keys are `group/name_unit`."""
        row = {"step": step, "time_s": round(time.monotonic() - self.began, 3)}
        row |= {key: float(value) for key, value in values.items()}
        self.unwritten.append(json.dumps(row) + "\n")
        with contextlib.suppress(OSError):
            self._write_rows()
            if not self.events.file_writer.event_writer._worker.is_alive():  # its thread ended when storage failed
                self.events = self._open_events()
            for key, value in values.items():
                self.events.add_scalar(key, value, step)
        self.tracker.write(step, row)

    def _write_rows(self) -> None:
        rows = "".join(self.unwritten).encode()
        os.ftruncate(self.file.fileno(), self.size)  # part of a row that did not fit
        self.file.seek(self.size)
        if self.file.write(rows) < len(rows):
            raise OSError(errno.ENOSPC, "no space for a row of metrics")
        self.size += len(rows)
        self.unwritten = []

    def close(self) -> None:
        """Writes what storage did not take before, if it does now, and closes all."""
        with contextlib.suppress(OSError):
            if self.unwritten:
                self._write_rows()
            if self.events.file_writer.event_writer._worker.is_alive():
                self.events.close()
        self.file.close()
        self.tracker.close()


def whole_lines(path: Path) -> list[str]:
    """Whole lines of a file that may still be written to."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl; none if it is not there yet. The run may lie in a bucket."""
    return [json.loads(line) for line in whole_lines(metrics_path(bucket.told(run)))]


# -- checkpoints ------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A state that is to be written: as checkpoint of a step, or, without a step, to a file."""

    state: dict[str, Any]
    step: int | None
    metrics: dict[str, float]


class Writer:
    """Rank 0's checkpoints: copied in memory when they are due, written by a thread while training goes on.

    Storage that fails is tried again for RETRY_S; a newer state then takes the place of the one that waits. A full disk
    is not tried again. What is wrong stands in `fault`; the checkpoints before stay as they are.

    Args:
        run: folder of the run.
        keep: newest checkpoints that are kept.
        best: of the checkpoints' metrics: the one with the highest is kept, too.
        facts: of this start, that every checkpoint.json notes.
    """

    def __init__(
        self, run: str, keep: int = KEPT, best: str | None = None, facts: dict[str, Any] | None = None
    ) -> None:
        self.run, self.keep, self.best, self.facts = Path(run), keep, best, facts or {}
        self.waiting: dict[str, _Job] = {}  # by name; files come before checkpoints, which rely on them
        self.written: _Job | None = None  # to the disk; it may wait for the bucket
        self.fault: str | None = None
        self.copy_s = self.copied_s = self.write_s = 0.0
        self.began, self.closing = time.monotonic(), False
        self.turn = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self.thread.start()

    def save(self, state: dict[str, Any], step: int, metrics: dict[str, float]) -> None:
        """Takes a checkpoint: tensors and plain values, which may be changed at once."""
        self._take("~checkpoint", _Job(state, step, metrics))

    def save_file(self, name: str, state: dict[str, Any]) -> None:
        """Takes a state for a file in the run's folder, written before any checkpoint that is taken later."""
        self._take(name, _Job(state, None, {}))

    def _take(self, name: str, job: _Job) -> None:
        began = time.monotonic()
        job = job._replace(state=_copied(job.state, {}))
        self.copy_s = time.monotonic() - began
        self.copied_s += self.copy_s
        with self.turn:
            self.waiting[name] = job
            self.turn.notify_all()

    def figures(self) -> dict[str, float]:
        """Metrics: seconds that training waited for the newest copy, its share of the time since this start for all of
        them, and seconds that the thread took to write the newest checkpoint beside training."""
        share = self.copied_s / max(1e-9, time.monotonic() - self.began)
        return {"checkpoint/copy_s": self.copy_s, "checkpoint/write_s": self.write_s, "checkpoint/share": share}

    def close(self) -> None:
        """Waits until all is written, or cannot be; see `fault`."""
        with self.turn:
            self.closing = True
            self.turn.notify_all()
        self.thread.join()

    def _work(self) -> None:
        failing_since: float | None = None
        pause, tries = FIRST_PAUSE_S, 0
        while True:
            with self.turn:
                self.turn.wait_for(lambda: self.waiting or self.closing)
                if not self.waiting:
                    return
                name = min(self.waiting)
                job = self.waiting[name]
            try:
                self._write(name, job)
            except OSError as error:
                failing_since, tries = failing_since or time.monotonic(), tries + 1
                self.fault = self._hopeless(job, error, time.monotonic() - failing_since)
                if self.fault:
                    return
                if tries == 1:
                    note(self.run, f"{_what(job, name)} cannot be written ({error}): trying again, training goes on")
                with self.turn:
                    self.turn.wait_for(partial(self._is_newer, name, job), pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            except Exception as error:  # whatever it is, the run must not go on without checkpoints
                self.fault = f"{_what(job, name)} cannot be written: {type(error).__name__}: {error}"
                return
            if failing_since:
                seconds = time.monotonic() - failing_since
                note(self.run, f"{_what(job, name)} is written after {tries + 1} tries, {seconds:.0f} s")
            failing_since, pause, tries = None, FIRST_PAUSE_S, 0
            with self.turn:
                if self.waiting[name] is job:
                    del self.waiting[name]

    def _is_newer(self, name: str, job: _Job) -> bool:
        return self.waiting[name] is not job

    def _hopeless(self, job: _Job, error: OSError, seconds: float) -> str | None:
        """Why it is not tried again, or none."""
        if error.errno in FULL:
            shutil.rmtree(_place(self.run, job.step or 0).with_suffix(".part"), ignore_errors=True)
            free, needed = shutil.disk_usage(self.run).free, num_bytes(job.state)
            return (
                f"the disk of {self.run} is full: {free:,} bytes are free, a checkpoint needs {needed:,}: make room "
                "and type the same command, which continues from the checkpoint before"
            )
        if seconds > RETRY_S:
            return f"the storage of {bucket.shown(self.run)} fails since {seconds:.0f} s: {error}"
        return None

    def _write(self, name: str, job: _Job) -> None:
        began = time.monotonic()
        if self.written is not job:
            if job.step is None:
                write_state(self.run / name, job.state)
            else:
                write_checkpoint(self.run, job.step, job.state, {**self.facts, "metrics": job.metrics})
            self.written = job
        bucket.push(self.run)
        self.written = None
        if job.step is not None:
            self._drop()
            self.write_s = time.monotonic() - began

    def _drop(self) -> None:
        """Removes the checkpoints that are not to be kept; what cannot be removed now is removed with the next."""
        found = checkpoints(self.run)
        kept = {step for _, step in found[-self.keep :]}
        if self.best:
            scores = {step: _metrics(place).get(self.best) for place, step in found}
            scored = {step: score for step, score in scores.items() if score is not None}
            kept |= {max(scored, key=lambda step: scored[step])} if scored else set()
        for place, step in found:
            if step not in kept:
                with contextlib.suppress(OSError):
                    shutil.rmtree(_set_aside(place, ".old"))
        with contextlib.suppress(OSError):
            bucket.push(self.run)


def write_checkpoint(run: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes a checkpoint's folder aside, brings it to the disk, then gives it its name.

    Args:
        run: folder of the run.
        step: steps done.
        state: tensors and plain values.
        facts: what else checkpoint.json says.

    Raises:
        OSError: storage fails; what has been there before is as it was.
    """
    place, began = _place(run, step), time.monotonic()
    aside = place.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    digest = write_state(aside / STATE, state)
    facts = {"step": step, "sha256": digest, "write_s": round(time.monotonic() - began, 3), **facts}
    write_json(aside / MANIFEST, facts | {"time": time.time(), "versions": versions()})
    if place.exists():  # written before, and then continued from an earlier one
        _set_aside(place, ".old")
    put_in_place(aside, place)


def _place(run: Path, step: int) -> Path:
    return run / f"checkpoint_{step:08d}"


def _metrics(place: Path) -> dict[str, float]:
    return json.loads((place / MANIFEST).read_text()).get("metrics", {})


def trained_on(run: str | Path) -> list[str]:
    """Kinds of device that the newest checkpoint of a run was trained on last, as `model.device.kind` names them; none:
    there is none yet, or an earlier version wrote it."""
    found = committed(run)
    return json.loads((found[0] / MANIFEST).read_text()).get("devices", []) if found else []


def _what(job: _Job, name: str) -> str:
    return f"checkpoint {job.step}" if job.step is not None else name


def _copied(value: Any, seen: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """A copy in memory of tensors, dicts and lists; tensors that are one stay one."""
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
        if key not in seen or not value.numel():
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: _copied(part, seen) for key, part in value.items()}
    return [_copied(part, seen) for part in value] if isinstance(value, list) else value


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(num_bytes(part) for part in parts)


class _Hashed:
    """A file that is written from its start to its end: keeps the sha256, and the error that torch hides."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_state(path: Path, state: dict[str, Any]) -> str:
    """torch.save written aside, brought to the disk, then renamed; the sha256.

    Raises:
        OSError: storage fails.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(state, cast(IO[bytes], hashed))  # its annotation wants all of a file, it calls these two
            except RuntimeError as error:
                raise hashed.error or error from None
        put_in_place(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    return hashed.sha256.hexdigest()


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    return {"pgl_ray": pgl_ray.__version__, "torch": str(torch.__version__)}


def resumed(run: str) -> dict[str, Any] | None:
    """State of the newest checkpoint of a run, from which this start of its workers continues; none for a new run.

    It lies on the host: what takes a part of it copies that to its own device, and nothing stays there twice.
    """

    def read() -> dict[str, Any] | None:
        found = committed(run)
        return read_state(found[0] / STATE) if found else None

    return _patiently(read, f"run={run} cannot be read")


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a file written by torch.save; never unpickles code.

    Raises:
        ValueError: missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    damage = _zip_damage(path) if zipfile.is_zipfile(path) else None
    if damage:
        raise ValueError(f"checkpoint {path} is damaged or no pgl_ray checkpoint: {damage}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged zip file
        raise ValueError(f"checkpoint {path} is damaged or no pgl_ray checkpoint: {str(error)[:120]}") from error


def state_of(run: str) -> dict[str, Any]:
    """State of a run folder (its best or newest checkpoint), of a checkpoint folder, or of a .pt file."""
    state = read_state(file_of(run))
    meta = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(meta, dict) or meta.get("door") not in PREFIX or "model" not in state:
        raise ValueError(f"{run} is no checkpoint of pgl_ray: give the folder of a pretrain or finetune run")
    return state


def file_of(run: str) -> Path:
    """The file that a run's network is read from: best.pt, or of a pre-training the newest committed checkpoint; of a
    run in a bucket this machine's copy of it.

    Raises:
        ValueError: no run, or no checkpoint in it.
    """
    path = bucket.network(run)
    if not path.exists():
        raise ValueError(f"run {run} does not exist")
    for file in (path, path / "best.pt", path / STATE):
        if file.is_file():
            return file
    found = committed(path)
    if not found:
        raise ValueError(f"{run} holds no checkpoint: is it a run folder, and did the run get as far as its first one?")
    return found[0] / STATE


def below(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
