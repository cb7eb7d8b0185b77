"""What a sweep's arms differ by: paired differences in words, and tables of what the judges say of frozen encoders."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.config import flattened
from pgl_ray.judge import voxels
from pgl_ray.model.metrics import (
    drawn_medians,
    for_few,
    mean_of_organs,
    other_truth,
    percentile_bounds,
    reach,
    scan_draws,
)
from pgl_ray.pages import tables
from pgl_ray.pages.run_folders import Run
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import short
from pgl_ray.sweep.sweeps import Trial
from pgl_ray.train.records import read_json

NUM_DRAWS = 1000


class Measure(NamedTuple):
    """What a sentence about a difference is about.

    Attributes:
        score: column of the rows.
        unit: of the difference.
        factor: from the column's values to the unit.
        figure: of `sweeps.FIGURES`, which says whether lower is better; none: higher is.
        drawn: (rows, scans, how often each is drawn [draws, scans]) -> the value [draws], of a judge whose value is no
            mean over organs of the mean over scans.
    """

    score: str
    unit: str
    factor: float
    figure: str | None = None
    drawn: Callable[[list[dict], list[str], np.ndarray], np.ndarray] | None = None


def _drawn_accuracies(rows: list[dict], scans: list[str], draws: np.ndarray) -> np.ndarray:
    """The balanced accuracy in draws of the scans, [draws]."""
    organs = list(dict.fromkeys(row["organ"] for row in rows))
    by_organ = {(row["scan_id"], row["organ"]): (row["hits"], row["count"]) for row in rows}
    both = np.array([[by_organ.get((scan, organ), (0, 0)) for organ in organs] for scan in scans])
    return voxels.drawn_accuracies(both[..., 0], both[..., 1], draws)


DICE = Measure("dice", "points of Dice", 100.0)
MEASURES = {
    "voxels": Measure("hits", "points of balanced accuracy", 100.0, "probe/balanced_accuracy", _drawn_accuracies),
    "decoder": DICE._replace(figure="probe/decoder_dice"),
    "matching": Measure("error_mm", "mm of error (lower is better)", 1.0, "probe/matching_mm", drawn_medians),
}


class Gain(NamedTuple):
    """By how much one arm's score differs from another's: over the scans, seeds taken together, and over the seeds,
    scans taken together; a finding that is more than the scans' noise may be no more than the seeds'.

    Attributes:
        mean, low, high: over the scans, with its 95 % interval, in the measure's unit.
        num_scans: that both have.
        by_seed: per seed the difference of the means.
        measure: of the scores.
    """

    mean: float
    low: float
    high: float
    num_scans: int
    by_seed: list[float]
    measure: Measure

    @property
    def ahead(self) -> int:
        """Seeds with which it is better."""
        return sum(sweeps.merit(self.measure.figure, value) > 0 for value in self.by_seed)

    @property
    def is_better(self) -> bool | None:
        """Whether it is; none: within the noise of the scans, or of the seeds where there are several, or the means say
        the opposite of the scans and organs that both have (an invented organ costs the mean alone)."""
        half, mean = reach(self.by_seed), float(np.mean(self.by_seed)) if self.by_seed else 0.0
        if self.low <= 0 <= self.high or (half is not None and abs(mean) <= half):
            return None
        if self.by_seed and self.mean * mean <= 0:
            return None
        return sweeps.merit(self.measure.figure, self.mean) > 0


def gain(pairs: list[tuple[list[dict], list[dict]]], by_seed: list[float], measure: Measure) -> Gain | None:
    """How far two arms are apart.

    Args:
        pairs: per seed the rows of both: scan_id, organ and the score.
        by_seed: per seed the difference of the means.
        measure: of the rows.

    Returns:
        None with fewer than two common scans, or where any of them were scored on other labels (`unlike`).
    """
    if not pairs or unlike(pairs):
        return None
    if measure.drawn:
        drawn = _drawn_gap(pairs, by_seed, measure)
        return drawn and Gain(*drawn, by_seed, measure)
    mine, theirs = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    together = [_over_seeds(rows, measure.score) for rows in (mine, theirs)]
    paired = tables.paired_difference(*together, measure.score)
    return paired and Gain(*(measure.factor * value for value in paired[:3]), paired.num_scans, by_seed, measure)


def _drawn_gap(
    pairs: list[tuple[list[dict], list[dict]]], by_seed: list[float], measure: Measure
) -> tuple[float, float, float, int] | None:
    """Mean over seeds of what two values differ by, its 95 % interval in draws of the scans, and their number."""
    assert measure.drawn is not None
    known = [{row["scan_id"] for row in rows} for pair in pairs for rows in pair]
    scans = sorted(set.intersection(*known))
    if len(scans) < 2:
        return None
    draws = np.vstack([np.ones((1, len(scans)), int), scan_draws(len(scans), 0)[:NUM_DRAWS]])
    drawn = np.mean([np.subtract(*(measure.drawn(rows, scans, draws) for rows in pair)) for pair in pairs], 0)
    mean = float(np.mean(by_seed))  # of scans that either has, where that is not all once
    low, high = for_few(percentile_bounds(drawn[1:] - drawn[0] + mean), mean, len(scans))
    return measure.factor * mean, measure.factor * low, measure.factor * high, len(scans)


def unlike(pairs: list[tuple[list[dict], list[dict]]]) -> str:
    """What keeps runs from being compared: labels that differ, in words; "" where none do."""
    for mine, theirs in pairs:
        if differs := other_truth(mine, theirs):
            where = f"{differs[1]} in scan {differs[0]}"
            return f"scored on different labels of {where}: no statement about their difference"
    return ""


def difference(
    subject: str, pairs: list[tuple[list[dict], list[dict]]], by_seed: list[float], measure: Measure
) -> list[str]:
    """A sentence about the `gain` of one arm over another, in a list, begun by `subject`; [] where there is none."""
    gap = gain(pairs, by_seed, measure)
    if not gap:
        return [f"{subject}: {why}."] if (why := unlike(pairs)) else []
    worth = "within" if gap.low <= 0 <= gap.high else "more than"
    return [
        f"{subject}: {gap.mean:+.2f} {measure.unit}, {worth} the noise of {gap.num_scans} scans (95 % interval "
        f"{gap.low:+.2f} to {gap.high:+.2f}); ahead with {gap.ahead} of {len(by_seed)} seeds"
        f"{over(by_seed, measure.factor)}."
    ]


def same_seed(runs: list[Run], others: list[Run]) -> list[tuple[Run, Run]]:
    """Fine-tuning runs in pairs: those that differ in nothing but what they began with; else those of one seed, store
    and number of labelled scans where each side has a single one, so that none is counted twice."""
    pairs: list[tuple[Run, Run]] = []
    for point in (_settings, _draw):
        mine, theirs = (
            [run for run in side if not any(run is one for pair in pairs for one in pair)] for side in (runs, others)
        )
        for run in mine:
            alike, same = ([one for one in side if point(one) == point(run)] for side in (mine, theirs))
            if len(alike) == len(same) == 1:
                pairs.append((run, same[0]))
    return pairs


def _settings(run: Run) -> dict[str, Any]:
    """All but where a training lies and what it began with."""
    return {key: value for key, value in flattened(run.config).items() if key not in ("run", "init")}


def scored_alike(pairs: list[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """Those pairs of evaluated runs that were scored on an organ of a scan in common."""
    return [pair for pair in pairs if scored_by_both([pair])[0]]


def _draw(run: Run) -> tuple[Any, ...]:
    """What decides the labelled scans."""
    return run.record.seed, run.config.get("num_scans"), run.record.index


def dice_gain(pairs: list[tuple[Run, Run]]) -> Gain | None:
    """The gain in Dice of the first of each pair of evaluated runs."""
    return gain(*scored_by_both(pairs), DICE)


def scored_by_both(pairs: list[tuple[Run, Run]]) -> tuple[list[tuple[list[dict], list[dict]]], list[float]]:
    """Per pair of evaluated runs the rows of both, of the scans and organs that both were scored on, and the difference
    of their mean Dice: one of other scans may be easier. A pair that has none is left out."""
    rows, by_seed = [], []
    for run, other in pairs:
        mine, theirs = ({(row["scan_id"], row["organ"]): row for row in one.scores} for one in (run, other))
        both = [key for key in mine if key in theirs]
        if not both:
            continue
        rows.append(([mine[key] for key in both], [theirs[key] for key in both]))
        by_seed.append(float(np.subtract(*(mean_of_organs(side, "dice") or 0.0 for side in rows[-1]))))
    return rows, by_seed


def over(by_seed: list[float], factor: float = 100.0) -> str:
    """Student's interval of the differences of several seeds, and whether it is one of a finding."""
    half, mean = reach(by_seed), float(np.mean(by_seed))
    if half is None:
        return ""
    worth = "within" if abs(mean) <= half else "more than"
    return f", {worth} their noise ({factor * (mean - half):+.2f} to {factor * (mean + half):+.2f})"


