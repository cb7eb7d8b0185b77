"""Random numbers only from (seed, epoch, scan, draw), so that a view can be made again anywhere."""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pgl_ray.splitmix import STEP, mix


@lru_cache(maxsize=2**12)
def _scan_key(scan_id: str) -> int:
    return int.from_bytes(hashlib.sha256(scan_id.encode()).digest()[:8], "little")


def generator(seed: int, epoch: int, scan_id: str, draw: int) -> np.random.Generator:
    """The random numbers of one draw from one scan in one epoch, for what is drawn one by one."""
    return np.random.default_rng((seed, epoch, _scan_key(scan_id), draw))


def uniforms(
    seed: int, epoch: np.ndarray, scan_ids: Sequence[str], draw: np.ndarray, num: int, of: int = 0
) -> np.ndarray:
    """The random numbers of many draws at once; each row depends only on its own (seed, epoch, scan, draw).

    A counter through splitmix64 (Steele et al. 2014), as `noise`.

    Args:
        seed: of the run.
        epoch, draw: int [N].
        scan_ids: [N].
        num: numbers per draw.
        of: another number, another kind of draw.

    Returns:
        float64 [N, num], in [0, 1).
    """
    scan = np.array([_scan_key(each) for each in scan_ids], np.uint64).view(np.int64)
    state = torch.full((len(scan),), seed) ^ mix(torch.tensor(of + 1))
    for part in (scan, epoch, draw):
        state = mix(state + STEP) ^ torch.from_numpy(part.copy())
    bits = mix(mix(state + STEP)[:, None] + torch.arange(1, num + 1) * STEP)
    return ((bits >> 11) & (2**53 - 1)).numpy() * 2.0**-53


def noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers from seeds, the same on every device to float32's rounding.

    A counter through splitmix64 (Steele et al. 2014), then Box and Muller's transform of two 24-bit halves.

    Args:
        seeds: int64 [N].
        shape: of each view.

    Returns:
        float32 [N, *shape].
    """
    num = math.prod(shape)
    bits = mix(mix(seeds)[:, None] + torch.arange(-(-num // 2), device=seeds.device) * STEP)
    length = ((bits >> 40) & 0xFFFFFF).float().add_(1).div_(2**24).log_().mul_(-2).sqrt_()
    angle = ((bits >> 12) & 0xFFFFFF).float().mul_(2 * math.pi / 2**24)
    drawn = torch.stack([length * torch.cos(angle), length * torch.sin(angle)], 1)
    return drawn.flatten(1)[:, :num].reshape(len(seeds), *shape)


def noise_state(seed: int) -> np.uint64:
    """`mix` of one number."""
    state = seed & (2**64 - 1)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return np.uint64(state ^ (state >> 31))
