"""Pairs per second of one rendering process: from a folder, and from a bucket some milliseconds away.

    python tests/benchmarks/stream_from_bucket.py [folder of CTs] [--latency-ms 30] [--seconds 5] [--rounds 3]

The bucket is tests/far_bucket.py on this machine, whose process takes its share of the cores. Pairs of 16x96x96 views
with all of the paper's operations in blocks of 128 rows; nothing is remembered of a scan from one visit to the next, as
in a store of very many. Ways take turns, the median counts. With --tree another checkout renders, too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]

WAYS = ("folder", "bucket", "bucket, no chunks.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description="pairs per second from a bucket at the end of a long wire")
    parser.add_argument("folder", nargs="?", type=Path, help="of .nii.gz; default: what stream_vs_peers.py takes")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="that each answer is late by")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree", type=Path, help="another checkout, e.g. of an earlier commit")
    parser.add_argument("--turns", help=argparse.SUPPRESS)  # a process that renders: the store's URL and K
    args = parser.parse_args()
    if args.turns:
        take_turns(*args.turns.rsplit(" ", 1), args.seconds)
        return
    import shutil

    import stream_vs_peers as peers
    from far_bucket import Served

    with tempfile.TemporaryDirectory() as scratch:
        volumes = {
            name: peers.enlarged(volume) for name, volume in peers.read_volumes(args.folder or peers.BODY).items()
        }
        near = Path(peers.our_store(volumes, Path(scratch), "int16").store)
        old = shutil.copytree(near, Path(scratch, "old"))
        (old / "chunks.parquet").unlink(missing_ok=True)
        with Served(scratch, args.latency_ms / 1000) as far:
            urls = dict(zip(WAYS, (str(near), f"s3://far/{near.name}", "s3://far/old"), strict=True))
            trees = {"": ROOT} | ({"other tree: ": args.tree} if args.tree else {})
            for num in (1, 8):
                race(
                    far,
                    {f"{which}{way}": (tree, f"{urls[way]} {num}") for which, tree in trees.items() for way in WAYS},
                    args,
                )


def race(far, ways: dict[str, tuple[Path, str]], args: argparse.Namespace) -> None:
    """Runs the ways in turns and prints a line of each."""
    processes = {}
    for name, (tree, turns) in ways.items():
        command = [sys.executable, __file__, "--seconds", str(args.seconds), "--turns", turns]
        environment = os.environ | far.environment | {"PYTHONPATH": str(tree)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen(command, env=environment, cwd=tree, **pipes)
        assert processes[name].stdout.readline() == "ready\n"
    rates, costs, asked = ({name: [] for name in ways} for _ in range(3))
    for _ in range(args.rounds):
        for name, process in processes.items():
            far.counts()
            process.stdin.write("go\n")
            process.stdin.flush()
            num, wall, cpu = map(float, process.stdout.readline().split())
            counts = far.counts()
            rates[name].append(num / wall)
            costs[name].append(1000 * cpu / num)
            asked[name].append([(counts["GET"] + counts["HEAD"]) / num, counts["BYTES"] / num / 1e6])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    for name, (_, turns) in ways.items():
        requests, size = map(statistics.median, zip(*asked[name], strict=True))
        print(
            f"K = {turns.rsplit(' ', 1)[1]}, {name:<40} {statistics.median(rates[name]):7.1f} pairs/s "
            f"({min(rates[name]):.0f}-{max(rates[name]):.0f}), {statistics.median(costs[name]):5.2f} CPU ms, "
            f"{requests:5.2f} requests and {size:5.2f} MB per pair",
            flush=True,
        )


def take_turns(url: str, pairs_per_region: str, seconds: float) -> None:
    """Renders for some time whenever a line comes in; prints pairs, wall and CPU seconds."""
    from pgl_ray.config import IntensityConfig, ViewsConfig
    from pgl_ray.data import pair_renderer, render_cache, store, stream

    ids, share = tuple(scan.scan_id for scan in store.read_index(url).scans), int(pairs_per_region)
    opened_anew = render_cache.volume_reader.__wrapped__  # for each visit
    render_cache.volume_reader = pair_renderer.volume_reader = opened_anew
    plan = stream.Plan.make(ids, 2**16, 128, 1, 4096, 0, share)
    render = pair_renderer.PairRenderer(url, ids, 0, ViewsConfig(), IntensityConfig(), pairs_per_region=share)
    render(plan.columns(0, 1))
    print("ready", flush=True)
    step = 1
    for _ in sys.stdin:
        began, cpu, num = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds:
            render(plan.columns(step, step + 1))
            num, step = num + 128, step + 1
        print(num, time.perf_counter() - began, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
