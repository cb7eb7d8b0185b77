"""Which evaluated scans a network has seen in training: counted by their voxels, through a chain of trainings, and
said wherever figures are shown."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pgl_ray import config as c
from pgl_ray import evaluate, export, finetune, pretrain, probe, report
from pgl_ray.data import facts, scan_files, store, stream
from pgl_ray.model.encoder import build_encoder
from pgl_ray.train import checkpoint, launch, nodes
from pgl_ray.train.metrics import metrics_path
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.run_files import write_json

WINDOW = (-1024.0, 325.0)
ENCODER = {"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}


def paint(number: int) -> tuple[np.ndarray, np.ndarray]:
    volume = np.random.default_rng(number).integers(-200, 200, (18, 36, 36)).astype(np.int16)
    label = np.zeros(volume.shape, np.uint8)
    label[4:12, 8:28, 8:28] = 1
    return volume, label


def make(folder, **splits) -> store.Index:
    """split -> numbers of the scans in it; equal numbers have equal voxels, whatever the store and the name."""
    for split, numbers in splits.items():
        for number in numbers:
            volume, label = paint(number)
            more = {"label": label, "labelled": (1,), "split": split}
            scan_files.write_scan(folder, f"{split}{number}", volume, np.eye(4), **more)
    return store.write_index(folder, {"organ": 1}, WINDOW)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make(tmp_path_factory.mktemp("pool"), train=range(6), test=(6, 7, 8))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store of other names: three of its test scans are among the pool's first six, one among its last three."""
    return make(tmp_path_factory.mktemp("other"), train=(20, 21, 22), test=(1, 3, 5, 7, 30))


def ids(index: store.Index, split: str) -> list[str]:
    return [scan.scan_id for scan in index.scans if scan.split == split]


def test_scans_are_known_by_voxels_and_by_what_came_before(pool, other):
    tested = other.labelled("test")
    first = facts.training_facts(pool, ids(pool, "train"))
    line = "evaluated scans were pre-trained on (without labels): figures may be optimistic"
    assert facts.seen_notes(first, tested) == [f"3 of the 5 {line}"]
    assert facts.seen_notes(first, other.labelled("train")) == [] == facts.seen_notes({}, tested)
    second = facts.training_facts(other, ids(other, "train"), with_labels=True, before=first)
    assert facts.seen_notes(second, tested) == [f"3 of the 5 {line}"]
    third = facts.training_facts(pool, ids(pool, "test"), with_labels=True, before=second)
    assert facts.seen_notes(third, tested) == [
        f"3 of the 5 {line}",
        "1 of the 5 evaluated scans was trained or validated on (with labels): figures are too good",
    ]
    assert json.loads(json.dumps(third)) == third  # plain values, as exported files and run.json keep them
    assert facts.training_facts(other, ids(other, "train"), True, third)["seen"] == third["seen"]  # continued


@pytest.mark.slow
def test_what_is_recorded_stays_small(pool, monkeypatch):
    """100,000 scans are about a megabyte of text, and no two of them are taken for one another."""
    rng = np.random.default_rng(0)
    scans = [dataclasses.replace(pool.scans[0], scan_id=str(i), content_hash=rng.bytes(32).hex()) for i in range(10**5)]
    many = dataclasses.replace(pool, scans=scans[:50_000])
    recorded = facts.training_facts(many, [scan.scan_id for scan in scans[:50_000]])
    assert len(json.dumps(recorded)) < 600_000
    assert facts.seen_notes(recorded, scans[:50_001])[0].startswith("50000 of the 50001 ")
    assert facts.seen_notes(recorded, scans[50_000:]) == []


