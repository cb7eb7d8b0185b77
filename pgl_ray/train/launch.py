"""The one place that starts Ray and builds a TorchTrainer."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pgl_ray import ray_internals
from pgl_ray.config import FailedRun, RayConfig, TrainConfig
from pgl_ray.model import device as on
from pgl_ray.train import bucket, checkpoint, logs, nodes, runs, watch
from pgl_ray.train.events import read_events
from pgl_ray.train.metrics import metrics_path, read_metrics
from pgl_ray.train.progress import Stage
from pgl_ray.train.quiet import QUIET, WATCH, quiet_data

if TYPE_CHECKING:  # it imports networks, and processes that feed and control a run do without
    from pgl_ray.train.session import Place, Session

RENDER_CPUS = 0.5  # Ray CPUs of one rendering task
NO_MEMORY = "Ray ended a process because the machine's memory was nearly full"
WATCHED = {WATCH: "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2"}  # on a cluster that others may take nodes from
LOOK_S = 1.0, 5.0  # between two looks at a run's metrics: for a bar, of a run in a folder; and otherwise


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
    options["runtime_env"] = {
        "worker_process_setup_hook": "pgl_ray.train.quiet.quiet_worker",
        "env_vars": {key: os.environ[key] for key in settings if key not in job.get("env_vars", {})},
    }
    if address:
        options["address"] = address
        if not {"working_dir", "py_modules"} & job.keys():  # all nodes run this code, whatever they have installed
            options["runtime_env"]["py_modules"] = [str(Path(__file__).parents[1])]
    else:
        # The dashboard process answers the State API, without which Ray Train cannot free a dead run's workers.
        options |= {
            "address": "local",
            "num_cpus": config.num_cpus or max(4, os.cpu_count() or 1),
            "object_store_memory": config.object_store_mb and config.object_store_mb * 2**20,
            "include_dashboard": True,
        }
        # Ray warns on the console when it runs 4 times as many processes as this; a training needs about 15.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "6")
    try:
        ray.init(**options)
    except Exception as error:  # ray.init has no common error class
        told = " ".join(str(error).split())  # of another version of Ray or Python, too
        raise FailedRun(f"no Ray cluster at ray.address={address or 'local'}: {told}") from error


def fit(
    worker: Callable[["Session", dict], Any],
    worker_config: dict,
    stream: Callable[..., Any],
    train: TrainConfig,
    run: str,
    num_steps: int,
    batch_size: int,
) -> Any:
    """Runs `worker` on every rank under DDP and returns what rank 0's worker returns.

    Args:
        worker: the loop; called on each rank with its session and `worker_config`.
        worker_config: plain values; `plan`: the run's.
        stream: builds the Ray Dataset; called at every start of the workers, with num_workers and start (step).
        train: number and kind of workers.
        run: folder of the run, absolute, or its URL, and held by `runs.alone`.
        num_steps: length of the run, for the progress line.
        batch_size: global; an elastic run takes numbers of workers that divide it, alone.

    Raises:
        ValueError: the cluster is too small for the workers.
        FailedRun: a worker failed more often than `train.max_failures`.
    """
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchConfig, TorchTrainer

    class Feed(ray.train.DataConfig):
        """Builds the stream for the workers that there are."""

        def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> Any:
            built = {name: stream(num_workers=world_size, start=start) for name, start in datasets.items()}
            return super().configure(built, world_size, *args, **kwargs)

    token = runs.held(run)

    def start() -> int:
        """Where a start of the workers continues; called in Ray Train's controller, once for all of them."""
        found = runs.recover(run, token)
        return found[1] if found else 0

    def watched(config: dict) -> Any:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        with runs.joined(config["run"], rank) as (folder, push):
            here = {**config, "run": folder}
            return watch.watched(partial(_logged, worker, train, push), here, rank, world, train.timeout_s)

    for note in ray_internals.changed():
        print(f"note: {note}", flush=True)
    use_gpu, here = nodes.check_resources(train), nodes.cluster()
    each, most = nodes.needs(train, use_gpu), train.num_workers
    if train.min_workers and not here.unknown:
        # Ray asks for all of them at once, and an autoscaler that cannot start all it is asked for starts none
        most = max(train.min_workers, min(most, here.room(each, nodes.FEED_CPUS)))
        if most < train.num_workers:
            print(f"note: there can be room for {most} of train.num_workers={train.num_workers} workers", flush=True)
    mirror = bucket.mirror(run)
    # Ray Train makes an empty file there, and needs it on no other node
    folder = mirror.folder if mirror else Path(run)
    if os.environ.get(WATCH) == "1" and not train.min_workers:
        os.environ.setdefault(nodes.WAIT_S, str(nodes.NODES_S))
    # mypy sees the classes of Ray's first Train, where ray.train has those of the second
    trainer = TorchTrainer(
        watched,
        train_loop_config=worker_config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=train.timeout_s),  # type: ignore[arg-type] # parts too
        scaling_config=ray.train.ScalingConfig(
            num_workers=(train.min_workers, most) if train.min_workers else most,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=each,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": start},  # type: ignore[dict-item] # Feed makes the stream of it
        dataset_config=Feed(execution_options=ExecutionOptions(preserve_order=True)),
    )
    missing = partial(nodes.missing, train, use_gpu)
    with Progress(run, num_steps, missing), ray_internals.whole_parts(batch_size, nodes.FEED_CPUS):
        try:
            return trainer.fit().return_value  # type: ignore[attr-defined]
        except ray.train.TrainingFailedError as error:
            raise FailedRun(first_cause(error)) from error


