"""What the files of a run say: written as they always were, parsed once, refused in one line where they are damaged."""

import json

import pytest

from pgl_ray import config as c
from pgl_ray.pages import run_folders
from pgl_ray.train import runs
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
