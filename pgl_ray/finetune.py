"""python -m pgl_ray.finetune [file.yaml] index=STORE run=RUN [init=PRETRAINED] [a.b=c ...]: supervised training of the
segmentation network (paper, Sec. 5.1 and Appendix B)."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("finetune")

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pgl_ray.config import FailedRun, FinetuneConfig, InferenceConfig, build
from pgl_ray.data import patch_renderer, store, stream
from pgl_ray.data.facts import same_voxels, some, spacing_note, store_facts, training_facts
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.trainings import split_scans
from pgl_ray.judge import readings, scoring
from pgl_ray.model import device as on
from pgl_ray.model.inference import TooLittleMemory
from pgl_ray.model.metrics import summarise
from pgl_ray.model.segmenter import LightSegmenter, Segmenter, silence
from pgl_ray.train import checkpoint, health, launch, nodes, optim, ranks, runs, weights
from pgl_ray.train.metrics import unfinished
from pgl_ray.train.networks import build_finetuning
from pgl_ray.train.one_step import backward, train_mode
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.run_files import STATE
from pgl_ray.train.session import Session
from pgl_ray.train.stops import BEST, fault_of_losses, lower, memory_fault, smaller_batch
from pgl_ray.train.watch import JUDGE


@dataclass(frozen=True)
class Result:
    """Where a run lies and how well its best network did.

    Attributes:
        run: its folder.
        steps: that it trained.
        val_dice: of the best network.
        already_finished: nothing was left to do.
        overfitted: why it ended before the planned number of steps; none: it did not.
    """

    run: str
    steps: int
    val_dice: float
    already_finished: bool
    overfitted: str | None = None


def run(config: FinetuneConfig) -> Result:
    """Trains, or continues, the run `config.run`; returns at once if it is finished.

    Raises:
        ValueError: wrong config, an index without labels, or a checkpoint of another architecture.
        FailedRun: training failed.
    """
    index = store.read_index(config.index)
    train_ids, val_ids = split_scans(config, index)
    earlier = begun(config)
    model, meta, loaded = build_finetuning(config, index, earlier)
    before = loaded.trained_on if loaded else earlier and earlier.data
    trained_on = training_facts(index, [*train_ids, *val_ids], with_labels=True, before=before)
    meta = meta.model_copy(update={"data": trained_on})
    limits = (config.epochs, config.max_steps, config.seed)
    plan = stream.Plan.make(train_ids, config.patches_per_scan, config.global_batch_size, *limits)
    facts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": store_facts(index, trained_on, len(index.scans), [*train_ids, *val_ids]),
        "scans": {"train": train_ids, "val": val_ids},
        "weights": asdict(loaded) if loaded else None,
    }
    folder = runs.open_run(config, "finetune", facts)
    with runs.locked(folder) as held:
        done = held.newest
        finished = done is not None and _is_over(done[0], plan.num_steps)
        if not finished:
            launch.connect(config.ray)
            nodes.await_nodes(config.train, done)
            feed = _feed(config, index, plan)
            numbers = f"{len(train_ids)} scans to train on, {len(val_ids)} to validate, steps {done[1] if done else 0}"
            _say_what_begins(
                config, index, model, meta, loaded, facts["scans"], f"{numbers} to {plan.num_steps}, {folder}"
            )
            worker_config = {"config": config.model_dump_json(), "run": folder, "plan": plan, "meta": meta}
            _fit(config, plan, feed, worker_config | {"val_ids": set(val_ids)}, held)
    best, steps = checkpoint.state_of(folder), checkpoint.committed_step(folder)
    overfitted = None
    if steps < plan.num_steps:
        validations = f"{config.patience} validation{'s' * (config.patience != 1)}"
        overfitted = f"overfits: {validations} without a better val/dice than that of step {best['step']}, so it "
        overfitted += f"stopped before step {plan.num_steps}"
    return Result(folder, steps, best["val_dice"], finished, overfitted)


def _feed(config: FinetuneConfig, index: store.Index, plan: stream.Plan) -> Callable:
    """What makes the workers' patches; says where the cluster's memory is short for them."""
    renderer = patch_renderer.PatchRenderer(
        index.store, plan.scan_ids, config.seed, config.patch, config.intensity, config.foreground_share
    )
    return stream.feed("finetune", plan, renderer, config.train.num_workers, launch.RENDER_CPUS)


def _fit(config: FinetuneConfig, plan: stream.Plan, feed: Callable, worker_config: dict, held: runs.Held) -> None:
    """Trains to the end of the plan.

    Raises:
        FailedRun: it does not come there; where memory was too short, with the batch to take.
    """
    try:
        stopped = launch.fit(worker, worker_config, feed, config.train, held, plan.num_steps, plan.global_batch_size)
    except FailedRun as error:
        if launch.NO_MEMORY not in str(error):
            raise
        raise FailedRun(f"{error}, {smaller_batch(config)}") from error
    if stopped:
        raise FailedRun(stopped)


def begun(config: FinetuneConfig) -> CheckpointMeta | None:
    """What the run's own newest checkpoint says, from which it continues; none: it starts from `config.init`."""
    try:
        return checkpoint.state_of(config.run)["meta"] if config.init != "random" else None
    except ValueError:
        return None


