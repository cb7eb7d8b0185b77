"""python -m pgl_ray.pretrain [file.yaml] index=STORE run=RUN [a.b=c ...]: pre-training by PGL (paper, Sec. 3 and 5.1),
or by BYOL or Models Genesis on the same views."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("pretrain")

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pgl_ray import outlook
from pgl_ray.config import FailedRun, PretrainConfig, StreamConfig, build
from pgl_ray.data import store, stream
from pgl_ray.data.batch_views import finish
from pgl_ray.data.facts import seen_notes, training_facts
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.sampling import ablated
from pgl_ray.judge.judges import Judges
from pgl_ray.judge.readings import READINGS
from pgl_ray.model import device as on
from pgl_ray.model.byol import Byol
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.pgl import Output, Pair, Pgl, feature_geometry
from pgl_ray.model.places import Objective, PlacesPgl
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.prior import Geometry
from pgl_ray.train import checkpoint, health, launch, nodes, optim, ranks, runs, watch
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.run_files import write_json
from pgl_ray.train.session import Session

ACCURACY = "probe/balanced_accuracy"  # of the metrics; a sweep may judge by it


@dataclass(frozen=True)
class Result:
    """Where a run lies and how it ended; `health` is what the last health figures say, `rise` why the loss rose where
    it did, `probe` the last balanced accuracy of the voxel probe, none where none was asked for."""

    run: str
    steps: int
    loss: float
    health: str
    already_finished: bool
    probe: float | None = None
    rise: str | None = None


def run(config: PretrainConfig) -> Result:
    """Trains, or continues, the run `config.run`; returns at once if it is finished.

    Raises:
        ValueError: wrong config, or a run folder of another config.
        FailedRun: training failed.
    """
    index = store.read_index(config.index)
    plan = make_plan(config, index)
    model, geometry = build_model(config)
    encoder = model.get_submodule("online.encoder")
    ahead = outlook.of(config, index, plan, make_renderer(config, index, plan), encoder, geometry)
    facts = {
        "num_parameters": sum(p.numel() for p in encoder.parameters()),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": {"num_scans": len(plan.scan_ids), "labels": index.labels, "hu_window": index.hu_window},
        "outlook": ahead.facts,
    }
    trained_on = training_facts(index, plan.scan_ids)
    if config.probe.every and checkpoint.committed_step(config.run) < plan.num_steps:
        judges = make_probe(config)  # refuses what would only fail in the first worker
        for note in [*judges.notes, *seen_notes(trained_on, judges.probe.scans[1])]:
            print(f"pretrain: note: voxel probe: {note}", flush=True)
    folder = runs.open_run(config, "pretrain", facts)
    with runs.alone(folder) as found:
        done = found[1] if found else 0
        if done < plan.num_steps:
            launch.connect(config.ray)
            renderer = make_renderer(config, index, plan, nodes.await_nodes(config.train, found))
            feed = partial(stream.dataset, plan, renderer, num_cpus=launch.RENDER_CPUS)
            num_workers = config.train.num_workers
            if note := stream.too_large(renderer.row_bytes * plan.global_batch_size // num_workers, num_workers):
                print(f"pretrain: note: {note}", flush=True)
            worker_config = {"config": config.model_dump_json(), "run": folder, "hu_window": list(index.hu_window)}
            worker_config["data"] = trained_on
            print(
                f"pretrain: {config.method} by {optim.describe(config.optim)}, {len(plan.scan_ids)} scans, "
                f"steps {done} to {plan.num_steps}, {folder}",
                flush=True,
            )
            print(*(f"pretrain: {line}" for line in ahead.lines), sep="\n", flush=True)
            sizes = plan.num_steps, plan.global_batch_size
            stopped = launch.fit(worker, {**worker_config, "plan": plan}, feed, config.train, folder, *sizes)
            if stopped:
                raise FailedRun(stopped)
    rows = read_metrics(folder)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    probed = [row[ACCURACY] for row in rows if ACCURACY in row]
    probe, rise = (probed or [None])[-1], health.rise(rows, config.method, config.loss.kind)
    ends = losses[-1], health.newest_verdict(rows), done >= plan.num_steps
    return Result(folder, plan.num_steps, *ends, probe, rise)


def make_probe(config: PretrainConfig) -> Judges:
    """The voxel probe of `config.probe`, its scans read.

    Raises:
        ValueError: no labelled scans, or a store of another HU window than the one that is trained on.
    """
    where = config.probe.index or config.index
    index, window = store.read_index(where), store.read_index(config.index).hu_window
    if index.hu_window != window:
        raise ValueError(f"probe.index={where} has hu_window={index.hu_window}, index={config.index} has {window}")
    settings = {"index": where, "size": config.probe.size or config.views.size}
    return Judges(index, config.probe.model_copy(update=settings))


def build_model(config: PretrainConfig) -> tuple[nn.Module, Geometry]:
    """The method's network at its initial weights, the same on every rank, and the geometry of its last map.

    Raises:
        ValueError: the encoder has no map of the output stride, or the view size is no multiple of it.
    """
    align, heads = config.align, (config.heads.hidden, config.heads.out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(**config.encoder.model_dump())
        stride = align.output_stride if config.method == "pgl" else encoder.strides[-1]
        level, geometry = feature_geometry(encoder, config.views.size, stride, align.centers)
        if config.method == "pgl" and config.beyond_paper:
            more = [feature_geometry(encoder, config.views.size, other, align.centers) for other in align.more_strides]
            model = PlacesPgl(encoder, *heads, [*more, (level, geometry)], Objective(**config.loss.model_dump()))
        elif config.method == "pgl":
            model = Pgl(encoder, *heads, level, geometry, align.mask_clamped)
        elif config.method == "byol":
            model = Byol(encoder, *heads)
        else:
            model = Genesis(encoder)
    init_kaiming_uniform(model.online, config.seed)
    if config.method != "genesis":
        init_kaiming_uniform(model.predictor, config.seed + 1)
        if config.beyond_paper:
            init_kaiming_uniform(model.place, config.seed + 2)
        model.target.load_state_dict(model.online.state_dict())
    return model, geometry


def make_renderer(config: PretrainConfig, index: store.Index, plan: stream.Plan, has_gpu: bool = False) -> PairRenderer:
    """What turns rows of the plan into pairs of views, the ablations included; `has_gpu`: the workers have one."""
    on_gpu = config.stream.on_gpu
    if on_gpu == "auto":
        on_gpu = "intensity" if has_gpu and config.method != "genesis" else "nothing"
    return PairRenderer(
        index.store,
        plan.scan_ids,
        config.seed,
        ablated(config.views, config.align),
        config.intensity,
        shared_box=not config.align.crop,
        deform=config.method == "genesis",
        augment=on_gpu == "nothing",
        resize=on_gpu != "all",
        skip=config.stream.on_error == "skip",
        pairs_per_region=config.stream.pairs_per_region,
    )


def make_plan(config: PretrainConfig, index: store.Index) -> stream.Plan:
    """Which scan is drawn when.

    Raises:
        ValueError: no scan in the split, or not one whole batch.
    """
    ids = [scan.scan_id for scan in index.scans if config.split in (None, scan.split)]
    if not ids:
        has = sorted({scan.split for scan in index.scans})
        raise ValueError(f"index={config.index} has no scan in split={config.split!r}; it has: {has}")
    batch = config.global_batch_size
    lasts, regions = (config.epochs, config.max_steps), config.stream.pairs_per_region
    return stream.Plan.make(ids, config.pairs_per_scan, batch, *lasts, config.seed, regions)


def worker(session: Session, worker_config: dict) -> str | None:
    """The training loop on each rank; returns why it stopped early, the same on every rank, or none."""
    config = build(PretrainConfig, json.loads(worker_config["config"]))
    plan, mend = session.plan, f"start a new run=... with a lower optim.lr than {config.optim.lr}"

    # network, optimizer, schedule
    net, geometry = build_model(config)
    net = session.lay_out(net)
    encoder = net.get_submodule("online.encoder")
    if config.train.recompute:
        on.recompute(encoder)
    optimizer = optim.build_pretraining(net, config.optim)
    warmup = optim.warmup_steps(config.optim, plan.rows_per_epoch, plan.global_batch_size, plan.num_steps)
    schedule = optim.warmup_cosine(optimizer, warmup, plan.num_steps)

    # from where the newest checkpoint stands
    num_collapsed, skipped = session.state.get("num_collapsed", 0), session.state.get("skipped", {})
    session.resume(net, optimizer, schedule)
    if session.is_last or session.reason:
        return session.reason
    model = session.begin(best=ACCURACY)
    skipped = Skipped(plan, config.stream, skipped)
    judge = make_probe(config) if config.probe.every and session.rank == 0 else None
    model.train()
    for batch in session.batches(stream.ABOUT_ROWS):
        # views
        _check_rows(batch, session)
        skipped.add(batch["missed"])
        batch = finish(batch, config.views.size, config.intensity, worker_config["hu_window"])
        if session.step == 0 and session.rank == 0:
            _keep_views(session.run, batch, plan)
        pair = Pair.from_batch(batch)
        if config.align.wrong_priors:
            pair = pair.with_wrong_priors()

        # loss, step, target
        session.settle(model, lambda pair=pair: forward_and_back(model, net, pair, session.parts, session.autocast))
        decay = optim.ema_decay(session.step, plan.num_steps, config.ema_decay)
        done = train_step(model, net, optimizer, schedule, pair, decay, session.autocast, session.parts)
        session.advance()

        # what this step owes
        logs, checks, probes = map(session.due, (config.train.log_every, config.health.every, config.probe.every))
        keeps = probes or session.keeps(logs)
        if not (logs or checks or keeps):
            continue
        loss, grad_norm = torch.stack([done.output.loss, done.grad_norm]).tolist()  # waits for the device
        row = ranks.mean_over_workers({"train/loss": loss, "train/grad_norm": grad_norm})

        # reasons to stop here and now
        stop = session.stops(_not_finite(row, session.step, mend))
        stop = stop or (keeps and session.stops(session.blown_up(net, mend)))
        if stop or session.stops(session.storage_fault()):
            break

        # figures
        if checks:
            row |= _health(net, done, geometry)
            num_collapsed = num_collapsed + 1 if row["health/collapsed"] else 0
            if config.health.stop_on_collapse and num_collapsed >= 2 and not session.is_last:
                keeps = session.stops(_collapse(row, session.step, mend))  # with its row and a checkpoint
        if config.stream.on_error == "skip":
            row["data/skipped_share"], too_many = skipped.share(session.step, session.run if session.metrics else None)
            if session.stops(too_many):
                break
        if probes:
            with session.paused():
                row |= _probe(judge, encoder) if judge else {}
                watch.meet()
        if logs or checks or probes:
            session.log({"train/lr": done.lr, "ema/decay": decay, **row}, unit="pairs")
        if keeps:
            optim.average_buffers(net)
            own = {"meta": _meta(config, encoder.last, worker_config), "num_collapsed": num_collapsed}
            figures = {key: row[key] for key in ("train/loss", ACCURACY) if key in row}
            session.save(own | {"skipped": dict(skipped.rows)}, figures)
    return session.end()


def _not_finite(row: dict[str, float], step: int, mend: str) -> str | None:
    if all(map(math.isfinite, row.values())):
        return None
    return f"train/loss is {row['train/loss']} and train/grad_norm {row['train/grad_norm']} at step {step}: {mend}"


def _health(net: nn.Module, done: "Step", geometry: Geometry) -> dict[str, float]:
    """The health figures of a step, the workers' mean, and whether they are a collapse."""
    row = ranks.mean_over_workers(health.panel(net, done.output, done.pair, geometry))
    found = health.directions(row)
    row |= {} if found is None else {"health/directions": found}
    return row | {"health/collapsed": float(health.collapse(row) is not None)}


