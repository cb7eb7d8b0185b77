"""What a network's training scans were like, and whether another scan is like them."""

import base64
import hashlib
import json
from collections.abc import Collection, Iterable
from typing import Any

import nibabel as nib
import numpy as np

from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.data.voxel_statistics import statistics

SPACING_MARGIN = 1.25  # how far beyond the training scans' voxel sizes a scan may lie, as a factor
RESAMPLED_MARGIN = 1.05  # the same where all training scans were resampled to one voxel size
SPACING_NOTED = 1.5  # factor between two stores' voxel sizes from which initial weights may be of less use
LEAST_MARGIN_HU = 100.0  # how far beyond the training scans' mean and standard deviation a scan may always lie
HASH_BYTES = 8  # of a scan's voxels that a checkpoint keeps: 1 MB of text for 100,000 scans
NUM_NAMES = 3  # of scans that a sentence names
KINDS = {  # of training, and what it makes of figures on the same scans
    "without_labels": "pre-trained on (without labels): figures may be optimistic",
    "with_labels": "trained or validated on (with labels): figures are too good",
}


def training_facts(
    index: Index, scan_ids: Iterable[str], with_labels: bool = False, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a checkpoint keeps of its training scans; plain values.

    Args:
        index: of the store.
        scan_ids: the scans.
        with_labels: whether their labels were used.
        before: the facts of the initial weights, whose scans the network has seen, too.

    Returns:
        num_scans; hash (sha256 over their names and voxels' hashes); data_sets (name, licence and origin of what the
        store was prepared from, "" where a recipe does not say it); spacing_mm (least, median and largest voxel size,
        each D, H, W); resampled_mm (the voxel size that all were resampled to, or none); mean_hu and std_hu (least and
        largest of the scans, after clipping to the window); seen (kind of KINDS -> the first HASH_BYTES of the hash of
        each scan's voxels, base64; those of `before` among them).
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
        "seen": _seen(scans, with_labels, before or {}),
    }


def store_facts(
    index: Index, trained_on: dict[str, Any], num_scans: int, labels_of: Collection[str] = ()
) -> dict[str, Any]:
    """What run.json keeps of a run's store; by most of it the store is known when the run is continued. Plain values.

    Args:
        index: of the store.
        trained_on: `training_facts` of the run's scans.
        num_scans: to say.
        labels_of: scans whose labels the run uses.
    """
    facts = {"labels": index.labels, "hu_window": index.hu_window, "spacing_mm": index.spacing_mm}
    facts |= {"num_scans": num_scans, "splits": index.labelled_splits, "scans_hash": trained_on["hash"]}
    return facts | ({"labels_hash": _labels_hash(index, {*labels_of})} if labels_of else {})


def _labels_hash(index: Index, scan_ids: set[str]) -> str:
    """Over what is labelled in some scans; the hash of the source covers the label map's file, too."""
    names = ("scan_id", "source_hash", "labelled", "label_boxes", "label_voxels")
    labels = [[getattr(scan, name) for name in names] for scan in index.scans if scan.scan_id in scan_ids]
    return hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()


def _seen(scans: list[ScanRecord], with_labels: bool, before: dict[str, Any]) -> dict[str, str]:
    hashes = {kind: _hashes(before, kind) for kind in KINDS}
    hashes["with_labels" if with_labels else "without_labels"] |= {_short(scan) for scan in scans}
    return {kind: base64.b64encode(b"".join(sorted(of_kind))).decode() for kind, of_kind in hashes.items()}


def _hashes(facts: dict[str, Any], kind: str) -> set[bytes]:
    packed = base64.b64decode(facts.get("seen", {}).get(kind, ""))
    return {packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)}


def _short(scan: ScanRecord) -> bytes:
    return bytes.fromhex(scan.content_hash)[:HASH_BYTES]


def seen_notes(facts: dict[str, Any], scans: Iterable[ScanRecord]) -> list[str]:
    """What to say of evaluated scans that a network has seen in training, by their voxels; a sentence per kind.

    Args:
        facts: of the network, from `training_facts`; {} where nothing is known of it, which says nothing.
        scans: that it is evaluated on, of any store.
    """
    evaluated, notes = [_short(scan) for scan in scans], []
    for kind, what in KINDS.items():
        known = _hashes(facts, kind)
        num = sum(one in known for one in evaluated)
        if num:
            notes.append(f"{num} of the {len(evaluated)} evaluated scans {'was' if num == 1 else 'were'} {what}")
    return notes


def same_voxels(scans: Iterable[ScanRecord], others: Iterable[ScanRecord]) -> list[str]:
    """Which of `others` have the voxels of one of `scans`: "ID and ID" each."""
    seen = {scan.content_hash: scan.scan_id for scan in scans}
    return [f"{other.scan_id} and {seen[other.content_hash]}" for other in others if other.content_hash in seen]


def some(names: list[str]) -> str:
    """The first few of them, in a list."""
    return ", ".join(names[:NUM_NAMES]) + (", ..." if len(names) > NUM_NAMES else "")


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
    notes = []
    codes = "".join(nib.aff2axcodes(affine))
    if codes != "SPL":
        notes.append(f"its axes run towards {', '.join(codes)}, the training scans' (D, H, W) towards S, P, L")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, _, high = np.array(facts["spacing_mm"])
    margin = SPACING_MARGIN
    if facts["resampled_mm"]:
        low = high = np.array(facts["resampled_mm"])
        margin = RESAMPLED_MARGIN
    if ((spacing < low / margin) | (spacing > high * margin)).any():
        seen = _text(low) if np.array_equal(low, high) else f"{_text(low)} to {_text(high)}"
        notes.append(f"its voxels are {_text(spacing)} mm (D, H, W), the training scans' {seen} mm")
    mean, std = statistics(np.ascontiguousarray(voxels, np.int16), hu_window)
    for name, value in (("mean", mean), ("standard deviation", std)):
        low, high = facts["mean_hu" if name == "mean" else "std_hu"]
        slack = max(LEAST_MARGIN_HU, high - low)
        if not low - slack <= value <= high + slack:
            notes.append(
                f"the {name} of its voxels inside the HU window is {value:.0f}, the training scans' {low:.0f} to "
                f"{high:.0f}: is it in HU, and a CT?"
            )
    return notes


def spacing_note(facts: dict[str, Any], index: Index) -> str | None:
    """What to say of initial weights whose training scans had another voxel size than a store's scans; none: alike.

    Args:
        facts: of the training scans, from `training_facts`; {} where nothing is known of them.
        index: of the store.
    """
    if not facts or not index.scans:
        return None
    trained_mm = np.array(facts["resampled_mm"] or facts["spacing_mm"][1])
    store_mm = np.array(index.spacing_mm or np.median([scan.spacing_mm for scan in index.scans], 0))
    if np.maximum(store_mm / trained_mm, trained_mm / store_mm).max() <= SPACING_NOTED:
        return None
    size = ",".join(f"{length:.3g}" for length in trained_mm)
    return (
        f"was trained on voxels of {_text(trained_mm)} mm (D, H, W; median), those of {index.store} are "
        f"{_text(store_mm)} mm, so it may help less; prepare with spacing_mm=[{size}] makes voxels of its size"
    )


def _text(spacing: np.ndarray) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing)
