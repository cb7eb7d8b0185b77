"""Run folders and checkpoints: what is continued, what is refused, what is read back."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pgl_ray.config import FinetuneConfig, PretrainConfig, load
from pgl_ray.data.facts import store_facts, training_facts
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import Index, read_index, write_index
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import checkpoint, networks, runs, weights
from pgl_ray.train.launch import Progress, first_cause
from pgl_ray.train.metrics import Metrics, metrics_path, read_metrics
from pgl_ray.train.run_files import MANIFEST


def config(run, *args) -> PretrainConfig:
    return load(PretrainConfig, ["index=s", f"run={run}", *args])


def test_a_run_is_continued_by_its_own_config_only(tmp_path):
    folder = runs.open_run(config(tmp_path / "r"), "pretrain", {"num_steps": 3, "plan": "p"})
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["door"], record["num_steps"], record["config"]["epochs"]) == ("pretrain", 3, 500)
    assert load(PretrainConfig, [f"{folder}/config.yaml"]) == config(tmp_path / "r")
    more_workers = config(tmp_path / "r", "train.num_workers=2", "ray.num_cpus=8")
    assert runs.open_run(more_workers, "pretrain", {"plan": "p"}) == folder
    with pytest.raises(ValueError, match="other scans"):
        runs.open_run(config(tmp_path / "r"), "pretrain", {"plan": "q"})
    with pytest.raises(ValueError, match=r"another optim.lr \(0.2 there, 0.3 here\)"):
        runs.open_run(config(tmp_path / "r", "optim.lr=0.3"), "pretrain", {})
    with pytest.raises(ValueError, match="is a pretrain run"):
        runs.open_run(config(tmp_path / "r"), "finetune", {})


STORE = {"num_scans": 2, "hu_window": (-1024.0, 325.0), "spacing_mm": None, "labels": {"liver": 1, "spleen": 2}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hu_window": (-160.0, 240.0)}, r"hu_window \(.*-1024.* there, .*-160.* here\)"),
        ({"spacing_mm": (3.0, 1.0, 1.0)}, r"spacing_mm \(None there, .*3.0.* here\)"),
        ({"labels": {"liver": 2, "spleen": 1}}, r"labels.liver \(1 there, 2 here\), labels.spleen"),
        ({"labels": {"liver": 1}}, r"labels.spleen \(2 there, None here\)"),
        ({"labels": {"liver": 1, "spleen": 2, "aorta": 3}}, r"labels.aorta \(None there, 3 here\)"),
        ({"scans_hash": "b"}, "content of its scans"),
        ({"labels_hash": "b"}, "content of its label maps, or of their files"),
        ({"scans_hash": "b", "labels_hash": "b"}, "content of its scans"),
    ],
)
def test_a_run_is_continued_on_its_own_store_only(tmp_path, changed, said):
    """Also where the plan, that is which scans in which order, is the same."""
    known = load(FinetuneConfig, ["index=s", f"run={tmp_path / 'r'}"])
    moved = load(FinetuneConfig, ["index=elsewhere", f"run={tmp_path / 'r'}"])
    store = STORE | {"scans_hash": "a", "labels_hash": "a"}
    folder = runs.open_run(known, "finetune", {"plan": "p", "store": store})
    more = store | {"num_scans": 3, "labels": dict(reversed(STORE["labels"].items()))}
    assert runs.open_run(moved, "finetune", {"plan": "p", "store": more}) == folder
    with pytest.raises(ValueError, match=rf"another {said}.*: choose another run=..., or the index= of"):
        runs.open_run(moved, "finetune", {"plan": "p", "store": store | changed})


def test_what_a_run_has_not_recorded_of_its_store_may_differ(tmp_path):
    """A run of an earlier version; and a pre-training does without labels."""
    known, other = config(tmp_path / "r"), {"spacing_mm": (3.0, 1.0, 1.0), "scans_hash": "b", "labels": {"aorta": 5}}
    folder = runs.open_run(known, "pretrain", {"plan": "p", "store": {"num_scans": 2, "labels": {"liver": 1}}})
    assert runs.open_run(known, "pretrain", {"plan": "p", "store": STORE | other}) == folder


def test_the_facts_of_a_store_are_those_of_its_content(tmp_path):
    """A copy of a store is the same; a voxel more is another one."""

    def facts(name: str, value: int) -> dict:
        voxels = np.full((4, 5, 6), value, np.int16)
        write_scan(tmp_path / name, "a", voxels, np.eye(4), split="train")
        write_index(tmp_path / name, {}, (-1024.0, 325.0))
        index = read_index(str(tmp_path / name))
        return store_facts(index, training_facts(index, ["a"]), 1)

    assert facts("a", 1) == facts("b", 1) != facts("c", 2)


def test_a_run_of_settings_that_are_unknown_is_refused(tmp_path):
    """As one that another version has begun; a setting that came later has its default there."""
    runs.open_run(config(tmp_path / "r"), "pretrain", {"plan": "p"})
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    del record["config"]["optim"]["momentum"]
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    assert runs.open_run(config(tmp_path / "r"), "pretrain", {"plan": "p"})
    record["config"]["optim"]["trust_coefficient"] = 0.01
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"unknown key 'optim.trust_coefficient'.*: choose another run="):
        runs.open_run(config(tmp_path / "r"), "pretrain", {"plan": "p"})


def test_a_folder_with_other_files_is_not_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a run of pgl_ray"):
        runs.open_run(config(tmp_path), "pretrain", {})


def test_only_checkpoints_with_a_manifest_count(tmp_path):
    (tmp_path / "checkpoint_00000008").mkdir()  # on disk, but not whole
    assert checkpoint.committed(tmp_path) is None and checkpoint.committed_step(tmp_path) == 0
    (tmp_path / "checkpoint_00000008" / MANIFEST).write_text("{}")
    assert checkpoint.committed_step(tmp_path) == 8


def test_metrics_after_the_restart_step_are_written_again(tmp_path):
    first = Metrics(str(tmp_path), 0)
    for step in (2, 4, 6):
        first.write(step, **{"train/loss": step / 10})
    first.close()
    with metrics_path(tmp_path).open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while writing
    second = Metrics(str(tmp_path), 4)
    second.write(6, **{"train/loss": 9.0})
    second.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(2, 0.2), (4, 0.4), (6, 9.0)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of a tiny encoder, as the doors write them."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"depths": [1, 1, 1, 1], "width": 8, "stage_strides": "late"}
    encoder = Encoder(**settings)
    segmenter = Segmenter(encoder, 3)
    meta = {"door": "pretrain", "encoder": settings, "hu_window": [-1024.0, 325.0]}
    tensors = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": tensors | {"predictor.0.weight": torch.zeros(1)}, "meta": meta}, folder / "pgl.pt")
    tuned = meta | {"door": "finetune", "num_outputs": 3}
    torch.save({"model": segmenter.state_dict(), "meta": tuned}, folder / "tuned.pt")
    return folder, segmenter


def test_encoder_and_segmenter_are_read_back_exactly(saved):
    folder, segmenter = saved
    x = torch.randn(1, 1, 16, 32, 48, generator=torch.Generator().manual_seed(0))
    expected = segmenter.eval()(x)
    for file in ("pgl.pt", "tuned.pt"):
        encoder, meta = weights.load_encoder(str(folder / file))
        torch.testing.assert_close(encoder.eval()(x)[-1], segmenter.encoder(x)[-1])
        assert meta.encoder["width"] == 8
    model, _ = weights.load_segmenter(str(folder / "tuned.pt"))
    torch.testing.assert_close(model(x), expected)


def test_fine_tuning_takes_all_but_the_head_from_a_genesis_run(saved, tmp_path):
    settings = {"depths": [1, 1, 1, 1], "width": 8, "stage_strides": "early"}
    restorer = Genesis(Encoder(**settings))
    meta = {"door": "pretrain", "method": "genesis", "encoder": settings, "hu_window": [-1024.0, 325.0]}
    torch.save({"model": restorer.state_dict(), "meta": meta}, tmp_path / "genesis.pt")
    index = Index(store="s", scans=[], labels={"a": 1, "b": 2}, hu_window=(-1024.0, 325.0))
    config = load(FinetuneConfig, ["index=s", "run=r", f"init={tmp_path}/genesis.pt"])
    model, _, report = networks.build_finetuning(config, index)
    num = sum("num_batches_tracked" not in name for name in model.state_dict()) - 2  # all but the head
    assert report.lines()[0].startswith(f"{num} of {num} tensors")
    assert report.left_out == ["online.head.weight", "online.head.bias"]
    given, own = restorer.online.state_dict(), model.state_dict()
    for name, value in own.items():
        if name.startswith("head."):
            assert value.shape != given[name].shape
        else:
            assert torch.equal(value, given[name]), name


def test_only_a_fine_tuned_run_gives_a_segmenter(saved):
    with pytest.raises(ValueError, match="give a fine-tuning run"):
        weights.load_segmenter(str(saved[0] / "pgl.pt"))


def test_foreign_files_are_refused(saved, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    state = torch.load(saved[0] / "pgl.pt", weights_only=True)
    state["model"].pop("online.encoder.conv1.weight")
    torch.save(state, tmp_path / "holes.pt")
    for name, message in (
        ("tensor", "no checkpoint of pgl_ray"),
        ("foreign", "no checkpoint"),
        ("holes", "another arch"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            weights.load_encoder(str(tmp_path / f"{name}.pt"))
        assert len(str(caught.value)) < 400


def test_damaged_and_malicious_files_are_refused(saved, tmp_path):
    (tmp_path / "cut.pt").write_bytes((saved[0] / "pgl.pt").read_bytes()[:3000])
    torch.save({"model": {}, "meta": Progress}, tmp_path / "code.pt")  # a pickled class of ours: never executed
    for name, said in (
        ("cut.pt", "is damaged or no file that torch.save wrote"),
        ("code.pt", "holds more than tensors"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoint.read_state(tmp_path / name)


def whole_model(path):
    torch.save(torch.nn.Linear(2, 2), path)


def whole_model_of_old(path):
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)


def cut_off(path):
    whole_model(path)
    path.write_bytes(path.read_bytes()[:900])


def script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def archive(path):
    with path.open("wb") as file:
        np.savez(file, weights=np.zeros(3))


MORE = r"holds more than tensors, which is not loaded for safety: save its state_dict alone, torch.save\(model.state_di"
NO_FILE = "is damaged or no file that torch.save wrote: copy it again"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("a.pth", whole_model, MORE),
        ("a.pth", whole_model_of_old, MORE),
        ("a.pt", lambda path: path.write_bytes(pickle.dumps({"lr": 0.1, "made": Path("x")})), MORE),
        ("a.pth", script, MORE),
        ("a.pth", lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
        ("a.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), NO_FILE),
        ("a.pth", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), NO_FILE),
        ("a.pth", cut_off, NO_FILE),
        ("a.pth", archive, NO_FILE),
        ("a.pt2", lambda path: path.write_bytes(b"PK"), "weights are not read from .pt2: export it as .safetensors"),
        (
            "a.onnx",
            lambda path: path.write_bytes(b"\x08"),
            "weights are not read from .onnx: export it as .safetensors",
        ),
    ],
)
def test_another_programs_file_of_weights_is_refused(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=said) as error:
        weights.read(str(tmp_path / name), None, None)
    text = str(error.value)
    assert text.startswith(f"init={tmp_path / name}") and text.isprintable()
    assert len(text.replace(str(tmp_path), "")) < 180


def test_first_cause_is_the_rank_that_failed_by_itself():
    error = Exception()
    wrapped = "Traceback\n  x\nValueError: mine\nTo retry, see the docs."
    error.worker_failures = {0: RuntimeError("[gloo] peer closed"), 1: RuntimeError(wrapped)}
    assert first_cause(error) == "worker 1 failed: ValueError: mine"
    advice = (
        "Top 10 memory users: ...\nTo adjust the kill threshold, set `RAY_memory_usage_threshold` when starting Ray."
    )
    error.worker_failures = {0: RuntimeError(advice)}
    assert first_cause(error).endswith("Ray ended a process because the machine's memory was nearly full")
