"""Dice, IoU, HD and HD95 of one scan (paper, Sec. 5.1), and their averages.

An organ that is empty in both masks has no score (NaN) and counts nowhere. One that is empty in one of them has Dice
and IoU 0 and no surface distance: HD and HD95 are NaN, left out of the means, and the summary says how often
(`num_missed`, `num_invented`), for the paper does not say what a missed organ costs.

Intervals are percentile bootstraps over scans (Efron and Tibshirani 1993), wider where these are few (`for_few`): all
organs of a scan are drawn together, for they are not independent, and the mean over organs is formed anew in each draw.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import ndimage, stats
from scipy.spatial import KDTree

SCORES = ("dice", "iou", "hd_mm", "hd95_mm")
MOST = {"dice": 1.0, "iou": 1.0}  # that a score can be; none is below 0
NUM_DRAWS = 5000  # of a bootstrap


def organ_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    organs: dict[str, int],
    axes_mm: np.ndarray,
    task: Literal["multiclass", "binary"],
    distances: bool = True,
) -> dict[str, dict[str, float]]:
    """Scores of one scan, organ by organ.

    Args:
        prediction, target: class indices [D, H, W], 0 = background.
        organs: name -> class index of the organs to score.
        axes_mm: [3, 3], a voxel's step along D, H and W in mm, as columns: the upper left of its affine.
        task: with "binary" an organ's mask holds the larger class indices too, as organ includes tumour.
        distances: whether to compute HD and HD95, the slow part; NaN otherwise.

    Returns:
        Organ -> "dice", "iou", "hd_mm", "hd95_mm", and the masks' sizes "predicted_voxels" and "target_voxels".
    """
    compare = np.greater_equal if task == "binary" else np.equal
    return {
        organ: mask_metrics(compare(prediction, index), compare(target, index), axes_mm, distances)
        for organ, index in organs.items()
    }


def mask_metrics(
    prediction: np.ndarray, target: np.ndarray, axes_mm: np.ndarray, distances: bool = True
) -> dict[str, float]:
    """Scores of one pair of masks, bool [D, H, W]; see `organ_metrics`.

    HD is the largest, HD95 the larger direction's 95th percentile of the distances between the centres of surface
    voxels; a voxel is surface when one of its six neighbours lies outside the mask or the scan.
    """
    either = prediction | target
    predicted, wanted, union = (int(np.count_nonzero(mask)) for mask in (prediction, target, either))
    scores = dict.fromkeys(SCORES, math.nan) | {"predicted_voxels": predicted, "target_voxels": wanted}
    if not union:
        return scores
    common = predicted + wanted - union
    scores |= {"dice": 2 * common / (predicted + wanted), "iou": common / union}
    if distances and predicted and wanted:
        box = _bounding_box(either)  # the surfaces lie inside: the rest of the scan only costs time
        predicted_mm, target_mm = (_surface(mask[box]) @ axes_mm.T for mask in (prediction, target))
        there, back = KDTree(target_mm).query(predicted_mm)[0], KDTree(predicted_mm).query(target_mm)[0]
        scores["hd_mm"] = float(max(there.max(), back.max()))
        scores["hd95_mm"] = float(max(np.percentile(there, 95), np.percentile(back, 95)))
    return scores


def _surface(mask: np.ndarray) -> np.ndarray:
    """Indices [n, 3] of the surface voxels."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def summarise(rows: list[dict]) -> dict:
    """Means over scans of each organ, and over organs of these means, as the paper's tables.

    Args:
        rows: one per scan and organ: "organ" and what `organ_metrics` gives for it.

    Returns:
        The four scores over all organs, and under "organs" per organ its four scores, num_scans (with a score),
        num_missed (in the scan but not predicted) and num_invented (predicted but not in the scan). None = no value.
    """
    organs = {}
    for organ in dict.fromkeys(row["organ"] for row in rows):
        of_organ = [row for row in rows if row["organ"] == organ]
        organs[organ] = {score: _mean([row[score] for row in of_organ]) for score in SCORES} | {
            "num_scans": sum(not math.isnan(row["dice"]) for row in of_organ),
            "num_missed": sum(row["target_voxels"] > 0 and row["predicted_voxels"] == 0 for row in of_organ),
            "num_invented": sum(row["target_voxels"] == 0 and row["predicted_voxels"] > 0 for row in of_organ),
        }
    return {score: mean_of_organs(rows, score) for score in SCORES} | {"organs": organs}


def mean_of_organs(rows: list[dict], score: str) -> float | None:
    """A score's mean over organs of its means over scans, as `summarise` gives it; none where no row has it."""
    by_organ: dict[str, list[float]] = {}
    for row in rows:
        by_organ.setdefault(row["organ"], []).append(row[score])
    return _mean([mean for values in by_organ.values() if (mean := _mean(values)) is not None])


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


# -- intervals and tests ----------------------------------------------------------------------------------------------


