"""Weights that come with the package: file, card and metadata agree, they load wherever an init is taken and into
MONAI, and what is wrong with them is one line."""

import dataclasses
import importlib.resources
import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets.resnet import ResNet
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from pgl_ray import config as c
from pgl_ray import encoders, export, finetune, probe
from pgl_ray.data.facts import spacing_note, training_facts
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import Index, read_index, update_record, write_index
from pgl_ray.model.encoder import build_encoder
from pgl_ray.pages import probe_tables, run_folders
from pgl_ray.sweep import checks, stages, stores
from pgl_ray.train import formats, networks, weights
from pgl_ray.train.records import CheckpointMeta

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "pgl_ray" / "pretrained").glob("*.safetensors"))
WINDOW = (-1024.0, 325.0)
INIT = "pretrained:openkbp_small"
STRIDES = {"early": (2, 2, 2, 1), "late": (1, 2, 2, 2)}
PROBE = {"size": (8, 32, 32), "num_scans": 2, "num_test_scans": 1, "voxels_per_class": 20, "test_split": "val"}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metadata(path):
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    return {key: formats.decode_text(value) for key, value in texts.items()}


def write_store(folder, spacing=(2.5, 4.5, 4.5), window=WINDOW, preparations=()):
    affine = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]]) @ np.diag([*spacing, 1])
    for number in range(3):
        rng = np.random.default_rng(number)
        label = (rng.random((3, 4, 4)) > 0.5).repeat(4, 0).repeat(9, 1).repeat(9, 2).astype(np.uint8)
        volume = (200 * label.astype(int) - 100 + rng.integers(-50, 50, label.shape)).astype(np.int16)
        fields = {"label": label, "labelled": (1,), "split": "val" if number == 2 else "train", "hu_window": window}
        write_scan(folder, f"s{number}", volume, affine, **fields)
    return write_index(folder, {"organ": 1}, window, preparations=preparations)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


def probing(index, init=INIT, **changes):
    return c.ProbeConfig(index=index.store, init=init, **PROBE | changes)


def tuning(index, *args, init=INIT, run="r"):
    return c.load(c.FinetuneConfig, [f"index={index.store}", f"run={run}", f"init={init}", *args])


# -- the files --------------------------------------------------------------------------------------------------------


def test_there_are_weights_and_each_has_a_card():
    assert FILES and all(path.with_suffix(".md").is_file() for path in FILES)
    assert Path(importlib.resources.files("pgl_ray") / "pretrained" / FILES[0].name).read_bytes()


