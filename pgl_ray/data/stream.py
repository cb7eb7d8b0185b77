"""Ray Data streams of rendered batches: one (step, epoch, scan, draw) plan, streamed once, resumable at any step.

Every block is one worker's batch, so nothing is re-cut on the way; block k of a step goes to worker k. A row depends
only on (seed, epoch, scan, draw), never on the number of workers, on arrival order or on restarts.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pgl_ray import ray_internals
from pgl_ray.data.columns import Names
from pgl_ray.data.regions import REGIONS_MIXED
from pgl_ray.data.system import keep_freed_memory

if TYPE_CHECKING:
    from ray.data import Dataset

ABOUT_ROWS = frozenset(("step", "epoch", "scan", "draw", "missed"))  # columns that no network sees
BLOCKS_AHEAD = 256  # blocks of rows laid out at a time, by a task of 1 CPU: Ray Data's repartition takes no less
KEEP_BYTES = 2**27  # of freed memory in a rendering process: crops and views follow one another
BLOCKS_TAKEN = 6  # that a worker has at a time: five in the buffers of prefetch_batches=2, and one that is trained on


@dataclass(frozen=True)
class Plan:
    """Which scan is drawn at which step.

    All epochs' shuffled rows stand in one line that is cut into global batches, so no scan is dropped at an epoch's
    end, and a batch may hold the end of one epoch and the start of the next. What the last whole batch leaves over
    (less than one batch in the entire run) is not drawn.

    Attributes:
        scan_ids: the scans, in a fixed order.
        draws_per_scan: rows per scan and epoch.
        global_batch_size: rows per step over all workers.
        num_steps: length of the run.
        seed: of order and rows.
        pairs_per_region: rows in turn that share a region of their scan; divides `draws_per_scan`.
    """

    scan_ids: Sequence[str]
    draws_per_scan: int
    global_batch_size: int
    num_steps: int
    seed: int
    pairs_per_region: int = 1

    @classmethod
    def make(
        cls,
        scan_ids: Sequence[str],
        draws_per_scan: int,
        global_batch_size: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        pairs_per_region: int = 1,
    ) -> "Plan":
        """Plan for `max_steps` steps, or for `epochs` passes where that is none.

        Raises:
            ValueError: not even one step.
        """
        steps = max_steps or epochs * len(scan_ids) * draws_per_scan // global_batch_size
        if not steps:
            raise ValueError(
                f"{epochs} epochs of {len(scan_ids)} scans x {draws_per_scan} draws do not fill one batch of "
                f"global_batch_size={global_batch_size}: lower it or raise epochs"
            )
        return cls(Names(scan_ids), draws_per_scan, global_batch_size, steps, seed, pairs_per_region)

    @property
    def identity(self) -> str:
        """Hash of all that decides which row is drawn when; a run that continues must have the same."""
        text = repr(self).replace(", pairs_per_region=1)", ")")  # as it was before there were regions
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def rows_per_epoch(self) -> int:
        """Scans times draws."""
        return len(self.scan_ids) * self.draws_per_scan

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step * self.global_batch_size / self.rows_per_epoch

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the steps `start` to `stop`: int64 [(stop - start) * global_batch_size, 3] of (epoch, scan number,
        draw). No step costs more than another, wherever in the run it stands."""
        at = np.arange(start * self.global_batch_size, stop * self.global_batch_size)
        epoch, place = np.divmod(at, self.rows_per_epoch)
        order = np.empty_like(at)
        for e in np.unique(epoch).tolist():
            in_epoch = epoch == e
            order[in_epoch] = self.order(e)[place[in_epoch]]
        return np.stack([epoch, *np.divmod(order, self.draws_per_scan)], -1)

    def batches(self, start: int) -> Iterator[np.ndarray]:
        """Global batches from step `start` on: int64 [global_batch_size, 3] of (epoch, scan number, draw)."""
        return (self.rows(step, step + 1) for step in range(start, self.num_steps))

    def columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What renderers are given of the steps `start` to `stop`: step, epoch, scan, draw, int64 [rows]."""
        epoch, scan, draw = self.rows(start, stop).T
        step = np.repeat(np.arange(start, stop), self.global_batch_size)
        return {"step": step, "epoch": epoch, "scan": scan, "draw": draw}

    def order(self, epoch: int) -> np.ndarray:
        """An epoch's rows (scan number * draws_per_scan + draw) as they are drawn, int64 [rows_per_epoch].

        Where rows share regions, those of REGIONS_MIXED regions at a time are shuffled, so that a process that renders
        some of them can keep their regions.
        """
        return _order(self.seed, epoch, self.rows_per_epoch, self.pairs_per_region)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int, pairs_per_region: int) -> np.ndarray:
    rng = np.random.default_rng((seed, epoch))
    if pairs_per_region == 1:
        return rng.permutation(num_rows)
    regions = rng.permutation(num_rows // pairs_per_region)
    rows = regions[:, None] * pairs_per_region + np.arange(pairs_per_region)
    cuts = np.arange(REGIONS_MIXED, len(rows) - REGIONS_MIXED + 1, REGIONS_MIXED)
    return np.concatenate([rng.permutation(part.reshape(-1)) for part in np.split(rows, cuts)])


def dataset(
    plan: Plan, render: Callable[[dict], dict], num_workers: int, start: int, num_cpus: float, stop: int | None = None
) -> "Dataset":
    """A Ray Dataset of rendered batches from step `start` on: block k of a step is worker k's batch.

    Called in Ray Train's controller at every start of a worker group; what the driver set in its DataContext does not
    reach there, so it is set here. The plan is laid out as the stream goes on, `BLOCKS_AHEAD` blocks of rows at a time:
    nothing grows with the length of the run but one row of two numbers per `BLOCKS_AHEAD` blocks.

    Args:
        plan: what to draw.
        render: index columns -> columns of a batch; picklable.
        num_workers: workers the blocks go to in turn; every one gets as many.
        start: first step.
        num_cpus: Ray CPUs of one rendering task.
        stop: step to end before; none: the plan's end.
    """
    import ray.data

    # SPREAD, as Ray Data's own tasks: over all nodes, and outside a trial's placement group
    starting = ray.remote(_start).options(num_cpus=num_cpus, max_retries=0, scheduling_strategy="SPREAD")
    for _ in range(max(1, _num_tasks() // 2)):  # of all of them, they would take the cores from workers that start, too
        starting.remote(render)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a block is a batch: never split it
    room = ray.cluster_resources().get("object_store_memory", 0) / 2  # workers hold blocks, too
    ray_internals.bound_blocks(context, LayOut, BLOCKS_AHEAD, _num_tasks() + num_workers, room)
    stride = max(1, BLOCKS_AHEAD // num_workers)
    stop = min(stop or plan.num_steps, plan.num_steps)
    segments = [{"start": at, "stop": min(at + stride, stop)} for at in range(start, stop, stride)]
    segments = ray.data.from_items(segments, override_num_blocks=len(segments))  # from_arrow would take a task for each
    rows = segments.map_batches(LayOut(plan), batch_size=None)
    # Ray fuses this with the line above, as their CPUs agree, and neither with the renderer: a block, a rendering task
    rows = rows.repartition(target_num_rows_per_block=plan.global_batch_size // num_workers)
    return rows.map_batches(
        InTask(render), batch_size=None, num_cpus=num_cpus, compute=ray.data.TaskPoolStrategy(_num_tasks())
    )


@dataclass(frozen=True)
class InTask:
    """A renderer in a process of Ray's, which keeps what it frees for the next crops and views.

    Attributes:
        render: as for `dataset`.
    """

    render: Callable[[dict], dict]

    def __call__(self, rows: dict) -> dict:
        """Index columns -> columns of a batch."""
        keep_freed_memory(KEEP_BYTES)
        return self.render(rows)


def _start(_: Callable[[dict], dict]) -> None:
    """A rendering task's imports, seconds before the stream asks for one: Ray keeps the process."""
    import ray.data  # noqa: F401


