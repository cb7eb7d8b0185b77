"""The whole path through real Ray jobs: prepare -> pretrain -> finetune -> evaluate -> predict -> report."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pgl_ray import config as c
from pgl_ray import evaluate, finetune, predict, prepare, pretrain, probe, report, tune
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import read_index, write_index
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.train import checkpoint, weights
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.run_files import STATE

pytestmark = pytest.mark.cluster

ENCODER = {"width": 8, "depths": [1, 1, 1, 1]}


def pretraining(store, run, workers, **changes) -> c.PretrainConfig:
    values = {"index": str(store), "run": str(run), "max_steps": 8, "global_batch_size": 4, "encoder": ENCODER}
    values |= {"views": {"size": [16, 32, 48]}, "heads": {"hidden": 32, "out": 16}}
    values |= {"train": {"num_workers": workers, "log_every": 2, "checkpoint_every": 4}}
    return c.build(c.PretrainConfig, values | changes)


def finetuning(store, run, init, workers, **changes) -> c.FinetuneConfig:
    values = {"index": str(store), "run": str(run), "init": str(init), "max_steps": 6, "global_batch_size": 2}
    values |= {"patch": {"size": [16, 32, 48]}, "patches_per_scan": 2, "foreground_share": 0.5}
    values |= {"train": {"num_workers": workers, "log_every": 2}, "validate_every": 1}
    return c.build(c.FinetuneConfig, values | changes)


def check_pretraining(result, store) -> None:
    rows = read_metrics(result.run)
    assert [row["step"] for row in rows if not row["step"] % 2 or row["step"] == 1] == [1, 2, 4, 6, 8]
    assert all(row["train/loss"] > 0 and row["train/grad_norm"] > 0 for row in rows)
    assert rows[-1]["health/encoder_feature_std"] > 0.1 and rows[-1]["weight/encoder_norm"] > 0
    assert checkpoint.committed_step(result.run) == 8
    state = checkpoint.read_state(checkpoint.committed(result.run)[0] / STATE)
    keys = state["model"]
    if state["meta"]["method"] != "genesis":
        online, target = keys["online.encoder.conv1.weight"], keys["target.encoder.conv1.weight"]
        assert not np.allclose(online, target)  # the target follows, it does not equal
    boxes = np.load(f"{result.run}/views.npz")["box_1"]
    assert boxes.shape[1:] == (3, 2) and len(read_index(str(store)).scans) > 0


def test_phantoms_end_to_end(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths, as the README types them, though workers run elsewhere
    write_phantoms(tmp_path / "raw", 2, 3, 2, seed=0, shape=(24, 64, 64), spacing_mm=(10.0, 5.0, 5.0))
    store = tmp_path / "store"
    prepared = prepare.run(c.PrepareConfig(source=str(tmp_path / "raw"), store=str(store)))
    assert (prepared.converted, prepared.skipped) == (7, 0)
    again = prepare.run(c.PrepareConfig(source=str(tmp_path / "raw"), store=str(store)))
    assert (again.converted, again.skipped) == (0, 7)

    # pre-training on 2 workers; the same command again does nothing; another config is refused
    config = pretraining("store", "pgl", 2, probe={"every": 3, "num_scans": 2})
    pretrained = pretrain.run(config)
    check_pretraining(pretrained, store)
    rows = read_metrics(pretrained.run)
    probed = {row["step"]: row["probe/balanced_accuracy"] for row in rows if "probe/balanced_accuracy" in row}
    assert list(probed) == [1, 3, 6, 8] and all(0 <= value <= 1 for value in probed.values())
    assert pretrained.probe == probed[8] and "probe/recall_background" in rows[-1]
    again = pretrain.run(config)
    assert again.already_finished and again.probe == probed[8]
    with pytest.raises(ValueError, match="ema_decay"):
        pretrain.run(pretraining("store", "pgl", 2, ema_decay=0.9))

    # fine-tuning on 2 workers from it, their patches in two parts, the encoder frozen
    tuned = finetune.run(finetuning("store", "tuned", "pgl", 2, global_batch_size=4, accumulate=2, freeze=True))
    encoders = [weights.load_encoder(run)[0].state_dict() for run in (pretrained.run, tuned.run)]
    same = {name: torch.equal(value, encoders[1][name]) for name, value in encoders[0].items()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # estimated anew
    assert all(same[name] for name in same if not name.endswith(statistics)) and not all(same.values())
    meta = weights.load_segmenter(tuned.run)[1]
    assert meta.labels == read_index(str(store)).labels
    record = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert len(record["scans"]["train"]) == 2 and len(record["scans"]["val"]) == 1
    assert len(record["weights"]["loaded"]) == len(encoders[0]) and record["weights"]["missing"] == []

    # evaluation, prediction on the input's own grid, probe, report
    summary = evaluate.run(c.EvaluateConfig(run=tuned.run, index=str(store))).summary
    assert summary["num_scans"] == 2
    table = pq.read_table(tmp_path / "tuned" / "evaluation" / "metrics.parquet").to_pylist()
    assert {row["organ"] for row in table} <= set(meta.labels)
    source = sorted((tmp_path / "raw" / "imagesTs").iterdir())[0]
    predict.run(c.PredictConfig(run=tuned.run, input=str(source), output=str(tmp_path / "out.nii.gz")))
    image, label = nib.load(source), nib.load(tmp_path / "out.nii.gz")
    assert image.shape == label.shape
    np.testing.assert_allclose(image.affine, label.affine)
    probed = probe.run(c.build(c.ProbeConfig, {"index": str(store), "init": pretrained.run, "size": [16, 32, 48]}))
    assert 0 < probed.balanced_accuracy <= 1
    page = Path(report.run(c.ReportConfig(run=[pretrained.run, tuned.run], output=str(tmp_path / "report.html"))))
    assert page.stat().st_size > 100_000


def test_a_collapse_stops_the_run_on_all_workers(ray_cluster, tmp_path, capfd):
    """Blank scans leave nothing to learn from: both workers agree, keep a checkpoint and end, once."""
    for name in ("a", "b"):
        write_scan(tmp_path / "store", name, np.zeros((24, 80, 80), np.int16), np.eye(4), split="train")
    write_index(tmp_path / "store", {}, (-1024.0, 325.0))
    changes = {"health": {"every": 1, "stop_on_collapse": True}, "method": "byol", "global_batch_size": 16}
    changes |= {"intensity": dict.fromkeys(("noise_prob", "blur_prob", "gain_prob", "gamma_prob"), 0.0)}
    with pytest.raises(c.FailedRun, match="stopped at step 2: nothing to learn from: "):
        pretrain.run(pretraining(tmp_path / "store", tmp_path / "run", 2, **changes))
    assert checkpoint.committed_step(tmp_path / "run") == 2
    assert [row["health/collapsed"] for row in read_metrics(tmp_path / "run")] == [1, 1]
    assert "features COLLAPSED" in capfd.readouterr().out


def test_a_sweep_runs_the_doors(ray_cluster, tmp_path, capfd):
    """tune_spaces/smoke.yaml with a learning rate that cannot work: its trial fails, the other one is the best."""
    write_phantoms(tmp_path / "raw", 0, 3, 0, seed=0, shape=(24, 64, 64), spacing_mm=(10.0, 5.0, 5.0))
    prepare.run(c.PrepareConfig(source=str(tmp_path / "raw"), store=str(tmp_path / "store")))
    space = [str(Path(__file__).parents[1] / "tune_spaces" / "smoke.yaml"), f"index={tmp_path}/store"]
    space += [f"run={tmp_path}/sweep", "space[finetune.optim.lr].grid_search=[0.1,1e30]"]
    result = tune.run(c.load(c.TuneConfig, space))
    assert result.states == {"done": 1, "failed": 1} and result.best == {"finetune.optim.lr": 0.1}
    rows = {row["finetune.optim.lr"]: row for row in pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()}
    assert rows[0.1]["score"] == result.score and rows[0.1]["patches"] == 8 and "loss" in rows[1e30]["error"]
    assert (
        rows[0.1]["pretrain"] == rows[1e30]["pretrain"] and len(list((tmp_path / "sweep" / "pretrain").glob("*/"))) == 1
    )
    done = [p for p in (tmp_path / "sweep").rglob("*") if p.name in ("metrics.jsonl", "best.pt")]
    before = {path: path.stat().st_mtime_ns for path in done if rows[1e30]["trial"] not in str(path)}
    assert "1 failed" in (tmp_path / "sweep" / "report.html").read_text()
    space[-1] = "space[finetune.optim.lr].grid_search=[0.1]"  # without the failed trial, which would be tried again
    again = tune.run(c.load(c.TuneConfig, space))
    assert again.states == {"done": 1} and len(before) == 3
    assert before == {path: path.stat().st_mtime_ns for path in before}
    best = [str(tmp_path / "sweep" / "best.yaml"), "index=s", "run=r"]
    assert c.load(c.FinetuneConfig, best).optim.lr == 0.1 and c.load(c.PretrainConfig, best).encoder.width == 8
    assert "1 of settings that the space has no more" in (tmp_path / "sweep" / "report.html").read_text()
    lines = capfd.readouterr().out.splitlines()
    assert not [line for line in lines if "Trial" in line or "experiment" in line]  # Ray Tune's own output


def test_real_scans_end_to_end(ray_cluster, real_data, tmp_path):
    raw = tmp_path / "raw"
    names = ["pt_4", "pt_2", "pt_7", "pt_201"]
    for kind in ("images", "labels"):
        (raw / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(real_data / "openkbp" / kind / f"{name}.nii.gz", raw / kind)
    shutil.copy(real_data / "openkbp" / "patients.csv", raw)
    store = tmp_path / "store"
    recipe = str(Path(__file__).parents[1] / "data_prep" / "openkbp.yaml")
    prepared = prepare.run(c.load(c.PrepareConfig, [recipe, f"source={raw}", f"store={store}"]))
    assert prepared.converted == 4
    pretrained = pretrain.run(pretraining(store, tmp_path / "genesis", 1, method="genesis"))
    check_pretraining(pretrained, store)
    tuned = finetune.run(finetuning(store, tmp_path / "tuned", pretrained.run, 1, num_scans=2, validate_every=6))
    splits = {scan.scan_id: scan.split for scan in read_index(str(store)).scans}
    summary = evaluate.run(c.EvaluateConfig(run=tuned.run, index=str(store), split=splits["pt_201"])).summary
    assert set(summary["organs"]) <= set(read_index(str(store)).labels)
