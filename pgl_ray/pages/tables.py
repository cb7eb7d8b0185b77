"""What the numbers of run folders say: tables, paired differences, verdicts. The report prints them."""

import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.model import metrics
from pgl_ray.pages.run_folders import Run
from pgl_ray.train.health import collapse, newest_verdict, rise

SCORES = {"dice": "Dice", "iou": "IoU", "hd_mm": "HD, mm", "hd95_mm": "HD95, mm"}
LOWER_IS_BETTER = ("hd_mm", "hd95_mm")

# -- comparison of evaluated runs -------------------------------------------------------------------------------------


def comparison(runs: list[Run]) -> dict[str, Any]:
    """The table of evaluated runs, with its best values, and what the differences are worth.

    The means are the evaluation's: over scans, then over organs. The standard error is that of the scans' means.
    Nothing is called best among runs that were scored on different scans, organs or labels, nor a distance where a run
    missed an organ: HD leaves such an organ out, which flatters the run.
    """
    organs = evaluated_organs(runs)
    columns = [(score, None) for score in SCORES] + [("dice", organ) for organ in organs]
    truth = ("scan_id", "organ", "target_voxels")  # rows of earlier versions may lack the last
    alike = len({frozenset(tuple(map(row.get, truth)) for row in run.scores) for run in runs}) == 1
    left_out = [unscored(run) for run in runs]
    best = []
    for score, organ in columns:
        known = [value for run in runs if (value := mean_score(run, score, organ)) is not None]
        lower = score in LOWER_IS_BETTER
        comparable = alike and not (lower and any(left_out))
        differ = len(set(known)) > 1  # equal values, as two organs nobody found, have no best
        best.append((min if lower else max)(known) if comparable and differ else None)
    rows = []
    for run, num in zip(runs, left_out):
        cells = [_cell(run, *column, top) for column, top in zip(columns, best)]
        rows.append({"run": run, "init": os.path.basename(run.record.init), "cells": cells, "unscored": num})
    heads = [*SCORES.values(), *(organ.replace("_", " ") for organ in organs)]
    return {"heads": heads, "rows": rows, "unscored": any(left_out), "sentences": sentences(runs, alike)}


def unscored(run: Run) -> int:
    """Organs of scans that have no HD, for they were missed or invented."""
    return sum(organ["num_missed"] + organ["num_invented"] for organ in run.summary["organs"].values())


def _cell(run: Run, score: str, organ: str | None, best: float | None) -> dict[str, Any]:
    spec, value = ".1f" if score in LOWER_IS_BETTER else ".3f", mean_score(run, score, organ)
    error = None if organ else standard_error(run.scores, score)
    return {
        "text": number(value, spec),
        "error": "" if error is None else number(error, spec),
        "best": value is not None and value == best,
    }


def evaluated_organs(runs: list[Run]) -> list[str]:
    """Organs that any of the runs was scored on."""
    return list(dict.fromkeys(row["organ"] for run in runs for row in run.scores))


def mean_score(run: Run, score: str, organ: str | None = None) -> float | None:
    """The evaluation's mean of a score, of one organ or over all."""
    return run.summary["organs"].get(organ, {}).get(score) if organ else run.summary[score]


def number(value: float | None, spec: str) -> str:
    """A number as text; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:{spec}}"


def scan_means(scores: list[dict], key: str) -> dict[str, float]:
    """Per scan the mean over its organs that have the score."""
    values: dict[str, list[float]] = {}
    for row in scores:
        if not math.isnan(row[key]):
            values.setdefault(row["scan_id"], []).append(row[key])
    return {scan_id: sum(of_scan) / len(of_scan) for scan_id, of_scan in values.items()}


def standard_error(scores: list[dict], key: str, organ: str | None = None) -> float | None:
    """Standard error of a mean score over scans; none for fewer than two scans."""
    means = list(scan_means([row for row in scores if organ in (None, row["organ"])], key).values())
    return float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None


class Difference(NamedTuple):
    """Paired difference of a mean score over the scans that two runs share, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_scans: int


def paired_difference(first: list[dict], second: list[dict], score: str = "dice") -> Difference | None:
    """Mean score of `first` minus that of `second` as `metrics.compare` has it; none with fewer than two common
    scans."""
    said = metrics.paired_difference(first, second, score)
    return said and Difference(said[0], *said[1], said[2])


def sentences(runs: list[Run], alike: bool) -> list[str]:
    """The best run by mean Dice against each other one, in plain words, after what spoils the comparison."""
    differ = "The runs were scored on different scans, organs or labels: the sentences below use the common ones."
    lines = [] if alike else [differ]
    if len({run.summary["index"] for run in runs}) > 1:
        lines.append("The runs were scored on different stores: scans are matched by name.")
    for run in runs:
        seen = set(run.record.scans.train) & {row["scan_id"] for row in run.scores}
        if seen and run.summary["index"] == run.record.index:
            lines.append(f"{run.name} was trained on {len(seen)} of the scans that it is scored on.")
    lines += gathered((run.name, note) for run in runs for note in run.summary.get("notes", []))
    best, *others = sorted(runs, key=lambda run: -(run.summary["dice"] or 0.0))
    for other in others:
        if differs := metrics.other_truth(best.scores, other.scores):
            what = f"{best.name} and {other.name} were scored on different labels of {differs[1]} in scan {differs[0]}"
            lines.append(f"{what}: no statement about their difference.")
            continue
        gap = paired_difference(best.scores, other.scores)
        if gap is None:
            lines.append(f"{best.name} and {other.name} share fewer than two scans: no statement about noise.")
            continue
        worth = "within" if gap.low <= 0 <= gap.high else "more than"
        lines.append(
            f"{best.name} against {other.name}: {gap.mean:+.3f} Dice, {worth} the noise of {gap.num_scans} scans "
            f"(95 % interval {gap.low:+.3f} to {gap.high:+.3f})."
        )
    return lines


