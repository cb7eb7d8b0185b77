"""STORE/chunks.parquet: where the chunks of all shards lie, one row per stored array.

A process that reads crops from a bucket then asks neither for a shard's size nor for its footer: a third of its
requests. It follows from the shards: where it is missing, damaged or out of date, their footers are read.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from pgl_ray.data.array_reader import ArrayReader, ChunkIndex, UnreadableScan
from pgl_ray.data.columns import parquet_table
from pgl_ray.data.place import Place, open_place
from pgl_ray.paths import is_url

FILE = "chunks.parquet"
METADATA = {"volume": "array_metadata", "label": "label_metadata"}  # kind -> field of the record
LARGEST = 2**26  # bytes of a table that every rendering process holds, about 25,000 scans of 150 x 512 x 512
READS_AT_ONCE = 16  # footers; an object store answers each after tens of milliseconds

Row = dict[str, Any]


def write(place: Place, records: Iterable[Any]) -> None:
    """Writes the table of a store; of scans that it has already, no footer is read.

    Args:
        place: of the store.
        records: of its scans (scan_record.ScanRecord).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [(record, kind) for record in records for kind, name in METADATA.items() if getattr(record, name)]
    try:
        stored = _read(place, place.read(FILE))
    except FileNotFoundError:  # a new store, or one of an earlier version
        stored = None
    known = {(row["scan_id"], row["kind"]): row for row in (stored.to_pylist() if stored else ())}

    rows, new = [], []
    for record, kind in wanted:
        row, mark = known.get((record.scan_id, kind)), _mark(record)
        if row and row["mark"] == mark:
            rows.append(row)
        else:
            new.append((record, kind, mark))
    if stored is not None and not new and len(rows) == len(known):
        return
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        rows += [row for row in pool.map(lambda one: _row(place, *one), new) if row]
    rows.sort(key=lambda row: (row["scan_id"], row["kind"]))  # for a search by bisection
    text, number = pa.string(), pa.int64()
    fields = {"scan_id": text, "kind": text, "mark": number, "size": number, "lengths": pa.binary()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), sink, write_page_checksum=True)
    place.write(FILE, [sink.getvalue().to_pybytes()])


def _mark(record: Any) -> int:
    """Another number where a scan was converted again, with other voxels or other labels."""
    fields = (record.source_hash, record.content_hash, record.array_metadata, record.label_metadata, record.label_boxes)
    return google_crc32c.value(repr((*fields, record.label_voxels)).encode())


def _row(place: Place, record: Any, kind: str, mark: int) -> Row | None:
    """Row of a shard whose chunks lie one after the other, as ours do; none of others, and of a damaged one."""
    try:
        reader = ArrayReader(place.url, record.scan_id, kind, getattr(record, METADATA[kind]))
    except UnreadableScan:  # who reads the scan says so
        return None
    size, spans = reader.index
    reader.close()
    lengths = spans[:, 1]
    if (spans[:, 0] != lengths.cumsum() - lengths).any():
        return None
    packed = blosc.compress(lengths.astype("<u4"), b"lz4", 5, blosc.SHUFFLE)
    return {"scan_id": record.scan_id, "kind": kind, "mark": mark, "size": size, "lengths": packed}


def damage(place: Place) -> str:
    """What is wrong with a store's table; "" = nothing, or there is none."""
    try:
        parquet_table(place.read(FILE))
    except FileNotFoundError:
        return ""
    except Exception as error:  # pyarrow's own, of several kinds
        return " ".join(str(error).split())
    return ""


def _read(place: Place, content: bytes) -> Any:
    """The table, as Arrow has it; none where it is damaged."""
    try:
        return parquet_table(content).combine_chunks()
    except Exception as error:  # pyarrow's own, of several kinds
        reason = " ".join(str(error).split())
        print(f"  {FILE} of {place.url} is damaged ({reason}): read from the shards, which takes longer", flush=True)
        return None


def lookup(store: str) -> Callable[[str, str], ChunkIndex | None]:
    """What gives the chunk index of a scan's array, by scan and kind, or none where it is not known or not needed: on
    a disk a footer costs a few microseconds."""
    return _lookup(store) if is_url(store) else lambda scan_id, kind: None


@lru_cache(maxsize=4)
def _lookup(store: str) -> Callable[[str, str], ChunkIndex | None]:
    place = open_place(store)
    try:
        file = place.open(FILE)
    except FileNotFoundError:
        return lambda scan_id, kind: None
    table = _read(place, b"".join(file.ranges([(0, file.size)]))) if file.size <= LARGEST else None
    if table is None:
        return lambda scan_id, kind: None
    sizes, packed = table["size"], table["lengths"]
    kinds = np.array(table["kind"].to_pylist())
    ids = np.array([scan_id.encode() for scan_id in table["scan_id"].to_pylist()], "S")  # sorted, and so to be halved
    rows = {kind: np.flatnonzero(kinds == kind) for kind in METADATA}
    ids = {kind: ids[of_kind] for kind, of_kind in rows.items()}

    def find(scan_id: str, kind: str) -> ChunkIndex | None:
        key = scan_id.encode()
        at = int(np.searchsorted(ids[kind], key))
        if at == len(ids[kind]) or ids[kind][at] != key:
            return None
        row = int(rows[kind][at])
        lengths = np.frombuffer(blosc.decompress(packed[row].as_py()), "<u4").astype("<u8")
        return ChunkIndex(sizes[row].as_py(), np.stack([lengths.cumsum(dtype="<u8") - lengths, lengths], -1))

    return find