def test_every_file_next_to_the_code_is_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pgl_ray"]
    package = ROOT / "pgl_ray"
    files = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    others = [p.relative_to(package) for p in files if p.suffix != ".py"]
    for path in others:
        depth = len(path.parts)
        assert any(fnmatch(str(path), one) and one.count("/") == depth - 1 for one in patterns), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_one_encoder_in_float32_and_says_what_it_is(path):
    assert path.stat().st_size <= 8e6
    tensors, said = load_file(path), metadata(path)
    own = build_encoder(**said["architecture"]["encoder"]).state_dict()
    assert {name: value.shape for name, value in tensors.items()} == {name: own[name].shape for name in own}
    for name, value in tensors.items():
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32), name
        assert value.isfinite().all() and not (name.endswith("running_var") and (value <= 0).any()), name
    trained = [name for name in tensors if name.endswith("running_mean")]
    assert all(tensors[name].abs().sum() > 0 for name in trained[: 1 + 3 * said["last_trained_map"]])
    assert said["part"] == "encoder" and said["made_by"].startswith("pgl_ray ") and said["pgl_ray_version"]
    assert "MIT" in said["data_licence"] and isinstance(said["steps"], int) and said["method"]
    assert len(said["median_spacing_mm"]) == 3 and len(said["hu_window"]) == 2 and said["training_scans"]["num_scans"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_no_folder_of_the_machine_that_made_it(path):
    def leaves(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [value] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    texts = [leaf for leaf in leaves(metadata(path)) if isinstance(leaf, str)]
    assert texts and not [text for text in texts if re.search(r"(^|\s)[/~]|://|\\", text)]


def card_lines(path):
    """What a card has to say of its file."""
    said = metadata(path)
    encoder, maps, views = said["architecture"]["encoder"], said["maps"], said["config"]["views"]["size"]
    network = build_encoder(**encoder)
    names = ["stem", "layer1", "layer2", "layer3", "layer4"]
    low, median, high = (" x ".join(f"{mm:.3g}" for mm in size) for size in said["training_scans"]["spacing_mm"])
    yield f"blocks {'-'.join(map(str, encoder['depths']))}, width {encoder['width']}, "
    yield f" strides {encoder['stage_strides']}; {sum(p.numel() for p in network.parameters()):,} parameters, float32"
    yield f"| {said['method']}, {said['steps']:,} steps, pgl_ray {said['pgl_ray_version']} |"
    yield f"| {said['training_scans']['num_scans']} CTs of {said['training_scans']['data_sets'][0]['name']} |"
    yield f"| trained up to | {names[said['last_trained_map']]} |"
    yield f"| {path.stat().st_size / 1e6:.1f} MB |"
    yield f"| HU window | {said['hu_window'][0]:g} to {said['hu_window'][1]:g}, clipped"
    yield f"median {median} mm (D, H, W), from {low} to {high};"
    yield f"| {' x '.join(map(str, views))} voxels |"
    for name, channels, one in zip(names, network.channels, maps, strict=True):
        stride, center = (", ".join(map(str, one[key])) for key in ("output_stride", "center"))
        yield f"| {name} | {channels} | {stride} | {center} |"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_card_says_what_the_file_says(path):
    card = path.with_suffix(".md").read_text()
    assert [line for line in card_lines(path) if line not in card] == []
    assert "10.1002/mp.14845" in card and "Babier" in card and "MIT" in card and "No medical device" in card
    assert "{{" not in card
    assert metadata(path)["method"] == "pgl" and int(metadata(path)["steps"]) > 0


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.with_suffix(".md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_cards_code_runs_and_monai_computes_the_same(path, tmp_path, monkeypatch):
    (tmp_path / path.name).write_bytes(path.read_bytes())
    affine = np.diag([-4.5, -4.5, 2.5, 1])
    hu = np.random.default_rng(0).normal(-900, 280, (70, 66, 40)).clip(-1000, 1000).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    monkeypatch.chdir(tmp_path)
    known = {}
    for code in blocks(path, "python"):
        exec(code, known)
    ours, theirs = known["maps"], known["resnet"]
    x = known["ct"][..., :32, :64, :64]
    with torch.inference_mode():
        maps = [theirs.act(theirs.bn1(theirs.conv1(x)))]
        for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            maps.append(stage(maps[-1]))
    assert len(ours) == metadata(path)["last_trained_map"] + 1
    for mine, other in zip(ours, maps, strict=False):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_cards_commands_parse(path):
    models = {"prepare": c.PrepareConfig, "pretrain": c.PretrainConfig, "export": c.ExportConfig}
    models |= {"finetune": c.FinetuneConfig, "probe": c.ProbeConfig}
    commands = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0] for line in commands if "{{" not in line]  # those that are not filled in yet
    assert len(commands) >= 4
    for line in commands:
        python, m, door, *args = shlex.split(line)
        if m != "-m":  # a script of the repository
            assert python == "python" and (ROOT / m).is_file()
            continue
        args = [str(ROOT / arg) if arg.endswith(".yaml") else arg for arg in args]
        assert (python, m) == ("python", "-m") and c.load(models[door.removeprefix("pgl_ray.")], args)


# -- MONAI ------------------------------------------------------------------------------------------------------------


def monais(said, **options):
    encoder = said["architecture"]["encoder"]
    settings = {"n_input_channels": 1, "conv1_t_size": 7, "conv1_t_stride": (1, 2, 2), "no_max_pool": True}
    settings |= {"shortcut_type": "B", "bias_downsample": False} | options
    return ResNet("bottleneck", encoder["depths"], [encoder["width"] * 2**i for i in range(4)], **settings).eval()


def stages_of(net):
    return [net.layer1, net.layer2, net.layer3, net.layer4]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("strides", STRIDES)
def test_monais_resnet_finds_every_key_and_the_same_features(path, strides):
    """MONAI's own strides are "late"; our encoder of either kind is read as an init is."""
    said = metadata(path)
    theirs = monais(said, num_classes=3)
    missing, unexpected = theirs.load_state_dict(load_file(path), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    monais(said, feed_forward=False).load_state_dict(load_file(path), strict=True)
    if strides == "early":
        for stage, stride in zip(stages_of(theirs), STRIDES[strides]):
            stage[0].conv2.stride = stage[0].downsample[0].stride = (stride,) * 3
    settings = said["architecture"]["encoder"] | {"stage_strides": strides}
    ours, source = weights.read(f"pretrained:{path.stem}", settings, said["hu_window"], allow_partial=True)
    weights.fill(ours, source)
    x = torch.randn(2, 1, 16, 48, 32, generator=torch.Generator().manual_seed(0))
    last = said["last_trained_map"]
    with torch.inference_mode():
        maps = [theirs.act(theirs.bn1(theirs.conv1(x)))]
        for stage in stages_of(theirs)[:last]:
            maps.append(stage(maps[-1]))
        features = ours.eval()(x)[: last + 1]
        if last == 4:  # the whole network, MONAI's own forward
            torch.testing.assert_close(theirs(x), theirs.fc(features[-1].mean((2, 3, 4))))
    for mine, other in zip(features, maps, strict=True):
        torch.testing.assert_close(mine, other)


# -- where an init is taken -------------------------------------------------------------------------------------------


def test_a_name_stays_a_name_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, args in ((c.FinetuneConfig, ["index=s", "run=r"]), (c.ProbeConfig, ["index=s"])):
        config = c.load(model, [*args, f"init={INIT}"])
        assert config.init == INIT
        (tmp_path / "kept.yaml").write_text(c.to_yaml(config))
        assert c.load(model, [str(tmp_path / "kept.yaml")]) == config
        (tmp_path / "flow.yaml").write_text(f"{{index: s, init: {INIT}{', run: r' if len(args) == 2 else ''}}}\n")
        assert c.load(model, [str(tmp_path / "flow.yaml")]).init == INIT
        for path in ("pretrained", "pretrained/x", "./pretrained:x"):
            assert c.load(model, [*args, f"init={path}"]).init == str(tmp_path / path)
    job = tmp_path / c.JOB_FOLDER.strip("/") / "x"  # where relative paths are refused
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert c.load(c.ProbeConfig, ["index=/s", f"init={INIT}"]).init == INIT


def test_probe_and_finetune_start_from_the_files_weights(index, capsys):
    path = weights.locate(INIT)
    held, said = load_file(path), metadata(path)
    trained = ["conv1.", "bn1.", *(f"layer{i + 1}." for i in range(said["last_trained_map"]))]
    model, meta, report = networks.build_finetuning(tuning(index), index)
    random, _, _ = networks.build_finetuning(
        tuning(index, f"encoder={said['architecture']['encoder']}", init="random"), index
    )
    assert meta.encoder == said["architecture"]["encoder"] and meta.init_level == said["last_trained_map"]
    assert not report.mismatches() and report.init == INIT
    assert report.trained_on["hash"] == said["training_scans"]["hash"]
    assert json.loads(json.dumps(report.trained_on)) == report.trained_on  # run.json keeps it
    for name, value in model.state_dict().items():
        own = name.removeprefix("encoder.")
        taken = name.startswith("encoder.") and own.startswith(tuple(trained))
        assert torch.equal(value, held[own] if taken else random.state_dict()[name]), name
    encoder = encoders.read("init", probing(index), index).ready(index, [])[0]
    assert encoder.last == said["last_trained_map"]
    for name, value in encoder.state_dict().items():
        assert not name.startswith(tuple(trained)) or torch.equal(value.cpu(), held[name]), name
    assert capsys.readouterr().out == ""  # the voxels are alike


def test_a_run_that_has_begun_needs_the_name_no_more(index):
    _, meta, _ = networks.build_finetuning(tuning(index), index)
    model, again, report = networks.build_finetuning(
        tuning(index, init="pretrained:gone"), index, CheckpointMeta(**meta.plain())
    )
    assert report is None and again.encoder == meta.encoder and model.encoder.channels[0] > 0


@pytest.mark.slow
def test_a_probe_leaves_nothing_in_the_package(index, tmp_path):
    before = sorted(path.name for path in weights.FOLDER.rglob("*"))
    result = probe.run(probing(index))
    assert result.init == INIT and INIT in probe.describe(result)
    assert sorted(path.name for path in weights.FOLDER.rglob("*")) == before
    written = probe.run(probing(index, output=str(tmp_path / "p.json")))
    assert json.loads((tmp_path / "p.json").read_text())["init"] == INIT and written.recall == result.recall


def sweep(index, folder, **changes):
    values = {"index": index.store, "run": str(folder / "sweep"), "base_pretrain": {"max_steps": 2}}
    values |= {"base_finetune": {"max_steps": 4}, "base_probe": PROBE}
    return c.build(c.TuneConfig, values | changes)


def test_an_arm_of_a_sweep_takes_them_without_pre_training(index, tmp_path):
    (tmp_path / "arms.yaml").write_text(f"arms:\n  given: {{finetune.init: {INIT}}}\n  pgl: {{}}\n")
    arms = OmegaConf.to_container(OmegaConf.load(tmp_path / "arms.yaml"))["arms"]
    config = sweep(index, tmp_path, arms=arms)
    given, pgl = (stages.stage_configs(config, one.values, tmp_path / "t") for one in checks.check(config))
    assert "pretrain" not in given and given["finetune"].init == given["probe"].init == INIT and "pretrain" in pgl
    stores.check_stores(config, checks.check(config))
    for arm, message in (
        ({"finetune.init": "pretrained:none"}, f"no weights of that name come with pgl_ray; there are: .*{INIT}"),
        ({"finetune.init": INIT, "finetune.encoder.width": 5}, "the config asks for"),
    ):
        config = sweep(index, tmp_path, arms={"a": arm})
        with pytest.raises(ValueError, match=message):
            stores.check_stores(config, checks.check(config))


def test_a_report_names_them(tmp_path):
    run = tmp_path / "tuned"
    run.mkdir()
    record = {"door": "finetune", "config": {"init": INIT}, "started": "2026-01-01T00:00", "num_parameters": 1}
    record |= {"store": {"num_scans": 1}, "versions": {}, "num_steps": 0}
    (run / "run.json").write_text(json.dumps(record))
    facts = {"init": INIT, "balanced_accuracy": 0.5, "recall": {"a": 0.5}, "num_train_scans": 1, "num_test_scans": 1}
    facts |= {"readings": {}, "controls": {}, "ceiling": {}, "sentences": [], "pictures": []}
    (tmp_path / "probe_given.json").write_text(json.dumps(facts))
    (tmp_path / "probe_other.json").write_text(json.dumps(facts | {"init": "pretrained:other"}))
    runs = run_folders.read_runs([str(run)])
    assert run_folders.overview(runs[0])["init"] == INIT
    assert [given["init"] for _, given in probe_tables.read(runs)[0]] == [INIT]


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing", "openkbp_small.safetensors", "../pretrained/openkbp_small"])
def test_an_unknown_name_is_one_line_that_lists_those_there_are(index, name):
    for load in (
        lambda init: networks.build_finetuning(tuning(index, init=init), index),
        lambda init: probe.run(probing(index, init)),
        export.load,
    ):
        with pytest.raises(ValueError, match="no weights of that name come with pgl_ray") as error:
            load(f"pretrained:{name}")
        text = str(error.value)
        assert f"init=pretrained:{name}: " in text and "\n" not in text
        assert all(f"pretrained:{path.stem}" in text.split("there are")[1] for path in FILES)


def test_a_damaged_file_is_one_line(index, tmp_path, monkeypatch):
    whole = weights.locate(INIT).read_bytes()
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    for cut in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "openkbp_small.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match=f"^init={INIT} is damaged .*install pgl_ray again$") as error:
            networks.build_finetuning(tuning(index), index)
        assert "\n" not in str(error.value)
    (tmp_path / "openkbp_small.safetensors").unlink()
    with pytest.raises(ValueError, match="there are: none; install it again"):
        networks.build_finetuning(tuning(index), index)


def test_another_window_or_encoder_is_refused(tmp_path, index):
    other = write_store(tmp_path, window=(-500.0, 500.0))
    for load in (
        lambda: networks.build_finetuning(tuning(other), other),
        lambda: probe.run(probing(other)),
    ):
        with pytest.raises(ValueError, match=rf"init={INIT} was trained with hu_window=.* the index has \[-500.0, 500"):
            load()
    with pytest.raises(ValueError, match=rf"init={INIT} holds an encoder .*width.* the config asks for"):
        networks.build_finetuning(tuning(index, "encoder.width=5"), index)


# -- voxel sizes ------------------------------------------------------------------------------------------------------


FACTS = {"spacing_mm": [[1, 1, 1], [2, 4, 4], [9, 9, 9]], "resampled_mm": None}


@pytest.mark.parametrize(
    "factor, noted",
    [((1, 1, 1), False), ((1.4, 1.4, 0.7), False), ((1.6, 1, 1), True), ((1, 1, 1.6), True), ((1, 0.6, 1), True)],
)
def test_voxels_of_another_size_are_noted(tmp_path, factor, noted):
    spacing = np.array([2, 4, 4]) * factor
    index = write_store(tmp_path, spacing)
    note = spacing_note(FACTS, index)
    assert bool(note) == noted
    assert not noted or ("2 x 4 x 4 mm" in note and " x ".join(f"{mm:.3g}" for mm in spacing) in note)
    resampled = Index("s", index.scans, {}, WINDOW, spacing_mm=(2.0, 4.0, 4.0))
    assert spacing_note(FACTS, resampled) is None  # what they were resampled to is what counts, of either
    assert bool(spacing_note(FACTS | {"resampled_mm": list(spacing)}, resampled)) == noted
    assert spacing_note({}, index) is None


@pytest.mark.slow
def test_probe_and_finetune_print_the_note_once(tmp_path, capsys, monkeypatch):
    index = write_store(tmp_path / "s", (5.0, 0.8, 0.8))
    probe.run(probing(index))
    assert capsys.readouterr().out.count(f"probe: note: init={INIT} was trained on voxels of") == 1

    def stop(*args, **kwargs):
        raise c.FailedRun("far enough")

    monkeypatch.setattr(finetune.launch, "connect", lambda config: None)
    monkeypatch.setattr(finetune.nodes, "await_nodes", lambda train, checkpoint: False)
    monkeypatch.setattr(finetune.launch, "fit", stop)
    monkeypatch.setattr(finetune.stream, "too_large", lambda *args: None)  # asks the cluster
    with pytest.raises(c.FailedRun, match="far enough"):
        finetune.run(tuning(index, "max_steps=1", "global_batch_size=1", run=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert said.count(f"finetune: note: init={INIT} was trained on voxels of") == 1 and "5 x 0.8 x 0.8 mm" in said
    assert "no scan to train on shows" not in said and "the same voxels" not in said
    write_index(tmp_path / "s", {"organ": 1, "tip": 7}, WINDOW)
    for more, mend in (("num_scans=1.0", "annotate it in more scans\n"), ("num_scans=2", ", or raise num_scans=2\n")):
        with pytest.raises(c.FailedRun, match="far enough"):
            asked = ("max_steps=1", "global_batch_size=1", more)
            finetune.run(tuning(read_index(tmp_path / "s"), *asked, run=str(tmp_path / more)))
        said_now = capsys.readouterr().out
        assert "finetune: note: no scan to train on shows tip: it is not learnt; annotate it in more scans" in said_now
        assert mend in said_now
    for scan in read_index(tmp_path / "s").scans:  # what is drawn, but not annotated, is not learnt
        update_record(tmp_path / "s", dataclasses.replace(scan, labelled=(7,)))
    write_index(tmp_path / "s", {"organ": 1, "tip": 7}, WINDOW)
    with pytest.raises(c.FailedRun, match="far enough"):
        finetune.run(tuning(read_index(tmp_path / "s"), *asked[:2], run=str(tmp_path / "drawn")))
    assert "note: no scan to train on shows organ, tip: they are not learnt" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["init"] == INIT and record["weights"]["trained_on"]["num_scans"] > 0


def test_the_same_voxels_trained_on_and_validated_on_are_said(tmp_path, capsys, monkeypatch):
    """A scan under two names, as a case that two hospitals have sent."""
    index = write_store(tmp_path / "s")
    volume, label = np.zeros((12, 36, 36), np.int16), np.zeros((12, 36, 36), np.uint8)
    volume[4:8], label[4:8] = 90, 1
    for name in ("twice", "again"):
        write_scan(tmp_path / "s", name, volume, np.eye(4), label=label, labelled=(1,), split="train", hu_window=WINDOW)
    index = write_index(tmp_path / "s", {"organ": 1}, WINDOW)
    for room, name in ((finetune.launch, "connect"), (finetune.nodes, "await_nodes"), (finetune.stream, "too_large")):
        monkeypatch.setattr(room, name, lambda *args: None)
    monkeypatch.setattr(finetune.launch, "fit", lambda *args, **kwargs: "far enough")
    said = {}
    for seed in range(8):
        with pytest.raises(c.FailedRun, match="far enough"):
            finetune.run(
                tuning(index, "max_steps=1", "global_batch_size=1", f"seed={seed}", run=str(tmp_path / f"{seed}"))
            )
        record = json.loads((tmp_path / f"{seed}" / "run.json").read_text())
        apart = any(one in record["scans"]["val"] for one in ("twice", "again"))
        line = re.search(
            "finetune: note: the same voxels are trained on and validated on: (.*);", capsys.readouterr().out
        )
        assert (line is not None) == apart and (line is None or {*line[1].split(" and ")} == {"twice", "again"})
        said[seed] = apart
    assert {*said.values()} == {True, False}  # both were drawn


# -- making such a file -----------------------------------------------------------------------------------------------

RECIPE = {"source": "/a/b", "recipe": {"name": "Somebody's", "licence": "CC BY 4.0", "origin": "somewhere"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pre-training of width 16 up to layer3, exported: the online network's state, and the file."""
    folder = tmp_path_factory.mktemp("made")
    write_store(folder / "store", preparations=(RECIPE, RECIPE, {"source": "/c"}))
    index = read_index(folder / "store")
    settings = {"kind": "resnet", "depths": [1, 1, 2, 1], "width": 16, "stage_strides": "early"}
    torch.manual_seed(0)
    encoder = build_encoder(**settings).train()
    encoder.stop_at(3)
    with torch.no_grad():
        encoder(torch.randn(4, 1, 16, 32, 32) + 1)
    online = {f"online.encoder.{name}": value.clone() for name, value in encoder.state_dict().items()}
    heads = {"online.projector.0.weight": torch.zeros(3), "predictor.0.weight": torch.zeros(3)}
    target = {f"target.encoder.{name}": torch.zeros_like(value) for name, value in encoder.state_dict().items()}
    places = [f"index={folder / 'store'}", f"run={folder / 'run'}", "ray.address=10.0.0.1:6379"]
    config = c.load(c.PretrainConfig, places)
    meta = {"door": "pretrain", "method": "byol", "encoder": settings, "level": 3, "hu_window": list(WINDOW)}
    meta |= {"config": config.model_dump_json(), "data": training_facts(index, ["s0", "s1"])}
    torch.save({"model": online | heads | target, "meta": meta, "step": 77}, folder / "run.pt")
    bare = meta | {"data": {key: value for key, value in meta["data"].items() if key != "data_sets"}}
    torch.save({"model": online, "meta": bare}, folder / "bare.pt")
    for name in ("run", "bare"):
        export.run(c.ExportConfig(run=str(folder / f"{name}.pt"), output=str(folder / f"{name}.safetensors")))
    return encoder, folder


def test_one_command_makes_a_file_as_it_has_to_be(made):
    encoder, folder = made
    path = folder / "run.safetensors"
    said, held = metadata(path), load_file(path)
    assert path.stat().st_size < 8e6 and said["steps"] == 77 and said["method"] == "byol"
    assert {name: torch.equal(value, encoder.state_dict()[name]) for name, value in held.items()} == dict.fromkeys(
        encoder.state_dict(), True
    )
    assert held["layer3.1.bn3.running_mean"].abs().sum() > 0
    assert said["data_licence"] == "Somebody's: CC BY 4.0; a data set without a name: not stated"
    assert said["median_spacing_mm"] == pytest.approx([2.5, 4.5, 4.5], abs=1e-3)
    assert said["config"]["index"] == "store" and said["config"]["run"] == "run" and "ray" not in said["config"]
    assert str(folder) not in str(said) and "/a/b" not in str(said) and "10.0.0.1" not in str(said)
    bare = metadata(folder / "bare.safetensors")  # of a file that does not say it
    assert bare["data_licence"] == "not stated" and bare["steps"] == "not recorded"


def test_stages_that_were_not_trained_start_at_random(made, index, monkeypatch):
    encoder, folder = made
    monkeypatch.setattr(weights, "FOLDER", folder)
    model, meta, report = networks.build_finetuning(tuning(index, init="pretrained:run"), index)
    assert meta.init_level == 3 and not report.mismatches()
    assert torch.equal(model.encoder.layer3[0].conv1.weight, encoder.layer3[0].conv1.weight)
    assert not torch.equal(model.encoder.layer4[0].conv1.weight, encoder.layer4[0].conv1.weight)
    assert encoders.read("init", probing(index, "pretrained:run"), index).ready(index, [])[0].last == 3
    with pytest.raises(ValueError, match=r"pretrained:run was trained up to stage 3 .* take freeze=false"):
        networks.build_finetuning(tuning(index, "freeze=true", init="pretrained:run"), index)
