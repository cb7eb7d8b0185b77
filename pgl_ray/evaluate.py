"""python -m pgl_ray.evaluate run=RUN index=STORE [a.b=c ...]: Dice, IoU, HD and HD95 on labelled scans (Sec. 5.1)."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("evaluate")

import contextlib
import gzip
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pgl_ray.config import EvaluateConfig, FailedRun, another_store
from pgl_ray.data.durable import check_writable, write_aside
from pgl_ray.data.facts import seen_notes
from pgl_ray.data.store import Index, ScanRecord, check_labelled, read_index
from pgl_ray.judge.scoring import Scored, score_scans
from pgl_ray.model import device as on
from pgl_ray.model.inference import out_of_memory, pick_device, time_forward
from pgl_ray.model.metrics import SCORES, compare, intervals, other_truth, summarise
from pgl_ray.model.segmenter import LightSegmenter, Segmenter
from pgl_ray.paths import is_url
from pgl_ray.train import run_paths
from pgl_ray.train.checkpoint import file_of, outdated, sha256_of
from pgl_ray.train.evaluations import SUMMARY, TABLE, check_folder, continued, done_before
from pgl_ray.train.metrics import unfinished
from pgl_ray.train.progress import Stage
from pgl_ray.train.records import CheckpointMeta, RunRecord
from pgl_ray.train.run_files import BEST, RECORD, SCANS, write_json
from pgl_ray.train.weights import check_flips, load_segmenter

KEYS = {"tta": "tta=...", "overlap": "inference.overlap=...", "bfloat16": "inference.precision=..."}  # of a scan's rows
MEAN = "mean of organs"
FORWARD_SIZE = (64, 192, 192)  # D, H, W, that the paper gives its 30 ms for


class Result(NamedTuple):
    """Where the results lie, and summary.json's content."""

    folder: str
    summary: dict[str, Any]


def run(config: EvaluateConfig) -> Result:
    """Evaluates and writes metrics.parquet, summary.json, predictions/, and the comparison if one is asked for.

    Scans that this network was evaluated on before, in the same way, are not evaluated again (scans.jsonl knows them);
    what another network left in the folder is removed.

    Raises:
        ValueError: run or index cannot be used, or do not belong together; the folder holds what is not of an
            evaluation; or there is nothing to compare with: no other evaluation, or one of other scans, made in
            another way, or on other labels.
        FailedRun: a scan does not fit into memory.
    """
    if not config.output and run_paths.is_checkpoint(config.run):
        load_segmenter(config.run, "cpu")  # what else is wrong with it comes first
        raise ValueError(f"run={config.run} is one checkpoint: give output=FOLDER for the results")
    into = contextlib.nullcontext(Path(config.output)) if config.output else run_paths.results(config.run, "evaluation")
    with into as folder:
        summary = _evaluate(config, folder)
    return Result(config.output or f"{config.run}/evaluation", summary)


