"""The folder of an evaluation: what was done there before, what of it stays, and what is another's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pgl_ray.data.durable import write_aside
from pgl_ray.train.metrics import whole_lines
from pgl_ray.train.run_files import SCANS

TABLE, SUMMARY = "metrics.parquet", "summary.json"
OF_SUMMARY = frozenset({"organs", "ci95", "num_scans", "split", "index"})  # keys by which a summary is an evaluation's
OF_COMPARISON = frozenset({"organs", "run", "other"})


def done_before(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How the scans of a scans.jsonl were evaluated, {} where there is none, and a line for each."""
    made, *lines = [json.loads(line) for line in whole_lines(path)] or [{}]
    made.pop("save_predictions", None)  # which earlier versions wrote
    return made, lines


def check_folder(folder: Path) -> None:
    """Refuses a folder of results in which another's files lie where an evaluation's would.

    Raises:
        ValueError: names one of them.
    """
    if _is_list(folder / SCANS) or _has(folder / SUMMARY, OF_SUMMARY):
        return
    names = [name for name in (SCANS, SUMMARY, TABLE) if (folder / name).exists() and not _is_empty(folder / name)]
    names += [f"predictions/{path.name}" for path in sorted((folder / "predictions").glob("*.nii.gz"))]
    if names:
        raise ValueError(f"output={folder} holds {names[0]}, which is not of an evaluation: choose another output=...")


def continued(
    folder: Path, identity: dict[str, Any], wanted: Mapping[str, str], with_predictions: bool
) -> dict[str, list[dict[str, Any]]]:
    """Rows by scan_id of the scans that were evaluated before, by the same network in the same way.

    What this network said of scans that are not asked for now stays. All else that an evaluation left in the folder is
    removed, so that no prediction lies beside another's scores; what none has left stays, too.

    Args:
        folder: of the results, which `check_folder` has accepted.
        identity: of what decides a scan's rows, but the scan.
        wanted: scan_id -> hash of its content.
        with_predictions: whether a scan counts only with its prediction.
    """
    made, lines = done_before(folder / SCANS)
    predictions = {path.name.removesuffix(".nii.gz"): path for path in (folder / "predictions").glob("*.nii.gz")}
    same = [line for line in lines if wanted.get(line["scan_id"], line["scan"]) == line["scan"]]
    same = [line for line in same if line["scan_id"] in predictions or not with_predictions] if made == identity else []
    lines_by_scan = {line["scan_id"]: line for line in same}
    rows_by_scan = {scan_id: lines_by_scan[scan_id]["rows"] for scan_id in wanted if scan_id in lines_by_scan}
    summed = _summed(folder / TABLE)
    if len(rows_by_scan) < len(wanted) or summed != {key for key, rows in rows_by_scan.items() if rows}:
        comparisons = [path for path in folder.glob("compare_*.json") if _has(path, OF_COMPARISON)]
        for path in (folder / TABLE, folder / SUMMARY, *comparisons):
            path.unlink(missing_ok=True)
    known = {line["scan_id"] for line in lines} | {*wanted} | (summed or set())
    for scan_id in (predictions.keys() & known) - lines_by_scan.keys():
        predictions[scan_id].unlink()
    write_aside(
        folder / SCANS, "".join(json.dumps(line) + "\n" for line in [identity, *lines_by_scan.values()]).encode()
    )
    return rows_by_scan


def _is_list(path: Path) -> bool:
    """Whether a file is an evaluation's list of scans; one of a run that was killed may hold no scan."""
    try:
        made, lines = done_before(path)
    except (ValueError, TypeError, AttributeError, OSError):
        return False
    return "checkpoint" in made and all(isinstance(line, dict) and {"scan_id", "rows"} <= {*line} for line in lines)


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _has(path: Path, keys: frozenset[str]) -> bool:
    """Whether a JSON file holds a dict with some keys."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and keys <= {*content}


def _summed(path: Path) -> set[str] | None:
    """Scans of a table; none where there is no whole one."""
    try:
        return {*pq.read_table(path, columns=["scan_id"])["scan_id"].to_pylist()}
    except (OSError, pa.ArrowException):
        return None