def _over_seeds(rows: list[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """A score per scan and organ, the mean of all rows that have it."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if not math.isnan(row[score]):
            values.setdefault((row["scan_id"], row["organ"]), []).append(row[score])
    return [{"scan_id": scan, "organ": organ, score: float(np.mean(v))} for (scan, organ), v in values.items()]


def cell(values: list[float], digits: int = 2) -> str:
    """Mean over seeds, and their standard deviation."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


# -- frozen encoders --------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """An arm in one reading, at one point of the space.

    Attributes:
        arm: its name.
        name: of arm and reading.
        control: random weights, or wrong priors: what a claim must beat.
        seeds: seed -> judge -> score, as in probe.json.
    """

    arm: str
    name: str
    control: bool
    seeds: dict[str, dict[str, dict[str, Any]]]

    def values(self, judge: str) -> dict[str, float]:
        """Seed -> value."""
        return {seed: scores[judge]["value"] for seed, scores in self.seeds.items() if judge in scores}


def judged(config: dict[str, Any], trials: list[Trial]) -> list[dict[str, Any]]:
    """What the judges say of the arms, per point of the space, seeds taken together.

    Controls are listed in every reading, all else in the one that counts. Each arm is set against the strongest
    control: random weights or wrong priors, in whichever reading is best; the first arm where there is neither.

    Returns:
        Per point: point, heads (of the judges), rows (name, seeds, cells), sentences, gains (arm -> judge -> `Gain`
        over the strongest control, {} where none can be said) and controls (names).
    """
    points: dict[str, dict[str, Judged]] = {}
    for trial in trials:
        path = trial.folder / "probe.json"
        if trial.state == "done" and "arm" in trial.values and path.is_file():
            point = {key: v for key, v in trial.values.items() if key != "arm" and short(key) != "seed"}
            seed = sweeps.seeds(trial.values, "pretrain", "probe")
            rows = points.setdefault(sweeps.settings(point) or "all trials", {})
            arm, result = trial.values["arm"], read_json(path)
            random = result["init"] == "random"
            control = random or bool(config["arms"].get(arm, {}).get("pretrain.align.wrong_priors"))
            for number, (reading, scores) in enumerate(result["readings"].items()):
                if control or not number:
                    name = f"{arm}, BatchNorm {reading}" if number else arm
                    row = rows.setdefault(name, Judged(arm, name, control, {}))
                    row.seeds[seed] = scores
    names = list(config["arms"])
    ordered = {point: sorted(rows.values(), key=lambda row: names.index(row.arm)) for point, rows in points.items()}
    return [_block(point, rows) for point, rows in ordered.items()]


def _block(point: str, rows: list[Judged]) -> dict[str, Any]:
    asked, lines = [judge for judge in tables.JUDGED if any(row.values(judge) for row in rows)], []
    gains: dict[str, dict[str, Gain]] = {}
    for judge in asked:
        known = [row for row in rows if row.values(judge)]
        low = strongest(judge, [row for row in known if row.control] or known[:1])
        others = {row.arm: [one for one in known if one.arm == row.arm] for row in known if row.arm != low.arm}
        for row in (strongest(judge, readings) for readings in others.values()):
            pairs = _pairs(judge, row, low)
            lines += difference(f"{row.name} against {low.name}", *pairs, MEASURES[judge])
            if not row.control:
                gap = gain(*pairs, MEASURES[judge])
                gains.setdefault(row.name, {}).update({judge: gap} if gap else {})
    digits = {judge: 1 if judge == "matching" else 3 for judge in asked}
    return {
        "point": point,
        "heads": [tables.JUDGED[judge][0] for judge in asked],
        "rows": [
            {
                "name": row.name,
                "seeds": len(row.seeds),
                "cells": [cell(list(row.values(judge).values()), digits[judge]) for judge in asked],
            }
            for row in rows
        ],
        "sentences": lines,
        "gains": gains,
        "controls": [row.name for row in rows if row.control],
    }


def strongest(judge: str, rows: list[Judged]) -> Judged:
    """The best by the mean over its seeds."""
    return max(
        rows, key=lambda row: sweeps.merit(MEASURES[judge].figure, float(np.mean([*row.values(judge).values()])))
    )


def _pairs(judge: str, row: Judged, low: Judged) -> tuple[list[tuple[list[dict], list[dict]]], list[float]]:
    """Per seed that both have the rows of both, and the difference of the means."""
    mine, theirs = row.values(judge), low.values(judge)
    both = [seed for seed in mine if seed in theirs]
    pairs = [tuple(_rows_of(judge, one.seeds[seed][judge]["details"]) for one in (row, low)) for seed in both]
    return pairs, [mine[seed] - theirs[seed] for seed in both]


def _rows_of(judge: str, details: dict[str, Any]) -> list[dict[str, Any]]:
    """What a judge says per scan and organ."""
    if judge != "voxels":
        return details["rows"]
    return [
        {"scan_id": scan, "organ": organ, "hits": hit, "count": count}
        for scan, hits, counts in zip(details["scans"], details["hits"], details["counts"])
        for organ, hit, count in zip(details["classes"], hits, counts)
        if count
    ]
