"""Clusters that grow and shrink under what runs on them: Ray's own autoscaler with its fake nodes, jobs from outside.

PGL_RAY_SOAK=20 pytest -s -m soak tests/test_growing.py        # about ten minutes on two cores
"""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import growing
import hosts
import nibabel as nib
import numpy as np
import pytest
import yaml

from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STORE = 150 * 2**20
SMALL = {"CPU": 2, "object_store_memory": STORE}
GPU = {"CPU": 2, "GPU": 1, "object_store_memory": STORE}  # made up: nothing can train on it
TINY = ["views.size=[16,32,32]", "global_batch_size=8", "encoder.width=8", "heads.hidden=16", "health.every=1000"]
TINY += ["train.log_every=1", "train.cpus_per_worker=1.5", "train.threads_per_worker=1", "train.checkpoint_every=5"]


@contextlib.contextmanager
def grown(*args, **kwargs):
    """A cluster that grows, in a folder of a short name, for sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="pgl", ignore_cleanup_errors=True) as folder:
        cluster = growing.Growing(Path(folder), *args, **kwargs)
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def store(tmp_path) -> Path:
    for name in ("a", "b"):
        volume = np.random.default_rng(0).integers(-900, 300, (24, 64, 64)).astype(np.int16)
        write_scan(tmp_path / "store", name, volume, np.eye(4), split="train")
    write_index(tmp_path / "store", {}, (-1024.0, 325.0))
    return tmp_path / "store"


class Job:
    """A door's command, sent to a cluster from outside."""

    def __init__(self, cluster: growing.Growing, door: str, *args: str, env: dict[str, str] | None = None):
        command = [str(hosts.BIN / "ray"), "job", "submit", "--working-dir", ".", "--runtime-env-json"]
        excludes = [".git", "tests", "*.js", "pretrained"]
        command += [
            json.dumps({"excludes": excludes, "env_vars": env or {}}),
            "--",
            "python",
            "-m",
            f"pgl_ray.{door}",
            *args,
        ]
        self.log = cluster.folder / f"job_{time.monotonic_ns()}"
        deadline = time.monotonic() + 60
        while True:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(command, env=cluster.env, cwd=ROOT, stdout=log, stderr=log)
            while self.process.poll() is None and "submitted successfully" not in self.text():
                time.sleep(0.1)
            if "submitted successfully" in self.text() or time.monotonic() > deadline:
                return
            time.sleep(0.5)  # the head's agent is not there yet

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, reached, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def end(self, seconds: float = 200) -> tuple[int, str]:
        """Exit code and console."""
        return self.process.wait(seconds), self.text()


def show(text: str) -> None:
    """Prints what a job said of nodes, and its last line."""
    ours = [line for line in text.splitlines() if re.search("^  (waiting|nodes|trials)|^pgl_ray|^tune:|: done", line)]
    print(*ours, sep="\n")


def pretraining(store: Path, run: Path, *args: str) -> list[str]:
    return ["conf/pretrain_small.yaml", f"index={store}", f"run={run}", *TINY, *args]


@pytest.mark.soak
def test_a_job_makes_a_cluster_grow_from_a_head_without_cpus(store, tmp_path):
    """Nodes come for a worker and for what feeds it; nine GPUs can never come, and are refused before any node is."""
    with grown({"small": (SMALL, 2), "gpu": (GPU, 3)}) as cluster:
        nine = ["global_batch_size=9", "train.num_workers=9"]
        code, text = Job(cluster, "pretrain", *pretraining(store, tmp_path / "wrong", *nine)).end()
        line = "train.num_workers=9 need 9 GPUs, the cluster has 0 CPUs and 0 GPUs and can have 10 CPUs and 3 GPUs "
        line += "(2 nodes of 2 CPUs and 0 GPUs or 3 nodes of 2 CPUs and 1 GPU): lower it, or take train.device=cpu"
        assert code == 1 and f"\npgl_ray.pretrain: {line}\n" in text and "Traceback" not in text, text
        assert not cluster.nodes()
        one = ["max_steps=5", "train.device=cpu"]
        code, text = Job(cluster, "pretrain", *pretraining(store, tmp_path / "run", *one)).end()
        assert code == 0, text
        assert "waiting for nodes, at most 30:00: there is room for 0 of train.num_workers=1 workers of 1.5 CPU" in text
        assert "nodes are there after" in text and "done after 5 steps" in text
        assert len(cluster.nodes()) == 2
    assert checkpoint.trained_on(tmp_path / "run") == ["cpu"]


