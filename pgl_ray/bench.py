"""python -m pgl_ray.bench [file.yaml] index=STORE [a.b=c ...]: what a pre-training would spend its time on here.

Times one core that renders views and one training step on a batch that is there already, each without the other, and
says which of them limits the configured run and how long that would take on this machine.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pgl_ray.config import BenchConfig, command
from pgl_ray.data import store
from pgl_ray.model.inference import pick_device
from pgl_ray.model.pgl import Pair
from pgl_ray.pretrain import build_model, make_plan, make_renderer, train_step
from pgl_ray.train import launch, optim


@dataclass(frozen=True)
class Result:
    """Rates of this machine and what they mean for the configured run.

    Attributes:
        data_pairs_per_s: finished view pairs of one core.
        step_pairs_per_s: pairs that the training step takes, one worker.
        cores: of this machine.
        num_pairs: of the configured run.
        hours: of the configured run with one worker on this machine.
        limit: "data" or "step".
    """

    data_pairs_per_s: float
    step_pairs_per_s: float
    cores: int
    num_pairs: int
    hours: float
    limit: str


def run(config: BenchConfig) -> Result:
    """Measures; nothing is written.

    Raises:
        ValueError: wrong config or no store.
    """
    index = store.read_index(config.index)
    plan = make_plan(config, index)
    renderer = make_renderer(config, index, plan)
    rng = np.random.default_rng(config.seed)

    # data only, one core
    def render() -> dict[str, np.ndarray]:
        scans = rng.integers(len(plan.scan_ids), size=config.bench_pairs)
        epochs = rng.integers(2**31, size=config.bench_pairs)
        return renderer({"step": np.zeros_like(scans), "epoch": epochs, "scan": scans, "draw": np.zeros_like(scans)})

    data = config.bench_pairs / _median_seconds(render, config.bench_repeats)

    # step only, all cores or the GPU
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.train.threads_per_worker or cores)
    device = pick_device(config.train.device)
    batch = {key: torch.from_numpy(value).to(device) for key, value in render().items()}
    torch.set_num_threads(config.train.threads_per_worker or cores)  # a renderer takes one
    step = config.bench_pairs / _median_seconds(_step(config, device, Pair.from_batch(batch)), config.bench_repeats)

    num_pairs = plan.num_steps * plan.global_batch_size
    limit = "data" if data * cores < step else "step"
    hours = num_pairs / min(data * cores, step) / 3600
    return Result(data, step, cores, num_pairs, hours, limit)


def _step(config: BenchConfig, device: torch.device, pair: Pair) -> Callable[[], None]:
    net = build_model(config)[0].to(device).train()
    lars = optim.build_lars(net, config.optim)
    schedule = optim.warmup_cosine(lars, 1, 2**31)
    autocast = launch.autocast(device, config.train.precision)

    def step() -> None:
        train_step(net, net, lars, schedule, pair, config.ema_decay, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time, after one call that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def describe(result: Result) -> str:
    """A table, the sentence that matters, and the closing line."""
    data = result.data_pairs_per_s * result.cores
    mend = {
        "data": "views limit it: give it more CPU cores",
        "step": "the training step limits it: a GPU or a smaller encoder helps, more CPU cores for the views do not",
    }[result.limit]
    return (
        f"  views, one core       {result.data_pairs_per_s:8.1f} pairs/s\n"
        f"  views, {result.cores:3d} cores      {data:8.1f} pairs/s\n"
        f"  training step         {result.step_pairs_per_s:8.1f} pairs/s\n"
        f"  {mend}\n"
        f"bench: {result.num_pairs:,} pairs would take {result.hours:.1f} hours here with one worker"
    )


def main() -> None:
    command("bench", BenchConfig, run, describe)


if __name__ == "__main__":
    main()
