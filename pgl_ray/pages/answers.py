"""The answers at the top of a report of runs, each worked out from the runs' own figures.

Did pre-training learn places, is it better than random weights, what limited speed, what to do next.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from pgl_ray.judge.judges import Standing, answer
from pgl_ray.model.metrics import mean_of_organs, reach
from pgl_ray.pages import arms, next_steps, run_folders, speeds, tables
from pgl_ray.pages.pages import NO, OPEN, YES, Answer, Line, percent, plural
from pgl_ray.pages.run_folders import Run
from pgl_ray.train import run_paths
from pgl_ray.train.health import FEW, MANY, verdict

PLACES, BETTER = "Did pre-training learn places?", "Is it better than random weights?"
SPEED, NEXT = "What limited speed?", "What to do next?"
Judged = tuple[Path, dict[str, Any]]  # a probe's file and result


def of_runs(runs: list[Run], probes: list[Judged]) -> list[Answer]:
    """The four answers.

    Args:
        runs: of the page.
        probes: what judges say of frozen encoders, as `probe_tables.read` finds it.
    """
    pretrained, tuned = ([run for run in runs if run.door == door] for door in ("pretrain", "finetune"))
    judged = {run.name: _judged(run, probes) for run in pretrained}
    several = len(pretrained) > 1
    places = [_named(run, several, learned_places(run, judged[run.name])) for run in pretrained]
    frozen = [_named(run, True, better_frozen(run, judged[run.name])) for run in pretrained]
    return [
        Answer(PLACES, places or [_not_here(tuned)]),
        Answer(BETTER, [*frozen, *better_tuned(tuned)]),
        Answer(SPEED, speeds.limits(runs)),
        Answer(NEXT, [next_steps.first(runs, judged)]),
    ]


def _named(run: Run, several: bool, line: Line) -> Line:
    return line._replace(of=run.name) if several else line


def _judged(run: Run, probes: list[Judged]) -> dict[str, Any] | None:
    """What the judges say of a run's encoder: of several results that with the most judges, the newest of these. One of
    a checkpoint that training went on from does not count."""
    names = {str(run.path), run_paths.origin(run.path)}
    results = [
        (path, one)
        for path, one in probes
        if path == run.path / "probe.json" or one["init"] in names or os.path.realpath(one["init"]) in names
    ]
    step = run.rows[-1]["step"] if run.rows else 0
    results = [(path, one) for path, one in results if (one.get("steps") or step) >= step]
    best = max(results, key=lambda it: (len(it[1]["standing"]), it[0].stat().st_mtime), default=None)
    return best and best[1]


def _inits(tuned: list[Run]) -> list[str]:
    """What weights the fine-tunings began with, random ones aside."""
    return list(dict.fromkeys(run.record.init for run in tuned if run.record.init != "random"))


def _not_here(tuned: list[Run]) -> Line:
    inits = _inits(tuned)
    where = f": run=[{inits[0]},...] puts it here" if inits else ", all began from random weights"
    return Line(OPEN, f"no pre-training run is on this page{where}")


# -- did pre-training learn places? -----------------------------------------------------------------------------------


def learned_places(run: Run, judged: dict[str, Any] | None) -> Line:
    """By point matching in scans apart, where it was asked; else by how often a place is found in the other view."""
    health = [row for row in run.rows if "health/collapsed" in row]
    if not health:
        return Line(OPEN, "no health figures are written yet" if run.rows else "no metrics are written yet")
    if row := tables.collapsed(run):
        return Line(NO, verdict(row))
    retrieval = _retrieved(health)
    if not judged or "matching" not in judged["standing"]:
        return retrieval
    one = Standing(**judged["standing"]["matching"])
    score = tables.counted(judged)["matching"]
    interval = f" (95 % interval {_interval(score['ci95'], '.1f')})" if score["ci95"] else ""
    body = judged.get("body_box_mm")
    baseline = "" if body is None else f"; the place in the body's box alone, without any encoder, gives {body:.1f} mm"
    text = f"organ centroids are found in other scans with a median error of {score['value']:.1f} mm{interval}, "
    text += f"{_against(one)}{baseline}; {retrieval.text}"
    return Line({True: YES, False: NO, None: OPEN}[one.is_ahead], text)


def _against(standing: Standing) -> str:
    """The difference of point matching to its strongest control."""
    other = "random weights" if standing.low_is.startswith("random") else f"the {standing.low_is}"
    if standing.ahead_ci95 is None:
        return f"{other} with {standing.low:.1f} mm; one scan alone has no interval"
    word = {True: "ahead of", False: "behind", None: "not clearly ahead of"}[standing.is_ahead]
    return f"{word} {other} with {standing.low:.1f} mm by {standing.by('matching')}"


def _interval(bounds: list[float] | tuple[float, float], spec: str) -> str:
    return f"{bounds[0]:{spec}} to {bounds[1]:{spec}}"


def _retrieved(health: list[dict[str, float]]) -> Line:
    """By the encoder's own map in training: places found again in the other view, against chance and the first step.

    Chance is that of features which know their scan and not the place in it. The first row is of nearly random weights.
    """
    rows = [row for row in health if {"health/encoder_retrieval", "health/encoder_retrieval_chance"} <= set(row)]
    if not rows:
        return Line(OPEN, "the metrics, of an earlier version, do not say how often places are found in the other view")
    first, last = rows[0], rows[1:][-MANY:]
    if len(last) < 2:
        return Line(
            OPEN, f"places were looked for in {len(rows)} of its batches, too few for an interval: lower health.every"
        )
    values = [row["health/encoder_retrieval"] for row in last]
    mean, half = float(np.mean(values)), reach(values)
    chance = float(np.mean([row["health/encoder_retrieval_chance"] for row in last]))
    low, start = mean - half, first["health/encoder_retrieval"]
    began = f"{percent(start)} at step {first['step']:.0f}"
    text = (
        f"{percent(mean)} of the places are found again in the other view (mean of the last {len(last)} judged "
        f"batches, 95 % interval {percent(max(0.0, low), mean + half)}), {began} and {percent(chance)} by the "
        "scan alone"
    )
    if low > max(start, chance):
        return Line(YES, text)
    if mean <= chance and len(last) >= FEW:
        return Line(NO, f"{text}; wrong priors look like this, or a training that has hardly begun")
    return Line(OPEN, f"{text}, so the interval does not leave these out")


# -- is it better than random weights? --------------------------------------------------------------------------------


def better_frozen(run: Run, judged: dict[str, Any] | None) -> Line:
    """By the judges of the frozen encoder, else by the voxel probe in training, which has no interval."""
    rows = [row for row in run.rows if "probe/balanced_accuracy" in row]
    trained = ""
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        trained = (
            f"; the voxel probe in training went from {first['probe/balanced_accuracy']:.3f} at step "
            f"{first['step']:.0f} to {last['probe/balanced_accuracy']:.3f}, which has no interval"
        )
    if not judged:
        return Line(OPEN, f"no judge has looked at the frozen encoder{trained}")
    standing = {judge: Standing(**one) for judge, one in judged["standing"].items()}
    if not standing:
        return Line(OPEN, f"the judges had nothing to compare it with: probe with ends=true{trained}")
    values = {judge: score["value"] for judge, score in tables.counted(judged).items()}
    text = answer(run.name, standing, values).removesuffix(".")
    if any(one.ahead_ci95 is None for one in standing.values()):
        return Line(OPEN, f"{text}; one test scan alone has no interval{trained}")
    ahead = {one.is_ahead for one in standing.values()}
    if True in ahead:
        return Line(YES if ahead == {True} else "In part", text)
    return Line(NO if ahead == {False} else OPEN, text)


def better_tuned(tuned: list[Run]) -> list[Line]:
    """Fine-tuned networks by what they were initialised with, against those from random weights, in pairs of a seed."""
    evaluated = [run for run in tuned if run.summary]
    starts = _inits(tuned)
    random = [run for run in evaluated if run.record.init == "random"]
    if not tuned:
        return [Line(OPEN, "no fine-tuning is on this page", "fine-tuned")]
    if not starts:
        return [Line(OPEN, "all runs were fine-tuned from random weights", "fine-tuned")]
    lines = []
    for start in starts:
        name = f"fine-tuned from {os.path.basename(start.rstrip('/'))}"
        mine = [run for run in evaluated if run.record.init == start]
        if why := _unpaired(mine, random):
            lines.append(Line(OPEN, why, name))
            continue
        for settings, pairs in run_folders.by_settings(arms.same_seed(mine, random)).items():
            lines.append(_tuned(pairs)._replace(of=", ".join(filter(None, (name, settings)))))
    return lines


def _unpaired(tuned: list[Run], random: list[Run]) -> str:
    """Why no two runs are set beside each other; "" where some are."""
    if not tuned:
        return "not evaluated yet"
    if not random:
        return "no evaluated run from random weights is on this page"
    same = "the same seed and as many labelled scans, or, of several such, the same settings"
    return "" if arms.same_seed(tuned, random) else f"no run from random weights has {same}"


def _tuned(pairs: list[tuple[Run, Run]]) -> Line:
    pairs = arms.scored_alike(pairs)
    if short := next(filter(None, (tables.unfinished(run) for pair in pairs for run in pair)), None):
        return Line(OPEN, f"{short}: a network that is not trained to its end is no answer")
    gain = arms.dice_gain(pairs)
    if gain is None:
        why = arms.unlike([(run.scores, other.scores) for run, other in pairs])
        return Line(OPEN, why or "fewer than two scans were scored with both")
    rows = arms.scored_by_both(pairs)[0]
    means = [float(np.mean([mean_of_organs(of_run, "dice") or 0.0 for of_run in side])) for side in zip(*rows)]
    is_part = any(len(both) < len(run.scores) for pair in zip(rows, pairs) for both, run in zip(*pair))
    where = " where both were scored" if is_part else ""
    text = (
        f"Dice {means[0]:.3f} against {means[1]:.3f} from random weights{where}, {gain.mean / 100:+.3f} (95 % interval "
        f"{gain.low / 100:+.3f} to {gain.high / 100:+.3f} over {plural(gain.num_scans, 'scan')})"
    )
    if len(pairs) > 1:
        half, mean = reach(gain.by_seed), float(np.mean(gain.by_seed))
        over = _interval((mean - half, mean + half), "+.3f")
        text += f", ahead with {gain.ahead} of {len(pairs)} seeds ({over} over these)"
    else:
        text += ", one training each: another seed may move it by more"
    differing = [key for pair in pairs for key, _ in run_folders.differing_settings(list(pair))]
    others = [key for key in dict.fromkeys(differing) if key not in ("init", "run", "seed")]
    text += f"; they differ in {', '.join(others)}, too" if others else ""
    return Line({True: YES, False: NO, None: OPEN}[gain.is_better], text)
