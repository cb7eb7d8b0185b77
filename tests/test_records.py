"""What the files of a run say: written as they always were, parsed once, refused in one line where they are damaged."""

import json
from types import SimpleNamespace

import pytest
import torch
import train_loop
from test_weights import TINY, WINDOW

from pgl_ray import config as c
from pgl_ray.model.encoder import build_encoder
from pgl_ray.pages import run_folders
from pgl_ray.sweep import sweeps
from pgl_ray.train import networks, runs, weights
from pgl_ray.train.records import RunRecord


def test_run_json_holds_what_the_door_says(tmp_path):
    """The keys are those of runs that users have."""
    config = c.build(c.PretrainConfig, {"index": "s", "run": str(tmp_path / "r")})
    store = {"num_scans": 3, "labels": {"liver": 1}, "hu_window": (-1024.0, 325.0)}
    facts = {"num_parameters": 7, "num_steps": 3, "plan": "p", "store": store, "outlook": {"clamped_share": (0.1, 0.5)}}
    runs.open_run(config, "pretrain", facts)
    found = json.loads((tmp_path / "r" / "run.json").read_text())
    assert list(found) == ["door", "config", "versions", "started", *facts]
    assert found["config"] == json.loads(config.model_dump_json())
    assert {key: found[key] for key in facts} == json.loads(json.dumps(facts))


@pytest.mark.parametrize("more", [{}, {"later": {"a": [1, None]}, "store": {"num_scans": 2, "labels": {}}}])
def test_a_record_is_written_as_it_was_read(tmp_path, more):
    """Of an earlier version, which has fewer keys, and of a later one."""
    known = {"door": "finetune", "config": {"seed": 1, "optim": {"lr": 0.5}, "later": 2}, "weights": None} | more
    (tmp_path / "run.json").write_text(json.dumps(known))
    RunRecord.read(tmp_path).write(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: Expecting"),
        ("", "is damaged: Expecting"),
        ("[]", "is damaged: Input should be"),
        ("null", "is damaged: Input should be"),
        ('{"config": {}}', "is damaged: door: Field required"),
        ('{"door": "pretrain", "config": 3}', "is damaged: config: Input should be"),
        ('{"door": "finetune", "scans": {"train": ["a"]}}', "is damaged: scans.val: Field required"),
    ],
)
def test_a_damaged_run_json_is_one_line(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    for read in (RunRecord.read, lambda path: run_folders.read_runs([str(path)])):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'run.json'} is damaged") and "\n" not in str(error.value)


# -- what a checkpoint says of its network ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_a_pretraining_says_it_in_plain_values(tmp_path):
    """The keys are those of checkpoints that users have; torch.load takes plain values without running code."""
    index = train_loop.scans(tmp_path / "s", num=2)
    config = train_loop.pretraining(index, tmp_path / "r", max_steps=1, global_batch_size=1)
    train_loop.train(config)
    found = train_loop.state_of(config.run)["meta"]
    assert found.pop("data")["num_scans"] == 2
    assert found == {
        "door": "pretrain",
        "method": "pgl",
        "encoder": json.loads(config.encoder.model_dump_json()),
        "level": 4,
        "hu_window": list(WINDOW),
        "config": config.model_dump_json(),
    }


@pytest.mark.parametrize("spacing", [None, (3.0, 1.0, 1.5)])
def test_a_checkpoint_of_a_fine_tuning_says_it_in_plain_values(spacing):
    config = c.build(c.FinetuneConfig, {"index": "s", "run": "r", "encoder": TINY, "decoder": "light"})
    index = SimpleNamespace(labels={"liver": 2, "spleen": 7}, hu_window=WINDOW, spacing_mm=spacing)
    model, meta, _ = networks.build_finetuning(config, index)
    assert (
        json.loads(json.dumps(meta.plain()))
        == meta.plain()
        == {
            "door": "finetune",
            "encoder": model.encoder.settings,
            "decoder": "light",
            "hu_window": list(WINDOW),
            "spacing_mm": spacing and list(spacing),
            "labels": {"liver": 2, "spleen": 7},
            "task": "multiclass",
            "num_outputs": 3,
            "patch_size": list(config.patch.size),
            "init_level": 4,
            "config": config.model_dump_json(),
        }
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hu_window": None}, "hu_window: "),
        ({"hu_window": [1.0]}, "hu_window.1: Field required"),
        ({"encoder": "resnet"}, "encoder: "),
        ({"labels": [1]}, "labels: "),
        ({"level": "deep"}, "level: "),
    ],
)
def test_a_damaged_meta_is_one_line(tmp_path, changed, message):
    encoder = {key: value for key, value in TINY.items() if key != "kind"}  # as before there were others
    model = {f"online.encoder.{key}": value for key, value in build_encoder(**encoder).state_dict().items()}
    meta = {"door": "pretrain", "encoder": encoder, "hu_window": list(WINDOW), "later": 1}
    path = str(tmp_path / "run.pt")
    torch.save({"model": model, "meta": meta, "step": 9}, path)
    known = weights.load_encoder(path)[1]
    assert (known.encoder, known.steps, known.level) == ({"kind": "resnet", **encoder}, 9, None)
    torch.save({"model": model, "meta": meta | changed}, path)
    for read in (weights.load_encoder, lambda path: weights.read(path, None, None)):
        with pytest.raises(ValueError, match=f"checkpoint .* is damaged: {message}") as error:
            read(path)
        assert "\n" not in str(error.value)


# -- a sweep's trial --------------------------------------------------------------------------------------------------


def test_a_trial_of_another_version_is_read(tmp_path):
    """Of one that had no judge of its own yet, and with a key that this version has not."""
    values = {"arm": "x", "finetune.optim.lr": 0.1}
    known = {"values": values, "started": 5, "since": 7.5, "state": "done", "score": 0.5, "later": {}}
    (tmp_path / "trial.json").write_text(json.dumps(known))
    trial = sweeps.read_trial(tmp_path)
    assert (trial.name, trial.folder, trial.values, trial.state) == (tmp_path.name, tmp_path, values, "done")
    assert (trial.merit, trial.reports, trial.run("pretrain"), trial.started) == (0.5, [], None, 5)
    sweeps.note(tmp_path, pretrain=str(tmp_path / "p"), took_s=3.5)
    assert json.loads((tmp_path / "trial.json").read_text()) == known | {"pretrain": f"{tmp_path}/p", "took_s": 3.5}
    assert sweeps.read_trial(tmp_path).run("pretrain") == tmp_path / "p"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ('{"values": {}}', "state: Field"), ('{"state": 1, "values": {}}', "state: Input should be")],
)
def test_a_damaged_trial_is_one_line(tmp_path, text, message):
    (tmp_path / "trial.json").write_text(text)
    with pytest.raises(ValueError, match=f"trial.json is damaged: {message}") as error:
        sweeps.read_trial(tmp_path)
    assert "\n" not in str(error.value)
