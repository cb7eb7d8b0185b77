"""Where a store lies: a folder, or a prefix in a bucket of an object store (s3://, gs://, az://), with one interface.

Keys are paths below the place with "/" between the parts. A bucket is reached through obstore, the library behind
zarr's ObjectStore; credentials, region and endpoint come from the environment, as for any tool of that cloud
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...).
"""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pgl_ray.config import FailedRun
from pgl_ray.data import wire
from pgl_ray.data.lease import Lease
from pgl_ray.data.system import lock_file
from pgl_ray.data.wire import first_line

if TYPE_CHECKING:
    import pyarrow
    from obstore import GetOptions  # comes with pgl_ray[cloud]
    from obstore.store import ObjectStore

T = TypeVar("T")
STRAGGLERS_S = 20  # how long workers of a killed run may live on
HEARTBEAT_S, SILENCE_S = 5, 30  # of the lock in a bucket
LARGEST_READ = 2**20  # bytes after which no neighbour is added
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems know no fsync of a folder
PIECE = 2**24  # bytes of a large object that are asked for at a time


def open_place(url: str | os.PathLike, synced: bool = True) -> "Place":
    """The place at a path or URL; nothing is made or asked for yet.

    Args:
        synced: see Folder; what a bucket took it keeps.
    """
    text = os.fspath(url)
    return Bucket(text) if is_far(text) else Folder(Path(os.path.abspath(text)), synced)


def is_far(url: str | os.PathLike) -> bool:
    """Whether each read at a path or URL takes as long as a request."""
    return "://" in os.fspath(url)


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file in one step: readers see the old one or the new one, also after a loss of power."""
    _write_aside(path, [content], path.with_name(f"{path.name}.part{os.getpid()}"))


def put_in_place(aside: Path, path: Path) -> None:
    """Gives a file or folder that was written aside its name, once it is on the disk with all below it: whatever
    happens, under that name lies nothing half. A folder takes the place of none, or of an empty one.

    Raises:
        OSError: storage fails; what lay there is as it was.
    """
    for part in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
        _to_disk(part)
    aside.replace(path)
    _to_disk(path.parent)


def parquet_table(content: bytes) -> "pyarrow.Table":
    """A Parquet file's table, its checksums verified, read by this thread alone.

    `read_table` leaves the buffer to Arrow's threads, and the process aborts where it ends before they let it go: a
    refusal's exit code 2 becomes 134.

    Raises:
        ArrowException: damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)


def _to_disk(path: Path) -> None:
    """Brings a file's bytes, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def check_writable(given: str, folder: Path) -> None:
    """Finds out before the work is done whether its result can be kept; makes the folder.

    Args:
        given: what the user wrote, for the message.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{given} cannot be written: {error.strerror or error}") from None


