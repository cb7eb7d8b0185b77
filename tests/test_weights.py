"""Initial weights: MONAI's ResNet as the oracle, files of every kind, and what is said of what does not fit."""

import dataclasses
import json

import pytest
import torch
from monai.networks.nets.resnet import ResNet

from pgl_ray import export
from pgl_ray.config import ExportConfig, FinetuneConfig, load
from pgl_ray.data.store import Index
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import networks, weights

WINDOW = (-1024.0, 325.0)
TINY = {"depths": [1, 2, 1, 1], "width": 4, "stage_strides": "late"}


def monai_resnet(**changes) -> ResNet:
    options = {"block": "bottleneck", "layers": [1, 2, 1, 1], "block_inplanes": [4, 8, 16, 32], "n_input_channels": 1}
    options |= {"conv1_t_stride": (1, 2, 2), "no_max_pool": True, "shortcut_type": "B", "bias_downsample": False}
    torch.manual_seed(0)
    net = ResNet(**options | changes)
    for norm in net.modules():  # statistics that tell whether they were loaded, too
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


def finetuning(init, *args):
    config = load(FinetuneConfig, ["index=s", "run=r", f"init={init}", *args])
    return networks.build_finetuning(config, Index(store="s", scans=(), labels={"a": 1, "b": 2}, hu_window=WINDOW))


