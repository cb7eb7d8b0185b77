"""Compiled kernels of the streaming hot path (numba): crop -> view, intensity operations, float16, 8-bit codes -> HU.

They release the GIL. numba caches their machine code next to this file or in the user's cache folder: the first use
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
    normal: Callable
    to_half: Callable
    look_up: Callable


@lru_cache(maxsize=1)
def load() -> Kernels:
    """The kernels, of which numba knows the machine code."""
    from numba import njit

    options = {"nogil": True, "fastmath": {"contract", "nnan", "nsz"}}
    plain = _resize, _blur, _gain_and_gamma, _normal, _to_half, _look_up
    try:
        return Kernels(*(njit(cache=True, **options)(each) for each in plain))
    except RuntimeError:  # no folder to keep machine code in
        return Kernels(*(njit(**options)(each) for each in plain))


def _resize(crop, planes, rows, height, width, low, high, scale, shift, z, y, x, out):
    """Clips, resizes linearly, normalises and flips; a flip is a reversed table.

    Args:
        crop: HU, 1-D: voxel (d, h, w) of the crop stands at planes * d + rows * h + w.
        planes, rows: int64, from a plane, or row, of the crop to the next.
        height, width: int64, of the crop.
        low, high: float32, HU window.
        scale, shift: float32; view = scale * HU + shift.
        z, y, x: per axis a table (uint64 first, uint64 second, float32 weight of the second), one entry per view voxel;
            the second is the first's next, or the last voxel. A signed index would be tested for being negative, which
            costs a quarter of the time.
        out: float32 [D, H, W].
    """
    (z_0, z_1, z_w), (y_0, y_1, y_w), (x_0, _, x_w) = z, y, x
    plane, four = np.empty((height, width), np.float32), np.empty((4, width + 1), np.float32)
    row_0, row_1, row_2, row_3 = four[0], four[1], four[2], four[3]
    flat, last = plane.reshape(-1), out.shape[1] - 1
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
        for j in range(0, last + 1, 4):  # four rows share a look into the table; those beyond the last are the last
            for m in range(4):
                at, row = min(j + m, last), four[m]
                left, right, share = plane[y_0[at]], plane[y_1[at]], y_w[at]
                for k in range(width):
                    row[k] = scale * (left[k] + share * (right[k] - left[k])) + shift
                row[width] = row[width - 1]
            line_0, line_1 = out[i, j], out[i, min(j + 1, last)]
            line_2, line_3 = out[i, min(j + 2, last)], out[i, min(j + 3, last)]
            for k in range(out.shape[2]):
                at, share = x_0[k], x_w[k]
                after = at + np.uint64(1)
                line_0[k] = row_0[at] + share * (row_0[after] - row_0[at])
                line_1[k] = row_1[at] + share * (row_1[after] - row_1[at])
                line_2[k] = row_2[at] + share * (row_2[after] - row_2[at])
                line_3[k] = row_3[at] + share * (row_3[after] - row_3[at])


def _blur(view, taps, out):
    """Separable convolution with replicated borders.

    Args:
        view: float32 [D, H, W], C order.
        taps: float32 [4], from the middle outwards, the same on all axes and sides.
        out: float32 [D, H, W], another array.
    """
    depth, height, width = view.shape
    tap_0, tap_1, tap_2, tap_3 = taps
    plane = np.empty((height, width), np.float32)
    row = np.empty(width + 6, np.float32)
    for i in range(depth):
        above_1, above_2, above_3 = view[max(i - 1, 0)], view[max(i - 2, 0)], view[max(i - 3, 0)]
        below_1, below_2, below_3 = (
            view[min(i + 1, depth - 1)],
            view[min(i + 2, depth - 1)],
            view[min(i + 3, depth - 1)],
        )
        for j in range(height):
            line, middle = plane[j], view[i, j]
            a_1, a_2, a_3, b_1, b_2, b_3 = above_1[j], above_2[j], above_3[j], below_1[j], below_2[j], below_3[j]
            for k in range(width):
                near = tap_0 * middle[k] + tap_1 * (a_1[k] + b_1[k])
                line[k] = near + tap_2 * (a_2[k] + b_2[k]) + tap_3 * (a_3[k] + b_3[k])
        for j in range(height):
            middle, a_1, a_2, a_3 = plane[j], plane[max(j - 1, 0)], plane[max(j - 2, 0)], plane[max(j - 3, 0)]
            b_1, b_2, b_3 = plane[min(j + 1, height - 1)], plane[min(j + 2, height - 1)], plane[min(j + 3, height - 1)]
            for k in range(width):
                near = tap_0 * middle[k] + tap_1 * (a_1[k] + b_1[k])
                row[k + 3] = near + tap_2 * (a_2[k] + b_2[k]) + tap_3 * (a_3[k] + b_3[k])
            row[:3] = row[3]
            row[width + 3 :] = row[width + 2]
            line = out[i, j]
            for k in range(width):
                near = tap_0 * row[k + 3] + tap_1 * (row[k + 2] + row[k + 4])
                line[k] = near + tap_2 * (row[k + 1] + row[k + 5]) + tap_3 * (row[k] + row[k + 6])


def _gain_and_gamma(view, low, high, gain, gamma, out):
    """Factor, clipped to the view's own range, then power on that range scaled to [0, 1].

    The power is 2^(gamma * log2) by Chebyshev's polynomials in a loop without branches, which becomes vector
    instructions; its error is below 2e-6 of the range.

    Args:
        view: float32 [n].
        low, high: float32, its range.
        gain, gamma: float32; 1: not applied.
        out: float32 [n], another array: in place it would not become vector instructions.
    """
    one = np.float32(1)
    if gamma == one:
        for k in range(len(view)):
            out[k] = min(max(view[k] * gain, low), high)
        return
    bottom, top = min(max(low * gain, low), high), min(max(high * gain, low), high)
    span = max(top - bottom, np.float32(1e-6))
    per_span, least = one / span, np.float32(1e-37)  # exponent -123; the bits of far smaller numbers read otherwise
    of_zero = one if gamma == 0 else np.float32(0)
    rounding = np.float32(1.5 * 2**23)  # added to a small number leaves it rounded in the lowest bits
    bias = np.int32(127 - 0x4B400000)
    for k in range(len(view)):
        value = min(max(view[k] * gain, low), high)
        unit = np.float32(min(max((value - bottom) * per_span, least), one))
        bits = unit.view(np.int32)  # unit = mantissa in [1, 2) * 2^exponent
        exponent = np.int32((bits >> np.int32(23)) - np.int32(127))
        mantissa = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000))
        x = np.int32(mantissa).view(np.float32) - np.float32(1.5)
        log = np.float32(0.03761046428) + x * (np.float32(-0.02511014095) + x * np.float32(0.01444035249))
        log = np.float32(0.14250802403) + x * (np.float32(-0.07059455402) + x * log)
        log = np.float32(0.96179654017) + x * (np.float32(-0.32063187846) + x * log)
        log = np.float32(0.58496275910) + x * log
        power = max(gamma * (np.float32(exponent) + log), np.float32(-126))
        shifted = np.float32(power + rounding)
        x = power - (shifted - rounding)
        scale = np.int32((shifted.view(np.int32) + bias) << np.int32(23))
        exp = np.float32(0.05550357114) + x * (np.float32(0.00967603192) + x * np.float32(0.00133908634))
        exp = np.float32(0.69314718803) + x * (np.float32(0.24022107485) + x * exp)
        exp = (np.float32(1.00000007545) + x * exp) * np.int32(scale).view(np.float32)
        out[k] = min(exp if exponent > np.int32(-123) else of_zero, one) * span + bottom


def _normal(state, std, out):
    """Adds normal numbers, as `batch_views.noise` draws them, to float32's rounding.

    Logarithm, sine and cosine are Cephes' polynomials in loops without branches, which become vector instructions.

    Args:
        state: uint64, the start of splitmix64's counter.
        std: float32, standard deviation.
        out: float32 [n], to be added to: the cosines' half first.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    factor_1, factor_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    mask, one, half = np.uint64(0xFFFFFF), np.float32(1), np.float32(0.5)
    quarter, radians, log_2 = np.float32(2**22), np.float32(2 * np.pi / 2**24), np.float32(0.69314718056)
    root_half = np.int32(0x3F3504F3)  # bits of sqrt(1 / 2): mantissas are taken from there to sqrt(2)
    num, block = (len(out) + 1) // 2, 1024
    length, first, second = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    bits_of = length.view(np.int32)
    for start in range(0, num, block):
        size = min(block, num - start)
        for k in range(size):
            bits = state + np.uint64(start + k) * step
            bits = (bits ^ (bits >> np.uint64(30))) * factor_1
            bits = (bits ^ (bits >> np.uint64(27))) * factor_2
            bits ^= bits >> np.uint64(31)
            length[k] = np.float32(np.int32((bits >> np.uint64(40)) & mask) + 1)
            second[k] = np.float32(np.int32((bits >> np.uint64(12)) & mask))
        for k in range(size):
            above = bits_of[k] - root_half
            first[k] = np.float32((above >> 23) - 24)  # of a number in (0, 1]
            bits_of[k] = (above & 0x7FFFFF) + root_half
        for k in range(size):  # sqrt(-2 log)
            x = length[k] - one
            log = np.float32(1.1676998740e-1) + x * (np.float32(-1.1514610310e-1) + x * np.float32(7.0376836292e-2))
            log = np.float32(-1.6668057665e-1) + x * (
                np.float32(1.4249322787e-1) + x * (np.float32(-1.2420140846e-1) + x * log)
            )
            log = np.float32(3.3333331174e-1) + x * (
                np.float32(-2.4999993993e-1) + x * (np.float32(2.0000714765e-1) + x * log)
            )
            log = x + x * x * (x * log - half) + first[k] * log_2
            length[k] = np.sqrt(np.float32(-2) * min(log, np.float32(0)))
        for k in range(size):  # angle = turn quarters of a circle + x, |x| <= an eighth
            turn = np.int32(second[k] / quarter + half)
            x = (second[k] - np.float32(turn) * quarter) * radians
            z = x * x
            sine = np.float32(8.3321608736e-3) - z * np.float32(1.9515295891e-4)
            sine = x + x * z * (np.float32(-1.6666654611e-1) + z * sine)
            cosine = np.float32(-1.388731625493765e-3) + z * np.float32(2.443315711809948e-5)
            cosine = one - half * z + z * z * (np.float32(4.166664568298827e-2) + z * cosine)
            along = sine if turn & 1 else cosine
            across = cosine if turn & 1 else sine
            first[k] = length[k] * (-along if (turn + 1) & 2 else along)
            second[k] = length[k] * (-across if turn & 2 else across)
        cosines, sines = out[start : start + size], out[num + start : min(num + start + size, len(out))]
        for k in range(len(cosines)):
            cosines[k] += std * first[k]
        for k in range(len(sines)):
            sines[k] += std * second[k]


def _to_half(bits, out):
    """float32 -> float16, to the nearest and even ones, in a loop without branches; numpy's own takes 20 times as long.

    Args:
        bits: uint32 [n], those of float32 numbers, none of them nan.
        out: uint16 [n], those of float16 numbers; infinite beyond the largest.
    """
    half, infinite = np.float32(0.5), np.uint32(0x7C00)
    for k in range(len(bits)):
        sign, size = bits[k] & np.uint32(0x80000000), bits[k] & np.uint32(0x7FFFFFFF)
        odd = (size >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32(size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        small = np.float32(np.uint32(size).view(np.float32) + half).view(np.uint32) - np.uint32(0x3F000000)
        number = small if size < np.uint32(0x38800000) else min(normal, infinite)  # 2^-14: the least normal one
        out[k] = (sign >> np.uint32(16)) | number


def _look_up(table, codes, out):
    """HU of 8-bit codes.

    Args:
        table: int16 [256].
        codes: uint8 [n].
        out: int16 [n].
    """
    for i in range(len(codes)):
        out[i] = table[codes[i]]