def _num_tasks() -> int:
    """Rendering tasks at a time. Each takes less than a CPU, to fit in beside the workers on small nodes; more tasks
    than CPUs would cost a fifth."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)


def feed(door: str, plan: Plan, render: Any, num_workers: int, num_cpus: float) -> Callable[..., "Dataset"]:
    """`dataset` of a plan, for the starts of the workers; prints where the cluster's memory is short for it.

    Args:
        door: whose line it is.
        plan, render, num_cpus: as for `dataset`; of the renderer counts how large its rows are.
        num_workers: of the run.
    """
    if note := too_large(render.row_bytes * plan.global_batch_size // num_workers, num_workers):
        print(f"{door}: note: {note}", flush=True)
    return partial(dataset, plan, render, num_cpus=num_cpus)


def too_large(block_bytes: int, num_workers: int) -> str | None:
    """What to say where the cluster's object stores are too small for the blocks that are under way; none: they are
    not. What finds no room in them goes over the disk.

    Args:
        block_bytes: of a worker's batch.
        num_workers: of the run.
    """
    import ray

    have, num = ray.cluster_resources().get("object_store_memory", 0), _num_tasks() + (1 + BLOCKS_TAKEN) * num_workers
    if num * block_bytes <= have:
        return None
    return (
        f"Ray's object store of {have / 2**30:.1f} GiB is too small for the stream's {num} blocks of "
        f"{block_bytes / 2**20:.0f} MiB: some will go over the disk; raise ray.object_store_mb to "
        f"{num * block_bytes // 2**20 + 1} or lower global_batch_size"
    )


@dataclass(frozen=True)
class LayOut:
    """First and past-the-last step -> their rows; a class of its own because Ray names its operator after it."""

    plan: Plan

    def __call__(self, segment: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows of some steps."""
        (start,), (stop,) = segment["start"].tolist(), segment["stop"].tolist()
        return self.plan.columns(start, stop)
