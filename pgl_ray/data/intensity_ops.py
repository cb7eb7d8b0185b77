"""Noise, blur, brightness and gamma, operations 3 to 6 of Sec. 3.2: drawn first, then done to a view."""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from pgl_ray.config import IntensityConfig
from pgl_ray.data import kernels
from pgl_ray.data.random_numbers import noise_state


class Intensity(NamedTuple):
    """Sampled intensity operations of one view; the neutral values mean `not applied`."""

    noise_std: float  # 0: none
    noise_seed: int
    blur_sigma: float  # voxels; 0: none
    gain: float  # 1: none
    gamma: float  # 1: none


INTENSITY_NUMBERS = 9  # uniform numbers that a view's intensity operations take


def sample_intensities(u: np.ndarray, config: IntensityConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws operations 3 to 6 of Sec. 3.2 for many views.

    Args:
        u: [..., INTENSITY_NUMBERS], uniform random numbers.
        config: probabilities and ranges.

    Returns:
        float64 [..., 4] of noise_std, blur_sigma, gain, gamma, and int64 [...] of noise_seed, as in `Intensity`.
    """
    ranges = np.array([config.noise_variance, config.blur_sigma, config.gain, config.gamma])
    drawn = ranges[:, 0] + u[..., 4:8] * (ranges[:, 1] - ranges[:, 0])
    drawn[..., 0] = np.sqrt(drawn[..., 0])
    chosen = u[..., :4] < (config.noise_prob, config.blur_prob, config.gain_prob, config.gamma_prob)
    return np.where(chosen, drawn, (0.0, 0.0, 1.0, 1.0)), (u[..., 8] * 2**53).astype(np.int64)


def sample_intensity(rng: np.random.Generator, config: IntensityConfig) -> Intensity:
    """`sample_intensities` of one view."""
    (std, *others), seed = sample_intensities(rng.random(INTENSITY_NUMBERS), config)
    return Intensity(float(std), int(seed), *map(float, others))


def apply_intensity(view: np.ndarray, params: Intensity) -> np.ndarray:
    """Operations 3 to 6 of Sec. 3.2 on one view, in the paper's order.

    The paper raises voxels to a power after scaling them to [0, 1] and does not say whether they stay there; as the
    source it cites (nnU-Net) they are brought back to the view's range, so that augmented and plain views of one scan
    keep one scale.

    Args:
        view: float32 [D, H, W], z-scored, C order; left as it is.
        params: what was drawn.

    Returns:
        The view itself where nothing is to be done, else a new array.
    """
    compiled = kernels.load()
    if params.noise_std > 0:
        view = view.copy()
        compiled.normal(noise_state(params.noise_seed), np.float32(params.noise_std), view.reshape(-1))
    if params.blur_sigma > 0:
        view = blur(view, params.blur_sigma)
    if params.gain != 1 or params.gamma != 1:
        out = np.empty_like(view)
        numbers = view.min(), view.max(), np.float32(params.gain), np.float32(params.gamma)
        compiled.gain_and_gamma(view.reshape(-1), *numbers, out.reshape(-1))
        return out
    return view


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian blur with a sampled kernel, of radius 3 for a sigma of 1, and replicated borders.

    Args:
        view: float32 [D, H, W], C order.
        sigma: in voxels.

    Returns:
        float32 [D, H, W], a new array.
    """
    radius = max(1, round(3 * sigma))
    if radius <= 3:
        out = np.empty_like(view)
        kernels.load().blur(view, np.array(_taps(sigma, 3), np.float32), out)
        return out
    taps = _taps(sigma, radius)
    for axis in range(3):
        view = ndimage.correlate1d(view, [*taps[:0:-1], *taps], axis, mode="nearest")
    return view


def _taps(sigma: float, radius: int) -> list[float]:
    """A sampled Gaussian from its middle outwards, as long as `radius`; 0 from three sigmas on. With its mirror image
    it sums to 1."""
    own = max(1, round(3 * sigma))
    taps = [math.exp(-0.5 * (at / sigma) ** 2) if at <= own else 0.0 for at in range(radius + 1)]
    return [tap / (2 * sum(taps) - taps[0]) for tap in taps]
