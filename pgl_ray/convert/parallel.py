"""Work on many scans, one per Ray task."""

import os
import pickle
from collections.abc import Callable, Iterator

from pgl_ray.config import RayConfig
from pgl_ray.data.system import num_cores


def in_parallel(
    work: Callable[[dict], dict],
    items: list[tuple],
    config: RayConfig,
    peak: Callable[[], int] | None = None,
) -> Iterator[dict]:
    """Calls `work` with {"task": number, "item": pickled item} in Ray tasks, one per core; yields the answers.

    Every task gets only its own item, for a list of DICOM series fills a hundred megabytes. `peak` says the
    memory that one may take, in bytes.
    """
    if not items:
        return
    from pgl_ray.train import launch, nodes  # here: they take torch along, and a run with nothing to do need not wait

    launch.connect(config)
    import ray.data

    cluster = nodes.cluster()
    per_task = {"CPU": 1.0, **(cluster.memory(peak()) if peak else {})}
    # a cluster of our own on this machine has at least 4 CPUs by name, for the trainings' sake
    local = not (config.address or os.environ.get("RAY_ADDRESS"))
    cores = config.num_cpus or num_cores()
    if not local:  # all nodes' that can come; Ray Data asks for as many as it has tasks for
        cores = len(items) if cluster.unknown else max(1, cluster.room(per_task))
        nodes.ask_for(per_task, min(cores, len(items)))
    rows = [{"task": i, "item": pickle.dumps(item)} for i, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    yield from dataset.map(
        work, num_cpus=1, memory=per_task.get("memory"), compute=ray.data.TaskPoolStrategy(size=min(cores, len(rows)))
    ).iter_rows()