def intervals(rows: list[dict], seed: int = 0) -> dict:
    """95 % intervals of the means that `summarise` gives, over the choice of scans.

    Args:
        rows: as for `summarise`, with "scan_id".
        seed: of the draws.

    Returns:
        Score -> [low, high] of the mean over organs, and under "organs" the same per organ; None with fewer than two
        scans that have a score.
    """
    scans, organs = _names(rows)
    draws = scan_draws(len(scans), seed)
    bounds: dict = {"organs": {organ: {} for organ in organs}}
    for score in SCORES:
        values = _table(rows, score, scans, organs)
        per_organ, mean = _means(values, draws)
        known = (~np.isnan(values)).sum(0)
        most, once = MOST.get(score, math.inf), _means(values, np.ones((1, len(scans)), int))
        for k, organ in enumerate(organs):
            bounds["organs"][organ][score] = bounds_of(per_organ[:, k], once[0][0, k], known[k], most)
        bounds[score] = bounds_of(mean, once[1][0], (~np.isnan(values)).any(1).sum(), most)
    return bounds


def bounds_of(drawn: np.ndarray, value: float, num: int, most: float = math.inf) -> list[float] | None:
    """The 95 % interval of a score that lies between 0 and `most`; none for fewer than two scans.

    Args:
        drawn: in draws of the scans.
        value: of all of them, each once.
        num: scans that have one.
        most: that it can be.
    """
    if num < 2:
        return None
    return [min(max(bound, 0.0), most) for bound in for_few(percentile_bounds(drawn), float(value), int(num))]


def drawn_means(rows: list[dict], score: str, seed: int = 0) -> np.ndarray | None:
    """A score's mean in the draws of scans behind `intervals`, [draws]; none for fewer than two scans that have it."""
    scans, organs = _names(rows)
    values = _table(rows, score, scans, organs)
    if (~np.isnan(values)).any(1).sum() < 2:
        return None
    return _means(values, scan_draws(len(scans), seed))[1]


def compare(rows: list[dict], others: list[dict], seed: int = 0) -> dict:
    """Two runs on the same scans, paired by scan and organ.

    A pair in which either has no score is left out: of an organ that is in neither mask, or for HD missed or invented.

    Args:
        rows, others: of the two runs, as for `summarise`, with "scan_id".
        seed: of the bootstrap.

    Returns:
        Per score "num_scans", "num_left_out" (pairs), "difference" (mean over organs of the mean over scans, rows minus
        others), "ci95" [low, high] of it, and "p" of Wilcoxon's signed-rank test (two-sided) of what each scan gives to
        it; under "organs" the same per organ. None = no value.
    """
    scans, organs = _names(rows + others)
    draws = scan_draws(len(scans), seed)
    comparison: dict = {"organs": {organ: {} for organ in organs}}
    for score in SCORES:
        pair = [_table(part, score, scans, organs) for part in (rows, others)]
        difference = pair[0] - pair[1]
        either = ~np.isnan(pair[0]) | ~np.isnan(pair[1])
        per_organ, mean = _means(difference, draws)
        for k, organ in enumerate(organs):
            column = difference[:, [k]]
            comparison["organs"][organ][score] = _paired(column, either[:, [k]], per_organ[:, k])
        comparison[score] = _paired(difference, either, mean)
    return comparison


def other_truth(rows: list[dict], others: list[dict]) -> tuple[str, str] | None:
    """The first (scan_id, organ) of two runs' rows whose true mask has another size in each: labels were changed, or
    the runs' tasks differ. None where all are alike, as far as rows of earlier versions say it."""
    sizes = {(row["scan_id"], row["organ"]): row.get("target_voxels") for row in others}
    for row in rows:
        key, size = (row["scan_id"], row["organ"]), row.get("target_voxels")
        if size is not None and sizes.get(key, size) not in (size, None):
            return key
    return None


def _paired(difference: np.ndarray, either: np.ndarray, drawn: np.ndarray) -> dict:
    """What `compare` says of one score; difference, either [scans, organs], drawn [draws]."""
    by_scan = _per_scan(difference)
    enough, mean = len(by_scan) > 1, float(by_scan.mean()) if len(by_scan) else None
    return {
        "num_scans": len(by_scan),
        "num_left_out": int((either & np.isnan(difference)).sum()),
        "difference": mean,
        "ci95": for_few(percentile_bounds(drawn), mean, len(by_scan)) if enough and mean is not None else None,
        "p": (float(stats.wilcoxon(by_scan).pvalue) if by_scan.any() else 1.0) if enough else None,
    }


def _per_scan(values: np.ndarray) -> np.ndarray:
    """What each scan with a value gives to the mean over organs of the mean over scans, so that the mean of these is
    that; the mean of the scan's organs where every scan has all of them. Of [scans, organs] with NaN for none."""
    known = ~np.isnan(values)
    scans, organs = known.any(1), known.any(0)
    values, known = values[scans][:, organs], known[scans][:, organs]
    return np.nansum(values / known.sum(0), 1) * len(values) / max(1, values.shape[1])