def _collapse(row: dict[str, float], step: int, mend: str) -> str:
    text = f"stopped at step {step}: {health.verdict({'step': step} | row)}: {mend} or a larger batch; "
    return text + "health.stop_on_collapse=false goes on with this one"


def _probe(judge: Judges, encoder: nn.Module) -> dict[str, float]:
    """What the voxel probe says of the encoder now, and how long it took."""
    began = time.monotonic()
    with watch.beating(encoder):
        score = judge.judge(encoder, READINGS[0])["voxels"]
    found = {f"probe/recall_{name}": value for name, value in score.details["recall"].items()}
    return {ACCURACY: score.value, "probe/seconds": time.monotonic() - began, **found}


def _check_rows(batch: dict[str, Tensor], session: Session) -> None:
    """A worker's batch must be its part of the step's rows, exactly: no pair twice, none lost, whatever happened."""
    plan, step, rank = session.plan, session.step, session.rank
    size = plan.global_batch_size // session.world
    due = {name: column[rank * size : (rank + 1) * size] for name, column in plan.columns(step, step + 1).items()}
    shown = batch["missed"].numpy() < 0
    for name, column in due.items():
        got = batch[name].numpy()
        if not np.array_equal(got[shown], column[shown]):
            raise FailedRun(f"the stream is out of step at step {step} of rank {rank}: {name} {got.tolist()}")