# -- probes and health ------------------------------------------------------------------------------------------------


def gathered(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes of several runs, (name, note), a line for each note, after the names of all that it is of."""
    by_note: dict[str, list[str]] = {}
    for name, note in notes:
        by_note.setdefault(note, []).append(name)
    return [f"{', '.join(dict.fromkeys(names))}: {note}." for note, names in by_note.items()]


JUDGED = {  # judge -> head of its column, and how its figures are written
    "voxels": ("balanced accuracy", ".3f"),
    "decoder": ("decoder Dice", ".3f"),
    "matching": ("matching, mm", ".1f"),
}


def counted(result: dict[str, Any]) -> dict[str, Any]:
    """Judge -> score of the reading that counts, which is a probe's first; {} where there is none."""
    return next(iter(result.get("readings", {}).values()), {})


def probe_values(result: dict[str, Any]) -> dict[str, float]:
    """Judge -> what it says of the reading that counts."""
    return {judge: score["value"] for judge, score in counted(result).items()}


def verdict(run: Run) -> str:
    """Whether a pre-training run's features collapsed, and by which figure."""
    return f"{run.name}: {newest_verdict(run.rows)}."


def collapsed(run: Run) -> dict[str, float] | None:
    """The last row with health figures, where these say that the features collapsed."""
    last = _newest_health(run)
    return last if last and collapse(last) else None


def unfinished(run: Run) -> str:
    """Where a training stands that has steps left; "" where it ended, or collapsed."""
    if not run.record.steps_left(run.rows) or collapsed(run):
        return ""
    return f"{run.name} stands at step {run.rows[-1]['step']:,.0f} of {run.record.num_steps:,}"


def _newest_health(run: Run) -> dict[str, float] | None:
    return next((row for row in reversed(run.rows) if "health/collapsed" in row), None)


def rises(runs: list[Run]) -> str:
    """Why the losses of pre-training runs rose, a sentence for each that did."""
    kinds = [(run.record.method, run.config.get("loss", {}).get("kind", "consistency")) for run in runs]
    reasons = [(run.name, rise(run.rows, *kind)) for run, kind in zip(runs, kinds, strict=True)]
    return " ".join(f"{name}: {text}." for name, text in reasons if text)


HEALTH = ("feature_std", "effective_rank", "cosine_aligned", "cosine_shuffled", "retrieval")


def health(runs: list[Run]) -> list[dict[str, Any]]:
    """The last health figures of each pre-training run as text: of what the loss compares, then of the map."""
    rows = []
    for run in runs:
        if last := _newest_health(run):
            compared = "" if "health/feature_std" in last else "view_"
            parts = [[last.get(f"health/{part}{key}") for key in HEALTH] for part in (compared, "encoder_")]
            figures = [number(value, ".2f") for part in parts for value in part]
            loss, clamped = last.get("train/loss"), last.get("align/clamped_share")
            method, share = run.record.method, number(clamped, ".0%")
            facts = {"name": run.name, "number": run.number, "method": method, "step": f"{last['step']:.0f}"}
            rows.append(facts | {"loss": number(loss, ".3f"), "figures": figures, "clamped": share})
    return rows


def alignment(facts: dict[str, Any]) -> dict[str, Any]:
    """check_align.json as a table: one row per convention and kind of bins, D, H, W in scan voxels and mm."""
    rows = []
    for name, residuals in facts["conventions"].items():
        for key, text in (
            ("mean", "mean, all bins"),
            ("max", "largest, all bins"),
            ("max_not_clamped", "largest, bins not clamped"),
        ):
            cells = [
                f"{number(voxels, '.2f')} ({number(mm, '.1f')} mm)"
                for voxels, mm in zip(residuals["voxels"][key], residuals["mm"][key], strict=True)
            ]
            rows.append((name, text, cells))
        rows.append((name, "allowed, bins not clamped", [f"{allowed:.2f}" for allowed in residuals["allowed_voxels"]]))
        rows.append((name, "share of clamped bins", [f"{share:.0%}" for share in residuals["clamped_share"]]))
    verdict = "as small as this geometry allows" if facts["passed"] else "LARGER than this geometry allows"
    size, stride = "x".join(map(str, facts["view_size"])), "/".join(map(str, facts["output_stride"]))
    of_what = f"{facts['num_pairs']} pairs of {facts['scans']}, views {size}, output stride {stride}"
    others = [f" Stride {'/'.join(map(str, other))} was not looked at." for other in facts.get("not_looked_at", ())]
    return {"rows": rows, "verdict": f"The residual is {verdict} ({of_what}).{''.join(others)}"}
