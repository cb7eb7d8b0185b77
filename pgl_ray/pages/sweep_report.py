"""The tables and figures of a sweep's page; report.py prints them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from pgl_ray import shipped
from pgl_ray.model.metrics import reach
from pgl_ray.pages import arms, figures, plots, sweep_answers, sweep_plots, tables
from pgl_ray.pages.pages import plural
from pgl_ray.pages.run_folders import Run, evaluated
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import seedless, short
from pgl_ray.sweep.sweeps import Trial
from pgl_ray.train.records import read_json

SCORES = {"dice": ("Dice, %", 100.0), "iou": ("IoU, %", 100.0), "hd_mm": ("HD, mm", 1.0)}
MIN_TRIALS = 8  # for the importance of settings
Cells = dict[str, dict[str, Run]]  # arm -> seeds of the space in short -> evaluated run


def is_sweep(folders: list[str]) -> bool:
    """Whether the report is asked of a sweep."""
    return len(folders) == 1 and Path(folders[0], sweeps.SWEEP).is_file()


def content(folder: Path, overlays: Callable[[list[Run]], Any]) -> dict[str, Any]:
    """What sweep.html prints.

    Args:
        folder: of the sweep.
        overlays: draws the labels of several evaluated runs.
    """
    config = read_json(folder / sweeps.SWEEP)
    trials, (arms_out, trials_out) = sweeps.present(folder, config), sweeps.left_out(folder, config)
    scored = [trial for trial in trials if trial.score is not None and trial.state in sweeps.ENDED]
    done = sweeps.judged(trials)
    best = done[0] if done else None
    judges = [judge for judge in tables.JUDGED if any(judge in sweeps.probed(trial.folder) for trial in trials)]
    drawn = _figures(config, scored) if len(scored) > 1 else {"parallel": "", "settings": [], "curves": ""}
    arms_grid = grid(config, trials, overlays) if config["arms"] else None
    arms_judged = arms.judged(config, trials) if config["arms"] else []
    return {
        "answers": sweep_answers.of_sweep(config, trials, arms_grid, arms_judged),
        "config": config,
        "judge": config["judge"],
        "lower": sweeps.merit(config["judge"], 1.0) < 0,
        "num": sweeps.num_by_state(trials),
        "arms_out": arms_out,
        "trials_out": trials_out,
        "best": best and {"title": best.title, "score": best.score, "name": best.name},
        "num_alike": sum(seedless(trial.values) == seedless(best.values) for trial in done) if best else 0,
        "judges": [tables.JUDGED[judge][0] for judge in judges],
        "trials": [_row(trial, judges) for trial in sorted(trials, key=lambda t: (t.state != "done", -t.merit))],
        "notes_of_scans": tables.gathered(_notes(trials)),
        "totals": _totals(trials),
        **drawn,
        "importance": importance(config, done),
        "min_trials": MIN_TRIALS,
        "grid": arms_grid,
        "judged": arms_judged,
    }


# -- trials -----------------------------------------------------------------------------------------------------------


def _notes(trials: list[Trial]) -> list[tuple[str, str]]:
    """What probes and evaluations say of their scans, after the arm or the settings of each trial."""
    named_notes = []
    for trial in trials:
        run = trial.run("finetune")
        paths = [trial.folder / "probe.json", *([run / "evaluation" / "summary.json"] if run else [])]
        notes = [note for path in paths if path.is_file() for note in read_json(path).get("notes", [])]
        named_notes += [(str(trial.values.get("arm", trial.title)), note) for note in notes]
    return named_notes


def _row(trial: Trial, judges: list[str]) -> dict[str, Any]:
    cost, evaluation, values = sweeps.cost(trial), sweeps.evaluation(trial), sweeps.probed(trial.folder)
    return {
        "name": trial.name,
        "title": trial.title,
        "state": trial.ending,
        "first": tables.number(_first(trial), ".4f"),
        "score": tables.number(trial.score, ".4f"),
        "judged": [tables.number(values.get(judge), tables.JUDGED[judge][1]) for judge in judges],
        "test": tables.number(evaluation.get("dice"), ".4f"),
        "pairs": f"{cost['pairs']:,}",
        "patches": f"{cost['patches']:,}",
        "pretrain_s": f"{cost['pretrain_s']:.0f}",
        "finetune_s": f"{cost['finetune_s']:.0f}",
        "gpu_hours": f"{cost['gpu_hours']:.2f}",
        "pretrain": Path(trial.pretrain).name if trial.pretrain else "–",
        "error": trial.error or "",
    }


def _first(trial: Trial) -> float | None:
    """What the first judge said last, in pre-training."""
    scores = [value for progress, value in trial.reports if progress <= trial.judged_from]
    return scores[-1] if scores else None


def _totals(trials: list[Trial]) -> str:
    """What the sweep cost, each shared pre-training once."""
    unique = {trial.pretrain or trial.name: sweeps.cost(trial) for trial in trials}
    pairs, pretrain_s = (sum(cost[key] for cost in unique.values()) for key in ("pairs", "pretrain_s"))
    every = [sweeps.cost(trial) for trial in trials]
    patches, finetune_s = (sum(cost[key] for cost in every) for key in ("patches", "finetune_s"))
    gpu_s = sum(cost["pretrain_gpu_s"] for cost in unique.values()) + sum(cost["finetune_gpu_s"] for cost in every)
    num = len({trial.pretrain for trial in trials if trial.pretrain})
    return (
        f"{plural(num, 'pre-training')} with {pairs:,} view pairs in {pretrain_s / 60:.1f} min and {len(trials)} "
        f"trials with {patches:,} patches in {finetune_s / 60:.1f} min: {gpu_s / 3600:.2f} GPU-hours."
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def _axes(config: dict[str, Any], trials: list[Trial]) -> list[sweep_plots.Axis]:
    """The settings that differ between trials; lists, texts and arms are categories, in the order of the space."""
    axes = []
    for key in (["arm"] if config["arms"] else []) + list(config["space"]):
        values = [trial.values.get(key) for trial in trials]
        if len({str(value) for value in values}) < 2 or any(value is None for value in values):
            continue
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        verb, args = next(iter(config["space"].get(key, {"choice": list(config["arms"])}).items()))
        name = "arm" if key == "arm" else short(key)
        if numeric and verb not in ("choice", "grid_search"):
            axes.append(sweep_plots.Axis(name, values, None, verb == "loguniform"))
            continue
        order = [str(arg) for arg in args] + sorted({str(value) for value in values} - {str(arg) for arg in args})
        labels = {str(value): sweeps.number(value) for value in values}
        order = [text for text in order if text in labels]
        places = [float(order.index(str(value))) for value in values]
        axes.append(sweep_plots.Axis(name, places, [labels[str(value)] for value in values]))
    return axes


def _figures(config: dict[str, Any], trials: list[Trial]) -> dict[str, Any]:
    axes, judge, merits = _axes(config, trials), config["judge"], [trial.merit for trial in trials]
    scores, ended = [trial.score for trial in trials], [trial.state == "done" for trial in trials]
    good = f"{judge}, {'lower' if sweeps.merit(judge, 1.0) < 0 else 'higher'} is better"
    parallel = figures.to_svg(sweep_plots.parallel_coordinates(axes, scores, ended, judge, merits)) if axes else ""
    lines = []
    for trial in trials:
        reports = [point for point in trial.reports if point[0] > trial.judged_from]
        points = [*reports, *([(_end(config), trial.score)] if trial.state == "done" else [])]
        lines.append((*([list(part) for part in zip(*points)] or [[], []]), trial.state == "done"))
    middles = [means(axis, scores, ended) for axis in axes]
    ends = [mean + sign * (half or 0.0) for groups in middles for _, mean, half in groups for sign in (-1, 1)]
    low, high = min(scores + ends), max(scores + ends)
    limits = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)  # one scale for all settings
    plots = [
        figures.to_svg(sweep_plots.setting_scores(axis, scores, ended, groups, good, limits))
        for axis, groups in zip(axes, middles)
    ]
    return {
        "parallel": parallel,
        "settings": plots,
        "curves": figures.to_svg(sweep_plots.trial_curves(lines, merits, good)),
    }


def _end(config: dict[str, Any]) -> int:
    return 200 if config["first_judge"] and config["base_finetune"] is not None else 100


def means(axis: sweep_plots.Axis, scores: list[float], ended: list[bool]) -> list[tuple[float, float, float | None]]:
    """Mean score at each category, or in each third of the numbers, over trials that ended.

    Returns:
        (place, mean, half of Student's 95 % interval or none for a single trial).
    """
    pairs = sorted((x, score) for x, score, end in zip(axis.values, scores, ended) if end)
    if axis.labels:
        groups = [[pair for pair in pairs if pair[0] == value] for value in sorted(set(axis.values))]
    else:
        groups = [list(map(tuple, part)) for part in np.array_split(pairs, 3)] if len(pairs) >= 6 else []
    middles = []
    for group in filter(None, groups):
        group_scores = [score for _, score in group]
        middles.append((float(np.median([x for x, _ in group])), float(np.mean(group_scores)), reach(group_scores)))
    return middles


def importance(config: dict[str, Any], trials: list[Trial]) -> list[tuple[str, str]]:
    """Share of the scores' variance that each setting explains by itself, less what chance explains; none where the
    trials are too few. Categories by their means (adjusted eta squared), numbers by their ranks (adjusted Spearman)."""
    axes, scores = _axes(config, trials), np.array([trial.score for trial in trials])
    if len(trials) < max(MIN_TRIALS, 4 * len(axes)) or not np.var(scores) > 0:
        return []
    shares = []
    for axis in axes:
        places, num = np.array(axis.values), len(scores)
        if axis.labels:
            groups = [scores[places == value] for value in np.unique(places)]
            explained = sum(len(group) * (group.mean() - scores.mean()) ** 2 for group in groups)
            share, freedom = explained / ((scores - scores.mean()) ** 2).sum(), len(groups) - 1
        else:
            share, freedom = stats.spearmanr(places, scores).statistic ** 2, 1
        if num > freedom + 1:
            shares.append((axis.name, 1 - (1 - share) * (num - 1) / (num - 1 - freedom)))
    return [(name, f"{max(0.0, share):.0%}") for name, share in sorted(shares, key=lambda row: -row[1])]


# -- grids: the paper's tables ----------------------------------------------------------------------------------------


def grid(config: dict[str, Any], trials: list[Trial], overlays: Callable) -> dict[str, Any] | None:
    """Tables of evaluated arms per point of the space, seeds taken together, beside the published figures; the arms'
    Dice over the number of labelled scans; labels of one cell per arm. None without an evaluated trial."""
    cells: dict[str, Cells] = {}
    for trial in trials:
        run = trial.run("finetune")
        if trial.state == "done" and run and (run / "evaluation" / "summary.json").is_file() and "arm" in trial.values:
            point = {key: v for key, v in trial.values.items() if key != "arm" and short(key) != "seed"}
            of_point = cells.setdefault(sweeps.settings(point) or "all trials", {})
            seed, arm = sweeps.seeds(trial.values, "pretrain", "finetune"), trial.values["arm"]
            of_point.setdefault(arm, {})[seed] = evaluated(run, arm)
    if not cells:
        return None
    names = list(config["arms"])
    colors = {arm: plots.RUN_COLORS[k % len(plots.RUN_COLORS)] for k, arm in enumerate(names)}
    cells = {point: {arm: by_arm[arm] for arm in names if arm in by_arm} for point, by_arm in cells.items()}
    points, published = sorted(cells, key=lambda point: _num_scans(_runs(cells[point])[0])), _published(config)
    blocks = [_block(point, cells[point], published if _of_all(cells[point]) else {}, colors) for point in points]
    runs = _one_seed(cells[points[-1]])
    try:
        labels = overlays(runs)
    except Exception as error:  # store moved, scan gone, predictions not kept: the numbers stand
        labels = {"missing": f"overlays left out, {type(error).__name__}: {' '.join(str(error).split())}"}
    return {
        "colors": colors,
        "blocks": blocks,
        "published": bool(published) and any(_of_all(cells[point]) for point in points),
        "over": _over_labels(trials, colors),
        "overlays": labels,
    }


def _runs(cells: Cells) -> list[Run]:
    return [run for by_seed in cells.values() for run in by_seed.values()]


def _num_scans(run: Run) -> int:
    """Labelled scans that it had, validation included."""
    return len(run.record.scans.train) + len(run.record.scans.val)


def _one_seed(cells: Cells) -> list[Run]:
    """One run per arm, of the first seed that most arms have; an arm without it is left out."""
    seeds = [seed for by_seed in cells.values() for seed in by_seed]
    chosen = max(seeds, key=seeds.count)
    return [by_seed[chosen] for by_seed in cells.values() if chosen in by_seed]


def _of_all(cells: Cells) -> bool:
    """Whether a point's trials had all labelled scans, as those that the paper's tables are of."""
    return all(run.config["num_scans"] == 1.0 for run in _runs(cells))


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """score -> arm -> (number of the table, organ -> value); {} where nothing is asked for."""
    if not config.get("published"):
        return {}
    known = yaml.safe_load(shipped.path_of("conf/published.yaml").read_text())[config["published"]]
    by_score: dict[str, Any] = {}
    for table, scores in known["tables"].items():
        for score, rows in scores.items():
            for arm, values in rows.items():
                by_organ = dict(zip(known["columns"], values, strict=True))
                by_score.setdefault(score, {}).setdefault(arm, []).append((table, by_organ))
    return by_score


def _block(point: str, cells: Cells, published: dict[str, Any], colors: dict[str, str]) -> dict:
    """The tables of one point of the space."""
    organs = list(dict.fromkeys(row["organ"] for run in _runs(cells) for row in run.scores))
    columns = [None, *organs] if len(organs) > 1 else [None]
    score_tables = []
    for score, (head, factor) in SCORES.items():
        rows, distance = [], score.startswith("hd")
        for arm, by_seed in cells.items():
            runs = list(by_seed.values())
            values = [[tables.mean_score(run, score, organ) for run in runs] for organ in columns]
            texts = [arms.cell([v * factor for v in column if v is not None]) for column in values]
            texts += [arms.cell([tables.unscored(run) for run in runs], 1)] if distance else []
            rows.append({"name": arm, "color": colors[arm], "seeds": len(runs), "cells": texts, "paper": False})
            for table, by_organ in published.get(score, {}).get(arm, []):
                texts = [tables.number(by_organ.get(organ or "mean"), ".2f") for organ in columns] + [""] * distance
                rows.append({"name": f"paper, Table {table}", "seeds": "", "cells": texts, "paper": True})
        heads = [(organ or "mean").replace("_", " ") for organ in columns] + ["left out"] * distance
        score_tables.append({"head": head, "heads": heads, "rows": rows})
    bars = []
    for arm, by_seed in cells.items():
        dice = [[tables.mean_score(run, "dice", organ) for run in by_seed.values()] for organ in organs]
        dice = [[value for value in column if value is not None] for column in dice]
        heights = [float(np.mean(column)) if column else math.nan for column in dice]
        errors = [float(np.std(column, ddof=1)) if len(column) > 1 else math.nan for column in dice]
        bars.append((colors[arm], heights, errors))
    return {
        "point": point,
        "first": next(iter(cells)),
        "tables": score_tables,
        "sentences": _differences(cells),
        "gains": {arm: arms.dice_gain(_against_first(cells, arm)) for arm in list(cells)[1:]},
        "bars": figures.to_svg(plots.organ_bars(organs, bars)),
    }


def _differences(cells: Cells) -> list[str]:
    """Each arm against the first one, in words."""
    lines, (first, *others) = [], cells
    for arm in others:
        lines += arms.difference(f"{arm} against {first}", *arms.scored_by_both(_against_first(cells, arm)), arms.DICE)
    return lines


def _against_first(cells: Cells, arm: str) -> list[tuple[Run, Run]]:
    """An arm's runs beside those of the first one, in pairs with the same values of all seeds."""
    first = next(iter(cells.values()))
    return [(run, first[seed]) for seed, run in cells[arm].items() if seed in first]


def _over_labels(trials: list[Trial], colors: dict[str, str]) -> str:
    """Figure 5: mean Dice per arm over the number of labelled scans; "" for one number, or for several settings."""
    rest = [{k: v for k, v in one.values.items() if k != "arm" and short(k) != "num_scans"} for one in trials]
    dice_by_arm: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        dice, run = sweeps.evaluation(trial).get("dice"), trial.run("finetune")
        if trial.state == "done" and dice is not None and "arm" in trial.values:
            num = _num_scans(evaluated(run, ""))
            dice_by_arm.setdefault(trial.values["arm"], {}).setdefault(num, []).append(100 * dice)
    if len({num for points in dice_by_arm.values() for num in points}) < 2 or len(set(map(seedless, rest))) > 1:
        return ""
    lines = []
    for arm in (arm for arm in colors if arm in dice_by_arm):
        points = sorted(dice_by_arm[arm].items())
        spread = [float(np.std(v, ddof=1)) if len(v) > 1 else math.nan for _, v in points]
        lines.append((arm, colors[arm], [num for num, _ in points], [float(np.mean(v)) for _, v in points], spread))
    return figures.to_svg(sweep_plots.arms_over_labels(lines))
