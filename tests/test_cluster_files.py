"""conf/cluster: what can be said of the files without a cloud. The KubeRay files were checked by hand against the whole
CRDs of KubeRay 1.6.2 and 1.7.0; here against the names of their fields that we use."""

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from pgl_ray import config as c
from pgl_ray.train import session

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "conf" / "cluster"
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)


def closed(required: dict, optional: dict | None = None) -> dict:
    """JSON schema of an object that has no other fields."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, COUNT, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
START = {"type": "object", "additionalProperties": TEXT}  # KubeRay takes texts alone
CONTAINER = closed(
    {"name": TEXT, "image": {"enum": ["REGISTRY/pgl_ray:0.1"]}, "resources": ANY},
    {"env": {"type": "array"}, "ports": {"type": "array"}, "volumeMounts": {"type": "array"}},
)
POD = closed(
    {"containers": {"type": "array", "items": CONTAINER}},
    {"volumes": {"type": "array"}, "tolerations": {"type": "array"}, "terminationGracePeriodSeconds": COUNT},
)
GROUP = closed(
    {"groupName": TEXT, "rayStartParams": START, "template": closed({"spec": POD})},
    {"replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT},
)
RAY_CLUSTER = closed(
    {
        "rayVersion": {"enum": [RAY]},
        "authOptions": closed({"mode": {"enum": ["token"]}}, {"secretName": TEXT}),
        "headGroupSpec": closed({"rayStartParams": START, "template": closed({"spec": POD})}),
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
    {
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": closed({"version": TEXT}, {"idleTimeoutSeconds": COUNT}),
    },
)
RAY_JOB = closed(
    {"entrypoint": TEXT, "rayClusterSpec": RAY_CLUSTER},
    {"backoffLimit": COUNT, "shutdownAfterJobFinishes": {"type": "boolean"}, "ttlSecondsAfterFinished": COUNT},
)


@pytest.mark.parametrize(
    ("name", "kind", "spec"), [("raycluster", "RayCluster", RAY_CLUSTER), ("rayjob", "RayJob", RAY_JOB)]
)
def test_kuberay_files(name, kind, spec):
    head = {"apiVersion": {"enum": ["ray.io/v1"]}, "kind": {"enum": [kind]}, "metadata": closed({"name": TEXT})}
    content = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    jsonschema.validate(content, closed({**head, "spec": spec}))
    if kind == "RayJob":
        words = content["spec"]["entrypoint"].split()
        assert words[:3] == ["python", "-m", "pgl_ray.pretrain"]
        config = c.load(c.PretrainConfig, words[3:])
        group = content["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        assert config.train.num_workers == group["replicas"]  # a GPU each


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_autoscaler_files_fit_rays_schema(name):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    jsonschema.validate(content, schema)
    assert content["head_node_type"] in content["available_node_types"]
    starts = [
        line for key in ("head", "worker") for line in content[f"{key}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_the_image_has_the_tested_ray():
    assert f"FROM rayproject/ray:{RAY}-py311-gpu" in (CLUSTER / "Dockerfile").read_text()


def test_grafana_draws_what_is_exported():
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    drawn = {t["expr"].split("{")[0] for panel in dashboard["panels"] for t in panel["targets"]}
    exported = {f"ray_{name}" for name, _ in session.EXPORTED.values()}
    of_ray = {"ray_node_cpu_utilization", "ray_node_gpus_utilization"}  # of Ray's own, seen at its endpoint
    assert drawn - exported == of_ray and exported - drawn <= {"ray_pgl_ray_epoch"}
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    readme = (CLUSTER / "README.md").read_text()
    assert all(f"`{name}`" in readme for name, _ in session.EXPORTED.values())


STAND_INS = {
    "scontrol": 'printf "a\\nb\\nc\\n"',
    # srun's own flags go, the rest runs here
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export HOST=${1#*=}; shift; done; exec "$@"',
    "hostname": "echo 10.0.0.7 fe80::1",
    "ray": 'echo "$HOST ray $* $RAY_AUTH_MODE" >> "$LOG"; exec sleep 60',
    # as the script's own Python, it waits for the nodes
    "python": """[ "$1" = -c ] && exec python3 "$@"
        cat > /dev/null
        if [ "$1" = - ]; then until [ "$(grep -c ' ray start' "$LOG")" = 3 ]; do sleep 0.05; done; fi
        echo "$HOST python $*${RAY_ADDRESS:+ on $RAY_ADDRESS}" >> "$LOG"
        [ "$1" = - ]""",
}


def test_slurm_script(tmp_path):
    """With stand-ins for SLURM, Ray and Python: a head, the other nodes, the door on the head, its exit code."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    env = os.environ | {"VENV": str(tmp_path), "LOG": str(tmp_path / "log"), "SLURM_JOB_NODELIST": "[a-c]"}
    env |= {"SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(CLUSTER / "slurm.sh"), "pretrain", "index=/s", "run=/r"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 1, done.stderr
    size = "--num-cpus=32 --num-gpus=4 token"
    head = f"a ray start --head --block --node-ip-address=10.0.0.7 --port=6379 --dashboard-host=127.0.0.1 {size}"
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[:-2]) == [head, *(f"{host} ray start --block --address=10.0.0.7:6379 {size}" for host in "bc")]
    assert lines[-2:] == [
        "a python - 10.0.0.7:6379 3 120",
        "a python -m pgl_ray.pretrain index=/s run=/r on 10.0.0.7:6379",
    ]
