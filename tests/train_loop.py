"""The doors' training loops without Ray: what Ray Train and Ray Data give a worker, given by the test.

Each worker is a process of its own under gloo; the stream is the plan's rows, rendered where they are asked for. On a
GPU the one worker is this process, and others render ahead of it.
"""

import collections
import contextlib
import faulthandler
import math
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Set
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from pgl_ray import config as c
from pgl_ray import finetune, pretrain
from pgl_ray.data import patch_renderer, scan_files, store, stream, system, trainings
from pgl_ray.data.facts import training_facts
from pgl_ray.model import device as on
from pgl_ray.train import checkpoint, networks, optim, runs, watch
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.quiet import QUIET
from pgl_ray.train.run_files import STATE
from pgl_ray.train.session import Place, Session

ENCODER = {"width": 4, "depths": [1, 1, 1, 1]}


SLOW_DISK_S = 5.0  # longer than any disk; storage that a test breaks is not waited for
ENDLESS_S = math.inf


class Killed(Exception):
    """Stands for a worker's death."""


def scans(folder: Path, num: int = 6, shape: tuple = (20, 40, 48)) -> Path:
    """A store of smooth random volumes, each with a label."""
    for i in range(num):
        rng = np.random.default_rng(i)
        volume = np.kron(rng.integers(-800, 300, (5, 5, 6)), np.ones((4, 8, 8))).astype(np.int16)[
            tuple(map(slice, shape))
        ]
        label = (volume > 0).astype(np.uint8)
        scan_files.write_scan(folder, f"s{i}", volume, np.eye(4), split="train", label=label, labelled=(1,))
    store.write_index(folder, {"organ": 1}, (-1024.0, 325.0))
    return folder


def pretraining(where: Path, run: Path, **changes) -> c.PretrainConfig:
    values = {"index": str(where), "run": str(run), "max_steps": 6, "global_batch_size": 4, "encoder": ENCODER}
    values |= {"views": {"size": [8, 16, 32]}, "heads": {"hidden": 8, "out": 4}, "optim": {"lr": 1.0}}
    values |= {"health": {"every": 3}, "train": {"log_every": 1, "checkpoint_every": 2, "threads_per_worker": 1}}
    return c.build(c.PretrainConfig, OmegaConf.to_container(OmegaConf.merge(values, changes)))


def finetuning(where: Path, run: Path, **changes) -> c.FinetuneConfig:
    values = {"index": str(where), "run": str(run), "max_steps": 6, "global_batch_size": 4, "encoder": ENCODER}
    values |= {"patch": {"size": [16, 32, 32]}, "validate_every": 2, "patches_per_scan": 1, "foreground_share": 0.5}
    values |= {"train": {"log_every": 1, "checkpoint_every": 2, "threads_per_worker": 1}}
    return c.build(c.FinetuneConfig, OmegaConf.to_container(OmegaConf.merge(values, changes)))


