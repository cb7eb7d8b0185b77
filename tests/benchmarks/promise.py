"""Does PGL help? Arms that are pre-trained alike, judged alike, on real CT: the tables of tune_spaces/README.md.

python tests/benchmarks/promise.py search STORE RUNS [steps=300] [arms=0,4,...]
    the same small search for every arm: three rates, then the target's decay (of an arm without target two more rates),
    one training each, chosen by the frozen decoder's Dice on scans of the training split
python tests/benchmarks/promise.py train STORE RUNS [steps=600] [seeds=0,1,2] [arms=0,...] [scans=1,5,10] [search=RUNS]
    pre-trains and judges what is not there yet, in this process, one thread; typed again, it goes on where it was ended
    search: the folder of a search, whose choices each arm takes
    arms: numbers in ARMS; 6 to 10 are PGL by place without one of its parts, which are trained only where asked for
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
(re-estimated on the same views, off, as trained), and each stands in the tables in its strongest; the search goes by
the first. The controls know no places: random weights and wrong priors. The upper end is an encoder of the same size
that was trained with the labels of all training scans.
"""

import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train_loop  # noqa: E402 - the doors' training loops without Ray

from pgl_ray import evaluate, export, probe  # noqa: E402
from pgl_ray.config import EvaluateConfig, ExportConfig, FinetuneConfig, PretrainConfig, ProbeConfig, build  # noqa: E402
from pgl_ray.judge.judges import HIGHER_IS_BETTER, LEAST_ROOM  # noqa: E402
from pgl_ray.judge.readings import IN_WORDS, READINGS  # noqa: E402
from pgl_ray.model.metrics import percentile_bounds  # noqa: E402
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
JUDGES = ["voxels", "decoder", "matching"]
JUDGE_NAMES = {"voxels": "voxel probe", "decoder": "frozen decoder, Dice", "matching": "point matching, mm"}
NUM_SCANS = (1, 5, 10)
SPLITS = {"split": "train", "test_split": "validation", "num_test_scans": 15}
CEILING, CEILING_STEPS = "all labels", 1200
# from so many steps on a target that turns over more slowly and a lower rate, as conf/pretrain_small.yaml has them; for
# every arm (Genesis keeps its authors'), and an upper end that is trained longer, too
LONG_STEPS, LONG, LONG_CEILING_STEPS = 1500, {"ema_decay": 0.99, "optim": {"lr": 1.5}}, 4800
RANDOM, BEST = "random", "pgl, by place"
TWIN = f"{BEST}, wrong priors"
CONTROLS = (RANDOM, "wrong priors", TWIN)  # that know no places
# of a search, relative to BASE: factors of the rate, then of 1 - decay of the target
RATES, TURNOVERS, MORE_RATES, SEARCH_SEED, DECODERS = (0.3, 1.0, 3.0), (0.33, 1.67), (0.1, 10.0), 100, 3
FACTORS, TUNE_STEPS = (0.3, 1.0), 450  # of the encoder's rate beside the decoder's 0.003
NUM_DRAWS = 2000  # of seeds and scans, of an interval
NUM_LABELLED, FOLDS = 5, 8  # scans to learn from, and to choose the rate by


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
    """The upper end: the same encoder trained with all labels, by the light decoder."""
    own = {"index": store, "run": str(run), "seed": seed, "max_steps": steps, "encoder": BASE["encoder"]}
    own |= {"decoder": "light", "optim": {"kind": "adamw"}, "loss": {"ce_weight": 1.0}, "foreground_share": 0.5}
    own |= {"patch": {"size": BASE["views"]["size"], "crop_scale": [0.9, 1.1], "flip_prob": 0}, "global_batch_size": 4}
    own |= {"val_share": 0.05, "validate_every": 1000, "patience": 100, "patches_per_scan": 1}
    own["train"] = {"checkpoint_every": 200, "log_every": 50}
    return build(FinetuneConfig, OmegaConf.to_container(OmegaConf.create(own)))


