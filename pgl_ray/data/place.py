"""Where a store lies: a folder, or a prefix in a bucket of an object store (s3://, gs://, az://), with one interface.

Keys are paths below the place with "/" between the parts. A bucket is reached through obstore, the library behind
zarr's ObjectStore; credentials, region and endpoint come from the environment, as for any tool of that cloud
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...).
"""

import errno
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pgl_ray.config import FailedRun
from pgl_ray.data.system import lock_file

if TYPE_CHECKING:
    import pyarrow
    from obstore import GetOptions  # comes with pgl_ray[cloud]
    from obstore.store import ObjectStore, RetryConfig

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
    return Bucket(text) if "://" in text else Folder(Path(os.path.abspath(text)), synced)


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

    def open(self, key: str) -> "_LocalFile":
        """A file to read parts of; OSError where it cannot be opened."""
        return _LocalFile(self.root / key)

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
        raise FailedRun(f"the run that writes into {place.url} is over")


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
        try:
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"{url}: object stores need obstore: pip install 'pgl_ray[cloud]'") from None
        patience: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
        try:  # http is used only where an endpoint of that kind is named
            self._store = from_url(self.url, client_options={"allow_http": True}, retry_config=patience)
        except Exception as error:  # obstore has a class per cloud
            raise ValueError(f"{url}: cannot be used as an object store: {_first_line(error)}") from None

    def ask(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Calls a function of obstore on this bucket; its errors come as the ones that a folder raises."""
        try:
            return function(self._store, *args, **options)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"{self.url}: there is no such bucket: make it first") from None
            raise FileNotFoundError(_first_line(error)) from None
        except Exception as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"{self.url}: there is no such bucket: make it first") from None
            if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
                raise PermissionError(f"{self.url}: no access: {_first_line(error)}") from None
            if type(error).__module__.startswith("obstore"):
                raise OSError(f"{self.url}: {_first_line(error)}") from None
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

    def open(self, key: str) -> "_RemoteFile":
        """As Folder's."""
        import obstore

        return _RemoteFile(self, key, self.ask(obstore.head, key)["size"])

    @contextmanager
    def replaced(self, key: str) -> Iterator["Bucket"]:
        """As Folder's, but nothing can be renamed: a group counts only with its zarr.json, which is removed first and
        must be written last."""
        self.remove(f"{key}/zarr.json")
        self.remove(key)
        try:
            yield Bucket(f"{self.url}/{key}")
        except BaseException:
            self.remove(f"{key}/zarr.json")
            self.remove(key)
            raise

    @contextmanager
    def locked(self, refuse: Callable[[str], Exception] | None = None) -> Iterator[str]:
        """As Folder's. The lock is an object that its owner writes anew every few seconds; one that stays the same for
        half a minute belongs to a run that was killed.

        Args:
            refuse: makes of the lock's owner the error of a lock that is held; none: Folder's.
        """
        import obstore

        def create(store: "ObjectStore") -> bool:
            try:
                obstore.put(store, ".lock", mine.encode(), mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

        mine = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
        seen, since = None, time.monotonic()
        while not self.ask(create):
            try:
                now = self.read(".lock")
            except FileNotFoundError:
                continue
            owner = now.decode().split(",")[0]
            if seen not in (None, now):
                raise refuse(owner) if refuse else _in_use(self.url)
            if seen is None:
                print(f"  {self.url} is locked by {owner}: waiting {SILENCE_S} s for a sign of life", flush=True)
            seen = now
            if time.monotonic() - since > SILENCE_S:
                self.remove(".lock")
            time.sleep(HEARTBEAT_S / 5)
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(mine, ended), daemon=True)
        beat.start()
        try:
            with _part(self) as token:
                yield token
        finally:
            ended.set()
            beat.join()
            with suppress(OSError):  # or others wait half a minute for a sign of life
                if self.read(".lock").startswith(mine.encode()):
                    self.remove(".lock")

    def _beat(self, mine: str, ended: threading.Event) -> None:
        count = 0
        while not ended.wait(HEARTBEAT_S):
            count += 1
            try:
                if not self.read(".lock").startswith(mine.encode()):
                    return  # this process gave no sign of life for too long: another one has taken over
                self.write(".lock", [f"{mine} {count}".encode()])
            except OSError:  # the next one may get through
                continue

    @contextmanager
    def joined(self, token: str) -> Iterator[None]:
        """As Folder's."""
        _check_token(self, token)
        yield


class _RemoteFile:
    """As _LocalFile; all parts of a call are asked for at once, neighbours in one request."""

    def __init__(self, bucket: Bucket, key: str, size: int):
        self._bucket, self._key, self.size = bucket, key, size

    def ranges(self, spans: list[tuple[int, int]]) -> Iterator[memoryview]:
        import obstore

        bounds = [(min(offset, self.size), min(offset + length, self.size)) for offset, length in spans]
        asked = [(start, end) for start, end in bounds if start < end]
        starts, ends = [start for start, _ in asked], [end for _, end in asked]
        found = iter(self._bucket.ask(obstore.get_ranges, self._key, starts=starts, ends=ends) if asked else ())
        for start, end in bounds:
            yield memoryview(next(found)) if start < end else memoryview(b"")

    def close(self) -> None:
        pass


def _first_line(error: Exception) -> str:
    """obstore's errors go on with a dump of its own structures, S3's with a page of XML."""
    return str(error).strip().split("\n", 1)[0].split(": <?xml", 1)[0]


Place = Folder | Bucket
