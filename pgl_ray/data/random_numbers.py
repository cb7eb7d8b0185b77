"""Random numbers only from (seed, epoch, scan, draw), so that a view can be made again anywhere."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

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
    state = np.full(len(scan), seed, np.int64) ^ mix(np.array([of + 1], np.int64))
    for part in (scan, epoch, draw):
        state = mix(state + STEP) ^ np.asarray(part, np.int64)
    bits = mix(mix(state + STEP)[:, None] + np.arange(1, num + 1) * STEP)
    return ((bits >> 11) & (2**53 - 1)) * 2.0**-53


def noise_state(seed: int) -> np.uint64:
    """`mix` of one number: where the counter of a view's noise starts."""
    return mix(np.array([seed], np.int64)).view(np.uint64)[0]