def _evaluate(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    if config.output:
        check_writable(f"output={config.output}", folder.absolute())
    check_folder(folder)
    device = pick_device(config.inference.device)
    model, meta, identity = _read_network(config, device)
    if config.tta:
        check_flips(config.run, meta)
    index = read_index(config.index)
    records = _choose(config, meta, index)
    others = _read_others(config, records, identity) if config.compare else None
    notes = [f"{config.run} {text}"] if (text := unfinished(config.run)) else []
    notes += seen_notes(meta.data, records)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {record.scan_id: _content(record) for record in records}
    rows_by_scan = continued(folder, identity, wanted, config.save_predictions)
    left = [record for record in records if record.scan_id not in rows_by_scan]

    known = f", {len(rows_by_scan)} of them known already" if rows_by_scan else ""
    print(f"evaluate: {len(records)} scans of split={config.split!r} on {device}{known}", flush=True)
    began = time.monotonic()
    scored_scans = _named(
        score_scans(model, meta.task, meta.patch_size, index, left, config.inference, flips=config.tta, own_grid=True)
    )
    with (folder / SCANS).open("a") as file, Stage("evaluate:", "scan", len(left)) as stage:
        for scored in scored_scans:
            rows_by_scan[scored.record.scan_id] = scored.rows
            if config.save_predictions:
                _write_prediction(folder / "predictions", scored, index)
            line = {"scan_id": scored.record.scan_id, "scan": _content(scored.record), "rows": scored.rows}
            file.write(json.dumps(line) + "\n")
            file.flush()
            stage.advance(f"{scored.record.scan_id}: dice {_text(summarise(scored.rows)['dice'], 0, 3)}")

    rows = [row for record in records for row in rows_by_scan[record.scan_id]]
    if left or not (folder / SUMMARY).exists():
        seconds = (time.monotonic() - began) / len(left) if left else None
        summary = summarise(rows) | {
            "ci95": intervals(rows, config.seed),
            "seed": config.seed,
            "num_scans": len(records),
            "split": config.split,
            "index": config.index,
            "notes": notes,
            "seconds_per_scan": seconds,
            "forward_ms": _forward_ms(model, device, config.inference.precision),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        _write_table(folder / TABLE, rows)
        write_json(folder / SUMMARY, summary)
    summary = _summary(config, folder, rows, notes)
    if others is not None:
        if differs := other_truth(rows, others):
            what = f"compare={config.compare} was scored on other labels of {differs[1]} in scan {differs[0]}"
            raise ValueError(f"{what} (changed since, or of another task): evaluate both again, alike")
        compared = compare(rows, others, config.seed) | {"run": config.run, "other": config.compare}
        other = Path(config.compare).absolute()  # trials of sweeps share their names
        write_json(folder / f"compare_{other.parent.name}_{other.name}.json", compared)
        print(comparison(compared), flush=True)
    return summary


def _summary(config: EvaluateConfig, folder: Path, rows: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """The summary that lies there, brought to what is asked for now, and printed."""
    summary = json.loads((folder / SUMMARY).read_text())
    now = {"seed": config.seed, "split": config.split, "index": config.index, "notes": notes}  # it may have been moved
    if any(summary.get(key) != value for key, value in now.items()):
        summary |= now | {"ci95": intervals(rows, config.seed)}
        write_json(folder / SUMMARY, summary)
    print(table(summary), flush=True)
    for note in notes:
        print(f"evaluate: note: {note}", flush=True)
    if summary["forward_ms"] is not None:
        size = "x".join(map(str, FORWARD_SIZE))
        print(
            f"one {size} volume through the network: {summary['forward_ms']:.0f} ms ({summary['device']})", flush=True
        )
    return summary


def _named(scored: Iterator[Scored]) -> Iterator[Scored]:
    """The same; a scan for which memory is too short ends the run with what to take."""
    try:
        yield from scored
    except MemoryError as error:
        raise FailedRun(str(error) or "not enough memory") from None


def _choose(config: EvaluateConfig, meta: CheckpointMeta, index: Index) -> list[ScanRecord]:
    """The scans to evaluate on.

    Raises:
        ValueError: none, or the store's labels, HU window or voxel size are not the run's.
    """
    check_labelled(index, config.index)
    for name, trained, stored in (
        ("labels", meta.labels, index.labels),
        ("hu_window", list(meta.hu_window), list(index.hu_window)),
        ("spacing_mm", *(size and list(size) for size in (meta.spacing_mm, index.spacing_mm))),
    ):
        if trained != stored:
            mend = "give a store with the run's labels" if name == "labels" else another_store(name, trained)
            text = f"run={config.run} was trained with {name} {trained}, index={config.index} has {stored}"
            raise ValueError(f"{text}: {mend}")
    records = index.labelled(config.split)[: config.num_scans]
    if not records:
        splits = sorted({record.split for record in index.scans if record.labelled})
        raise ValueError(f"index={config.index} has no labelled scan in split={config.split!r}; it has: {splits}")
    return records


def _read_others(config: EvaluateConfig, records: list[ScanRecord], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of another evaluation of the same scans.

    Raises:
        ValueError: there is none, or it is one of other scans, made in another way, or of a network that has changed.
    """
    run = config.compare
    place = run_paths.fetch_for_report(run)
    if not is_url(run) and not place.exists():
        raise ValueError(f"compare={run} does not exist: give the folder of a fine-tuning run, or of an evaluation")
    path = next((p for p in (place / "evaluation" / TABLE, place / TABLE) if p.is_file()), None)
    if path is None:
        door = RunRecord.read(place).door if (place / RECORD).is_file() else ""
        if door not in ("", "finetune"):
            raise ValueError(f"compare={run} is a {door} run, of which there is no evaluation: give a fine-tuning run")
        if not door and not (place / BEST).is_file():
            raise ValueError(f"compare={run} is no fine-tuning run and holds no evaluation: give one of the two")
        raise ValueError(f"compare={run} is not evaluated: python -m pgl_ray.evaluate run={run} on the same scans")
    rows = pq.read_table(path).to_pylist()
    ours, theirs = {record.scan_id for record in records if record.labelled}, {row["scan_id"] for row in rows}
    if ours != theirs:
        raise ValueError(
            f"compare={run} was evaluated on {len(theirs)} scans, {len(theirs - ours)} of which are not among the "
            f"{len(ours)} of this evaluation: evaluate both with the same index, split and num_scans"
        )
    made = done_before(path.with_name(SCANS))[0]
    for key in sorted((identity.keys() | made.keys()) - {"checkpoint"}) if made else ():
        their, our = made.get(key, False), identity.get(key, False)
        if their != our:
            mend = f"evaluate both with one {KEYS.get(key, key)}"
            raise ValueError(f"compare={run} was evaluated with {key}={their}, here {our}: {mend}")
    if outdated(place):
        raise ValueError(
            f"compare={run} has been trained on since its evaluation: python -m pgl_ray.evaluate run={run} first"
        )
    return rows


# -- what was done before ---------------------------------------------------------------------------------------------


def _read_network(
    config: EvaluateConfig, device: torch.device
) -> tuple[Segmenter | LightSegmenter, CheckpointMeta, dict[str, Any]]:
    """The network, what is known of it, and its `_identity`; a training that goes on may replace it in between."""
    identity = _identity(config, device)
    while True:
        model, meta = load_segmenter(config.run, device)
        before, identity = identity, _identity(config, device)
        if identity == before:
            return model, meta, identity


def _identity(config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """All that decides what a scan's rows and prediction are, but the scan."""
    settings = {"checkpoint": sha256_of(file_of(config.run)), "tta": config.tta, "overlap": config.inference.overlap}
    return settings | ({"bfloat16": True} if on.in_bfloat16(device, config.inference.precision) else {})


def _content(record: ScanRecord) -> str:
    """Hash of a scan's voxels and of what is labelled in it."""
    facts = (record.content_hash, record.source_hash, record.labelled, record.label_voxels, record.spacing_mm)
    facts += (record.source_affine,) if record.source_affine else ()  # scored on the scan's own grid
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# -- results ----------------------------------------------------------------------------------------------------------


def _write_prediction(folder: Path, scored: Scored, index: Index) -> None:
    """Label values as NIfTI on the scan's own grid."""
    values = np.array([0, *index.label_values], np.min_scalar_type(max(index.label_values)))
    image = nib.Nifti1Image(values[scored.prediction], scored.affine)
    image.header.set_xyzt_units("mm")
    folder.mkdir(exist_ok=True)
    packed = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    write_aside(folder / f"{scored.record.scan_id}.nii.gz", packed)


def _forward_ms(model: Segmenter | LightSegmenter, device: torch.device, precision: str) -> float | None:
    """Milliseconds of one forward pass; none where it does not fit into memory."""
    try:
        return time_forward(model, FORWARD_SIZE, 10 if device.type == "cuda" else 1, precision)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    write_aside(path, sink.getvalue())


def table(summary: dict[str, Any]) -> str:
    """The summary as text: a line per organ, and their mean, with the 95 % interval of the Dice."""
    head = f"{'organ':<28}{'dice':>7}{'95 % interval':>16}{'iou':>7}{'hd_mm':>8}{'hd95_mm':>9}"
    lines = [f"{head}{'scans':>7}{'missed':>8}{'invented':>10}"]
    for organ, scores in [*summary["organs"].items(), (MEAN, summary)]:
        bounds = (summary["ci95"]["organs"][organ] if organ != MEAN else summary["ci95"])["dice"]
        shapes = ((7, 3), (7, 3), (8, 1), (9, 1))
        dice, *numbers = [_text(scores[name], *shape) for name, shape in zip(SCORES, shapes)]
        counts = (("num_scans", 7), ("num_missed", 8), ("num_invented", 10))
        numbers += [f"{scores[name]:>{width}}" for name, width in counts if name in scores]
        lines.append(f"{organ[:27]:<28}{dice}{_interval(bounds):>16}{''.join(numbers)}")
    return "\n".join(lines)


def comparison(compared: dict[str, Any]) -> str:
    """The differences of two runs as text: a line per organ, and their mean."""
    name, other = (os.path.basename(os.path.normpath(compared[key])) for key in ("run", "other"))
    head = f"{'organ':<28}{'dice':>8}{'95 % interval':>18}{'p':>8}{'hd95_mm':>9}{'scans':>7}"
    lines = [f"{name} minus {other}", head]
    for organ, scores in [*compared["organs"].items(), (MEAN, compared)]:
        dice, hd95 = scores["dice"], scores["hd95_mm"]["difference"]
        cells = _text(dice["difference"], 8, 3, "+") + f"{_interval(dice['ci95'], '+'):>18}" + _text(dice["p"], 8, 3)
        lines.append(f"{organ[:27]:<28}{cells}{_text(hd95, 9, 1, '+')}{dice['num_scans']:>7}")
    num = compared["dice"]["num_scans"]
    left_out = {name: compared[name]["num_left_out"] for name in ("dice", "hd95_mm") if compared[name]["num_left_out"]}
    if left_out:
        counts = ", ".join(f"{name} {count}" for name, count in left_out.items())
        lines.append(f"left out, for one of the two has no score: {counts} (pairs of scan and organ)")
    if num > 1:
        lines.append(
            "p: Wilcoxon's signed-rank test over scans, two-sided, not corrected for the number of organs; with "
            f"{num} scans it is at least {2 / 2**num:.2g}"
        )
    return "\n".join(lines)


def _interval(bounds: list[float] | None, sign: str = "") -> str:
    return f"[{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]" if bounds else "-"


def _text(value: float | None, width: int, digits: int, sign: str = "") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{sign}{width}.{digits}f}"


def describe(result: Result) -> str:
    """The closing line."""
    dice = _text(result.summary["dice"], 0, 4)
    return f"evaluate: mean dice {dice} on {result.summary['num_scans']} scans; results in {result.folder}"
