"""A Parquet table by columns: each is read when it is first asked for, and kept small.

The index of 100,000 scans is 100 MB of Parquet and would be 2 GB of Python objects. A process that renders needs five
of its columns, and of those the rows that it shows: numbers lie in plain arrays, texts (a scan's zarr.json, its labels'
boxes) in compressed blocks that are opened one at a time.
"""

import io
import operator
import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numcodecs import blosc

if TYPE_CHECKING:
    import pyarrow.parquet

LONGEST_BLOCK, MOST_OF_BLOCK = 2**15, 32  # bytes and texts of a compressed block; opening one takes 20 us
ROWS_AT_ONCE = 1024  # of a column of texts, while it is read; STRIDE divides it
BYTES_AT_ONCE = 2**20  # of a file
STRIDE = 16  # one of so many names is at hand for a search


class Parts(Protocol):
    """A file to read parts of, as `Place.open` gives it."""

    size: int

    def ranges(self, spans: list[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes of each (offset, length)."""


class Changed(ValueError):
    """A file is another one than when it was opened."""


def parquet_table(content: bytes) -> "pyarrow.Table":
    """A Parquet file's table, its checksums verified, read by this thread only.

    `read_table` leaves the buffer to Arrow's threads, and the process aborts where it ends before they let it go: a
    refusal's exit code 2 becomes 134.

    Raises:
        ArrowException: damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)


class Columns:
    """The columns of a Parquet file.

    Args:
        file: stays open.
        blame: makes of what goes wrong, now or when a column is read, the error to raise. It is given `Changed`, or one
            of pyarrow's own, of several kinds, where the file is damaged.

    Attributes:
        num_rows: of all columns.
    """

    def __init__(self, file: Parts, blame: Callable[[Exception], Exception]):
        self._file, self._blame, self._metadata = file, blame, None
        self._metadata = self._tried(self._open).metadata
        self.num_rows = self._metadata.num_rows
        self._read: dict[str, np.ndarray | _Lists | _Texts | Names] = {}

    def value(self, name: str, row: int) -> Any:
        """What stands in a row: a number, a text, bytes, a list of numbers, or none."""
        value = self.column(name)[row]
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    def column(self, name: str) -> "np.ndarray | _Lists | _Texts | Names":
        """A column: an array of numbers [num_rows], or of lists of one length [num_rows, length], to be left as it is;
        other lists and texts as a sequence."""
        if name not in self._read:
            self._read[name] = self._tried(self._decoded, name)
        return self._read[name]

    def names(self, name: str) -> "Names":
        """A column of texts, `in_order`."""
        self._read[name] = self._tried(lambda: Names(self._whole(name)).in_order())
        return self._read[name]

    def _tried(self, work: Callable, *args: Any) -> Any:
        import pyarrow as pa

        try:
            return work(*args)
        except Exception as error:
            raise self._blame(error) from None
        finally:
            pa.default_memory_pool().release_unused()  # what was decoded on the way

    def _decoded(self, name: str) -> "np.ndarray | _Lists | _Texts":
        from pyarrow import types

        file = self._open()
        kind = file.schema_arrow.field(name).type
        if types.is_integer(kind) or types.is_floating(kind):
            return _numbers(self._whole(name))
        if types.is_list(kind):
            lists = self._whole(name)
            return _lists(_numbers(lists.values), _buffer(lists, np.int32, len(lists) + 1))
        batches = file.iter_batches(ROWS_AT_ONCE, columns=[name], use_threads=False)
        return self._all(_Texts(batch.column(0).to_pylist() for batch in batches))

    def _whole(self, name: str) -> Any:
        """A column as one Arrow array."""
        return self._all(self._open().read([name], use_threads=False).column(0).combine_chunks())

    def _all(self, values: Any) -> Any:
        if len(values) != self.num_rows:
            raise ValueError(f"{len(values)} of {self.num_rows} rows in a column")
        return values

    def _open(self) -> "pyarrow.parquet.ParquetFile":
        """The file from its footer on; where it is another one than before, rows of the two would be mixed."""
        import pyarrow.parquet as pq

        how = {"page_checksum_verification": True, "buffer_size": BYTES_AT_ONCE, "pre_buffer": False}
        file = pq.ParquetFile(_Stream(self._file), **how)
        if self._metadata and not file.metadata.equals(self._metadata):
            raise Changed
        return file


def _numbers(array: Any) -> np.ndarray:
    """As `array.to_numpy()`, which would import pandas."""
    if array.null_count:
        raise ValueError("a number is missing in it")
    return _buffer(array, array.type.to_pandas_dtype(), len(array))


def _buffer(array: Any, dtype: type, num: int) -> np.ndarray:
    """An Arrow array's values, or of lists their offsets, where the array begins in the buffer."""
    if not num:
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype)[array.offset :][:num]


