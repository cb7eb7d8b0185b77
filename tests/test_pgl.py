"""The PGL module: shapes, symmetry, stop-gradient, EMA, and that only the right alignment lowers the loss."""

import copy

import pytest
import torch

from pgl_ray.config import PretrainConfig, load
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import Pair, Pgl, feature_geometry
from pgl_ray.model.resnet import Encoder
from pgl_ray.train.networks import build_pretraining

SMALL = ["index=a", "run=b", "encoder.width=8", "encoder.depths=[1,1,1,1]", "heads.hidden=16", "heads.out=12"]
SMALL += ["views.size=[16,48,32]"]


@pytest.fixture(scope="module")
def pgl() -> Pgl:
    return build_pretraining(load(PretrainConfig, SMALL))[0]


def pair(seed=0, num=3) -> Pair:
    rng = torch.Generator().manual_seed(seed)
    views = [torch.randn(num, 1, 16, 48, 32, generator=rng) for _ in range(2)]
    start = torch.randint(0, 6, (2, num, 3), generator=rng)
    boxes = torch.stack([start, start + torch.tensor([20, 60, 40])], -1)
    flips = torch.rand(2, num, 3, generator=rng) < 0.5
    return Pair(*views, *boxes, *flips)


def test_default_heads_and_encoder_are_the_papers():
    config = load(PretrainConfig, ["index=a", "run=b"])
    with torch.device("meta"):
        encoder = build_encoder(**config.encoder.model_dump())
        geometry = feature_geometry(encoder, config.views.size, config.align.output_stride, "cell")
        model = Pgl(encoder, config.heads.hidden, config.heads.out, *geometry)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.online["encoder"]) == 46_155_072
    assert count(model.online["projector"]) == 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256
    assert count(model.predictor) == 256 * 4096 + 2 * 4096 + 4096 * 256 + 256
    assert model.geometry.output_stride == (8, 16, 16)
    assert feature_geometry(encoder, (16, 96, 96), (8, 16, 16))[1].center == (0.5, 0.5, 0.5)


def test_loss_is_symmetric_and_bounded(pgl):
    batch = pair()
    swapped = Pair(batch.view_2, batch.view_1, batch.box_2, batch.box_1, batch.flip_2, batch.flip_1)
    model = copy.deepcopy(pgl)
    first = model(batch).loss
    second = copy.deepcopy(pgl)(swapped).loss
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert 0 <= first.item() <= 8


def test_target_gets_no_gradient_and_follows_in_closed_form(pgl):
    model = copy.deepcopy(pgl)
    model(pair()).loss.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.online.parameters())
    assert all(p.grad is not None for p in model.predictor.parameters())
    old = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(torch.randn(p.shape))
    for _ in range(3):
        model.follow(0.9)
    for before, online, target in zip(old, model.online.parameters(), model.target.parameters(), strict=True):
        torch.testing.assert_close(target, 0.9**3 * before + (1 - 0.9**3) * online, atol=1e-5, rtol=1e-5)


def test_same_seed_same_weights_other_seed_others():
    models = [build_pretraining(load(PretrainConfig, [*SMALL, f"seed={seed}"]))[0] for seed in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in m.parameters() if p.dim() > 1]) for m in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_view_size_must_be_a_multiple_of_the_stride():
    with pytest.raises(ValueError, match=r"views.size=\(16, 50, 32\) must be a multiple of the output stride"):
        feature_geometry(Encoder(width=8, depths=(1, 1, 1, 1)), (16, 50, 32), (8, 16, 16))
