"""python -m pgl_ray.finetune [file.yaml] index=STORE run=RUN [init=PRETRAINED] [a.b=c ...]: supervised training of the
segmentation network (paper, Sec. 5.1 and Appendix B)."""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pgl_ray import evaluate
from pgl_ray.config import EncoderConfig, FailedRun, FinetuneConfig, InferenceConfig, build, command
from pgl_ray.data import store, stream
from pgl_ray.data.facts import training_facts
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.metrics import summarise
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import checkpoint, launch, optim

BEST = "best.pt"


@dataclass(frozen=True)
class Result:
    """Where a run lies and how well its best network did."""

    run: str
    steps: int
    val_dice: float
    already_finished: bool


def run(config: FinetuneConfig) -> Result:
    """Trains, or continues, the run `config.run`; returns at once if it is finished.

    Raises:
        ValueError: wrong config, an index without labels, or a checkpoint of another architecture.
        FailedRun: training failed.
    """
    index = store.read_index(config.index)
    train_ids, val_ids = split_scans(config, index)
    model, meta = build_model(config, index)
    meta["data"] = training_facts(index, [*train_ids, *val_ids])
    limits = (config.epochs, config.max_steps, config.seed)
    plan = stream.Plan.make(train_ids, config.patches_per_scan, config.global_batch_size, *limits)
    facts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": {"num_scans": len(index.scans), "labels": index.labels, "hu_window": index.hu_window},
        "scans": {"train": train_ids, "val": val_ids},
    }
    folder = checkpoint.open_run(config, "finetune", facts)
    done = checkpoint.committed(folder)
    finished = done is not None and _is_over(done[0], plan.num_steps)
    if not finished:
        launch.connect(config.ray)
        renderer = stream.PatchRenderer(
            index.store, plan.scan_ids, config.seed, config.patch, config.intensity, config.foreground_share
        )
        feed = partial(stream.dataset, plan, renderer, config.train.num_workers, num_cpus=launch.RENDER_CPUS)
        print(
            f"finetune: init={config.init}, {len(train_ids)} scans to train on, {len(val_ids)} to validate, "
            f"steps {done[1] if done else 0} to {plan.num_steps}, {folder}",
            flush=True,
        )
        if meta["init_level"] < len(model.encoder.channels) - 1:
            print(
                f"finetune: {config.init} was trained up to stage {meta['init_level']} of the encoder "
                "(align.output_stride): the stages behind it start at random",
                flush=True,
            )
        worker_config = {"config": config.model_dump_json(), "run": folder, "plan": plan, "meta": meta}
        worker_config |= {"val_ids": val_ids}
        launch.fit(worker, worker_config, feed, config.train, folder, plan.num_steps)
    best = checkpoint.read_state(Path(folder) / BEST)
    return Result(folder, checkpoint.committed_step(folder), best["val_dice"], finished)


def split_scans(config: FinetuneConfig, index: store.Index) -> tuple[list[str], list[str]]:
    """Scan ids to train on and to validate on, drawn with the seed.

    Raises:
        ValueError: no labels, or too few labelled scans.
    """
    if not index.labels:
        raise ValueError(f"index={config.index} holds no labels: prepare it from a source with label maps")
    ids = [scan.scan_id for scan in index.labelled(config.split)]
    num = config.num_scans or len(ids)
    if num > len(ids) or num < 2:
        raise ValueError(
            f"num_scans={config.num_scans}: split={config.split!r} of {config.index} has {len(ids)} labelled scans, "
            f"and at least 2 are needed (one to train on, one to validate)"
        )
    chosen = [ids[i] for i in np.random.default_rng((config.seed, 1)).permutation(len(ids))[:num]]
    num_val = min(max(1, round(config.val_share * num)), num - 1)
    return sorted(chosen[num_val:]), sorted(chosen[:num_val])


def build_model(config: FinetuneConfig, index: store.Index) -> tuple[Segmenter, dict]:
    """The network at its initial weights, and the meta dict of its checkpoints.

    Raises:
        ValueError: the checkpoint of `config.init` is missing or of another architecture or HU window.
    """
    if config.init == "random":
        encoder = build_encoder(**(config.encoder or EncoderConfig()).model_dump())
    else:
        expected = config.encoder.model_dump() if config.encoder else None
        encoder, source = checkpoint.load_encoder(config.init, expected)
        if list(source["hu_window"]) != list(index.hu_window):
            raise ValueError(
                f"init={config.init} was trained with hu_window={source['hu_window']}, "
                f"index={config.index} has {list(index.hu_window)}"
            )
    pretrained = {key: value.clone() for key, value in encoder.state_dict().items()}
    num_outputs = len(index.labels) + (config.task == "multiclass")
    model = Segmenter(encoder, num_outputs)
    init_kaiming_uniform(model, config.seed)
    if config.init != "random":
        encoder.load_state_dict(pretrained)
        if source.get("method") == "genesis":
            checkpoint.load_restorer(model, config.init)
    meta = {
        "door": "finetune",
        "encoder": encoder.settings,
        "hu_window": list(index.hu_window),
        "spacing_mm": index.spacing_mm and list(index.spacing_mm),
        "labels": dict(index.labels),
        "task": config.task,
        "num_outputs": num_outputs,
        "patch_size": list(config.patch.size),
        "init_level": encoder.last if config.init == "random" else source.get("level", encoder.last),
        "config": config.model_dump_json(),
    }
    return model, meta


