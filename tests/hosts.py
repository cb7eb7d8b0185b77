"""Ray clusters of several nodes for tests, with folders of their own; all their processes are ended by their pids."""

import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def environment(token: str | None = None) -> dict[str, str]:
    """What `ray start` and its clients get: our Python first, this cluster's token, no statistics."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env["RAY_worker_niceness"] = "0"
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


class Network:
    """Hosts of their own addresses on this machine: network namespaces behind a switch, which is one, too. Nothing of
    it is seen from outside, and all of it is gone after `close`.

    Args:
        num: of hosts; host k (from 1) has the address 10.77.0.k on its eth0.
    """

    def __init__(self, num: int):
        self.name, self.made = f"pgl{os.getpid()}", []
        try:
            self.switch = self._make("s")
            _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "br0", "up")
            for k in range(1, num + 1):
                host, port = self._make(str(k)), f"port{k}"
                _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", self.switch)
                _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
                _ip("-n", host, "addr", "add", f"{address(k)}/24", "dev", "eth0")
                _ip("-n", host, "link", "set", "lo", "up")
                _ip("-n", host, "link", "set", "eth0", "up")
                _ip("-n", host, "route", "add", "default", "dev", "eth0")
        except BaseException:
            self.close()
            raise

    def _make(self, suffix: str) -> str:
        name = self.name + suffix
        _ip("netns", "add", name)
        self.made.append(name)
        return name

    def inside(self, k: int) -> tuple[str, ...]:
        """What stands before a command that runs on host k."""
        return ("ip", "netns", "exec", f"{self.name}{k}")

    def host_of(self, pid: int) -> int:
        """Number of the host that a process runs on; 0 if it has ended."""
        for k, name in enumerate(self.made[1:], 1):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            if str(pid) in listed.split():
                return k
        return 0

    def cut(self, k: int) -> None:
        """Host k's cable is pulled."""
        _ip("-n", f"{self.name}{k}", "link", "set", "eth0", "down")

    def close(self) -> None:
        """Ends what still runs in the namespaces, and removes them; their links go with them."""
        for name in self.made:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        self.made = []


def address(k: int) -> str:
    """Of host k of a Network."""
    return f"10.77.0.{k}"


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


class Nodes:
    """A head with a dashboard and nodes beside it on this machine (`ray.cluster_utils.Cluster`), in a process of their
    own: nodes can be added from its main thread alone.

    Args:
        folder: of Ray's temporary files; short.
        num_cpus: of each node; the head has one.
    """

    def __init__(self, folder: Path, env: dict[str, str], num_nodes: int, num_cpus: int):
        command = [sys.executable, __file__, str(folder), str(num_nodes), str(num_cpus)]
        self.log = folder / "cluster.log"
        with self.log.open("wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen(command, env=env | {"RAY_TMPDIR": str(folder)}, **pipes)
        self.address, self.url = self._read()

    def _read(self) -> list[str]:
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return line.split()

    def kill_one(self) -> None:
        """SIGKILL of the raylet of the first node; its workers die with it."""
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        self._read()

    def add(self) -> None:
        """One more node."""
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        self._read()

    def close(self) -> None:
        """Ends all of it."""
        try:
            tree = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        for process in [*tree, self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def serve_nodes(folder: str, num_nodes: int, num_cpus: int) -> None:
    """The process behind Nodes: prints address and dashboard, then obeys `kill` and `add`."""
    from ray.cluster_utils import Cluster

    def options(k: int, cpus: int) -> dict:
        # folders of their own, as on machines of their own: in a shared one a node's clean-up takes the others' code
        own = {"temp_dir": f"{folder}/{k or 'ray'}", "env_vars": {"XDG_CACHE_HOME": f"{folder}/cache_{k}"}}
        return {"num_cpus": cpus, "object_store_memory": 200 * 2**20, **own}

    os.mkdir(f"{folder}/ray")
    head = options(0, 1) | {"include_dashboard": True}
    head |= {"dashboard_port": None, "dashboard_agent_listen_port": None}  # free ones
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(**options(k, num_cpus)) for k in range(1, num_nodes + 1)]
    print(cluster.address, f"http://{cluster.webui_url}", flush=True)
    for line in sys.stdin:
        if line == "kill\n":
            nodes.pop(0).kill_raylet()
        else:
            num_nodes += 1
            nodes.append(cluster.add_node(**options(num_nodes, num_cpus)))
        print("done", flush=True)


if __name__ == "__main__":
    serve_nodes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
