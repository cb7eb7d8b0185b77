"""Whole scans through a segmenter: sliding window, then one class index per voxel."""

import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, combinations, pairwise, product
from typing import Literal

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from pgl_ray.model import device as on
from pgl_ray.model.segmenter import LightSegmenter, Segmenter
from pgl_ray.prior import triple

SUM_BYTES = 4 * 2**30  # of the sums of logits held at once; what needs more is done in several strips of rows


@torch.inference_mode()
def segment(
    model: Segmenter | LightSegmenter,
    volume: np.ndarray,
    patch_size: tuple[int, int, int],
    task: Literal["multiclass", "binary"],
    air: float,
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: bool = False,
    precision: str = "auto",
) -> np.ndarray:
    """Class index of every voxel, on the scan's own grid.

    Windows lie and are weighted (Gaussian) as in MONAI's `sliding_window_inference`, whose class indices these are but
    for float32's rounding; but no logits of the whole scan are kept. Windows run along D, and the slices that no later
    window reaches become class indices at once: the sums hold one window's depth of the scan, at most SUM_BYTES, on
    the model's device where they fit. A single output whose slab is larger than that is cut into strips of rows, and
    the windows at a cut are computed once for either side.

    Args:
        model: in eval mode.
        volume: [D, H, W] z-scored voxels.
        patch_size: window (D, H, W), the patch size of the training; a smaller scan is padded.
        task: what the logits mean.
        air: z-scored HU of air, the padding.
        overlap: of neighbouring windows, in [0, 1).
        batch_size: windows per forward pass.
        flips: average the logits of all eight flips of every window (at test time; eight times the work).
        precision: float32, bfloat16 (the network's; logits are added up in float32), or auto, as in training.

    Returns:
        uint8 [D, H, W]. multiclass: the likeliest class. binary: the last output with a positive logit, as a label
        value includes the larger ones.

    Raises:
        TooLittleMemory: says what was too large, and what to take.
    """
    device = next(model.parameters()).device
    try:
        with on.autocast(device, precision):
            return _segment(model, volume, triple(patch_size), task, air, overlap, batch_size, flips)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        mends = [f"inference.batch_size={batch_size // 2}"] * (batch_size > 1)
        mends += ["inference.device=cpu"] * (device.type == "cuda") or ["a machine with more memory"]
        raise TooLittleMemory(
            f"the memory of {device} does not hold a scan of {volume.shape} voxels and inference.batch_size="
            f"{batch_size} windows of {tuple(patch_size)}",
            " or ".join(mends),
        ) from None


