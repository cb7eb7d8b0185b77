"""A training over several hosts, which are network namespaces of this machine with addresses of their own: one host is
killed, one is cut off, one is told to go; every step is done once, with the pairs that the plan says.

    PGL_RAY_SOAK=8 pytest -s -m soak tests/test_multinode.py        # as root, four to eight minutes
"""

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

import hosts
import numpy as np
import pytest

from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import read_metrics

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
]
ROOT = Path(__file__).resolve().parents[1]
STEPS = 200
# every step's pairs are compared with the plan where its metrics are written
TRAINING = [f"max_steps={STEPS}", "views.size=[16,48,48]", "global_batch_size=8", "encoder.width=8", "health.every=100"]
TRAINING += ["train.num_workers=2", "train.cpus_per_worker=1.5", "train.threads_per_worker=1", "train.log_every=1"]
TRAINING += ["train.checkpoint_every=10", "train.max_failures=5"]


@pytest.fixture
def network():
    """Six hosts."""
    try:
        network = hosts.Network(6)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield network
    network.close()


class Training:
    """A driver on host 1 and what its run folder says."""

    def __init__(self, folder: Path, network: hosts.Network, env: dict[str, str]):
        self.run, self.network = folder / "run", network
        command = [str(hosts.BIN / "python"), "-m", "pgl_ray.pretrain", "conf/pretrain_small.yaml"]
        command += [f"index={folder}/store", f"run={self.run}", f"ray.address={hosts.address(1)}:6379", *TRAINING]
        self.log = folder / "driver.log"
        with self.log.open("wb") as log:
            inside = [*network.inside(1), *command]
            self.driver = subprocess.Popen(inside, env=env, cwd=ROOT, stdout=log, stderr=log)

    def step(self) -> int:
        rows = read_metrics(self.run)
        return int(rows[-1]["step"]) if rows else 0

    def wait_for(self, reached, what: str) -> float:
        """Seconds until `reached()`."""
        began = time.monotonic()
        while not reached():
            assert self.driver.poll() is None and time.monotonic() - began < 300, f"{what}: {self.log.read_text()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def workers(self) -> list[int]:
        """Hosts of the newest start's workers, by rank; those that still run."""
        found = []
        for rank in (0, 1):
            lines = (self.run / "logs" / f"rank_{rank}.jsonl").read_text().splitlines()
            pid = [row["pid"] for row in map(json.loads, lines) if row["message"] == "start"][-1]
            found.append(self.network.host_of(pid))
        return found

    def starts(self) -> int:
        """How often both workers have started."""
        logs = [self.run / "logs" / f"rank_{rank}.jsonl" for rank in (0, 1)]
        return min(log.read_text().count('"message": "start"') if log.exists() else 0 for log in logs)


def test_hosts_die_and_others_come(network, capsys):
    env = hosts.environment() | {"GLOO_SOCKET_IFNAME": "eth0"}
    # a host that is silent for about ten seconds is dead
    env |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    nodes: dict[int, hosts.Node] = {}
    with tempfile.TemporaryDirectory(prefix="pgl", ignore_cleanup_errors=True) as temp:
        folder = Path(temp)
        for i in range(6):
            volume = np.random.default_rng(i).integers(-900, 300, (24, 96, 96)).astype(np.int16)
            write_scan(folder / "store", f"scan_{i}", volume, np.eye(4), split="train")
        write_index(folder / "store", {}, (-1024.0, 325.0))

        def start(k: int, *arguments: str) -> None:
            own = [f"--node-ip-address={hosts.address(k)}", f"--temp-dir={folder}/{k}"]
            nodes[k] = hosts.Node(folder / f"log_{k}", [*own, *arguments], env, network.inside(k))

        def join(k: int) -> None:
            start(k, f"--address={hosts.address(1)}:6379", "--num-cpus=2")

        def lose(what: str, act) -> None:
            """Takes a worker's host away as `act(host)` does, has the next one join, waits until it goes on."""
            victim, starts, reached = training.workers()[-1], training.starts(), [training.step()]

            def goes_on() -> bool:
                reached.append(training.step())
                return training.starts() > starts

            act(victim)
            join(max(nodes) + 1)
            seconds = training.wait_for(goes_on, what)
            kept = checkpoint.committed_step(training.run)
            training.wait_for(lambda: checkpoint.committed_step(training.run) > kept, what)
            assert victim not in training.workers()
            with capsys.disabled():
                print(f"{what}: workers again after {seconds:.0f} s, {max(reached) - kept} steps done twice")

        try:
            start(1, "--head", "--port=6379", f"--dashboard-host={hosts.address(1)}", "--num-cpus=1")
            deadline = time.monotonic() + 180
            while "--block" not in nodes[1].log.read_text():
                assert time.monotonic() < deadline, nodes[1].log.read_text()
                time.sleep(0.2)
            join(2)
            join(3)
            for k in (2, 3):
                while "--block" not in nodes[k].log.read_text():
                    assert time.monotonic() < deadline, nodes[k].log.read_text()
                    time.sleep(0.2)
            training = Training(folder, network, env)
            training.wait_for(lambda: checkpoint.committed_step(training.run) >= 10, "start")
            assert set(training.workers()) == {2, 3}
            lose("SIGKILL of a host", lambda k: nodes[k].kill())
            lose("a cable pulled", network.cut)
            lose("SIGTERM, half a minute's notice", lambda k: nodes[k].process.terminate())
            assert training.driver.wait(300) == 0, training.log.read_text()
        finally:
            for node in nodes.values():
                node.kill()
        assert re.search(rf"^pretrain: done after {STEPS} steps", training.log.read_text(), re.M)
        assert [row["step"] for row in read_metrics(training.run)] == list(range(1, STEPS + 1))
        assert "taken away" in (training.run / "logs" / "rank_0.jsonl").read_text()
