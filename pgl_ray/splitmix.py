"""splitmix64 (Steele et al. 2014) on int64 arrays and tensors: whole numbers in, bits that look random out, alike
everywhere."""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # rendering processes start without torch
    import torch
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
STEP = -0x61C8864680B583EB  # of its counter, modulo 2**64


def mix(state: Array) -> Array:
    """Its output function on int64 of any shape, which both libraries multiply modulo 2**64."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & (2**33 - 1))


def counter(num: int, device: "torch.device") -> "Tensor":
    """STEP, 2 STEP, ..., `num` STEP modulo 2**64, int64 [num] on a device.

    Written with a complement, for PyTorch 2.11 compiles a multiple of `arange` into Triton code whose index is 32 bits
    wide, which fails where the factor is not.
    """
    import torch

    return ~torch.arange(num, device=device) * -STEP
