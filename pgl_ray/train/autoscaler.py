"""What the connected cluster's autoscaler says: how far the cluster may grow, and why nodes do not come.

The autoscaler tells neither to a driver: its process has the one in a file and writes the other into its log, both on
the head. So a task there looks.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from pgl_ray import ray_internals

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # Kubernetes' own, in every pod
UNREADABLE: dict[str, Any] = {}  # instead of a config
LOG_BYTES = 2**20  # of the log's end that are looked at


def config(timeout_s: float = 60.0) -> dict[str, Any] | None:
    """How the connected cluster may grow, as a file for `ray up` says it: available_node_types, head_node_type,
    max_workers; none: it does not; UNREADABLE: it does, and does not say how.

    A platform may publish it in the cluster's GCS, where Ray Train looks. Ray's own autoscaler does not, and under
    KubeRay its config is made of what Kubernetes says of the cluster, which the pod of the head may ask.
    """
    if ray_internals.missing(ray_internals.GROWTH):
        return None
    published = ray_internals.published_config()
    if published and published.node_group_configs:
        types = {
            group.name: {"resources": dict(group.resources), "max_workers": group.max_count % 2**31}  # -1: any number
            for group in published.node_group_configs
        }
        return {"available_node_types": types, "max_workers": sum(kind["max_workers"] for kind in types.values())}
    return _on_head(head_config, UNREADABLE, timeout_s)


def failures(timeout_s: float = 30.0) -> dict[str, str]:
    """Kinds of nodes that the connected cluster's autoscaler could not start lately, and why, in the cloud's words.

    The cluster's state names the kinds, and has lost the words on the way (Ray 2.60).
    """
    failed = ray_internals.failed_launches()
    words = _on_head(head_failures, {}, timeout_s) if failed else {}
    return {kind: words.get(kind, "see monitor.log on the head") for kind in failed}


def _on_head(function: Any, otherwise: Any, timeout_s: float) -> Any:
    """What a function says that is called on the head, with the address of the GCS; or something else, where it fails
    or takes long."""
    import ray

    # DEFAULT: a trial of a sweep has a placement group, in which there is no head
    options = {"num_cpus": 0, "resources": {ray_internals.HEAD: 0.001}, "max_retries": 1}
    options["scheduling_strategy"] = "DEFAULT"
    asked = ray.remote(function).options(**options).remote(ray.get_runtime_context().gcs_address)
    try:
        return ray.get(asked, timeout=timeout_s)
    except (ray.exceptions.RayError, TimeoutError):
        return otherwise


# -- on the head ------------------------------------------------------------------------------------------------------


def head_config(gcs_address: str) -> dict[str, Any] | None:
    """`config` on the head."""
    import yaml

    lines = _monitors(gcs_address)
    for path in _given(ray_internals.MONITOR_CONFIG, lines):
        return yaml.safe_load(Path(path).expanduser().read_text())
    cluster = os.environ.get(ray_internals.KUBERAY_CLUSTER)
    if lines or cluster is None:
        return None
    try:
        return ray_internals.kuberay_config(cluster, NAMESPACE.read_text())
    except Exception:  # no such file, no right to ask, no answer, an answer of another version
        return UNREADABLE


def head_failures(gcs_address: str) -> dict[str, str]:
    """Kinds of nodes -> why the last ones could not be started; called on the head."""
    folders = _given(ray_internals.MONITOR_LOGS, _monitors(gcs_address))
    folder = folders[0] if folders else ray_internals.KUBERAY_LOGS  # its containers share it
    path = Path(folder, ray_internals.MONITOR_LOG)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    return {name: why.strip()[:300] for name, why in ray_internals.FAILED_LAUNCH.findall(text)}


def _monitors(gcs_address: str) -> list[list[str]]:
    """Command lines of the autoscalers of a cluster on this machine, where there may be others."""
    import psutil

    port, lines = gcs_address.rpartition(":")[2], []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            gcs = next((word for word in words if word.startswith(ray_internals.MONITOR_GCS)), "")
            if gcs.endswith(f":{port}") and any(word.endswith(f"/{ray_internals.MONITOR}") for word in words):
                lines.append(words)
    return lines


def _given(option: str, lines: list[list[str]]) -> list[str]:
    """What command lines give for an option."""
    return [word.removeprefix(option) for words in lines for word in words if word.startswith(option)]