def judgement(run: Path, num_scans: int) -> Path:
    """Where the judgement of a training with so many labelled scans is kept."""
    return run.parent / "judged" / f"{run.name}, {num_scans} scans.json"


def judged(store: str, run: Path, arm: str, seed: int, num_scans: int) -> None:
    """Judges one encoder with so many labelled scans, where it is not done."""
    output = judgement(run, num_scans)
    if output.exists():
        return
    settings = {"index": store, "seed": seed, "num_scans": num_scans, "output": str(output), "ends": False, **SPLITS}
    encoder = encoder_of(run)
    settings |= {"init": RANDOM if arm == RANDOM else str(encoder if encoder.exists() else run)}
    settings |= {"size": BASE["views"]["size"]}
    settings |= {"encoder": BASE["encoder"]} if arm == RANDOM else {}
    settings["all_readings"] = True  # what an arm is worth stands in its strongest
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
                judged(store, run, arm, seed, num_scans)


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


def best_of(runs: Path, arm: str) -> tuple[float, float]:
    """Factors of the rate and of 1 - decay with the best Dice so far."""
    found = {}
    for path in sorted((runs / "search").glob(f"{arm}, x *.json")):
        factors, judged = path.stem.removeprefix(f"{arm}, x ").split(", x "), json.loads(path.read_text())
        if "failed" not in judged:
            found[tuple(map(float, factors))] = judged["readings"]["reestimated"]["decoder"]["value"]
    if not found:
        raise SystemExit(f"{runs}: no search of {arm!r}; run promise.py search first")
    return max(found, key=found.get)


def candidates(runs: Path) -> list[dict]:
    """A row per candidate of a search."""
    rows = []
    for path in sorted((runs / "search").glob("*.json")):
        arm, rate, turnover = path.stem.rsplit(", x ", 2)
        judged = json.loads(path.read_text())
        about = {"arm": arm, "rate": float(rate), "turnover": float(turnover)}
        if "failed" in judged:
            rows.append(about | {"failed": judged["failed"]})
        else:
            scores = judged["readings"]["reestimated"]
            rows.append(about | {judge: scores[judge]["value"] for judge in JUDGES})
    return rows


def search_table(rows: list[dict]) -> list[str]:
    """Markdown of a search; the choice of each arm is bold."""
    lines = ["\n| arm | rate x | 1 - decay x | probe | decoder, Dice | matching, mm |", "|---|---|---|---|---|---|"]
    for row in rows:
        of_arm = [other for other in rows if other["arm"] == row["arm"] and "failed" not in other]
        best = max(of_arm, key=lambda other: other["decoder"], default=None)
        cells = [f"{row['rate']:g}", f"{row['turnover']:g}"]
        if "failed" in row:
            cells += ["blew up", "-", "-"]
        else:
            cells += [f"{row[judge]:.{1 if judge == 'matching' else 3}f}" for judge in JUDGES]
        mark = "**" if row is best else ""
        lines.append(f"| {mark}{row['arm']}{mark} | {' | '.join(cells)} |")
    return lines


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


# -- tables -----------------------------------------------------------------------------------------------------------


def per_scan(judge: str, details: dict) -> dict[str, list]:
    """What a judge says of each test scan: its correct voxels of each class and how many there are; or per organ its
    Dice, or its median error, none where the organ is not there."""
    if judge == "voxels":
        return {"hits": details["hits"], "counts": details["counts"]}
    key = "error_mm" if judge == "matching" else "dice"
    found = {(row["scan_id"], row["organ"]): row[key] for row in details["rows"]}
    scans, organs = (sorted({name[i] for name in found}) for i in (0, 1))
    values = [[found.get((scan, organ), float("nan")) for organ in organs] for scan in scans]
    return {"scans": scans, "values": [[None if np.isnan(one) else round(one, 4) for one in row] for row in values]}


