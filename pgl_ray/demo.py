"""python -m pgl_ray.demo [a.b=c ...]: the whole path at a laptop's size, on phantoms made from a seed.

phantoms -> prepare -> PGL pre-training -> voxel probe -> fine-tuning from random init and from PGL on few labels ->
evaluation -> report. Every step is the door that you would run on your own data, with a smaller config.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from pgl_ray import evaluate, finetune, prepare, pretrain, probe, report
from pgl_ray.config import (
    DemoConfig,
    EvaluateConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    ProbeConfig,
    ReportConfig,
    build,
    command,
)
from pgl_ray.data.phantom import write_phantoms

SHAPE, SPACING_MM = (40, 96, 96), (6.0, 3.5, 3.5)
ENCODER = {"width": 16, "depths": [1, 1, 1, 1]}  # 0.8 M parameters instead of 46 M
TRAIN = {"num_workers": 1, "log_every": 5, "checkpoint_every": 1000}
INITS = ("random", "pgl")


@dataclass(frozen=True)
class Result:
    """Where the report lies, and mean test Dice and probe accuracy per initialisation."""

    report: str
    dice: dict[str, float]
    probe: dict[str, float]
    seconds: float


def run(config: DemoConfig) -> Result:
    """Runs all steps; phantoms, store and trainings that are finished already in `config.out` are not made again."""
    began, out = time.monotonic(), Path(config.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    store, pgl = str(out / "store"), str(out / "pretrain_pgl")

    def step(number: int, text: str) -> None:
        print(f"\n[{number}/7] {text}  ({time.monotonic() - began:.0f} s so far)", flush=True)

    step(1, f"Phantom CTs: {config.num_unlabelled} unlabelled, {config.num_labelled + config.num_test} with labels")
    counts = (config.num_unlabelled, config.num_labelled, config.num_test)
    write_phantoms(out / "phantoms", *counts, seed=config.seed, shape=SHAPE, spacing_mm=SPACING_MM)

    step(2, "prepare: NIfTI files -> chunked Zarr store and Parquet index")
    shared = {"ray": config.ray.model_dump()}
    prepare.run(build(PrepareConfig, {"source": str(out / "phantoms"), "store": store, **shared}))

    step(3, "pretrain: PGL on all training phantoms, no label used")
    pretrain.run(_pretraining(config, store, pgl, shared))

    step(4, "probe: a linear classifier on the frozen encoder's features, random against pre-trained")
    accuracy = {init: probe.run(_probe(config, store, pgl, init)).balanced_accuracy for init in INITS}

    step(5, f"finetune: the segmentation network on {config.num_labelled} labelled phantoms, from either encoder")
    runs = {init: str(out / f"finetune_{init}") for init in INITS}
    for init in INITS:
        finetune.run(_finetuning(config, store, pgl, init, runs[init], shared))

    step(6, f"evaluate: Dice, IoU and Hausdorff distance on {config.num_test} test phantoms")
    evaluated = [{"run": run, "index": store, "inference": {"overlap": 0.25}} for run in runs.values()]
    dice = [evaluate.run(build(EvaluateConfig, values)).summary["dice"] or 0.0 for values in evaluated]

    step(7, "report")
    page = report.run(_report(config, out, pgl, list(runs.values())))
    return Result(str(page), dict(zip(INITS, dice, strict=True)), accuracy, time.monotonic() - began)


def _pretraining(config: DemoConfig, store: str, run: str, shared: dict) -> PretrainConfig:
    values = {"index": store, "run": run, "seed": config.seed, "split": "train"}
    values |= {
        "max_steps": config.pretrain_steps,
        "global_batch_size": 16,
        "views": {"size": [16, 48, 48]},
        "train": TRAIN,
    }
    values |= {"encoder": ENCODER, "heads": {"hidden": 256, "out": 64}, "ema_decay": 0.99}
    # LARS moves a weight by lr / 1000 of its norm a step: in 150 steps instead of 7,000 the paper's 0.2 trains nothing
    return build(PretrainConfig, {**values, "optim": {"lr": 4.0}, **shared})


def _probe(config: DemoConfig, store: str, pgl: str, init: str) -> ProbeConfig:
    values = {"index": store, "init": pgl if init == "pgl" else "random", "encoder": ENCODER, "size": [16, 48, 48]}
    values |= {"num_scans": config.num_labelled, "num_test_scans": config.num_test, "seed": config.seed}
    return build(ProbeConfig, {**values, "output": str(Path(config.out).absolute() / f"probe_{init}.json")})


def _finetuning(config: DemoConfig, store: str, pgl: str, init: str, run: str, shared: dict) -> FinetuneConfig:
    values = {"index": store, "run": run, "seed": config.seed, "init": pgl if init == "pgl" else "random"}
    values |= {"encoder": ENCODER, "max_steps": config.finetune_steps, "num_scans": config.num_labelled}
    # No flips: so few steps cannot learn left from right in mirrored bodies. Eq. 12 divides by the classes: high rate.
    values |= {"patch": {"size": [24, 64, 64], "crop_scale": [0.9, 1.1], "flip_prob": 0}, "optim": {"lr": 2.0}}
    values |= {"foreground_share": 0.8, "global_batch_size": 4, "validate_every": 8, "patience": 100, "train": TRAIN}
    return build(FinetuneConfig, {**values, **shared})


def _report(config: DemoConfig, out: Path, pgl: str, runs: list[str]) -> ReportConfig:
    notes = [
        f"{config.num_unlabelled} unlabelled and {config.num_labelled} labelled phantoms, an encoder of 0.8 M "
        f"parameters, {config.pretrain_steps} steps of pre-training, {config.finetune_steps} of fine-tuning: it shows "
        "that every part works, not how good PGL is. The paper trains 46 M parameters for 7,000 steps on real CT.",
    ]
    values = {"run": [pgl, *runs], "title": "PGL on phantoms: the demo", "notes": notes}
    return build(ReportConfig, {**values, "output": str(out / "report.html")})


def describe(result: Result) -> str:
    """The comparison and the closing line."""
    lines = [f"\n{'initialisation':<16}{'probe accuracy':>16}{'test Dice':>12}"]
    lines += [f"{init:<16}{result.probe[init]:>16.3f}{result.dice[init]:>12.3f}" for init in INITS]
    lines.append(f"demo: done in {result.seconds:.0f} s; report in {result.report}")
    return "\n".join(lines)


def main() -> None:
    command("demo", DemoConfig, run, describe)


if __name__ == "__main__":
    main()
