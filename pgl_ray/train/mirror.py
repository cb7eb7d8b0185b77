"""A run in a bucket (s3://, gs://, az://): what counts lies there, each machine works on a copy in the user's cache.

In the bucket lies what lies in a run's folder. Nothing can be renamed there, so a checkpoint counts from its manifest
on, which is written last; nothing can be added to, so each process that notes events has an object of its own,
events/<process>.jsonl; the lock is an object. A machine has one working copy of a run, from which the run's
processes bring to the bucket what each of them writes: logs and TensorBoard's files grow, which no object can. What is
only read comes through a cache by version.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from pgl_ray.config import FailedRun
from pgl_ray.data.bucket import Bucket
from pgl_ray.data.durable import write_aside
from pgl_ray.data.system import every, lock_file
from pgl_ray.paths import cache_folder
from pgl_ray.train.run_files import MANIFEST, METRICS, NAME, STATE, TRACKER

OLD = "checkpoint_manager_snapshot.json"  # Ray Train's, of runs whose checkpoints had no manifest
OWNER = ".part/start"  # token of the start whose workers may write; goes with the driver's lock
PUSH_S = 15.0  # between two looks at what is to be brought to the bucket
PART_BYTES = 2**23  # of a file that is read to be brought there
WORK, READ = "work", "read"  # folders of the working copy and of the cache
URL = "url"  # file next to them: of the run

_ID = uuid.uuid4().hex[:12]


def url_of(copy: str | os.PathLike) -> str | None:
    """URL of the run that a path is a copy of; none: it is no copy."""
    path = Path(copy)
    try:
        return (path.parents[1] / URL).read_text() if path.parent.name in (WORK, READ) else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def own_events(folder: Path) -> Path:
    """Where this process notes events in a copy."""
    return folder / "events" / f"{_ID}_{os.getpid()}.jsonl"


class Mirror:
    """This machine's working copy of a run, and its cache of what is read.

    Attributes:
        url: of the run.
        folder: the working copy.
        cache: files that were read, each as it was in the bucket when it was asked for last.
    """

    def __init__(self, url: str):
        self.url, self.place = url, Bucket(url)
        self.home = cache_folder() / "pgl_ray" / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.name = url.rsplit("/", 1)[-1]
        self.folder = self.home / WORK / self.name
        self.cache = self.home / READ / self.name
        self.index = self.home / "work.json"  # states in the bucket that the working copy has: key -> version
        self.rank: int | None = None
        self.owner: bytes | None = None  # token of the start that this process works for
        self.stored: dict[str, bytes] = {}  # checkpoints that are in the bucket, with their manifests
        self.known: dict[Path, tuple[int, int]] = {}  # files as they are in the bucket: time of change, size
        self.turn = threading.Lock()

    # -- working ------------------------------------------------------------------------------------------------------

    def locked(self) -> contextlib.AbstractContextManager[str]:
        """Keeps every other driver out.

        Raises:
            ValueError: another one has the run.
        """
        text = f"run={self.url} is being trained by {{}}: wait for it, or end it"
        return self.place.locked(lambda owner: ValueError(text.format(owner)))

    def claim(self, token: str | None = None) -> None:
        """From now on nothing of the workers of earlier starts gets into the bucket: those of a driver that was killed,
        or of a node that is cut off from the others.

        Args:
            token: of the driver's lock.

        Raises:
            FailedRun: another driver has taken the run over.
        """
        with self.place.joined(token) if token else contextlib.nullcontext():
            self.owner = uuid.uuid4().hex.encode()
            self.place.write(OWNER, [self.owner])

    def match(self) -> bool:
        """Makes the working copy one of the run that is in the bucket now, with its run.json; what another run of this
        name has left there is removed. Whether something is in the bucket."""
        self._say_whose()
        record_file = self.folder / "run.json"
        try:
            record = self.place.read("run.json")
        except FileNotFoundError:
            record = None
        if record is None or not record_file.exists() or record_file.read_bytes() != record:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            if record is not None:
                write_aside(record_file, record)
        return record is not None or any(not name.startswith(".") for name in self.place.names(""))  # a lock is no run

    def put(self, *names: str) -> None:
        """Brings files of the working copy to the bucket."""
        for name in names:
            self._put(self.folder / name)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, the newest last."""
        return sorted(int(name.removeprefix("checkpoint_")) for name in whole(self.place.versions()))

    def pull(self, damage: Callable[[Path], str | None], all_of_them: bool = True) -> None:
        """Makes the working copy's checkpoints those of the bucket.

        Args:
            damage: what is wrong with a checkpoint's folder, or none.
            all_of_them: or only the newest.
        """
        with _held(self.home / "work.lock"):
            self.match()
            stored, have = self.place.versions(), read_versions(self.index)
            checkpoints = whole(stored)
            if not checkpoints and OLD in stored:  # what has no manifest would be removed, as what a killed writer left
                raise ValueError(
                    f"run={self.url} is of an earlier version, whose checkpoints count no more: take a new run=..."
                )
            for path in self.folder.glob("checkpoint_*"):
                if NAME.fullmatch(path.name) and path.name not in checkpoints:
                    shutil.rmtree(path)
            for name in checkpoints if all_of_them else checkpoints[-1:]:
                path, manifest = self.folder / name, self.place.read(f"{name}/{MANIFEST}")
                self.stored[name] = manifest
                copy, state = path / MANIFEST, f"{name}/{STATE}"
                same = copy.exists() and copy.read_bytes() == manifest and have.get(state, "") == stored.get(state)
                if same and not damage(path):
                    continue
                have[state] = stored.get(state, "")
                shutil.rmtree(path, ignore_errors=True)
                aside = path.with_suffix(".part")
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                (aside / MANIFEST).write_bytes(manifest)
                for _ in range(2):  # once more where it is damaged: it may have been the transfer
                    with contextlib.suppress(FileNotFoundError):  # a damage like any other
                        self.place.copy_to(state, aside / STATE)
                    if not damage(aside):
                        break
                aside.rename(path)
            write_aside(self.index, json.dumps(have).encode())

    def join(self, rank: int, damage: Callable[[Path], str | None]) -> None:
        """Pulls what a worker continues from: the newest checkpoint and its own log; of rank 0 all checkpoints and the
        metrics."""
        self.rank, self.owner = rank, self._owner_now()
        if not self.owner:
            raise FailedRun(f"no process has run={self.url} any more")
        self.pull(damage, all_of_them=rank == 0)
        names = [f"logs/rank_{rank}.jsonl", f"logs/rank_{rank}.stack", *((METRICS, TRACKER) if rank == 0 else ())]
        longer = []
        for name in names:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            aside = path.with_name(f"{path.name}.part")
            try:
                self.place.copy_to(name, aside)
            except FileNotFoundError:
                aside.unlink(missing_ok=True)
                longer += [path] if path.exists() else []  # of a worker that was killed before it was brought there
                continue
            if name.startswith("logs/") and path.exists() and _goes_on(path, aside):
                longer.append(path)  # the last lines of a worker that was killed here
                aside.unlink()
            else:
                aside.replace(path)
        self.known = {path: _mark(path) for path in self._own() if path not in longer}

    def pushing(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, a thread brings this process' files to the bucket every PUSH_S."""

        def push() -> bool:
            with contextlib.suppress(OSError, ValueError, FailedRun):  # the checkpoints' thread says so
                self.push_files()
            return True

        return every(PUSH_S, push, "bucket")

    def push_files(self) -> None:
        """Brings those of this process' files to the bucket that have changed: a worker's log and events; of rank 0 all
        files that lie directly in the folder."""
        with self.turn:
            self._check_owner()
            for path in self._own():
                mark = _mark(path)
                if self.known.get(path) != mark:
                    self._put(path)
                    self.known[path] = mark

    def push(self) -> None:
        """Brings files, then checkpoints to the bucket, each with its manifest last; removes there the checkpoints that
        are not in the working copy any more.

        Raises:
            OSError: the bucket fails; the same again goes on from there.
            FailedRun: a later start has taken the run over.
        """
        self.push_files()
        with self.turn:
            local = sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))
            for name in local:
                manifest = (self.folder / name / MANIFEST).read_bytes()
                if self.stored.get(name) != manifest:
                    self.place.remove(f"{name}/{MANIFEST}")
                    self._put(self.folder / name / STATE)
                    self._check_owner()
                    self._put(self.folder / name / MANIFEST)
                    self.stored[name] = manifest
            versions = self.place.versions()
            states = {f"{name}/{STATE}": versions.get(f"{name}/{STATE}") for name in local}
            write_aside(self.index, json.dumps(states).encode())
            for name in filter(NAME.fullmatch, {key.split("/")[0] for key in versions} - set(local)):
                self.place.remove(f"{name}/{MANIFEST}")
                self.place.remove(name)
                self.stored.pop(name, None)

    def _own(self) -> list[Path]:
        files = [own_events(self.folder)]
        if self.rank is not None:
            files += self.folder.glob(f"logs/rank_{self.rank}.*")
        if self.rank == 0:
            files += self.folder.iterdir()
        files = [path for path in files if not path.name.startswith(".") and ".part" not in path.name]
        return [path for path in files if path.is_file() and path.stat().st_size]

    def _put(self, path: Path) -> None:
        self.place.write(path.relative_to(self.folder).as_posix(), parts_of(path))

    def _say_whose(self) -> None:
        """Writes the URL next to the copies, for `url_of`."""
        self.home.mkdir(parents=True, exist_ok=True)
        if not (self.home / URL).exists():
            write_aside(self.home / URL, self.url.encode())

    def _owner_now(self) -> bytes:
        try:
            return self.place.read(OWNER)
        except FileNotFoundError:
            return b""

    def _check_owner(self) -> None:
        if self.owner and self._owner_now() != self.owner:
            raise FailedRun(f"another start of its workers has taken over run={self.url}")

    # -- reading ------------------------------------------------------------------------------------------------------

    def fetched(self, choose: Callable[[Collection[str]], Iterable[str]]) -> Path:
        """The cache's folder, in which the chosen files are as they are in the bucket now; what has not changed is not
        fetched again.

        Args:
            choose: keys of all that lies in the bucket -> those that are wanted.
        """
        index = self.home / "read.json"
        with _held(self.home / "read.lock"):
            self._say_whose()
            stored = self.place.versions()
            have = read_versions(index)
            for key in choose(stored):
                path = self.cache / key
                if have.get(key) != stored[key] or not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    aside = path.with_name(f"{path.name}.part")
                    self.place.copy_to(key, aside)
                    aside.replace(path)
                    have[key] = stored[key]
            for key in have.keys() - stored.keys():
                (self.cache / key).unlink(missing_ok=True)
                del have[key]
            write_aside(index, json.dumps(have).encode())
        return self.cache


def whole(keys: Iterable[str]) -> list[str]:
    """Names of the checkpoints that have their manifest, the newest last."""
    names = {name for name, _, file in (key.partition("/") for key in keys) if file == MANIFEST}
    return sorted(filter(NAME.fullmatch, names), key=lambda name: int(name.removeprefix("checkpoint_")))


def read_versions(path: Path) -> dict[str, str]:
    """Versions that were noted in a file, by key; {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # none yet, or cut off when this machine lost its power
        return {}


def _goes_on(path: Path, before: Path) -> bool:
    """Whether a log is another one and more."""
    size = before.stat().st_size
    with path.open("rb") as file:
        return path.stat().st_size > size and file.read(size) == before.read_bytes()


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def parts_of(path: Path) -> Iterator[bytes]:
    """A file's bytes, piece by piece."""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield part


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the kernel frees the lock of a killed one."""
    with lock_file(path) as lock:
        lock.take(wait_s=math.inf)
        yield
