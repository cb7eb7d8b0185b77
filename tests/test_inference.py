"""Sliding window: what a window model sees and what the scan gets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from pgl_ray.model import inference
from pgl_ray.model.inference import segment


class Bands(nn.Module):
    """A "segmenter" whose logits depend on the voxel alone: class = number of thresholds below it."""

    def __init__(self, thresholds, binary=False):
        super().__init__()
        self.thresholds, self.binary = nn.Parameter(torch.tensor(thresholds)), binary
        self.head = SimpleNamespace(out_channels=len(thresholds) + (not binary))
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
    classes = segment(model, volume, (8, 16, 24), task, air=-7.0, overlap=0.4, batch_size=batch_size)
    assert classes.dtype == np.uint8 and classes.shape == shape
    assert np.array_equal(classes, np.digitize(volume, [-0.5, 0.5, 1.0]))
    assert all(seen[0][2:] == (8, 16, 24) for seen in model.seen)
    padded = any(n < p for n, p in zip(shape, (8, 16, 24)))
    assert (min(seen[1] for seen in model.seen) == -7) == padded  # a small scan stands in air


def test_windows_are_blended_not_cut():
    """Windows disagree: where two overlap, the one whose centre is nearer wins."""

    class FirstWindowSaysOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0
            self.head = SimpleNamespace(out_channels=2)

        def forward(self, x):
            self.calls += 1
            one = torch.full_like(x, float(self.calls == 1))
            return torch.cat([1 - one, one], 1)

    classes = segment(FirstWindowSaysOne(), np.zeros((8, 8, 12), np.float32), (8, 8, 8), "multiclass", 0, overlap=0.5)
    middle = classes[3:5, 3:5]  # in the corners MONAI raises all weights to the same least one
    assert (middle[:, :, :6] == 1).all() and (middle[:, :, 6:] == 0).all()


class Conv(nn.Conv3d):
    """Sees its window's border, so that neighbouring windows disagree."""

    def __init__(self, num_outputs):
        super().__init__(1, num_outputs, 5, padding=2)
        self.head = SimpleNamespace(out_channels=num_outputs)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


SHAPES = [(21, 18, 26), (5, 18, 10), (40, 12, 16), (33, 47, 16), (8, 12, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "task, overlap, batch_size", [("multiclass", 0.5, 1), ("binary", 0.3, 4), ("multiclass", 0, 3)]
)
@pytest.mark.parametrize("sum_bytes", [2**32, 40_000])
def test_slabs_and_strips_are_monais_whole_volume(monkeypatch, shape, task, overlap, batch_size, sum_bytes):
    """The oracle keeps all logits; classes differ only where its best two (or one and 0) are closer than rounding."""
    monkeypatch.setattr(inference, "SUM_BYTES", sum_bytes)
    torch.manual_seed(0)
    size, model = (8, 12, 16), Conv(3).eval()
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    classes = segment(model, volume, size, task, -2.0, overlap=overlap, batch_size=batch_size)
    x = torch.from_numpy(volume)[None, None]
    with torch.no_grad():
        logits = sliding_window_inference(x, size, batch_size, model, overlap=overlap, mode="gaussian", cval=-2.0)[0]
    if task == "multiclass":
        expected, best = logits.argmax(0), logits.topk(2, 0).values
        margin = best[0] - best[1]
    else:
        expected = ((logits > 0) * torch.arange(1, 4)[:, None, None, None]).amax(0)
        margin = logits.abs().amin(0)
    differs = classes != expected.numpy()
    assert (margin.numpy()[differs] < 1e-5).all() and differs.mean() < 1e-2


def test_the_sums_stay_bounded(monkeypatch):
    """However long the scan, the sums are those of one window's depth, and of fewer rows where that is too much."""
    sizes = []
    original = inference.where_sums_fit
    monkeypatch.setattr(inference, "where_sums_fit", lambda *a: sizes.append(4 * np.prod(a[1])) or original(*a))
    volume = np.zeros((50, 40, 30), np.float32)
    for limit, windows in ((10**6, 12 * 4), (70_000, 12 * 2 * 3)):
        monkeypatch.setattr(inference, "SUM_BYTES", limit)
        sizes.clear()
        model = Conv(3).eval()
        segment(model, volume, (8, 16, 30), "multiclass", 0.0, overlap=0.5)
        assert max(sizes) <= limit and max(sizes) <= 4 * 3 * 8 * 40 * 30
        assert model.calls == windows and len(sizes) == (1 if limit == 10**6 else 2)


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inference.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"inference.device=cuda"):
        inference.pick_device("cuda")
    with pytest.raises(ValueError, match=r"^train.device=cuda, .* take train.device=auto$"):
        inference.pick_device("cuda", "train.device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert inference.pick_device("auto").type == "cuda" and inference.pick_device("cpu").type == "cpu"


def test_flips_are_averaged_in_logits(monkeypatch):
    """Against all eight flips of the volume by numpy; the model is asymmetric on every axis."""
    volume = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    ramp = torch.arange(480.0).view(1, 1, 6, 8, 10) / 100

    class Asymmetric(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.zeros(1)), SimpleNamespace(out_channels=2)

        def forward(self, x):
            return torch.cat([x * ramp, x.square() + ramp], 1)

    model, seen = Asymmetric(), []
    ones = torch.ones(volume.shape)  # one window: its weights would only be divided out again
    monkeypatch.setattr(inference, "compute_importance_map", lambda *_, **__: ones)
    monkeypatch.setattr(inference, "_class_index", lambda logits, task: seen.append(logits.clone()) or logits[0].byte())
    segment(model, volume, volume.shape, "multiclass", 0.0, flips=True)
    expected = np.zeros((2, *volume.shape))
    for axes in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        flipped = torch.from_numpy(np.flip(volume, axes).copy())[None, None]
        with torch.no_grad():
            logits = model(flipped)[0].numpy()
        expected += np.flip(logits, [axis + 1 for axis in axes]) / 8
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4, atol=1e-4)