def train(
    config,
    world: int = 1,
    until: int | None = None,
    seen: Callable[[int, dict], None] | None = None,
    device: str = "cpu",
    renderers: int = 0,
) -> str | None:
    """Trains on `world` workers, which die when they ask for the batch of step `until`; rank 0's answer.

    A GPU (`device=cuda`) takes one worker, which is this process, and `renderers` processes make its batches: they are
    forked before CUDA is used, so each such training needs a process of its own. Nothing dies or is seen there.
    """
    in_this_process = bool(renderers) or device != "cpu"
    assert not in_this_process or (world == 1 and renderers and until is None and seen is None)
    index = store.read_index(config.index)
    kind = finetune if isinstance(config, c.FinetuneConfig) else pretrain
    if kind is pretrain:
        plan = trainings.make_plan(config, index)
        render = trainings.make_renderer(config, index, plan)
        given = {"hu_window": list(index.hu_window), "data": training_facts(index, plan.scan_ids)}
    else:
        train_ids, val_ids = trainings.split_scans(config, index)
        plan = stream.Plan.make(
            train_ids, config.patches_per_scan, config.global_batch_size, config.epochs, config.max_steps, config.seed
        )
        own = config.patch, config.intensity, config.foreground_share
        render = patch_renderer.PatchRenderer(index.store, plan.scan_ids, config.seed, *own)
        given = {"meta": networks.build_finetuning(config, index, finetune.begun(config))[1], "val_ids": val_ids}
    folder = runs.open_run(config, kind.__name__.split(".")[1], {"plan": plan.identity, "num_steps": plan.num_steps})
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # here: each child would take seconds for them otherwise
    import tensorboardX  # noqa: F401

    render({name: column[:1] for name, column in plan.columns(0, 1).items()})
    optim.build_lars(torch.nn.Linear(1, 1), c.PretrainOptimConfig(lr=1, weight_decay=0))
    optim.build_finetuning(torch.nn.Linear(1, 1), c.FinetuneOptimConfig())

    faulthandler.cancel_dump_traceback_later()  # pytest's: a fork of a process that has one can have none of its own
    torch.set_num_threads(1)  # before the fork: OpenMP's threads do not survive it
    given |= {"config": config.model_dump_json(), "run": folder, "plan": plan}
    with _rendering(render, plan, renderers, config.train.timeout_s) as ahead, runs.locked(folder) as (_, _, found):
        start = found[1] if found else 0

        def wait_for_checkpoint(step: int, seconds: float) -> None:
            """The thread that writes them skips those that a newer one overtakes: which ones, chance would decide."""
            due, began = step - step % config.train.checkpoint_every, time.monotonic()
            while checkpoint.committed_step(folder) < due and time.monotonic() - began < seconds:
                time.sleep(0.001)

        def batches(rank: int) -> Iterator[dict]:
            if ahead:
                yield from ahead(start)
                return
            size = plan.global_batch_size // world
            for step in range(start, plan.num_steps):
                wait_for_checkpoint(step, ENDLESS_S if step == until else SLOW_DISK_S)
                if step == until:
                    raise Killed
                columns = plan.columns(step, step + 1)
                batch = render({name: column[rank * size : (rank + 1) * size] for name, column in columns.items()})
                torch.set_num_threads(1)
                if seen:
                    seen(rank, batch)
                yield {name: torch.from_numpy(value) for name, value in batch.items()}

        def work(rank: int) -> str | None:
            def wrap(net: torch.nn.Module) -> torch.nn.Module:
                alike = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
                return torch.nn.parallel.DistributedDataParallel(net, **alike) if world > 1 else net

            def worker(push: Callable[[], None] | None, here: str, seen: watch.Watch) -> str | None:
                place_on = torch.device(device)

                def feed(_: int, stay: Set[str]) -> on.Batches:
                    return on.Batches(batches(rank), place_on, stay)

                place = Place(rank, world, place_on, feed, wrap, push, seen)
                return kind.worker(Session(here, plan, config.train, place), {**given, "run": here})

            with warnings.catch_warnings(), runs.joined(folder, rank) as (here, push):
                warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers
                timeout_s = config.train.timeout_s
                return watch.watched(partial(worker, push, here), here, rank, world, timeout_s)

        if "://" in folder or in_this_process:  # neither obstore nor CUDA survives a fork
            assert world == 1
            return work(0)
        return _in_processes(work, world, config.train.timeout_s)


@contextlib.contextmanager
def _rendering(
    render: Callable[[dict], dict], plan: stream.Plan, num: int, timeout_s: float
) -> Iterator[Callable[[int], Iterator[dict]] | None]:
    """What gives the batches from a step on, made by `num` processes a few steps ahead; none where there are none."""
    if not num:
        yield None
        return

    def ahead(start: int) -> Iterator[dict]:
        waiting: collections.deque = collections.deque()
        for step in range(start, plan.num_steps):
            waiting.append(pool.apply_async(_render_step, (step,)))
            if len(waiting) > 2 * num:
                yield pinned(waiting.popleft().get(timeout_s))
        while waiting:
            yield pinned(waiting.popleft().get(timeout_s))

    def pinned(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: column.pin_memory() for name, column in batch.items()} if torch.cuda.is_available() else batch

    _RENDERED[:] = render, plan
    pool = torch.multiprocessing.get_context("fork").Pool(num)
    try:
        yield ahead
    finally:
        pool.terminate()
        pool.join()


_RENDERED: list = []  # what the forked processes of `_rendering` render, and the plan


def _render_step(step: int) -> dict[str, torch.Tensor]:
    render, plan = _RENDERED
    torch.set_num_threads(1)
    return {name: torch.from_numpy(value) for name, value in render(plan.columns(step, step + 1)).items()}


def _in_processes(work: Callable[[int], str | None], world: int, timeout_s: float) -> str | None:
    """Runs `work` in one forked process per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def process(rank: int) -> None:
        system.keep_freed_memory(2**31 - 1)
        try:
            if world > 1:
                timeout = timedelta(seconds=timeout_s)
                torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
            answers.put((rank, work(rank), None))
        except BaseException as error:
            answers.put((rank, None, type(error).__name__ + traceback.format_exc()))
        os._exit(0)

    children = [context.Process(target=process, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    told = {rank: (answer, error) for rank, answer, error in (answers.get() for _ in children)}
    for child in children:
        child.join()
    errors = [error for _, error in told.values() if error]
    if any(error.startswith("Killed") for error in errors):
        raise Killed
    for error in errors:
        raise RuntimeError(error)
    return told[0][0]


def state_of(run: Path | str) -> dict:
    """The state of a run's newest checkpoint."""
    return checkpoint.read_state(checkpoint.committed(run)[0] / STATE)


def equal(a, b) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


CLOCKS = ("time_s", "data/wait_s", "data/wait_share", "train/pairs_per_s", "train/patches_per_s", "probe/seconds")


def rows_of(run: Path | str) -> list[dict]:
    """A run's metrics without what depends on time."""
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if k not in CLOCKS and not k.startswith("checkpoint/")} for row in rows]
