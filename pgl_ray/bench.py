"""python -m pgl_ray.bench [file.yaml] index=STORE [a.b=c ...]: what a pre-training would spend its time on here.

Times the stream of views alone, through Ray Data; the training step alone, on a batch that is there already; and both
together. Says which of them limits the configured run, what to change, and how long the run would take.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("bench")

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pgl_ray.config import BenchConfig, RayConfig
from pgl_ray.data import pair_renderer, render_costs, store, stream
from pgl_ray.data.batch_views import finish
from pgl_ray.data.system import keep_freed_memory, num_cores
from pgl_ray.data.trainings import make_plan, make_renderer
from pgl_ray.model import device as on
from pgl_ray.model.inference import pick_device
from pgl_ray.model.pgl import Pair
from pgl_ray.train import launch, optim
from pgl_ray.train.networks import build_pretraining
from pgl_ray.train.one_step import train_step
from pgl_ray.train.step_cost import await_device, cost_of, median_seconds

STAGES = ("draw", "read", "decode", "resize", "intensity", "transport")  # of the stream
MORE_CORES = "render on more CPU cores"
GPU_FLOPS = 100e12  # per s that the paper's network reached on an H200, compiled: tests/benchmarks/README.md, "A GPU"
CPU = torch.device("cpu")
CPU_PAIRS = 8  # most view pairs of a timed step there; on a GPU all of a worker's
WAITS = 0.1  # share of the time that the step may wait before the stream counts as what limits the run


@dataclass(frozen=True)
class Result:
    """Rates of this machine and what they mean for the configured run.

    Attributes:
        data_pairs_per_s: through Ray Data to one consumer that does nothing else.
        step_pairs_per_s: that the training step takes, one worker.
        both_pairs_per_s: with the stream and the step side by side.
        wait_share: share of that time in which the step waits for the stream.
        stage_ms: CPU ms per pair of each of `STAGES`, on one core.
        mend: what to change where the stream limits the run.
        place, place_ms, place_requests, place_bytes: where the store lies; for how long, how many requests (none to a
            folder) and how many bytes one rendering process waits per pair.
        read_ratio: bytes read per pair over those of its two crops.
        cores, num_workers: of this machine; of the configured run.
        num_pairs: of the configured run.
        tflop_per_pair: of the training step.
        memory_gib: of one worker's training at the configured batch size, measured or estimated.
        device: "cuda" or "cpu".
        limit: "data" or "step"; on a GPU, whether the stream is slower than the steps of all workers together.
        uncompiled: what of the step torch.compile left as it is, in a line.
    """

    data_pairs_per_s: float
    step_pairs_per_s: float
    both_pairs_per_s: float
    wait_share: float
    stage_ms: dict[str, float]
    mend: str
    place: str
    place_ms: float
    place_requests: float
    place_bytes: float
    read_ratio: float
    cores: int
    num_workers: int
    num_pairs: int
    tflop_per_pair: float
    memory_gib: float
    device: str
    limit: str
    uncompiled: str | None = None

    @property
    def hours(self) -> float:
        """Of the configured run on this machine: every worker has a GPU like this one and all cores render; without a
        GPU, stream and step share the cores, so what both reached together counts."""
        if self.device != "cuda":
            return self.num_pairs / self.both_pairs_per_s / 3600
        return self.num_pairs / min(self.data_pairs_per_s, self.step_pairs_per_s * self.num_workers) / 3600


def run(config: BenchConfig) -> Result:
    """Measures; nothing is written.

    Raises:
        ValueError: wrong config or no store.
        FailedRun: no Ray cluster.
    """
    _refuse_cluster(config.ray)
    device = pick_device(config.train.device, "train.device")
    on.check_training_precision(device.type, config.train.precision)
    index = store.read_index(config.index)
    plan = make_plan(config, index)
    renderer = make_renderer(config, index, plan, device.type == "cuda")
    cores, worker_batch = num_cores(), config.global_batch_size // config.train.num_workers
    num_pairs = worker_batch if device.type == "cuda" else min(worker_batch, CPU_PAIRS)

    # the stages of rendering, one core
    rows = _rows(plan, max(worker_batch, num_pairs))
    costs = render_costs.measure(renderer, rows)
    place = index.store, *(costs.pop(name) for name in ("place", "place_requests", "place_bytes"))
    read_ratio = costs.pop("bytes_read") / costs.pop("crop_bytes")

    # step only, all cores or the GPU
    timed = _time_step(config, device, index.hu_window, renderer, rows, num_pairs)

    # the stream only: pairs that are ready made, which leaves the transport, then real ones
    launch.connect(config.ray)
    given = renderer({name: np.resize(column, worker_batch) for name, column in rows.items()})

    def ready_made(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return given | rows

    transported = _consume(stream_of(plan, ready_made, worker_batch), config.bench_s)
    costs["transport"] = 1000 * transported.cpu_s / (transported.num_batches * worker_batch)
    data = _consume(stream_of(plan, renderer, worker_batch), config.bench_s)
    data_rate = data.num_batches * worker_batch / data.wall_s

    # both, batches of the step's size
    both = _consume(stream_of(plan, renderer, num_pairs, device), config.bench_s, timed.step)
    waits, needs = both.wait_s / both.wall_s, timed.pairs_per_s * config.train.num_workers
    starved = data_rate < needs if device.type == "cuda" else waits > WAITS
    return Result(
        data_rate,
        timed.pairs_per_s,
        both.num_batches * num_pairs / both.wall_s,
        waits,
        costs,
        mend_of(_dearest(costs, place[1]), config, index, device.type == "cuda"),
        *place,
        read_ratio,
        cores,
        config.train.num_workers,
        plan.num_steps * plan.global_batch_size,
        timed.flops / 1e12,
        timed.memory / 2**30,
        device.type,
        "data" if starved else "step",
        timed.uncompiled,
    )


def _rows(plan: stream.Plan, num: int) -> dict[str, np.ndarray]:
    """The plan's first rows, at most 64; of pairs that share regions as many as are shuffled together."""
    num = stream.REGIONS_MIXED * plan.pairs_per_region if plan.pairs_per_region > 1 else min(num, 64)
    rows = plan.columns(0, -(-num // plan.global_batch_size))
    return {name: column[:num] for name, column in rows.items()}


class _Step(NamedTuple):
    """A training step, its pairs per second, FLOP per pair, bytes on the device, and what was not compiled."""

    step: Callable[[dict], None]
    pairs_per_s: float
    flops: float
    memory: float
    uncompiled: str | None


def _time_step(
    config: BenchConfig,
    device: torch.device,
    hu_window: tuple[float, float],
    renderer: pair_renderer.PairRenderer,
    rows: dict[str, np.ndarray],
    num_pairs: int,
) -> _Step:
    """Times the step on a batch that is there already."""
    num_threads = config.train.threads_per_worker or num_cores()
    torch.set_num_threads(num_threads)
    net = on.lay_out(build_pretraining(config)[0], device).train()
    if config.train.recompute:
        on.recompute(net.get_submodule("online.encoder"))
    step = _step(config, device, net, hu_window)
    ready = renderer({name: np.resize(column, num_pairs) for name, column in rows.items()})
    if device.type == "cpu":
        keep_freed_memory(2**31 - 1)  # as a worker does
    batch = {name: torch.from_numpy(value).to(device) for name, value in ready.items()}
    flops, memory = cost_of(step, batch, net, config.global_batch_size // config.train.num_workers)
    on.compiled(net, device, config.train.compile, config.train.num_workers)
    step(batch)  # compiles
    uncompiled = on.uncompiled()
    return _Step(step, num_pairs / median_seconds(lambda: step(batch), device), flops, memory, uncompiled)


def stream_of(plan: stream.Plan, render: Callable, batch_size: int, device: torch.device = CPU) -> on.Batches:
    """Batches of a plan through Ray Data, cut for one worker and brought to its device."""
    steps = 2**31 // batch_size
    cut = stream.Plan(plan.scan_ids, plan.draws_per_scan, batch_size, steps, plan.seed, plan.pairs_per_region)
    data = stream.dataset(cut, render, 1, 0, launch.RENDER_CPUS, stop=2**16)
    options = {"prefetch_batches": 2, "drop_last": True, "pin_memory": device.type == "cuda"}
    batches = data.iterator().iter_torch_batches(batch_size=batch_size, device="cpu", **options)
    return on.Batches(batches, device, stream.ABOUT_ROWS)


@dataclass(frozen=True)
class _Consumed:
    num_batches: int
    wall_s: float
    wait_s: float
    cpu_s: float


def _consume(batches: on.Batches, seconds: float, work: Callable[[dict], None] | None = None) -> _Consumed:
    """Takes batches for some time, after those that wait for processes to start or lie ready in buffers."""
    num, began, cpu, coming = 0, time.perf_counter(), 0.0, iter(batches)
    next(coming)
    for part, least in ((seconds / 2, 0 if work else 24), (seconds, 1)):
        await_device(batches.device)
        batches.waited_s()
        num, began, cpu = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - began < part or num < least:
            batch = next(coming)
            if work:
                work(batch)
            num += 1
    await_device(batches.device)
    return _Consumed(num, time.perf_counter() - began, batches.waited_s(), cpu_seconds() - cpu)


def _refuse_cluster(ray: RayConfig) -> None:
    """Refuses a cluster that others' nodes are part of: the figures are this machine's."""
    for name, address, mend in (
        ("ray.address", ray.address, "ray.address=null"),
        ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"), "env -u RAY_ADDRESS python -m pgl_ray.bench ..."),
    ):
        if address and address != "local":
            raise ValueError(f"{name}={address}: bench measures the machine it runs on, no cluster: take {mend}")


def cpu_seconds() -> float:
    """CPU time so far of this process and all it has started, Ray's on this machine included."""
    import psutil

    total, this = 0.0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended since
            continue
        total += times.user + times.system
    return total


def _step(
    config: BenchConfig, device: torch.device, net: nn.Module, hu_window: tuple[float, float]
) -> Callable[[dict], None]:
    optimizer = optim.build_pretraining(net, config.optim)
    schedule = optim.warmup_cosine(optimizer, 1, 2**31)
    autocast = on.autocast(device, config.train.precision)

    def step(batch: dict[str, torch.Tensor]) -> None:
        pair = Pair.from_batch(finish(batch, config.views.size, config.intensity, hu_window))
        train_step(net, net, optimizer, schedule, pair, config.ema_decay, autocast)

    return step


def describe(result: Result) -> str:
    """A table, the sentence that matters, and the closing line."""
    stages = ", ".join(f"{name} {result.stage_ms[name]:.2f}" for name in STAGES)
    worst, needs = _dearest(result.stage_ms, result.place_ms), result.step_pairs_per_s * result.num_workers
    waits = f"the step waits for the stream {result.wait_share:.0%} of the time"
    if result.limit == "data":
        waits = waits if result.num_workers == 1 else f"{result.num_workers} workers want {needs:,.0f} pairs/s"
        mend = f"The stream limits the run ({waits}), {worst} most of all: {result.mend}."
    elif result.device == "cuda":
        mend = f"The training step limits the run ({waits}): more or faster GPUs help, more CPU cores do not."
    else:
        mend = f"The training step limits the run ({waits}): train on a GPU or take a smaller encoder."
    gpu_hours = result.num_pairs * result.tflop_per_pair * 1e12 / GPU_FLOPS / 3600
    planned = f"about {_amount(gpu_hours)} GPU-hours on an H200 at {GPU_FLOPS / 1e12:.0f} TFLOP/s"
    if result.device == "cuda":
        planned = f"{_amount(result.hours * result.num_workers)} GPU-hours here, {planned}"
    requests = f"{result.place_requests:.1f} requests and " if result.place_requests else ""
    kind = "measured" if result.device == "cuda" else "float32, estimated; bfloat16 takes about half"
    note = f"  {result.uncompiled}\n" if result.uncompiled else ""
    return (
        f"  data only, {result.cores:3d} cores  {result.data_pairs_per_s:8.1f} pairs/s\n"
        f"  step only             {result.step_pairs_per_s:8.1f} pairs/s\n"
        f"  both                  {result.both_pairs_per_s:8.1f} pairs/s, {waits}\n"
        f"  CPU ms per pair       {stages}\n"
        f"  the store's place     {1000 / result.place_ms:8.1f} pairs/s at most per rendering process, "
        f"{requests}{result.place_bytes / 1e6:.1f} MB each from {result.place}\n"
        f"  bytes read            {result.read_ratio:8.2f} times the crops' own\n"
        f"  training              {result.tflop_per_pair:8.3f} TFLOP per pair; {planned}\n"
        f"  memory per worker     {result.memory_gib:8.1f} GiB ({kind})\n"
        f"{note}"
        f"  {mend}\n"
        f"bench: {result.num_pairs:,} pairs would take {_amount(result.hours)} hours here with "
        f"{result.num_workers} worker{'s' if result.num_workers > 1 else ''}"
    )


def _dearest(stage_ms: dict[str, float], place_ms: float) -> str:
    """The stage of the stream that limits it: its dearest, or the store's place where that takes longer than all."""
    return "its place" if place_ms > sum(stage_ms.values()) else max(STAGES, key=stage_ms.__getitem__)


def mend_of(stage: str, config: BenchConfig, index: store.Index, cuda: bool) -> str:
    """What helps where a stage is the dearest, of what is not done yet."""
    ways = []
    if stage == "read":
        ways.append("keep the store on a faster disk, or in memory")
    if stage == "its place":
        ways.append("copy the store to a disk of the nodes, or to a bucket nearer by")
    if stage in ("read", "decode", "its place"):
        if config.stream.pairs_per_region == 1:
            ways.append(
                "take stream.pairs_per_region=8 with pairs_per_scan=8, an eighth of the epochs and of "
                "optim.warmup_epochs"
            )
        if "scale_factor" not in json.loads(index.scans[0].array_metadata).get("attributes", {}):
            ways.append("a store prepared with encoding=uint8")
    if cuda and config.method != "genesis":
        if stage == "intensity":
            ways.append("set stream.on_gpu=intensity")
        elif stage == "resize" and config.stream.on_gpu != "all":
            ways.append("set stream.on_gpu=all")
    if stage == "transport":
        ways.append("take a larger global_batch_size")
    return ", or ".join([*ways, MORE_CORES])


def _amount(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"
