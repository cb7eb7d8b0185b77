"""How networks compute on a device: precision, memory layout, compilation, recomputation."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context of a precision; `auto` is bfloat16 where the GPU has it, else float32."""
    enabled = precision == "bfloat16"
    if precision == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def lay_out(net: nn.Module, device: torch.device) -> nn.Module:
    """A network on a device; on CUDA with channels last, the layout of the tensor cores' 3D convolutions."""
    if device.type != "cuda":
        return net.to(device)
    return net.to(device, memory_format=torch.channels_last_3d)


def compiled(model: nn.Module, device: torch.device, mode: str) -> nn.Module:
    """Compiles a model in place (its keys stay as they are); what cannot be compiled runs as it is.

    Args:
        model: what is called, DDP's wrapper where there is one: gradients are then reduced while others are computed.
        device: where it computes.
        mode: on, off, or auto: on CUDA where Triton is installed.
    """
    if mode == "auto":
        mode = "on" if device.type == "cuda" and torch.utils._triton.has_triton() else "off"
    if mode == "on":
        torch._dynamo.config.suppress_errors = True
        model.compile(dynamic=False)
    return model


def recompute(encoder: Encoder | ResEncoder) -> None:
    """Makes an encoder keep only its stages' outputs for the backward pass and compute the rest again: about a third
    more time, and a fraction of the memory.

    A stage's BatchNorms then see every batch twice: their momentum is set so that their running statistics come out as
    if it were once.
    """
    for stage in encoder.running_stages():
        for part in stage.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = 1 - math.sqrt(1 - part.momentum)
        stage.forward = _Recomputed(stage.forward)


class _Recomputed:
    """A forward function whose intermediate results are not kept where gradients are wanted."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x):
        return checkpoint(self.forward, x, use_reentrant=False, preserve_rng_state=False)
