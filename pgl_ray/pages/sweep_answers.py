"""The answers at the top of a sweep's page, each worked out from its trials.

Which is best and how sure, is pre-training better than random weights, what limited speed, what to do next.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pgl_ray.judge.judges import Standing, answer
from pgl_ray.model.metrics import reach
from pgl_ray.pages import speeds, tables
from pgl_ray.pages.arms import Gain
from pgl_ray.pages.pages import NO, OPEN, YES, Answer, Line, command, plural
from pgl_ray.pages.run_folders import Run
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import short
from pgl_ray.sweep.sweeps import Trial
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.records import RunRecord, read_json
from pgl_ray.train.run_files import RECORD

BEST, BETTER = "Which is best, and how sure is that?", "Is pre-training better than random weights?"
SPEED, NEXT = "What limited speed?", "What to do next?"
UNPAIRED = "no seed, or fewer than two test scans on alike labels, in common with"
EDGE = 0.1  # share of a range at either end
Blocks = list[dict[str, Any]]


def of_sweep(config: dict[str, Any], trials: list[Trial], grid: dict[str, Any] | None, judged: Blocks) -> list[Answer]:
    """The four answers.

    Args:
        config: sweep.json.
        trials: of the sweep.
        grid: `sweep_report.grid`, of arms that were fine-tuned.
        judged: `arms.judged`, of frozen arms.
    """
    leading = best(config, trials)
    better = of_frozen(judged) + of_tuned(config, grid) or [_best_probed(trials)]
    return [
        Answer(BEST, leading),
        Answer(BETTER, better),
        Answer(SPEED, speeds.limits(_runs(trials)) or [Line(OPEN, "no training has begun")]),
        Answer(NEXT, [next_step(config, trials, leading, better)]),
    ]


# -- which is best? ---------------------------------------------------------------------------------------------------


def _groups(
    judge: str, trials: list[Trial], states: tuple[str, ...] = ("done",)
) -> dict[str, dict[str, dict[str, float]]]:
    """Point -> title -> seed -> score of trials in these states. Arms are set against each other at one point of the
    space; without arms all settings are."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    last = "probe" if judge.startswith("probe/") else "finetune"  # whose seeds change what is judged
    for trial in trials:
        if trial.state in states and trial.score is not None:
            rest = {key: value for key, value in trial.values.items() if short(key) != "seed"}
            arm = rest.pop("arm", None)
            point, title = (sweeps.settings(rest), str(arm)) if arm else ("", sweeps.settings(rest) or "as the base")
            seeds = sweeps.seeds(trial.values, "pretrain", last)
            scores.setdefault(point, {}).setdefault(title, {})[seeds] = trial.score
    return scores


def best(config: dict[str, Any], trials: list[Trial]) -> list[Line]:
    """The best of each point, against the second; over seeds where both have the same ones."""
    judge = config["judge"]
    lines = []
    all_seeds = _groups(judge, trials, sweeps.COUNTED)
    for point, titles in _groups(judge, trials).items():
        mean = {title: float(np.mean([*scores.values()])) for title, scores in titles.items()}
        rank = {title: sweeps.merit(judge, float(np.mean([*all_seeds[point][title].values()]))) for title in titles}
        first, *others = sorted(mean, key=lambda title: -rank[title])
        text = f"{judge} {mean[first]:.4f}" + (" (lower is better)" if sweeps.merit(judge, 1.0) < 0 else "")
        if not others:
            lines.append(Line(OPEN, f"{first} with {text} has nothing beside it", point))
            continue
        text += f", the second is {others[0]}, {mean[first] - mean[others[0]]:+.4f} away"
        lines.append(_lead(judge, first, text, titles[first], titles[others[0]])._replace(of=point))
    return lines or [Line(OPEN, f"no trial is done with a score: {_states(trials)}")]


