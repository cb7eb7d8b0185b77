"""python -m pgl_ray.finetune [file.yaml] index=STORE run=RUN [init=PRETRAINED] [a.b=c ...]: supervised training of the
segmentation network (paper, Sec. 5.1 and Appendix B)."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("finetune")

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pgl_ray import evaluate
from pgl_ray.config import FailedRun, FinetuneConfig, InferenceConfig, build
from pgl_ray.data import store, stream
from pgl_ray.data.facts import spacing_note, training_facts
from pgl_ray.data.patch_renderer import PatchRenderer
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.judge import readings
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.inference import TooLittleMemory, out_of_memory
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.metrics import summarise
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import LightSegmenter, Segmenter, build_segmenter
from pgl_ray.train import checkpoint, health, launch, nodes, optim, ranks, runs, watch, weights
from pgl_ray.train.run_files import STATE
from pgl_ray.train.session import Session

BEST = "best.pt"


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
    model, meta, loaded = build_model(config, index, earlier)
    before = loaded.trained_on if loaded else (earlier or {}).get("data")
    meta["data"] = training_facts(index, [*train_ids, *val_ids], with_labels=True, before=before)
    limits = (config.epochs, config.max_steps, config.seed)
    plan = stream.Plan.make(train_ids, config.patches_per_scan, config.global_batch_size, *limits)
    facts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": {"num_scans": len(index.scans), "labels": index.labels, "hu_window": index.hu_window},
        "scans": {"train": train_ids, "val": val_ids},
        "weights": dataclasses.asdict(loaded) if loaded else None,
    }
    folder = runs.open_run(config, "finetune", facts)
    with runs.alone(folder) as done:
        finished = done is not None and _is_over(done[0], plan.num_steps)
        if not finished:
            launch.connect(config.ray)
            nodes.await_nodes(config.train, done)
            renderer = PatchRenderer(
                index.store, plan.scan_ids, config.seed, config.patch, config.intensity, config.foreground_share
            )
            feed = partial(stream.dataset, plan, renderer, num_cpus=launch.RENDER_CPUS)
            num_workers = config.train.num_workers
            if note := stream.too_large(renderer.row_bytes * plan.global_batch_size // num_workers, num_workers):
                print(f"finetune: note: {note}", flush=True)
            print(
                f"finetune: init={config.init}{_frozen(config, model)}, "
                f"{config.decoder} decoder, {optim.describe(config.optim)}, {len(train_ids)} scans to "
                f"train on, {len(val_ids)} to validate, steps {done[1] if done else 0} to {plan.num_steps}, {folder}",
                flush=True,
            )
            for line in loaded.lines() if loaded else ():
                print(f"  weights: {line}", flush=True)
            if note := loaded and spacing_note(loaded.trained_on, index):
                print(f"finetune: note: init={config.init} {note}", flush=True)
            if meta["init_level"] < len(model.encoder.channels) - 1:
                print(
                    f"finetune: {config.init} was trained up to stage {meta['init_level']} of the encoder "
                    "(align.output_stride): the stages behind it start at random",
                    flush=True,
                )
            worker_config = {"config": config.model_dump_json(), "run": folder, "plan": plan, "meta": meta}
            worker_config |= {"val_ids": val_ids}
            try:
                sizes = plan.num_steps, plan.global_batch_size
                stopped = launch.fit(worker, worker_config, feed, config.train, folder, *sizes)
            except FailedRun as error:
                if launch.NO_MEMORY not in str(error):
                    raise
                raise FailedRun(f"{error}, {smaller_batch(config)}") from error
            if stopped:
                raise FailedRun(stopped)
    best, steps = checkpoint.state_of(folder), checkpoint.committed_step(folder)
    overfitted = None
    if steps < plan.num_steps:
        validations = f"{config.patience} validation{'s' * (config.patience != 1)}"
        overfitted = f"overfits: {validations} without a better val/dice than that of step {best['step']}, so it "
        overfitted += f"stopped before step {plan.num_steps}"
    return Result(folder, steps, best["val_dice"], finished, overfitted)


def split_scans(config: FinetuneConfig, index: store.Index) -> tuple[list[str], list[str]]:
    """Scan ids to train on and to validate on, drawn with the seed.

    Raises:
        ValueError: no labels, or too few labelled scans.
    """
    if not index.labels:
        raise ValueError(f"index={config.index} holds no labels: prepare it from a source with label maps")
    ids = [scan.scan_id for scan in index.labelled(config.split)]
    num = config.num_scans if isinstance(config.num_scans, int) else round(config.num_scans * len(ids))
    if num > len(ids) or num < 2:
        raise ValueError(
            f"num_scans={config.num_scans}: split={config.split!r} of {config.index} has {len(ids)} labelled scans, "
            f"and at least 2 are needed (one to train on, one to validate)"
        )
    chosen = [ids[i] for i in np.random.default_rng((config.seed, 1)).permutation(len(ids))[:num]]
    num_val = min(max(1, round(config.val_share * num)), num - 1)
    return sorted(chosen[num_val:]), sorted(chosen[:num_val])


def begun(config: FinetuneConfig) -> dict | None:
    """Meta dict of the run's own newest checkpoint, from which it continues; none: it starts from `config.init`."""
    try:
        return checkpoint.state_of(config.run)["meta"] if config.init != "random" else None
    except ValueError:
        return None