def _lists(values: np.ndarray, ends: np.ndarray) -> "np.ndarray | _Lists":
    length = int(ends[1] - ends[0]) if len(ends) > 1 else 0
    if length and (np.diff(ends) == length).all():
        return values[ends[0] : ends[-1]].reshape(-1, length)
    return _Lists(values, ends)


class _Lists(Sequence):
    """Lists of numbers of any lengths."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self._values, self._ends = values, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> list:
        return self._values[self._ends[row] : self._ends[row + 1]].tolist()


class _Texts(Sequence):
    """Texts or bytes, or none, in compressed blocks of some rows."""

    def __init__(self, parts: Iterable[list]):
        self._blocks, self._num, self._rows, left = [], 0, 0, []
        for part in parts:
            if not self._rows:
                average = sum(len(text or "") for text in part) // max(1, len(part)) + 1
                self._rows = max(1, min(MOST_OF_BLOCK, LONGEST_BLOCK // average))
            left += part
            whole = len(left) - len(left) % self._rows
            self._pack(left[:whole])
            left = left[whole:]
        self._pack(left)
        self._open: tuple[int, list] = (-1, [])  # the block that was asked for last

    def _pack(self, texts: list) -> None:
        for start in range(0, len(texts), self._rows):
            block = pickle.dumps(texts[start : start + self._rows], pickle.HIGHEST_PROTOCOL)
            packed = blosc.compress(block, b"lz4", 1, blosc.NOSHUFFLE)
            self._blocks.append(bytes(memoryview(packed)))  # a copy, for it keeps the room it was made in
        self._num += len(texts)

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, row: int) -> Any:
        number, place = divmod(row, self._rows)
        known, texts = self._open  # taken at once: another thread may open another block
        if known != number:
            texts = pickle.loads(blosc.decompress(self._blocks[number]))
            self._open = number, texts
        return texts[place]


class _Stream(io.RawIOBase):
    """A file of parts as pyarrow reads one."""

    def __init__(self, file: Parts):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        (data,) = self._file.ranges([(self._at, left if size is None or size < 0 else min(size, left))])
        self._at += len(data)
        return bytes(data)


class Names(Sequence):
    """Texts as Arrow holds them: as many bytes as they have, and quick to send to another process.

    They equal a tuple of the same texts and are printed as one.

    Args:
        texts: without gaps.
    """

    def __init__(self, texts: Any):
        import pyarrow as pa

        if not isinstance(texts, pa.Array):  # which would import pandas to make one
            parts = [text.encode() for text in texts]
            ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
            texts = pa.StringArray.from_buffers(len(parts), pa.py_buffer(ends), pa.py_buffer(b"".join(parts)))
        self._array = texts

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, at: Any) -> Any:
        return Names(self._array[at]) if isinstance(at, slice) else self._array[at].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._array.to_pylist())

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._array.equals(other._array)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def in_order(self) -> "Names":
        """These names, each greater than the one before.

        Raises:
            ValueError: they are not.
        """
        self._some, last = [], []  # some to search in: a list answers ten times as fast as Arrow's array
        for start in range(0, len(self), ROWS_AT_ONCE):  # the next ones' texts take the room of these
            names = self._array[start : start + ROWS_AT_ONCE].to_pylist()
            if not all(map(operator.lt, [*last, *names], names[1 - len(last) :])):
                raise ValueError("its rows are out of order")
            self._some += names[::STRIDE]
            last = names[-1:]
        return self

    def place(self, name: str) -> int:
        """Where a name stands, of names `in_order`; KeyError where it does not."""
        first = STRIDE * max(0, bisect_right(self._some, name) - 1)
        at = bisect_left(self, name, first, min(first + STRIDE, len(self)))
        if at == len(self) or self[at] != name:
            raise KeyError(name)
        return at


class Rows(Sequence):
    """A table's rows, each made into an object when it is asked for.

    Args:
        columns: the table.
        make: an object of the columns and the row's number.
        names: of the rows, `in_order`.
    """

    def __init__(self, columns: Columns, make: Callable[[Columns, int], Any], names: Names):
        self.columns, self.names, self._make = columns, names, make

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getitem__(self, at: Any) -> Any:
        rows = range(len(self))[at]
        return tuple(map(self.__getitem__, rows)) if isinstance(at, slice) else self._make(self.columns, rows)

    def __iter__(self) -> Iterator:
        return (self._make(self.columns, row) for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | Rows):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None

    def __reduce__(self) -> tuple[type, tuple]:
        return tuple, (tuple(self),)  # an open file does not travel

    @property
    def by_name(self) -> Mapping[str, Any]:
        """Rows by their names."""
        return _ByName(self)


class _ByName(Mapping):
    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.names)

    def __getitem__(self, name: str) -> Any:
        return self._rows[self._rows.names.place(name)]
