"""How many trials of a sweep run at a time on a cluster."""

import math
from pathlib import Path

from pgl_ray.config import TrainConfig, TuneConfig
from pgl_ray.data.system import num_cores
from pgl_ray.sweep.points import Point
from pgl_ray.sweep.stages import stage_configs
from pgl_ray.train import nodes


def room_for(config: TuneConfig, trials: list[Point]) -> int:
    """How many trials run at a time; of a cluster that grows, where all of its nodes are there.

    Raises:
        ValueError: the cluster is too small for one, or for max_concurrent of them; says what it has.
    """
    cluster = nodes.cluster()
    cpus, gpus = cluster.limit("CPU"), cluster.limit("GPU")
    points = [trial.values for trial in trials] or [{}]
    configs = [one for values in points for one in stage_configs(config, values, Path(config.run)).values()]
    trains, needs, fit = {one.train for one in configs if hasattr(one, "train")} or {TrainConfig()}, [], []
    for train in trains:
        on_gpu, num = nodes.check_resources(train), nodes.least(train)[1]
        needs.append((_cpus(train), train.num_workers * train.gpus_per_worker if on_gpu else 0))
        fit.append(cluster.room(nodes.needs(train, on_gpu)) // num)  # node by node
    cpus_each, gpus_each = (max(need) for need in zip(*needs))
    room = int(min(cpus / cpus_each, gpus / gpus_each if gpus_each else math.inf, *fit))
    if cluster.unknown:
        room = max(1, room, config.max_concurrent or 0)
    if config.max_concurrent and config.max_concurrent > room:
        raise ValueError(
            f"max_concurrent={config.max_concurrent} trials of {cpus_each:g} CPUs and {gpus_each:g} GPUs each do not "
            f"fit, {cluster.in_words()}: at most {room}"
        )
    if config.scheduler.kind == "pbt":
        if room < len(trials):
            needs = f"{len(trials) * cpus_each:g} CPUs and {len(trials) * gpus_each:g} GPUs"
            mend = "let them share a machine's cores by a higher ray.num_cpus"
            mend = "raise the autoscaler's maximum" if cluster.grows else mend
            raise ValueError(
                f"scheduler.kind=pbt runs its {len(trials)} trials together: they need {needs}, {cluster.in_words()}: "
                f"lower num_trials, or {mend}"
            )
        return len(trials)
    if not cluster.others and not cluster.grows:  # a local cluster may count more CPUs than the machine has
        room = min(room, int(num_cores() / cpus_each)) if not gpus_each else room
    return config.max_concurrent or max(1, room)


def _cpus(train: TrainConfig) -> float:
    return train.num_workers * train.cpus_per_worker + nodes.FEED_CPUS
