"""Whole scans through a segmenter: sliding window, then one class index per voxel."""

import time
from functools import partial
from itertools import chain, combinations
from typing import Literal

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from pgl_ray.model.segmenter import Segmenter


@torch.inference_mode()
def segment(
    model: Segmenter,
    volume: np.ndarray,
    patch_size: tuple[int, int, int],
    task: Literal["multiclass", "binary"],
    air: float,
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: bool = False,
) -> np.ndarray:
    """Class index of every voxel, on the scan's own grid.

    Windows are blended with Gaussian weights. The blended logits stay in main memory (4 bytes per voxel and output),
    only windows go to the model's device.

    Args:
        model: in eval mode.
        volume: [D, H, W] z-scored voxels.
        patch_size: window (D, H, W), the patch size of the training; a smaller scan is padded.
        task: what the logits mean.
        air: z-scored HU of air, the padding.
        overlap: of neighbouring windows, in [0, 1).
        batch_size: windows per forward pass.
        flips: average the logits of all eight flips of every window (at test time; eight times the work).

    Returns:
        uint8 [D, H, W]. multiclass: the likeliest class. binary: the last output with a positive logit, as a label
        value includes the larger ones.
    """
    device = next(model.parameters()).device
    on_gpu = device.type != "cpu"
    logits = sliding_window_inference(
        torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None],
        tuple(patch_size),
        batch_size,
        partial(_mean_over_flips, model) if flips else model,
        overlap=overlap,
        mode="gaussian",
        cval=air,
        sw_device=device,
        device=torch.device("cpu"),
        buffer_steps=1 if on_gpu else None,  # sums windows of one depth on the GPU before the copy
        buffer_dim=0,
    )
    return _class_index(logits[0], task).numpy()


def _mean_over_flips(model: Segmenter, x: Tensor) -> Tensor:
    total = 0
    for axes in chain.from_iterable(combinations((2, 3, 4), num) for num in range(4)):
        total = total + model(x.flip(axes)).flip(axes)
    return total / 8


def time_forward(model: Segmenter, size: tuple[int, int, int] = (64, 192, 192), repeats: int = 3) -> float:
    """Milliseconds of one forward pass of one volume [1, 1, *size] in float32, the fastest of some after a first one.

    Args:
        model: in eval mode; timed where it lies, on a GPU by CUDA events.
        size: (D, H, W), the paper's by default.
        repeats: passes that are timed.
    """
    device = next(model.parameters()).device
    x, found = torch.zeros(1, 1, *size, device=device), []
    with torch.inference_mode():
        model(x)
        for _ in range(repeats):
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                model(x)
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                model(x)
                found.append(1000 * (time.perf_counter() - began))
    return min(found)


def _class_index(logits: Tensor, task: str) -> Tensor:
    if task == "multiclass":
        return logits.argmax(0).to(torch.uint8)
    index = torch.zeros(logits.shape[1:], dtype=torch.uint8)
    for channel, logit in enumerate(logits):
        index[logit > 0] = channel + 1
    return index


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to infer on; auto takes CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("inference.device=cuda, but this machine has no CUDA device: take inference.device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
