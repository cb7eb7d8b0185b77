"""python -m pgl_ray.evaluate run=RUN index=STORE [a.b=c ...]: Dice, IoU, HD and HD95 on labelled scans (Sec. 5.1)."""

import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgl_ray.config import EvaluateConfig, InferenceConfig, command
from pgl_ray.data.store import Index, ScanRecord, class_lookup, open_label, open_volume, read_index, write_aside
from pgl_ray.data.stream import AIR
from pgl_ray.data.views import normalise
from pgl_ray.model.inference import pick_device, segment
from pgl_ray.model.metrics import SCORES, organ_metrics, summarise
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train.checkpoint import load_segmenter, write_json


class Scored(NamedTuple):
    """One scan's result.

    Attributes:
        record: the scan.
        prediction: uint8 [D, H, W], class indices.
        rows: one per organ labelled in the scan: scan_id, organ, and what `organ_metrics` gives.
    """

    record: ScanRecord
    prediction: np.ndarray
    rows: list[dict[str, Any]]


class Result(NamedTuple):
    """Where the results lie, and summary.json's content."""

    folder: str
    summary: dict[str, Any]


def run(config: EvaluateConfig) -> Result:
    """Evaluates and writes metrics.parquet, summary.json and predictions/.

    Raises:
        ValueError: run or index cannot be used, or do not belong together.
    """
    device = pick_device(config.inference.device)
    model, meta = load_segmenter(config.run, device)
    index = read_index(config.index)
    records = _choose(config, meta, index)
    folder = Path(config.output or os.path.join(config.run, "evaluation"))
    folder.mkdir(parents=True, exist_ok=True)

    print(f"evaluate: {len(records)} scans of split={config.split!r} on {device}", flush=True)
    rows, began = [], time.monotonic()
    for done, scored in enumerate(score_scans(model, meta, index, records, config.inference), 1):
        rows += scored.rows
        if config.save_predictions:
            _write_prediction(folder / "predictions", scored, index)
        rate = (time.monotonic() - began) / done
        left = (len(records) - done) * rate
        progress = f"{done}/{len(records)} scans, {rate:.1f} s per scan, {left:.0f} s left"
        dice = _text(summarise(scored.rows)["dice"], 0, 3)
        print(f"evaluate: {progress}; {scored.record.scan_id}: dice {dice}", flush=True)

    summary = summarise(rows) | {
        "num_scans": len(records),
        "split": config.split,
        "index": str(Path(config.index).absolute()),
        "seconds_per_scan": (time.monotonic() - began) / len(records),
    }
    _write_table(folder / "metrics.parquet", rows)
    write_json(folder / "summary.json", summary)
    print(table(summary), flush=True)
    return Result(str(folder), summary)


def score_scans(
    model: Segmenter,
    meta: dict[str, Any],
    index: Index,
    records: list[ScanRecord],
    inference: InferenceConfig,
    distances: bool = True,
) -> Iterator[Scored]:
    """Segments and scores scans one by one, each on its own grid; fine-tuning validates with it.

    Args:
        model: in eval mode, on the device to compute on.
        meta: "task", "patch_size" (D, H, W).
        index: the store that the records belong to.
        records: labelled scans.
        inference: overlap and batch size of the windows.
        distances: whether to compute HD and HD95, too.
    """
    values = index.label_values
    lookup = class_lookup(values)
    for record in records:
        whole = np.array([(0, size) for size in record.shape])
        volume = open_volume(index.store, record).read(whole)
        target = lookup[open_label(index.store, record).read(whole)]
        scaling = (index.hu_window, record.mean_hu, record.std_hu)
        prediction = segment(
            model,
            normalise(volume, *scaling),
            meta["patch_size"],
            meta["task"],
            air=float(normalise(np.array(AIR), *scaling)),
            overlap=inference.overlap,
            batch_size=inference.batch_size,
        )
        organs = {organ: values.index(v) + 1 for organ, v in index.labels.items() if v in record.labelled}
        scores = organ_metrics(prediction, target, organs, record.spacing_mm, meta["task"], distances)
        rows = [{"scan_id": record.scan_id, "organ": organ, **score} for organ, score in scores.items()]
        yield Scored(record, prediction, rows)


def _choose(config: EvaluateConfig, meta: dict[str, Any], index: Index) -> list[ScanRecord]:
    """The scans to evaluate on.

    Raises:
        ValueError: none, or the store's labels or HU window are not the run's.
    """
    if not index.labels:
        raise ValueError(f"index={config.index} holds no labels: prepare it from a source with label maps")
    for name, ours, theirs in (
        ("labels", meta["labels"], index.labels),
        ("hu_window", list(meta["hu_window"]), list(index.hu_window)),
    ):
        if ours != theirs:
            raise ValueError(f"run={config.run} was trained with {name} {ours}, index={config.index} has {theirs}")
    records = index.labelled(config.split)[: config.num_scans]
    if not records:
        splits = sorted({record.split for record in index.scans if record.labelled})
        raise ValueError(f"index={config.index} has no labelled scan in split={config.split!r}; it has: {splits}")
    return records


# -- results ----------------------------------------------------------------------------------------------------------


def _write_prediction(folder: Path, scored: Scored, index: Index) -> None:
    """Label values as NIfTI on the stored grid."""
    values = np.array([0, *index.label_values], np.min_scalar_type(max(index.label_values)))
    image = nib.Nifti1Image(values[scored.prediction], np.array(scored.record.affine).reshape(4, 4))
    image.header.set_xyzt_units("mm")
    folder.mkdir(exist_ok=True)
    packed = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    write_aside(folder / f"{scored.record.scan_id}.nii.gz", packed)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    write_aside(path, sink.getvalue())


def table(summary: dict[str, Any]) -> str:
    """The summary as text: a line per organ, and their mean."""
    lines = [f"{'organ':<28}{'dice':>7}{'iou':>7}{'hd_mm':>8}{'hd95_mm':>9}{'scans':>7}{'missed':>8}{'invented':>10}"]
    for organ, scores in [*summary["organs"].items(), ("mean of organs", summary)]:
        numbers = [_text(scores[name], *shape) for name, shape in zip(SCORES, ((7, 3), (7, 3), (8, 1), (9, 1)))]
        counts = (("num_scans", 7), ("num_missed", 8), ("num_invented", 10))
        numbers += [f"{scores[name]:>{width}}" for name, width in counts if name in scores]
        lines.append(f"{organ[:27]:<28}{''.join(numbers)}")
    return "\n".join(lines)


def _text(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def describe(result: Result) -> str:
    """The closing line."""
    dice = _text(result.summary["dice"], 0, 4)
    return f"evaluate: mean dice {dice} on {result.summary['num_scans']} scans; results in {result.folder}"


def main() -> None:
    command("evaluate", EvaluateConfig, run, describe)


if __name__ == "__main__":
    main()