def figures(runs: Path) -> list[dict]:
    """A row per arm, seed, number of labelled scans, judge and reading."""
    rows = []
    for path in sorted((runs / "judged").glob("*.json")):
        arm, seed, num_scans = path.stem.rsplit(", ", 2)
        about = {
            "arm": arm,
            "seed": int(seed.removeprefix("seed ")),
            "num_scans": int(num_scans.removesuffix(" scans")),
        }
        for reading, scores in json.loads(path.read_text())["readings"].items():
            for judge, score in scores.items():
                last = score["details"].get("last_map")
                row = {"judge": judge, "reading": reading, "value": round(score["value"], 4)}
                row |= {"last_map": round(last, 4)} if last else {}
                rows.append(about | row | per_scan(judge, score["details"]))
    return rows


def strongest(rows: list[dict], arms: tuple[str, ...], judge: str, num_scans: int) -> tuple[str, str] | None:
    """Which of these arms is the strongest in which reading; none where none was judged."""
    best, sign = None, -1 if judge == "matching" else 1
    for arm, reading in ((arm, reading) for arm in arms for reading in READINGS):
        values = [row["value"] for row in chosen(rows, arm, reading, judge, num_scans)]
        if values and (best is None or sign * np.mean(values) > best[0]):
            best = sign * np.mean(values), arm, reading
    return best and best[1:]


def chosen(rows: list[dict], arm: str, reading: str, judge: str, num_scans: int) -> list[dict]:
    """Rows of one cell, by seed."""
    keys = {"arm": arm, "reading": reading, "judge": judge, "num_scans": num_scans}
    of_keys = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    return sorted(of_keys, key=lambda row: row["seed"])


def difference(ours: list[dict], theirs: list[dict]) -> tuple[float, list[float], int, int] | None:
    """Mean difference of the values over the seeds that both have, its 95 % interval (seeds and scans are drawn), in
    how many seeds it is above 0, and how many there are."""
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
    if not pairs:
        return None
    values = np.array([a["value"] - b["value"] for a, b in pairs])
    one, other = mean_draws(*zip(*pairs, strict=True))
    return float(values.mean()), percentile_bounds(one - other), int((values > 0).sum()), len(pairs)


def share_of_room(ours: list[dict], base: list[dict], top: list[dict]) -> tuple[float, list[float] | None] | None:
    """Share of the way from the control to the upper end, and its 95 % interval where there are two seeds or more; none
    where one of them has fewer seeds, or where the upper end is hardly better than the control."""
    same = [(a, b, c) for a in ours for b in base for c in top if a["seed"] == b["seed"] == c["seed"]]
    if not same or len(same) < len(ours):
        return None
    judge, (a, b, c) = ours[0]["judge"], np.mean([[row["value"] for row in rows] for rows in same], 0)
    if (c - b) * (1 if HIGHER_IS_BETTER[judge] else -1) < LEAST_ROOM[judge]:
        return None
    drawn_a, drawn_b, drawn_c = mean_draws(*zip(*same, strict=True))
    bounds = percentile_bounds((drawn_a - drawn_b) / (drawn_c - drawn_b)) if len(same) > 1 else None
    return float((a - b) / (c - b)), bounds


def mean_draws(*arms: tuple[dict, ...]) -> list[np.ndarray]:
    """The mean over seeds of each arm's value in draws of seeds and test scans, the same for all arms; [draws] each.

    The values of matching are medians over pairs of scans, which are not kept: its draws are of the median over scans
    and organs, moved by what that differs in from the value.
    """
    rng, num_seeds, first = np.random.default_rng(0), len(arms[0]), arms[0][0]
    num_scans = len(first["hits"] if first["judge"] == "voxels" else first["values"])
    scans = rng.integers(num_scans, size=(NUM_DRAWS, num_scans))
    seeds = rng.integers(num_seeds, size=(NUM_DRAWS, num_seeds))
    all_once = np.arange(num_scans)[None]
    moved = (
        np.stack([of_draws(row, scans) + row["value"] - of_draws(row, all_once) for row in rows], 1) for rows in arms
    )
    return [np.take_along_axis(one, seeds, 1).mean(1) for one in moved]


