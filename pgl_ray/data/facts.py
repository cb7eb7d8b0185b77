"""What a network's training scans were like, and whether another scan is like them."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import nibabel as nib
import numpy as np

from pgl_ray.data.store import Index, statistics

SPACING_MARGIN = 1.25  # how far beyond the training scans' voxel sizes a scan may lie, as a factor
RESAMPLED_MARGIN = 1.05  # the same where all training scans were resampled to one voxel size
SPACING_NOTED = 1.5  # factor between two stores' voxel sizes from which initial weights may be of less use
LEAST_MARGIN_HU = 100.0  # how far beyond the training scans' mean and standard deviation a scan may always lie


def training_facts(index: Index, scan_ids: Iterable[str]) -> dict[str, Any]:
    """What a checkpoint keeps of its training scans; plain values.

    Returns:
        num_scans; hash (sha256 over their names and voxels' hashes); data_sets (name, licence and origin of what the
        store was prepared from, "" where a recipe does not say it); spacing_mm (least, median and largest voxel size,
        each D, H, W); resampled_mm (the voxel size that all were resampled to, or none); mean_hu and std_hu (least and
        largest of the scans, after clipping to the window).
    """
    wanted = set(scan_ids)
    scans = [scan for scan in index.scans if scan.scan_id in wanted]
    names = json.dumps([(scan.scan_id, scan.content_hash) for scan in scans])
    spacing = np.array([scan.spacing_mm for scan in scans])
    return {
        "num_scans": len(scans),
        "hash": hashlib.sha256(names.encode()).hexdigest(),
        "data_sets": list(index.data_sets),
        "spacing_mm": [np.round(of(spacing, 0), 4).tolist() for of in (np.min, np.median, np.max)],
        "resampled_mm": index.spacing_mm and list(index.spacing_mm),
        "mean_hu": [min(scan.mean_hu for scan in scans), max(scan.mean_hu for scan in scans)],
        "std_hu": [min(scan.std_hu for scan in scans), max(scan.std_hu for scan in scans)],
    }


def disagreements(
    facts: dict[str, Any], hu_window: tuple[float, float], voxels: np.ndarray, affine: np.ndarray
) -> list[str]:
    """In what a scan is unlike those that a network was trained on; a sentence each.

    Args:
        facts: of the training scans, from `training_facts`.
        hu_window: of the training.
        voxels: int16 [D, H, W], HU.
        affine: [4, 4], voxel index (d, h, w, 1) -> RAS+ mm.
    """
    found = []
    codes = "".join(nib.aff2axcodes(affine))
    if codes != "SPL":
        found.append(f"its axes run towards {', '.join(codes)}, the training scans' (D, H, W) towards S, P, L")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, _, high = np.array(facts["spacing_mm"])
    margin = SPACING_MARGIN
    if facts["resampled_mm"]:
        low = high = np.array(facts["resampled_mm"])
        margin = RESAMPLED_MARGIN
    if ((spacing < low / margin) | (spacing > high * margin)).any():
        seen = _text(low) if np.array_equal(low, high) else f"{_text(low)} to {_text(high)}"
        found.append(f"its voxels are {_text(spacing)} mm (D, H, W), the training scans' {seen} mm")
    mean, std = statistics(np.ascontiguousarray(voxels, np.int16), hu_window)
    for name, value in (("mean", mean), ("standard deviation", std)):
        low, high = facts["mean_hu" if name == "mean" else "std_hu"]
        slack = max(LEAST_MARGIN_HU, high - low)
        if not low - slack <= value <= high + slack:
            found.append(
                f"the {name} of its voxels inside the HU window is {value:.0f}, the training scans' {low:.0f} to "
                f"{high:.0f}: is it in HU, and a CT?"
            )
    return found


def spacing_note(facts: dict[str, Any], index: Index) -> str | None:
    """What to say of initial weights whose training scans had another voxel size than a store's scans; none: alike.

    Args:
        facts: of the training scans, from `training_facts`; {} where nothing is known of them.
        index: of the store.
    """
    if not facts or not index.scans:
        return None
    known = np.array(facts["resampled_mm"] or facts["spacing_mm"][1])
    own = np.array(index.spacing_mm or np.median([scan.spacing_mm for scan in index.scans], 0))
    if np.maximum(own / known, known / own).max() <= SPACING_NOTED:
        return None
    size = ",".join(f"{length:.3g}" for length in known)
    return (
        f"was trained on voxels of {_text(known)} mm (D, H, W; median), those of {index.store} are {_text(own)} mm, so "
        f"it may help less; prepare with spacing_mm=[{size}] makes voxels of its size"
    )


def _text(spacing: np.ndarray) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing)
