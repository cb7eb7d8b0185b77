"""export: every format computes what the network computes, and says what goes in; the loader warns."""

import json
import math
import re
import stat
import warnings

import numpy as np
import pytest
import torch

from pgl_ray import export
from pgl_ray.config import ExportConfig, FailedRun, build
from pgl_ray.data import facts, scan_files, store
from pgl_ray.data.store import Index
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import formats

WINDOW = [-1000.0, 400.0]
AFFINE = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])  # SPL, 3 x 1 x 1 mm
SETTINGS = {
    "resnet": {"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"},
    "resenc": {"kind": "resenc", "depths": [1, 1, 1, 1, 1], "width": 4, "stage_strides": "early"},
}


def volume(seed=0, shape=(10, 40, 50)):
    return np.random.default_rng(seed).integers(-1200, 600, shape).astype(np.int16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pre-training checkpoint per kind of encoder, and a fine-tuning one, trained on two scans of 3 x 1 x 1 mm."""
    folder = tmp_path_factory.mktemp("runs")
    for i in range(2):
        scan_files.write_scan(folder / "s", f"scan{i}", volume(i), AFFINE, hu_window=WINDOW)
    index = store.write_index(folder / "s", {}, tuple(WINDOW))
    known = facts.training_facts(index, ["scan0", "scan1"])
    plain = {"hu_window": WINDOW, "data": known, "config": json.dumps({"views": {"size": [16, 32, 32]}})}
    torch.manual_seed(0)
    for kind, settings in SETTINGS.items():
        encoder = build_encoder(**settings)
        weights = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
        meta = plain | {"door": "pretrain", "method": "pgl", "encoder": settings, "level": 3}
        torch.save({"model": weights, "meta": meta}, folder / f"{kind}.pt")
    meta = plain | {"door": "finetune", "encoder": SETTINGS["resnet"], "labels": {"spleen": 1}, "task": "multiclass"}
    meta |= {"num_outputs": 2, "patch_size": [16, 32, 32], "spacing_mm": None}
    model = Segmenter(build_encoder(**SETTINGS["resnet"]), 2)
    torch.save({"model": model.state_dict(), "meta": meta}, folder / "tuned.pt")
    return folder


def config(runs, kind, output, **values):
    return build(ExportConfig, {"run": str(runs / f"{kind}.pt"), "output": str(output), **values})


def state(runs, kind):
    return torch.load(runs / f"{kind}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("kind, part", [("resnet", "encoder"), ("tuned", "segmenter"), ("resenc", "encoder")])
def test_safetensors_say_all_and_load_again(runs, tmp_path, kind, part):
    result = export.run(config(runs, kind, tmp_path / "deep/a.safetensors"))
    assert result.part == part and result.max_difference <= 1e-5 * result.largest and result.largest > 0
    assert stat.S_IMODE((tmp_path / "deep/a.safetensors").stat().st_mode) & 0o044  # others may read it
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.safetensors"]
    network, expected = export.load(tmp_path / "deep/a.safetensors")
    prefix = "online.encoder." if part == "encoder" else ""
    original = {key: value for key, value in state(runs, kind).items() if key.startswith(prefix)}
    assert len(original) == len(network.state_dict())
    assert all(torch.equal(value, original[prefix + key]) for key, value in network.state_dict().items())
    said = expected.metadata
    assert said["hu_window"] == WINDOW and said["axes"] == "N,1,D,H,W" and said["orientation"].startswith("SPL")
    assert said["spacing_mm"].startswith("each scan's own") and said["training_scans"]["spacing_mm"][1] == [3, 1, 1]
    assert "subtract" in said["normalisation"] and said["made_by"].startswith("pgl_ray ")
    assert len(said["training_scans"]["hash"]) == 64 and said["config"]["views"]["size"] == [16, 32, 32]
    if part == "encoder":
        assert said["last_trained_map"] == 3 and said["maps"][3]["output_stride"] == list(network.strides[3])
    else:
        assert said["labels"] == {"spleen": 1} and said["patch_size"] == [16, 32, 32]


def test_the_papers_encoder_is_monais_resnet50(runs, tmp_path):
    from monai.networks.nets.resnet import ResNet
    from safetensors.torch import load_file

    export.run(config(runs, "tuned", tmp_path / "e.safetensors", part="encoder"))
    options = {"conv1_t_size": 7, "conv1_t_stride": (1, 2, 2), "no_max_pool": True, "shortcut_type": "B"}
    options |= {"feed_forward": False, "bias_downsample": False, "n_input_channels": 1}
    theirs = ResNet("bottleneck", [1, 1, 1, 1], [4, 8, 16, 32], **options)
    theirs.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)  # no key missing, none too many
    assert torch.equal(theirs.conv1.weight, state(runs, "tuned")["encoder.conv1.weight"])


@pytest.mark.slow
def test_torch_export_runs_without_the_classes(runs, tmp_path):
    result = export.run(config(runs, "tuned", tmp_path / "m.pt2"))
    assert result.max_difference <= 1e-4 * result.largest
    extra = {"pgl_ray.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["pgl_ray.json"])["hu_window"]) == WINDOW
    model = Segmenter(build_encoder(**SETTINGS["resnet"]), 2).eval()
    model.load_state_dict(state(runs, "tuned"))
    x = torch.randn(3, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_onnx_runs_without_torch(runs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'pgl_ray[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'pgl_ray[onnx]'")
    result = export.run(config(runs, "resnet", tmp_path / "m.onnx", size=[8, 32, 48]))
    assert result.max_difference <= 1e-4 * result.largest
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["hu_window"]) == WINDOW
    encoder = build_encoder(**SETTINGS["resnet"]).eval()
    encoder.load_state_dict({k.removeprefix("online.encoder."): v for k, v in state(runs, "resnet").items()})
    encoder.stop_at(3)  # what the run trained
    x = torch.randn(3, 1, 8, 32, 48)
    with torch.no_grad():
        for ours, theirs in zip(encoder(x), session.run(None, {"volume": x.numpy()}), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_nnunet_finds_what_it_reads(runs, tmp_path):
    """The steps of nnU-Net's preprocess_like_nnssl and PretrainedTrainer.load_pretrained_weights, on this file."""
    export.run(config(runs, "resenc", tmp_path / "m.pth"))
    file = torch.load(tmp_path / "m.pth", weights_only=True)
    plan = file["nnssl_adaptation_plan"]
    (settings,) = plan["pretrain_plan"]["configurations"].values()
    assert settings["spacing"] is None and settings["patch_size"] == [16, 32, 32]
    assert plan["architecture_plans"]["arch_class_name"].endswith("ResidualEncoderUNet")
    assert set(plan["architecture_plans"]["arch_kwargs_requiring_import"]) <= set(
        plan["architecture_plans"]["arch_kwargs"]
    )
    assert plan["pretrain_num_input_channels"] == 1 and plan["key_to_lpe"] is None
    assert len(plan["recommended_downstream_patchsize"]) == 3 and file["citations"]
    weights, own = file["network_weights"], build_encoder(**SETTINGS["resenc"])
    for module, key in ((own.stages, plan["key_to_encoder"]), (own.stem, plan["key_to_stem"])):
        part = {name.replace(key, "").removeprefix("."): v for name, v in weights.items() if name.startswith(key)}
        assert str(module.load_state_dict(part)) == "<All keys matched successfully>"
    assert all(f"{name}.weight" in weights for name in plan["keys_to_in_proj"])
    assert torch.equal(own.stem.convs[0].conv.weight, state(runs, "resenc")["online.encoder.stem.convs.0.conv.weight"])


def test_nnunets_own_network_takes_the_weights(runs, tmp_path):
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="pip install --no-deps dynamic-network-architectures==0.4.4 (its dependencies need torchvision)",
    )
    import pydoc

    export.run(config(runs, "resenc", tmp_path / "m.pth"))
    file = torch.load(tmp_path / "m.pth", weights_only=True)
    architecture = file["nnssl_adaptation_plan"]["architecture_plans"]
    options = dict(architecture["arch_kwargs"])
    for name in architecture["arch_kwargs_requiring_import"]:
        options[name] = options[name] and pydoc.locate(options[name])
    network = unet.ResidualEncoderUNet(1, num_classes=3, deep_supervision=False, **options)
    missing, unexpected = network.load_state_dict(file["network_weights"], strict=False)
    assert not unexpected and all(name.startswith("decoder.") for name in missing)
    assert network(torch.randn(2, 1, 16, 32, 32)).shape == (2, 3, 16, 32, 32)


