"""Segmentation network: the paper's parameter counts, and any input size."""

import pytest
import torch

from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter, Up


@pytest.fixture(autouse=True)
def one_thread():
    """Small kernels: on a busy machine two threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "stage_strides, rest, total", [("early", 2_381_858, 48_536_930), ("late", 2_380_194, 48_535_266)]
)
def test_parameter_counts_are_the_papers(stage_strides, rest, total):
    with torch.device("meta"):
        model = Segmenter(Encoder(stage_strides=stage_strides), 2)
    assert count(model) == total  # 48.54 M
    assert count(model) - count(model.encoder) == rest  # 2.38 M


def small(stage_strides="early", num_outputs=3, width=4):
    model = Segmenter(Encoder(depths=(1, 1, 1, 1), width=width, stage_strides=stage_strides), num_outputs)
    init_kaiming_uniform(model, 0)
    return model


@pytest.mark.parametrize("stage_strides", ["early", "late"])
@pytest.mark.parametrize("size", [(16, 32, 48), (13, 37, 50), (9, 17, 33), (1, 16, 1), (8, 1, 23)])
def test_any_size(stage_strides, size):
    model = small(stage_strides).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_skips_stand_at_half_the_stride_each():
    for stage_strides, skips in (("early", [2, 1, 0]), ("late", [3, 2, 0])):
        assert small(stage_strides).skips == skips


def test_every_parameter_takes_part():
    model = small(width=8)
    model(torch.randn(2, 1, 16, 32, 48)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_up_block_is_residual():
    """With the block silenced, transposed convolution and skip are summed."""
    up = Up(6, 4, 5).eval()
    torch.nn.init.zeros_(up.block[-1].weight)
    x, skip = torch.randn(2, 6, 2, 3, 4), torch.randn(2, 5, 3, 6, 7)
    with torch.no_grad():
        assert torch.equal(up(x, skip), (up.up(x)[:, :, :3, :6, :7] + up.skip(skip)).relu())


def test_trains_at_batch_size_1():
    """Image pooling leaves one value per channel: a BatchNorm behind it would fail."""
    model = small().train()
    assert torch.isfinite(model(torch.randn(1, 1, 16, 32, 48))).all()


def test_pretrained_encoder_loads_directly():
    pretrained = Encoder(depths=(1, 1, 1, 1), width=4)
    model = small()
    model.encoder.load_state_dict(pretrained.state_dict(), strict=True)
    assert torch.equal(model.encoder.layer4[0].conv2.weight, pretrained.layer4[0].conv2.weight)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_output_stays_with_its_voxel(axis):
    """Far-end padding leaves the near end's logits alone: nothing is stretched when a size is no multiple."""
    torch.manual_seed(0)
    model = small(width=8).double().eval()
    model.aspp.pool[1].weight.data.zero_()  # sees the whole input by design
    size = [9, 18, 17]
    size[axis] = 301  # longer than the receptive field
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        whole, part = model(x), model(x.narrow(2 + axis, 0, 299))
    change = (whole.narrow(2 + axis, 0, 299) - part).abs().amax([d for d in range(5) if d != 2 + axis])
    assert change[:50].max() < 1e-12 < change[-1]


@pytest.mark.slow
def test_learns_a_ball():
    """A few steps overfit a toy: gradients reach everything that is needed."""
    torch.manual_seed(0)
    model = small(num_outputs=1, width=8)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (16, 32, 48)), indexing="ij"))
    ball = ((grid - torch.tensor([8, 14, 20])[:, None, None, None]).square().sum(0) < 49).float()[None, None]
    x = ball + 0.1 * torch.randn(1, 1, 16, 32, 48)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), ball)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model(x) > 0
    dice = 2 * (predicted * ball).sum() / (predicted.sum() + ball.sum())
    assert dice > 0.9