def worker(session: Session, worker_config: dict) -> str | None:
    """The training loop on each rank; returns why it had to stop, the same on every rank, or none."""
    config = build(FinetuneConfig, json.loads(worker_config["config"]))
    plan, meta, index = session.plan, worker_config["meta"], store.read_index(config.index)
    val_records = [scan for scan in index.scans if scan.scan_id in worker_config["val_ids"]]

    # network, optimizer, schedule
    segmenter, optimizer = _network(session, config, index, meta)
    schedule = optim.polynomial(optimizer, plan.num_steps)

    # from where the newest checkpoint stands
    best, stale = session.state.get("best", -1.0), session.state.get("stale", 0)
    session.resume(segmenter, optimizer, schedule)
    if session.is_last or session.reason or session.state.get("stopped"):
        return session.reason
    model, overfits = session.begin(), False
    steps_per_val = max(1, round(config.validate_every * plan.rows_per_epoch / plan.global_batch_size))
    unseen: list[torch.Tensor] = []  # loss and norm of the gradient of the steps since they were last looked at
    for batch in session.batches(stream.ABOUT_ROWS):
        # loss and step
        unseen.append(_step(session, model, segmenter, optimizer, batch, config))
        if session.reason:
            break
        lr = schedule.get_last_lr()[0]
        schedule.step()
        session.advance()

        # what this step owes
        logs, validates = session.due(config.train.log_every), session.is_last or session.step % steps_per_val == 0
        keeps = session.keeps()
        if not (logs or validates or keeps):
            continue
        values, unseen = np.mean(ranks.of_all_workers(torch.stack(unseen).tolist()), 0), []

        # reasons to stop here and now
        not_finite = fault_of_losses(config, values, session.step, best, config.run)
        stop = session.stops(not_finite) or session.stops(session.storage_fault())
        mend = lower(config, best, config.run)
        if stop or ((validates or keeps) and session.stops(session.blown_up(segmenter, mend))):
            break

        # figures; the best network is kept, and training stops when it overfits
        if logs:
            session.log({"train/loss": values[-1, 0], "train/grad_norm": values[-1, 1], "train/lr": lr}, unit="patches")
        if validates or keeps:
            optim.average_buffers(segmenter)
        if validates:
            scores = validate(session, segmenter, config, index, val_records)
            stale = 0 if scores["val/dice"] > best or not best else stale + 1
            if stale == 0:
                best = scores["val/dice"]
                session.save_file(BEST, {"model": segmenter.state_dict(), "meta": meta.plain(), "val_dice": best})
            session.log(scores)
        overfits = stale >= config.patience
        if keeps or overfits:
            session.save({"best": best, "stale": stale, "stopped": overfits, "meta": meta.plain()}, {"val/best": best})
        if overfits:
            break
    return session.end(is_over=overfits)


def _network(
    session: Session, config: FinetuneConfig, index: store.Index, meta: CheckpointMeta
) -> tuple[Segmenter | LightSegmenter, torch.optim.Optimizer]:
    """The network on the device and its optimizer; what was committed needs the initial weights no more."""
    begun = bool(session.state)
    segmenter = build_finetuning(config, index, meta if begun else None)[0]
    if config.freeze and not begun:
        _prepare_frozen(session, on.lay_out(segmenter, session.device).encoder, config, index)
    segmenter = session.lay_out(segmenter)
    if config.train.recompute and not config.freeze:
        on.recompute(segmenter.encoder)
    train_mode(segmenter, config.freeze)
    optimizer = optim.build_finetuning(segmenter, config.optim)
    silence(segmenter.head, index.annotated(session.plan.scan_ids), optimizer)
    return segmenter, optimizer


def _step(
    session: Session,
    model: torch.nn.Module,
    segmenter: Segmenter | LightSegmenter,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    config: FinetuneConfig,
) -> torch.Tensor | None:
    """One step; its loss and the norm of its gradient [2], or none where memory is too short, which ends the run."""
    _check_rows(batch, session.step)
    optimizer.zero_grad(set_to_none=True)
    about_loss = config.task, config.accumulate * session.parts, session.autocast, config.loss.ce_weight
    loss_of = partial(backward, model, segmenter, batch, *about_loss)
    try:
        session.settle(model, loss_of)
        loss = loss_of()
        norm = health.norm(p.grad for p in segmenter.parameters() if p.grad is not None)
        optimizer.step()  # the first one makes room for its state
    except RuntimeError as error:
        if session.stops(memory_fault(error, session, config)):
            return None
        raise
    return torch.stack([loss, norm])


def _check_rows(batch: dict[str, torch.Tensor], step: int) -> None:
    if not (batch["step"] == step).all():
        raise FailedRun(f"the stream is out of step: {batch['step'].tolist()} at step {step}")


