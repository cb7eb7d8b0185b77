"""Real trainings that are killed: a worker, the driver, at random for as long as one likes.

What they end with is compared, bit for bit, with the same loop in two processes without Ray that nobody disturbed.
The soak: PGL_RAY_SOAK=30 python -m pytest -s -m soak tests/test_faults.py
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import train_loop as loop

from pgl_ray import config as c
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import metrics_path, read_metrics

TRAIN = {"num_workers": 2, "log_every": 1, "threads_per_worker": 1}


class Driver:
    """A training's command on a Ray cluster of its own, to be killed in part or whole, and typed again."""

    def __init__(self, config: c.PretrainConfig, place: Path):
        self.config, self.place = config, place
        (place / "run.yaml").write_text(c.to_yaml(config))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "pgl_ray.pretrain", str(self.place / "run.yaml")]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has ended since
                continue
        return sorted(found, key=lambda process: process.pid)

    def wait_for_row(self, step: int, limit_s: float = 240) -> int:
        """Waits until a start of the workers that came after this call's has done a step; the newest step."""
        path, deadline = metrics_path(self.config.run), time.monotonic() + limit_s
        while time.monotonic() < deadline:
            rows = read_metrics(self.config.run) if path.exists() else []
            if rows and rows[-1]["step"] >= step and path.stat().st_ino != self.seen:
                return int(rows[-1]["step"])
            assert self.process.poll() in (None, 0), (self.place / "log").read_text()[-2000:]
            if self.process.poll() == 0:
                return self.config.max_steps
            time.sleep(0.05)
        raise AssertionError((self.place / "log").read_text()[-2000:])

    seen = None  # the metrics' file of a start that is over

    def kill(self, whom: str) -> dict[str, float]:
        """Kills a worker, or the driver, which is then started again; what that cost."""
        path = metrics_path(self.config.run)
        self.seen = path.stat().st_ino
        at, kept = read_metrics(self.config.run)[-1]["step"], checkpoint.committed_step(self.config.run)
        began = time.monotonic()
        if whom == "driver":
            left = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            self.start()
        else:
            left = []
            random.choice(self.workers()).send_signal(signal.SIGKILL)
        first = self.wait_for_row(kept + 1)
        back_s = time.monotonic() - began
        self.wait_for_row(int(at))
        regained_s = time.monotonic() - began
        _, alive = psutil.wait_procs(left, timeout=120)
        assert not alive  # a dead driver leaves no process behind
        steps = {"step": at, "kept": kept, "first": first}
        return {"whom": whom, **steps, "back_s": round(back_s, 1), "regained_s": round(regained_s, 1)}

    def finish(self, limit_s: float) -> None:
        assert self.process.wait(limit_s) == 0, (self.place / "log").read_text()[-2000:]


@pytest.fixture
def place(tmp_path):
    """A folder, a store of scans in it, and nothing of Ray's left over at the end."""
    loop.scans(tmp_path / "store")
    yield tmp_path
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended since
            if "pgl_ray.pretrain" in " ".join(child.cmdline()):
                child.kill()


def config_of(place: Path, steps: int, **train) -> c.PretrainConfig:
    ray = {"num_cpus": 4, "object_store_mb": 200}
    train = TRAIN | {"checkpoint_every": 10, "max_failures": 1000} | train
    return loop.pretraining(place / "store", place / "run", max_steps=steps, train=train, ray=ray, health={"every": 50})


def check_undisturbed(config: c.PretrainConfig, place: Path) -> None:
    """The same steps, pairs, losses and parameters as in a run that nobody disturbed."""
    whole = config.model_copy(update={"run": str(place / "whole")})
    loop.train(whole, config.train.num_workers)
    states = [loop.state_of(run) for run in (config.run, whole.run)]
    for state in states:
        state["meta"].pop("config")
    assert loop.equal(*states)
    assert loop.rows_of(config.run) == loop.rows_of(whole.run)
    assert [row["step"] for row in loop.rows_of(config.run)] == list(range(1, config.max_steps + 1))


