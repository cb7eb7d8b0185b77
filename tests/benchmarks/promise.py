"""Does PGL help? Arms that are pre-trained alike, judged alike, on real CT: the tables of tune_spaces/README.md.

python tests/benchmarks/promise.py search STORE RUNS [steps=300] [arms=0,4,...]
    the same small search for every arm: three rates, then the target's decay (of an arm without target two more rates),
    one training each, chosen by the frozen decoder's Dice on scans of the training split
python tests/benchmarks/promise.py train STORE RUNS [steps=600] [seeds=0,1,2] [arms=0,...] [scans=1,5,10] [search=RUNS]
        [decoders=1]
    pre-trains and judges what is not there yet, in this process, one thread; typed again, it goes on where it was ended
    search: the folder of a search, or the file that `table` made of it, whose choices each arm takes
    arms: numbers in ARMS; 6 to 10 are PGL by place without one of its parts, which are trained only where asked for
    decoders: that learn on each encoder's frozen maps; what one learns by chance weighs less in the mean of several
python tests/benchmarks/promise.py gpu STORE RUNS [as train] [jobs=6] [renderers=2] [compile=off]
    only pre-trains, on a CUDA device, in float32 without TF32: several trainings at a time, for their steps are small,
    each with processes that make the views as on a CPU. Leaves RUNS/encoders/NAME.safetensors; copied to where `train`
    is then run with the same settings, it judges them instead of training. Health is looked at every 100 steps, not 20
python tests/benchmarks/promise.py finetune STORE RUNS [seeds=0,1,2] [arms=0,4,...] [init=FILE]
    end-to-end fine-tuning on 5 labelled scans, from random weights and from each arm: the encoder's rate is chosen per
    arm and seed by the Dice on 8 other scans of the training split; that network is evaluated on the validation split
python tests/benchmarks/promise.py table RUNS|FILE.json [output=FILE.json]
    the tables as Markdown, and the figures behind them (per seed and scan) as JSON; of a search: each candidate's

The arms differ in what stands in ARMS; all else is BASE. Every encoder is judged in each state of its BatchNorm
(re-estimated on the same views, off, as trained), and each stands in the tables in its strongest; the search and what
is left out of PGL by place go by the first. The controls know no places: random weights and wrong priors. The upper end
is an encoder of the same size that was trained with labels.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

import promise_tables  # noqa: E402
import train_loop  # noqa: E402 - the doors' training loops without Ray
from promise_tables import BEST, CEILING, JUDGES, NUM_LABELLED, RANDOM, TUNE_STEPS, TWIN, best_of  # noqa: E402

from pgl_ray import evaluate, export, probe  # noqa: E402
from pgl_ray.config import EvaluateConfig, ExportConfig, FinetuneConfig, PretrainConfig, ProbeConfig, build  # noqa: E402
from pgl_ray.train import checkpoint  # noqa: E402

BASE = {
    "global_batch_size": 16,
    "ema_decay": 0.97,
    "views": {"size": [32, 64, 64], "foreground": True},
    "encoder": {"width": 8, "depths": [1, 1, 2, 1]},
    "heads": {"hidden": 256, "out": 64},
    "align": {"output_stride": [8, 16, 16]},
    "optim": {"lr": 2.4},
    "health": {"every": 20},
    "train": {"checkpoint_every": 100, "log_every": 20},
}
PLACES = {
    "align": {"flip": False, "more_strides": [[2, 4, 4], [4, 8, 8]]},
    "loss": {"kind": "contrast", "displacement": 1.0},
}
ARMS = {
    "wrong priors": {"align": {"wrong_priors": True}},
    "byol": {"method": "byol"},
    "genesis": {"method": "genesis", "optim": {"lr": None}},
    "pgl, the paper's loss": {},
    "pgl, by place": PLACES,
    "pgl, by place, wrong priors": OmegaConf.to_container(OmegaConf.merge(PLACES, {"align": {"wrong_priors": True}})),
}
# what PGL by place consists of, a part at a time left out or turned round; arms that have to be asked for
PARTS = {
    "pgl, by place, one map": {"align": {"more_strides": []}},
    "pgl, by place, consistency": {"loss": {"kind": "consistency"}},
    "pgl, by place, no displacement": {"loss": {"displacement": 0}},
    "pgl, by place, flips": {"align": {"flip": True}},
    "pgl, by place, negatives of the batch": {"loss": {"negatives": "batch"}},
}
ARMS |= {name: OmegaConf.to_container(OmegaConf.merge(PLACES, change)) for name, change in PARTS.items()}
SPLITS = {"split": "train", "test_split": "validation", "num_test_scans": 15}
CEILING_STEPS = 1200
# from so many steps on a target that turns over more slowly and a lower rate, as conf/pretrain_small.yaml has them; for
# every arm (Genesis keeps its authors'), and an upper end that is trained longer, too
LONG_STEPS, LONG, LONG_CEILING_STEPS = 1500, {"ema_decay": 0.99, "optim": {"lr": 1.5}}, 4800
# of a search, relative to BASE: factors of the rate, then of 1 - decay of the target
RATES, TURNOVERS, MORE_RATES, SEARCH_SEED, DECODERS = (0.3, 1.0, 3.0), (0.33, 1.67), (0.1, 10.0), 100, 3
FACTORS = (0.3, 1.0)  # of the encoder's rate beside the decoder's 0.003
FOLDS = 8  # scans to choose that by


def pretraining(
    store: str, run: Path, arm: str, seed: int, steps: int, rate: float = 1.0, turnover: float = 1.0
) -> PretrainConfig:
    """The config of one arm and seed, its rate and 1 - decay of its target multiplied."""
    own = {"index": store, "run": str(run), "seed": seed, "split": "train", "max_steps": steps}
    length = LONG if steps >= LONG_STEPS else {}
    config = build(PretrainConfig, OmegaConf.to_container(OmegaConf.merge(BASE, length, ARMS[arm], own)))
    own |= {"optim": {"kind": config.optim.kind, "lr": config.optim.lr * rate}}
    own |= {"ema_decay": 1 - (1 - config.ema_decay) * turnover} if has_target(arm) else {}
    return build(PretrainConfig, OmegaConf.to_container(OmegaConf.merge(BASE, length, ARMS[arm], own)))


def has_target(arm: str) -> bool:
    """Whether a slowly moving target is part of the method."""
    return ARMS[arm].get("method") != "genesis"


def with_labels(store: str, run: Path, seed: int, steps: int) -> FinetuneConfig:
    """The upper end: the same encoder trained with the labels of all training scans but one in twenty."""
    own = {"index": store, "run": str(run), "seed": seed, "max_steps": steps, "encoder": BASE["encoder"]}
    own |= {"decoder": "light", "optim": {"kind": "adamw"}, "loss": {"ce_weight": 1.0}, "foreground_share": 0.5}
    own |= {"patch": {"size": BASE["views"]["size"], "crop_scale": [0.9, 1.1], "flip_prob": 0}, "global_batch_size": 4}
    own |= {"val_share": 0.05, "validate_every": 1000, "patience": 100, "patches_per_scan": 1}
    own["train"] = {"checkpoint_every": 200, "log_every": 50}
    return build(FinetuneConfig, OmegaConf.to_container(OmegaConf.create(own)))


def judgement(run: Path, num_scans: int) -> Path:
    """Where the judgement of a training with so many labelled scans is kept."""
    return run.parent / "judged" / f"{run.name}, {num_scans} scans.json"


def judged(store: str, run: Path, arm: str, seed: int, num_scans: int, decoders: int = 1) -> None:
    """Judges one encoder with so many labelled scans, where it is not done."""
    output = judgement(run, num_scans)
    if output.exists():
        return
    settings = {"index": store, "seed": seed, "num_scans": num_scans, "output": str(output), "ends": False, **SPLITS}
    encoder = encoder_of(run)
    settings |= {"init": RANDOM if arm == RANDOM else str(encoder if encoder.exists() else run)}
    settings |= {"size": BASE["views"]["size"]}
    settings |= {"encoder": BASE["encoder"]} if arm == RANDOM else {}
    settings["decoder_seeds"] = decoders
    settings["all_readings"] = arm not in PARTS  # an arm stands in its strongest; PGL by place's is the first one
    # matching learns nothing from labelled scans: once is enough
    settings["judges"] = JUDGES if num_scans == NUM_LABELLED else JUDGES[:2]
    result = probe.run(build(ProbeConfig, settings))
    print(f"{arm}, seed {seed}, {num_scans} scans:\n{probe.table(result)}", flush=True)


def train(
    store: str,
    runs: Path,
    steps: int,
    seeds: list[int],
    arms: list[str],
    numbers: list[int],
    searched: Path | None,
    decoders: int = 1,
) -> None:
    """Everything that is not there yet, seed by seed."""
    torch.set_num_threads(1)
    for seed in seeds:
        for arm in [RANDOM, *arms, CEILING]:
            began, run = time.monotonic(), runs / f"{arm}, seed {seed}"
            if all(judgement(run, num_scans).exists() for num_scans in numbers):
                continue
            if arm == CEILING:
                ceiling_steps = LONG_CEILING_STEPS if steps >= LONG_STEPS else CEILING_STEPS
                train_loop.train(with_labels(store, run, seed, ceiling_steps))
            elif arm != RANDOM:
                config = chosen_pretraining(store, run, arm, seed, steps, searched)
                if not from_elsewhere(run, config):
                    report_stop(run, train_loop.train(config))
            print(f"{arm}, seed {seed}: trained in {time.monotonic() - began:.0f} s", flush=True)
            for num_scans in numbers:
                judged(store, run, arm, seed, num_scans, decoders)


def chosen_pretraining(store: str, run: Path, arm: str, seed: int, steps: int, searched: Path | None) -> PretrainConfig:
    """The config of one arm and seed with what its search chose, where there is one; PGL by place's for what differs
    from that in a part."""
    factors = best_of(searched, BEST if arm == TWIN or arm in PARTS else arm) if searched else (1.0, 1.0)
    return pretraining(store, run, arm, seed, steps, *factors)


def report_stop(run: Path, why: str | None) -> None:
    """Says why a training ended early, if it did."""
    if why:
        print(f"{run.name}: {why}", flush=True)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def encoder_of(run: Path) -> Path:
    """Where the encoder of a training on another machine lies."""
    return run.parent / "encoders" / f"{run.name}.safetensors"


def from_elsewhere(run: Path, config: PretrainConfig) -> bool:
    """Whether a run was trained on another machine, with these settings."""
    path = encoder_of(run)
    if not path.exists():
        return False
    theirs = export.load(path)[1].metadata["config"]
    for key in ("method", "max_steps", "seed", "ema_decay"):
        if theirs[key] != getattr(config, key):
            raise SystemExit(
                f"{path}: {key}={theirs[key]}, and {getattr(config, key)} is asked for: remove one of them"
            )
    if theirs["optim"]["lr"] != config.optim.lr:
        raise SystemExit(f"{path}: optim.lr={theirs['optim']['lr']}, and {config.optim.lr} is asked for: remove it")
    return True


def train_on_gpu(config: PretrainConfig, renderers: int, compile: str) -> None:
    """Trains and exports, in this process, which must not have used the GPU before: it forks."""
    run, torch.backends.cudnn.allow_tf32 = Path(config.run), False
    # figures and checkpoints make the host wait: at a GPU's pace seldom is often enough
    rare = {"precision": "float32", "compile": compile, "checkpoint_every": 500, "log_every": 100}
    rare = {"train": config.train.model_copy(update=rare), "health": config.health.model_copy(update={"every": 100})}
    began = time.monotonic()
    report_stop(run, train_loop.train(config.model_copy(update=rare), device="cuda", renderers=renderers))
    encoder_of(run).parent.mkdir(exist_ok=True)
    export.run(build(ExportConfig, {"run": str(run), "output": str(encoder_of(run))}))
    print(f"{run.name}: trained in {time.monotonic() - began:.0f} s", flush=True)


def train_together(jobs: int, arms: list[str], seeds: list[int], places: list[str], options: dict[str, str]) -> bool:
    """`jobs` trainings at a time, each by this script in a process of its own; whether all ended well."""
    others = [f"{key}={value}" for key, value in options.items() if key not in ("arms", "seeds", "jobs")]

    def one(arm: str, seed: int) -> tuple[str, bool]:
        own = [*places, f"arms={list(ARMS).index(arm)}", f"seeds={seed}", *others]
        done = subprocess.run([sys.executable, __file__, "gpu", *own], text=True, capture_output=True)
        failed = done.returncode != 0
        return (f"{arm}, seed {seed} failed:\n{done.stderr[-2000:]}\n" if failed else done.stdout), not failed

    with ThreadPoolExecutor(jobs) as pool:
        coming = [pool.submit(one, arm, seed) for seed in seeds for arm in arms]
        answers = []
        for done in as_completed(coming):
            answers.append(done.result())
            print(answers[-1][0], end="", flush=True)
    return all(well for _, well in answers)


# -- the same search for every arm -----------------------------------------------------------------------------------


def search(store: str, runs: Path, steps: int, arms: list[str]) -> None:
    """Trains and judges each arm's candidates, where it is not done, and prints the choices."""
    torch.set_num_threads(1)
    for arm in arms:
        for rate in RATES:
            candidate(store, runs, arm, steps, rate, 1.0)
        best = best_of(runs, arm)[0]
        more = [(best, turnover) for turnover in TURNOVERS] if has_target(arm) else [(rate, 1.0) for rate in MORE_RATES]
        for rate, turnover in more:
            candidate(store, runs, arm, steps, rate, turnover)
        rate, turnover = best_of(runs, arm)
        print(f"{arm}: rate x {rate:g}, 1 - decay x {turnover:g}", flush=True)


