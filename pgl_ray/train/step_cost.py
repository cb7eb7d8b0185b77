"""What a training step costs: floating-point operations, memory, time."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TIMED_STEPS = 3


def await_device(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cost_of(step: Callable[[dict], None], batch: dict, net: nn.Module, worker_batch: int) -> tuple[float, float]:
    """FLOP per pair, and bytes on the device at a worker's batch size: what one step keeps for its backward pass grows
    with the batch, weights, gradients and momentum do not."""
    num, stored = len(batch["step"]), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step(batch)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}
    activations = sum(size for place, size in stored.items() if place not in weights)
    fixed = sum(weights.values()) + 2 * sum(p.nbytes for p in net.parameters() if p.requires_grad)
    if torch.cuda.is_available() and next(net.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        activations = max(0, torch.cuda.max_memory_allocated() - fixed)
    return counter.get_total_flops() / num, fixed + activations / num * worker_batch


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median wall time of TIMED_STEPS; the work has run before."""
    seconds = []
    for _ in range(TIMED_STEPS):
        await_device(device)
        began = time.perf_counter()
        work()
        await_device(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
