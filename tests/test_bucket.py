"""A store in a bucket, from the command line: prepared, damaged, repaired, pre-trained from."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ray import export, inspect, prepare, report
from pgl_ray.config import ExportConfig, FailedRun, InspectConfig, PrepareConfig, ReportConfig, StoreConfig, build
from pgl_ray.convert import finish, parallel
from pgl_ray.data import store
from pgl_ray.data.place import open_place
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import read_metrics

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def serial(monkeypatch):
    """Converts and checks in this process."""

    def one_by_one(work, items, config, sources=()):
        return (work({"task": i, "item": pickle.dumps(item)}) for i, item in enumerate(items))

    monkeypatch.setattr(parallel, "in_parallel", one_by_one)


def put_store(tmp_path, s3) -> str:
    """Three scans in a bucket; returns the store's URL."""
    rng, url = np.random.default_rng(0), f"{s3}/{tmp_path.name}/Fälle 1"
    (tmp_path / "raw").mkdir()
    for name in ("a", "ü 2", "c"):
        volume = rng.integers(-1000, 1000, (70, 72, 30)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.diag([-1.5, -1.5, 3, 1])), tmp_path / f"raw/{name}.nii.gz")
    assert prepare.run(PrepareConfig(source=f"{tmp_path}/raw", store=url)).converted == 3
    return url


@pytest.mark.slow
def test_prepare_verify_and_repair_in_a_bucket(tmp_path, s3, serial, capsys):
    url = put_store(tmp_path, s3)
    assert prepare.describe(prepare.run(PrepareConfig(source=f"{tmp_path}/raw", store=url))).startswith(
        f"prepare: 0 converted, 3 already there, 3 scans in {url}/index.parquet"
    )
    place, key = open_place(url), "scans/ü 2/0/c/0/0/0"
    whole = place.read(key)
    place.write(key, [whole[:4321] + bytes([whole[4321] ^ 1]) + whole[4322:]])
    place.write("scans/left/0/c/0/0/0", [b"of a killed run, without zarr.json"])
    verified, left = prepare.repair(StoreConfig(store=url))
    assert list(verified.damaged) == ["ü 2"] and not left
    assert place.read(key) == whole and place.names("scans") == ["a", "c", "ü 2"]
    assert prepare.verify(StoreConfig(store=url)).damaged == {}
    page = inspect.run(InspectConfig(store=url, output=f"{tmp_path}/page.html"))
    assert Path(page).read_text("utf-8").count("data:image/png") == 6


@pytest.mark.parametrize("taken", [".lock", ".part/run"])
def test_a_prepare_that_lost_its_lock_writes_no_index(tmp_path, s3, serial, monkeypatch, taken):
    """It stood still for so long that another one took over, which is about to write an index of its own."""
    url = put_store(tmp_path, s3)
    place, finish_store = store.open_place(url), finish.finish_store
    before = place.read("index.parquet")

    def stand_still(*args):
        place.write(taken, [b"another"])
        return finish_store(*args)

    monkeypatch.setattr(finish, "finish_store", stand_still)
    nib.save(nib.Nifti1Image(np.full((70, 72, 30), 40, np.int16), np.eye(4)), tmp_path / "raw/d.nii.gz")
    with pytest.raises(FailedRun, match=rf"the run that writes into s3://.*/{tmp_path.name}/Fälle 1 is over"):
        prepare.run(PrepareConfig(source=f"{tmp_path}/raw", store=url))
    assert place.read("index.parquet") == before and place.read(taken) == b"another"


@pytest.mark.cluster
def test_pre_training_from_a_bucket_into_a_bucket(tmp_path, s3, serial, monkeypatch):
    """A process of its own with a Ray of its own, which gets the credentials by the environment. What another machine
    then finds there is the whole run."""
    url, run = put_store(tmp_path, s3), f"{s3}/{tmp_path.name}/run"
    tiny = ["encoder.width=8", "encoder.depths=[1,1,1,1]", "heads.hidden=16", "heads.out=8", "views.size=[16,32,48]"]
    tiny += ["max_steps=3", "global_batch_size=2", "train.log_every=1", "train.checkpoint_every=3"]
    command = [sys.executable, "-m", "pgl_ray.pretrain", f"index={url}", f"run={run}", *tiny]
    environment = os.environ | {"PYTHONPATH": ROOT, "XDG_CACHE_HOME": f"{tmp_path}/machine_1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"; run in {run}")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/machine_2")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3] and checkpoint.committed_step(run) == 3
    rows = [json.loads(line) for line in open_place(run).read("logs/rank_0.jsonl").splitlines()]
    assert rows[0]["message"] == "start" and rows[-1]["message"] == "end"
    page = report.run(build(ReportConfig, {"run": run, "output": str(tmp_path / "page.html")}))
    assert run in Path(page).read_text("utf-8")
    exported = export.run(build(ExportConfig, {"run": run, "output": str(tmp_path / "encoder.safetensors")}))
    assert Path(exported.output).stat().st_size > 10_000