def of_draws(row: dict, scans: np.ndarray) -> np.ndarray:
    """A judge's value in draws of the test scans, [draws]: balanced accuracy, the mean over organs of the mean Dice, or
    the median over scans and organs.

    Args:
        row: of `figures` or `fine_tuned`.
        scans: numbers of the scans drawn, int [draws, scans].
    """
    if row["judge"] == "voxels":
        hits, counts = (np.array(row[key])[scans].sum(1) for key in ("hits", "counts"))
        return np.nanmean(np.where(counts > 0, hits / np.maximum(counts, 1), np.nan), 1)
    values = np.array(row["values"], float)[scans]  # [draws, scans, organs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an organ that no scan of a draw has
        return np.nanmedian(values, (1, 2)) if row["judge"] == "matching" else np.nanmean(np.nanmean(values, 1), 1)


def rows_of(place: Path) -> list[dict]:
    """All figures of a folder of runs, or of a file that `table` wrote."""
    if place.suffix == ".json":
        return json.loads(place.read_text())
    return [*figures(place), *fine_tuned(place), *({"judge": "search", **row} for row in candidates(place))]


def tables(rows: list[dict]) -> str:
    """Markdown: per number of labelled scans a row per arm, each in its strongest reading, then what was fine-tuned end
    to end."""
    text = []
    arms = [arm for arm in (RANDOM, *ARMS, CEILING) if any(row["arm"] == arm for row in rows)]
    for num_scans in NUM_SCANS:
        here = [row for row in rows if row["judge"] in JUDGES and row["num_scans"] == num_scans]
        judges = [judge for judge in JUDGES if any(row["judge"] == judge for row in here)]
        if not judges:
            continue
        lows = {judge: strongest(here, CONTROLS, judge, num_scans) for judge in judges}
        named = "; ".join(f"of the {JUDGE_NAMES[judge].split(',')[0]} {named_arm(*low)}" for judge, low in lows.items())
        text.append(f"\n{num_scans} labelled scan{'s' * (num_scans > 1)}; strongest control {named}\n")
        text += table_head("arm (seeds)", judges)
        for arm in arms:
            best = {judge: strongest(here, (arm,), judge, num_scans) for judge in judges}
            of_judges = {judge: chosen(here, *one, judge, num_scans) for judge, one in best.items() if one}
            num_seeds = max((len(cells) for cells in of_judges.values()), default=0)
            cells = [
                cell(here, of_judges[judge], lows[judge]) + mark(best[judge]) if judge in of_judges else "-"
                for judge in judges
            ]
            text.append(f"| {arm} ({num_seeds}) | {' | '.join(cells)} |")
        text += against_others(here, judges, num_scans)
    return "\n".join([*text, *end_to_end([row for row in rows if row["judge"] == "fine-tuned"])])