def saved(path, index: store.Index, split: str, door: str = "pretrain", **more) -> str:
    """A run's file as a door leaves it: random weights, the facts of the scans of a split."""
    torch.manual_seed(0)
    model = {f"{checkpoint.PREFIX[door]}{key}": value for key, value in build_encoder(**ENCODER).state_dict().items()}
    data = facts.training_facts(index, ids(index, split), door == "finetune", more.get("before"))
    config = {"index": "s", "run": "r"}
    meta = {"door": door, "encoder": ENCODER, "hu_window": list(WINDOW), "data": data, "config": json.dumps(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": meta, "model": model, "step": 1}, path)
    return str(path)


class Stopped(Exception):
    """Stands for the training, with what its workers are given."""


@pytest.fixture
def untrained(monkeypatch):
    def fit(worker, worker_config, *args):
        raise Stopped(worker_config)

    monkeypatch.setattr(launch, "fit", fit)
    monkeypatch.setattr(launch, "connect", lambda ray: None)
    monkeypatch.setattr(nodes, "await_nodes", lambda train, newest: False)
    monkeypatch.setattr(stream, "too_large", lambda *sizes: None)


def given(door, config) -> dict:
    """What a door gives its workers."""
    with pytest.raises(Stopped) as caught:
        door.run(config)
    return caught.value.args[0]


def test_the_doors_keep_it_in_their_checkpoints(pool, other, untrained, tmp_path):
    settings = {"global_batch_size": 2, "max_steps": 1, "encoder": ENCODER, "split": "train"}
    values = {"index": str(pool.store), "run": str(tmp_path / "pre"), "views": {"size": [16, 32, 32]}, **settings}
    data = given(pretrain, c.build(c.PretrainConfig, values))["data"]
    assert facts.seen_notes(data, other.labelled("test"))[0].startswith("3 of the 5 ")
    init = saved(tmp_path / "init.pt", pool, "train")
    values = {"index": str(other.store), "run": str(tmp_path / "fine"), "init": init, "patch": {"size": [16, 32, 32]}}
    meta = given(finetune, c.build(c.FinetuneConfig, values | settings))["meta"]
    assert facts.seen_notes(meta.data, other.labelled("test"))[0].startswith("3 of the 5 ")
    assert facts.seen_notes(meta.data, other.labelled("train")) == [
        "3 of the 3 evaluated scans were trained or validated on (with labels): figures are too good"
    ]
    # a continued run reads its init no more
    (tmp_path / "init.pt").unlink()
    state = {"meta": meta.plain(), "model": {}, "step": 0, "stopped": False}
    checkpoint.write_checkpoint(tmp_path / "fine", 1, state, {})
    again = given(finetune, c.build(c.FinetuneConfig, values | settings))["meta"]
    assert again.data["seen"] == meta.data["seen"]


def test_a_fine_tuning_goes_on_with_its_own_labels_only(untrained, tmp_path):
    """The label maps' files tell, and else what lies in them; the same store again, or with more scans, is the same."""
    store_path, changed = tmp_path / "s", "was started on a store with another content of its label maps, .*: choose an"
    values = {"index": str(store_path), "run": str(tmp_path / "run"), "patch": {"size": [16, 32, 32]}, "split": "train"}
    settings = c.build(c.FinetuneConfig, values | {"encoder": ENCODER, "global_batch_size": 2, "max_steps": 1})
    make(store_path, train=(0, 1, 2))
    given(finetune, settings)
    record, seen = tmp_path / "run" / "run.json", make(store_path, train=(0, 1, 2), test=(3,)).by_id["train1"]
    assert given(finetune, settings)
    for label in ({"source_hash": "f00"}, {"label_voxels": {1: 3199}}, {"label_boxes": {1: (4, 12, 8, 28, 8, 27)}}):
        store.update_record(store_path, dataclasses.replace(seen, **label))
        store.write_index(store_path, {"organ": 1}, WINDOW)
        with pytest.raises(ValueError, match=changed):
            finetune.run(settings)
    of_earlier_version = json.loads(record.read_text())
    del of_earlier_version["store"]["labels_hash"]
    write_json(record, of_earlier_version)
    assert given(finetune, settings)


@pytest.mark.slow
def test_a_probe_says_it_of_every_encoder(pool, other, tmp_path, capsys):
    init, ceiling = (
        saved(tmp_path / "a" / "pre.pt", pool, "train"),
        saved(tmp_path / "b" / "all.pt", other, "test", "finetune"),
    )
    values = {"index": str(other.store), "size": [16, 32, 32], "init": init, "ceiling": ceiling, "num_scans": 3}
    result = probe.run(c.build(c.ProbeConfig, values | {"num_test_scans": 5}))
    expected = [
        "3 of the 5 evaluated scans were pre-trained on (without labels): figures may be optimistic",
        f"ceiling={ceiling}: 5 of the 5 evaluated scans were trained or validated on (with labels): "
        "figures are too good",
    ]
    assert result.notes == expected
    printed = capsys.readouterr().out
    assert all(f"probe: note: {line}\n" in printed for line in expected)
    assert json.loads((tmp_path / "a" / "pre.pt.probe.json").read_text())["notes"] == expected
    exported = export.run(c.ExportConfig(run=init, output=str(tmp_path / "pre.safetensors"))).output
    again = probe.run(c.build(c.ProbeConfig, values | {"init": exported, "num_test_scans": 5, "ceiling": None}))
    assert again.notes == expected[:1]


def test_the_curve_while_pretraining_says_it(pool, untrained, tmp_path, capsys):
    values = {"index": str(pool.store), "run": str(tmp_path / "pre"), "views": {"size": [16, 32, 32]}, "max_steps": 1}
    values |= {"encoder": ENCODER, "global_batch_size": 2, "probe": {"every": 1, "num_test_scans": 3}}
    given(pretrain, c.build(c.PretrainConfig, values))
    line = "pretrain: note: voxel probe: 3 of the 3 evaluated scans were pre-trained on (without labels)"
    assert line in capsys.readouterr().out
    given(pretrain, c.build(c.PretrainConfig, values | {"run": str(tmp_path / "apart"), "split": "train"}))
    assert "evaluated scans" not in capsys.readouterr().out


class Nothing(nn.Module):
    """Finds no organ."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.zeros(1)), nn.Identity()
        self.head.out_channels = 2

    def forward(self, x):
        return torch.cat([torch.ones_like(x), torch.zeros_like(x)], 1)


def test_an_evaluation_and_its_report_say_it(pool, other, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pt").write_bytes(b"of the network below")
    values = {"labels": other.labels, "task": "multiclass", "patch_size": (16, 32, 32)}
    meta = CheckpointMeta(encoder={}, hu_window=WINDOW, **values)
    before = facts.training_facts(pool, ids(pool, "train"))
    monkeypatch.setattr(evaluate, "FORWARD_SIZE", (4, 8, 8))
    monkeypatch.setattr(evaluate, "load_segmenter", lambda run, device: (Nothing(), meta))
    settings = c.build(c.EvaluateConfig, {"run": str(run), "index": str(other.store), "save_predictions": False})
    assert evaluate.run(settings).summary["notes"] == []  # nothing is known
    data = facts.training_facts(other, ids(other, "train"), with_labels=True, before=before)
    meta = meta.model_copy(update={"data": data})
    line = "3 of the 5 evaluated scans were pre-trained on (without labels): figures may be optimistic"
    assert evaluate.run(settings).summary["notes"] == [line]  # no scan is evaluated again for it
    assert f"evaluate: note: {line}\n" in capsys.readouterr().out
    assert json.loads((run / "evaluation" / "summary.json").read_text())["notes"] == [line]
    record = {"door": "finetune", "started": "2024-01-01T00:00:00", "num_parameters": 1, "versions": {}, "num_steps": 1}
    record |= {"config": {"index": str(other.store), "init": "x", "seed": 0}, "store": {"num_scans": 3}}
    write_json(run / "run.json", record | {"scans": {"train": ["train20"], "val": ["train21"]}})
    metrics_path(run).write_text('{"step": 1, "time_s": 2.0}\n')
    result = {"init": str(run), "recall": None, "balanced_accuracy": None, "num_train_scans": 1, "num_test_scans": 5}
    matching = {"value": 31.25, "ci95": None, "details": {"organs": {}, "deformed_mm": None}}
    result |= {"readings": {"reestimated": {"matching": matching}}, "notes": [line], "controls": {}, "ceiling": {}}
    result |= {"sentences": [], "pictures": [], "body_box_mm": None, "standing": {}}
    write_json(run / "probe.json", result)
    page = Path(report.run(c.ReportConfig(run=[str(run)]))).read_text()
    assert page.count(f"<p>run: {line}.</p>") == 2 and "31.2" in page  # of the evaluation, and of the probe
