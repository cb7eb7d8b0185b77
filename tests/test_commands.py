"""Every door's command line: one clear line on stderr, exit code 2 for wrong use, no traceback."""

import dataclasses

import numpy as np
import pytest
import torch

from pgl_ray import cli
from pgl_ray.config import BenchConfig, build
from pgl_ray.data import scan_files, store
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter


def call(capsys, door, *args) -> tuple[int, str]:
    """Calls a door in this process; returns its exit code and stderr."""
    code = 0
    try:
        cli.call(door, list(args))
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("unlabelled")
    volume = np.zeros((20, 70, 70), np.int16)
    scan_files.write_scan(folder, "a", volume, np.eye(4), split="train")
    store.write_index(folder, {}, (-1024.0, 325.0))
    return str(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("labelled")
    volume = np.zeros((20, 70, 70), np.int16)
    label = (np.arange(70) > 40).astype(np.uint8) * np.ones((20, 70, 1), np.uint8)
    for name in ("a", "b"):
        scan_files.write_scan(folder, name, volume, np.eye(4), split="train", label=label, labelled=(1,))
    store.write_index(folder, {"liver": 1}, (-1024.0, 325.0))
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A pre-training and a fine-tuning checkpoint of a tiny encoder, and a damaged file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = {"depths": [1, 1, 1, 1], "width": 8, "stage_strides": "early"}
    encoder = Encoder(**settings)
    weights = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    meta = {"door": "pretrain", "encoder": settings, "hu_window": [-1024.0, 325.0], "config": "{}"}
    torch.save({"model": weights, "meta": meta}, folder / "pretrain.pt")
    tuned = meta | {"door": "finetune", "labels": {"spleen": 1}, "task": "multiclass", "num_outputs": 2}
    tuned |= {"patch_size": [16, 64, 64]}
    torch.save({"model": Segmenter(encoder, 2).state_dict(), "meta": tuned}, folder / "finetune.pt")
    (folder / "damaged.pt").write_bytes((folder / "pretrain.pt").read_bytes()[:5000])
    return {path.stem: str(path) for path in folder.iterdir()}


WRONG = [
    ("prepare", ["source={tmp}/missing", "store={tmp}/s"], "missing"),
    ("prepare", ["source={tmp}", "store={tmp}/s"], "no "),
    ("prepare", ["verify", "store={tmp}"], "not a store"),
    ("prepare", ["repair", "store={tmp}"], "not a store"),
    ("prepare", ["source={tmp}", "store=ftp://a/b"], "cannot be used as an object store"),
    ("inspect", ["store={tmp}"], "not a store"),
    ("pretrain", ["index={tmp}", "run={tmp}/r"], "not a store"),
    ("pretrain", ["index={unlabelled}", "run={tmp}/r", "epochs=many"], "epochs='many'"),
    ("pretrain", ["index={unlabelled}", "run={tmp}/r", "views.size=[16,50,96]"], "multiple of the output stride"),
    ("pretrain", ["index={unlabelled}", "run={tmp}/r", "epochs=1"], "do not fill one batch"),
    ("pretrain", ["index={unlabelled}", "run={unlabelled}"], "not a run of pgl_ray"),
    ("finetune", ["index={unlabelled}", "run={tmp}/r"], "holds no labels"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "num_scans=9"], "num_scans=9"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "init={tmp}/nowhere"], "does not exist"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "init={damaged}"], "damaged"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "init={pretrain}", "encoder.width=64"], "'width': 8"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "init={tmp}/no.safetensors"], "does not exist"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "init={pretrain}", "num_scans=.3"], "num_scans=0.3"),
    ("finetune", ["index={labelled}", "run={tmp}/r", "accumulate=3"], "accumulate=3 must divide"),
    ("pretrain", ["index={unlabelled}", "run={tmp}/r", "max_steps=9", "probe.every=5"], "holds no labels"),
    ("pretrain", ["index={unlabelled}", "run={tmp}/r", "max_steps=9", "probe.every=5", "probe.index={tmp}"], "not a"),
    ("evaluate", ["index={labelled}", "run={pretrain}"], "is a pretrain run"),
    ("evaluate", ["index={labelled}", "run={finetune}", "output={tmp}/e"], "spleen"),
    ("evaluate", ["index={unlabelled}", "run={finetune}", "output={tmp}/e"], "holds no labels"),
    ("predict", ["run={finetune}", "input={tmp}/no.nii.gz", "output={tmp}/o.nii.gz"], "no.nii.gz"),
    ("probe", ["index={unlabelled}"], "label"),
    ("report", ["run={tmp}/nowhere"], "nowhere"),
    ("export", ["run={pretrain}", "output={tmp}/weights.bin"], ".safetensors"),
    ("export", ["run={damaged}", "output={tmp}/w.safetensors"], "damaged"),
    ("bench", ["index={tmp}"], "not a store"),
    ("tune", ["index={labelled}", "run={tmp}/r", "space={{}}"], "space is empty"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("door", "args", "message"), WRONG, ids=[f"{d}-{m}" for d, _, m in WRONG])
