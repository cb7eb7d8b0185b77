"""Crops of the paper's size from one stored scan: our shard reader against zarr-python, interleaved.

`make bench` prints the table; CI runs it for correctness alone.
"""

import itertools
import os
import statistics
import time

import numpy as np
import zarr

from pgl_ray.data import scan_files

SHAPE = (96, 256, 256)
REPEATS = 30 if os.environ.get("PGL_RAY_BENCH") else 5


def test_crop_reader(tmp_path):
    rng = np.random.default_rng(0)
    volume = np.cumsum(rng.integers(-9, 10, SHAPE), 1).clip(-1024, 3000).astype(np.int16)  # compresses like a CT
    record = scan_files.write_scan(tmp_path, "scan", volume, np.eye(4))
    theirs = zarr.open_array(f"{tmp_path}/scans/scan/0", mode="r")
    ours = scan_files.open_volume(tmp_path, record)
    readers = {"pgl_ray": ours.read, "zarr-python": lambda box: theirs[tuple(slice(a, b) for a, b in box)]}
    seconds = {name: [] for name in readers}
    for _, name in itertools.product(range(REPEATS), readers):
        size = rng.integers((18, 106, 106), (23, 135, 135))
        start = rng.integers(np.array(SHAPE) - size)
        box = np.stack([start, start + size], -1)
        began = time.perf_counter()
        crop = readers[name](box)
        seconds[name].append(time.perf_counter() - began)
        np.testing.assert_array_equal(crop, volume[tuple(slice(a, b) for a, b in box)])
    medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<12} {value:7.2f} ms per crop  x{value / medians['pgl_ray']:.1f}")