def build_model(
    config: FinetuneConfig, index: store.Index, begun: dict | None = None
) -> tuple[Segmenter | LightSegmenter, dict, weights.Report | None]:
    """The network at its initial weights, the meta dict of its checkpoints, and what was loaded, if anything.

    Args:
        config: of the run.
        index: of its scans.
        begun: the meta dict of a checkpoint of this run: the network is that one's, `config.init` is not read and need
            not be there any more, and the weights are to be filled in.

    Raises:
        ValueError: `config.init` is missing, or of another architecture or HU window.
    """
    settings, source = config.encoder.model_dump() if config.encoder else None, None
    if begun or config.init == "random":
        encoder = build_encoder(**(begun["encoder"] if begun else settings or {}))
    else:
        encoder, source = weights.read(config.init, settings, index.hu_window, config.allow_partial)
    num_outputs = len(index.labels) + (config.task == "multiclass")
    model = build_segmenter(encoder, num_outputs, config.decoder)
    init_kaiming_uniform(model, config.seed)
    loaded = weights.fill(model, weights.for_segmenter(source, model), config.allow_partial) if source else None
    level = begun["init_level"] if begun else encoder.last
    level = source.meta.get("level", level) if source else level
    if config.freeze:
        if level < len(encoder.channels) - 1:
            raise ValueError(
                f"freeze=true: {config.init} was trained up to stage {level} of the encoder (align.output_stride) and "
                f"the network reads stage {len(encoder.channels) - 1}, too, which would stay random: take freeze=false"
            )
        encoder.requires_grad_(False)
    meta = {
        "door": "finetune",
        "encoder": encoder.settings,
        "decoder": config.decoder,
        "hu_window": list(index.hu_window),
        "spacing_mm": index.spacing_mm and list(index.spacing_mm),
        "labels": dict(index.labels),
        "task": config.task,
        "num_outputs": num_outputs,
        "patch_size": list(config.patch.size),
        "init_level": level,
        "config": config.model_dump_json(),
    }
    return model, meta, loaded