class TooLittleMemory(MemoryError):
    """What was too large for the memory, and what to take instead."""

    def __init__(self, what: str, mend: str):
        super().__init__(f"{what}: take {mend}")
        self.what, self.mend = what, mend


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: CUDA's has a class of its own, the CPU's a text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _segment(
    model: Segmenter | LightSegmenter,
    volume: np.ndarray,
    size: tuple[int, int, int],
    task: Literal["multiclass", "binary"],
    air: float,
    overlap: float,
    batch_size: int,
    flips: bool,
) -> np.ndarray:
    lack = [max(0, p - n) for p, n in zip(size, volume.shape)]
    inner = tuple(slice(gap // 2, gap // 2 + n) for gap, n in zip(lack, volume.shape))
    if any(lack):
        volume = np.pad(volume, [(gap // 2, gap - gap // 2) for gap in lack], constant_values=air)
    classes = np.empty(volume.shape, np.uint8)
    weights = compute_importance_map(size, mode="gaussian", sigma_scale=0.125, device="cpu", dtype=torch.float32)
    for rows in _strips(model.head.out_channels, size, volume.shape):
        for slices, sums in _sums(model, volume, size, rows, weights, overlap, batch_size, flips):
            classes[slices, rows] = _class_index(sums, task).cpu().numpy()
    return classes[inner]


def _strips(num_outputs: int, size: tuple[int, int, int], shape: tuple[int, ...]) -> list[slice]:
    """Cuts H so that the sums of a slab stay below SUM_BYTES."""
    row_bytes = 4 * num_outputs * size[0] * shape[2]
    num = min(shape[1], -(-row_bytes * shape[1] // SUM_BYTES))
    edges = [i * shape[1] // num for i in range(num + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def _starts(size: int, length: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly, the last one moved back to the end."""
    step = max(1, int(size * (1 - overlap))) if size < length else size
    return sorted({min(start, length - size) for start in range(0, max(1, length - size + step), step)})


def _sums(
    model: Segmenter | LightSegmenter,
    volume: np.ndarray,
    size: tuple[int, int, int],
    rows: slice,
    weights: Tensor,
    overlap: float,
    batch_size: int,
    flips: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Weighted sums of the windows' logits for some rows of the scan, slab after slab of slices.

    Dividing by the sum of the weights would change neither a largest logit nor a sign, so it is left out.

    Yields:
        Slices and their sums [outputs, slices, rows, W], no longer valid after the next one is asked for.
    """
    device = next(model.parameters()).device
    starts = [_starts(p, n, overlap) for p, n in zip(size, volume.shape)]
    plane = [
        (h, w) for h, w in product(*starts[1:]) if h < rows.stop and h + size[1] > rows.start
    ]  # windows that reach the rows
    shape = (model.head.out_channels, size[0], rows.stop - rows.start, volume.shape[2])
    at = where_sums_fit(device, shape)
    sums, weights = torch.zeros(shape, device=at), weights.to(device)
    forward = partial(_mean_over_flips, model) if flips else model
    for d, following in zip(starts[0], [*starts[0][1:], volume.shape[0]]):
        for first in range(0, len(plane), batch_size):
            corners = plane[first : first + batch_size]
            cuts = [np.s_[d : d + size[0], h : h + size[1], w : w + size[2]] for h, w in corners]
            windows = torch.from_numpy(np.stack([volume[cut] for cut in cuts])).float()[:, None]
            logits = forward(windows.to(device)).float().mul_(weights).to(at)
            for (h, w), logit in zip(corners, logits):
                low, high = max(h, rows.start), min(h + size[1], rows.stop)
                target = sums[:, :, low - rows.start : high - rows.start, w : w + size[2]]
                target += logit[:, :, low - h : high - h]
        done = following - d
        yield slice(d, following), sums[:, :done]
        if done < size[0]:
            sums[:, : size[0] - done] = sums[:, done:].clone()
        sums[:, max(0, size[0] - done) :] = 0


def where_sums_fit(device: torch.device, shape: tuple[int, ...]) -> torch.device:
    """The model's device where half of its free memory holds the sums, else the CPU."""
    if device.type == "cuda" and _free_bytes(device) < 2 * 4 * np.prod(shape):
        return torch.device("cpu")
    return device


def _free_bytes(device: torch.device) -> int:
    """Memory that no tensor takes: the device's, and what PyTorch's allocator has taken from it and holds."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _mean_over_flips(model: Segmenter | LightSegmenter, x: Tensor) -> Tensor:
    total = model(x).float()
    for axes in chain.from_iterable(combinations((2, 3, 4), num) for num in range(1, 4)):
        total = total + model(x.flip(axes)).flip(axes).float()
    return total / 8


def time_forward(
    model: Segmenter | LightSegmenter,
    size: tuple[int, int, int] = (64, 192, 192),
    repeats: int = 3,
    precision: str = "auto",
) -> float:
    """Milliseconds of one forward pass of one volume [1, 1, *size], the fastest of some after a first one.

    Args:
        model: in eval mode; timed where it lies, on a GPU by CUDA events.
        size: (D, H, W), the paper's by default.
        repeats: passes that are timed.
        precision: as in `segment`.
    """
    device = next(model.parameters()).device
    x, times_ms = torch.zeros(1, 1, *size, device=device), []
    with torch.inference_mode(), on.autocast(device, precision):
        model(x)
        for _ in range(repeats):
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                model(x)
                end.record()
                end.synchronize()
                times_ms.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                model(x)
                times_ms.append(1000 * (time.perf_counter() - began))
    return min(times_ms)


def _class_index(logits: Tensor, task: str) -> Tensor:
    """[outputs, D, H, W] -> uint8 [D, H, W]."""
    if task == "multiclass":
        return torch.stack([plane.argmax(0).to(torch.uint8) for plane in logits.unbind(1)])  # int64 one slice at a time
    index = torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    for channel, logit in enumerate(logits):
        index[logit > 0] = channel + 1
    return index


def pick_device(name: Literal["auto", "cpu", "cuda"], key: str = "inference.device") -> torch.device:
    """The device to compute on; auto takes CUDA where there is one.

    Args:
        name: what is asked for.
        key: of the config, that asks for it.

    Raises:
        ValueError: CUDA is asked for and missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key}=cuda, but this machine has no CUDA device: take {key}=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
