"""Segmentations of labelled scans, scored: what evaluation and the validation of a fine-tuning have in common."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from pgl_ray.config import InferenceConfig
from pgl_ray.data.rendering import AIR, normalise
from pgl_ray.data.scan_files import open_label, open_source_label, open_volume
from pgl_ray.data.store import Index, ScanRecord, class_lookup
from pgl_ray.files.resample import onto_grid
from pgl_ray.model.inference import TooLittleMemory, segment
from pgl_ray.model.metrics import organ_metrics
from pgl_ray.model.segmenter import LightSegmenter, Segmenter


class Scored(NamedTuple):
    """One scan's result.

    Attributes:
        record: the scan.
        prediction: uint8 [D, H, W], class indices.
        affine: [4, 4], of the prediction's voxels.
        rows: one per organ labelled in the scan: scan_id, organ, and what `organ_metrics` gives.
    """

    record: ScanRecord
    prediction: np.ndarray
    affine: np.ndarray
    rows: list[dict[str, Any]]


def score_scans(
    model: Segmenter | LightSegmenter,
    task: Literal["multiclass", "binary"],
    patch_size: tuple[int, int, int],
    index: Index,
    records: list[ScanRecord],
    inference: InferenceConfig,
    distances: bool = True,
    flips: bool = False,
    own_grid: bool = False,
) -> Iterator[Scored]:
    """Segments and scores scans one by one; fine-tuning validates with it.

    Args:
        model: in eval mode, on the device to compute on.
        task: binary or multiclass, see `segment`.
        patch_size: (D, H, W) of its windows.
        index: the store that the records belong to.
        records: labelled scans.
        inference: overlap and batch size of the windows, and the network's precision.
        distances: whether to compute HD and HD95, too.
        flips: whether to average over all flips of a window.
        own_grid: of a resampled store, score on each scan's own grid instead of the stored one.

    Raises:
        TooLittleMemory: names the scan, and what to take of evaluate's keys.
    """
    values = index.label_values
    lookup = class_lookup(values)
    for record in records:
        whole = np.array([(0, size) for size in record.shape])
        volume = open_volume(index.store, record).read(whole)
        scaling = (index.hu_window, record.mean_hu, record.std_hu)
        try:
            prediction = segment(
                model,
                normalise(volume, *scaling),
                patch_size,
                task,
                air=float(normalise(np.array(AIR), *scaling)),
                overlap=inference.overlap,
                batch_size=inference.batch_size,
                flips=flips,
                precision=inference.precision,
            )
        except TooLittleMemory as error:
            raise TooLittleMemory(f"scan {record.scan_id}: {error.what}", error.mend) from None
        affine, reader = np.array(record.affine).reshape(4, 4), open_label(index.store, record)
        if own_grid and record.source_label_metadata is not None:
            stored, affine = affine, np.array(record.source_affine).reshape(4, 4)
            reader = open_source_label(index.store, record)
            prediction = onto_grid(prediction, stored, affine, reader.shape)
        target = lookup[reader.read(np.array([(0, size) for size in reader.shape]))]
        organs = {organ: values.index(v) + 1 for organ, v in index.labels.items() if v in record.labelled}
        scores = organ_metrics(prediction, target, organs, affine[:3, :3], task, distances)
        rows = [{"scan_id": record.scan_id, "organ": organ, **score} for organ, score in scores.items()]
        yield Scored(record, prediction, affine, rows)
