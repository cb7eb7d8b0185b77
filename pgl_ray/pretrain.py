"""python -m pgl_ray.pretrain [file.yaml] index=STORE run=RUN [a.b=c ...]: PGL pre-training (paper, Sec. 3 and 5.1)."""

import json
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pgl_ray.config import FailedRun, PretrainConfig, build, command
from pgl_ray.data import store, stream
from pgl_ray.model.pgl import Pair, Pgl, geometry_of
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.train import checkpoint, health, launch, optim

HEALTH_EVERY = 5  # rows of metrics per health figure: its singular values cost as much as a small step


@dataclass(frozen=True)
class Result:
    """Where a run lies and how it ended."""

    run: str
    steps: int
    loss: float
    already_finished: bool


def run(config: PretrainConfig) -> Result:
    """Trains, or continues, the run `config.run`; returns at once if it is finished.

    Raises:
        ValueError: wrong config, or a run folder of another config.
        FailedRun: training failed.
    """
    index = store.read_index(config.index)
    plan = make_plan(config, index)
    model = build_model(config)
    facts = {
        "num_parameters": sum(p.numel() for p in model.online["encoder"].parameters()),
        "num_steps": plan.num_steps,
        "plan": plan.identity,
        "store": {"num_scans": len(plan.scan_ids), "labels": index.labels, "hu_window": index.hu_window},
    }
    folder = checkpoint.open_run(config, "pretrain", facts)
    done = checkpoint.committed_step(folder)
    if done < plan.num_steps:
        launch.connect(config.ray)
        renderer = stream.PairRenderer(index.store, plan.scan_ids, config.seed, config.views, config.intensity)
        feed = partial(stream.dataset, plan, renderer, config.train.num_workers, num_cpus=launch.RENDER_CPUS)
        worker_config = {"config": config.model_dump_json(), "run": folder, "hu_window": list(index.hu_window)}
        print(f"pretrain: {len(plan.scan_ids)} scans, steps {done} to {plan.num_steps}, {folder}", flush=True)
        launch.fit(worker, {**worker_config, "plan": plan}, feed, config.train, folder, plan.num_steps)
    losses = [row["train/loss"] for row in checkpoint.read_metrics(folder) if "train/loss" in row]
    return Result(folder, plan.num_steps, losses[-1], done >= plan.num_steps)


