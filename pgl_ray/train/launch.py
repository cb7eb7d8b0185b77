"""The one place that starts Ray and builds a TorchTrainer."""

import os
import re
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pgl_ray import ray_internals
from pgl_ray.config import FailedRun, RayConfig, TrainConfig
from pgl_ray.data.system import keep_freed_memory, num_cores
from pgl_ray.model import device as on
from pgl_ray.train import logs, nodes, run_paths, runs
from pgl_ray.train.follow import Progress
from pgl_ray.train.quiet import MEMORY, QUIET, WATCH, quiet_data
from pgl_ray.train.watch import Watch, watched

if TYPE_CHECKING:  # it imports networks, and processes that feed and control a run do without
    from pgl_ray.train.session import Place, Session

RENDER_CPUS = 0.5  # Ray CPUs of one rendering task
NO_MEMORY = "Ray ended a process because the machine's memory was nearly full"
WATCHED = {WATCH: "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2"}  # on a cluster that others may take nodes from


def connect(config: RayConfig) -> None:
    """Joins the configured Ray cluster, or starts one on this machine that ends with this process.

    Does nothing when this process is connected already.

    Raises:
        FailedRun: the cluster cannot be reached or started.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    settings = QUIET | (WATCHED if address else {})
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    quiet_data()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    job = ray_internals.job_runtime_env()
    workers = {key: os.environ.get(key, value) for key, value in (settings | MEMORY).items()}
    options["runtime_env"] = {
        "worker_process_setup_hook": "pgl_ray.train.quiet.quiet_worker",
        "env_vars": {key: value for key, value in workers.items() if key not in job.get("env_vars", {})},
    }
    if address:
        options["address"] = address
        if not {"working_dir", "py_modules"} & job.keys():  # all nodes run this code, whatever they have installed
            options["runtime_env"]["py_modules"] = [str(Path(__file__).parents[1])]
    else:
        # The dashboard process answers the State API, without which Ray Train cannot free a dead run's workers.
        options |= {
            "address": "local",
            "num_cpus": config.num_cpus or max(4, num_cores()),
            "object_store_memory": config.object_store_mb and config.object_store_mb * 2**20,
            "include_dashboard": True,
        }
        # Ray warns on the console when it runs 4 times as many processes as this; a training needs about 15.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "6")
    try:
        ray.init(**options)
    except Exception as error:  # ray.init has no common error class
        reason = " ".join(str(error).split())  # of another version of Ray or Python, too
        raise FailedRun(f"no Ray cluster at ray.address={address or 'local'}: {reason}") from error


def fit(
    worker: Callable[["Session", dict], Any],
    worker_config: dict,
    stream: Callable[..., Any],
    train: TrainConfig,
    held: runs.Held,
    num_steps: int,
    batch_size: int,
) -> Any:
    """Runs `worker` on every rank under DDP and returns what rank 0's worker returns.

    Args:
        worker: the loop; called on each rank with its session and `worker_config`.
        worker_config: plain values; `plan`: the run's.
        stream: builds the Ray Dataset; called at every start of the workers, with num_workers and start (step).
        train: number and kind of workers.
        held: the run, by `runs.locked`.
        num_steps: length of the run, for the progress line.
        batch_size: global; an elastic run takes only numbers of workers that divide it.

    Raises:
        ValueError: the cluster is too small for the workers.
        FailedRun: a worker failed more often than `train.max_failures`.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    def start() -> int:
        """Where a start of the workers continues; called in Ray Train's controller, once for all of them."""
        newest = runs.recover(held.run, held.token)
        return newest[1] if newest else 0

    for note in ray_internals.changed():
        print(f"note: {note}", flush=True)
    use_gpu = nodes.check_resources(train)
    if os.environ.get(WATCH) == "1" and not train.min_workers:
        os.environ.setdefault(nodes.WAIT_S, str(nodes.NODES_S))
    # mypy sees the classes of Ray's first Train, where ray.train has those of the second
    trainer = TorchTrainer(
        partial(_joined, worker, train),
        train_loop_config=worker_config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=train.timeout_s),  # type: ignore[arg-type] # parts too
        scaling_config=scaling(train, use_gpu),
        run_config=run_config(held.run, train),
        datasets={"train": start},  # type: ignore[dict-item] # the feed makes the stream of it
        dataset_config=_feed(stream),
    )
    missing = partial(nodes.missing, train, use_gpu)
    check_wait = partial(nodes.check_wait, train, use_gpu, nodes.wait_s())
    with Progress(held.run, num_steps, missing), ray_internals.whole_parts(batch_size, nodes.FEED_CPUS, check_wait):
        try:
            return trainer.fit().return_value  # type: ignore[attr-defined]
        except ray.train.TrainingFailedError as error:
            raise FailedRun(first_cause(error)) from error


def _feed(stream: Callable[..., Any]) -> Any:
    """What builds the stream for the workers that there are, in place of Ray Train's own sharing out of a dataset."""
    import ray.train
    from ray.data import ExecutionOptions

    class Feed(ray.train.DataConfig):
        def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> Any:
            built = {name: stream(num_workers=world_size, start=start) for name, start in datasets.items()}
            return super().configure(built, world_size, *args, **kwargs)

    return Feed(execution_options=ExecutionOptions(preserve_order=True))


