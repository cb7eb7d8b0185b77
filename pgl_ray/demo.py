"""python -m pgl_ray.demo [a.b=c ...]: the whole path at a laptop's size, on phantoms made from a seed.

phantoms -> prepare -> PGL pre-training -> judges of the frozen encoder -> fine-tuning from random init and from PGL on
few labels -> evaluation -> report. Every step is the door that you would run on your own data, with a smaller config.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("demo")

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
)
from pgl_ray.pages import run_folders, tables
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.train.records import RunRecord, read_json
from pgl_ray.train.run_files import RECORD, write_json

SHAPE, SPACING_MM = (40, 96, 96), (6.0, 3.5, 3.5)
VIEW = (24, 48, 48)
ENCODER = {"width": 8, "depths": [1, 1, 2, 1]}  # 0.26 M parameters instead of 46 M, as in conf/pretrain_small.yaml
TRAIN = {"num_workers": 1, "log_every": 10, "checkpoint_every": 1000}
INITS = ("random", "pgl")
SETTINGS = "demo.json"  # what the phantoms, the store and the trainings of a folder were made with


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        report: where it lies.
        probe: what the judges say of the encoder that was pre-trained, and of random weights.
        dice: initialisation -> mean test Dice after fine-tuning.
        gain: the paired difference of Dice over the test phantoms.
        seconds: wall time.
    """

    report: str
    probe: probe.ProbeResult
    dice: dict[str, float]
    gain: tables.Difference
    seconds: float


def run(config: DemoConfig) -> Result:
    """Runs all steps; phantoms, store and trainings that are finished already in `config.out` are not made again.

    Raises:
        ValueError: they were made with other settings.
    """
    began, out = time.monotonic(), Path(config.out).absolute()
    settings = config.model_dump(mode="json", exclude={"out", "ray"})
    check_same(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, settings)
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
    pretrain.run(pretraining(config, store, pgl, shared))

    step(4, f"probe: what the frozen encoder knows, judged on {config.num_test} test phantoms, beside random weights")
    judged = probe.run(probing(config, store, pgl))
    print(probe.table(judged), flush=True)

    step(5, f"finetune: the segmentation network on {config.num_labelled} labelled phantoms, from either encoder")
    runs = {init: str(out / f"finetune_{init}") for init in INITS}
    for init in INITS:
        finetune.run(finetuning(config, store, pgl, init, runs[init], shared))

    step(6, f"evaluate: Dice, IoU and Hausdorff distance on {config.num_test} test phantoms")
    evaluated = [{"run": run, "index": store, "inference": {"overlap": 0.25}} for run in runs.values()]
    dice = [evaluate.run(build(EvaluateConfig, values)).summary["dice"] or 0.0 for values in evaluated]
    scores = [run.scores for run in run_folders.read_runs(list(runs.values()))]
    gain = cast(tables.Difference, tables.paired_difference(scores[1], scores[0]))  # none for a single phantom alone

    step(7, "report")
    dice = dict(zip(INITS, dice, strict=True))
    page = report.run(_report(config, out, pgl, list(runs.values())))
    return Result(str(page), judged, dice, gain, time.monotonic() - began)


