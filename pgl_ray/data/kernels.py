"""Compiled kernels of the streaming hot path (numba): crop -> view, intensity operations, 8-bit codes -> HU.

They release the GIL. numba keeps their machine code beside this file or in the user's cache folder: the first use
on a machine compiles for two seconds of CPU time, the first in a process takes half a second.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Kernels(NamedTuple):
    """See the functions below."""

    resize: Callable
    blur: Callable
    gain_and_gamma: Callable
    random_bits: Callable
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
        return Kernels(
            *(njit(cache=True, **options)(each) for each in (_resize, _blur, _gain_and_gamma, _random_bits, _look_up))
        )
    except RuntimeError:  # no folder to keep machine code in
        return Kernels(*(njit(**options)(each) for each in (_resize, _blur, _gain_and_gamma, _random_bits, _look_up)))


def _resize(crop, planes, rows, height, width, low, high, scale, shift, z, y, x, out):
    """Clips, resizes linearly, normalises and flips; a flip is a reversed table.

    Args:
        crop: int16, HU, 1-D: voxel (d, h, w) of the crop stands at planes * d + rows * h + w.
        planes, rows: int64, from a plane, or row, of the crop to the next.
        height, width: int64, of the crop.
        low, high: float32, HU window.
        scale, shift: float32; view = scale * HU + shift.
        z, y, x: per axis a table (uint64 first, uint64 second, float32 weight of the second), one entry per view voxel;
            a signed index would be tested for being negative, which costs a quarter of the time.
        out: float32 [D, H, W].
    """
    (z_0, z_1, z_w), (y_0, y_1, y_w), (x_0, x_1, x_w) = z, y, x
    plane, row = np.empty((height, width), np.float32), np.empty(width, np.float32)
    flat = plane.reshape(-1)
    strips, length = (1, height * width) if rows == width else (height, width)  # long loops are quicker
    for i in range(out.shape[0]):
        weight = z_w[i]
        for j in range(strips):
            at_0, at_1 = np.int64(z_0[i]) * planes + j * rows, np.int64(z_1[i]) * planes + j * rows
            below, above = crop[at_0 : at_0 + length], crop[at_1 : at_1 + length]
            line = flat[j * length : (j + 1) * length]
            for k in range(length):
                first = min(max(np.float32(below[k]), low), high)
                line[k] = first + weight * (min(max(np.float32(above[k]), low), high) - first)
        for j in range(out.shape[1]):
            left, right, share = plane[y_0[j]], plane[y_1[j]], y_w[j]
            for k in range(width):
                row[k] = left[k] + share * (right[k] - left[k])
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


def _gain_and_gamma(view, low, high, gain, gamma, out):
    """Factor, clipped to the view's own range, then power on that range scaled to [0, 1].

    The power is 2^(gamma * log2) by polynomials in loops without branches, which become vector instructions; its error
    is below 2e-6 of the range.

    Args:
        view: float32 [n].
        low, high: float32, its range.
        gain, gamma: float32; 1: not applied.
        out: float32 [n], another array.
    """
    one, half = np.float32(1), np.float32(0.5)
    if gamma == one:
        for k in range(len(view)):
            out[k] = min(max(view[k] * gain, low), high)
        return
    bottom, top = min(max(low * gain, low), high), min(max(high * gain, low), high)
    span = max(top - bottom, np.float32(1e-6))
    per_span, least = one / span, np.float32(1e-37)  # exponent -123; the bits of far smaller numbers read otherwise
    of_zero = one if gamma == 0 else np.float32(0)
    block = 1024
    unit, power = np.empty(block, np.float32), np.empty(block, np.float32)
    bits, exponents = unit.view(np.int32), np.empty(block, np.int32)
    for start in range(0, len(view), block):
        source, target = view[start : start + block], out[start : start + block]
        for k in range(len(source)):
            value = min(max(source[k] * gain, low), high)
            unit[k] = min(max((value - bottom) * per_span, least), one)
        for k in range(len(source)):  # unit = mantissa in [1, 2) * 2^exponent
            exponents[k] = (bits[k] >> 23) - 127
            bits[k] = (bits[k] & 0x7FFFFF) | 0x3F800000
        for k in range(len(source)):  # gamma * log2; log2 of the mantissa by Chebyshev's polynomial
            x = unit[k] - np.float32(1.5)
            log = np.float32(-0.02079003319) + x * (np.float32(0.01477057116) - x * np.float32(0.00866569932))
            log = np.float32(0.1425259284) + x * (
                np.float32(-0.07126680309) + x * (np.float32(0.03746649028) + x * log)
            )
            log = np.float32(0.5849625007) + x * (np.float32(0.9617959854) + x * (np.float32(-0.3205984712) + x * log))
            power[k] = max(gamma * (np.float32(exponents[k]) + log), np.float32(-126))
        for k in range(len(source)):  # 2^whole * exp(x), |x| < 0.35
            whole = np.int32(power[k] + np.float32(126.5)) - 126
            x = (power[k] - np.float32(whole)) * np.float32(0.6931471806)
            exp = np.float32(1 / 6) + x * (np.float32(1 / 24) + x * (np.float32(1 / 120) + x * np.float32(1 / 720)))
            power[k] = one + x * (one + x * (half + x * exp))
            bits[k] = whole
        for k in range(len(source)):
            bits[k] = (bits[k] + 127) << 23
        for k in range(len(source)):
            target[k] = (power[k] * unit[k] if exponents[k] > -123 else of_zero) * span + bottom


def _random_bits(state, first, second):
    """Two 24-bit numbers per step of splitmix64's counter, as `views.noise` draws them.

    Args:
        state: uint64, the counter's start.
        first, second: float32 [n], to be filled.
    """
    step, factor_1, factor_2 = (
        np.uint64(0x9E3779B97F4A7C15),
        np.uint64(0xBF58476D1CE4E5B9),
        np.uint64(0x94D049BB133111EB),
    )
    mask = np.uint64(0xFFFFFF)
    for k in range(len(first)):
        bits = state + np.uint64(k) * step
        bits = (bits ^ (bits >> np.uint64(30))) * factor_1
        bits = (bits ^ (bits >> np.uint64(27))) * factor_2
        bits ^= bits >> np.uint64(31)
        first[k] = np.float32(np.int32((bits >> np.uint64(40)) & mask))
        second[k] = np.float32(np.int32((bits >> np.uint64(12)) & mask))


def _look_up(table, codes, out):
    """HU of 8-bit codes.

    Args:
        table: int16 [256].
        codes: uint8 [n].
        out: int16 [n].
    """
    for i in range(len(codes)):
        out[i] = table[codes[i]]