def _lead(judge: str, first: str, text: str, scores: dict[str, float], others: dict[str, float]) -> Line:
    """Whether the first is better than the second by the seeds that both have."""
    by_seed = [scores[seed] - others[seed] for seed in scores if seed in others]
    half = reach(by_seed)
    if half is None:
        return Line(
            OPEN, f"{first} leads with {text}; they share fewer than two seeds, so chance cannot be told from a gain"
        )
    mean = float(np.mean(by_seed))
    over = f"95 % interval {mean - half:+.4f} to {mean + half:+.4f} over {len(by_seed)} seeds"
    over += "" if len(by_seed) == len(scores) == len(others) else f", those of both, with {mean:+.4f}"
    if sweeps.merit(judge, mean) <= half:
        return Line(OPEN, f"{first} leads with {text} ({over})")
    return Line(first, f"{text} ({over})")


def _states(trials: list[Trial]) -> str:
    return ", ".join(f"{num} {state}" for state, num in sweeps.num_by_state(trials).items() if num) or "none has begun"


# -- is pre-training better than random weights? ----------------------------------------------------------------------


def of_frozen(judged: Blocks) -> list[Line]:
    """Per arm and point what the judges of frozen encoders say of it against the strongest control."""
    lines = []
    for block in judged:
        at = f", {block['point']}" if len(judged) > 1 else ""
        if block["controls"] and not block["gains"]:
            lines.append(Line(OPEN, "random weights or wrong priors alone are judged so far", f"frozen{at}"))
        for arm, gains in block["gains"].items():
            name = f"frozen, {arm}{at}"
            if not block["controls"]:
                lines.append(Line(OPEN, "no arm of random weights or wrong priors was judged", name))
                continue
            if not gains:
                lines.append(Line(OPEN, f"{UNPAIRED} random weights or wrong priors", name))
                continue
            lines.append(Line(_verdict([*gains.values()]), "; ".join(_words(one) for one in gains.values()), name))
    return lines


def of_tuned(config: dict[str, Any], grid: dict[str, Any] | None) -> list[Line]:
    """Per arm and point the Dice after fine-tuning against the first arm there, if that began from random weights."""
    lines = []
    for block in grid["blocks"] if grid else []:
        at = f", {block['point']}" if len(grid["blocks"]) > 1 else ""
        if config["arms"][block["first"]].get("finetune.init") != "random":
            text = f"others are set against {block['first']}, the first arm evaluated, which is not of random weights"
            lines.append(Line(OPEN, text, f"fine-tuned{at}"))
            continue
        if not block["gains"]:
            lines.append(Line(OPEN, "random weights alone are evaluated so far", f"fine-tuned{at}"))
        for arm, gain in block["gains"].items():
            name = f"fine-tuned, {arm}{at}"
            none = Line(OPEN, f"{UNPAIRED} random weights", name)
            lines.append(Line(_verdict([gain]), _words(gain), name) if gain else none)
    return lines


def _verdict(gains: list[Gain]) -> str:
    better = {one.is_better for one in gains}
    if True in better:
        return YES if better == {True} else "In part"
    return NO if better == {False} else OPEN


def _words(gain: Gain) -> str:
    return (
        f"{gain.mean:+.2f} {gain.measure.unit} (95 % interval {gain.low:+.2f} to {gain.high:+.2f} over "
        f"{plural(gain.num_scans, 'scan')}), ahead with {gain.ahead} of {plural(len(gain.by_seed), 'seed')}"
    )


def _best_probed(trials: list[Trial]) -> Line:
    """Without arms: what the probe of the best trial says of random weights."""
    top = next(iter(sweeps.judged(trials)), None)
    path = top and top.folder / "probe.json"
    result = read_json(path) if path and path.is_file() else {}
    standing = {judge: Standing(**one) for judge, one in result.get("standing", {}).items()}
    if not standing:
        return Line(OPEN, "no arm of random weights was judged or tested, and no judge set a trial beside them")
    values = {judge: score["value"] for judge, score in tables.counted(result).items()}
    ahead = {one.is_ahead if one.ahead_ci95 else None for one in standing.values()}
    verdict = (YES if ahead == {True} else "In part") if True in ahead else NO if ahead == {False} else OPEN
    return Line(verdict, answer(f"the best trial, {top.title},", standing, values).removesuffix("."))


