"""The nodes that a run needs of a Ray cluster: whether there can be as many, how they are asked for and waited for."""

import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgl_ray import ray_internals
from pgl_ray.config import FailedRun, TrainConfig
from pgl_ray.model import device as on
from pgl_ray.train import autoscaler, capacity, checkpoint
from pgl_ray.train.progress import clock
from pgl_ray.train.quiet import WATCH

NODES_S = 1800  # that workers wait for nodes; spot instances take minutes to come back
WAIT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # Ray's name for it, in the environment
ASKED_S = 12.0  # that tasks ask for nodes: an autoscaler looks every five seconds
START_S = 60.0  # beyond the wait, in which a start may fail that Ray has seen room for: it looks every 20 s
LOOK_S = 5.0  # between two looks at a cluster that is waited for
FEED_CPUS = 1  # that the stream must have at least: it lays out its plan with one


def cluster() -> capacity.Cluster:
    """The connected cluster as it is, and as it can be."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    head: dict[str, float] = next((node for node in nodes if ray_internals.HEAD in node), {})
    others = tuple(node for node in nodes if node is not head)
    if os.environ.get(WATCH) != "1":  # it is this process's own
        return capacity.Cluster(head, others)
    config = _autoscaler(ray.get_runtime_context().gcs_address)
    growth = None if config is None else capacity.kinds_of(config)
    kinds, most = growth or ((), 0)
    return capacity.Cluster(head, others, kinds, most, unknown=config is not None and not growth)


@functools.cache
def _autoscaler(address: str) -> Mapping[str, Any] | None:
    """Of a cluster: a task on its head says it, which is not asked again and again."""
    return autoscaler.config()


def needs(train: TrainConfig, use_gpu: bool) -> dict[str, float]:
    """Ray's resources of one worker."""
    return {"CPU": train.cpus_per_worker, **({"GPU": train.gpus_per_worker} if use_gpu else {})}


def least(train: TrainConfig) -> tuple[str, int]:
    """The workers that a run must have at least, and the knob that says so."""
    return ("min_workers", train.min_workers) if train.min_workers else ("num_workers", train.num_workers)


def check_resources(train: TrainConfig) -> bool:
    """Refuses what would wait for ever, or compute wrongly; returns whether the workers get GPUs.

    On a cluster that grows, what it can have counts.

    Raises:
        ValueError: the cluster is too small, and cannot grow to what is needed.
    """
    here, (name, num) = cluster(), least(train)
    gpus, cpus = here.limit("GPU"), here.limit("CPU")
    wanted, text = num * train.gpus_per_worker, f"train.{name}={num}"
    if here.unknown:
        if train.device == "auto" and here.now("GPU") < wanted:
            raise ValueError(f"{here.in_words()}: say where to train, train.device=cuda or train.device=cpu")
        on.check_training_precision("cpu" if train.device == "cpu" else "cuda", train.precision)
        return train.device != "cpu"
    use_gpu = train.device == "cuda" or (train.device == "auto" and gpus >= wanted)
    if gpus < wanted and (use_gpu or (train.device == "auto" and gpus > 0)):
        raise ValueError(f"{text} need {wanted:g} GPUs, {here.in_words()}: lower it, or take train.device=cpu")
    growth = "add nodes" if os.environ.get(WATCH) == "1" else "raise ray.num_cpus"
    mend = f"lower one of them or {'raise the maximum of the autoscaler' if here.grows else growth}"
    need = num * train.cpus_per_worker + FEED_CPUS
    text += f" x train.cpus_per_worker={train.cpus_per_worker:g} + {FEED_CPUS} for the views"
    if need > cpus:
        raise ValueError(f"{text} = {need:g} CPUs, {here.in_words()}: {mend}")
    room = here.room(needs(train, use_gpu), FEED_CPUS)
    if room < num:
        raise ValueError(f"{text}: node by node there is room for {room} workers, {here.in_words()}: {mend}")
    on.check_training_precision("cuda" if use_gpu else "cpu", train.precision)
    return use_gpu


