"""Encoder: the paper's size, MONAI's keys, and where its feature cells sit."""

import pytest
import torch
from monai.networks.nets import resnet50

from pgl_ray.model.resnet import Encoder, init_kaiming_uniform


@pytest.mark.parametrize("stage_strides", ["early", "late"])
def test_size_and_keys_are_monais(stage_strides):
    with torch.device("meta"):
        ours = Encoder(stage_strides=stage_strides)
        other = resnet50(
            spatial_dims=3, n_input_channels=1, feed_forward=False, bias_downsample=False, shortcut_type="B"
        )
    assert sum(p.numel() for p in ours.parameters()) == 46_155_072
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize(
    "stage_strides, strides",
    [
        ("early", [(1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), (8, 16, 16)]),
        ("late", [(1, 2, 2), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16)]),
    ],
)
def test_output_strides_and_shapes(stage_strides, strides):
    net = Encoder(depths=(1, 2, 1, 1), width=4, stage_strides=stage_strides).eval()
    assert list(net.strides) == strides
    assert net.channels == (4, 16, 32, 64, 128)
    size = (13, 40, 70)  # no multiple of the stride
    with torch.no_grad():
        maps = net(torch.randn(2, 1, *size))
    for fmap, channels, stride in zip(maps, net.channels, strides):
        assert fmap.shape == (2, channels, *(-(-n // s) for n, s in zip(size, stride)))


def make_positive(net):
    """Positive weights, so that no ReLU closes and the gradient is the receptive field itself."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.named_parameters():
        if name.startswith("conv") or ".conv" in name or "downsample.0" in name:
            spread = torch.rand(value.shape[:2], generator=generator) + 0.5
            value.data = spread[:, :, None, None, None].expand(value.shape).contiguous() / value[0].numel()
    return net.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("stage_strides", ["early", "late"])
def test_centers_are_the_gradients_centre_of_mass(stage_strides):
    check_centers(make_positive(Encoder(depths=(1, 1, 1, 1), width=2, stage_strides=stage_strides)), (48, 96, 112))


def check_centers(net, size):
    """Every map's middle cell looks where the net says; `size` is wider than the receptive field."""
    x = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    for level, fmap in enumerate(net(x)):
        cell = [n // 2 for n in fmap.shape[2:]]
        (weight,) = torch.autograd.grad(fmap[0, :, cell[0], cell[1], cell[2]].sum(), x, retain_graph=True)
        for axis in range(3):
            profile = weight[0, 0].sum([a for a in range(3) if a != axis])
            assert profile[0] == profile[-1] == 0  # nothing is cut off at the border
            middle = (profile * (torch.arange(len(profile)) + 0.5)).sum() / profile.sum()
            expected = net.strides[level][axis] * cell[axis] + net.centers[level][axis]
            assert middle.item() == pytest.approx(expected, abs=1e-6)


def test_centers_follow_the_layers():
    """Asymmetric padding moves the centres by input voxels, as much as the stride before it."""

    class Shifted(Encoder):
        def _convolutions(self):
            self.conv1.padding = (3, 2, 1)
            self.layer2[0].conv2.padding = (0, 1, 2)
            return super()._convolutions()

    centers = Shifted(depths=(1, 1, 1, 1), width=2).centers
    assert centers == ((0.5, 1.5, 2.5), (0.5, 1.5, 2.5), *[(0.5 + 2, 1.5, 2.5 - 4)] * 3)
    assert Encoder(depths=(1, 1, 1, 1), width=2).centers[-1] == (0.5, 0.5, 0.5)


def test_kaiming_uniform_bounds_and_seed():
    net, again, other = (Encoder(depths=(1, 1, 1, 1), width=8) for _ in range(3))
    before = torch.get_rng_state()
    init_kaiming_uniform(net, 3), init_kaiming_uniform(again, 3), init_kaiming_uniform(other, 4)
    assert torch.equal(torch.get_rng_state(), before)  # no global generator
    for (name, a), b, c in zip(net.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b)
        if a.dim() == 5:
            bound = (6 / a[0].numel()) ** 0.5
            assert a.abs().max() <= bound and not torch.equal(a, c)
            assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert (a == (1 if name.endswith("weight") else 0)).all()


def test_early_is_five_times_cheaper_than_late():
    """15.3 and 79.9 GFLOP per view (multiply-adds x 2), counted on meta tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for stage_strides in ("early", "late"):
        with torch.device("meta"):
            net = Encoder(stage_strides=stage_strides)
            with FlopCounterMode(display=False) as counter:
                assert net(torch.zeros(1, 1, 16, 96, 96))[-1].shape == (1, 2048, 2, 6, 6)
        counts.append(counter.get_total_flops() / 1e9)
    assert counts[0] == pytest.approx(15.3, abs=0.1)
    assert counts[1] == pytest.approx(79.9, abs=0.1)