# -- what limited speed, and what is next? ----------------------------------------------------------------------------


def _runs(trials: list[Trial]) -> list[Run]:
    """All trainings of the sweep that have begun, shared ones once."""
    folders = dict.fromkeys(run for trial in trials for stage in speeds.DOORS if (run := trial.run(stage)))
    runs = []
    for number, folder in enumerate(folder for folder in folders if Path(folder, RECORD).is_file()):
        runs.append(Run(folder.name, folder, number, RunRecord.read(folder), read_metrics(folder), None, []))
    return runs


def next_step(config: dict[str, Any], trials: list[Trial], leading: list[Line], better: list[Line]) -> Line:
    """The first of what is open.

    Args:
        config: sweep.json.
        trials: of the sweep.
        leading, better: what the first two questions were answered by.
    """
    again = sweeps.tried_again(config, trials)
    failed = [trial for trial in again if trial.state == "failed"]
    done = sweeps.judged(trials)
    if len(again) > len(failed) or not trials:
        return Line("Let it end", f"{_states(trials)}; where it runs no more, the same command goes on from there")
    if failed:
        error = " ".join((failed[0].error or "for an unknown reason").split())[:200]
        return Line(
            "Mend what failed", f"{plural(len(failed), 'trial')}, the first: {error}; the same command tries again"
        )
    if not done:
        return Line("Widen the space", f"no trial came to its end: {_states(trials)}")
    top = done[0]
    edges = [text for key in config["space"] if (text := at_edge(key, config["space"][key], top.values.get(key)))]
    if edges and len(done) > 2:
        return Line("Widen the space", f"the best trial lies at its edge: {'; '.join(edges)}")
    judge, groups = config["judge"], _groups(config["judge"], done).values()
    if any(len(scores) < 3 for titles in groups for scores in _best_two(judge, titles)):
        return Line("Repeat", "the best settings and the second with three seeds or more: a grid_search of the seed")
    if not config["arms"]:
        args = [str(Path(config["run"], "best.yaml")), "index=STORE", "run=RUN"]
        return Line("Use it", command("finetune" if config["base_pretrain"] is None else "pretrain", *args))
    if any(line.verdict == NO for line in better):
        return Line("Train on", "an arm is worse than random weights or no places: longer pre-training, larger views")
    if any(line.verdict == OPEN for line in [*leading, *better]):
        return Line("Repeat", "more seeds, or more test scans: these are too few for what is open above")
    return Line("Use it", "nothing that these figures could tell is open")


def _best_two(judge: str, titles: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """Scores per seed of the best settings and of the second."""
    return sorted(titles.values(), key=lambda scores: -sweeps.merit(judge, float(np.mean([*scores.values()]))))[:2]


def at_edge(key: str, entry: dict[str, list], value: Any) -> str | None:
    """Where the best value of a setting lies at an end of what was tried; none for settings that have no order."""
    ((verb, args),) = entry.items()
    listed = verb in ("choice", "grid_search")
    numeric = all(isinstance(one, int | float) and not isinstance(one, bool) for one in [*args, value])
    if not numeric or short(key) in ("seed", "num_scans") or len(set(args)) < (3 if listed else 2):
        return None
    if listed:
        low, high = min(args), max(args)
        ends = {low: "lowest", high: "highest"}
        return f"{key}={value:g}, the {ends[value]} of {low:g} to {high:g}" if value in ends else None
    low, high = args[:2]
    if "log" in verb:
        low, high, value = math.log(low), math.log(high), math.log(value)
    share = (value - low) / (high - low)
    if EDGE <= share <= 1 - EDGE:
        return None
    low, high, value = (math.exp(one) if "log" in verb else one for one in (low, high, value))
    return f"{key}={value:.4g}, near the {'lowest' if share < EDGE else 'highest'} of {low:g} to {high:g}"