def await_nodes(train: TrainConfig, newest: tuple[Path, int] | None) -> bool:
    """Whether the workers get GPUs, as `check_resources`; asks a cluster that grows for the nodes they need, and waits.

    Args:
        train: of the run.
        newest: the checkpoint that it continues from, as `runs.locked` gives it; none: it begins.

    Raises:
        ValueError: see `check_resources`; or the run began on GPUs and would go on on CPUs, or the other way round.
        FailedRun: the nodes did not come in time.
    """
    import ray

    use_gpu = check_resources(train)
    before = checkpoint.trained_on(newest[0].parent) if newest else []
    if (
        newest and before and (before == [on.CPU]) == use_gpu and train.device == "auto"
    ):  # the models of GPUs the workers compare
        now = ["a GPU" if use_gpu else on.CPU]
        raise ValueError(capacity.other_devices(before, now, newest[1]))
    if os.environ.get(WATCH) != "1":  # a cluster of this process's own has no other work
        return use_gpu
    if lack := missing(train, use_gpu):
        print(lack, flush=True)
    bundles = [needs(train, use_gpu)] * least(train)[1]
    if cluster().grows:  # other trainings' renderers come and go, and may leave no CPU whole
        bundles += [{"CPU": FEED_CPUS}]
    group, began, failed = ray.util.placement_group(bundles, strategy="PACK"), time.monotonic(), {}
    try:
        while not group.wait(LOOK_S):
            if not lack:
                lack = f"  waiting at most {clock(wait_s())} for nodes, or for other work: {_lacking(train, use_gpu)}"
                print(lack, flush=True)
            for name, text in autoscaler.failures().items():
                if name not in failed:  # once; the cloud's words may hold a time, or a number of its own
                    print(f"  nodes that could not be started: {name}: {text}", flush=True)
                failed[name] = text
            if time.monotonic() - began > wait_s():
                why = "; " + ", ".join(f"{name}: {text}" for name, text in failed.items()) if failed else ""
                raise FailedRun(f"after {clock(wait_s())} {_lacking(train, use_gpu)}{why}")
    finally:
        ray.util.remove_placement_group(group)
    if lack:
        print(f"  nodes are there after {clock(time.monotonic() - began)}", flush=True)
    return use_gpu


def ask_for(each: dict[str, float], num: int) -> None:
    """Asks a cluster that grows for room for `num` tasks that take `each`, and waits for nothing: Ray Data asks for
    nodes late, or never. Tasks ask that wait for the same, for as long as an autoscaler needs to see them."""
    import ray

    here = cluster()
    if not here.grows or here.room_now(each) >= num:
        return

    def hold(until: float) -> None:  # inside, or each process would import this module, and torch with it
        import time

        time.sleep(min(12.0, max(0.0, until - time.time())))

    task = ray.remote(hold).options(num_cpus=each["CPU"], memory=each.get("memory"), max_retries=0)
    for _ in range(num):
        task.remote(time.time() + ASKED_S)


def wait_s() -> float:
    """Seconds that workers wait for nodes at most."""
    return float(os.environ.get(WAIT_S, NODES_S))


def missing(train: TrainConfig, use_gpu: bool) -> str | None:
    """What to say where the nodes that are up have no room for the workers; none: they have. Of a cluster of this
    process's own, nothing."""
    if os.environ.get(WATCH) != "1" or cluster().room_now(needs(train, use_gpu), FEED_CPUS) >= least(train)[1]:
        return None
    return f"  waiting for nodes, at most {clock(wait_s())}: {_lacking(train, use_gpu)}"


def check_wait(train: TrainConfig, use_gpu: bool, most_s: float, waited_s: float, has_room: bool) -> None:
    """Ends an elastic run that has had no workers for too long; Ray Train would wait without end.

    Args:
        train: of the run.
        use_gpu: whether the workers get GPUs.
        most_s: `wait_s` of the driver.
        waited_s: since there were workers.
        has_room: whether Ray sees room for them, and has tried to start them there if that took long.

    Raises:
        FailedRun: it has waited for longer than `most_s`.
    """
    if not has_room and waited_s > most_s:
        mend = "add nodes, or lower train.min_workers, and type the command again: it continues"
        raise FailedRun(f"after {clock(waited_s)} {_lacking(train, use_gpu)}: {mend}")
    if has_room and waited_s > most_s + START_S:
        why = "other work holds it, or a node cannot start them: python -m pgl_ray.doctor looks at each node"
        raise FailedRun(f"after {clock(waited_s)} no workers have started, though Ray sees room for them: {why}")


def _lacking(train: TrainConfig, use_gpu: bool) -> str:
    here, each, (name, num) = cluster(), needs(train, use_gpu), least(train)
    words = " and ".join(f"{amount:g} {kind}" for kind, amount in each.items())
    room = here.room_now(each, FEED_CPUS)
    return f"there is room for {room} of train.{name}={num} workers of {words} each; {here.in_words()}"
