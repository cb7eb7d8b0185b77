"""What a long index costs a process that renders: time to its first batch, pairs per second, memory over its imports.

    python tests/benchmarks/index_growth.py [--rows=100,1000,10000,100000] [--rounds=3] [--trees=OLDER_CHECKOUT]

Every figure is of a process of its own, which has nothing but its imports (the compiled kernels and pyarrow among them)
when the clock starts. The scans are links to one made-up CT, so that the pages of all indexes show the same voxels; the
index says 13 organs of each. Another checkout takes turns with this one, round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import many_scans

from pgl_ray.data import scan_files

HERE = Path(__file__).parents[2]
SHAPE = (40, 160, 160)
PAIRS, SECONDS = 16, 4  # of a batch; of rendering after the first batch

CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet
from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import stream
from pgl_ray.data.intensity_ops import Intensity, apply_intensity
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.rendering import render

def mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

folder, num, pairs, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
view = render(np.zeros((20, 110, 110), np.int16), (16, 96, 96), np.zeros(3), (-1024, 325), 0, 300)
apply_intensity(view, Intensity(0.1, 1, 1.0, 1.1, 0.9))  # imports numba, loads the compiled kernels
before, began, cpu = mebibytes(), time.perf_counter(), time.process_time()
plan = stream.Plan.make([f"imagesTr__case_{i:07}" for i in range(num)], 1, pairs, 10**6 // num + 1, None, 0)
renderer = PairRenderer(folder, plan.scan_ids, 0, ViewsConfig(), IntensityConfig())
renderer(plan.columns(0, 1))
figures = {"first_s": time.perf_counter() - began, "first_cpu_s": time.process_time() - cpu}
figures["memory_mb"] = mebibytes() - before
step, began = 1, time.process_time()
while time.process_time() - began < seconds:
    renderer(plan.columns(step, step + 1))
    step += 1
print(json.dumps(figures | {"pairs_per_cpu_s": (step - 1) * pairs / (time.process_time() - began)}))
"""


def make_store(folder: Path, num: int) -> Path:
    """A store of links to one CT."""
    folder = many_scans.write_index(folder, np.tile(SHAPE, (num, 1)))
    smooth = np.random.default_rng(0).integers(-900, 300, np.floor_divide(SHAPE, (4, 16, 16)))
    volume = np.kron(smooth, np.ones((4, 16, 16))).astype(np.int16)
    scan_files.write_scan(folder, "one", volume, np.eye(4), hu_window=many_scans.WINDOW)
    one = (folder / "scans/one").rename(folder / "one")
    for i in range(num):
        (folder / f"scans/imagesTr__case_{i:07}").symlink_to(one)
    return folder


def measure(tree: Path, folder: Path, num: int, seconds: float = SECONDS) -> dict[str, float]:
    """Figures of one process that runs the package of a checkout."""
    command = [sys.executable, "-c", CHILD, str(folder), str(num), str(PAIRS), str(seconds)]
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tree)  # python -c looks there first
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="a rendering process as the index grows")
    parser.add_argument("--rows", default="100,1000,10000,100000", help="scans of the index")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", default="", help="other checkouts to compare with, separated by commas")
    args = parser.parse_args()
    trees = [*map(Path, filter(None, args.trees.split(","))), HERE]
    print(f"{'scans':>7} {'first batch, s':>15} {'its CPU s':>10} {'MiB':>7} {'pairs/CPU s':>12}  tree", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for num in map(int, args.rows.split(",")):
            folder, figures = make_store(Path(scratch) / str(num), num), {tree: [] for tree in trees}
            for _ in range(args.rounds):
                for tree in trees:
                    figures[tree].append(measure(tree, folder, num))
            for tree, rounds in figures.items():
                middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
                line = f"{num:7} {middle['first_s']:15.2f} {middle['first_cpu_s']:10.2f} {middle['memory_mb']:7.0f}"
                print(f"{line} {middle['pairs_per_cpu_s']:12.0f}  {tree}", flush=True)


if __name__ == "__main__":
    main()