@pytest.mark.soak
def test_prepare_makes_a_cluster_grow_and_it_shrinks_again(tmp_path):
    """As many conversions as the cluster can have CPUs, not as the head has."""
    (tmp_path / "raw").mkdir()
    for k in range(6):
        volume = np.random.default_rng(k).integers(-900, 300, (160, 160, 60)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / f"{k}.nii.gz")
        for copy in range(40):
            shutil.copy(tmp_path / f"{k}.nii.gz", tmp_path / "raw" / f"scan_{k}_{copy}.nii.gz")
    with grown({"small": (SMALL, 2)}, idle_s=15) as cluster:
        began, most = time.monotonic(), 0
        job = Job(cluster, "prepare", f"source={tmp_path}/raw", f"store={tmp_path}/s")
        while job.process.poll() is None and time.monotonic() < began + 200:
            most = max(most, len(cluster.nodes()))
            time.sleep(0.2)
        code, text = job.end(1)
        print(f"{time.monotonic() - began:.0f} s, {most} nodes at a time")
        assert code == 0 and "240 converted" in text, text
        assert most == 2
        began = time.monotonic()
        while cluster.nodes():
            assert time.monotonic() < began + 90
            time.sleep(0.2)
        print(f"gone after {time.monotonic() - began:.0f} s")


@pytest.mark.soak
def test_a_node_that_is_taken_away_comes_again(store, tmp_path):
    with grown({"small": (SMALL, 2)}, cpus=1) as cluster:
        run = tmp_path / "run"
        job = Job(cluster, "pretrain", *pretraining(store, run, "max_steps=60", "train.num_workers=2"))
        job.wait_for(lambda: checkpoint.committed_step(run) >= 10)
        cluster.take_away()
        code, text = job.end()
        assert code == 0, text
        show(text)
        assert text.count("waiting for nodes") == 2  # at the start, and when one was lost
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 61))


@pytest.mark.soak
def test_an_elastic_run_takes_the_nodes_that_there_are(store, tmp_path):
    """Eight workers are wished for, of a cluster that can have three: Ray asks for no more, and takes one or two, which
    divide the batch."""
    with grown({"small": (SMALL, 3)}, cpus=1) as cluster:
        run, wished = tmp_path / "run", ["train.min_workers=1", "train.max_workers=8", "max_steps=100000"]
        env = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
        job = Job(cluster, "pretrain", *pretraining(store, run, *wished, "train.log_every=50"), env=env)
        worlds: list[int] = []

        def world(num: int) -> bool:
            log = run / "logs" / "rank_0.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            worlds[:] = [row["world"] for row in map(json.loads, lines) if row["message"] == "start"]
            return bool(worlds) and worlds[-1] == num

        began = time.monotonic()
        job.wait_for(lambda: world(2), 240)
        print(f"two workers after {time.monotonic() - began:.0f} s, {len(cluster.nodes())} nodes")
        assert set(worlds) <= {1, 2} and len(cluster.nodes()) == 3
        assert "note: there can be room for 3 of train.num_workers=8 workers" in job.text()


@pytest.mark.soak
def test_a_quota_below_what_was_asked_is_named(store, tmp_path):
    with grown({"small": (SMALL, 3)}, quota=1) as cluster:
        env = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25"}
        wished = ["train.num_workers=2", "max_steps=9"]
        code, text = Job(cluster, "pretrain", *pretraining(store, tmp_path / "run", *wished), env=env).end()
        show(text)
        assert code == 1
        assert re.search(r"after 0:25 there is room for \d of train.num_workers=2 .*; small: ", text)
        assert "VcpuLimitExceeded: you have requested more than your current limit of 1" in text


@pytest.mark.soak
def test_a_sweeps_trials_wait_for_nodes(tmp_path):
    """Two at a time, for there can be nodes for two."""
    for k in range(4):
        volume = np.random.default_rng(k).integers(-900, 300, (24, 64, 64)).astype(np.int16)
        label = np.zeros_like(volume, np.uint8)
        label[6:18, 20:44, 20:44] = 1
        split = "train" if k < 2 else "val"
        write_scan(tmp_path / "store", f"scan_{k}", volume, np.eye(4), split=split, label=label, labelled=(1,))
    write_index(tmp_path / "store", {"liver": 1}, (-1024.0, 325.0))
    train = {"cpus_per_worker": 1.5, "threads_per_worker": 1, "checkpoint_every": 4}
    base = {"max_steps": 4, "global_batch_size": 2, "patch": {"size": [16, 32, 32]}, "init": "random", "train": train}
    base |= {"encoder": {"width": 4, "depths": [1, 1, 1, 1]}}
    space = {"finetune.optim.lr": {"grid_search": [0.01, 0.001]}}
    sweep = {"base_pretrain": None, "base_finetune": base, "space": space, "scheduler": {"kind": "none"}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with grown({"small": (SMALL | {"CPU": 3}, 2)}) as cluster:
        args = [f"{tmp_path}/sweep.yaml", f"index={tmp_path}/store", f"run={tmp_path}/sweep"]
        code, text = Job(cluster, "tune", *args).end(300)
        show(text)
        assert code == 0 and "tune: 2 trials over finetune.optim.lr; 0 done, 2 at a time" in text
        assert "trials wait for nodes: the cluster has 0 CPUs and 0 GPUs and can have 6 CPUs" in text
        assert "2 done" in text
