"""One worker's part of a training: where it begins, what a step owes, its metrics and checkpoints, and why it ends.

A loop says what is computed; what else every loop needs is here once. All workers call the methods alike, for
some of them compare or exchange what the workers have. `launch` makes a Session of what Ray gives a worker, a test of
what it likes.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pgl_ray.config import FailedRun, TrainConfig
from pgl_ray.model import device as on
from pgl_ray.train import capacity, checkpoint, health, logs
from pgl_ray.train.metrics import Metrics
from pgl_ray.train.quiet import WATCH
from pgl_ray.train.ranks import of_all_workers
from pgl_ray.train.watch import BATCH, METRICS, STEP, Watch
from pgl_ray.train.writer import Writer

LOOK_S = 2.0  # between two looks whether a node is about to be taken away
NOTICE_S = 5  # between two checkpoints while a node is about to be taken away
PARTS = ("model", "optimizer", "schedule")  # of a checkpoint's state that are loaded back by `resume`


class Place(NamedTuple):
    """Where a worker stands among the others, and what it is given.

    Attributes:
        rank, world: number of this worker, and of all.
        device: to compute on.
        feed: rows per batch and columns that stay on the host -> this worker's batches, on the device.
        wrap: a network -> the same, under DDP where there are several workers.
        push: brings checkpoints to where the run lies; none: they are written there.
        watch: tells the other workers how far this one is; none: nobody asks.
    """

    rank: int
    world: int
    device: torch.device
    feed: Callable[[int, Set[str]], on.Batches]
    wrap: Callable[[nn.Module], nn.Module]
    push: Callable[[], None] | None = None
    watch: Watch | None = None


class Session:
    """See the top of the file.

    Attributes:
        run: the run's folder on this machine.
        plan: which rows make up which step, a `stream.Plan`.
        rank, world, device: of this worker.
        devices: kinds of device that the workers have, as `model.device.kind` names them.
        state: the newest committed checkpoint's, without what `resume` loaded; empty at the start of a run.
        step: steps done.
        reason: why training ends early, the first that was given, the same on every rank; none: it goes on.
    """

    def __init__(self, run: str, plan: Any, train: TrainConfig, place: Place):
        self.run, self.plan, self.train, self.place = run, plan, train, place
        self.rank, self.world, self.device = place.rank, place.world, place.device
        self.autocast = on.autocast(self.device, train.precision)
        self.parts = parts_of(train, self.world)
        self.state: dict[str, Any] = checkpoint.resumed(run) or {}
        self.devices = sorted({kind for kinds in of_all_workers([on.kind(self.device)]) for kind in kinds})
        self.step: int = self.state.get("step", 0)
        self.reason: str | None = None
        if self.state and not self.is_last and train.device == "auto":
            self.stops(capacity.other_devices(checkpoint.trained_on(run), self.devices, self.step))
        self.metrics: Metrics | None = None
        self.writer: Writer | None = None
        self.notice, self._settled, self._noted = Notice(), False, False

    # -- before the first step ----------------------------------------------------------------------------------------

    def lay_out(self, net: on.Net) -> on.Net:
        """The network on the device, its BatchNorm synchronised where there are several GPUs."""
        net = on.lay_out(net, self.device)
        if self.device.type == "cuda" and self.world > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return net

    def resume(self, *parts: Any) -> None:
        """Brings network, optimizer and schedule to where the checkpoint stands; each will be part of the next ones."""
        self._resumed = dict(zip(PARTS, parts, strict=True))
        for name, part in self._resumed.items():
            if self.state:
                part.load_state_dict(self.state.pop(name))

    def begin(self, best: str | None = None) -> nn.Module:
        """Opens metrics and checkpoints on rank 0; returns what is called in training: the network, under DDP where
        there are several workers, compiled where that pays.

        Args:
            best: figure by which the best checkpoint is kept, in addition to the newest ones.
        """
        model = on.compiled(self.place.wrap(self._resumed["model"]), self.device, self.train.compile, self.world)
        if self.rank == 0:
            self.metrics = Metrics(self.run, self.step, self.train.tracker)
            # an elastic run that goes on on some of its kinds of device may take the others in again
            before = checkpoint.trained_on(self.run) if self.train.device == "auto" else []
            facts = {"world": self.world, "devices": sorted({*before, *self.devices})}
            self.writer = Writer(self.run, best=best, facts=facts, push=self.place.push)
        return model

    # -- steps --------------------------------------------------------------------------------------------------------

    def batches(self, stay: Set[str]) -> Iterator[dict[str, torch.Tensor]]:
        """This worker's batches, columns `stay` on the host, until the last or until there is a reason to stop."""
        self._feed = self.place.feed(self.plan.global_batch_size // self.world, stay)
        self._logged, self.since = self.step, time.monotonic()
        for number, batch in enumerate(self._feed):
            if not number:  # processes that start are no waiting for data, and say nothing about the speed
                self._feed.waited_s()
                self.since = time.monotonic()
            self.at(STEP)
            yield batch
            if self.reason:
                return
            self.at(BATCH)

    def settle(self, model: nn.Module, work: Callable[[], Any]) -> None:
        """At the first step of this start: see `settle`."""
        if not self._settled:
            settle(model, work)
        self._settled = True

    def advance(self) -> None:
        """One step is done."""
        self.at(METRICS)
        self.step += 1

    @property
    def is_last(self) -> bool:
        """Whether the run's last step is done."""
        return self.step >= self.plan.num_steps

    def due(self, every: int) -> bool:
        """Whether something that comes every so many steps, and after the first and the last one, is due; 0: never."""
        return every > 0 and (self.step == 1 or self.is_last or self.step % every == 0)

    def keeps(self) -> bool:
        """Whether a checkpoint is due: by the config, at the end, or because a node is about to be taken away."""
        by_config = self.is_last or self.step % self.train.checkpoint_every == 0
        return by_config or self.notice.wants_checkpoint(self.step, self.train.log_every)

    # -- what the other workers hear ----------------------------------------------------------------------------------

    def at(self, place: int, step: int | None = None) -> None:
        """The worker has reached a place of this step, or of another; see `watch.PLACES`."""
        if self.place.watch:
            self.place.watch.at(self.step if step is None else step, place)

    def meet(self) -> None:
        """See `Watch.meet`."""
        if self.place.watch:
            self.place.watch.meet()

    def beating(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """See `Watch.beating`."""
        return self.place.watch.beating(module) if self.place.watch else contextlib.nullcontext()

    # -- reasons to stop ----------------------------------------------------------------------------------------------

    def stops(self, reason: str | None) -> bool:
        """Takes a reason to stop; whether it is one, and the first. Every rank gives the same."""
        first = reason is not None and self.reason is None
        self.reason = reason if first else self.reason
        return first

    def blown_up(self, net: nn.Module, mend: str) -> str | None:
        """Why weights that are no longer finite on some rank end the run; a network of these is not checkpointed."""
        if all(of_all_workers(health.is_sound(net))):
            return None
        return f"the weights have blown up by step {self.step}: {mend}"

    def storage_fault(self) -> str | None:
        """Why checkpoints can no longer be written."""
        return of_all_workers(self.writer.fault if self.writer else None)[0]

    # -- rows and checkpoints -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no part of the training's speed."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def log(self, row: dict[str, float], unit: str | None = None) -> None:
        """Writes a row of metrics at this step, and exports it.

        Args:
            row: figures, `group/name_unit`.
            unit: what a batch holds, pairs or patches, for its speed since the last row with one; none: no speed.
        """
        row = {"epoch": self.plan.epoch_at(self.step), **row}
        if unit:
            steps, seconds = self.step - self._logged, time.monotonic() - self.since
            waited = self._feed.waited_s()
            row[f"train/{unit}_per_s"] = steps * self.plan.global_batch_size / seconds
            row |= {"data/wait_s": waited / steps, "data/wait_share": waited / seconds}
            self._logged, self.since = self.step, time.monotonic()
            if not self._noted and (note := on.uncompiled()):
                print(f"note: {note}", flush=True)
            self._noted = True
        publish(self.step, row, {"run": Path(self.run).name, "rank": str(self.rank)})
        if self.metrics:
            self.metrics.write(self.step, **row, **(self.writer.figures() if unit and self.writer else {}))

    def save(self, own: dict[str, Any], figures: dict[str, float]) -> None:
        """Takes a checkpoint on rank 0: network, optimizer, schedule, step, plan, versions, and what is the loop's own.

        Args:
            own: plain values and tensors; `figures`: of metrics, by which the best is known.
        """
        if self.writer:
            state = {"step": self.step, "plan": self.plan.identity, "versions": checkpoint.versions()}
            state |= {name: part.state_dict() for name, part in self._resumed.items()}
            self.writer.save(state | own, self.step, figures)

    def save_file(self, name: str, state: dict[str, Any]) -> None:
        """Takes a state, the step added, for a file in the run's folder, written before any later checkpoint."""
        if self.writer:
            self.writer.save_file(name, {"step": self.step, **state})

    def end(self, is_over: bool = False) -> str | None:
        """Writes what is left; the reason to stop, if there is one.

        Args:
            is_over: whether it may end before the plan does.

        Raises:
            FailedRun: the stream ended before the plan.
        """
        if self.writer:
            self.writer.close()
            self.stops(self.writer.fault)
        if self.metrics:
            self.metrics.close()
        if not (self.is_last or is_over or self.reason):
            raise FailedRun(f"the stream ended at step {self.step} of {self.plan.num_steps}")
        return self.reason


def parts_of(train: TrainConfig, world: int) -> int:
    """Parts that a worker's batch goes through the network in where some of an elastic run's workers are missing: none
    is larger than with all workers."""
    return -(-train.num_workers // world) if train.min_workers else 1


def settle(model: torch.nn.Module, work: Callable[[], Any]) -> None:
    """One pass forward and back that leaves nothing behind, at every start of the workers.

    DDP lays its buckets of gradients out anew after its first pass, and three or more workers' sums depend on where in
    a bucket a gradient lies: without this, a run that was interrupted would differ in the last bits from one that was
    not.

    Args:
        model: a DDP wrapper; any other stays as it is.
        work: the pass, on a batch like those to come.
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return
    buffers = [buffer.clone() for buffer in model.buffers()]
    work()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    model.zero_grad(set_to_none=True)


# -- to Prometheus, and from Ray -------------------------------------------------------------------------------------

# What a worker exports to Prometheus through its node's Ray, where the name gets `ray_` in front: key of the metrics,
# name, description. conf/cluster/grafana.json draws them.
EXPORTED = {
    "train/loss": ("pgl_ray_loss", "training loss"),
    "train/lr": ("pgl_ray_learning_rate", "learning rate"),
    "train/grad_norm": ("pgl_ray_grad_norm", "norm of the gradient"),
    "train/pairs_per_s": ("pgl_ray_pairs_per_s", "pairs of views per second of all workers"),
    "train/patches_per_s": ("pgl_ray_patches_per_s", "patches per second of all workers"),
    "data/wait_share": ("pgl_ray_wait_share", "share of the time that this worker waits for data"),
    "data/skipped_share": ("pgl_ray_skipped_share", "share of the pairs whose scan cannot be read"),
    "health/feature_std": ("pgl_ray_feature_std", "spread of the compared features, 0 = collapsed"),
    "health/effective_rank": ("pgl_ray_effective_rank", "effective rank of the compared features"),
    "health/collapsed": ("pgl_ray_collapsed", "1: features collapsed, or most views blank"),
    "probe/balanced_accuracy": ("pgl_ray_probe_accuracy", "balanced accuracy of the voxel probe"),
    "val/dice": ("pgl_ray_val_dice", "validation Dice"),
    "epoch": ("pgl_ray_epoch", "epochs done"),
    "step": ("pgl_ray_step", "steps done"),
}


def publish(step: int, row: dict[str, float], tags: dict[str, str]) -> None:
    """A row of metrics into this worker's log and, as gauges with tags, to Prometheus."""
    logs.at(row["epoch"], step)
    logs.say("metrics", **{key: float(value) for key, value in row.items() if key != "epoch"})
    for key, value in {**row, "step": step}.items():
        if key in EXPORTED:
            _gauge(*EXPORTED[key]).set(float(value), tags)


@cache
def _gauge(name: str, text: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, text, tag_keys=("run", "rank"))


class Notice:
    """Nodes that are about to be taken away: spot instances, SIGTERM to `ray start --block`, `ray drain-node`.

    When their time is over Ray Train goes on without them at the last checkpoint, and counts no failure. Nothing is
    watched on a cluster that this process started.
    """

    def __init__(self) -> None:
        self.known, self.saved, self.next = None, -math.inf, 0
        self.looked = 0, -math.inf  # step and time

    def wants_checkpoint(self, step: int, most: int) -> bool:
        """Whether a checkpoint is due: at the notice, and from then on every few seconds. All workers call this after
        each step and get the same answer; they look every LOOK_S by rank 0's clock, at least every `most` steps."""
        import ray.train

        if os.environ.get(WATCH) != "1" or step < self.next:
            return False
        (last, then), self.looked = self.looked, (step, time.monotonic())
        pace = min(most, max(1, int(LOOK_S * (step - last) / max(1e-9, self.looked[1] - then))))
        before, self.known = self.known, ray.train.get_preemption_info()
        if before is None and self.known is not None:
            logs.LOG.warning("nodes of ranks %s are about to be taken away", self.known.preempted_ranks)
        answers = of_all_workers((self.known is not None, time.monotonic() - self.saved >= NOTICE_S, pace))
        noticed = any(known for known, _, _ in answers)  # it does not reach all at the same time
        due = noticed and answers[0][1]
        self.next = step + (1 if noticed else answers[0][2])
        self.saved = time.monotonic() if due else self.saved
        return due
