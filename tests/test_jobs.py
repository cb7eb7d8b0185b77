"""`ray job submit` against a head of our own on loopback: a job brings its code, is followed to its end, and fails in
one line."""

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import hosts
import numpy as np
import pytest

from pgl_ray import config as c
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# every step's pairs are compared with the plan where its metrics are written
TINY = ["max_steps=60", "views.size=[16,32,32]", "global_batch_size=8", "encoder.width=8", "heads.hidden=16"]
TINY += ["train.log_every=1", "train.checkpoint_every=5", "train.num_workers=2", "train.cpus_per_worker=1.5"]
TINY += ["train.threads_per_worker=1", "health.every=100"]


def inside_a_job(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("model", "args", "name"),
    [
        (c.PretrainConfig, ["index=/s", "run=runs/x"], "run='runs/x'"),
        (c.PretrainConfig, ["index=stores/s", "run=/r"], "index='stores/s'"),
        (c.FinetuneConfig, ["index=/s", "run=/r", "init=runs/pgl"], "init='runs/pgl'"),
        (c.DemoConfig, [], "out='demo'"),
    ],
)
def test_relative_paths_are_refused_inside_a_job(monkeypatch, tmp_path, model, args, name):
    inside_a_job(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="give an absolute path") as error:
        c.load(model, args)
    assert name in str(error.value)
    fine = c.load(c.FinetuneConfig, ["index=s3://bucket/store", "run=/r", "init=random"])
    assert (fine.index, fine.run) == ("s3://bucket/store", "/r")


def test_what_may_lie_in_a_bucket():
    found = c.load(c.FinetuneConfig, ["index=s3://b/s", "run=s3://b/r/", "init=gs://b/pgl"])
    assert (found.run, found.init) == ("s3://b/r", "gs://b/pgl")
    with pytest.raises(ValueError, match=r"run='s3://b/r': only stores and runs of pretrain and finetune may lie in a"):
        c.load(c.TuneConfig, ["index=s3://b/s", "run=s3://b/r"])


@pytest.fixture
def nodes(tmp_path):
    """A head and two nodes; short folder, for unix sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="pgl") as folder:
        env = hosts.environment()
        nodes = hosts.Nodes(Path(folder), env, num_nodes=2, num_cpus=2)
        try:
            yield nodes, env | {"RAY_API_SERVER_ADDRESS": nodes.url}
        finally:
            nodes.close()


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_job_outlives_a_node(nodes, tmp_path):
    """Two workers on two nodes, one of which is killed; another node comes; every step is done once.

    The code is the working directory's, not the installed one. A wrong use is one line.
    """
    nodes, env = nodes
    code, run = tmp_path / "code", tmp_path / "run"
    shutil.copytree(ROOT / "pgl_ray", code / "pgl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", code / "conf")
    (code / "pgl_ray" / "__init__.py").write_text('__version__ = "of the job"\n')
    for name in ("a", "b"):
        volume = np.random.default_rng(0).integers(-900, 300, (24, 64, 64)).astype(np.int16)
        write_scan(tmp_path / "store", name, volume, np.eye(4), split="train")
    write_index(tmp_path / "store", {}, (-1024.0, 325.0))

    def ray(*args: str) -> tuple[int, str]:
        command = [str(hosts.BIN / "ray"), *args]
        done = subprocess.run(command, env=env, cwd=code, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout + done.stderr

    def submit(name: str, *args: str, wait: bool = True) -> int:
        flags = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        door = ["python", "-m", "pgl_ray.pretrain", "conf/pretrain_small.yaml", f"index={tmp_path}/store"]
        while True:
            code, out = ray("job", "submit", *flags, "--", *door, *args)
            if code == 0 or "submitted successfully" in out:
                return code
            assert "agent" in out and time.monotonic() < begun + 200, out  # the head's agent is not there yet
            time.sleep(0.5)

    begun = time.monotonic()

    # nobody without the token gets in
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{nodes.url}/api/jobs/")

    assert submit("wrong", "run=runs/x") == 1
    log = ray("job", "logs", "wrong")[1]
    lines = [line for line in log.splitlines() if line.startswith("pgl_ray.")]
    assert len(lines) == 1 and "run='runs/x'" in lines[0] and "Traceback" not in log

    assert submit("right", f"run={run}", *TINY, wait=False) == 0
    until = time.monotonic() + 400  # three nodes start on two cores
    while checkpoint.committed_step(run) < 10 and time.monotonic() < until:
        time.sleep(0.1)
    nodes.kill_one()
    killed_at = read_metrics(run)[-1]["step"]
    nodes.add()
    log = ray("job", "logs", "--follow", "right")[1]
    assert 10 <= killed_at < 60 and re.search(rf"^pretrain: done after 60 steps, .*{run}$", log, re.M), log
    assert "Job 'right' succeeded" in ray("job", "status", "right")[1]
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 61))
    assert json.loads((run / "run.json").read_text())["versions"]["pgl_ray"] == "of the job"

    # each worker's own log: two starts, the second behind the kill
    for rank in (0, 1):
        rows = [json.loads(line) for line in (run / "logs" / f"rank_{rank}.jsonl").read_text().splitlines()]
        assert {row["rank"] for row in rows} == {rank} and {row["run"] for row in rows} == {"run"}
        assert [row["message"] for row in rows].count("start") == 2 and rows[-1]["message"] == "end"
        assert rows[-1]["step"] == 60 and rows[-1]["level"] == "INFO"
