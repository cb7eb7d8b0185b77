"""python -m pgl_ray.pretrain [file.yaml] index=STORE run=RUN [a.b=c ...]: pre-training by PGL (paper, Sec. 3 and 5.1),
or by BYOL or Models Genesis on the same views."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("pretrain")

import contextlib
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pgl_ray import outlook
from pgl_ray.config import FailedRun, PretrainConfig, another_store, build
from pgl_ray.data import batch_views, store, stream
from pgl_ray.data.facts import seen_notes, store_facts, training_facts
from pgl_ray.data.trainings import make_plan, make_renderer
from pgl_ray.judge.judges import Judges
from pgl_ray.judge.readings import READINGS
from pgl_ray.model import device as on
from pgl_ray.model.pgl import Pair
from pgl_ray.prior import Geometry
from pgl_ray.train import checkpoint, health, launch, nodes, optim, ranks, runs
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.networks import build_pretraining
from pgl_ray.train.one_step import Step, forward_and_back, train_step
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.session import Session
from pgl_ray.train.skipped import Skipped
from pgl_ray.train.stops import collapsed, not_finite

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
    model, geometry = build_pretraining(config)
    encoder = model.get_submodule("online.encoder")
    ahead = outlook.of(config, index, plan, make_renderer(config, index, plan), encoder, geometry)
    trained_on = training_facts(index, plan.scan_ids)
    facts = {
        "num_parameters": sum(p.numel() for p in encoder.parameters()),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": store_facts(index, trained_on, len(plan.scan_ids)),
        "outlook": ahead.facts,
    }
    if config.probe.every and checkpoint.committed_step(config.run) < plan.num_steps:
        judges = make_probe(config)  # refuses what would only fail in the first worker
        for note in [*judges.notes, *seen_notes(trained_on, judges.probe.scans[1])]:
            print(f"pretrain: note: voxel probe: {note}", flush=True)
    folder = runs.open_run(config, "pretrain", facts)
    with runs.locked(folder) as held:
        done = held.newest[1] if held.newest else 0
        if done < plan.num_steps:
            launch.connect(config.ray)
            renderer = make_renderer(config, index, plan, nodes.await_nodes(config.train, held.newest))
            feed = stream.feed("pretrain", plan, renderer, config.train.num_workers, launch.RENDER_CPUS)
            worker_config = {"config": config.model_dump_json(), "run": folder, "hu_window": list(index.hu_window)}
            worker_config["data"] = trained_on
            print(
                f"pretrain: {config.method} by {optim.describe(config.optim)}, {len(plan.scan_ids)} scans, "
                f"steps {done} to {plan.num_steps}, {folder}",
                flush=True,
            )
            print(*(f"pretrain: {line}" for line in ahead.lines), sep="\n", flush=True)
            sizes = plan.num_steps, plan.global_batch_size
            stopped = launch.fit(worker, {**worker_config, "plan": plan}, feed, config.train, held, *sizes)
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
    if not index.labels:
        key = "probe.index" if config.probe.index else "index"
        need = f"probe.every={config.probe.every} needs some: give a store that has as probe.index=..."
        raise ValueError(f"{key}={where} holds no labels, and {need}")
    if index.hu_window != window:
        text = f"probe.index={where} has hu_window={list(index.hu_window)}, index={config.index} has {list(window)}"
        raise ValueError(f"{text}: {another_store('hu_window', window)}")
    settings = {"index": where, "size": config.probe.size or config.views.size}
    return Judges(index, config.probe.model_copy(update=settings))


def worker(session: Session, worker_config: dict) -> str | None:
    """The training loop on each rank; returns why it stopped early, the same on every rank, or none."""
    config = build(PretrainConfig, json.loads(worker_config["config"]))
    plan, mend = session.plan, f"start a new run=... with a lower optim.lr than {config.optim.lr}"

    # network, optimizer, schedule
    net, geometry = _network(session, config)
    encoder = net.get_submodule("online.encoder")
    optimizer = optim.build_pretraining(net, config.optim)
    warmup = optim.warmup_steps(config.optim, plan.rows_per_epoch, plan.global_batch_size, plan.num_steps)
    schedule = optim.warmup_cosine(optimizer, warmup, plan.num_steps)

    # from where the newest checkpoint stands
    num_collapsed = session.state.get("num_collapsed", 0)
    skipped = Skipped(plan, config.stream, session.state.get("skipped", {}))
    session.resume(net, optimizer, schedule)
    if session.is_last or session.reason:
        return session.reason
    model = session.begin(best=ACCURACY)
    judge = make_probe(config) if config.probe.every and session.rank == 0 else None
    for batch in session.batches(stream.ABOUT_ROWS):
        # views
        skipped.add(batch["missed"])
        pair = _views(batch, session, config, worker_config["hu_window"])

        # loss, step, target
        session.settle(model, lambda pair=pair: forward_and_back(model, net, pair, session.parts, session.autocast))
        decay = optim.ema_decay(session.step, plan.num_steps, config.ema_decay)
        done = train_step(model, net, optimizer, schedule, pair, decay, session.autocast, session.parts)
        session.advance()

        # what this step owes
        logs, checks, probes = map(session.due, (config.train.log_every, config.health.every, config.probe.every))
        keeps = probes or session.keeps()
        if not (logs or checks or keeps):
            continue

        # reasons to stop here and now
        row = _losses(done)
        stop = session.stops(not_finite(row, session.step, mend))
        stop = stop or (keeps and session.stops(session.blown_up(net, mend)))
        if stop or session.stops(session.storage_fault()):
            break

        # figures, and a checkpoint with them
        if checks:
            row |= _health(net, done, geometry)
            num_collapsed = num_collapsed + 1 if row["health/collapsed"] else 0
            if config.health.stop_on_collapse and num_collapsed >= 2 and not session.is_last:
                keeps = session.stops(collapsed(row, session.step, mend))  # with its row and a checkpoint
        if config.stream.on_error == "skip":
            row["data/skipped_share"], too_many = skipped.share(session.step, session.run if session.metrics else None)
            if session.stops(too_many):
                break
        row |= _probe(session, judge, encoder) if probes else {}
        if logs or checks or probes:
            session.log({"train/lr": done.lr, "ema/decay": decay, **row}, unit="pairs")
        if keeps:
            _save(session, net, row, _meta(config, encoder.last, worker_config), num_collapsed, skipped)
    return session.end()


def _network(session: Session, config: PretrainConfig) -> tuple[nn.Module, Geometry]:
    """The network on the device, and the geometry of its last map."""
    net, geometry = build_pretraining(config)
    net = session.lay_out(net)
    if config.train.recompute:
        on.recompute(net.get_submodule("online.encoder"))
    return net.train(), geometry


def _views(batch: dict[str, Tensor], session: Session, config: PretrainConfig, hu_window: tuple[float, float]) -> Pair:
    """The pair of views of a batch; the run's first ones are kept for the report."""
    _check_rows(batch, session)
    batch = batch_views.finish(batch, config.views.size, config.intensity, hu_window)
    if session.step == 0 and session.rank == 0:
        _keep_views(session.run, batch, session.plan)
    pair = Pair.from_batch(batch)
    return pair.with_wrong_priors() if config.align.wrong_priors else pair


