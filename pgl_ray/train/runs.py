"""Run folders: a run is opened, or found to be the same; one driver at a time has it; its workers join it.

A run in a bucket is worked on in copies of its folder (see mirror.py): what is asked of the run as a whole takes its
URL, all else a folder.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pgl_ray.config import FailedRun, FinetuneConfig, PretrainConfig, build, to_yaml
from pgl_ray.data.durable import put_in_place, write_aside
from pgl_ray.data.system import lock_file
from pgl_ray.train import run_paths
from pgl_ray.train.checkpoint import damage_of, named, set_aside, versions
from pgl_ray.train.events import Notes
from pgl_ray.train.records import RunRecord, RunStore
from pgl_ray.train.retry import retried
from pgl_ray.train.run_files import RECORD

# what a continued run may change
MAY_DIFFER = frozenset({"ray", "train", "health", "accumulate", "probe"})
MAY_DIFFER |= {"stream.on_error", "stream.max_skipped_share", "stream.on_gpu"}
# by which hash of `RunStore` it is known; the first one that differs is said, for other voxels are of other files, too
CONTENT = {"scans_hash": "content of its scans", "labels_hash": "content of its label maps, or of their files"}


def open_run(config: PretrainConfig | FinetuneConfig, door: str, facts: dict[str, Any]) -> str:
    """Creates the run's folder, or checks that an existing one belongs to the same config.

    Args:
        config: the door's.
        door: its name.
        facts: the other fields of `RunRecord`; "plan" must stay the same.

    Returns:
        The folder's absolute path, or its URL.

    Raises:
        ValueError: the folder holds another run or other files.
    """
    mirror = run_paths.mirror(config.run)
    folder = mirror.folder if mirror else Path(config.run).absolute()
    place = mirror.url if mirror else str(folder)
    taken = mirror.match() if mirror else folder.is_file() or (folder.exists() and any(folder.iterdir()))
    wanted = json.loads(config.model_dump_json())
    if (folder / RECORD).exists():
        earlier = RunRecord.read(folder)
        if earlier.door != door:
            raise ValueError(f"run={config.run} is a {earlier.door} run: choose another run=...")
        skip = MAY_DIFFER | {"run", "index"}
        try:  # with the defaults of later settings
            stored = json.loads(build(type(config), earlier.config).model_dump_json())
        except ValueError as error:
            why = f"run={config.run} has settings that this version has not"
            raise ValueError(f"{why}: {error}: choose another run=...") from None
        names = _differences({k: v for k, v in wanted.items() if k not in skip}, stored)
        changed = sorted(name for name in names if not {name.split(" ")[0], name.split(".")[0]} & MAY_DIFFER)
        if changed:
            raise ValueError(f"run={config.run} was started with another {', '.join(changed)}: choose another run=...")
        if earlier.plan != facts["plan"]:
            raise ValueError(
                f"run={config.run} was started on other scans than index={config.index} has now: choose another run=..."
            )
        others = _other_store(earlier, RunStore.model_validate(facts.get("store", {})))
        if others:
            mend = "choose another run=..., or the index= of before"
            raise ValueError(f"run={config.run} was started on a store with another {', '.join(others)}: {mend}")
        return place
    if taken:
        raise ValueError(f"run={config.run} exists and is not a run of pgl_ray: choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    RunRecord(door=door, config=wanted, versions=versions(), started=started, **facts).write(folder)
    write_aside(folder / "config.yaml", to_yaml(config).encode())
    if mirror:
        with mirror.locked():  # or another one may be about to begin there
            mirror.put(RECORD, "config.yaml")
    return place


def _other_store(earlier: RunRecord, now: RunStore) -> list[str]:
    """In what a run's store would change its numbers; a store that was moved is the same, and what a run of another
    version has not recorded is not compared. A pre-training has no use for labels."""
    skip = {"num_scans", "splits"} | (set() if earlier.door == "finetune" else {"labels"})
    both = (earlier.store.model_fields_set & now.model_fields_set & set(RunStore.model_fields)) - skip
    before, after = (store.model_dump(include=both) for store in (earlier.store, now))
    if "labels" in both:  # also organs that are no longer there
        organs = before["labels"] | after["labels"]
        for known in (before, after):
            known["labels"] = {organ: known["labels"].get(organ) for organ in organs}
    changed = [what for name, what in CONTENT.items() if before.pop(name, "") != after.pop(name, "")]
    return _differences(after, before) + changed[:1]


def _differences(wanted: Any, stored: Any, path: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(stored, dict):
        names = [_differences(wanted[k], stored.get(k), f"{path}.{k}" if path else k) for k in wanted]
        return [name for part in names for name in part]
    return [] if wanted == stored else [f"{path} ({stored} there, {wanted} here)"]


class Held(NamedTuple):
    """A run that this process has for itself.

    Attributes:
        run: its folder or URL.
        token: of the lock on a run in a bucket; none for a folder.
        newest: checkpoint and step that `recover` gave when the lock was taken.
    """

    run: str
    token: str | None
    newest: tuple[Path, int] | None


@contextlib.contextmanager
def locked(run: str) -> Iterator[Held]:
    """One process at a time trains a run; the kernel frees the lock of a killed one.

    In a bucket, a killed one's lock is taken over after half a minute.

    Raises:
        ValueError: another process has the run.
        FailedRun: see `recover`.
    """
    mirror = run_paths.mirror(run)
    with mirror.locked() if mirror else _locked_folder(run) as token:
        yield Held(run, token, recover(run, token))


@contextlib.contextmanager
def _locked_folder(run: str) -> Iterator[None]:
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


def recover(run: str | Path, token: str | None = None) -> tuple[Path, int] | None:
    """The newest checkpoint whose bytes are those that were written, and its step; to be called before training.

    Damaged ones that are newer are renamed to *.damaged and noted, and what a killed writer left is removed. Storage
    that fails is tried again for RETRY_S.

    Of a run in a bucket this is done to the working copy, and then in the bucket, where earlier workers write no more.

    Args:
        run: folder or URL.
        token: see `Held`.

    Raises:
        FailedRun: there are checkpoints, all of them damaged; or another driver has taken the run over.
    """
    mirror = run_paths.mirror(run)
    notes = Notes(mirror.folder if mirror else run)

    def work() -> tuple[Path, int] | None:
        if not mirror:
            return _recover(Path(run), notes)
        mirror.claim(token)
        mirror.pull(damage_of)
        newest = _recover(mirror.folder, notes)
        mirror.push()
        return newest

    return retried(work, f"run={run} cannot be read")


class Joined(NamedTuple):
    """What a worker works on.

    Attributes:
        folder: the run's, of a run in a bucket this machine's working copy, which holds what the worker continues from.
        push: brings checkpoints to the bucket; none: the folder is the run's own.
    """

    folder: str
    push: Callable[[], None] | None = None


@contextlib.contextmanager
def joined(run: str, rank: int) -> Iterator[Joined]:
    """While it lasts, a worker works on the run; what it writes is brought to the bucket.

    Raises:
        FailedRun: the bucket fails for RETRY_S, or no driver has the run.
    """
    mirror = run_paths.mirror(run)
    if not mirror:
        yield Joined(run)
        return
    retried(lambda: mirror.join(rank, damage_of), f"run={run} cannot be read")
    try:
        with mirror.pushing():
            yield Joined(str(mirror.folder), mirror.push)
    except BaseException:
        with contextlib.suppress(OSError, ValueError, FailedRun):
            mirror.push_files()
        raise
    retried(mirror.push_files, f"run={run} cannot be written")


def _recover(run: Path, notes: Notes) -> tuple[Path, int] | None:
    for left in [place for place in run.glob("checkpoint_*") if place.suffix in (".part", ".old")]:
        place = left.with_suffix("")
        if left.suffix == ".old" and not place.exists() and not damage_of(left):
            put_in_place(left, place)  # killed before another one took its place
        else:
            shutil.rmtree(left)
    damaged: list[tuple[Path, str]] = []
    checkpoints = named(run)
    while checkpoints:
        place, step = checkpoints.pop()
        fault = damage_of(place)
        if not fault:
            for bad, why in damaged:
                set_aside(bad, ".damaged")
                notes.add(f"checkpoint {bad.name} is damaged ({why}): continuing from {place.name}")
            return place, step
        damaged.append((place, fault))
    if damaged:
        reason = f"all {len(damaged)} checkpoints are damaged ({damaged[0][1]})"
        raise FailedRun(f"run={run_paths.origin(run)}: {reason}: take a new run=...")
    return None