def candidate(store: str, runs: Path, arm: str, steps: int, rate: float, turnover: float) -> None:
    """One training of a search, judged on 15 scans of the training split with the labels of 5 others."""
    run = runs / "search" / f"{arm}, x {rate:g}, x {turnover:g}"
    output = run.with_name(run.name + ".json")
    if output.exists():
        return
    why = train_loop.train(pretraining(store, run, arm, SEARCH_SEED, steps, rate, turnover))
    if why and not checkpoint.committed(run):  # an answer, too: no rate for this arm
        output.write_text(json.dumps({"failed": why}))
        print(f"{arm}, rate x {rate:g}, 1 - decay x {turnover:g}: {why}", flush=True)
        return
    settings = {"index": store, "seed": SEARCH_SEED, "init": str(run), "output": str(output), "ends": False}
    settings |= {"split": "train", "test_split": "train", "num_scans": NUM_LABELLED, "num_test_scans": 15}
    settings |= {"size": BASE["views"]["size"], "judges": JUDGES, "decoder_seeds": DECODERS}
    result = probe.run(build(ProbeConfig, settings))
    values = ", ".join(f"{judge} {result.value(judge):.3f}" for judge in JUDGES)
    print(f"{arm}, rate x {rate:g}, 1 - decay x {turnover:g}: {values}{f'; {why}' if why else ''}", flush=True)