def check_same(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder that holds a demo with other settings, before anything in it is changed."""
    earlier = made_with(out)
    changed = [key for key in settings if key in earlier and earlier[key] != settings[key]]
    if changed:
        there, here = (", ".join(f"{key}={values[key]}" for key in changed) for values in (earlier, settings))
        raise ValueError(f"out={out} holds a demo with {there}, here {here}: choose another out=...")


def made_with(out: Path) -> dict[str, Any]:
    """The settings of the demo that lies there, {} where none does. Earlier versions wrote no demo.json: what their
    trainings and phantoms say."""
    if (out / SETTINGS).is_file():
        return read_json(out / SETTINGS)
    known: dict[str, Any] = {}
    for name, key in {"pretrain_pgl": "pretrain_steps", **{f"finetune_{i}": "finetune_steps" for i in INITS}}.items():
        if (out / name / RECORD).is_file():
            trained = RunRecord.read(out / name).config
            known |= {"seed": trained["seed"], key: trained["max_steps"]}
    if known and (out / "phantoms").is_dir():
        scans, labels, test = (
            len([*(out / "phantoms").glob(f"{part}/*.gz")]) for part in ("imagesTr", "labelsTr", "labelsTs")
        )
        known |= {"num_unlabelled": scans - labels, "num_labelled": labels, "num_test": test}
    return known


def pretraining(config: DemoConfig, store: str, run: str, shared: dict) -> PretrainConfig:
    """PGL by place, as conf/pretrain_small.yaml, of smaller views in fewer steps."""
    values = {"index": store, "run": run, "seed": config.seed, "split": "train", "max_steps": config.pretrain_steps}
    values |= {"global_batch_size": 16, "views": {"size": VIEW, "foreground": True}, "ema_decay": 0.93, "train": TRAIN}
    values |= {"encoder": ENCODER, "heads": {"hidden": 256, "out": 64}, "optim": {"lr": 1.5}}
    values |= {"align": {"flip": False, "output_stride": [4, 8, 8], "more_strides": [[2, 4, 4], [8, 16, 16]]}}
    return build(PretrainConfig, {**values, "loss": {"kind": "contrast", "displacement": 1.0}, **shared})


def probing(config: DemoConfig, store: str, pgl: str) -> ProbeConfig:
    """The judges of the pre-trained encoder."""
    values = {"index": store, "init": pgl, "size": VIEW, "judges": ["voxels", "decoder", "matching"]}
    values |= {"num_scans": config.num_labelled, "num_test_scans": config.num_test, "seed": config.seed}
    return build(ProbeConfig, values)


def finetuning(config: DemoConfig, store: str, pgl: str, init: str, run: str, shared: dict) -> FinetuneConfig:
    """The fine-tuning from `init`, which is pgl or random."""
    values = {"index": store, "run": run, "seed": config.seed, "init": pgl if init == "pgl" else "random"}
    values |= {"encoder": ENCODER, "max_steps": config.finetune_steps, "num_scans": config.num_labelled}
    # The light decoder and AdamW learn in a few hundred steps; no flips, which would make left and right one place.
    values |= {"decoder": "light", "optim": {"kind": "adamw"}, "loss": {"ce_weight": 1.0}}
    values |= {"patch": {"size": [24, 64, 64], "crop_scale": [0.9, 1.1], "flip_prob": 0}}
    values |= {"foreground_share": 0.8, "global_batch_size": 4, "validate_every": 8, "patience": 100, "train": TRAIN}
    return build(FinetuneConfig, {**values, **shared})


def _report(config: DemoConfig, out: Path, pgl: str, runs: list[str]) -> ReportConfig:
    about = (
        f"{config.num_unlabelled} unlabelled, {config.num_labelled} labelled and {config.num_test} test phantoms, an "
        f"encoder of 0.26 M parameters, {config.pretrain_steps} steps of pre-training by place, "
        f"{config.finetune_steps} of fine-tuning. The paper trains 46 M parameters for 7,000 steps on real CT: what "
        "PGL gains on phantoms, whose organs lie where they should, says little of what it gains there."
    )
    values = {"run": [pgl, *runs], "title": "PGL on phantoms: the demo", "notes": [about]}
    return build(ReportConfig, {**values, "output": str(out / "report.html")})


def fine_tuned(dice: dict[str, float], gain: tables.Difference) -> str:
    """What fine-tuning gained from the pre-training, in a sentence."""
    text = f"Fine-tuned, test Dice is {dice['pgl']:.3f} from PGL and {dice['random']:.3f} from random weights"
    sure = "within" if gain.low <= 0 <= gain.high else "more than"
    return (
        f"{text}: {gain.mean:+.3f}, {sure} the noise of {gain.num_scans} test scans (95 % interval {gain.low:+.3f} to "
        f"{gain.high:+.3f})."
    )


def describe(result: Result) -> str:
    """The comparison and the closing line."""
    lines = [
        "",
        probe.table(result.probe),
        "",
        result.probe.answer("PGL"),
        fine_tuned(result.dice, result.gain),
        f"demo: done in {result.seconds:.0f} s; report in {result.report}",
    ]
    return "\n".join(lines)
