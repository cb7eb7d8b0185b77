"""Models Genesis' deformations against their definitions (Zhou et al. 2019, Sec. 2)."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from pgl_ray.data.deform import Chances, deform

SIZE = (16, 48, 40)
OFF = {"nonlinear": 0, "shuffle": 0, "cutout": 0}


def smooth(seed=0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=SIZE)
    return torch.from_numpy(ndimage.gaussian_filter(noise, 3) * 20).float()


def deformed(seed=0, view=None, **changes) -> torch.Tensor:
    view = smooth() if view is None else view
    return torch.from_numpy(deform(view.numpy(), np.random.default_rng(seed), Chances(**OFF | changes)))


def test_nothing_drawn_is_nothing_done_and_the_view_stays():
    view = smooth()
    before = view.clone()
    assert torch.equal(deformed(view=view), view)
    for seed in range(10):
        deformed(seed, view, nonlinear=1, shuffle=1, cutout=1, inner=0.5)
    assert torch.equal(view, before)


@pytest.mark.parametrize("seed", range(5))
def test_nonlinear_is_monotone_and_keeps_the_range(seed):
    view, out = smooth(), deformed(seed, nonlinear=1)
    order = view.flatten().argsort()
    assert (out.flatten()[order].diff() >= -1e-5).all()
    torch.testing.assert_close(out.aminmax(), view.aminmax(), atol=1e-4, rtol=0)
    assert (out - view).abs().max() > 0.05 * (view.max() - view.min())


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_permutes_voxels_locally(seed):
    view, out = smooth(), deformed(seed, shuffle=1)
    assert torch.equal(view.flatten().sort().values, out.flatten().sort().values)
    assert (out != view).float().mean() > 0.2
    blurred = [ndimage.uniform_filter(each.numpy(), 9) for each in (view, out)]
    assert np.corrcoef(blurred[0].ravel(), blurred[1].ravel())[0, 1] > 0.95  # the coarse picture stays


@pytest.mark.parametrize("seed", range(8))
def test_inner_cutout_changes_only_windows(seed):
    view, out = smooth(), deformed(seed, cutout=1, inner=1)
    changed = (out != view).numpy()
    assert 0 < changed.mean() <= 5 / 27 + 0.01
    assert out[torch.from_numpy(changed)].min() >= view.min() and out.max() <= view.max()
    labels, num = ndimage.label(changed)
    assert 1 <= num <= 5
    for window in ndimage.find_objects(labels):  # no window is smaller than a sixth of the view per axis
        assert all(s.stop - s.start >= np.ceil(n / 6) for s, n in zip(window, SIZE, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_outer_cutout_keeps_only_windows(seed):
    view, out = smooth(), deformed(seed, cutout=1, inner=0)
    unchanged = (out == view).numpy()
    assert (3 / 7) ** 3 * 0.9 < unchanged.mean() < 0.9
    labels, num = ndimage.label(unchanged)
    sizes = np.bincount(labels.ravel())[1:]
    window = labels == 1 + sizes.argmax()
    assert sizes.max() > 0.99 * unchanged.sum() or num <= 5 + (sizes < 3).sum()  # but for noise that hits the value
    reach = [s.stop - s.start for s in ndimage.find_objects(window.astype(int))[0]]
    assert all(length >= np.ceil(3 * n / 7) for length, n in zip(reach, SIZE, strict=True))
    assert out.min() >= view.min() and out.max() <= view.max()


def test_the_generator_decides():
    settings = Chances()._asdict()
    assert torch.equal(deformed(3, **settings), deformed(3, **settings))
    assert not torch.equal(deformed(3, **settings), deformed(4, **settings))


def test_a_blank_view_stays_finite():
    blank = torch.full(SIZE, -1.5)
    for seed in range(5):
        assert torch.isfinite(deformed(seed, blank, nonlinear=1, shuffle=1, cutout=1)).all()