def _logged(
    worker: Callable[["Session", dict], Any],
    train: TrainConfig,
    push: Callable[[], None] | None,
    worker_config: dict,
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
        return worker(Session(run, worker_config["plan"], train, place_of(train, push)), worker_config)


# -- while it runs ----------------------------------------------------------------------------------------------------


def first_cause(error: Exception) -> str:
    """The error of the lowest failing rank as one line, without Ray's wrapping."""
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


def place_of(train: TrainConfig, push: Callable[[], None] | None) -> "Place":
    """What Ray Train gives this worker; `push`: see `runs.Joined`."""
    import ray.train

    from pgl_ray.train.session import Place

    context, device = ray.train.get_context(), setup_worker(train.threads_per_worker)
    feed = partial(_batches, device=device)
    return Place(context.get_world_rank(), context.get_world_size(), device, feed, _distributed, push)


def setup_worker(threads: int) -> torch.device:
    """First call of every worker: threads, quiet logs, device.

    Args:
        threads: torch threads; 0 shares the node's cores among its workers.
    """
    import ray.train.torch

    ray_internals.quiet_reports()
    workers_here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // workers_here))
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        on.keep_freed_memory()
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


class Progress:
    """Shows a run's newest metrics while it trains, and its events, from the run's own files.

    Args:
        run: its folder, or its URL.
        num_steps: of the run.
        missing: says which nodes it waits for, or none.
        every_s: between two looks at them; none: as LOOK_S says.
    """

    def __init__(
        self,
        run: str,
        num_steps: int,
        missing: Callable[[], str | None] = lambda: None,
        every_s: float | None = None,
    ):
        self.run, self.missing = run, missing
        self.start = checkpoint.committed_step(run)
        self.events = read_events(bucket.told(run))[1]
        self.began = time.time()
        self.stage = Stage("  step", "", num_steps, self.start, starts=True)
        self.every_s = every_s or LOOK_S[self.stage.bar is None or bucket.is_url(run)]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _follow(self) -> None:
        with self.stage as stage:
            finished, shown = False, None
            lacking: str | None = None
            while not finished:
                finished = self.done.wait(self.every_s)
                before = lacking
                with contextlib.suppress(Exception):  # the cluster does not answer: Ray Train says so
                    lacking = None if finished else self.missing()
                if lacking and not before:  # once for each time that nodes are lost
                    print(lacking, flush=True)
                try:
                    folder = bucket.told(self.run)
                    events, self.events = read_events(folder, self.events)
                    rows = [row for row in self._new_rows(folder) if "train/loss" in row or "val/dice" in row]
                except (OSError, ValueError):  # storage fails; the worker that writes says so
                    continue
                for text in events:
                    print(f"  {text}", flush=True)
                steps = [row for row in rows if "train/loss" in row]
                if steps and steps[-1]["step"] != shown:
                    shown = steps[-1]["step"]
                    stage.show(shown, _figures(steps[-1], rows))

    def _new_rows(self, folder: Path) -> list[dict]:
        """Rows of this start; a continuing worker first drops what an interrupted one wrote after its checkpoint."""
        path = metrics_path(folder)
        if not path.exists() or path.stat().st_mtime < self.began:
            return []
        return [row for row in read_metrics(folder) if row["step"] > self.start]


def _figures(row: dict, rows: list[dict]) -> str:
    """The newest row of a training in words, and what its newest looks at the network gave."""
    parts = [f"loss {row['train/loss']:.4f}"]
    parts += [f"{row[key]:.1f} {key.rsplit('/', 1)[1][:-6]}/s" for key in row if key.endswith("_per_s")]
    parts += [f"waiting for data {row[key]:.0%}" for key in row if key == "data/wait_share"]
    parts += [f"{row[key]:.2%} of the pairs skipped" for key in row if key == "data/skipped_share" and row[key]]
    parts += [f"val Dice {row['val/dice']:.3f}" for row in rows[-1:] if "val/dice" in row]
    probed = [row["probe/balanced_accuracy"] for row in rows if "probe/balanced_accuracy" in row]
    parts += [f"probe {accuracy:.3f}" for accuracy in probed[-1:]]
    judged = [row["health/collapsed"] for row in rows if "health/collapsed" in row]
    parts += ["features COLLAPSED" for share in judged[-1:] if share >= 0.5]
    return ", ".join(parts)