# -- the loader -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(runs, tmp_path_factory):
    file = tmp_path_factory.mktemp("loader") / "e.safetensors"
    export.run(config(runs, "resnet", file))
    return export.load(file)[1]


def test_a_scan_like_the_trained_ones_is_normalised_in_silence(expected):
    voxels = volume(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = expected.prepare(voxels, AFFINE)
    clipped = np.clip(voxels, *WINDOW).astype(np.float64)
    np.testing.assert_allclose(prepared[0, 0], (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    assert prepared.dtype == torch.float32 and prepared.shape == (1, 1, *voxels.shape)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, a: (v, a @ np.diag([3, 1, 1, 1])), r"are 9 x 1 x 1 mm \(D, H, W\), the training scans' 3 x 1 x 1"),
        (lambda v, a: (v, a @ np.diag([1, 0.7, 1, 1])), "voxels are 3 x 0.7 x 1 mm"),
        (lambda v, a: (v[::-1], a @ np.diag([-1, 1, 1, 1])), "axes run towards I, P, L"),
        (lambda v, a: (v.transpose(2, 1, 0), a[:, [2, 1, 0, 3]]), "axes run towards L, P, S"),
        (lambda v, a: ((v - v.mean()) / v.std(), a), "is it in HU, and a CT"),  # z-scored already
        (lambda v, a: (v + 1024, a), "is it in HU, and a CT"),  # stored values without the intercept
    ],
)
def test_the_loader_warns(expected, change, message):
    with pytest.warns(UserWarning) as said:
        expected.prepare(*change(volume(5), AFFINE))
    assert any(re.search(message, str(warning.message)) for warning in said)