def paired_difference(
    rows: list[dict], others: list[dict], score: str = "dice", seed: int = 0
) -> tuple[float, list[float], int] | None:
    """A score's difference, its 95 % interval and the number of scans, as `compare` says them; none for fewer than two
    scans that both have."""
    scans, organs = _names(rows + others)
    difference = _table(rows, score, scans, organs) - _table(others, score, scans, organs)
    by_scan = _per_scan(difference)
    if len(by_scan) < 2:
        return None
    mean, drawn = float(by_scan.mean()), _means(difference, scan_draws(len(scans), seed))[1]
    return mean, for_few(percentile_bounds(drawn), mean, len(by_scan)), len(by_scan)


def reach(values: Sequence[float]) -> float | None:
    """Half the width of Student's 95 % interval of a mean; none for a single value.

    1.96 standard errors for many values, wider for few, where 1.96 would call noise a finding (with 5 values 12 % of
    the time instead of 5 %).
    """
    num = len(values)
    if num < 2:
        return None
    return float(stats.t.ppf(0.975, num - 1) * np.std(values, ddof=1) / math.sqrt(num))


def _names(rows: list[dict]) -> tuple[list[str], list[str]]:
    """Scans and organs, in the order in which they come."""
    return list(dict.fromkeys(row["scan_id"] for row in rows)), list(dict.fromkeys(row["organ"] for row in rows))


def _table(rows: list[dict], score: str, scans: list[str], organs: list[str]) -> np.ndarray:
    """One score as [scans, organs]; NaN where there is none."""
    scores = {(row["scan_id"], row["organ"]): row[score] for row in rows}
    values = [scores.get((scan, organ), math.nan) for scan in scans for organ in organs]
    return np.reshape(values, (len(scans), len(organs))).astype(float)


def scan_draws(num_scans: int, seed: int) -> np.ndarray:
    """How often each scan is drawn, int [NUM_DRAWS, scans]."""
    if not num_scans:
        return np.zeros((NUM_DRAWS, 0), int)
    return np.random.default_rng(seed).multinomial(num_scans, np.full(num_scans, 1 / num_scans), NUM_DRAWS)


def _means(values: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the drawn scans [draws, organs], and of these over organs [draws]; NaN where nothing was drawn."""
    counts = draws @ (~np.isnan(values))
    per_organ = np.where(counts > 0, draws @ np.nan_to_num(values) / np.maximum(counts, 1), np.nan)
    known = (counts > 0).sum(1)
    return per_organ, np.where(known > 0, np.nansum(per_organ, 1) / np.maximum(known, 1), np.nan)


def drawn_medians(rows: list[dict], scans: Sequence[str], draws: np.ndarray, score: str = "error_mm") -> np.ndarray:
    """The median over rows of pairs of scans in draws of the scans, [draws]; NaN where a draw has no row.

    A scan is drawn in both of its parts, for what is searched in it and what it is asked for elsewhere go wrong
    together: draws of the searched scans alone give half the width, and hold the truth 60 % of the time, not 95 %.

    Args:
        rows: "scan_id" that was searched, "source_id" that the place was asked in, and the score. Rows of earlier
            versions, medians over the sources, are drawn by the first alone.
        scans: that were drawn from.
        draws: how often each, int [draws, scans], as of `scan_draws`.
        score: of the rows.
    """
    place = {scan: k for k, scan in enumerate(scans)}
    other, once = len(scans), len(scans) + 1  # a source that is not drawn, and none
    rows = sorted((row for row in rows if row["scan_id"] in place), key=lambda row: row[score])
    values = np.array([row[score] for row in rows])
    searched = np.array([place[row["scan_id"]] for row in rows], int)
    sources = np.array([place.get(row["source_id"], other) if "source_id" in row else once for row in rows], int)
    medians = np.full(len(draws), np.nan)
    for k, times in enumerate(draws):
        reached = np.cumsum(times[searched] * np.append(times, (0, 1))[sources])
        if len(rows) and reached[-1]:
            middle = reached[-1] / 2  # of an even number the two in the middle
            medians[k] = values[np.searchsorted(reached, (middle, middle + 0.25))].mean()
    return medians


def for_few(bounds: list[float], value: float, num: int) -> list[float]:
    """Bounds of a bootstrap of few values, as much wider about the value as Student's interval is.

    Of two, the bootstrap knows the least and the greatest, and calls noise a finding half of the time; of ten, one time
    in ten.

    Args:
        bounds: [low, high] by `percentile_bounds`.
        value: that they are of.
        num: values that were drawn from, two or more.
    """
    factor = float(stats.t.ppf(0.975, num - 1) / stats.norm.ppf(0.975) * math.sqrt(num / (num - 1)))
    return [value + factor * (bound - value) for bound in bounds]


def percentile_bounds(drawn: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of bootstrap draws; NaN among them are left out."""
    return [float(bound) for bound in np.nanpercentile(drawn, (2.5, 97.5))]