def test_wrong_use(capsys, tmp_path, unlabelled, labelled, checkpoints, door, args, message):
    names = {"tmp": tmp_path, "unlabelled": unlabelled, "labelled": labelled, **checkpoints}
    code, err = call(capsys, door, *(arg.format(**names) for arg in args))
    assert code == 2, err
    assert (
        message in err and err.startswith((f"pgl_ray.{door}: ", f"pgl_ray.{door} {args[0]}: ")) and err.count("\n") == 1
    )
    assert not (tmp_path / "r").exists()  # nothing begun


@pytest.mark.slow
def test_export_gives_monai_every_key_and_says_what_goes_in(capsys, tmp_path, checkpoints):
    from monai.networks.nets.resnet import ResNet
    from safetensors import safe_open
    from safetensors.torch import load_file

    out = tmp_path / "encoder.safetensors"
    assert call(capsys, "export", f"run={checkpoints['pretrain']}", f"output={out}") == (0, "")
    options = {"conv1_t_size": 7, "conv1_t_stride": (1, 2, 2), "no_max_pool": True, "shortcut_type": "B"}
    options |= {"feed_forward": False, "bias_downsample": False, "n_input_channels": 1}
    theirs = ResNet("bottleneck", [1, 1, 1, 1], [8, 16, 32, 64], **options)
    assert str(theirs.load_state_dict(load_file(out))) == "<All keys matched successfully>"
    with safe_open(out, "pt") as file:
        assert file.metadata()["hu_window"] == "[-1024.0, 325.0]" and "D" in file.metadata()["axes"]


@pytest.mark.cluster
def test_bench_measures_both_halves(ray_cluster, capsys, labelled):
    args = ["encoder.width=8", "encoder.depths=[1,1,1,1]", "heads.hidden=8", "heads.out=8", "views.size=[16,32,48]"]
    args += ["bench_s=0.5", "global_batch_size=2"]
    cli.call("bench", [f"index={labelled}", *args])
    out = capsys.readouterr().out
    assert "data only" in out and "step only" in out and "both" in out and "limits the run" in out
    assert "1,000 pairs would take" in out and "GPU-hours on an H200" in out


def test_bench_refuses_a_device_by_its_own_key(monkeypatch):
    from pgl_ray import bench

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^train.device=cuda, .*: take train.device=auto$"):
        bench.run(build(BenchConfig, {"index": "s", "train": {"device": "cuda"}}))


@pytest.mark.parametrize(("given", "name"), [("auto", "ray.address=auto"), (None, "RAY_ADDRESS=head:6379")])
def test_bench_measures_no_cluster(monkeypatch, given, name):
    """Whose stream would be compared with this machine's step."""
    from pgl_ray import bench

    if not given:
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ValueError, match=f"{name}: bench measures the machine it runs on"):
        bench.run(build(BenchConfig, {"index": "s", "ray": {"address": given}}))


def test_bench_says_what_limits_and_what_to_change():
    from pgl_ray import bench

    stages = dict.fromkeys(bench.STAGES, 0.1) | {"decode": 2.0}
    mend = "take stream.pairs_per_region=8"
    ours = stages, mend, "s3://b/s", 2.0, 2.2, 3e6
    slow_data = bench.Result(100.0, 500.0, 90.0, 0.8, *ours, 1.9, 4, 2, 904_000, 0.136, 20.0, "cuda", "data")
    assert slow_data.hours == 904_000 / 100 / 3600
    text = bench.describe(slow_data)
    assert "The stream limits the run (2 workers want 1,000 pairs/s), decode most of all" in text
    single = bench.describe(dataclasses.replace(slow_data, num_workers=1))
    assert "The stream limits the run (the step waits for the stream 80% of the time), decode most of all" in single
    assert "stream.pairs_per_region=8" in text and "decode 2.00" in text and "1.90 times the crops' own" in text
    assert "5 GPU-hours here, about 0.34 GPU-hours on an H200" in text
    assert "500.0 pairs/s at most per rendering process, 2.2 requests and 3.0 MB each from s3://b/s" in text
    assert ", its place most of all" in bench.describe(dataclasses.replace(slow_data, place_ms=3.0))
    slow_step = dataclasses.replace(slow_data, data_pairs_per_s=5000.0, wait_share=0.0, limit="step", device="cpu")
    assert slow_step.hours == 904_000 / slow_step.both_pairs_per_s / 3600
    assert "The training step limits the run" in bench.describe(slow_step)


def test_bench_advises_what_is_not_done_yet(labelled):
    from pgl_ray import bench
    from pgl_ray.config import BenchConfig, load
    from pgl_ray.data.store import read_index

    def mend(stage: str, *args: str, cuda: bool = True) -> str:
        return bench.mend_of(stage, load(BenchConfig, [f"index={labelled}", *args]), read_index(labelled), cuda)

    assert "pairs_per_region=8" in mend("decode") and "encoding=uint8" in mend("decode")
    assert "pairs_per_region" not in mend("decode", "stream.pairs_per_region=8", "pairs_per_scan=8")
    assert "on_gpu=intensity" in mend("intensity") and "on_gpu=all" in mend("resize")
    assert "copy the store to a disk" in mend("its place") and "pairs_per_region=8" in mend("its place")
    for done in (mend("intensity", cuda=False), mend("intensity", "method=genesis"), mend("draw")):
        assert done == bench.MORE_CORES
    assert mend("resize", "stream.on_gpu=all") == bench.MORE_CORES
