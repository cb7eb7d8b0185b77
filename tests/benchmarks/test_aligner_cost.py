"""What the aligner costs beside the encoder at the paper's geometry (it is to be under 2 % of its forward pass).

CI runs this for correctness; `make bench` prints the ratio.
"""

import os
import statistics
import time

import pytest
import torch

from pgl_ray.model.pgl import Pair, align, feature_geometry
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import interpolation_matrices

PAIRS = 2
REPEATS = 5 if os.environ.get("PGL_RAY_BENCH") else 1


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.slow
def test_aligner_against_encoder():
    """Matrices of both views and the alignment of both paths' 256 channels, against the online encoder's forward."""
    encoder = Encoder().eval()
    _, geometry = feature_geometry(encoder, (16, 96, 96), (8, 16, 16))
    rng = torch.Generator().manual_seed(0)
    views = torch.randn(2, PAIRS, 1, 16, 96, 96, generator=rng)
    start = torch.randint(0, 20, (2, PAIRS, 3), generator=rng)
    boxes = torch.stack([start, start + torch.tensor([20, 120, 120])], -1)
    pair = Pair(*views, *boxes, *(torch.rand(2, PAIRS, 3, generator=rng) < 0.5))
    online, target = torch.randn(2, 2 * PAIRS, 256, 2, 6, 6, generator=rng)

    def aligning():
        matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)
        return align(online, matrices), align(target, matrices)

    with torch.no_grad():
        ratios = []
        for _ in range(REPEATS + 1):  # interleaved; the first, which warms up, does not count
            ratios.append(seconds(aligning) / seconds(lambda: encoder(pair.views)))
    ratio = statistics.median(ratios[1:])
    print(f"\naligner / encoder forward, {PAIRS} pairs of 16x96x96 views: {ratio:.2%} (median of {REPEATS})")
    assert all(aligned.shape == (2 * PAIRS, 256, 2, 6, 6) for aligned in aligning())