@pytest.mark.cluster
def test_a_kill_costs_what_came_after_the_checkpoint(place):
    """And at most a minute for the restart, on a machine that does nothing else; after the driver's end the same
    command is typed again."""
    config = config_of(place, 150)
    driver = Driver(config, place)
    driver.wait_for_row(25)
    for whom in ("worker", "driver"):
        cost = driver.kill(whom)
        print(json.dumps(cost))
        # a worker whose driver is killed goes on until Ray ends it: two checkpoints more on a busy machine
        assert cost["step"] - cost["kept"] <= 10 + 5 and cost["first"] <= cost["step"] + 5 + 2 * 10
        assert cost["step"] < 150
    driver.finish(120)
    check_undisturbed(config, place)


@pytest.mark.soak
def test_an_elastic_run_loses_workers_and_takes_new_ones(place, monkeypatch):
    """Two nodes with a worker each; one is lost: the other goes on alone, with the whole batch, until another joins."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "12")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = {"num_cpus": 3, "object_store_memory": 2 * 10**8, "dashboard_port": free.getsockname()[1]}
    cluster, node = (
        Cluster(initialize_head=True, head_node_args=head),
        {"num_cpus": 2, "object_store_memory": 2 * 10**8},
    )
    second = cluster.add_node(**node)
    elastic = {"num_workers": 2, "min_workers": 1, "max_workers": 2, "cpus_per_worker": 2}
    config = config_of(place, 10**5, **elastic | {"checkpoint_every": 50, "log_every": 50})
    config = config.model_copy(update={"ray": c.RayConfig(address=cluster.address)})
    driver = Driver(config, place)
    try:
        driver.wait_for_row(100)
        driver.seen = metrics_path(config.run).stat().st_ino
        kept, began = checkpoint.committed_step(config.run), time.monotonic()
        cluster.remove_node(second, allow_graceful=False)
        driver.wait_for_row(kept + 1)
        print(f"one worker goes on {time.monotonic() - began:.0f} s after the node's end")
        driver.seen, began = metrics_path(config.run).stat().st_ino, time.monotonic()
        cluster.add_node(**node)
        driver.wait_for_row(checkpoint.committed_step(config.run) + 100)
        print(f"two workers go on {time.monotonic() - began:.0f} s after another node joined (Ray asks every 60 s)")
    finally:
        driver.process.kill()
        cluster.shutdown()
    said = [json.loads(line) for line in Path(config.run, "logs", "rank_0.jsonl").read_text().splitlines()]
    assert [row["world"] for row in said if row["message"] == "start"] == [2, 1, 2]
    steps = [row["step"] for row in loop.rows_of(config.run)]
    assert steps == [1, *range(50, steps[-1] + 1, 50)]


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_random_kills_end_with_the_undisturbed_steps_and_pairs(place):
    """20 kills of workers and drivers, or as many as there is time for: PGL_RAY_SOAK minutes."""
    minutes, rng = float(os.environ["PGL_RAY_SOAK"]), random.Random(0)
    config = config_of(place, int(120 * minutes), checkpoint_every=20)
    began, costs = time.monotonic(), []
    driver = Driver(config, place)
    step = driver.wait_for_row(1)
    while time.monotonic() - began < 60 * minutes and len(costs) < 20 and step < config.max_steps - 60:
        time.sleep(rng.uniform(0.5, 6))
        if driver.process.poll() is not None:
            break
        costs.append(driver.kill("driver" if rng.random() < 0.3 else "worker"))
        step = costs[-1]["step"]
        print(json.dumps({"minute": round((time.monotonic() - began) / 60, 1)} | costs[-1]), flush=True)
    driver.finish(60 * minutes + 600)
    print(f"{len(costs)} kills in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    assert len(costs) >= min(20, minutes / 2)
    check_undisturbed(config, place)
