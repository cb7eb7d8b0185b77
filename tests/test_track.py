"""MLflow and Weights & Biases into files; a run that continues goes on in the same record."""

import json
import logging
import sys
import time
import types
from types import SimpleNamespace

import pytest

from pgl_ray.train.metrics import Metrics
from pgl_ray.train.track import Tracker


@pytest.fixture
def run(tmp_path):
    record = {"door": "pretrain", "config": {"seed": 1, "optim": {"lr": 0.5}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path


def written(run, tracker: str) -> None:
    """Steps 1 to 3, then a continued run from step 2."""
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = Metrics(str(run), start, tracker)
        for step in steps:
            metrics.write(step, **{"train/loss": 10.0 * step + start})
        metrics.close()


@pytest.mark.filterwarnings("ignore")
def test_mlflow(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="no MLflow: pip install 'pgl_ray[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{run}/mlruns")
    mlflow.set_tracking_uri(None)
    written(run, "mlflow")
    client = mlflow.MlflowClient(f"file://{run}/mlruns")
    known = json.loads((run / "tracker.json").read_text())["mlflow"]
    found = client.get_run(known)
    assert found.data.params == {"seed": "1", "optim.lr": "0.5"} and found.data.tags["door"] == "pretrain"
    history = [(m.step, m.value) for m in client.get_metric_history(known, "train/loss")]
    assert history == [(1, 10), (2, 20), (3, 30), (3, 32), (4, 42)]
    experiment = client.get_experiment_by_name("pgl_ray")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.filterwarnings("ignore")
def test_wandb(run, monkeypatch):
    pytest.importorskip("wandb", reason="no Weights & Biases: pip install 'pgl_ray[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    written(run, "wandb")
    known = json.loads((run / "tracker.json").read_text())["wandb"]
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.stem for path in files] == [f"run-{known}"] * 2
    until = time.monotonic() + 30  # its own process still writes
    while not all(path.read_bytes().count(b"train/loss") >= 2 for path in files):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Stands in for both clients, which are not needed here: under which names they were asked for a run."""
    asked = []
    wandb, mlflow, variables = (types.ModuleType(name) for name in ("wandb", "mlflow", "mlflow.environment_variables"))
    wandb.Settings = lambda **_: None
    wandb.init = lambda id, **_: asked.append(id) or SimpleNamespace(define_metric=lambda *_, **__: None)

    def start_run(run_id=None, **_):
        asked.append(run_id or "new")
        return SimpleNamespace(info=SimpleNamespace(run_id="made"))

    mlflow.start_run, mlflow.log_params, mlflow.set_experiment = start_run, lambda _: None, lambda _: None
    variables.MLFLOW_EXPERIMENT_NAME = SimpleNamespace(is_set=lambda: False)
    for module in (wandb, mlflow, variables):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.mark.parametrize("kinds", [("mlflow", "wandb", "mlflow", "wandb"), ("wandb", "mlflow", "wandb", "mlflow")])
def test_a_run_that_changes_its_tracker_is_known_to_both(run, opened, kinds):
    record = json.loads((run / "run.json").read_text())
    record["config"]["run"] = str(run)
    (run / "run.json").write_text(json.dumps(record))
    for kind in kinds:
        assert Tracker(kind, str(run)).record is not None
    names = dict(zip(kinds[:2], opened[:2], strict=True))
    assert names.pop("mlflow") == "new" and len(names["wandb"]) == 16
    assert opened[2:] == [{"mlflow": "made", **names}[kind] for kind in kinds[2:]]


def test_a_tracker_that_fails_ends_nothing(run, monkeypatch, caplog):
    class Away:
        def write(self, step, row):
            raise ConnectionError("no answer")

    tracker = Tracker("none", str(run))
    tracker.write(1, {})
    tracker.record = Away()
    with caplog.at_level(logging.WARNING):
        tracker.write(1, {"loss": 1.0})
        tracker.write(2, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker fails and is left out from now on: no answer"
    ]
    (event,) = (run / "events.jsonl").read_text().splitlines()  # which the driver shows
    assert json.loads(event)["text"] == "the tracker fails and is left out from now on: no answer"


def test_a_tracker_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train\.tracker=wandb needs its package: pip install 'pgl_ray\[wandb\]'"):
        Tracker("wandb", str(run))
