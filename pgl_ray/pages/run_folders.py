"""Run folders as the pages read them: what was run, for how long, with which settings."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pgl_ray.config import flattened
from pgl_ray.paths import is_url
from pgl_ray.train import checkpoint, run_paths
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.records import RunRecord, read_json
from pgl_ray.train.run_files import RECORD
from pgl_ray.train.runs import MAY_DIFFER


@dataclass(frozen=True)
class Run:
    """A run folder as read.

    Attributes:
        name: short, unique among the runs that were read together.
        path: absolute; of a run in a bucket this machine's copy.
        number: its place among them, from 0 on.
        record: run.json.
        rows: metrics.jsonl.
        summary, scores: evaluation/summary.json and the rows of metrics.parquet; none and [] without an evaluation of
            its network.
        outdated: whether there is one of a network that has been trained on since.
    """

    name: str
    path: Path
    number: int
    record: RunRecord
    rows: list[dict[str, float]]
    summary: dict[str, Any] | None
    scores: list[dict[str, Any]]
    outdated: bool = False

    @property
    def door(self) -> str:
        """The door that made the run."""
        return self.record.door

    @property
    def config(self) -> dict[str, Any]:
        """Its config as it was written."""
        return self.record.config


def read_runs(folders: list[str]) -> list[Run]:
    """Reads run folders; a name is the folder's, or as much of its path as tells the runs apart.

    Raises:
        ValueError: no run folder, or one given twice.
    """
    places = [folder.rstrip("/") if is_url(folder) else str(Path(folder).resolve()) for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError(f"run={folders} names a run twice: give each once")
    return [_read_run(*one) for one in zip(folders, short_names(places), places, range(len(places)))]


def short_names(places: list[str]) -> list[str]:
    """Short names of paths or URLs: the last part, or as much as tells those apart that are not the same."""
    names = [os.path.basename(place) for place in places]
    if len(set(names)) == len(set(places)):
        return names
    paths = ["/" + place.replace("://", "/").lstrip("/") for place in places]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def _read_run(folder: str, name: str, place: str, number: int) -> Run:
    path = run_paths.fetch_for_report(place)
    if not (path / RECORD).is_file():
        raise ValueError(f"run={folder} is no run (no run.json there): give a folder that pretrain or finetune wrote")
    record = RunRecord.read(path)
    if record.door not in ("pretrain", "finetune"):
        raise ValueError(f"run={folder} is a run of {record.door}: give one of pretrain or finetune")
    evaluation, outdated, summary, scores = path / "evaluation", checkpoint.outdated(path), None, []
    if not outdated and all((evaluation / name).is_file() for name in ("summary.json", "metrics.parquet")):
        summary = read_json(evaluation / "summary.json")
        scores = pq.read_table(evaluation / "metrics.parquet").to_pylist()
    return Run(name, path, number, record, read_metrics(path), summary, scores, outdated)


def evaluated(run: Path, name: str) -> Run:
    """A run with its evaluation alone, which must be there, and without its metrics."""
    summary = read_json(run / "evaluation" / "summary.json")
    scores = pq.read_table(run / "evaluation" / "metrics.parquet").to_pylist()
    return Run(name, run, 0, RunRecord.read(run), [], summary, scores)


def overview(run: Run) -> dict[str, str]:
    """One row of the table of runs: text by column."""
    record = run.record
    scans = record.scans
    split = f"{len(scans.train)} train, {len(scans.val)} val, of " if scans else ""
    steps = int(run.rows[-1]["step"]) if run.rows else 0
    planned = record.num_steps or steps
    return {
        "door": run.door,
        "init": os.path.basename(record.init) if run.door == "finetune" else "",
        "started": record.started[:16].replace("T", " "),
        "took": _duration(run.rows),
        "steps": f"{steps:,}" if steps == planned else f"{steps:,} of {planned:,}",
        "parameters": f"{record.num_parameters / 1e6:.2f} M" + (" (encoder)" if run.door == "pretrain" else ""),
        "scans": split + str(record.store.num_scans),
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()),
        "path": run_paths.origin(run.path),
    }


def duration_s(rows: list[dict[str, float]]) -> float:
    """Training time in seconds; the clock of metrics.jsonl starts again when a run is continued."""
    times = [row["time_s"] for row in rows]
    return sum(now for now, after in zip(times, [*times[1:], -1]) if after < now)


def _duration(rows: list[dict[str, float]]) -> str:
    seconds = duration_s(rows)
    hours, rest = divmod(seconds, 3600)
    return f"{hours:.0f} h {rest // 60:.0f} min" if hours else f"{seconds / 60:.1f} min"


def waits(run: Run) -> list[tuple[float, float]]:
    """(step, share of the time since the row before that was spent waiting for data), of rows that say it."""
    return [(row["step"], row["data/wait_share"]) for row in run.rows if "data/wait_share" in row]


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values differ between runs, with each run's value."""
    flat = [flattened(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "run"]
    rows = [(key, [str(values.get(key, "-")) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def by_settings(pairs: list[tuple[Run, Run]]) -> dict[str, list[tuple[Run, Run]]]:
    """Pairs of runs by what the first of each was told besides its seed and what a run may be continued with: {"": all}
    where no seed comes twice, for then each pair stands for a seed. What an earlier version did not know is no other
    setting."""
    firsts = [run for run, _ in pairs]
    if len({run.record.seed for run in firsts}) == len(firsts):
        return {"": pairs}
    differing = [
        (key, values)
        for key, values in differing_settings(firsts)
        if key not in ("init", "seed") and "-" not in values and not {key, key.split(".")[0]} & MAY_DIFFER
    ]
    groups: dict[str, list[tuple[Run, Run]]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(", ".join(f"{key}={values[number]}" for key, values in differing), []).append(pair)
    return groups


def settings(run: Run) -> str:
    """The resolved config as text."""
    path = run.path / "config.yaml"
    return path.read_text() if path.is_file() else json.dumps(run.config, indent=1)
