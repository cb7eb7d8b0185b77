"""What a rendering process keeps from batch to batch: a store's index, open scans, regions, arrays to fill."""

import json
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from pgl_ray.data import chunks, wire
from pgl_ray.data.array_reader import ArrayReader, Chunks
from pgl_ray.data.regions import REGIONS_MIXED, Region
from pgl_ray.data.scan_files import open_label, open_volume
from pgl_ray.data.shard import chunk_of
from pgl_ray.data.store import Index, read_index
from pgl_ray.paths import is_url


@lru_cache(maxsize=4)
def index_of(store: str) -> Index:
    """A store's index."""
    read = partial(read_index, store)
    return wire.patiently(read, store) if is_url(store) else read()


@lru_cache(maxsize=256)
def volume_reader(store: str, scan_id: str, codes: bool = False) -> ArrayReader:
    """A scan's volume [D, H, W], opened; `codes`: as it is stored, not in HU."""
    chunk_index = chunks.lookup(store)(scan_id, "volume")
    return open_volume(store, index_of(store).by_id[scan_id], codes, chunk_index)


@lru_cache(maxsize=256)
def label_reader(store: str, scan_id: str) -> ArrayReader:
    """A scan's label map [D, H, W], opened."""
    chunk_index = chunks.lookup(store)(scan_id, "label")
    return open_label(store, index_of(store).by_id[scan_id], chunk_index)


@lru_cache(maxsize=4096)
def chunk_shape(array_metadata: str) -> tuple[int, int, int]:
    """Inner chunk of an array in voxels, from the text of its zarr.json."""
    return chunk_of(json.loads(array_metadata))


@lru_cache(maxsize=2 * REGIONS_MIXED)
def region_of(store: str, scan_id: str, box: tuple[int, ...], codes: bool) -> Region:
    """A region of a scan, kept while its pairs are drawn: int16, 2.4 MB for views of 16x96x96."""
    bounds, volume = np.reshape(box, (3, 2)), volume_reader(store, scan_id, codes)
    near = reader_of_region(store, scan_id, box, codes) if volume.far else volume
    return Region(near.read_boxes([bounds])[0], tuple(bounds[:, 0].tolist()), volume.shape)


class AtHand(NamedTuple):
    """What reads boxes of an array whose stored bytes are here already.

    Attributes:
        reader: of the array.
        chunks: those that the boxes touch.
    """

    reader: ArrayReader
    chunks: Chunks

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.reader.shape

    def read_boxes(self, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As ArrayReader's."""
        return self.reader.read_boxes(boxes, chunks=self.chunks)


def fetch_boxes(reader: ArrayReader, boxes: Sequence[np.ndarray]) -> AtHand:
    """Brings what boxes touch here, as far as they lie inside the array."""
    shape = np.asarray(reader.shape)[:, None]
    return AtHand(reader, reader.fetch([np.clip(box, 0, shape) for box in boxes]))


@lru_cache(maxsize=2 * REGIONS_MIXED)
def reader_of_region(store: str, scan_id: str, box: tuple[int, ...], codes: bool) -> AtHand:
    """As long as its region is kept, lest it be fetched again."""
    reader, places = fetch_boxes(volume_reader(store, scan_id, codes), [np.reshape(box, (3, 2))])
    return AtHand(reader, {place: memoryview(bytes(data)) for place, data in places.items()})  # of more than that


def part_reader(store: str, scan_id: str, region: np.ndarray | None, codes: bool = False) -> ArrayReader | Region:
    """What reads a scan's voxels, or only those of its region."""
    if region is None:
        return volume_reader(store, scan_id, codes)
    return region_of(store, scan_id, tuple(region.ravel().tolist()), codes)


@lru_cache(maxsize=16)
def _arrays(name: str) -> list[np.ndarray]:
    """Of earlier batches under a name."""
    return []


def recycled(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that an earlier batch had under this name, as it was left, if nobody holds it any more; else a new one.
    New memory costs a page fault every 4 KB, dear on virtual machines. For one thread: Ray's tasks have one."""
    arrays = _arrays(name)
    for i in range(len(arrays)):
        if arrays[i].shape == shape and arrays[i].dtype == dtype and sys.getrefcount(arrays[i]) == 2:
            return arrays[i]
    arrays[:] = [np.empty(shape, dtype), *arrays[:1]]
    return arrays[0]