def worker(session: Session, worker_config: dict) -> str | None:
    """The training loop on each rank; returns why it had to stop, the same on every rank, or none."""
    config = build(FinetuneConfig, json.loads(worker_config["config"]))
    plan, meta, begun = session.plan, worker_config["meta"], bool(session.state)
    index = store.read_index(config.index)
    val_ids = set(worker_config["val_ids"])
    val_records = [scan for scan in index.scans if scan.scan_id in val_ids]

    # network, optimizer, schedule; what was committed needs the initial weights no more
    segmenter = build_model(config, index, meta if begun else None)[0]
    if config.freeze and not begun:
        prepare_frozen(on.lay_out(segmenter, session.device).encoder, config, index)
    segmenter = session.lay_out(segmenter)
    if config.train.recompute and not config.freeze:
        on.recompute(segmenter.encoder)
    optimizer = optim.build_finetuning(segmenter, config.optim)
    schedule = optim.polynomial(optimizer, plan.num_steps)

    # from where the newest checkpoint stands
    best, stale = session.state.get("best", -1.0), session.state.get("stale", 0)
    session.resume(segmenter, optimizer, schedule)
    if session.is_last or session.reason or session.state.get("stopped"):
        return session.reason
    model = session.begin()
    parts, overfitted = config.accumulate * session.parts, False
    steps_per_val = max(1, round(config.validate_every * plan.rows_per_epoch / plan.global_batch_size))
    train_mode(segmenter, config.freeze)
    unseen: list[torch.Tensor] = []  # loss and norm of the gradient of the steps since they were last looked at
    for batch in session.batches(stream.ABOUT_ROWS):
        # loss and step
        _check_rows(batch, session.step)
        optimizer.zero_grad(set_to_none=True)
        about_loss = config.task, parts, session.autocast, config.loss.ce_weight
        loss_of = partial(backward, model, segmenter, batch, *about_loss)
        try:
            session.settle(model, loss_of)
            loss = loss_of()
            norm = health.norm(p.grad for p in segmenter.parameters() if p.grad is not None)
            optimizer.step()  # the first one makes room for its state
        except RuntimeError as error:
            if session.stops(_memory_fault(error, session, config)):
                break
            raise
        unseen.append(torch.stack([loss, norm]))
        lr = schedule.get_last_lr()[0]
        schedule.step()
        session.advance()

        # what this step owes
        logs, validates = session.due(config.train.log_every), session.is_last or session.step % steps_per_val == 0
        keeps = session.keeps(logs)
        if not (logs or validates or keeps):
            continue
        values, unseen = np.mean(ranks.of_all_workers(torch.stack(unseen).tolist()), 0), []

        # reasons to stop here and now
        not_finite = fault_of_losses(config, values, session.step, best, config.run)
        stop = session.stops(not_finite) or session.stops(session.storage_fault())
        lower = _lower(config, best, config.run)
        if stop or ((validates or keeps) and session.stops(session.blown_up(segmenter, lower))):
            break

        # figures; the best network is kept, and training stops when it overfits
        if logs:
            session.log({"train/loss": values[-1, 0], "train/grad_norm": values[-1, 1], "train/lr": lr}, unit="patches")
        if validates or keeps:
            optim.average_buffers(segmenter)
        if validates:
            with session.paused():
                scores = _validate(session, segmenter, config, meta, index, val_records)
            stale = 0 if scores["val/dice"] > best or not best else stale + 1
            if stale == 0:
                best = scores["val/dice"]
                session.save_file(BEST, {"model": segmenter.state_dict(), "meta": meta, "val_dice": best})
            session.log(scores)
        overfitted = stale >= config.patience
        if keeps or overfitted:
            session.save({"best": best, "stale": stale, "stopped": overfitted, "meta": meta}, {"val/best": best})
        if overfitted:
            break
    return session.end(is_over=overfitted)


def _check_rows(batch: dict[str, torch.Tensor], step: int) -> None:
    if not (batch["step"] == step).all():
        raise FailedRun(f"the stream is out of step: {batch['step'].tolist()} at step {step}")


def _memory_fault(error: RuntimeError, session: Session, config: FinetuneConfig) -> str | None:
    """Why a step that failed for want of memory ends the run; none where it failed for something else."""
    if not out_of_memory(error):
        return None
    reason = f"out of memory on {session.device} at step {session.step + 1} {smaller_batch(config)}"
    if session.world > 1:
        raise FailedRun(reason) from error  # the other ranks wait for this one's gradient
    return reason


def _validate(
    session: Session,
    segmenter: Segmenter | LightSegmenter,
    config: FinetuneConfig,
    meta: dict,
    index: store.Index,
    records: list[ScanRecord],
) -> dict[str, float]:
    """`validate` between two steps; the network is left in training mode."""
    watch.at(session.step - 1, watch.JUDGE)
    inference = InferenceConfig(precision=config.train.precision)
    scores = validate(segmenter, meta, index, records, inference, session.rank, session.world)
    train_mode(segmenter, config.freeze)
    return scores


def prepare_frozen(encoder: torch.nn.Module, config: FinetuneConfig, index: store.Index) -> None:
    """Gives a frozen encoder's BatchNorm the statistics of unlabelled views, as the judges do, whatever it starts from:
    those of random weights are 0 and 1, and a comparison would be one of states. The same on all workers."""
    if readings.norms(encoder):
        scans = [scan for scan in index.scans if scan.split == config.split]
        views = readings.unlabelled_views(index, scans, config.patch.size, config.seed)
        with watch.beating(encoder):
            readings.reestimate(encoder, views)
        ranks.share_buffers(encoder)


def _frozen(config: FinetuneConfig, model: Segmenter | LightSegmenter) -> str:
    """What the first line says of it."""
    if not config.freeze:
        return ""
    num = readings.NUM_VIEWS
    how = f" (BatchNorm's statistics are those of {num} unlabelled views)" if readings.norms(model.encoder) else ""
    return f", encoder frozen{how}"


def train_mode(model: Segmenter | LightSegmenter, freeze: bool) -> None:
    """Training mode, but for a frozen encoder: its BatchNorm neither uses nor collects statistics of the batch."""
    model.train()
    if freeze:
        model.encoder.eval()