def build_model(config: PretrainConfig) -> Pgl:
    """Pgl at its initial weights, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        encoder = Encoder(**config.encoder.model_dump())
        geometry = geometry_of(encoder, config.views.size, config.align.centers)
        model = Pgl(encoder, config.heads.hidden, config.heads.out, geometry)
    init_kaiming_uniform(model.online, config.seed)
    init_kaiming_uniform(model.predictor, config.seed + 1)
    model.target.load_state_dict(model.online.state_dict())
    return model


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
    return stream.Plan.make(ids, config.pairs_per_scan, batch, config.epochs, config.max_steps, config.seed)


def worker(worker_config: dict) -> None:
    """The training loop on each rank."""
    import ray.train
    import ray.train.torch

    config = build(PretrainConfig, json.loads(worker_config["config"]))
    plan: stream.Plan = worker_config["plan"]
    device = launch.setup_worker(config.train.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    # model and optimizer
    pgl = build_model(config).to(device)
    if device.type == "cuda":
        pgl = torch.nn.SyncBatchNorm.convert_sync_batchnorm(pgl)
    lars = optim.build_lars(pgl, config.optim)

    # schedules
    warmup = round(config.optim.warmup_epochs * plan.rows_per_epoch / plan.global_batch_size)
    schedule = optim.warmup_cosine(lars, min(warmup, max(1, plan.num_steps // 10)), plan.num_steps)

    # continue where the last committed checkpoint stands
    step = 0
    state = checkpoint.resumed(device)
    if state:
        pgl.load_state_dict(state["model"])
        lars.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    if step >= plan.num_steps:
        return
    model = ray.train.torch.prepare_model(pgl)
    metrics = checkpoint.Metrics(worker_config["run"], step) if rank == 0 else None
    autocast = launch.autocast(device, config.train.precision)

    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=plan.global_batch_size // world, prefetch_batches=2, drop_last=True
    )
    model.train()
    waited, logged, since, num_rows = 0.0, step, time.monotonic(), 0
    asked = time.monotonic()
    for batch in batches:
        waited += time.monotonic() - asked
        if not (batch["step"] == step).all():
            raise FailedRun(f"the stream is out of step: {batch['step'].tolist()} at step {step}")
        if step == 0 and rank == 0:
            _keep_views(worker_config["run"], batch, plan)

        # two symmetric losses
        with autocast:
            output = model(Pair.from_batch(batch))

        # step
        lars.zero_grad(set_to_none=True)
        output.loss.backward()
        log = (step + 1) % config.train.log_every == 0 or step + 1 == plan.num_steps or step == 0
        grad_norm = _norm(p.grad for p in pgl.parameters() if p.grad is not None) if log else None
        lr = schedule.get_last_lr()[0]
        lars.step()
        schedule.step()

        # target follows online
        decay = optim.ema_decay(step, plan.num_steps, config.ema_decay)
        pgl.follow(decay)
        step += 1
        num_rows += plan.global_batch_size

        # report and checkpoint
        keep = step % config.train.checkpoint_every == 0 or step == plan.num_steps
        if log or keep:
            loss = output.loss.item()
            if not np.isfinite(loss):
                raise FailedRun(f"train/loss is {loss} at step {step}: lower optim.lr={config.optim.lr}")
        if log:
            if metrics:
                seconds = time.monotonic() - since
                row = {
                    "epoch": plan.epoch_at(step),
                    "train/loss": loss,
                    "train/lr": lr,
                    "train/grad_norm": grad_norm.item(),
                    "train/pairs_per_s": num_rows / seconds,
                    "data/wait_s": waited / (step - logged),
                    "ema/decay": decay,
                    "align/clamped_share": output.clamped_share.item(),
                }
                if step // config.train.log_every % HEALTH_EVERY == 0 or step in (1, plan.num_steps):
                    row |= health.feature_health(output.query, output.key)
                metrics.write(step, **row)
            waited, logged, since, num_rows = 0.0, step, time.monotonic(), 0
        if keep:
            meta = _meta(config, worker_config["hu_window"])
            state = {"step": step, "model": pgl.state_dict(), "optimizer": lars.state_dict()}
            state |= {"schedule": schedule.state_dict(), "meta": meta}
            checkpoint.report(state, step, {"train/loss": loss})
        asked = time.monotonic()
    if metrics:
        metrics.close()
    if step != plan.num_steps:
        raise FailedRun(f"the stream ended at step {step} of {plan.num_steps}")


def _meta(config: PretrainConfig, hu_window: list[float]) -> dict:
    """What must be known to use the weights elsewhere; plain values."""
    encoder = json.loads(config.encoder.model_dump_json())
    return {"door": "pretrain", "encoder": encoder, "hu_window": hu_window, "config": config.model_dump_json()}


def _norm(gradients) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


def _keep_views(run: str, batch: dict, plan: stream.Plan, num: int = 4) -> None:
    """Keeps the first pairs of the run for the report's pictures."""
    names = ("view_1", "view_2", "box_1", "box_2", "flip_1", "flip_2")
    arrays = {name: batch[name][:num].cpu().numpy() for name in names}
    arrays["scan_id"] = np.array([plan.scan_ids[i] for i in batch["scan"][:num].tolist()])
    np.savez_compressed(f"{run}/views.npz", **arrays)


def describe(result: Result) -> str:
    """The closing line."""
    state = "was finished already" if result.already_finished else f"done after {result.steps} steps"
    return f"pretrain: {state}, loss {result.loss:.4f}; run in {result.run}"


def main() -> None:
    command("pretrain", PretrainConfig, run, describe)


if __name__ == "__main__":
    main()
