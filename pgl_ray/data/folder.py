"""A store's place on a disk."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pgl_ray.data.durable import fill, put_in_place, write_parts_aside
from pgl_ray.data.owner import check_token, in_use, part_folder
from pgl_ray.data.system import lock_file

STRAGGLERS_S = 20  # how long workers of a killed run may live on
LARGEST_READ = 2**20  # bytes after which no neighbour is added


class Folder:
    """A folder on a disk that all workers see.

    Args:
        root: absolute path.
        synced: every write is on the disk when it ends; without, it is as soon as the folder around it is put in place.
    """

    def __init__(self, root: Path, synced: bool = True):
        self.root, self.url, self.synced = root, str(root), synced

    def read(self, key: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""
        return (self.root / key).read_bytes()

    def write(self, key: str, parts: Iterable[bytes]) -> None:
        """Writes a file in one step."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.synced:
            fill(path, parts)
            return
        # one writer at a time, so no name of its own: what a kill leaves is taken by the next write
        write_parts_aside(path, parts, path.with_name(f"{path.name}.part"))

    def names(self, key: str) -> list[str]:
        """What lies directly below, sorted."""
        try:
            return sorted(os.listdir(self.root / key))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def is_file(self, key: str) -> bool:
        """Whether a key is a file's, and no folder's."""
        return (self.root / key).is_file()

    def remove(self, key: str) -> None:
        """Removes a file or folder with all below it; it need not exist."""
        path = self.root / key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def open(self, key: str, size: int | None = None) -> "LocalFile":
        """A file to read parts of; OSError where it cannot be opened.

        Args:
            size: in bytes, where it is known: a bucket is not asked for it.
        """
        return LocalFile(self.root / key)

    def open_at_end(self, key: str, length: int) -> tuple["LocalFile", memoryview]:
        """`open`, and the file's last bytes, fewer where it is shorter: one request where it lies in a bucket."""
        file = LocalFile(self.root / key)
        (tail,) = file.ranges([(max(0, file.size - length), length)])
        return file, tail

    @contextmanager
    def replaced(self, key: str, stale: str | None = None) -> Iterator["Folder"]:
        """Offers a new folder that takes the key's place when the block ends well: whole or not at all.

        Args:
            key: of the folder.
            stale: key that speaks of what lay there before, and is removed with it.
        """
        part = self.root / ".part" / uuid.uuid4().hex
        old, target = part.with_name(f"{part.name}.old"), self.root / key
        try:
            part.mkdir(parents=True)
            yield Folder(part, synced=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                if stale:
                    self.remove(stale)
                target.rename(old)
            put_in_place(part, target)
        finally:
            if old.exists() and not target.exists():  # storage failed: what lay there is put back
                old.rename(target)
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[str]:
        """Keeps every other prepare out, also after a kill of this process as long as one of its workers writes.

        The driver takes the lock alone, then shares it with its workers (`joined`); the kernel lets go of it when
        they die.

        Yields:
            A token for `joined`.

        Raises:
            FailedRun: another run holds it.
        """
        with lock_file(self.root / ".lock") as lock:
            if not lock.take(wait_s=STRAGGLERS_S):
                raise in_use(self.url)
            lock.warn(f"store={self.url}")
            with part_folder(self) as token:
                if not lock.take(shared=True):
                    raise in_use(self.url)
                yield token

    @contextmanager
    def joined(self, token: str) -> Iterator[None]:
        """A worker's share of the lock.

        Raises:
            FailedRun: the run of this token is over.
        """
        with lock_file(self.root / ".lock") as lock:
            if not lock.take(shared=True):
                raise in_use(self.url)
            check_token(self, token)
            yield


class LocalFile:
    """Parts of a file. `pread` and no mmap: a page fault blocks, and a cut file would kill the process."""

    def __init__(self, path: Path):
        self._file = -1
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size

    def ranges(self, spans: list[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes of each (offset, length); fewer where the file ends before. Neighbours are read together."""
        done = 0
        while done < len(spans):
            begin, length = spans[done]
            end, after = begin + length, done + 1
            while after < len(spans) and spans[after][0] == end and end - begin < LARGEST_READ:
                end, after = end + spans[after][1], after + 1
            data = memoryview(os.pread(self._file, end - begin, begin))
            for offset, length in spans[done:after]:
                yield data[offset - begin : offset - begin + length]
            done = after

    def close(self) -> None:
        """Nothing is read afterwards; as often as one likes."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()
