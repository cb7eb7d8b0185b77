"""What more workers cost: bytes per step and node count from the real network, step times of 1, 2 and 4 CPU workers.

python tests/benchmarks/scaling.py            the table, from shapes alone (needs no data)
python tests/benchmarks/scaling.py predict    also 8 to 512 GPUs, from what was measured here (scale_model.py)
python tests/benchmarks/scaling.py blocks     also blocks per second through Ray Data while nothing is rendered
python tests/benchmarks/scaling.py measure    also the steps of a small encoder under gloo, one thread a worker, and
                                              what the prediction says of them
"""

import os
import socket
import statistics
import sys
import time

import numpy as np
import psutil
import scale_model
import torch
from torch import nn

from pgl_ray import bench
from pgl_ray import config as c
from pgl_ray.data import stream
from pgl_ray.model.pgl import Pair
from pgl_ray.train import launch, networks, optim
from pgl_ray.train.one_step import train_step
from pgl_ray.train.writer import num_bytes

WORKERS = (1, 4, 8, 16, 64)


def costs(config: c.PretrainConfig) -> dict[str, float]:
    """Bytes, whatever the number of workers: gradient, BatchNorm statistics, a pair's views, a checkpoint."""
    net, _ = networks.build_pretraining(config)
    trained = [p for p in net.parameters() if p.requires_grad]
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    learnt = sum(part.num_features for part in norms if part.weight.requires_grad)
    state = {"model": net.state_dict(), "momentum": trained}
    return {
        "parameters": sum(p.numel() for p in trained),
        "gradient": sum(p.nbytes for p in trained),
        # forward: mean, 1 / standard deviation and count of every channel; backward: two sums of those that learn
        "norm_forward": sum(4 * (2 * part.num_features + 1) for part in norms),
        "norm_backward": 4 * 2 * learnt,
        "norms": len(norms),
        "norms_learnt": sum(part.weight.requires_grad for part in norms),
        "pair": 2 * 2 * torch.Size(config.views.size).numel(),
        "checkpoint": num_bytes(state),
    }


def per_worker(cost: dict[str, float], workers: int, batch: int) -> dict[str, float]:
    """MB that one worker sends per step; its share of the batch."""
    ring = 2 * (workers - 1) / workers
    gathered = (workers - 1) * cost["norm_forward"] + ring * cost["norm_backward"]
    return {
        "gradient": ring * cost["gradient"] / 1e6,
        "norm": gathered / 1e6,
        "data": batch / workers * cost["pair"] / 1e6,
        "pairs": batch / workers,
    }


def table(config: c.PretrainConfig) -> str:
    cost = costs(config)
    lines = [
        f"{cost['parameters']:,} trained parameters, gradient {cost['gradient'] / 1e6:.0f} MB, "
        f"{cost['norms']} BatchNorms, a pair {cost['pair'] / 1e6:.2f} MB, "
        f"a checkpoint {cost['checkpoint'] / 1e6:.0f} MB",
        "| workers | pairs each | all-reduce, MB | SyncBN, MB | views, MB |",
        "|---|---|---|---|---|",
    ]
    for workers in WORKERS:
        row = per_worker(cost, workers, config.global_batch_size)
        lines.append(
            f"| {workers} | {row['pairs']:g} | {row['gradient']:.0f} | {row['norm']:.1f} | {row['data']:.1f} |"
        )
    return "\n".join(lines)


def work(rank: int, world: int, port: int, seconds: float, answers) -> None:
    """Trains on one batch; tells the wall and CPU seconds per step."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    values = {"index": "none", "run": "none", "encoder": {"width": 16, "depths": (1, 1, 1, 1)}}
    config = c.build(c.PretrainConfig, values | {"heads": {"hidden": 256, "out": 64}})
    net, _ = networks.build_pretraining(config)
    model = net
    if world > 1:
        model = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    lars = optim.build_pretraining(net, config.optim)
    schedule = optim.warmup_cosine(lars, 1, 10**6)
    size, generator = config.views.size, torch.Generator().manual_seed(rank)
    views = [torch.randn(4, 1, *size, generator=generator) for _ in range(2)]
    boxes = [torch.tensor([[k, k + 20], [k, k + 110], [k, k + 110]]).expand(4, 3, 2) for k in (0, 3)]
    flips = torch.zeros(4, 3, dtype=torch.bool)
    pair, autocast = Pair(*views, *boxes, flips, flips), torch.autocast("cpu", enabled=False)
    steps, wall, cpu = 0, 0.0, 0.0
    while wall < seconds or steps < 2:
        if steps == 0:  # the second one lays out DDP's buckets
            for _ in range(2):
                train_step(model, net, lars, schedule, pair, 0.99, autocast)
        began, used = time.perf_counter(), time.process_time()
        train_step(model, net, lars, schedule, pair, 0.99, autocast)
        enough = torch.tensor(float(wall + time.perf_counter() - began))
        if world > 1:
            torch.distributed.broadcast(enough, 0)  # all of them end at the same step
        wall, cpu, steps = float(enough), cpu + time.process_time() - used, steps + 1
    answers.put((rank, wall / steps, cpu / steps, exchange_s(net) if world > 1 else 0.0))


def exchange_s(net: nn.Module, repeats: int = 20) -> float:
    """CPU seconds of this worker's part of adding up gradients, and nothing else."""
    gradients = torch.zeros(sum(p.numel() for p in net.parameters() if p.requires_grad))
    torch.distributed.all_reduce(gradients)
    used = time.process_time()
    for _ in range(repeats):
        torch.distributed.all_reduce(gradients)
    return (time.process_time() - used) / repeats