def against_others(rows: list[dict], judges: list[str], num_scans: int) -> list[str]:
    """Lines of a table: what PGL by place is better than each other pre-training by, that in its strongest reading, and
    in how many seeds."""
    lines = []
    for arm in [arm for arm in ARMS if arm != BEST]:
        cells = []
        for judge in judges:
            ours, other = chosen(rows, BEST, "reestimated", judge, num_scans), strongest(rows, (arm,), judge, num_scans)
            theirs = chosen(rows, *other, judge, num_scans) if other else []
            better = gain(difference(ours, theirs), judge)
            cells.append(better + mark(other) if better else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return ["", *table_head(f"{BEST}, better than", judges), *lines] if lines else []


def table_head(first: str, judges: list[str]) -> list[str]:
    """The first two lines of a table with a column per judge."""
    return [f"| {first} | {' | '.join(JUDGE_NAMES[judge] for judge in judges)} |", "|---" * (len(judges) + 1) + "|"]


def gain(gap: tuple[float, list[float], int, int] | None, judge: str) -> str:
    """A difference as tables have it: more is better, whatever the judge; nothing where there is none."""
    if not gap:
        return ""
    mean, bounds, above, num_seeds = gap
    sign, digits = (-1, 1) if judge == "matching" else (1, 3)
    low, high = sorted(sign * bound for bound in bounds)
    ahead = above if sign > 0 else num_seeds - above
    return f"{sign * mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {ahead} of {num_seeds}"


def mark(one: tuple[str, str]) -> str:
    """What stands behind a figure of another reading than the one that counts."""
    return "" if one[1] == READINGS[0] else f" ({one[1]})"


def named_arm(arm: str, reading: str) -> str:
    """An arm as tables call it."""
    return arm if reading == "reestimated" else f"{arm}, {IN_WORDS[reading]}"


def cell(rows: list[dict], ours: list[dict], low: tuple[str, str]) -> str:
    """Mean over seeds; what that is better than the strongest control by, with the interval; in how many seeds it is
    ahead; the share of the room up to the encoder with all labels, with its interval."""
    if not ours:
        return "-"
    judge, num_scans = ours[0]["judge"], ours[0]["num_scans"]
    base, top = chosen(rows, *low, judge, num_scans), chosen(rows, CEILING, "reestimated", judge, num_scans)
    mean = float(np.mean([row["value"] for row in ours]))
    text = f"{mean:.{1 if judge == 'matching' else 3}f}"
    better = gain(difference(ours, base), judge) if ours != base else ""
    if not better:
        return text
    text += f": {better}"
    room = share_of_room(ours, base, top) if ours != top else None
    if not room or room[0] <= 0:
        return text
    bounds = f" [{room[1][0]:.0%}, {room[1][1]:.0%}]" if room[1] else ""
    return f"{text}, {room[0]:.0%}{bounds}"


def fine_tuned(runs: Path) -> list[dict]:
    """A row per arm and seed that was fine-tuned."""
    rows = []
    for one in (json.loads(path.read_text()) for path in sorted((runs / "tuned").glob("*.json"))):
        about = {key: one[key] for key in ("arm", "seed", "factor", "val_dice")}
        about |= {"judge": "fine-tuned", "num_scans": NUM_LABELLED, "value": one["dice"]}
        rows.append(about | per_scan("fine-tuned", one))
    return rows


def end_to_end(rows: list[dict]) -> list[str]:
    """Lines of the table of fine-tuning."""
    base, lines = [row for row in rows if row["arm"] == RANDOM], []
    if base:
        lines += [
            f"\nend to end, {NUM_LABELLED} labelled scans, {TUNE_STEPS} steps, the encoder's rate chosen per arm\n"
        ]
        lines += ["| arm | Dice, by seed | rate x | mean | better than random by, 95 % |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys([RANDOM, *(row["arm"] for row in rows)]) if base else ():
        cells = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        gain = difference(cells, base) if arm != RANDOM else None
        text = f"{gain[0]:+.3f} [{gain[1][0]:+.3f}, {gain[1][1]:+.3f}]" if gain else "-"
        values, factors = (" ".join(f"{row[key]:.3g}" for row in cells) for key in ("value", "factor"))
        lines.append(f"| {arm} | {values} | {factors} | {np.mean([row['value'] for row in cells]):.3f} | {text} |")
    return lines


def main() -> None:
    """See the top."""
    verb, *rest = sys.argv[1:]
    options = dict(part.split("=", 1) for part in rest if "=" in part)
    places = [part for part in rest if "=" not in part]
    if verb in ("train", "search", "finetune") and torch.cuda.is_available():
        raise SystemExit("trainings fork, which CUDA does not survive: set CUDA_VISIBLE_DEVICES= (nothing), or use gpu")
    if verb in ("train", "search", "gpu"):
        every = [arm for arm in ARMS if arm not in PARTS]
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
        train(places[0], Path(places[1]).absolute(), steps, seeds, arms, numbers, searched)
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
                tuned(places[0], runs, arm, seed, str(runs / f"{arm}, seed {seed}"))
            if "init" in options:
                tuned(places[0], runs, Path(options["init"]).stem, seed, options["init"])
        return
    rows = rows_of(Path(places[0]))
    searched = [row for row in rows if row["judge"] == "search"]
    print("\n".join([tables(rows), *(search_table(searched) if searched else [])]))
    if "output" in options:
        lines = ",\n".join(json.dumps(row) for row in rows)
        Path(options["output"]).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
