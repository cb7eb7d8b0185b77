"""Sliding window: what a window model sees and what the scan gets."""

import numpy as np
import pytest
import torch
from torch import nn

from pgl_ray.model import inference
from pgl_ray.model.inference import segment


class Bands(nn.Module):
    """A "segmenter" whose logits depend on the voxel alone: class = number of thresholds below it."""

    def __init__(self, thresholds, binary=False):
        super().__init__()
        self.thresholds, self.binary = nn.Parameter(torch.tensor(thresholds)), binary
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), x.min().item()))
        above = x - self.thresholds.view(1, -1, 1, 1, 1)
        if self.binary:
            return above
        index = (above > 0).sum(1)
        return nn.functional.one_hot(index, len(self.thresholds) + 1).movedim(-1, 1).float()


@pytest.mark.parametrize("shape", [(20, 33, 41), (5, 40, 9), (8, 16, 24)])  # larger, mixed, exactly the patch
@pytest.mark.parametrize("task", ["multiclass", "binary"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_voxel_gets_its_own_class(shape, task, batch_size):
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = Bands([-0.5, 0.5, 1.0], binary=task == "binary")
    found = segment(model, volume, (8, 16, 24), task, air=-7.0, overlap=0.4, batch_size=batch_size)
    assert found.dtype == np.uint8 and found.shape == shape
    assert np.array_equal(found, np.digitize(volume, [-0.5, 0.5, 1.0]))
    assert all(seen[0][2:] == (8, 16, 24) for seen in model.seen)
    padded = any(n < p for n, p in zip(shape, (8, 16, 24)))
    assert (min(seen[1] for seen in model.seen) == -7) == padded  # a small scan stands in air


def test_windows_are_blended_not_cut():
    """Windows disagree: where two overlap, the one whose centre is nearer wins."""

    class FirstWindowSaysOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0

        def forward(self, x):
            self.calls += 1
            one = torch.full_like(x, float(self.calls == 1))
            return torch.cat([1 - one, one], 1)

    found = segment(FirstWindowSaysOne(), np.zeros((8, 8, 12), np.float32), (8, 8, 8), "multiclass", 0, overlap=0.5)
    middle = found[3:5, 3:5]  # in the corners MONAI raises all weights to the same least one
    assert (middle[:, :, :6] == 1).all() and (middle[:, :, 6:] == 0).all()


@pytest.mark.parametrize("shape", [(21, 18, 26), (5, 18, 10)])
def test_the_gpus_buffered_sums_are_the_same(monkeypatch, shape):
    """MONAI's buffering, which the GPU path uses, run on the CPU."""
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = nn.Conv3d(1, 3, 3, padding=1)  # sees its window's border
    plain = segment(model, volume, (8, 12, 16), "multiclass", 0.0)
    original = inference.sliding_window_inference
    monkeypatch.setattr(
        inference, "sliding_window_inference", lambda *a, **k: original(*a, **k | {"buffer_steps": 1, "buffer_dim": 0})
    )
    buffered = segment(model, volume, (8, 12, 16), "multiclass", 0.0)
    assert (plain != buffered).mean() < 1e-3  # sums in another order


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inference.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"inference.device=cuda"):
        inference.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert inference.pick_device("auto").type == "cuda" and inference.pick_device("cpu").type == "cpu"


def test_flips_are_averaged_in_logits(monkeypatch):
    """Against all eight flips of the volume by numpy; the model is asymmetric on every axis."""
    volume = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    ramp = torch.arange(480.0).view(1, 1, 6, 8, 10) / 100

    class Asymmetric(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.cat([x * ramp, x.square() + ramp], 1)

    model, seen = Asymmetric(), []
    monkeypatch.setattr(inference, "_class_index", lambda logits, task: seen.append(logits) or logits)
    segment(model, volume, volume.shape, "multiclass", 0.0, flips=True)
    expected = np.zeros((2, *volume.shape))
    for axes in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        flipped = torch.from_numpy(np.flip(volume, axes).copy())[None, None]
        with torch.no_grad():
            logits = model(flipped)[0].numpy()
        expected += np.flip(logits, [axis + 1 for axis in axes]) / 8
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4, atol=1e-4)