def backward(
    model: torch.nn.Module,
    net: Segmenter | LightSegmenter,
    batch: dict[str, torch.Tensor],
    task: str,
    parts: int,
    autocast: torch.autocast,
    ce_weight: float | None = None,
) -> torch.Tensor:
    """Adds the gradient of a worker's batch to its parameters; the loss, without gradient.

    In parts, the gradient is still that of the whole batch's loss. It is no mean over parts, for Dice's sums run over
    the batch: a first pass without gradient gives all logits, the loss is differentiated there, and a second pass
    carries each part's share on through the network.

    Args:
        model: what is called: `net`, or its DDP wrapper, which adds up over the workers at the last part.
        net: the network.
        batch: of a PatchRenderer.
        task: of the loss.
        parts: divides the batch.
        autocast: of the forward passes.
        ce_weight: of the loss.
    """
    target, labelled = batch["target"].long(), batch["labelled"].bool()
    if parts == 1:
        with autocast:
            loss = segmentation_loss(model(batch["patch"].float()), target, task, labelled, ce_weight)
        loss.backward()
        return loss.detach()
    patches = batch["patch"].tensor_split(parts)
    norms = [part for part in net.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics take each part in once, in the second pass
    with torch.no_grad(), autocast:
        logits = torch.cat([net(patch.float()).float() for patch in patches])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    logits.requires_grad_()
    loss = segmentation_loss(logits, target, task, labelled, ce_weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    for number, (patch, share) in enumerate(zip(patches, gradient.tensor_split(parts), strict=True), 1):
        alone = model.no_sync() if model is not net and number < parts else nullcontext()
        with alone:
            with autocast:
                found = model(patch.float())
            found.backward(share.to(found.dtype))
    return loss.detach()


def smaller_batch(config: FinetuneConfig) -> str:
    """The batch to try where memory is too short."""
    whole = config.global_batch_size // config.train.num_workers
    now, size = whole // config.accumulate, "x".join(map(str, config.patch.size))
    text = f"with {now} patches of {size} at a time; "
    if now == 1:
        return text + "one alone is too large: lower patch.size, or take train.precision=bfloat16"
    fewer = max(n for n in range(1, now // 2 + 1) if whole % n == 0)
    return (
        f"{text}try accumulate={whole // fewer}, the same batch {fewer} at a time, "
        f"or a new run=... with global_batch_size={fewer * config.train.num_workers}"
    )


def fault_of_losses(config: FinetuneConfig, values: np.ndarray, step: int, best: float, run: str) -> str | None:
    """Why losses and gradients [steps, 2], the last of them of `step`, end the run, if they do."""
    if np.isfinite(values).all():
        return None
    first = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
    what = f"train/loss is {values[first, 0]} and train/grad_norm {values[first, 1]}"
    return f"{what} at step {step - len(values) + 1 + first}: {_lower(config, best, run)}"


def _lower(config: FinetuneConfig, best: float, run: str) -> str:
    """What to do against a loss or weights that are not finite."""
    kept = f"{run}/{BEST} keeps the best network so far (val/dice {best:.4f})" if best >= 0 else "nothing was kept"
    return f"start a new run=... with a lower optim.lr than {config.optim.lr}; {kept}"


def validate(
    model: Segmenter | LightSegmenter,
    meta: dict,
    index: store.Index,
    records: list[ScanRecord],
    inference: InferenceConfig,
    rank: int,
    world: int,
) -> dict[str, float]:
    """Dice per organ over the validation scans, which the ranks share.

    Returns:
        The same on every rank: val/dice, the mean over organs that occur, and val/dice_<organ>.
    """
    model.eval()
    rows = []
    with watch.beating(model):
        try:
            for scored in evaluate.score_scans(model, meta, index, records[rank::world], inference, distances=False):
                rows += scored.rows
        except TooLittleMemory as error:
            mend = "train.device=cpu, or a new run=... with a smaller patch.size"
            raise FailedRun(f"validation: {error.what}: take {mend}") from None
    watch.meet()
    summary = summarise([row for part in ranks.of_all_workers(rows) for row in part])
    scores = {f"val/dice_{organ}": found["dice"] for organ, found in summary["organs"].items()}
    scores = {key: float(value) for key, value in scores.items() if value is not None}
    return {"val/dice": summary["dice"] or 0.0, **scores}


def _is_over(folder: Path, num_steps: int) -> bool:
    state = checkpoint.read_state(folder / STATE)
    return state["stopped"] or state["step"] >= num_steps


def describe(result: Result) -> str:
    """The closing line."""
    state = "was finished already" if result.already_finished else f"done after {result.steps} steps"
    why = f" ({result.overfitted})" if result.overfitted else ""
    return f"finetune: {state}{why}, best val/dice {result.val_dice:.4f}; run in {result.run}"
