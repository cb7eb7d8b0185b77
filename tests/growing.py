"""Ray clusters that grow, on this machine: a head whose autoscaler (Ray's second, as `ray up` and KubeRay take it)
starts and ends Ray's own fake nodes. `ray.cluster_utils.AutoscalingCluster` would do the same, but begins and ends with
`ray stop --force`, which takes every Ray of the machine along, and lacks a file in the wheel of Ray 2.60.
"""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import hosts
import psutil
import ray._private.node
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
OWN_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # in the environment of each of their processes


class Quota(FakeMultiNodeProvider):
    """Ray's fake nodes, of which no more than `quota` are given at a time, each with a folder of its own.

    In the head's folder, where Ray would have them, a node's agent unpacks a job's files over those that the job's
    command stands in, and the command loses its working directory.
    """

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        quota = self.provider_config.get("quota")
        if quota is not None and len(self._nodes) - 1 + count > quota:
            raise RuntimeError(f"VcpuLimitExceeded: you have requested more than your current limit of {quota}")

        def with_own_folder(params, node=ray._private.node.Node, **kwargs):
            params.temp_dir = f"{self.provider_config['folder']}/node{self._next_node_id}"
            return node(params, **kwargs)

        with mock.patch.object(ray._private.node, "Node", with_own_folder):
            super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Growing:
    """A head, and nodes as they are asked for.

    Args:
        folder: short, of Ray's temporary files.
        kinds: name of a kind of node -> resources, and how many there may be.
        cpus: of the head.
        quota: of nodes that are given, whatever `kinds` says; none: all.
        idle_s: after which a node goes.
    """

    def __init__(
        self,
        folder: Path,
        kinds: dict[str, tuple[dict, int]],
        cpus: int = 0,
        quota: int | None = None,
        idle_s: float = 60,
    ):
        port, self.dashboard = free_port(), free_port()
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{self.dashboard}"
        types = {
            name: {"resources": dict(own), "node_config": {}, "min_workers": 0, "max_workers": most}
            for name, (own, most) in kinds.items()
        }
        types["ray.head.default"] = {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in kinds.values()),
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                "type": "external",
                "module": "growing.Quota",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": self.address,
                "launch_multiple": True,
                "quota": quota,
                "folder": str(folder),
                "disable_node_updaters": True,
            },
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            "upscaling_speed": 100.0,
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            **{f"{what}_commands": [] for what in COMMANDS},
        }
        self.folder = folder
        (folder / "cluster.json").write_text(json.dumps(config))
        self.env = hosts.environment() | {"RAY_API_SERVER_ADDRESS": self.url}
        fake = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
        fake |= {OWN_ID: FAKE_HEAD_NODE_ID, "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        fake |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
        start = ["--head", f"--port={port}", f"--num-cpus={cpus}", f"--temp-dir={folder}/ray"]
        start += [f"--dashboard-port={self.dashboard}", "--dashboard-agent-listen-port=0"]
        start += [f"--autoscaling-config={folder}/cluster.json", "--node-ip-address=127.0.0.1"]
        self.head = hosts.Node(folder, start, self.env | fake)
        deadline = time.monotonic() + 120
        while "--block" not in self.head.log.read_text():
            assert self.head.process.poll() is None and time.monotonic() < deadline, self.head.log.read_text()
            time.sleep(0.2)

    def nodes(self) -> list[psutil.Process]:
        """Raylets of the nodes that are up, without the head's."""
        processes = []
        for process in psutil.Process(self.head.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name() == "raylet" and process.environ().get(OWN_ID) != FAKE_HEAD_NODE_ID:
                    processes.append(process)
        return processes

    def take_away(self) -> None:
        """SIGKILL of a node's raylet; its workers die with it."""
        self.nodes()[-1].send_signal(signal.SIGKILL)

    def close(self) -> None:
        self.head.kill()
