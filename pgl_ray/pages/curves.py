"""The curves and bars of runs, each with what is good: the report prints them."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pgl_ray.outlook import MAX_CLAMPED
from pgl_ray.pages import figures, plots, run_folders, tables
from pgl_ray.pages.plots import Mark
from pgl_ray.pages.run_folders import Run
from pgl_ray.train.health import COLLAPSED, directions

LOWER, HIGHER, NEITHER = "lower is better", "higher is better", ""
RECALL = "probe/recall_"  # of a class, in metrics of a run that is probed
UNRELATED = 4.0  # squared distance of unrelated unit vectors, both directions summed


def color(run: Run) -> str:
    """A run's colour in every figure and table."""
    return plots.RUN_COLORS[run.number % len(plots.RUN_COLORS)]


def _series(run: Run, points: Iterable[tuple[float, float]], dashed: bool = False) -> plots.Series:
    x, y = zip(*points) if (points := list(points)) else ((), ())
    return plots.Series(x, y, color(run), dashed)


def _metric(run: Run, key: str, dashed: bool = False) -> plots.Series:
    return _series(run, ((row["step"], row[key]) for row in run.rows if key in row), dashed)


def _plot(
    title: str,
    good: str,
    lines: list[plots.Series],
    *bounds: float | None,
    log: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """A data URI, or "" where no run has the metric."""
    drawn = [line for line in lines if line.x]
    title = f"{title}, {good}" if good else title
    return figures.to_svg(plots.curves(drawn, title, bounds, log, marks)) if drawn else ""


def _mean(runs: list[Run], key: str, text: str) -> list[Mark]:
    """The mean of what all rows say, such as chance; [] where none does."""
    values = [row[key] for run in runs for row in run.rows if key in row]
    return [Mark(float(np.mean(values)), text)] if values else []


def pretrain_curves(runs: list[Run]) -> dict[str, str]:
    """Data URIs by the name that the template knows the figure by. What two figures share has one scale in both."""

    def metrics(key: str, of: list[Run] = runs) -> list[plots.Series]:
        return [_metric(one, key) for one in of]

    comparing = [one for one in runs if one.record.method != "genesis"]
    restoring = [one for one in runs if one.record.method == "genesis"]
    weights = metrics("weight/encoder_norm") + [_metric(one, "weight/heads_norm", dashed=True) for one in runs]
    squared = [Mark(UNRELATED, "unrelated")] if {_loss_kind(one) for one in comparing} == {"consistency"} else []
    spread, many = [_series(one, _spread(one)) for one in runs], [Mark(MAX_CLAMPED, "many")]
    return {
        "loss": _plot("loss", LOWER, metrics("train/loss", comparing), 0, None, marks=squared),
        "restoration": _plot("restoration loss", LOWER, metrics("train/loss", restoring), 0, None),
        "lr": _plot("learning rate", NEITHER, metrics("train/lr"), 0, None),
        "decay": _plot("EMA decay", NEITHER, metrics("ema/decay", comparing), None, None),
        "grad": _plot("gradient norm", NEITHER, metrics("train/grad_norm"), 0, None),
        "weights": _plot("weight norms", NEITHER, weights, 0, None),
        "directions": _plot("directions", "not below the line", spread, 0, None, marks=[Mark(COLLAPSED, "collapse")]),
        **_health_curves(runs),
        "probe": _plot("voxel probe", HIGHER, metrics("probe/balanced_accuracy"), 0, 1, marks=_guess(runs)),
        "clamped": _plot("share of clamped bins", LOWER, metrics("align/clamped_share"), 0, 1, marks=many),
        "speed": _plot("view pairs per second", HIGHER, metrics("train/pairs_per_s"), 0, None),
        "wait": _wait_curves(runs),
    }


def _health_curves(runs: list[Run]) -> dict[str, str]:
    """As `pretrain_curves`: the health figures of what the loss compares, and of the encoder's map."""

    def reach(groups: tuple[list[plots.Series], ...]) -> tuple[float, float]:
        known = [y for group in groups for line in group for y in line.y if y > 0] or [1.0]
        return min(known), max(known)

    std, rank, hits = (_compared_and_map(runs, key) for key in ("feature_std", "effective_rank", "retrieval"))
    cosine = _compared_and_map(runs, "cosine_aligned", "cosine_shuffled")
    lowest = min([0.0, *(y for group in cosine for line in group for y in line.y)])
    most, (least, _) = 1.1 * reach(rank)[1], reach(hits)
    chances = [_mean(runs, f"health/{part}retrieval_chance", "by the scan alone") for part in ("", "encoder_")]
    least = 0.7 * min([least, *(mark.y for marks in chances for mark in marks if mark.y > 0)])
    even, one, unrelated = [Mark(1, "even")], [Mark(1, "collapse")], [Mark(0, "unrelated")]
    drawn = {}
    for k, (name, title, both) in enumerate((("", "", "query and key"), ("encoder_", "encoder: ", "both views"))):
        gap = f"{title}cosine of {both}", "a wide gap is good"
        drawn |= {
            f"{name}std": _plot(f"{title}feature_std", HIGHER, std[k], 0, 1.15, marks=even),
            f"{name}rank": _plot(f"{title}effective rank", "not 1", rank[k], 0, most, marks=one),
            f"{name}cosine": _plot(*gap, cosine[k], lowest, 1, marks=unrelated),
            f"{name}retrieval": _plot(f"{title}retrieval@1", HIGHER, hits[k], least, 1.2, log=True, marks=chances[k]),
        }
    return drawn


def _compared_and_map(runs: list[Run], *keys: str) -> tuple[list[plots.Series], list[plots.Series]]:
    """Lines of what the loss compares, places or BYOL's views, and of the encoder's map; later keys dashed."""

    def lines(run: Run, part: str) -> list[plots.Series]:
        return [_metric(run, f"health/{part}{key}", dashed=number > 0) for number, key in enumerate(keys)]

    def compared(run: Run) -> str:
        return next((p for p in ("", "view_") if any(f"health/{p}{keys[0]}" in row for row in run.rows)), "")

    return (
        [line for run in runs for line in lines(run, compared(run))],
        [line for run in runs for line in lines(run, "encoder_")],
    )


def _wait_curves(runs: list[Run]) -> str:
    shares = [_series(one, run_folders.waits(one)) for one in runs]
    return _plot("share of time spent waiting", LOWER, shares, 0, 1)


def _loss_kind(run: Run) -> str:
    """Which of the losses that compare it is."""
    loss = run.config.get("loss", {})
    if run.record.method == "byol":
        return "consistency"
    beyond = bool(run.config.get("align", {}).get("more_strides") or loss.get("displacement"))
    return "places" if beyond and loss["kind"] == "consistency" else loss.get("kind", "consistency")


def loss_words(runs: list[Run]) -> str:
    """What the losses of these runs mean."""
    words = {
        "consistency": "Mean squared distance of what is compared, both directions summed: 8 is opposite, 4 unrelated, "
        "0 identical. A fall to 0 within a few steps is collapse, not success.",
        "places": "Mean squared distance of what is compared, the mean of both directions and of all maps (4 is "
        "opposite, 2 unrelated, 0 identical), with the displacement's error where loss.displacement asks for it.",
        "contrast": "How hard the right place is to tell from others of its pair (cross-entropy, with the "
        "displacement's error where loss.displacement asks for it); the first value is about chance.",
    }
    kinds = {_loss_kind(r) for r in runs if r.record.method != "genesis"}
    return " ".join(text for kind, text in words.items() if kind in kinds)


def _spread(run: Run) -> Iterable[tuple[float, float]]:
    """From what older runs recorded, too."""
    return ((row["step"], value) for row in run.rows if (value := directions(row)) is not None)


def _guess(runs: list[Run]) -> list[Mark]:
    """Balanced accuracy of guesses, where all runs were probed with as many classes."""
    nums = {sum(key.startswith(RECALL) for key in row) for r in runs for row in r.rows} - {0}
    return [Mark(1 / nums.pop(), "chance")] if len(nums) == 1 else []


def finetune_curves(runs: list[Run]) -> dict[str, str]:
    """As `pretrain_curves`."""
    return {
        "loss": _plot("training loss", LOWER, [_metric(r, "train/loss") for r in runs], None, None),
        "dice": _plot("validation Dice", f"{HIGHER}, 1 is all", [_metric(r, "val/dice") for r in runs], 0, None),
        "wait": _wait_curves(runs),
    }


def organ_bars(runs: list[Run]) -> str:
    """Dice per organ with the standard error over scans, as a data URI."""
    organs = tables.evaluated_organs(runs)

    def heights(value: Callable[[str], float | None]) -> list[float]:
        return [math.nan if (score := value(organ)) is None else score for organ in organs]

    bars = []
    for r in runs:
        dice = heights(lambda organ, r=r: tables.mean_score(r, "dice", organ))
        bars.append((color(r), dice, heights(lambda organ, r=r: tables.standard_error(r.scores, "dice", organ))))
    return figures.to_svg(plots.organ_bars(organs, bars))
