"""The headers of many DICOM files: read once by several processes, and kept in the store by path, size and time, so
that a second look at a million slices reads none of them again."""

import io
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pgl_ray.data.columns import parquet_table
from pgl_ray.data.system import num_cores
from pgl_ray.files.dicom_headers import Header, read_header

VERSION = 2  # of the cache; one of another version is read anew
AT_ONCE = 250  # files that a process is given at a time
FEW = 1000  # files that are read faster than processes start
MAX_PROCESSES = 8


def read_headers(paths: Sequence[str]) -> dict[str, Header]:
    """The header of every file; of many, several processes read.

    Raises:
        ImportError: as read_header.
    """
    if len(paths) < FEW:
        return {path: read_header(path) for path in paths}
    batches = iter([paths[at : at + AT_ONCE] for at in range(0, len(paths), AT_ONCE)])
    headers, num = {}, min(MAX_PROCESSES, max(2, num_cores()))
    with ThreadPoolExecutor(num) as pool:
        for part in pool.map(lambda _: _served(batches), range(num)):
            headers |= part
    return headers


def _served(batches: Iterator[Sequence[str]]) -> dict[str, Header]:
    """Has a process of its own read batches for as long as there are any. No fork, because threads run here, and no
    multiprocessing, because it would run the user's script again."""
    text = f"import sys; sys.path[:] = {sys.path!r}; from pgl_ray.files.header_cache import serve; serve()"
    by_path = {}
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for batch in batches:
            pickle.dump(list(batch), process.stdin)
            process.stdin.flush()
            headers = pickle.load(process.stdout)
            if isinstance(headers, Exception):
                raise headers
            by_path |= dict(zip(batch, (Header(*header) for header in headers)))
        process.stdin.close()
    return by_path


def serve() -> None:
    """Answers lists of paths on standard input with their headers on standard output."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            paths = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = [tuple(read_header(path)) for path in paths]
        except ImportError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


class HeaderCache:
    """Headers by path, size and time.

    Args:
        content: of the file that `packed` wrote; none: nothing is known yet. What is damaged counts as nothing.
    """

    def __init__(self, content: bytes | None = None):
        self._known = _unpacked(content) if content else {}
        self.changed = False

    def headers(self, files: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, Header]:
        """Headers of files, each with its size and time; those that are new or changed are read."""
        files = list(files)
        new = [path for path, stamp in files if self._known.get(path, (None,))[0] != stamp]
        new_headers, stamps = read_headers(new), dict(files)
        for path, header in new_headers.items():
            if header.kind != "unopened":
                self._known[path] = (stamps[path], header)
                self.changed = True
        return {path: new_headers[path] if path in new_headers else self._known[path][1] for path, _ in files}

    def packed(self) -> bytes:
        """All that is known, as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = sorted(self._known.items())
        columns: dict[str, list] = {"path": [path for path, _ in rows]}
        columns |= {"bytes": [stamp[0] for _, (stamp, _) in rows], "time_ns": [stamp[1] for _, (stamp, _) in rows]}
        for k, name in enumerate(Header._fields):
            columns[name] = [header[k] for _, (_, header) in rows]
        sink = io.BytesIO()
        table = pa.table(columns).replace_schema_metadata({"version": str(VERSION)})
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()


def _unpacked(content: bytes) -> dict[str, tuple[tuple[int, int], Header]]:
    try:
        table = parquet_table(content)
        if (table.schema.metadata or {}).get(b"version") != str(VERSION).encode():
            return {}
        columns = [table[name].to_pylist() for name in ("path", "bytes", "time_ns", *Header._fields)]
    except Exception:  # pyarrow's own, of several kinds
        return {}
    same: dict[str, str] = {}  # most texts occur many times
    texts = [[same.setdefault(text, text) for text in column] for column in columns[3:]]
    return {path: ((size, time), Header(*fields)) for path, size, time, *fields in zip(*columns[:3], *texts)}
