"""Ray heads and nodes for tests: `ray start --block` with ports and a folder of their own, ended by their pids."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def free_ports(num: int) -> list[int]:
    """Ports of loopback that nothing listens on now."""
    sockets = [socket.socket() for _ in range(num)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def environment(token: str | None = None) -> dict[str, str]:
    """What `ray start` and its clients get: our Python first, this cluster's token, no statistics."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env["RAY_worker_maximum_startup_concurrency"] = "6"  # four times as many processes make Ray warn
    return env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or secrets.token_hex(32)}


class Node:
    """One `ray start --block`.

    Args:
        folder: where its log goes.
        arguments: of `ray start`.
        env: of the process.
        inside: what stands before the command, to run it elsewhere.
    """

    def __init__(self, folder: Path, arguments: list[str], env: dict[str, str], inside: tuple[str, ...] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "ray.log"
        command = [*inside, str(BIN / "ray"), "start", "--block", "--object-store-memory=300000000", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def kill(self) -> None:
        """SIGKILL of every process of the node at once, as if its power were cut."""
        try:
            tree = [psutil.Process(self.process.pid)]
            tree += tree[0].children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(tree, timeout=20)


def head_arguments(folder: Path, ip: str, ports: list[int], num_cpus: int) -> list[str]:
    """Of `ray start` for a head at an address; ports: of GCS and dashboard. Folder: short, unix sockets lie there."""
    arguments = ["--head", f"--node-ip-address={ip}", f"--port={ports[0]}", f"--dashboard-host={ip}"]
    arguments += [f"--dashboard-port={ports[1]}", f"--temp-dir={folder}", f"--num-cpus={num_cpus}"]
    return [*arguments, "--min-worker-port=0", "--max-worker-port=0"]


@contextmanager
def head(env: dict[str, str], num_cpus: int = 4) -> Iterator[str]:
    """A head on loopback; yields its dashboard's URL when that answers."""
    folder = Path(tempfile.mkdtemp(prefix="pgl"))
    ports = free_ports(8)
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export", "node-manager")
    others = [f"--{name}-port={port}" for name, port in zip((*names, "object-manager"), ports[2:])]
    node = Node(folder, head_arguments(folder / "r", "127.0.0.1", ports, num_cpus) + others, env)
    url = f"http://127.0.0.1:{ports[1]}"
    try:
        until = time.monotonic() + 60
        while not answers(url):
            assert node.process.poll() is None and time.monotonic() < until, node.log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    """Whether a dashboard is up, with or without access."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
