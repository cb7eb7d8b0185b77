"""splitmix64 (Steele et al. 2014) on int64 tensors: whole numbers in, bits that look random out, alike everywhere."""

from torch import Tensor

STEP = -0x61C8864680B583EB  # of its counter, modulo 2**64


def mix(state: Tensor) -> Tensor:
    """Its output function on int64 of any shape, which torch multiplies modulo 2**64."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & (2**33 - 1))
