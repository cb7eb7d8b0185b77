"""An encoder's maps of a whole scan, from overlapping windows."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HIGHEST = torch.finfo(torch.float16).max
SCALE = 2  # a window's size as a multiple of the training views': what lies near its border sees too little


def window_size(size: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Size of the windows: SCALE times the training views', a multiple of twice the largest stride."""
    return tuple(int(-(-SCALE * length // (2 * by)) * 2 * by) for length, by in zip(size, np.max(np.array(strides), 0)))


class GivesMaps(Protocol):
    """An encoder: its maps of [N, 1, D, H, W], finest first, and their output strides (D, H, W)."""

    @property
    def strides(self) -> Sequence[tuple[int, int, int]]:
        """Voxels of the input per cell, of each map."""

    def __call__(self, x: Tensor, /) -> list[Tensor]:
        """The maps."""


@torch.no_grad()
def dense_maps(
    encoder: GivesMaps, volume: Tensor, size: Sequence[int], levels: Sequence[int], air: float
) -> list[Tensor]:
    """Maps of a whole scan, each cell from the window whose middle is nearest; a scan that fits one window is one pass.

    Args:
        encoder: on the volume's device.
        volume: [D, H, W] z-scored voxels, on the device to compute on.
        size: of the training views.
        levels: numbers of the maps that are wanted.
        air: z-scored HU of air, for what lies beyond the scan.

    Returns:
        Per level float16 [C, ceil(D / s_d), ceil(H / s_h), ceil(W / s_w)], on the volume's device.
    """
    strides = [encoder.strides[level] for level in levels]
    coarse = np.max(np.array(encoder.strides), 0)
    window = np.minimum(window_size(size, encoder.strides), -(-np.array(volume.shape) // coarse) * coarse)
    whole = window + -(-np.maximum(np.array(volume.shape) - window, 0) // coarse) * coarse
    pad = [n for axis in (2, 1, 0) for n in (0, int(whole[axis] - volume.shape[axis]))]
    volume = F.pad(volume, pad, value=air)
    whole_maps: list[Tensor] = []
    for parts in product(*(windows_over(int(n), int(w), int(c)) for n, w, c in zip(whole, window, coarse))):
        box = tuple(slice(start, start + int(w)) for (start, _, _), w in zip(parts, window))
        maps = encoder(volume[box][None, None])
        for number, (level, stride) in enumerate(zip(levels, strides)):
            values = maps[level][0].clamp(-HIGHEST, HIGHEST).half()  # a channel nearly dead in the views may be huge
            if number == len(whole_maps):  # the first window
                cells = [n // s for n, s in zip(volume.shape, stride)]
                whole_maps.append(values.new_empty(len(values), *cells))
            target = tuple(slice(first // s, last // s) for (_, first, last), s in zip(parts, stride))
            inside = tuple(slice((a - start) // s, (b - start) // s) for (start, a, b), s in zip(parts, stride))
            whole_maps[number][(slice(None), *target)] = values[(slice(None), *inside)]
    shapes = [[-(-(n - int(p)) // s) for n, p, s in zip(volume.shape, pad[5::-2], stride)] for stride in strides]
    return [values[:, :d, :h, :w] for values, (d, h, w) in zip(whole_maps, shapes)]


def windows_over(length: int, window: int, coarse: int) -> list[tuple[int, int, int]]:
    """Windows along an axis: start, and the part [first, last) of the scan that each gives; multiples of `coarse`."""
    step = max(coarse, window // 2 // coarse * coarse)
    starts = sorted({min(start, length - window) for start in range(0, max(1, length - window + step), step)})
    middles = [(a + b + window) // 2 // coarse * coarse for a, b in pairwise(starts)]
    return list(zip(starts, [0, *middles], [*middles, length]))
