"""Whole scans through a segmenter: sliding window, then one class index per voxel."""

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
        model,
        overlap=overlap,
        mode="gaussian",
        cval=air,
        sw_device=device,
        device=torch.device("cpu"),
        buffer_steps=1 if on_gpu else None,  # sums windows of one depth on the GPU before the copy
        buffer_dim=0,
    )
    return _class_index(logits[0], task).numpy()


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
