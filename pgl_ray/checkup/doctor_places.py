"""What a machine sees of a store and of a run's folder: the doctor's facts, no door itself.

Every node runs this, whatever it lacks, so nothing but the standard library is imported at its top.
"""

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pgl_ray.paths import is_url

NUM_LOOKS = 5  # at a small object
NUM_NAMED = 3  # of what lies in a folder
LEAST_READ_BYTES = 2**22  # below it is no speed
READ_BYTES, READ_S, PIECE = 2**27, 3.0, 2**22  # of scans, whichever is reached first; read at once
SHARED_S = 5.0  # within which a network file system shows what another node wrote


@dataclass(frozen=True)
class Sight:
    """What a machine sees of a store or a run.

    Attributes:
        name: of the machine.
        fault: why it cannot be used there; "": it can.
        mend: what to do about it, where that is known there.
        mark: hash of what was read of it, the same wherever it is the same place.
        read_only: why nothing can be written there.
        latency_s: of a small read from a bucket; none: it lies in a folder.
        read_mb_s: how fast scans were read; none: they were not.
        free_bytes, total_bytes: of the file system; 0 of a bucket.
    """

    name: str
    fault: str = ""
    mend: str = ""
    mark: str = ""
    read_only: str = ""
    latency_s: float | None = None
    read_mb_s: float | None = None
    free_bytes: int = 0
    total_bytes: int = 0


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there.

    Raises:
        NotADirectoryError: a file is in the way.
    """
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        if os.path.lexists(folder):
            raise NotADirectoryError(f"{folder} is no folder")
    return folder


def taken_by(run: str) -> str:
    """Why no run can be begun or continued in a folder or below a URL: what lies there; "": nothing is in the way."""
    from pgl_ray.data.place import open_place

    if not is_url(run) and not os.path.isdir(run):
        return ""
    names = [name for name in open_place(run).names("") if not is_url(run) or not name.startswith(".")]
    if not names or {"run.json", "sweep.json"} & {*names} or {*names} <= {".lock", "pretrain"}:
        return ""
    what = "a store" if "store.json" in names else ", ".join(names[:NUM_NAMED]) + ", ..." * (len(names) > NUM_NAMED)
    return f"holds {what}, and is no run of pgl_ray"


def leave_mark(run: str) -> str:
    """Writes a small file into a run's folder, or the nearest folder above it, or into its place in a bucket.

    Returns:
        Its path or URL, for `look_at_run` and `remove_mark`.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    from pgl_ray.data.place import open_place

    folder = run if is_url(run) else str(nearest(Path(run)))
    key = f".doctor-{uuid.uuid4().hex}"
    open_place(folder).write(key, [key.encode()])
    return f"{folder}/{key}"


def remove_mark(mark: str) -> None:
    """Removes what `leave_mark` wrote."""
    from pgl_ray.data.place import open_place

    folder, key = mark.rsplit("/", 1)
    open_place(folder).remove(key)


def look_at_run(mark: str) -> dict[str, Any]:
    """Reads what another machine has left, and writes and removes a file next to it, in a bucket as a lock, too; facts
    by their names in Sight."""

    def look() -> dict[str, Any]:
        from pgl_ray.data import lease
        from pgl_ray.data.place import open_place

        folder, key = mark.rsplit("/", 1)
        place, until = open_place(folder), time.monotonic() + SHARED_S
        while True:
            try:
                content = place.read(key)
                break
            except FileNotFoundError:
                if time.monotonic() > until:
                    return {"fault": f"does not see what is written to {folder}"}
                time.sleep(0.2)
        facts = {"mark": content.decode(), **_room(folder)}
        trial = f".doctor-{uuid.uuid4().hex}"
        try:
            place.write(trial, [content])
            if place.read(trial) != content:
                return {"fault": f"reads something else than it has written to {folder}"}
            if is_url(folder) and (fault := lease.fault_of(place.ask, f"{trial}-lock")):
                return {"fault": fault}
        except OSError as error:
            facts["read_only"] = error.strerror or str(error)
        finally:
            place.remove(trial)
        return facts | _latency(place, key)

    return _tried(look)


def look_at_store(store: str, scans: list[str], index: bool = False) -> dict[str, Any]:
    """Reads the settings of a store and some of its scans' voxels; facts by their names in Sight.

    Args:
        store: folder or URL.
        scans: keys below it of what is read.
        index: whether its index is read as the doors read it, too: elsewhere it is the same one, by its hash.
    """
    from pgl_ray.data.place import open_place

    def look() -> dict[str, Any]:
        place = open_place(store)
        settings = place.read("store.json")
        if index and (wrong := _wrong_with(store)):
            return wrong
        digest = hashlib.sha256(settings + place.read("index.parquet")).hexdigest()[:12]
        try:
            speed = _speed(store, scans)
        except FileNotFoundError as error:
            mend = f"python -m pgl_ray.prepare repair store={store}"
            return {"fault": f"{error.filename or error} is missing", "mend": mend}
        facts = {"mark": digest, "read_mb_s": speed, **_room(store), **_latency(place, "store.json")}
        if not is_url(store):
            try:
                tempfile.TemporaryFile(dir=store).close()
            except OSError as error:
                facts["read_only"] = error.strerror or str(error)
        return facts

    return _tried(look)


def _wrong_with(store: str) -> dict[str, str]:
    """What keeps every door from a store, and what mends it; {}: nothing does."""
    from pgl_ray.data.store import read_index

    try:
        read_index(store)
    except ValueError as error:  # "what is wrong: what mends it"
        fault, _, mend = str(error).rpartition(": ")
        return {"fault": fault, "mend": mend}
    return {}


def _tried(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a look gives, or its error as the fault."""
    try:
        return look()
    except Exception as error:  # a bucket has errors of many kinds, and a node may lack a package
        return {"fault": " ".join(str(error).split()) or type(error).__name__}


def _room(folder: str) -> dict[str, int]:
    if is_url(folder):
        return {}
    usage = shutil.disk_usage(folder)
    return {"free_bytes": usage.free, "total_bytes": usage.total}


def _latency(place: Any, key: str) -> dict[str, float]:
    if not is_url(place.url):
        return {}
    took = []
    for _ in range(NUM_LOOKS):
        began = time.monotonic()
        place.read(key)
        took.append(time.monotonic() - began)
    return {"latency_s": median(took)}


def _speed(store: str, scans: list[str]) -> float | None:
    """MB/s of reading scans one after another, from the disk itself where the system lets go of what it keeps in
    memory; none: they are too few to say."""
    from pgl_ray.data.place import open_place

    began, num = time.monotonic(), 0

    def enough() -> bool:
        return num >= READ_BYTES or time.monotonic() - began > READ_S

    for key in scans:
        if enough():
            break
        if not is_url(store) and hasattr(os, "posix_fadvise"):
            with open(f"{store}/{key}", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file = open_place(store).open(key)
        for offset in range(0, file.size, PIECE):
            if enough():
                break
            num += sum(len(part) for part in file.ranges([(offset, min(PIECE, file.size - offset))]))
        file.close()
    return num / 1e6 / max(time.monotonic() - began, 1e-6) if num >= LEAST_READ_BYTES else None
