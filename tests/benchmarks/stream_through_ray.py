"""What Ray Data costs: pairs of views per second through it to one consumer, against as many processes as there are
cores that render the same pairs and hand them to nobody.

    python tests/benchmarks/stream_through_ray.py [folder of CTs] [rounds] [--batch=64,128] [--rows=64,1000,10000]

The two take turns of SECONDS, the other's processes stopped meanwhile, so that a machine that gets slower or faster
does it to both; the median of the turns' ratios counts. What the stream had ready when its turn comes is not counted.
An index of more rows than there are CTs lists them many times, each as a scan of its own. The same on real training is
what `python -m pgl_ray.bench` measures.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from stream_vs_peers import BODY, INTENSITY, VIEWS, our_store, read_volumes

from pgl_ray import bench
from pgl_ray.config import RayConfig
from pgl_ray.data import store, stream
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.scan_record import table_of
from pgl_ray.train import launch

SECONDS = 8
AHEAD = 16  # batches that a stream has ready, at most, when its turn comes


def main() -> None:
    parser = argparse.ArgumentParser(description="pairs of views per second through Ray Data and without it")
    parser.add_argument("folder", nargs="?", type=Path, default=BODY)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--batch", default="64,128", help="pairs of a block")
    parser.add_argument("--rows", default="64,1000,10000", help="scans of the index")
    parser.add_argument("--share", type=int, default=1, help="stream.pairs_per_region")
    args = parser.parse_args()
    batches, rows = ([int(number) for number in text.split(",")] for text in (args.batch, args.rows))
    heads = f"{'pairs/s: alone':>14} {'Ray Data':>9} {'share':>7} {'lowest':>7} {'highest':>8}"
    with tempfile.TemporaryDirectory() as scratch:
        small = our_store(read_volumes(args.folder), Path(scratch), "int16")
        stores = {num: repeated(small, num, Path(scratch)) for num in rows}
        launch.connect(RayConfig())
        print(f"{'block':>6} {'scans':>7} {heads} {'CPU ms/pair: alone':>19} {'Ray Data':>9}", flush=True)
        for size, num in [*((size, rows[0]) for size in batches), *((batches[-1], num) for num in rows[1:])]:
            turns = np.array(list(in_turn(*parts(stores[num], size, args.share), size, args.rounds)))
            rates, costs = np.median(turns, 0).T  # of [turn, way, figure]
            shares = turns[:, 1, 0] / turns[:, 0, 0]
            spread = f"{np.median(shares):7.0%} {shares.min():7.0%} {shares.max():8.0%}"
            line = f"{size:6} {num:7} {rates[0]:14.0f} {rates[1]:9.0f} {spread} {costs[0]:19.2f} {costs[1]:9.2f}"
            print(line, flush=True)


def repeated(index: store.Index, num: int, scratch: Path) -> store.Index:
    """A store of `num` scans, links to those of a small one."""
    folder = scratch / f"rows_{num}"
    (folder / "scans").mkdir(parents=True)
    scans = []
    for i in range(num):
        scan = index.scans[i % len(index.scans)]
        scans.append(replace(scan, scan_id=f"{i:07}_{scan.scan_id}"))
        (folder / "scans" / scans[-1].scan_id).symlink_to(Path(index.store) / "scans" / scan.scan_id)
    shutil.copy(Path(index.store) / "store.json", folder)
    (folder / "index.parquet").write_bytes(table_of(scans))
    return store.read_index(folder)


def parts(index: store.Index, batch: int, share: int) -> tuple[stream.Plan, PairRenderer]:
    ids = tuple(scan.scan_id for scan in index.scans)
    draws = 8 if share > 1 else 1
    plan = stream.Plan.make(ids, draws, batch, 10**6 // len(ids) + 1, None, 0, share)
    return plan, PairRenderer(index.store, ids, 0, VIEWS, INTENSITY, pairs_per_region=share)


def in_turn(plan: stream.Plan, renderer: PairRenderer, batch: int, rounds: int):
    """Pairs per second and CPU ms per pair of both ways, alone first, `rounds` times."""
    cores, context = os.cpu_count(), multiprocessing.get_context("spawn")
    start, results = context.Barrier(cores + 1), context.Queue()
    tasks = [(plan, renderer, batch, first, cores, start, results) for first in range(cores)]
    processes = [context.Process(target=render_rows, args=task, daemon=True) for task in tasks]
    for process in processes:
        process.start()
    coming = iter(bench.stream_of(plan, renderer, batch))
    for turn in range(rounds + 1):  # the first starts processes, opens files and compiles
        with stopped({process.pid for process in processes}):
            start.wait()
            measured = [results.get() for _ in processes]
        for _ in range(AHEAD):
            next(coming)
        num, began, cpu = 0, time.perf_counter(), bench.cpu_seconds()
        while time.perf_counter() - began < SECONDS:
            next(coming)
            num += batch
        wall, cpu = time.perf_counter() - began, bench.cpu_seconds() - cpu
        if turn:
            costs = 1000 * sum(seconds for *_, seconds in measured) / sum(pairs for pairs, *_ in measured)
            yield (sum(pairs / seconds for pairs, seconds, _ in measured), costs), (num / wall, 1000 * cpu / num)
    for process in processes:
        process.terminate()


@contextlib.contextmanager
def stopped(but: set[int]):
    """While it lasts, what this process has started stands still, but for some."""
    others = [process for process in psutil.Process().children(recursive=True) if process.pid not in but]
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def render_rows(plan: stream.Plan, renderer: PairRenderer, batch: int, first: int, every: int, start, results) -> None:
    """A process that renders blocks of the plan, from `first` on every `every`-th, at each turn of SECONDS."""
    torch.set_num_threads(1)
    k = first
    while True:
        start.wait()
        pairs, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < SECONDS:
            renderer(plan.columns(k, k + 1))
            k += every
            pairs += batch
        results.put((pairs, time.perf_counter() - began, time.process_time() - cpu))


if __name__ == "__main__":
    main()