def measure(rounds: int = 5, seconds: float = 6.0) -> None:
    """Interleaved rounds of 1, 2 and 4 workers; medians of the ratios."""
    context = torch.multiprocessing.get_context("spawn")
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    cpu: dict[int, list[float]] = {1: [], 2: [], 4: []}
    exchange: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for number in range(rounds):
        for world in rates:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            answers = context.SimpleQueue()
            children = [
                context.Process(target=work, args=(rank, world, port, seconds, answers)) for rank in range(world)
            ]
            for child in children:
                child.start()
            timings = [answers.get() for _ in children]
            for child in children:
                child.join()
            rates[world].append(world / max(wall for _, wall, *_ in timings))
            cpu[world].append(statistics.mean(used for *_, used, _ in timings))
            exchange[world].append(statistics.mean(spent for *_, spent in timings))
        listed = ", ".join(
            f"{world}: {4 * rates[world][-1]:.1f} pairs/s, {cpu[world][-1]:.2f} CPU s a step" for world in rates
        )
        print(f"round {number + 1}, load {os.getloadavg()[0]:.1f}: {listed}", flush=True)
    for world in (2, 4):
        ratio = statistics.median(many / one for many, one in zip(rates[world], rates[1], strict=True))
        spent = statistics.median(many / one for many, one in zip(cpu[world], cpu[1], strict=True))
        print(f"{world} workers: {ratio:.2f} x the pairs/s of 1; CPU time per worker and step {spent:.2f} x")
        own, others = statistics.median(cpu[1]), statistics.median(exchange[world])
        said = scale_model.speedup(world, os.cpu_count() or 1, own, others)
        print(f"    predicted {said:.2f} x, from a step of {own:.2f} CPU s and an exchange of {1000 * others:.0f} ms")


def prediction(cost: dict[str, float], gpus=(8, 32, 128, 512), scans=(10**4, 10**6)) -> str:
    """What each part allows, in pairs/s of the whole run, and which comes first; a markdown table and some lines."""
    figures = scale_model.measured()
    lines = [
        "| GPUs | themselves, 32 / 128 pairs each | cores, K=1 / K=8 on the GPU | bucket, K=1 / K=8 | coordinator, "
        "32 / 128 pairs | first limit | lost to faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for num in gpus:
        slow, fast = (scale_model.Run(num, scans[0], 32), scale_model.Run(num, scans[0], 128, 8, True))
        least, most = (scale_model.limits(run, cost, figures) for run in (slow, fast))
        cells = [f"{least[name]:,.0f} / {most[name]:,.0f}" for name in ("GPUs", "renderers", "bucket", "coordinator")]
        said = [scale_model.predict(run, cost, figures) for run in (slow, fast)]
        first = " / ".join(dict.fromkeys(one["limit"] for one in said))
        lost = f"{said[0]['lost_share']:.2%} / {said[1]['lost_share']:.2%}"
        lines.append(f"| {num} | {' | '.join(cells)} | {first} | {lost} |")
    for num in scans:
        said = scale_model.predict(scale_model.Run(gpus[-1], num, 128), cost, figures)
        lines.append(
            f"{num:,} scans: {said['index_mb']:.0f} MB of index in a rendering process, {said['store_gb']:.1f} GB of "
            f"blocks in a node's object store, a checkpoint written in {said['write_share']:.0%} of the time between"
        )
    for num in gpus:
        part = scale_model.step_s(scale_model.Run(num, scans[0]), cost)
        parts = ", ".join(f"{name} {1000 * part[name]:.0f} ms" for name in ("computing", "gradients", "norms"))
        lines.append(f"{num} GPUs, 32 pairs each, a step: {parts}")
    return "\n".join(lines)


class Empty:
    """A renderer that renders nothing: index rows -> a column of zeros."""

    def __init__(self, row_bytes: int):
        self.row_bytes = row_bytes

    def __call__(self, rows):
        return dict(rows) | {"view": np.zeros((len(rows["step"]), self.row_bytes), np.uint8)}


def blocks(seconds: float = 12.0) -> None:
    """What a block costs Ray Data, and the process that coordinates: this one."""
    launch.connect(c.RayConfig())
    this = psutil.Process()
    for pairs, row_bytes in ((128, 100), (32, 589_824)):
        plan = stream.Plan.make([f"{i:07}" for i in range(10**4)], 1, pairs, 10**5, None, 0)
        coming = iter(bench.stream_of(plan, Empty(row_bytes), pairs))
        for _ in range(60):  # processes start
            next(coming)
        num, began, all_cpu, own = 0, time.perf_counter(), bench.cpu_seconds(), sum(this.cpu_times()[:2])
        while time.perf_counter() - began < seconds:
            next(coming)
            num += 1
        ends = (bench.cpu_seconds() - all_cpu, sum(this.cpu_times()[:2]) - own)
        costs = [1000 * spent / num for spent in ends]
        print(
            f"blocks of {pairs * row_bytes / 1e6:.1f} MB: {num / (time.perf_counter() - began):.1f} a second; CPU ms "
            f"of each: {costs[0]:.1f}, of them in the coordinator {costs[1]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    settings = c.build(c.PretrainConfig, {"index": "none", "run": "none"})
    print(table(settings))
    if "blocks" in sys.argv:
        blocks()
    if "predict" in sys.argv:
        print(prediction(costs(settings)))
    if "measure" in sys.argv:
        measure()
