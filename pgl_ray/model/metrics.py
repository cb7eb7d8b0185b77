"""Dice, IoU, HD and HD95 of one scan (paper, Sec. 5.1), and their averages.

An organ that is empty in both masks has no score (NaN) and counts nowhere. One that is empty in one of them has Dice
and IoU 0 and no surface distance: HD and HD95 are NaN, left out of the means, and the summary says how often
(`num_missed`, `num_invented`), for the paper does not say what a missed organ costs.
"""

import math
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

SCORES = ("dice", "iou", "hd_mm", "hd95_mm")


def organ_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    organs: dict[str, int],
    spacing_mm: tuple[float, float, float],
    task: Literal["multiclass", "binary"],
    distances: bool = True,
) -> dict[str, dict[str, float]]:
    """Scores of one scan, organ by organ.

    Args:
        prediction, target: class indices [D, H, W], 0 = background.
        organs: name -> class index of the organs to score.
        spacing_mm: voxel size (D, H, W).
        task: with "binary" an organ's mask holds the larger class indices too, as organ includes tumour.
        distances: whether to compute HD and HD95, the slow part; NaN otherwise.

    Returns:
        Organ -> "dice", "iou", "hd_mm", "hd95_mm", and the masks' sizes "predicted_voxels" and "target_voxels".
    """
    compare = np.greater_equal if task == "binary" else np.equal
    return {
        organ: mask_metrics(compare(prediction, index), compare(target, index), spacing_mm, distances)
        for organ, index in organs.items()
    }


def mask_metrics(
    prediction: np.ndarray, target: np.ndarray, spacing_mm: tuple[float, float, float], distances: bool = True
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
        ours, theirs = (_surface(mask[box]) * np.asarray(spacing_mm) for mask in (prediction, target))
        there, back = KDTree(theirs).query(ours)[0], KDTree(ours).query(theirs)[0]
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
        mine = [row for row in rows if row["organ"] == organ]
        organs[organ] = {score: _mean([row[score] for row in mine]) for score in SCORES} | {
            "num_scans": sum(not math.isnan(row["dice"]) for row in mine),
            "num_missed": sum(row["target_voxels"] > 0 and row["predicted_voxels"] == 0 for row in mine),
            "num_invented": sum(row["target_voxels"] == 0 and row["predicted_voxels"] > 0 for row in mine),
        }
    means = {score: _mean([o[score] for o in organs.values() if o[score] is not None]) for score in SCORES}
    return means | {"organs": organs}


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None
