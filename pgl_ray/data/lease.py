"""A lock that is an object in a bucket: taken, held and taken over by conditional puts, so of many who want it at once
one gets it, and who lost it finds out before he writes.

The holder writes the object anew every few seconds. One that stays the same for too long belongs to a process that was
killed, and whoever replaces just that version of it has the lock. A bucket removes whatever lies there, also the lock
of another who has taken over meanwhile: so the holder says that he is leaving, if the lock is still his, before he
removes it, and nobody takes it from him in between.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pgl_ray.data.system import every

LEAVING = b"leaving"
LOCKS = "conditional writes (If-None-Match, If-Match), by which one process at a time has a lock"
MEND = "take a bucket with conditional writes, or a folder"


class Lease:
    """One wish for a lock.

    Args:
        ask: calls an obstore function with the client and what else it is given; OSError where the store fails.
        key: of the object.
        beat_s: between two signs of life.
        silence_s: without one, after which a holder counts as killed.
    """

    def __init__(self, ask: Callable, key: str, beat_s: float, silence_s: float):
        self._ask, self._key, self._beat_s, self._silence_s = ask, key, beat_s, silence_s
        self._mine = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
        self._count, self._version, self._lost = 0, {}, False
        self._turn = threading.Lock()  # the thread that keeps it, and the one that works under it

    def take(self, refuse: Callable[[str], Exception], wait: Callable[[str], None]) -> None:
        """Takes the lock, at once where it is free, else as soon as its holder is silent for too long.

        Args:
            refuse: makes of the holder's name the error that is raised when he gives a sign of life.
            wait: called with the holder's name before his silence is waited for.

        Raises:
            OSError: the store fails.
            ValueError: it has no conditional puts.
        """
        seen, since = None, 0.0
        while True:
            content, version = self._read()
            if content.startswith(self._mine.encode()):  # the answer to a put did not get here
                self._version = version
                return
            if content:
                owner = content.decode().split(",")[0]
                if content != LEAVING and seen not in (None, version):
                    raise refuse(owner)
                if content != LEAVING and seen is None:
                    wait(owner)
                if seen != version:
                    seen, since = version, time.monotonic()
                if time.monotonic() - since <= self._silence_s:
                    time.sleep(self._beat_s / 5)
                    continue
            if self._put(self._mine.encode(), version):
                return

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gives signs of life from a thread of its own while it lasts, then frees the lock, if it is still this one's;
        others would wait for a sign of life."""
        import obstore

        try:
            with every(self._beat_s, self._goes_on, "lock"):
                yield
        finally:
            with suppress(OSError):
                if self.beat() and self._put(LEAVING, self._version):
                    self._ask(obstore.delete, self._key)

    def _goes_on(self) -> bool:
        with suppress(OSError):
            return self.beat()
        return True  # the next sign may get through

    def beat(self) -> bool:
        """Gives a sign of life; whether the lock is still this one's. To be asked for before each commit.

        Raises:
            OSError: the store fails.
        """
        with self._turn:
            self._count += 1
            if self._lost or self._put(f"{self._mine} {self._count}".encode(), self._version):
                return not self._lost
            content, version = self._read()
            if content.startswith(self._mine.encode()):  # the answer to the beat before did not get here
                self._version = version
                return True
            self._lost = bool(content) or not self._put(self._mine.encode(), {})  # or somebody has removed it
            return not self._lost

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        """The lock's content and version; nothing where there is no such object."""
        import obstore

        def get(store: Any, key: str) -> tuple[bytes, dict[str, Any]]:
            result = obstore.get(store, key)
            return bytes(result.bytes()), _version(result.meta)

        try:
            return self._ask(get, self._key)
        except FileNotFoundError:
            return b"", {}

    def _put(self, content: bytes, version: dict[str, Any]) -> bool:
        """Replaces one version of the lock, or makes it where that is none; whether it was that version."""
        import obstore

        def put(store: Any, key: str) -> dict[str, Any] | None:
            refused = obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError
            try:
                return obstore.put(store, key, content, mode=version or "create", use_multipart=False)
            except refused:
                return None

        try:
            done = self._ask(put, self._key)
        except OSError as error:
            if "501 Not Implemented" not in str(error):
                raise
            url = str(error).split(": ")[0]
            raise ValueError(f"{url}: the store answers 501, Not Implemented, to {LOCKS}: {MEND}") from None
        if done is None:
            return False
        self._version = _version(done)
        return True


def fault_of(ask: Callable, key: str) -> str:
    """Why a store's conditional puts make no lock; "": they do. They are tried on an object that is removed again.

    Args:
        ask: as Lease's.
        key: of no object yet.

    Raises:
        OSError: the store fails.
    """
    import obstore

    lease = Lease(ask, key, 0, 0)
    try:
        made, made_again = lease._put(b"1", {}), lease._put(b"2", {})
        first = lease._version
        replaced, replaced_again = lease._put(b"3", first), lease._put(b"4", first)
    except ValueError as error:
        return str(error).removesuffix(f": {MEND}")
    finally:
        with suppress(OSError):
            ask(obstore.delete, key)
    if (made, made_again, replaced, replaced_again) == (True, False, True, False):
        return ""
    return f"the store does not keep to {LOCKS}"


def _version(meta: dict[str, Any]) -> dict[str, Any]:
    """What a store knows an object's version by."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
