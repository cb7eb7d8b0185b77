"""Models Genesis' deformations of a view: what its restoration task must undo (Zhou et al. 2019, Sec. 2)."""

import numpy as np
from monai.transforms import RandCoarseDropout, RandCoarseShuffle, RandHistogramShift
from torch import Tensor

from pgl_ray.config import DeformConfig

NUM_SHUFFLED = 1000  # blocks per view; of at most a tenth of the view per axis, they overlap


def deform(view: Tensor, rng: np.random.Generator, config: DeformConfig) -> Tensor:
    """Applies up to three of the four deformations: local shuffling, a non-linear intensity map, a cut-out.

    The transforms are MONAI's, with the probabilities of the authors' code (whose intensity map may also fall, and
    which shuffles more blocks). The intensity map is monotone and keeps the view's range. Cut-outs put uniform noise of
    the view's range in up to five windows (inner) or everywhere but in up to five windows (outer); the two never meet.

    Args:
        view: float32 [D, H, W], z-scored; left as it is.
        rng: random numbers.
        config: probabilities.

    Returns:
        float32 [D, H, W].
    """
    shuffle, nonlinear, cutout, inner = rng.random(4) < (
        config.shuffle_prob,
        config.nonlinear_prob,
        config.cutout_prob,
        config.inner_share,
    )
    size = np.asarray(view.shape)
    steps = []
    if shuffle:
        small, large = (1, 1, 1), tuple(np.maximum(size // 10, 2).tolist())
        steps.append(RandCoarseShuffle(NUM_SHUFFLED, small, max_spatial_size=large, prob=1))
    if nonlinear and view.min() < view.max():
        steps.append(RandHistogramShift((4, 10), prob=1))
    if cutout:
        small, large = (np.ceil(size / 6), size // 3) if inner else (np.ceil(3 * size / 7), 4 * size // 7)
        windows = [tuple(np.maximum(part, 1).astype(int).tolist()) for part in (small, np.maximum(small, large))]
        steps.append(RandCoarseDropout(1, windows[0], inner, None, 5, windows[1], prob=1))
    out = view[None].clone()  # shuffling and cut-outs write into what they are given
    for step in steps:
        out = step.set_random_state(int(rng.integers(2**32)))(out)
    return out.as_tensor()[0] if hasattr(out, "as_tensor") else out[0]