class Skipped:
    """Counts the pairs of a run that were left out because their scan could not be read.

    Args:
        plan, config: of the run.
        before: number of a scan -> its pairs that were left out before this start of the workers.
    """

    def __init__(self, plan: stream.Plan, config: StreamConfig, before: dict[int, int]):
        self.plan, self.config = plan, config
        self.waiting: list[int] = []
        self.rows: Counter[int] = Counter(before)

    def add(self, missed: Tensor) -> None:
        """Takes a batch's column, and keeps nothing of the batch: its memory is the object store's."""
        self.waiting += [scan for scan in missed.tolist() if scan >= 0]

    def share(self, step: int, run: str | None) -> tuple[float, str | None]:
        """Share of all workers' pairs, and why the run must stop, or none; all workers call this and get the same.

        Args:
            step: steps done.
            run: where skipped.json is written; none: nowhere.
        """
        missed, self.waiting = self.waiting, []
        for rows in ranks.of_all_workers(missed):
            self.rows.update(rows)
        named = {self.plan.scan_ids[scan]: num for scan, num in self.rows.most_common()}
        if run and named:
            with contextlib.suppress(OSError):  # it is written again with the next row
                write_json(Path(run) / "skipped.json", named)
        pairs = step * self.plan.global_batch_size
        share = self.rows.total() / pairs
        # one bad scan among the first pairs says nothing of the share of bad scans: an epoch's pairs, at least
        if self.rows.total() <= self.config.max_skipped_share * max(pairs, self.plan.rows_per_epoch):
            return share, None
        shown = ", ".join(list(named)[:5]) + ("" if len(named) <= 5 else f" and {len(named) - 5} more")
        return share, (
            f"{share:.1%} of the pairs up to step {step} were skipped, more than stream.max_skipped_share="
            f"{self.config.max_skipped_share}, because these scans cannot be read: {shown}; python -m pgl_ray.prepare "
            "verify store=... says what is wrong with them"
        )


