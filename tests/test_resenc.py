"""ResEnc: nnU-Net's keys, shapes and outputs, where its cells sit, and every door's way to it."""

import numpy as np
import pytest
import torch
from test_resnet import check_centers
from torch import nn

from pgl_ray import check_align, finetune
from pgl_ray.config import CheckAlignConfig, EncoderConfig, FailedRun, FinetuneConfig, PretrainConfig, build, load
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import Pair, feature_geometry
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import networks

TINY = {"kind": "resenc", "depths": [1, 2, 1, 1, 1, 1], "width": 4, "stage_strides": "early"}


def nnunets_keys(depths, channels):
    """Keys and shapes of dynamic_network_architectures 0.4.4's ResidualEncoder, written down from its print-out."""

    def conv_norm(prefix, before, width, kernel, bias):
        for name, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
            yield f"{prefix}.{name}.weight", (width, before, kernel, kernel, kernel)
            if bias:
                yield f"{prefix}.{name}.bias", (width,)
            yield from ((f"{prefix}.{norm}.{part}", (width,)) for part in ("weight", "bias"))

    yield from conv_norm("stem.convs.0", 1, channels[0], 3, True)
    for stage, (depth, width) in enumerate(zip(depths, channels)):
        before = channels[max(0, stage - 1)]
        for block in range(depth):
            prefix = f"stages.{stage}.blocks.{block}"
            yield from conv_norm(f"{prefix}.conv1", before if block == 0 else width, width, 3, True)
            yield from conv_norm(f"{prefix}.conv2", width, width, 3, True)
            if block == 0 and before != width:
                yield from conv_norm(f"{prefix}.skip.1", before, width, 1, False)  # skip.0 is the pooling


def test_size_and_keys_are_resenc_ls():
    with torch.device("meta"):
        net = build_encoder(**build(EncoderConfig, {"kind": "resenc"}).model_dump())
    channels = (32, 64, 128, 256, 320, 320)  # nnU-Net's ResEncL
    assert net.channels == channels and net.settings["depths"] == [1, 3, 4, 6, 6, 6]
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes == dict(nnunets_keys((1, 3, 4, 6, 6, 6), channels))
    assert sum(p.numel() for p in net.parameters()) == 90_296_576