# -- end to end -------------------------------------------------------------------------------------------------------


def tuned(store: str, runs: Path, arm: str, seed: int, init: str) -> None:
    """Fine-tunes with each of FACTORS, and evaluates the best by its validation scans, where it is not done."""
    output = runs / "tuned" / f"{arm}, seed {seed}.json"
    if output.exists():
        return
    val_dice = {}
    for factor in FACTORS:
        run = runs / "tuned" / f"{arm}, seed {seed}, factor {factor}"
        config = with_labels(store, run, seed, TUNE_STEPS).model_copy(update={"init": init})
        num = NUM_LABELLED + FOLDS
        more = {"num_scans": num, "val_share": FOLDS / num}
        optim = config.optim.model_copy(update={"encoder_lr_factor": factor})
        train_loop.train(config.model_copy(update={**more, "optim": optim}))
        val_dice[factor] = checkpoint.state_of(str(run))["val_dice"]
        print(f"{arm}, seed {seed}, encoder's rate x {factor}: validation Dice {val_dice[factor]:.3f}", flush=True)
    best = max(val_dice, key=val_dice.get)
    chosen_run = runs / "tuned" / f"{arm}, seed {seed}, factor {best}"
    settings = {"run": str(chosen_run), "index": store, "split": "validation", "save_predictions": False}
    evaluated = evaluate.run(build(EvaluateConfig, settings))
    rows = pq.read_table(Path(evaluated.folder) / evaluate.TABLE).to_pylist()
    scores = [{key: row[key] for key in ("scan_id", "organ", "dice", "hd95_mm")} for row in rows]
    facts = {
        "arm": arm,
        "seed": seed,
        "val_dice": val_dice,
        "factor": best,
        "dice": evaluated.summary["dice"],
        "rows": scores,
    }
    output.write_text(json.dumps(facts))
    print(f"{arm}, seed {seed}: Dice {evaluated.summary['dice']:.3f} with the encoder's rate x {best}", flush=True)