def test_of_a_resampled_store_the_one_spacing_counts():
    index = Index("s", (), {}, tuple(WINDOW), spacing_mm=(3.0, 1.0, 1.0))
    known = {"spacing_mm": [[1, 0.5, 0.5], [2, 1, 1], [5, 2, 2]], "resampled_mm": list(index.spacing_mm)}
    known |= {"mean_hu": [-500, 0], "std_hu": [300, 600]}
    assert facts.disagreements(known, WINDOW, volume(), AFFINE) == []
    (note,) = facts.disagreements(known, WINDOW, volume(), AFFINE @ np.diag([1.1, 1, 1, 1]))
    assert "3.3 x 1 x 1 mm (D, H, W), the training scans' 3 x 1 x 1 mm" in note


def test_voxels_that_are_none(expected):
    for wrong in (np.zeros((3, 4)), np.full((2, 2, 2), np.nan)):
        with pytest.raises(ValueError, match="expected one 3D volume"):
            expected.prepare(wrong, AFFINE)


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, output, values, message",
    [
        ("resnet", "m.pth", {}, "nnU-Net cannot express the bottleneck ResNet"),
        ("resnet", "m.bin", {}, r"ends in \.safetensors, \.pt2, \.onnx, \.pth"),
        ("resnet", "m.pt2", {"part": "segmenter"}, "is a pretrain run: take part=encoder"),
        ("resenc", "m.pth", {"part": "segmenter"}, "an encoder alone"),
        ("nowhere", "m.pt2", {}, "does not exist"),
        ("resnet", "file/m.safetensors", {}, "cannot be written"),
    ],
)
def test_wrong_use(runs, tmp_path, kind, output, values, message):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=message):
        export.run(config(runs, kind, tmp_path / output, **values))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_computes_something_else_is_removed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "write_safetensors", lambda net, meta, xs, path: [[o + 1 for o in net(x)] for x in xs])
    with pytest.raises(FailedRun, match="computes something else"):
        export.run(config(runs, "resnet", tmp_path / "m.safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_finite_is_not_exported(runs, tmp_path, monkeypatch):
    """NaN in a deep map alone, behind maps that agree."""

    def broken(net, meta, xs, path):
        return [[*net(x)[:-1], net(x)[-1] * math.nan] for x in xs]

    monkeypatch.setattr(formats, "write_safetensors", broken)
    with pytest.raises(FailedRun, match="computes something else: nan"):
        export.run(config(runs, "resnet", tmp_path / "m.safetensors"))
    load = export.load_encoder

    def ill(run):
        encoder, meta = load(run)
        encoder.layer3[0].conv1.weight.data.fill_(math.nan)
        return encoder, meta

    monkeypatch.setattr(export, "load_encoder", ill)
    with pytest.raises(FailedRun, match="not finite"):
        export.run(config(runs, "resnet", tmp_path / "m.safetensors"))
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_loaded(tmp_path, runs):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    export.run(config(runs, "resnet", tmp_path / "whole.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:9000])
    for name, message in (("none", "does not exist"), ("cut", "damaged"), ("other", "says nothing about its network")):
        with pytest.raises(ValueError, match=message):
            export.load(tmp_path / f"{name}.safetensors")
