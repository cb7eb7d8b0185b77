"""Compiled kernels of the streaming hot path (numba): crop -> view in one pass, the blur, 8-bit codes -> HU.

They release the GIL. numba keeps their machine code beside this file or in the user's cache folder: the first use on a
machine compiles for some seconds, the first in a process takes about one second, nearly all of it numba's import.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Kernels(NamedTuple):
    """See the functions below."""

    resize: Callable
    blur: Callable
    look_up: Callable


@lru_cache(maxsize=1)
def load() -> Kernels | None:
    """The kernels; none where numba is missing: then torch and numpy do their work, with results equal to 1e-5."""
    try:
        from numba import njit
    except ImportError:
        return None
    options = {"nogil": True, "fastmath": {"contract", "nnan", "nsz"}}
    try:
        return Kernels(*(njit(cache=True, **options)(each) for each in (_resize, _blur, _look_up)))
    except RuntimeError:  # no folder to keep machine code in
        return Kernels(*(njit(**options)(each) for each in (_resize, _blur, _look_up)))


def _resize(crop, low, high, scale, shift, z, y, x, out):
    """Clips, resizes linearly, normalises and flips; a flip is a reversed table.

    Args:
        crop: int16 [d, h, w], HU, C order.
        low, high: float32, HU window.
        scale, shift: float32; view = scale * HU + shift.
        z, y, x: per axis a table (int64 first, int64 second, float32 weight of the second), one entry per view voxel.
        out: float32 [D, H, W].
    """
    (z_0, z_1, z_w), (y_0, y_1, y_w), (x_0, x_1, x_w) = z, y, x
    width, one = crop.shape[2], np.float32(1)
    row = np.empty(width, np.float32)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            w_11 = z_w[i] * y_w[j]
            w_10, w_01 = z_w[i] - w_11, y_w[j] - w_11
            w_00 = one - z_w[i] - w_01
            row_00, row_01 = crop[z_0[i], y_0[j]], crop[z_0[i], y_1[j]]
            row_10, row_11 = crop[z_1[i], y_0[j]], crop[z_1[i], y_1[j]]
            for k in range(width):
                row[k] = (
                    w_00 * min(max(np.float32(row_00[k]), low), high)
                    + w_01 * min(max(np.float32(row_01[k]), low), high)
                    + w_10 * min(max(np.float32(row_10[k]), low), high)
                    + w_11 * min(max(np.float32(row_11[k]), low), high)
                )
            line = out[i, j]
            for k in range(out.shape[2]):
                first = row[x_0[k]]
                line[k] = scale * (first + x_w[k] * (row[x_1[k]] - first)) + shift


def _blur(view, taps, out):
    """Separable convolution with replicated borders.

    Args:
        view: float32 [D, H, W], C order.
        taps: float32 [2 * radius + 1], the same on all axes.
        out: float32 [D, H, W], another array.
    """
    depth, height, width = view.shape
    radius = len(taps) // 2
    plane = np.empty((height, width), np.float32)
    row = np.empty(width + 2 * radius, np.float32)
    for i in range(depth):
        for j in range(height):
            line = plane[j]
            line[:] = 0
            for t in range(len(taps)):
                source, tap = view[min(max(i + t - radius, 0), depth - 1), j], taps[t]
                for k in range(width):
                    line[k] += tap * source[k]
        for j in range(height):
            row[:] = 0
            inner = row[radius : radius + width]
            for t in range(len(taps)):
                source, tap = plane[min(max(j + t - radius, 0), height - 1)], taps[t]
                for k in range(width):
                    inner[k] += tap * source[k]
            row[:radius] = row[radius]
            row[radius + width :] = row[radius + width - 1]
            line = out[i, j]
            line[:] = 0
            for t in range(len(taps)):
                source, tap = row[t : t + width], taps[t]
                for k in range(width):
                    line[k] += tap * source[k]


def _look_up(table, codes, out):
    """HU of 8-bit codes.

    Args:
        table: int16 [256].
        codes: uint8 [n].
        out: int16 [n].
    """
    for i in range(len(codes)):
        out[i] = table[codes[i]]
