"""Reading from an object store that answers late: one client per process, parts of objects, patience.

A request takes tens of milliseconds, whatever it asks for, so what is read together is asked for together.
"""

import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")  # environment variables that say how a store is reached
PATIENCE_S = 180.0  # for which a stream goes on asking a store that fails
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0  # between two tries
PIECE = 2**24  # bytes that are asked for at a time
JOINED = 2**20  # bytes between two parts up to which obstore asks for both at once
AHEAD = 16  # items that are fetched while one is worked on; 30 ms each at 500 a second

Item, Result = TypeVar("Item"), TypeVar("Result")


def client(url: str) -> Any:
    """This process' client of an object store; its connections are used again.

    Raises:
        ValueError: no store of that kind, or obstore is not installed.
    """
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(SETTINGS))
    return _client(url, os.getpid(), tuple(settings))


@lru_cache(maxsize=8)
def _client(url: str, process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """Process and settings are those that the client is made in and by: a fork's, or other ones, make another."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise ValueError(f"{url}: object stores need obstore: pip install 'pgl_ray[cloud]'") from None
    retries = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
    try:  # http is used only where an endpoint of that kind is named
        return from_url(url, client_options={"allow_http": True}, retry_config=retries)
    except Exception as error:  # obstore has a class per cloud
        raise ValueError(f"{url}: cannot be used as an object store: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """obstore's errors go on with a dump of its own structures, S3's with a page of XML, of which the code counts."""
    text = str(error).strip()
    code = re.search(r"<Code>(\w+)</Code>", text)
    return text.split("\n", 1)[0].split(": <?xml", 1)[0] + (f": {code[1]}" if code else "")


def no_access(error: Exception) -> bool:
    """Whether a store refuses what it was asked for, now and later: S3 calls a token that has expired a bad request."""
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return True
    return bool(re.search(r"<Code>(Expired|Invalid|Unrecogni)\w*(Token|Client\w*|AccessKeyId)</Code>", str(error)))


def patiently(work: Callable[[], Result], store: str) -> Result:
    """What `work` returns, tried again, later and later, while a store fails: for a minute or two any does at times.

    Args:
        work: asks the store.
        store: its URL.

    Raises:
        OSError: it fails for longer than PATIENCE_S, or refuses, or has no such object.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if time.monotonic() - began > PATIENCE_S:
                raise
            last = _last_warning(store, os.getpid())
            if time.monotonic() - last[0] > PATIENCE_S:  # many threads ask the same store
                last[0] = time.monotonic()
                print(f"  {error}: trying again for {PATIENCE_S:.0f} s", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


@lru_cache(maxsize=8)
def _last_warning(store: str, process: int) -> list[float]:
    """When this process last said that a store fails."""
    return [-math.inf]


class FarFile:
    """Parts of an object. Safe to share between threads.

    Args:
        ask: calls an obstore function with the client and what else it is given; OSError where the store fails.
        url: of the store.
        key: of the object.
        size: in bytes; none: the store is asked for it.

    Raises:
        OSError: no such object, or the store fails for longer than PATIENCE_S.
    """

    def __init__(self, ask: Callable, url: str, key: str, size: int | None = None):
        import obstore

        self._ask, self._url, self._key = ask, url, key
        self.size = self._patiently(obstore.head)["size"] if size is None else size

    @classmethod
    def at_end(cls, ask: Callable, url: str, key: str, length: int) -> tuple["FarFile", memoryview]:
        """The file, and its last bytes, fewer where it is shorter, by one request where the store knows such ones."""
        import obstore

        file = cls(ask, url, key, 0)

        def tail(store: Any, key: str) -> tuple[int, memoryview]:
            result = obstore.get(store, key, options={"range": {"suffix": length}})
            return result.meta["size"], memoryview(result.bytes())

        try:
            file.size, last = file._patiently(tail)
        except (EOFError, NotImplementedError):  # it is empty, or the store knows no such ranges, as Azure
            file = cls(ask, url, key)
            (last,) = file.ranges([(max(0, file.size - length), length)])
        return file, last

    def ranges(self, spans: list[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes of each (offset, length); fewer where the file ends before. They are asked for at once, a large
        part of the file at a time; obstore joins those that lie less than 1 MiB apart: at 30 ms and 100 MB/s, asking
        for that much more takes as long as asking twice."""
        import obstore

        for part in _pieces(spans):
            bounds = [(min(offset, self.size), min(offset + length, self.size)) for offset, length in part]
            asked = [bound for bound in bounds if bound[0] < bound[1]]
            starts, ends = [start for start, _ in asked], [end for _, end in asked]
            contents = iter(self._patiently(obstore.get_ranges, starts=starts, ends=ends) if asked else ())
            yield from [memoryview(next(contents)) if start < end else memoryview(b"") for start, end in bounds]

    def _patiently(self, function: Callable, **options: Any) -> Any:
        return patiently(lambda: self._ask(function, self._key, **options), self._url)

    def close(self) -> None:
        """Nothing is open."""


class Held:
    """Parts of a file that is here already; as FarFile."""

    def __init__(self, content: bytes):
        self._content, self.size = memoryview(content), len(content)

    def ranges(self, spans: list[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes of each (offset, length); fewer where the file ends before."""
        return (self._content[offset : offset + length] for offset, length in spans)


def held(file: FarFile) -> FarFile | Held:
    """A file that is read in many small parts: fetched at once, unless it is larger than PIECE."""
    return file if file.size > PIECE else Held(b"".join(file.ranges([(0, file.size)])))


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, bytes) of the requests that obstore makes of (offset, bytes) in ascending order."""
    made: list[tuple[int, int]] = []
    for offset, length in spans:
        if made and offset - sum(made[-1]) <= JOINED:
            made[-1] = made[-1][0], offset + length - made[-1][0]
        else:
            made.append((offset, length))
    return made


def _pieces(spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Spans in turn, so many at a time that they hold no more than PIECE bytes, or one that does."""
    part, size = [], 0
    for span in spans:
        if part and size + span[1] > PIECE:
            yield part
            part, size = [], 0
        part.append(span)
        size += span[1]
    if part:
        yield part


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Callable[[], Result]]:
    """For each item in turn a function that gives `work(item)` or raises what that raised; the AHEAD items after it are
    worked on in threads meanwhile."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result
            while waiting:
                yield waiting.popleft().result
        finally:
            for future in waiting:
                future.cancel()
