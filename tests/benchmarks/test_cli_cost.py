"""What a text costs: CPU time of a door's help, of a wrong key and of a missing store, all processes together."""

import os
import resource
import statistics
import subprocess
import sys

import pytest

from pgl_ray import cli

pytestmark = pytest.mark.skipif("PGL_RAY_BENCH" not in os.environ, reason="counts CPU seconds: make bench")
MOST_CPU_S = 1.0
NEEDED = {"pretrain": ["run=r"], "finetune": ["run=r"], "evaluate": ["run=r"], "tune": ["run=r"]}


def cpu_s(*args: str) -> float:
    """User and system seconds of a Python process, the median of five."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *args], capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


@pytest.mark.parametrize("door", sorted({door.split()[0] for door in cli.DOORS}))
def test_texts_and_refusals_take_less_than_a_second(door, tmp_path):
    cost = {"help": cpu_s("-m", f"pgl_ray.{door}", "--help")}
    cost["wrong key"] = cpu_s("-m", f"pgl_ray.{door}", "no_such_key=1")
    for key in cli.DOORS[door].stores:
        cost[f"missing {key}"] = cpu_s("-m", f"pgl_ray.{door}", *NEEDED.get(door, []), f"{key}={tmp_path}/nowhere")
    print(f"\n{door}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in cost.items()))
    assert max(cost.values()) < MOST_CPU_S
