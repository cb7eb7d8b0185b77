"""What Ray Data costs: pairs of views per second through it to one consumer, against as many processes as there are
cores that render the same pairs and hand them to nobody.

    python tests/benchmarks/stream_through_ray.py [folder of CTs] [rounds] [--batch=64,128] [--rows=64,1000,10000]

Rounds are interleaved, the median of their ratios counts. Every round of the stream starts anew, so it is measured from
its 24th batch on, for SECONDS. An index of more rows than there are CTs lists them many times, each as a scan of its
own. The same on real training is what `python -m pgl_ray.bench` measures.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from stream_vs_peers import BODY, INTENSITY, VIEWS, our_store, read_volumes

from pgl_ray import bench
from pgl_ray.config import RayConfig
from pgl_ray.data import store, stream
from pgl_ray.train import launch

SECONDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="pairs of views per second through Ray Data and without it")
    parser.add_argument("folder", nargs="?", type=Path, default=BODY)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--batch", default="64,128", help="pairs of a block")
    parser.add_argument("--rows", default="64,1000,10000", help="scans of the index")
    parser.add_argument("--share", type=int, default=1, help="stream.pairs_per_region")
    args = parser.parse_args()
    batches, rows = ([int(number) for number in text.split(",")] for text in (args.batch, args.rows))
    with tempfile.TemporaryDirectory() as scratch:
        small = our_store(read_volumes(args.folder), Path(scratch), "int16")
        stores = {num: repeated(small, num, Path(scratch)) for num in rows}
        launch.connect(RayConfig())
        ways = {("without Ray", batches[-1], rows[0]): lambda: alone(stores[rows[0]], batches[-1], args.share)}
        for size in batches:
            ways["Ray Data", size, rows[0]] = lambda size=size: through_ray(stores[rows[0]], size, args.share)
        for num in rows[1:]:
            ways["Ray Data", batches[-1], num] = lambda num=num: through_ray(stores[num], batches[-1], args.share)
        rates = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, work in ways.items():
                rates[way].append(work())
                print(*way, [round(figure, 2) for figure in rates[way][-1]], flush=True)
    whole = next(iter(rates.values()))
    heads = f"{'block':>6} {'scans':>7} {'pairs/s':>9} {'share':>7} {'lowest':>7} {'highest':>8} {'CPU ms/pair':>12}"
    print(f"\n{'':<12} {heads}")
    for (name, size, num), values in rates.items():
        shares = [a / b for (a, _), (b, _) in zip(values, whole)]
        rate, cost = (statistics.median(figures) for figures in zip(*values))
        spread = f"{statistics.median(shares):7.0%} {min(shares):7.0%} {max(shares):8.0%}"
        print(f"{name:<12} {size:6} {num:7} {rate:9.0f} {spread} {cost:12.2f}")


def repeated(index: store.Index, num: int, scratch: Path) -> store.Index:
    """A store of `num` scans, links to those of a small one."""
    folder = scratch / f"rows_{num}"
    (folder / "scans").mkdir(parents=True)
    scans = []
    for i in range(num):
        scan = index.scans[i % len(index.scans)]
        scans.append(replace(scan, scan_id=f"{scan.scan_id}_{i}"))
        (folder / "scans" / scans[-1].scan_id).symlink_to(Path(index.store) / "scans" / scan.scan_id)
    shutil.copy(Path(index.store) / "store.json", folder)
    (folder / "index.parquet").write_bytes(store.table_of(scans))
    return store.read_index(folder)


def parts(index: store.Index, batch: int, share: int) -> tuple[stream.Plan, stream.PairRenderer]:
    ids = tuple(scan.scan_id for scan in index.scans)
    draws = 8 if share > 1 else 1
    plan = stream.Plan.make(ids, draws, batch, 10**6 // len(ids) + 1, None, 0, share)
    return plan, stream.PairRenderer(index.store, ids, 0, VIEWS, INTENSITY, pairs_per_region=share)


def through_ray(index: store.Index, batch: int, share: int) -> tuple[float, float]:
    """Pairs per second, and CPU ms of all processes per pair."""
    plan, renderer = parts(index, batch, share)
    done = bench._consume(bench._stream(plan, renderer, batch), SECONDS)
    pairs = done.num_batches * batch
    return pairs / done.wall_s, 1000 * done.cpu_s / pairs


def alone(index: store.Index, batch: int, share: int) -> tuple[float, float]:
    """The same of one rendering process per core, which take the blocks in turn."""
    context, cores = multiprocessing.get_context("spawn"), os.cpu_count()
    results, ready = context.Queue(), context.Barrier(cores)
    work = [context.Process(target=render, args=(index, batch, share, k, cores, ready, results)) for k in range(cores)]
    for process in work:
        process.start()
    found = [results.get() for _ in work]
    for process in work:
        process.join()
    pairs, seconds, cpu = (list(figures) for figures in zip(*found))
    return sum(n / s for n, s in zip(pairs, seconds)), 1000 * sum(cpu) / sum(pairs)


def render(index, batch, share, first, every, ready, results) -> None:
    torch.set_num_threads(1)
    plan, renderer = parts(index, batch, share)

    def block(k: int) -> None:
        renderer(plan.columns(k, k + 1))

    block(first)
    ready.wait()
    pairs, k, began, cpu = 0, first, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < SECONDS:
        k += every
        block(k)
        pairs += batch
    results.put((pairs, time.perf_counter() - began, time.process_time() - cpu))


if __name__ == "__main__":
    main()