def worker(worker_config: dict) -> None:
    """The training loop on each rank."""
    import ray.train
    import ray.train.torch

    config = build(FinetuneConfig, json.loads(worker_config["config"]))
    plan: stream.Plan = worker_config["plan"]
    meta, folder = worker_config["meta"], Path(worker_config["run"])
    device = launch.setup_worker(config.train.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    index = store.read_index(config.index)
    val_records = [scan for scan in index.scans if scan.scan_id in worker_config["val_ids"]]

    # model, optimizer, schedule
    segmenter = build_model(config, index)[0].to(device)
    if device.type == "cuda":
        segmenter = torch.nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
    sgd = optim.build_sgd(segmenter, config.optim)
    schedule = optim.polynomial(sgd, plan.num_steps, config.optim.power)

    # continue where the last committed checkpoint stands
    step, best, stale = 0, -1.0, 0
    state = checkpoint.resumed(device)
    if state:
        segmenter.load_state_dict(state["model"])
        sgd.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best, stale = state["step"], state["best"], state["stale"]
        if state["stopped"] or step >= plan.num_steps:
            return
    model = ray.train.torch.prepare_model(segmenter)
    metrics = checkpoint.Metrics(str(folder), step) if rank == 0 else None
    autocast = launch.autocast(device, config.train.precision)
    steps_per_val = max(1, round(config.validate_every * plan.rows_per_epoch / plan.global_batch_size))

    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=plan.global_batch_size // world, prefetch_batches=2, drop_last=True
    )
    model.train()
    waited, logged, since, stopped = 0.0, step, time.monotonic(), False
    asked = time.monotonic()
    for batch in batches:
        waited += time.monotonic() - asked
        if not (batch["step"] == step).all():
            raise FailedRun(f"the stream is out of step: {batch['step'].tolist()} at step {step}")

        # loss and step
        with autocast:
            logits = model(batch["patch"].float())
            loss = segmentation_loss(logits, batch["target"].long(), config.task, batch["labelled"].bool())
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        lr = schedule.get_last_lr()[0]
        sgd.step()
        schedule.step()
        step += 1
        last = step == plan.num_steps

        # metrics
        if step % config.train.log_every == 0 or last or step == 1:
            value = loss.item()
            if not np.isfinite(value):
                raise FailedRun(f"train/loss is {value} at step {step}: lower optim.lr={config.optim.lr}")
            if metrics:
                rate = (step - logged) * plan.global_batch_size / (time.monotonic() - since)
                row = {"epoch": plan.epoch_at(step), "train/loss": value, "train/lr": lr}
                wait = waited / (step - logged)
                metrics.write(step, **row, **{"train/patches_per_s": rate, "data/wait_s": wait})
            waited, logged, since = 0.0, step, time.monotonic()

        # validate, keep the best, stop when it overfits
        validated = step % steps_per_val == 0 or last
        if validated:
            scores = validate(segmenter, meta, index, val_records, rank, world)
            model.train()
            stale = 0 if scores["val/dice"] > best else stale + 1
            if stale == 0:
                best = scores["val/dice"]
                if rank == 0:
                    kept = {"model": segmenter.state_dict(), "meta": meta, "step": step, "val_dice": best}
                    checkpoint.save_best(folder / BEST, kept)
            if metrics:
                metrics.write(step, epoch=plan.epoch_at(step), **scores)
            since = time.monotonic()
        stopped = stale >= config.patience
        if step % config.train.checkpoint_every == 0 or last or stopped:
            state = {"step": step, "best": best, "stale": stale, "stopped": stopped, "meta": meta}
            if not np.isfinite(loss.item()):
                raise FailedRun(f"train/loss is {loss.item()} at step {step}: lower optim.lr={config.optim.lr}")
            state |= {"model": segmenter.state_dict(), "optimizer": sgd.state_dict()}
            checkpoint.report({**state, "schedule": schedule.state_dict()}, step, {"best": best})
        if stopped:
            break
        asked = time.monotonic()
    if metrics:
        metrics.close()
    if step != plan.num_steps and not stopped:
        raise FailedRun(f"the stream ended at step {step} of {plan.num_steps}")


def validate(
    model: Segmenter, meta: dict, index: store.Index, records: list[store.ScanRecord], rank: int, world: int
) -> dict[str, float]:
    """Dice per organ over the validation scans, which the ranks share.

    Returns:
        The same on every rank: val/dice, the mean over organs that occur, and val/dice_<organ>.
    """
    model.eval()
    if world > 1:
        for buffer in model.buffers():  # DDP brings BatchNorm's statistics in line at the next training step only
            torch.distributed.broadcast(buffer, 0)
    rows = []
    for scored in evaluate.score_scans(model, meta, index, records[rank::world], InferenceConfig(), distances=False):
        rows += scored.rows
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    summary = summarise(rows)
    scores = {f"val/dice_{organ}": found["dice"] for organ, found in summary["organs"].items()}
    scores = {key: float(value) for key, value in scores.items() if value is not None}
    return {"val/dice": summary["dice"] or 0.0, **scores}


def _is_over(folder: Path, num_steps: int) -> bool:
    state = checkpoint.read_state(folder / checkpoint.STATE)
    return state["stopped"] or state["step"] >= num_steps


def describe(result: Result) -> str:
    """The closing line."""
    state = "was finished already" if result.already_finished else f"done after {result.steps} steps"
    return f"finetune: {state}, best val/dice {result.val_dice:.4f}; run in {result.run}"


def main() -> None:
    command("finetune", FinetuneConfig, run, describe)


if __name__ == "__main__":
    main()