class Step(NamedTuple):
    """What one training step did; nothing of it waits for the device. The output is that of `pair`, the last part."""

    pair: Pair
    output: Output
    grad_norm: Tensor
    lr: float


def train_step(
    model: nn.Module,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    pair: Pair,
    decay: float,
    autocast: torch.autocast,
    parts: int = 1,
) -> Step:
    """One step: loss, gradient, update, and the target after it.

    Args:
        model: what is called: `net`, or its DDP wrapper.
        net: Pgl, Byol or Genesis.
        optimizer, schedule: of `net`.
        pair: this worker's batch.
        decay: of the target.
        autocast: of the forward pass.
        parts: that the batch goes through in, one after the other; BatchNorm and the figures see a part at a time.
    """
    optimizer.zero_grad(set_to_none=True)
    pair, output = forward_and_back(model, net, pair, parts, autocast)
    grad_norm = health.norm(p.grad for p in net.parameters() if p.grad is not None)
    lr = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    net.follow(decay)
    return Step(pair, output, grad_norm, lr)


def forward_and_back(
    model: nn.Module, net: nn.Module, pair: Pair, parts: int, autocast: torch.autocast
) -> tuple[Pair, Output]:
    """Adds the gradient of a worker's batch to its parameters; the last part and its output, with the batch's loss.

    A model that is a DDP wrapper adds up over the workers at the last part, while that is still under way.
    """
    num, loss = len(pair.view_1), torch.zeros((), device=pair.view_1.device)
    columns = [[None] * parts if value is None else value.tensor_split(parts) for value in pair]
    for number, part in enumerate(map(Pair._make, zip(*columns)), 1):
        alone = model.no_sync() if model is not net and number < parts else contextlib.nullcontext()
        with alone:
            with autocast:
                output = model(part)
            (output.loss * (len(part.view_1) / num)).backward()
        loss += output.loss.detach() * (len(part.view_1) / num)
    return part, output._replace(loss=loss)


def _meta(config: PretrainConfig, level: int, worker_config: dict) -> dict:
    """What must be known to use the weights elsewhere; plain values. Stages behind map `level` were not trained."""
    encoder = json.loads(config.encoder.model_dump_json())
    meta = {"door": "pretrain", "method": config.method, "encoder": encoder, "level": level}
    meta |= {key: worker_config[key] for key in ("hu_window", "data")}
    return meta | {"config": config.model_dump_json()}


def _keep_views(run: str, batch: dict, plan: stream.Plan, num: int = 4) -> None:
    """Keeps the first pairs of the run, with all that makes them again, for the report's pictures."""
    names = ("view_1", "view_2", "box_1", "box_2", "flip_1", "flip_2", "epoch", "draw")
    arrays = {name: batch[name][:num].cpu().numpy() for name in names}
    arrays["scan_id"] = np.array([plan.scan_ids[i] for i in batch["scan"][:num].tolist()])
    with contextlib.suppress(OSError):  # a run goes on without pictures
        np.savez_compressed(f"{run}/views.npz", **arrays)


def describe(result: Result) -> str:
    """What the health figures say, and the closing line."""
    state = "was finished already" if result.already_finished else f"done after {result.steps} steps"
    more = "" if result.rise is None else f"  note: {result.rise}\n"
    more += "" if result.probe is None else f"  voxel probe: balanced accuracy {result.probe:.4f}\n"
    return f"  health: {result.health}\n{more}pretrain: {state}, loss {result.loss:.4f}; run in {result.run}"
