"""What is counted and measured of a scan's voxels and labels: exact, and independent of the order of summation."""

import math

import numpy as np
from scipy import ndimage

from pgl_ray.data.hu_codes import ALL_HU

HISTOGRAM_HU = tuple(range(-1024, 1601, 64))  # inner bounds of the records' bins; the first and last bin are open
BODY_HU = -500  # voxels above it are body (or couch), below it air and lung
HISTOGRAM_STARTS = (0, *(hu + 2**15 for hu in HISTOGRAM_HU))  # of the bins, among all HU in ascending order


def count_values(array: np.ndarray) -> np.ndarray:
    """Number of voxels per unsigned value, some slices at a time because bincount widens its input to 8 bytes a voxel;
    single ones would cost more in adding up the counts than in counting."""
    size, num = 2 ** (8 * array.itemsize), max(1, 2**20 // max(1, array[0].size))
    counts = np.zeros(size, np.int64)
    for i in range(0, len(array), num):
        counts += np.bincount(array[i : i + num].ravel(), minlength=size)
    return counts


def statistics(volume: np.ndarray, hu_window: tuple[float, float]) -> tuple[float, float]:
    """Mean and standard deviation after clipping, exact and independent of the order of summation."""
    return mean_and_std(count_values(volume.view(np.uint16)), hu_window)


def mean_and_std(counts: np.ndarray, hu_window: tuple[float, float]) -> tuple[float, float]:
    """`statistics` from the voxels of each HU, int64 [2**16] as hu_codes.ALL_HU."""
    values, size = ALL_HU.clip(*hu_window).astype(np.float64), counts.sum()
    mean = np.sum(counts * values) / size
    return float(mean), math.sqrt(np.sum(counts * (values - mean) ** 2) / size)


def histogram(counts: np.ndarray) -> tuple[int, ...]:
    """Number of voxels per bin of HISTOGRAM_HU, from the voxels of each HU."""
    return tuple(np.add.reduceat(np.roll(counts, 2**15), HISTOGRAM_STARTS).tolist())


def body_shares(volume: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Share of voxels above BODY_HU in the volume, and on its four side faces."""
    faces = (volume[:, 0], volume[:, -1], volume[:, :, 0], volume[:, :, -1])
    bodies = sum(int(np.count_nonzero(face > BODY_HU)) for face in faces)
    body = counts[: 2**15].sum() + counts[2**16 + BODY_HU + 1 :].sum()  # HU of 0 and above stand first, see ALL_HU
    return float(body / volume.size), bodies / sum(face.size for face in faces)


def foreground_box(volume: np.ndarray) -> tuple[int, ...]:
    """Half-open box (d0, d1, h0, h1, w0, w1) in voxels of what is above -500 HU in [D, H, W]; all where nothing is."""
    body = np.asarray(volume > BODY_HU)
    if not body.any():
        return tuple(bound for size in volume.shape for bound in (0, size))
    box: list[int] = []
    seen = np.asarray(body.any(axis=0))
    for line in (body.any(axis=(1, 2)), seen.any(axis=1), seen.any(axis=0)):
        inside = np.flatnonzero(line)
        box += [int(inside[0]), int(inside[-1]) + 1]
    return tuple(box)


def label_boxes(label: np.ndarray) -> dict[int, tuple[int, ...]]:
    """Box (d0, d1, h0, h1, w0, w1) of every label value that occurs."""
    boxes = ndimage.find_objects(label)
    return {value: tuple(b for s in box for b in (s.start, s.stop)) for value, box in enumerate(boxes, 1) if box}


def count_labels(label: np.ndarray) -> dict[int, int]:
    """Voxels of every label value that occurs, background left out."""
    counts = count_values(label)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}