def validate(
    session: Session,
    segmenter: Segmenter | LightSegmenter,
    config: FinetuneConfig,
    index: store.Index,
    records: list[ScanRecord],
) -> dict[str, float]:
    """Dice per organ over the validation scans, which the ranks share; the network is left in training mode.

    Returns:
        The same on every rank: val/dice, the mean over organs that occur, and val/dice_<organ>.
    """
    inference, windows = InferenceConfig(precision=config.train.precision), (config.task, config.patch.size)
    mine, rows = records[session.rank :: session.world], []
    with session.paused():
        session.at(JUDGE, session.step - 1)
        segmenter.eval()
        with session.beating(segmenter):
            try:
                for scored in scoring.score_scans(segmenter, *windows, index, mine, inference, distances=False):
                    rows += scored.rows
            except TooLittleMemory as error:
                mend = "train.device=cpu, or a new run=... with a smaller patch.size"
                raise FailedRun(f"validation: {error.what}: take {mend}") from None
        session.meet()
        summary = summarise([row for part in ranks.of_all_workers(rows) for row in part])
        train_mode(segmenter, config.freeze)
    scores = {f"val/dice_{organ}": of_organ["dice"] for organ, of_organ in summary["organs"].items()}
    scores = {key: float(value) for key, value in scores.items() if value is not None}
    return {"val/dice": summary["dice"] or 0.0, **scores}


def _prepare_frozen(session: Session, encoder: torch.nn.Module, config: FinetuneConfig, index: store.Index) -> None:
    """Gives a frozen encoder's BatchNorm the statistics of unlabelled views, as the judges do, whatever it starts from:
    those of random weights are 0 and 1, and a comparison would be one of states. The same on all workers."""
    if readings.norms(encoder):
        scans = [scan for scan in index.scans if scan.split == config.split]
        views = readings.unlabelled_views(index, scans, config.patch.size, config.seed)
        with session.beating(encoder):
            readings.reestimate(encoder, views)
        ranks.share_buffers(encoder)


def _is_over(folder: Path, num_steps: int) -> bool:
    state = checkpoint.read_state(folder / STATE)
    return state["stopped"] or state["step"] >= num_steps


def _say_what_begins(
    config: FinetuneConfig,
    index: store.Index,
    model: Segmenter | LightSegmenter,
    meta: CheckpointMeta,
    loaded: weights.Report | None,
    scan_ids: dict[str, list[str]],
    numbers: str,
) -> None:
    """What is trained, from which weights, and what is doubtful about them and about the scans."""
    print(
        f"finetune: init={config.init}{_frozen(config, model)}, {config.decoder} decoder, "
        f"{optim.describe(config.optim)}, {numbers}",
        flush=True,
    )
    for line in loaded.lines() if loaded else ():
        print(f"  weights: {line}", flush=True)
    for note in filter(None, (spacing_note(loaded.trained_on, index), unfinished(config.init)) if loaded else ()):
        print(f"finetune: note: init={config.init} {note}", flush=True)
    train, val = ([scan for scan in index.scans if scan.scan_id in {*scan_ids[use]}] for use in ("train", "val"))
    if same := same_voxels(train, val):
        twice = f"the same voxels are trained on and validated on: {some(same)}"
        print(f"finetune: note: {twice}; val/dice is too good, and what is best by it may not be", flush=True)
    seen_labels = {label for scan in train for label in scan.label_voxels if label in scan.labelled}
    if missing := sorted(name for name, label in index.labels.items() if label not in seen_labels):
        count = "it is" if len(missing) == 1 else "they are"
        mend = "annotate it in more scans" + (f", or raise num_scans={config.num_scans}" * (config.num_scans != 1.0))
        print(f"finetune: note: no scan to train on shows {', '.join(missing)}: {count} not learnt; {mend}", flush=True)
    if isinstance(model, Segmenter) and (skip := min(model.skips)) > 1:
        stride, finer = model.encoder.strides[skip], model.encoder.strides[0]
        print(
            f"finetune: note: decoder=paper ends at stride {stride} of this encoder, which has maps down to {finer}: "
            "decoder=light takes its finest one, too",
            flush=True,
        )
    if meta.init_level < len(model.encoder.channels) - 1:
        print(
            f"finetune: {config.init} was trained up to stage {meta.init_level} of the encoder "
            "(align.output_stride): the stages behind it start at random",
            flush=True,
        )


def _frozen(config: FinetuneConfig, model: Segmenter | LightSegmenter) -> str:
    """What the first line says of it."""
    if not config.freeze:
        return ""
    num = readings.NUM_VIEWS
    how = f" (BatchNorm's statistics are those of {num} unlabelled views)" if readings.norms(model.encoder) else ""
    return f", encoder frozen{how}"


def describe(result: Result) -> str:
    """The closing line."""
    state = "was finished already" if result.already_finished else f"done after {result.steps} steps"
    why = f" ({result.overfitted})" if result.overfitted else ""
    return f"finetune: {state}{why}, best val/dice {result.val_dice:.4f}; run in {result.run}"