def main() -> None:
    """See the top."""
    verb, *rest = sys.argv[1:]
    options = dict(part.split("=", 1) for part in rest if "=" in part)
    places = [part for part in rest if "=" not in part]
    if verb in ("train", "search", "finetune") and torch.cuda.is_available():
        raise SystemExit("trainings fork, which CUDA does not survive: set CUDA_VISIBLE_DEVICES= (nothing), or use gpu")
    if verb in ("train", "search", "gpu"):
        every = [arm for arm in ARMS if arm not in PARTS and not (verb == "search" and arm == TWIN)]
        arms = [list(ARMS)[int(i)] for i in options["arms"].split(",")] if "arms" in options else every
    if verb in ("train", "gpu"):
        seeds = [int(seed) for seed in options.get("seeds", "0,1,2").split(",")]
        numbers = [int(num) for num in options.get("scans", "1,5,10").split(",")]
        searched = Path(options["search"]).absolute() if "search" in options else None
        steps = int(options.get("steps", 600))
        if verb == "gpu" and len(arms) * len(seeds) > 1:
            raise SystemExit(not train_together(int(options.get("jobs", 6)), arms, seeds, places, options))
        if verb == "gpu":
            run = Path(places[1]).absolute() / f"{arms[0]}, seed {seeds[0]}"
            config = chosen_pretraining(places[0], run, arms[0], seeds[0], steps, searched)
            train_on_gpu(config, int(options.get("renderers", 2)), options.get("compile", "off"))
            return
        decoders = int(options.get("decoders", 1))
        train(places[0], Path(places[1]).absolute(), steps, seeds, arms, numbers, searched, decoders)
        return
    if verb == "search":
        search(places[0], Path(places[1]).absolute(), int(options.get("steps", 300)), arms)
        return
    if verb == "finetune":
        torch.set_num_threads(1)
        runs = Path(places[1]).absolute()
        for seed in [int(seed) for seed in options.get("seeds", "0,1,2").split(",")]:
            tuned(places[0], runs, RANDOM, seed, RANDOM)
            for i in filter(None, options.get("arms", "4").split(",")):
                arm = list(ARMS)[int(i)]
                run = runs / f"{arm}, seed {seed}"
                encoder = encoder_of(run)
                tuned(places[0], runs, arm, seed, str(encoder if encoder.exists() else run))
            if "init" in options:
                tuned(places[0], runs, Path(options["init"]).stem, seed, options["init"])
        return
    rows = promise_tables.rows_of(Path(places[0]))
    print(promise_tables.tables(rows, list(ARMS)))
    if "output" in options:
        lines = ",\n".join(json.dumps(row) for row in rows)
        Path(options["output"]).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