def _losses(done: Step) -> dict[str, float]:
    """Loss and gradient of a step, the workers' mean; waits for the device."""
    loss, grad_norm = torch.stack([done.output.loss, done.grad_norm]).tolist()
    return ranks.mean_over_workers({"train/loss": loss, "train/grad_norm": grad_norm})


def _save(
    session: Session, net: nn.Module, row: dict[str, float], meta: CheckpointMeta, num_collapsed: int, skipped: Skipped
) -> None:
    """Takes a checkpoint, whose worth the row says."""
    optim.average_buffers(net)
    state = {"meta": meta.plain(), "num_collapsed": num_collapsed, "skipped": dict(skipped.rows)}
    session.save(state, {key: row[key] for key in ("train/loss", ACCURACY) if key in row})


def _health(net: nn.Module, done: Step, geometry: Geometry) -> dict[str, float]:
    """The health figures of a step, the workers' mean, and whether they are a collapse."""
    row = ranks.mean_over_workers(health.panel(net, done.output, done.pair, geometry))
    num_directions = health.directions(row)
    row |= {} if num_directions is None else {"health/directions": num_directions}
    return row | {"health/collapsed": float(health.collapse(row) is not None)}


def _probe(session: Session, judge: Judges | None, encoder: nn.Module) -> dict[str, float]:
    """What the voxel probe says of the encoder now on the rank that has one, and how long it took."""
    with session.paused():
        row = _judged(session, judge, encoder) if judge else {}
        session.meet()
    return row


def _judged(session: Session, judge: Judges, encoder: nn.Module) -> dict[str, float]:
    began = time.monotonic()
    with session.beating(encoder):
        score = judge.judge(encoder, READINGS[0])["voxels"]
    recalls = {f"probe/recall_{name}": value for name, value in score.details["recall"].items()}
    return {ACCURACY: score.value, "probe/seconds": time.monotonic() - began, **recalls}


def _check_rows(batch: dict[str, Tensor], session: Session) -> None:
    """A worker's batch must be its part of the step's rows, exactly: no pair twice, none lost, whatever happened."""
    plan, step, rank = session.plan, session.step, session.rank
    size = plan.global_batch_size // session.world
    due = {name: column[rank * size : (rank + 1) * size] for name, column in plan.columns(step, step + 1).items()}
    rendered = batch["missed"].numpy() < 0
    for name, column in due.items():
        got = batch[name].numpy()
        if not np.array_equal(got[rendered], column[rendered]):
            raise FailedRun(f"the stream is out of step at step {step} of rank {rank}: {name} {got.tolist()}")


def _meta(config: PretrainConfig, level: int, worker_config: dict) -> CheckpointMeta:
    """What its checkpoints say of the network, whose stages behind map `level` were not trained."""
    return CheckpointMeta(
        door="pretrain",
        method=config.method,
        encoder=config.encoder.model_dump(mode="json"),
        level=level,
        hu_window=worker_config["hu_window"],
        data=worker_config["data"],
        config=config.model_dump_json(),
    )


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
    notes = "" if result.rise is None else f"  note: {result.rise}\n"
    notes += "" if result.probe is None else f"  voxel probe: balanced accuracy {result.probe:.4f}\n"
    return f"  health: {result.health}\n{notes}pretrain: {state}, loss {result.loss:.4f}; run in {result.run}"
