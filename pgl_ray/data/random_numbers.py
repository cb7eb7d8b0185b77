"""Random numbers only from (seed, epoch, scan, draw), so that a view can be made again anywhere."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64's counter


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

    A counter through splitmix64 (Steele et al. 2014), as `batch_views.noise`.

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
    state = np.full(len(scan), seed, np.int64).view(np.uint64) ^ _mix(np.array([of + 1], np.uint64))
    for part in (scan, epoch, draw):
        state = _mix(state + STEP) ^ np.asarray(part, np.int64).view(np.uint64)
    bits = _mix(_mix(state + STEP)[:, None] + np.arange(1, num + 1, dtype=np.uint64) * STEP)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function on uint64 of any shape, modulo 2**64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def noise_state(seed: int) -> np.uint64:
    """`_mix` of one number: where the counter of a view's noise starts."""
    return _mix(np.array([seed], np.int64).view(np.uint64))[0]
