"""A store's place in a bucket of an object store: s3://, gs://, az://.

It is reached through obstore, the library behind zarr's ObjectStore.
Credentials, region and endpoint come from the environment, as for any tool of that cloud (AWS_ACCESS_KEY_ID,
AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pgl_ray.data import wire
from pgl_ray.data.lease import Lease
from pgl_ray.data.owner import check_token, in_use, part_folder, run_is_over
from pgl_ray.data.wire import first_line

if TYPE_CHECKING:
    from obstore import GetOptions  # comes with pgl_ray[cloud]
    from obstore.store import ObjectStore

T = TypeVar("T")
HEARTBEAT_S, SILENCE_S = 5, 30  # of the lock in a bucket
PIECE = 2**24  # bytes of a large object that are asked for at a time


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
        except Exception as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"{self.url}: there is no such bucket: make it first") from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(first_line(error)) from None
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
            meta = obstore.head(store, key)
            with path.open("wb") as file:
                for start in range(0, meta["size"], PIECE):
                    options: GetOptions = {
                        "range": (start, min(start + PIECE, meta["size"])),
                        "if_match": meta["e_tag"],
                    }
                    file.write(obstore.get(store, key, options=options).bytes())

        self.ask(get, key)

    def versions(self) -> dict[str, str]:
        """All keys, each with a text that is another one when its content has changed."""
        import obstore

        def all_of(store: "ObjectStore") -> dict[str, str]:
            objects = [item for batch in obstore.list(store) for item in batch]
            return {item["path"]: f"{item['e_tag']} {item['size']} {item['last_modified']}" for item in objects}

        return self.ask(all_of)

    def names(self, key: str) -> list[str]:
        """As Folder's."""
        import obstore

        listing = self.ask(obstore.list_with_delimiter, f"{key}/" if key else None)
        paths = [*listing["common_prefixes"], *(item["path"] for item in listing["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def is_file(self, key: str) -> bool:
        """As Folder's."""
        import obstore

        try:
            self.ask(obstore.head, key)
        except FileNotFoundError:
            return False
        return True

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
    def replaced(self, key: str, stale: str | None = None) -> Iterator["_Inside"]:
        """As Folder's, but nothing can be renamed: a group counts only with its zarr.json, which is removed first and
        must be written last."""
        if stale and self.names(key):
            self.remove(stale)
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
        lease.take(refuse or (lambda owner: in_use(self.url)), wait)
        with lease.hold(), part_folder(self) as token:
            self._lease = lease
            try:
                yield token
            finally:
                self._lease = None

    @contextmanager
    def joined(self, token: str) -> Iterator[None]:
        """As Folder's."""
        if self._lease and not self._lease.beat():
            raise run_is_over(self.url)
        check_token(self, token)
        yield


class _Inside:
    """What lies below a key of a bucket, to be written."""

    def __init__(self, bucket: Bucket, key: str):
        self._bucket, self._key = bucket, key

    def write(self, key: str, parts: Iterable[bytes]) -> None:
        """As Folder's."""
        self._bucket.write(f"{self._key}/{key}", parts)