def scaling(train: TrainConfig, use_gpu: bool) -> Any:
    """How many workers with which resources; of a cluster that grows, no more than it can have."""
    import ray.train

    here, each, most = nodes.cluster(), nodes.needs(train, use_gpu), train.num_workers
    if train.min_workers and here.kinds:  # others may be joined by hand: nobody knows how many
        # Ray asks for all of them at once, and an autoscaler that cannot start all it is asked for starts none
        most = max(train.min_workers, min(most, here.room(each, nodes.FEED_CPUS)))
        if most < train.num_workers:
            print(f"note: there can be room for {most} of train.num_workers={train.num_workers} workers", flush=True)
    num: Any = (train.min_workers, most) if train.min_workers else most  # mypy, see `fit`
    return ray.train.ScalingConfig(num_workers=num, use_gpu=use_gpu, resources_per_worker=each)


def run_config(run: str, train: TrainConfig) -> Any:
    """Ray Train's folder, log and patience. It makes an empty file in the folder, and needs it on no other node.

    Starts that fail are counted together over the whole run. An elastic run has one at about each loss, for Ray asks
    for the workers of before; it ends by `nodes.check_wait`.
    """
    import ray.train

    failed_starts = -1 if train.min_workers else max(3, train.max_failures)  # -1: any number
    mirror = run_paths.mirror(run)
    folder = mirror.folder if mirror else Path(run)
    return ray.train.RunConfig(  # type: ignore[call-arg]
        name=folder.name,
        storage_path=str(folder.parent),
        failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
            max_failures=train.max_failures, controller_failure_limit=failed_starts
        ),
        logging_config=ray.train.LoggingConfig(log_level="ERROR"),
    )


def _joined(worker: Callable[["Session", dict], Any], train: TrainConfig, worker_config: dict) -> Any:
    """Runs on each rank: the worker as a part of the run, watched by the others."""
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with runs.joined(worker_config["run"], rank) as (folder, push):
        work = partial(_logged, worker, {**worker_config, "run": folder}, train, push)
        return watched(work, folder, rank, world, train.timeout_s)


def _logged(
    worker: Callable[["Session", dict], Any],
    worker_config: dict,
    train: TrainConfig,
    push: Callable[[], None] | None,
    watch: Watch,
) -> Any:
    """Runs on each rank: the worker with a session, its log in the run's folder.

    Raises:
        FailedRun: this node does not see the run's folder.
    """
    import ray.train

    from pgl_ray.train.session import Session

    context, run = ray.train.get_context(), worker_config["run"]
    if not os.path.exists(f"{run}/run.json"):
        node = ray.util.get_node_ip_address()
        raise FailedRun(f"node {node} does not see run={run}: store and run must lie on storage that all nodes share")
    with logs.written(run, context.get_world_rank(), context.get_world_size()):
        place = place_of(train)._replace(push=push, watch=watch)
        return worker(Session(run, worker_config["plan"], train, place), worker_config)


# -- while it runs ----------------------------------------------------------------------------------------------------


def first_cause(error: Exception) -> str:
    """The error of the lowest failing rank as one line, without Ray's wrapping."""
    if isinstance(ended := getattr(error, "controller_failure", None), FailedRun):  # a sentence of ours
        return str(ended)
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    # When one rank dies the others fail in gloo or nccl: show the rank that failed by itself.
    rank, cause = min(failures.items(), key=lambda item: ("gloo" in str(item[1]) or "nccl" in str(item[1]), item[0]))
    if ray_internals.MEMORY_MONITOR in str(cause):
        return f"worker {rank} failed: {NO_MEMORY}"
    # Ray wraps the traceback as text and adds advice below it: the exception's own line is the last that names a class.
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Run|Scan)(\(\w+\))?: ", line)]
    named = [line for line in named if ray_internals.RENDERERS_WRAPPER not in line] or named
    text = f"worker {rank} failed: {(named or lines)[-1]}"
    if "No module named" in text:
        node = re.search(r"\bip=([\w.:]+)", str(cause))
        text += f": {'node ' + node[1] if node else 'a node'} lacks that package: have the same ones on every node"
    return text


def place_of(train: TrainConfig) -> "Place":
    """What Ray Train gives this worker."""
    import ray.train

    from pgl_ray.train.session import Place

    context, device = ray.train.get_context(), setup_worker(train.threads_per_worker)
    feed = partial(_batches, device=device)
    return Place(context.get_world_rank(), context.get_world_size(), device, feed, _distributed)


def setup_worker(threads: int) -> torch.device:
    """First call of every worker: threads, quiet logs, device.

    Args:
        threads: torch threads; 0 shares the node's cores among its workers.
    """
    import ray.train.torch

    ray_internals.quiet_reports()
    workers_here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(threads or max(1, num_cores() // workers_here))
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        keep_freed_memory(2**31 - 1)
    return device


def _distributed(net: torch.nn.Module) -> torch.nn.Module:
    """DDP where there are several workers: gradients are added up in buckets while the backward pass goes on.

    Rank 0's buffers are not broadcast: each worker keeps its own, and checkpoints hold the workers' mean.
    """
    import ray.train.torch

    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return ray.train.torch.prepare_model(net, parallel_strategy_kwargs=options)


def _batches(size: int, stay: Set[str], device: torch.device) -> on.Batches:
    """This worker's batches of the stream on its device; Ray itself would copy them between the steps, by the stream
    that computes them.

    Args:
        size: rows of a batch.
        stay: columns that are left on the host.
        device: of this worker.
    """
    import ray.train

    options = {"prefetch_batches": 2, "drop_last": True, "device": "cpu", "pin_memory": device.type == "cuda"}
    shard = ray.train.get_dataset_shard("train")
    return on.Batches(shard.iter_torch_batches(batch_size=size, **options), device, stay)