@pytest.mark.parametrize("depths", [(1, 2, 1, 1, 2, 1), (1, 1, 1, 1, 1)])
def test_outputs_are_dynamic_network_architectures(depths):
    residual = pytest.importorskip(
        "dynamic_network_architectures.building_blocks.residual_encoders",
        reason="pip install --no-deps dynamic-network-architectures==0.4.4 (its dependencies need torchvision)",
    )
    ours = ResEncoder(depths, 4).eval()
    arch = ours.nnunet_arch()
    names = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "conv_bias")
    options = {name: arch[name] for name in names} | {"norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    options |= {"norm_op_kwargs": arch["norm_op_kwargs"], "nonlin_kwargs": arch["nonlin_kwargs"]}
    theirs = residual.ResidualEncoder(1, conv_op=nn.Conv3d, return_skips=True, **options).eval()
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 1, 16, 64, 96)
    with torch.no_grad():
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_strides_shapes_and_where_it_stops():
    net = build_encoder(**TINY).eval()
    assert net.strides == ((1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), (16, 32, 32))
    size = (17, 70, 45)  # no multiple of the stride
    with torch.no_grad():
        maps = net(torch.randn(1, 1, *size))
    for fmap, channels, stride in zip(maps, net.channels, net.strides, strict=True):
        assert fmap.shape == (1, channels, *(-(-n // s) for n, s in zip(size, stride)))
    assert feature_geometry(net, (16, 96, 96), (8, 16, 16))[0] == 4
    net.stop_at(4)
    assert len(net(torch.randn(1, 1, 16, 32, 32))) == 5
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert not any(name.startswith("stages.5.") for name in trained) and any(n.startswith("stages.4.") for n in trained)


def test_centers_are_the_gradients_centre_of_mass():
    """With both branches of every block weighing alike: the mean of the convolution's and the pooling's centre."""
    net = ResEncoder((1, 1, 1, 1), 1)
    for part in net.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data.fill_(1 / part.weight[0].numel())
        elif isinstance(part, nn.InstanceNorm3d):
            part.forward = lambda x: x
    check_centers(net.double().eval(), (40, 72, 72))


def test_init_depends_only_on_the_seed():
    nets = [build_encoder(**TINY) for _ in range(3)]
    for net, seed in zip(nets, (3, 3, 4)):
        for part in net.modules():
            if isinstance(part, nn.InstanceNorm3d):
                part.weight.data.fill_(7)
        init_kaiming_uniform(net, seed)
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["stem.convs.0.conv.weight"], states[2]["stem.convs.0.conv.weight"])
    assert (states[0]["stem.convs.0.norm.weight"] == 1).all()


@pytest.mark.parametrize("num_stages", [5, 6])
def test_segmenter_on_top(num_stages):
    net = Segmenter(build_encoder("resenc", (1,) * num_stages, 4), 3).eval()
    with torch.no_grad():
        assert net(torch.randn(2, 1, 18, 70, 64)).shape == (2, 3, 18, 70, 64)


@pytest.mark.parametrize(
    "encoder, coarse",
    [
        ({"kind": "resenc", "depths": (1,) * 7}, "(4, 8, 8)"),
        ({"kind": "resenc", "depths": (1,) * 6}, "(2, 4, 4)"),
        ({"kind": "resenc", "depths": (1,) * 5}, None),
        ({"depths": (1, 1, 1, 1)}, None),
    ],
)
@pytest.mark.parametrize("decoder", ["paper", "light"])
def test_a_decoder_that_ends_on_a_coarse_map_is_said(tmp_path, capsys, monkeypatch, encoder, coarse, decoder):
    """Three steps up from six or seven stages do not reach the stride 1,2,2 that the paper's decoder ends at."""
    label = np.ones((8, 16, 16), np.uint8)
    for name in "ab":
        volume = np.full(label.shape, ord(name), np.int16)
        write_scan(tmp_path / "s", name, volume, np.eye(4), label=label, labelled=(1,), split="train")
    write_index(tmp_path / "s", {"organ": 1}, (-1024.0, 325.0))
    for room, name in ((finetune.launch, "connect"), (finetune.nodes, "await_nodes"), (finetune.stream, "too_large")):
        monkeypatch.setattr(room, name, lambda *args: None)
    monkeypatch.setattr(finetune.launch, "fit", lambda *args, **kwargs: "far enough")
    values = {"index": str(tmp_path / "s"), "run": str(tmp_path / "r"), "max_steps": 1, "global_batch_size": 1}
    config = build(FinetuneConfig, {**values, "encoder": {"width": 2, **encoder}, "decoder": decoder})
    with pytest.raises(FailedRun, match="far enough"):
        finetune.run(config)
    said = capsys.readouterr().out
    assert ("decoder=paper ends at stride" in said) == (decoder == "paper" and coarse is not None)
    assert coarse is None or decoder == "light" or f"ends at stride {coarse} of this encoder" in said


@pytest.mark.parametrize("method, stride", [("pgl", [8, 16, 16]), ("pgl", [4, 8, 8]), ("byol", None)])
def test_a_training_step_reaches_all_trained_stages(method, stride):
    args = ["index=a", "run=b", f"method={method}", "encoder.kind=resenc", "encoder.width=4", "heads.hidden=8"]
    args += ["encoder.depths=[1,1,1,1,1,1]", "heads.out=8", "views.size=[16,64,64]"]
    args += [f"align.output_stride={stride}"] if stride else []
    net, _ = networks.build_pretraining(load(PretrainConfig, args))
    views = [torch.randn(2, 1, 16, 64, 64) for _ in (1, 2)]
    boxes = [torch.tensor([[[0, 20], [0, 80], [0, 70]]] * 2), torch.tensor([[[2, 20], [10, 90], [5, 70]]] * 2)]
    flips = [torch.tensor([[True, False, True]] * 2), torch.tensor([[False, False, True]] * 2)]
    net(Pair(*views, *boxes, *flips)).loss.backward()
    last = net.get_submodule("online.encoder").last
    assert last == {None: 5, (8, 16, 16): 4, (4, 8, 8): 3}[stride and tuple(stride)]
    for name, value in net.online["encoder"].named_parameters():
        stage = int(name.split(".")[1]) if name.startswith("stages") else 0
        assert (value.grad is not None) == (stage <= last), name


@pytest.mark.slow
def test_aligned_features_look_at_the_same_places(tmp_path):
    args = ["encoder.kind=resenc", "encoder.depths=[1,1,2,1,1]", "views.size=[16,48,32]", "num_pairs=64"]
    result = check_align.run(load(CheckAlignConfig, [*args, f"output={tmp_path}"]))
    residual = result.facts["conventions"]["receptive_field"]
    assert result.facts["passed"] and np.isfinite(residual["excess_voxels"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "resenc", "stage_strides": "late"}, "knows early alone"),
        ({"kind": "resenc", "depths": [1, 1]}, "5 to 7 stages"),
        ({"depths": [1, 1, 1, 1, 1]}, "kind=resnet has 4 stages"),
        ({"kind": "vgg"}, "'resnet' or 'resenc'"),
    ],
)
def test_wrong_encoders_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        build(EncoderConfig, values)


@pytest.mark.parametrize("args", [["method=byol"], ["method=genesis"], ["align.output_stride=[16,32,32]"]])
def test_views_that_leave_one_cell_are_refused_before(args):
    """InstanceNorm would refuse them in the first step."""
    given = [f"encoder.{key}={value}" for key, value in TINY.items()]
    given += ["index=s", "run=r", "heads.hidden=8", "heads.out=8", "views.size=[16,32,32]", *args]
    with pytest.raises(ValueError, match=r"^views\.size=\[16, 32, 32\]: .* has one cell .*: take larger views\.size$"):
        networks.build_pretraining(load(PretrainConfig, given))
    model, _ = networks.build_pretraining(load(PretrainConfig, [*given, "views.size=[16,32,64]"]))
    model.train().get_submodule("online.encoder")(torch.zeros(2, 1, 16, 32, 64))


def test_patches_that_leave_one_cell_are_refused_before(tmp_path):
    write_scan(tmp_path, "a", np.zeros((20, 40, 40), np.int16), np.eye(4), label=np.ones((20, 40, 40), np.uint8))
    index = write_index(tmp_path, {"liver": 1}, (-1024.0, 325.0))
    for size, fits in (([16, 32, 32], False), ([10, 20, 32], False), ([16, 33, 32], True)):
        config = build(FinetuneConfig, {"index": "s", "run": "r", "encoder": TINY, "patch": {"size": size}})
        if fits:
            networks.build_finetuning(config, index)
            continue
        with pytest.raises(ValueError, match=r"^patch\.size=.* has one cell on its map of stride \[16, 32, 32\]"):
            networks.build_finetuning(config, index)
