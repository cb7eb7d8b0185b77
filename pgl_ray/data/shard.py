"""One array in one Zarr v3 shard: written by zarr-python, read crop by crop without it.

zarr-python's asyncio costs 0.4-0.9 ms per chunk; reading the shard's own index and decoding only the touched chunks
costs under a millisecond per 20x115x115 crop.
"""

import json
import math
import os
import struct
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import blosc

ARRAY_PATHS = {"volume": "0", "label": "labels/organs/0"}  # inside a scan's group
MISSING = 2**64 - 1  # index entry of a chunk that was never written


def write_array(folder: Path, array: np.ndarray, chunk: tuple[int, int, int]) -> str:
    """Writes an array [D, H, W] as one shard of lz4 chunks.

    Args:
        folder: of the array; must not exist.
        array: integers, native byte order.
        chunk: inner chunk in voxels.

    Returns:
        The array's zarr.json.
    """
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    made = zarr.create_array(
        str(folder),
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=tuple(-(-size // step) * step for size, step in zip(array.shape, chunk)),
        # lz4 alone would decode a flipped bit into wrong voxels without a word: hence a checksum per chunk
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()],
        fill_value=0,
        dimension_names=["z", "y", "x"],
        config={"write_empty_chunks": True},
    )
    made[:] = array
    return (folder / "zarr.json").read_text()


class ArrayReader:
    """Reads boxes of one stored array, decoding only the chunks that they touch.

    Holds one open file. Not safe to share between threads: the decode buffer is reused.

    Args:
        store: folder of the store.
        scan_id: the scan.
        kind: "volume" or "label".
        metadata_json: text of the array's zarr.json, from the record.

    Raises:
        RuntimeError: the shard is missing, cut off or damaged.
    """

    def __init__(self, store: str | Path, scan_id: str, kind: str, metadata_json: str):
        metadata = json.loads(metadata_json)
        sharding = metadata["codecs"][0]["configuration"]
        self.scan_id, self.kind = scan_id, kind
        self.shape = tuple(metadata["shape"])
        self.dtype = np.dtype(metadata["data_type"])
        self.chunk = tuple(sharding["chunk_shape"])
        self.fill_value = metadata["fill_value"]
        self._scratch = np.empty(self.chunk, self.dtype)
        folder = Path(store, "scans", scan_id, ARRAY_PATHS[kind])
        try:
            self._file = os.open(folder / "c/0/0/0", os.O_RDONLY)
        except OSError as error:
            raise self._damaged(f"cannot be opened ({error.strerror})") from None
        self._index = self._read_index()

    def _read_index(self) -> np.ndarray:
        """The shard's footer: (offset, bytes) of every chunk, uint64 [gd, gh, gw, 2], closed by its crc32c."""
        grid = tuple(-(-size // step) for size, step in zip(self.shape, self.chunk))
        length = math.prod(grid) * 16 + 4
        footer = os.pread(self._file, length, max(0, os.fstat(self._file).st_size - length))
        if len(footer) < length or not _intact(footer):
            raise self._damaged("has no valid chunk index: the file is cut off or damaged")
        return np.frombuffer(footer[:-4], "<u8").reshape(*grid, 2)

    def read(self, box: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Voxels of a box.

        Args:
            box: int [3, 2], half-open, inside the array.
            out: array of the box' shape to fill; none: a new one of the stored dtype.

        Raises:
            ValueError: the box reaches beyond the array.
            RuntimeError: a chunk is damaged; names scan and chunk.
        """
        bounds = np.asarray(box).tolist()
        if any(not 0 <= start <= stop <= size for (start, stop), size in zip(bounds, self.shape)):
            raise ValueError(f"box {bounds} reaches beyond the {self.kind} of {self.scan_id}, shape {self.shape}")
        if out is None:
            out = np.empty([stop - start for start, stop in bounds], self.dtype)
        axes = [_parts(start, stop, step) for (start, stop), step in zip(bounds, self.chunk)]
        for (d, from_d, to_d), (h, from_h, to_h), (w, from_w, to_w) in product(*axes):
            offset, length = self._index[d, h, w].tolist()
            if offset == MISSING:
                out[to_d, to_h, to_w] = self.fill_value
                continue
            self._decode(offset, length, (d, h, w))
            out[to_d, to_h, to_w] = self._scratch[from_d, from_h, from_w]
        return out

    def _decode(self, offset: int, length: int, chunk: tuple[int, int, int]) -> None:
        data = os.pread(self._file, length, offset)
        if len(data) < length or not _intact(data):
            raise self._damaged(f"is damaged in chunk {chunk}")
        blosc.decompress(memoryview(data)[:-4], self._scratch)

    def _damaged(self, fault: str) -> RuntimeError:
        mend = "delete its folder under scans/ and run prepare again"
        return RuntimeError(f"stored {self.kind} of scan {self.scan_id!r} {fault}: {mend}")

    def close(self) -> None:
        """Closes the file; the reader is of no use afterwards."""
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self):
        self.close()


def _intact(data: bytes) -> bool:
    """Whether bytes that end in their little-endian crc32c agree with it (Zarr's crc32c codec)."""
    return google_crc32c.value(data[:-4]) == struct.unpack("<I", data[-4:])[0]


def _parts(start: int, stop: int, step: int) -> list[tuple[int, slice, slice]]:
    """Chunks that an interval touches: (chunk, its voxels inside the chunk, their place in the output)."""
    parts = []
    for chunk in range(start // step, -(-stop // step) if stop > start else start // step):
        first, last = max(start, chunk * step), min(stop, (chunk + 1) * step)
        parts.append((chunk, slice(first - chunk * step, last - chunk * step), slice(first - start, last - start)))
    return parts
