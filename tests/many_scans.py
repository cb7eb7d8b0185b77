"""Made-up stores of any number of scans: their index alone, written by pyarrow from columns of random values."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgl_ray.data import store_settings
from pgl_ray.data.scan_record import ScanRecord, index_schema
from pgl_ray.data.shard import array_metadata
from pgl_ray.data.voxel_statistics import HISTOGRAM_HU

CHUNK = (8, 64, 64)
ORGANS = {f"organ_{value}": value for value in range(1, 14)}
WINDOW = (-1024.0, 325.0)


def random_shapes(num: int, seed: int = 0) -> np.ndarray:
    """int64 [num, 3], nearly all of them different, as scans that were resampled have them."""
    return np.random.default_rng(seed).integers((40, 200, 200), (900, 600, 600), (num, 3))


def write_index(folder: Path, shapes: np.ndarray, seed: int = 0) -> Path:
    """A store whose index lists a scan per shape [N, 3], each with 13 organs; there are no voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, num = np.random.default_rng(seed), len(shapes)
    boxes = np.stack([shapes // 8, shapes - shapes // 9], -1).reshape(num, 6)
    hashes = [rng.bytes(32).hex() for _ in range(num)]
    columns = {
        "scan_id": [f"imagesTr__case_{i:07}" for i in range(num)],
        "shape": _lists(shapes),
        "spacing_mm": _lists(rng.uniform(0.5, 3, (num, 3))),
        "orientation": ["RAS"] * num,
        "affine": _lists(rng.normal(size=(num, 16))),
        "mean_hu": rng.normal(-600, 50, num),
        "std_hu": rng.uniform(300, 400, num),
        "foreground_box": _lists(boxes),
        "source": [f"/data/imagesTr/case_{i:07}.nii.gz" for i in range(num)],
        "source_size": rng.integers(10**7, 10**8, num),
        "source_mtime_ns": rng.integers(10**18, 2 * 10**18, num),
        "source_hash": hashes[::-1],
        "content_hash": hashes,
        "histogram": _lists(rng.integers(1, 10**7, (num, len(HISTOGRAM_HU) + 1))),
        "foreground_share": rng.uniform(0.2, 0.6, num),
        "border_share": rng.uniform(0, 0.1, num),
        "split": ["train" if i % 5 else "test" for i in range(num)],
        "array_metadata": _metadata(shapes, np.int16),
        "label_metadata": _metadata(shapes, np.uint8),
        "labelled": _lists(np.tile(list(ORGANS.values()), (num, 1))),
        "label_boxes": _of_organs(boxes.tolist()),
        "label_voxels": _of_organs(shapes.prod(1).tolist()),
        "num_padding": np.zeros(num, np.int64),
        "source_label_metadata": pa.nulls(num, pa.string()),
        "source_affine": pa.array([[]] * num, pa.list_(pa.float64())),
    }
    columns |= {name: np.zeros(num) for name in ("rounding_error_hu", "encoding_rms_hu", "clipped_share")}
    names = ScanRecord.__dataclass_fields__
    table = pa.table({name: columns[name] for name in names}, schema=index_schema())
    pq.write_table(table, folder / "index.parquet", write_page_checksum=True)
    store_settings.write_settings(folder, ORGANS, WINDOW)
    return folder


def _lists(rows: np.ndarray) -> pa.Array:
    ends = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(rows.reshape(-1)))


def _metadata(shapes: np.ndarray, dtype: type) -> list[str]:
    """zarr.json of each array; zarr itself takes some milliseconds for one."""
    marks = ("8001", "8002", "8100", "8008", "8064", "8128")  # of the shape, and of the shard in whole chunks
    text = array_metadata(tuple(map(int, marks[:3])), np.dtype(dtype), CHUNK)
    for place, mark in enumerate(marks):
        assert text.count(mark) == 1
        text = text.replace(mark, f"%({place})s")
    shards = -(-shapes // CHUNK) * CHUNK
    rows = np.concatenate([shapes, shards], 1).tolist()
    keys = list(map(str, range(6)))
    return [text % dict(zip(keys, row)) for row in rows]


def _of_organs(values: list) -> list[str]:
    return [json.dumps(dict.fromkeys(ORGANS.values(), value)) for value in values]
