"""Small sweeps, and what their trials leave behind."""

import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pgl_ray import config as c
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import name_of
from pgl_ray.train.metrics import metrics_path
from pgl_ray.train.run_files import write_json

ENCODER = {"width": 8, "depths": [1, 1, 1, 1]}

BASE = {"base_pretrain": {"max_steps": 4, "encoder": ENCODER}, "base_finetune": {"max_steps": 4}}

LR = {"finetune.optim.lr": {"loguniform": [0.001, 0.1]}}

CURVE = {"base_pretrain": {**BASE["base_pretrain"], "probe": {"every": 2}}}

PROBED = {"base_finetune": None, "base_probe": {"judges": ["voxels", "decoder", "matching"]}}


def sweep(tmp_path, **changes) -> c.TuneConfig:
    return c.build(c.TuneConfig, {"index": "s", "run": str(tmp_path / "sweep"), **BASE, **changes})


def ended(tmp_path, values, score, reports=(), state="done", **facts) -> sweeps.Trial:
    folder = tmp_path / "sweep" / "trials" / name_of(values)
    folder.mkdir(parents=True)
    sweeps.note(folder, values=values, started=time.time(), since=time.time() - 60, state="running", stage="finetune")
    for progress, value in reports:
        sweeps.add_report(folder, progress, value)
    sweeps.note(folder, **facts)
    sweeps.end(folder, state, facts.get("error"), score)
    return sweeps.read_trial(folder)


def said(value: float, scans=("p", "q"), init="run", off: float | None = None, all_readings=False) -> dict:
    """A probe's file in which every judge says what follows from one value; higher is better of all but matching."""

    def scores(level):
        organs, num = ("liver", "spleen"), 1000
        hits = [[round(num * level)] * 2 for _ in scans]
        rows = [{"scan_id": scan, "organ": organ, "dice": level / 2} for scan in scans for organ in organs]
        errors = [{"scan_id": scan, "organ": organ, "error_mm": 50 * (1 - level)} for scan in scans for organ in organs]
        details = {"scans": list(scans), "classes": list(organs), "hits": hits, "counts": [[num] * 2 for _ in scans]}
        return {
            "voxels": {"value": level, "details": details},
            "decoder": {"value": level / 2, "details": {"rows": rows}},
            "matching": {"value": 50 * (1 - level), "details": {"rows": errors}},
        }

    readings = {"reestimated": scores(value)} | ({} if off is None else {"off": scores(off)})
    if init != "random" and off is not None and not all_readings:
        readings["off"] = {"voxels": readings["off"]["voxels"]}
    return {"init": init, "readings": readings, "balanced_accuracy": value, "recall": {}, "notes": []}


def tuned_run(folder: Path, seed: int, dice: dict[str, dict[str, float]], share: float = 1.0, missed: int = 0) -> None:
    """A fine-tuning run's folder with an evaluation: organ -> scan -> Dice."""
    import pyarrow as pa

    (folder / "evaluation").mkdir(parents=True)
    config = {"seed": seed, "global_batch_size": 4, "index": "s", "init": "random", "num_scans": share}
    scans = {"train": ["a"] * round(6 * share), "val": ["b"] * round(2 * share)}
    record = {"door": "finetune", "config": config, "num_steps": 10, "scans": scans}
    write_json(folder / "run.json", record)
    metrics_path(folder).write_text('{"step": 5, "time_s": 2.0}\n{"step": 10, "time_s": 4.0}\n')
    rows = [
        {"scan_id": scan, "organ": organ, "dice": v, "iou": v / 2, "hd_mm": 5.0, "hd95_mm": 4.0}
        for organ, scans in dice.items()
        for scan, v in scans.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation" / "metrics.parquet")
    counts = {"iou": 0.5, "hd_mm": 5.0, "hd95_mm": 4.0, "num_missed": missed, "num_invented": 0}
    organs = {o: {"dice": float(np.mean(list(v.values()))), **counts} for o, v in dice.items()}
    mean = float(np.mean([v["dice"] for v in organs.values()]))
    summary = {"dice": mean, "iou": 0.5, "hd_mm": 5.0, "hd95_mm": 4.0, "organs": organs, "index": "s"}
    write_json(folder / "evaluation" / "summary.json", summary)
