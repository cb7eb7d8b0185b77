"""Models Genesis' deformations of a view: what its restoration task must undo (Zhou et al. 2019, Sec. 2)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from monai.transforms import RandCoarseDropout, RandCoarseShuffle, RandHistogramShift

NUM_SHUFFLED = 1000  # blocks per view; of at most a tenth of the view per axis, they overlap


class Chances(NamedTuple):
    """How often each deformation is drawn, from 0 to 1; the defaults are those of the authors' code.

    Attributes:
        nonlinear: a non-linear intensity map.
        shuffle: local shuffling: the voxels of small blocks change places within their block.
        cutout: a cut-out, inner or outer.
        inner: share of inner ones among the cut-outs.
    """

    nonlinear: float = 0.9
    shuffle: float = 0.5
    cutout: float = 0.9
    inner: float = 0.2


PUBLISHED = Chances()


def deform(view: np.ndarray, rng: np.random.Generator, chances: Chances = PUBLISHED) -> np.ndarray:
    """Applies up to three of the four deformations: local shuffling, a non-linear intensity map, a cut-out.

    The transforms are MONAI's (the authors' intensity map may also fall, and they shuffle more blocks). The intensity
    map is monotone and keeps the view's range. Cut-outs put uniform noise of the view's range in up to five windows
    (inner) or everywhere but in up to five windows (outer); the two never meet.

    Args:
        view: float32 [D, H, W], z-scored; left as it is.
        rng: random numbers.
        chances: how often each of them is drawn.

    Returns:
        float32 [D, H, W].
    """
    shuffle, nonlinear, cutout, inner = rng.random(4) < (
        chances.shuffle,
        chances.nonlinear,
        chances.cutout,
        chances.inner,
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
    out: Any = torch.from_numpy(view.copy())[None]  # shuffling and cut-outs write into what they are given
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one process per core already
    try:
        for step in steps:
            out = step.set_random_state(int(rng.integers(2**32)))(out)
    finally:
        torch.set_num_threads(threads)
    return np.asarray(out)[0]
