"""What the operating system has to be asked for, in one place: locks between processes, threads that work now and then,
cores, and memory. Linux and macOS."""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

try:
    import fcntl
except ImportError:  # filelock's locks stand in
    fcntl = None

CPU_MAX = "/sys/fs/cgroup/cpu.max"  # a container's, of cgroups 2: microseconds in each period, or "max"
BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # EACCES: some network file systems
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
PAUSE_S = 0.1  # between two looks at a lock that another process holds


def num_cores() -> int:
    """Cores that this process may use, at least one: those it is bound to, and no more than its container's quota; on
    macOS, which does not say so, all of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(CPU_MAX).read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit ("max"), or no Linux
        return cores


def keep_freed_memory(max_bytes: int) -> bool:
    """Lets this process keep what it frees for the next time; whether that could be set.

    glibc takes every large array from the kernel and gives it back at once, so each step, or batch, faults in all its
    pages anew: half of a small encoder's step, a third of a rendered pair. Other C libraries are left as they are.

    Args:
        max_bytes: that are kept at most, below 2**31.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, max_bytes), mallopt(M_TOP_PAD, 2**26)])


@contextmanager
def every(period_s: float, work: Callable[[], bool], name: str) -> Iterator[None]:
    """While it lasts, a thread of this name calls `work` every so many seconds, as long as it returns true."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(period_s) and work():
            pass

    thread = threading.Thread(target=follow, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Lock:
    """An open lock file. Its locks end with the process, also with a killed one, or when the block ends.

    The kernel's (`flock`), which hold between the machines of a network file system, too: there a shared lock asks for
    a file that is open for reading, an exclusive one for writing, so it is open for both. The file stays: waiters of a
    removed one would hold locks on different files.

    Attributes:
        file: the lock file, open for reading and appending, for what the holder has to say.
        refused: why the file system has no locks, so that every wish was granted; none where it has.
    """

    def __init__(self, path: Path):
        self.file, self.refused = path.open("a+"), None
        self._stand_in = None if fcntl else filelock.SoftFileLock(f"{path}.held")

    def take(self, shared: bool = False, wait_s: float = 0.0) -> bool:
        """Takes the lock, or changes its kind, which others may come between; whether it was got in time.

        Args:
            shared: together with other holders of shared locks.
            wait_s: how long to wait for other holders; math.inf: as long as they hold it.
        """
        until = time.monotonic() + wait_s
        while not self._got(shared):
            if time.monotonic() > until:
                return False
            time.sleep(PAUSE_S)
        return True

    def _got(self, shared: bool) -> bool:
        if self._stand_in:
            return self._stand_in_got(shared)
        try:
            fcntl.flock(self.file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                return False
            self.refused = error.strerror  # some network storage has no locks
        return True

    def _stand_in_got(self, shared: bool) -> bool:
        """The stand-in knows only exclusive locks; a shared one keeps nobody out."""
        if shared or self._stand_in.is_locked:
            return True
        try:
            self._stand_in.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    def warn(self, what: str) -> None:
        """Prints that nothing is locked, where nothing is."""
        if self.refused:
            print(f"  no lock on {what} ({self.refused}): take care not to start it twice", flush=True)

    def close(self) -> None:
        """Gives the lock back, if it is held."""
        if self._stand_in:
            self._stand_in.release()
        self.file.close()


@contextmanager
def lock_file(path: Path) -> Iterator[Lock]:
    """A lock file, made where there is none; nothing is locked yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path)
    try:
        yield lock
    finally:
        lock.close()