def _write_aside(path: Path, parts: Iterable[bytes], aside: Path) -> None:
    try:
        _fill(aside, parts)
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _fill(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(parts)


def _in_use(url: str) -> FailedRun:
    return FailedRun(f"store={url}: another prepare is writing into it: wait for its end, then type this again")


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
            _fill(path, parts)
            return
        # one writer at a time, so no name of its own: what a kill leaves is taken by the next write
        _write_aside(path, parts, path.with_name(f"{path.name}.part"))

    def names(self, key: str) -> list[str]:
        """What lies directly below, sorted."""
        try:
            return sorted(os.listdir(self.root / key))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, key: str) -> None:
        """Removes a file or folder with all below it; it need not exist."""
        path = self.root / key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def open(self, key: str, size: int | None = None) -> "_LocalFile":
        """A file to read parts of; OSError where it cannot be opened.

        Args:
            size: in bytes, where it is known: a bucket is not asked for it.
        """
        return _LocalFile(self.root / key)

    def open_at_end(self, key: str, length: int) -> tuple["_LocalFile", memoryview]:
        """`open`, and the file's last bytes, fewer where it is shorter: one request where it lies in a bucket."""
        file = _LocalFile(self.root / key)
        (tail,) = file.ranges([(max(0, file.size - length), length)])
        return file, tail

    @contextmanager
    def replaced(self, key: str) -> Iterator["Folder"]:
        """Offers a new folder that takes the key's place when the block ends well: whole or not at all."""
        part = self.root / ".part" / uuid.uuid4().hex
        old, target = part.with_name(f"{part.name}.old"), self.root / key
        try:
            part.mkdir(parents=True)
            yield Folder(part, synced=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(old)
            put_in_place(part, target)
        finally:
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
                raise _in_use(self.url)
            lock.warn(f"store={self.url}")
            with _part(self) as token:
                if not lock.take(shared=True):
                    raise _in_use(self.url)
                yield token

    @contextmanager
    def joined(self, token: str) -> Iterator[None]:
        """A worker's share of the lock.

        Raises:
            FailedRun: the run of this token is over.
        """
        with lock_file(self.root / ".lock") as lock:
            if not lock.take(shared=True):
                raise _in_use(self.url)
            _check_token(self, token)
            yield


@contextmanager
def _part(place: "Place") -> Iterator[str]:
    """Empties and offers STORE/.part, which holds what is not whole yet, and the token of the run that owns it."""
    place.remove(".part")  # of a run that was killed
    token = uuid.uuid4().hex
    place.write(".part/run", [token.encode()])
    try:
        yield token
    finally:
        with suppress(OSError):  # the next run removes it
            if place.read(".part/run") == token.encode():  # in a bucket another run may have taken over
                place.remove(".part")


def _check_token(place: "Place", token: str) -> None:
    try:
        owner = place.read(".part/run").decode()
    except FileNotFoundError:
        owner = ""
    if owner != token:
        raise _over(place.url)


def _over(url: str) -> FailedRun:
    return FailedRun(f"the run that writes into {url} is over")


class _LocalFile:
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
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


class Bucket:
    """A prefix in a bucket.

    Args:
        url: scheme://bucket/prefix.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._store = wire.client(self.url)
        self._lease: Lease | None = None  # while this one holds the lock

    def ask(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Calls a function of obstore on this bucket; its errors come as the ones that a folder raises."""
        try:
            return function(self._store, *args, **options)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"{self.url}: there is no such bucket: make it first") from None
            raise FileNotFoundError(first_line(error)) from None
        except Exception as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"{self.url}: there is no such bucket: make it first") from None
            if wire.no_access(error):
                mend = "the environment must have credentials that hold for it"
                raise PermissionError(f"{self.url}: no access: {first_line(error)}: {mend}") from None
            if type(error).__name__ == "NotSupportedError" or "non-partial response" in str(error):
                raise NotImplementedError(first_line(error)) from None
            if "416 Range Not Satisfiable" in str(error):
                raise EOFError(first_line(error)) from None
            if type(error).__module__.startswith("obstore"):
                raise OSError(f"{self.url}: {first_line(error)}") from None
            raise

    def read(self, key: str) -> bytes:
        """As Folder's."""
        import obstore

        return bytes(self.ask(lambda store, key: obstore.get(store, key).bytes(), key))

    def write(self, key: str, parts: Iterable[bytes]) -> None:
        """As Folder's; large objects go up in parts while they are made."""
        import obstore

        self.ask(obstore.put, key, iter(parts))

    def copy_to(self, key: str, path: Path) -> None:
        """Writes an object to a file; FileNotFoundError where there is none, OSError where it is replaced meanwhile."""
        import obstore

        def get(store: "ObjectStore", key: str) -> None:  # in pieces, for a request may take half a minute
            found = obstore.head(store, key)
            with path.open("wb") as file:
                for start in range(0, found["size"], PIECE):
                    options: GetOptions = {
                        "range": (start, min(start + PIECE, found["size"])),
                        "if_match": found["e_tag"],
                    }
                    file.write(obstore.get(store, key, options=options).bytes())

        self.ask(get, key)

    def versions(self) -> dict[str, str]:
        """All keys, each with a text that is another one when its content has changed."""
        import obstore

        def all_of(store: "ObjectStore") -> dict[str, str]:
            found = [item for batch in obstore.list(store) for item in batch]
            return {item["path"]: f"{item['e_tag']} {item['size']} {item['last_modified']}" for item in found}

        return self.ask(all_of)

    def names(self, key: str) -> list[str]:
        """As Folder's."""
        import obstore

        found = self.ask(obstore.list_with_delimiter, f"{key}/" if key else None)
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def remove(self, key: str) -> None:
        """As Folder's."""
        import obstore

        def all_below(store: "ObjectStore", prefix: str) -> list[str]:
            return [item["path"] for batch in obstore.list(store, prefix) for item in batch]

        paths = self.ask(all_below, f"{key}/") or [key]
        with suppress(FileNotFoundError):
            self.ask(obstore.delete, paths)

    def open(self, key: str, size: int | None = None) -> wire.FarFile:
        """As Folder's."""
        return wire.FarFile(self.ask, self.url, key, size)

    def open_at_end(self, key: str, length: int) -> tuple[wire.FarFile, memoryview]:
        """As Folder's."""
        return wire.FarFile.at_end(self.ask, self.url, key, length)

    @contextmanager
    def replaced(self, key: str) -> Iterator["_Inside"]:
        """As Folder's, but nothing can be renamed: a group counts only with its zarr.json, which is removed first and
        must be written last."""
        self.remove(f"{key}/zarr.json")
        self.remove(key)
        try:
            yield _Inside(self, key)
        except BaseException:
            self.remove(f"{key}/zarr.json")
            self.remove(key)
            raise

    @contextmanager
    def locked(self, refuse: Callable[[str], Exception] | None = None) -> Iterator[str]:
        """As Folder's; see Lease. One that stays the same for half a minute belongs to a run that was killed.

        Args:
            refuse: makes of the lock's owner the error of a lock that is held; none: Folder's.
        """

        def wait(owner: str) -> None:
            print(f"  {self.url} is locked by {owner}: waiting {SILENCE_S} s for a sign of life", flush=True)

        lease = Lease(self.ask, ".lock", HEARTBEAT_S, SILENCE_S)
        lease.take(refuse or (lambda owner: _in_use(self.url)), wait)
        with lease.kept(), _part(self) as token:
            self._lease = lease
            try:
                yield token
            finally:
                self._lease = None

    @contextmanager
    def joined(self, token: str) -> Iterator[None]:
        """As Folder's."""
        if self._lease and not self._lease.beat():
            raise _over(self.url)
        _check_token(self, token)
        yield


class _Inside:
    """What lies below a key of a bucket, to be written."""

    def __init__(self, bucket: Bucket, key: str):
        self._bucket, self._key = bucket, key

    def write(self, key: str, parts: Iterable[bytes]) -> None:
        """As Folder's."""
        self._bucket.write(f"{self._key}/{key}", parts)


Place = Folder | Bucket
