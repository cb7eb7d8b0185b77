"""Rows of the plan -> labelled patches for fine-tuning."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pgl_ray.config import IntensityConfig, PatchConfig
from pgl_ray.data import chunks, rendering, wire
from pgl_ray.data.intensity_ops import Intensity, apply_intensity, sample_intensity
from pgl_ray.data.random_numbers import generator
from pgl_ray.data.render_cache import fetch_boxes, index_of, label_reader, recycled, volume_reader
from pgl_ray.data.rendering import AIR, read_all_padded, read_padded, resize_labels, to_half
from pgl_ray.data.sampling import centred_start, sample_prior
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import class_lookup
from pgl_ray.paths import is_url
from pgl_ray.prior import Prior


@dataclass(frozen=True)
class PatchRenderer:
    """Index rows -> labelled patches, augmented as the views (paper, Sec. 5.1).

    The batch has patch float16 [B, 1, D, H, W], target uint8 [B, 1, D, H, W] of class indices (0 = background, k = the
    k-th label value), labelled uint8 [B, num_classes] (1 where the class is annotated in the scan), and the row's
    step, epoch, scan, draw.
    """

    store: str
    scan_ids: Sequence[str]
    seed: int
    patch: PatchConfig
    intensity: IntensityConfig
    foreground_share: float

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of (step, epoch, scan, draw) -> the same with their patches; see the top of the class."""
        index = index_of(self.store)
        values = index.label_values
        lookup = class_lookup(values)
        num, size = len(rows["step"]), self.patch.size
        out = dict(rows)
        out["patch"] = recycled("patch", (num, 1, *size), np.float16)
        out["target"] = recycled("target", (num, 1, *size), np.uint8)
        out["labelled"] = np.empty((num, len(values) + 1), np.uint8)
        records = [index.by_id[self.scan_ids[scan]] for scan in rows["scan"].tolist()]
        drawn = []
        for i, record in enumerate(records):
            rng = generator(self.seed, int(rows["epoch"][i]), record.scan_id, int(rows["draw"][i]))
            drawn.append((record.scan_id, self._prior(rng, record), sample_intensity(rng, self.intensity)))
        with closing(self._readers(drawn)) as readers:
            for i, (record, (_, prior, params), ready) in enumerate(zip(records, drawn, readers, strict=True)):
                volume, labels = ready()
                (crop,) = read_all_padded(volume, [prior.box], AIR)
                crop = rendering.render(crop, size, prior.flip, index.hu_window, record.mean_hu, record.std_hu)
                classes = lookup[read_padded(labels, prior.box, 0)]
                to_half(apply_intensity(crop, params), out["patch"][i, 0])
                out["target"][i, 0] = resize_labels(classes, size, prior.flip)
                out["labelled"][i] = [1, *(value in record.labelled for value in values)]
        return out

    def _readers(self, drawn: list[tuple[str, Prior, Intensity]]) -> Iterator[Callable[[], Sequence[Any]]]:
        """For each patch in turn what gives the readers of its voxels and labels, fetched ahead where the store is
        far."""

        def readers(one: tuple[str, Prior, Intensity]) -> Sequence[Any]:
            return volume_reader(self.store, one[0]), label_reader(self.store, one[0])

        def fetch(one: tuple[str, Prior, Intensity]) -> Sequence[Any]:
            return [fetch_boxes(reader, [one[1].box]) for reader in readers(one)]

        if not is_url(self.store):
            return (partial(readers, one) for one in drawn)
        chunks.lookup(self.store)  # once, and not in every thread
        return wire.ahead(fetch, drawn)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's voxels."""
        return 3 * math.prod(self.patch.size)

    def _prior(self, rng: np.random.Generator, record: ScanRecord) -> Prior:
        """A crop as the views', or with `foreground_share` one whose middle lies in an annotated organ's box."""
        prior = sample_prior(rng, record.shape, self.patch, record.foreground_box)
        centred = rng.random() < self.foreground_share
        boxes = sorted((value, box) for value, box in record.label_boxes.items() if value in record.labelled)
        if not centred or not boxes:
            return prior
        length = prior.box[:, 1] - prior.box[:, 0]
        start = centred_start(rng, boxes[rng.integers(len(boxes))][1], record.shape, length)
        return Prior(np.stack([start, start + length], -1), prior.flip)