ENCODER = ["encoder.depths=[1,2,1,1]", "encoder.width=4", "encoder.stage_strides=late"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_features_are_those_of_monais_resnet(tmp_path, prefix):
    """As MedicalNet's files: all keys behind "module.", under "state_dict", beside other things."""
    net = monai_resnet(num_classes=5)
    held = {prefix + key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": held, "epoch": 3}, tmp_path / "resnet.pth")
    model, _, report = finetuning(tmp_path / "resnet.pth", *ENCODER)
    x = torch.randn(2, 1, 16, 32, 48)
    with torch.no_grad():
        pooled = model.encoder.eval()(x)[-1].mean((2, 3, 4))
        torch.testing.assert_close(net.fc(pooled), net(x), rtol=1e-4, atol=1e-4)
    assert report.left_out == [prefix + "fc.weight", prefix + "fc.bias"] and not report.mismatches()
    assert len(report.lines()) == 1


def test_a_mismatch_is_an_error_that_names_it_unless_allowed(tmp_path):
    net = monai_resnet(n_input_channels=3, bias_downsample=True, feed_forward=False)
    held = net.state_dict()
    held.pop("layer4.0.bn3.weight")
    torch.save(held, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="allow_partial=true") as error:
        finetuning(tmp_path / "resnet.pth", *ENCODER)
    text = str(error.value)
    assert "1 missing (encoder.layer4.0.bn3.weight)" in text and "4 unexpected (encoder.layer1.0.downsample" in text
    assert "1 of another shape (encoder.conv1.weight 4x3x7x7x7, here 4x1x7x7x7)" in text and "\n" not in text

    model, _, report = finetuning(tmp_path / "resnet.pth", *ENCODER, "allow_partial=true")
    random, _, none = finetuning("random", *ENCODER)
    assert none is None and len(report.lines()) == 2
    for name, value in model.state_dict().items():
        taken = name in report.loaded
        expected = held[name.removeprefix("encoder.")] if taken else random.state_dict()[name]
        assert torch.equal(value, expected), name
    unfit = [name for name in model.encoder.state_dict() if f"encoder.{name}" not in report.loaded]
    assert unfit == ["conv1.weight", "layer4.0.bn3.weight"]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["other_shape"] == {
        "encoder.conv1.weight": [[4, 3, 7, 7, 7], [4, 1, 7, 7, 7]]
    }
    with pytest.raises(
        ValueError,
        match=r"freeze=true: .*resnet.pth .* 2 tensors of the encoder \(encoder.conv1.weight, .*bn3.weight\)",
    ):
        finetuning(tmp_path / "resnet.pth", *ENCODER, "allow_partial=true", "freeze=true")
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "else.pth")
    wider = [*ENCODER[::2], "encoder.width=8"]  # of which BatchNorm's counters alone fit
    for name, encoder in (("else", ENCODER), ("resnet", wider)):
        with pytest.raises(ValueError, match="holds nothing that fits"):
            finetuning(tmp_path / f"{name}.pth", *encoder, "allow_partial=true")


def test_counters_of_batches_are_no_weights(tmp_path):
    """As many tensors are counted of a file with them as of one without."""
    held = monai_resnet(feed_forward=False).state_dict()
    counts = []
    for name, without in (("with", "nothing"), ("without", "num_batches")):
        torch.save({key: value for key, value in held.items() if without not in key}, tmp_path / f"{name}.pth")
        (line,) = finetuning(tmp_path / f"{name}.pth", *ENCODER)[2].lines()
        counts.append(line.partition(" tensors ")[0])
    assert counts[0] == counts[1] and int(counts[0].split()[0]) == sum("num_batches" not in key for key in held)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a pre-training that stopped at stage 3, and of a fine-tuning, as the doors write them."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = Encoder(**TINY)
    meta = {"door": "pretrain", "method": "pgl", "encoder": TINY, "level": 3, "hu_window": list(WINDOW), "config": "{}"}
    online = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": online | {"predictor.0.weight": torch.zeros(2)}, "meta": meta}, folder / "pgl.pt")
    segmenter = Segmenter(Encoder(**TINY), 4)
    init_kaiming_uniform(segmenter, 7)
    tuned = meta | {"door": "finetune", "num_outputs": 4, "task": "multiclass", "labels": {}, "level": 4}
    tuned |= {"patch_size": [16, 32, 48]}
    torch.save({"model": segmenter.state_dict(), "meta": tuned}, folder / "tuned.pt")
    return folder, {"pgl": online, "tuned": segmenter.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("name, prefix", [("pgl", "online.encoder."), ("tuned", "encoder.")])
@pytest.mark.parametrize("exported", [False, True])
def test_a_run_and_its_exported_file_give_the_same_encoder(runs, tmp_path, name, prefix, exported):
    folder, given = runs
    init = folder / f"{name}.pt"
    if exported:
        init = tmp_path / f"{name}.safetensors"
        export.run(ExportConfig(run=str(folder / f"{name}.pt"), output=str(init)))
    model, meta, report = finetuning(init)
    random, _, _ = finetuning("random", *ENCODER)
    assert meta.encoder == {"kind": "resnet"} | TINY and meta.init_level == (3 if name == "pgl" else 4)
    for key, value in model.state_dict().items():
        trained = key.startswith("encoder.") and not (name == "pgl" and "layer4" in key)
        own = given[name][prefix + key.removeprefix("encoder.")] if trained else random.state_dict()[key]
        assert torch.equal(value, own), key
    assert not report.mismatches()
    said = r"trained with hu_window=\[-1024.0, 325.0\], the index has \[-500, 500\]: .*'hu_window=\[-1024.0,325.0\]'$"
    with pytest.raises(ValueError, match=said):
        weights.read(str(init), None, (-500, 500))


def test_another_encoder_than_the_papers(tmp_path):
    """ResEnc, pre-trained up to its fourth stage: the stages behind it start at random."""
    settings = {"kind": "resenc", "depths": [1, 1, 1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    held = {f"online.encoder.{key}": value for key, value in build_encoder(**settings).state_dict().items()}
    meta = {"door": "pretrain", "encoder": settings, "level": 3, "hu_window": list(WINDOW), "config": "{}"}
    torch.save({"model": held, "meta": meta}, tmp_path / "pgl.pt")
    model, meta, report = finetuning(tmp_path / "pgl.pt")
    random, _, _ = finetuning("random", "encoder.kind=resenc", "encoder.depths=[1,1,1,1,1,1]", "encoder.width=4")
    assert meta.encoder == settings and meta.init_level == 3 and not report.mismatches()
    for key, value in model.encoder.state_dict().items():
        trained = "stages.4" not in key and "stages.5" not in key
        own = held[f"online.encoder.{key}"] if trained else random.encoder.state_dict()[key]
        assert torch.equal(value, own), key


def test_other_strides_are_refused_or_taken_on_request(runs):
    folder, given = runs
    early = [*ENCODER[:2], "encoder.stage_strides=early"]
    with pytest.raises(ValueError, match=r"'stage_strides': 'late'.*asks for.*'early'.*allow_partial=true"):
        finetuning(folder / "pgl.pt", *early)
    model, meta, report = finetuning(folder / "pgl.pt", *early, "allow_partial=true")
    assert meta.encoder["stage_strides"] == "early" and not report.mismatches()
    stem = given["pgl"]["online.encoder.conv1.weight"]
    assert torch.equal(model.encoder.conv1.weight, stem)


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    torch.save({"net": Genesis}, tmp_path / "code.pth")
    cases = (("cut.safetensors", "damaged"), ("no.safetensors", "does not exist"), ("no.pth", "does not exist"))
    for name, message in (*cases, ("empty.pth", "holds no tensors by name"), ("code.pth", "holds more than tensors")):
        with pytest.raises(ValueError, match=message) as error:
            weights.read(str(tmp_path / name), None, WINDOW)
        assert "\n" not in str(error.value)
