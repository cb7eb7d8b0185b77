"""Rows of the plan -> pairs of views with their priors, in Ray Data's tasks or anywhere."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import chunks, rendering, wire
from pgl_ray.data.array_reader import UnreadableScan
from pgl_ray.data.intensity_ops import INTENSITY_NUMBERS, Intensity, apply_intensity, sample_intensities
from pgl_ray.data.random_numbers import generator, uniforms
from pgl_ray.data.regions import sample_pairs_in, sample_regions
from pgl_ray.data.render_cache import (
    AtHand,
    chunk_shape,
    fetch_boxes,
    index_of,
    part_reader,
    reader_of_region,
    recycled,
    volume_reader,
)
from pgl_ray.data.rendering import AIR, read_all_padded, to_half
from pgl_ray.data.sampling import PAIR_NUMBERS, largest_crop, sample_pairs
from pgl_ray.data.store import Index
from pgl_ray.paths import is_url

SUBSTITUTES = 32  # scans that are tried in the place of one that cannot be read


class Drawn(NamedTuple):
    """What was drawn for the rows of a batch.

    Attributes:
        rows: of the plan.
        scan_ids: [B].
        region: int64 [B, 3, 2]; none: the whole scans.
        box, flip: int64 [B, 2, 3, 2] and bool [B, 2, 3], the two priors.
        intensity, noise_seed: float64 [B, 2, 4] and int64 [B, 2], as in `intensity_ops.Intensity`.
    """

    rows: dict[str, np.ndarray]
    scan_ids: list[str]
    region: np.ndarray | None
    box: np.ndarray
    flip: np.ndarray
    intensity: np.ndarray
    noise_seed: np.ndarray

    def part(self, i: int) -> tuple[str, np.ndarray | None]:
        """Scan and region of row i."""
        return self.scan_ids[i], None if self.region is None else self.region[i]


@dataclass(frozen=True)
class PairRenderer:
    """Index rows -> pairs of views with their priors.

    The batch has view_1, view_2 float16 [B, 1, D, H, W]; box_1, box_2 int32 [B, 3, 2] in the scan frame; flip_1,
    flip_2 uint8 [B, 3]; with `deform` also deformed_1, deformed_2, like the views; step, epoch, scan, draw int64 [B] of
    the pair that is shown; and missed int64 [B], see `skip`. `finish` does what is left to do on the training device.

    Attributes:
        store, scan_ids, seed, views, intensity: what is cropped, and how.
        shared_box: both views of a pair show one crop.
        deform: whether there are also views with Models Genesis' deformations. The views are the same either way.
        augment: do the intensity operations here; otherwise their parameters come along, intensity_1, intensity_2
            float32 [B, 4] and noise_seed_1, noise_seed_2 int64 [B].
        resize: resize and flip here; otherwise there are crop_1, crop_2 [B, 1, d, h, w] of the stored type (int16 HU,
            or 8-bit codes) instead of the views, each in the first corner of an array as large as the largest crop, 0
            beyond it, and scaling float32 [B, 2], the scan's mean and standard deviation in HU. Not with `augment`.
        skip: a row whose scan cannot be read shows the same draw of the next scan that can, in the plan's order,
            instead of raising, whatever else is in the batch; missed is that scan's number, and -1 in all other rows.
        pairs_per_region: draws in turn that share a region of their scan; 1: each is drawn from the whole scan.
    """

    store: str
    scan_ids: Sequence[str]
    seed: int
    views: ViewsConfig
    intensity: IntensityConfig
    shared_box: bool = False
    deform: bool = False
    augment: bool = True
    resize: bool = True
    skip: bool = False
    pairs_per_region: int = 1

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of (step, epoch, scan, draw) -> the same with their views; see the top of the class."""
        num, drawn, index = len(rows["step"]), self.draw(rows), index_of(self.store)
        out = dict(rows) | {"missed": np.full(num, -1)}
        if not self.resize:
            scaling = [index.numbers(name, drawn.scan_ids) for name in ("mean_hu", "std_hu")]
            out["scaling"] = np.stack(scaling, -1).astype(np.float32)
        for k, view in enumerate(("1", "2")):
            out["box_" + view], out["flip_" + view] = (
                drawn.box[:, k].astype(np.int32),
                drawn.flip[:, k].astype(np.uint8),
            )
            if self.resize:
                out["view_" + view] = recycled("view_" + view, (num, 1, *self.views.size), np.float16)
            else:
                stored = np.dtype(json.loads(index.by_id[drawn.scan_ids[0]].array_metadata)["data_type"])
                out["crop_" + view] = recycled("crop_" + view, (num, 1, *largest_crop(self.views)), stored)
            if self.deform:
                out["deformed_" + view] = recycled("deformed_" + view, out["view_" + view].shape, np.float16)
            if not self.augment:
                out["intensity_" + view] = drawn.intensity[:, k].astype(np.float32)
                out["noise_seed_" + view] = drawn.noise_seed[:, k]
        unread = []
        order = self.in_turn(drawn)
        with closing(self._readers(order, drawn)) as readers:
            for i, reader in zip(order, readers, strict=True):
                try:
                    (self._render if self.resize else self._cut)(i, drawn, out, reader())
                except UnreadableScan:
                    if not self.skip:
                        raise
                    unread.append(i)
        if unread:
            out |= {name: column.copy() for name, column in rows.items()}  # the caller's are left as they are
            volume_reader.cache_clear()  # an open file may be what fails
        for i in unread:
            instead = self._instead({name: column[i : i + 1] for name, column in rows.items()})
            for name in out.keys() - {"step", "missed"}:
                out[name][i] = instead[name][0]
            out["missed"][i] = rows["scan"][i]
        return out

    def in_turn(self, drawn: Drawn) -> list[int]:
        """Rows as they are rendered: pairs of a region one after the other, while it lies in the processor's cache."""
        order = list(range(len(drawn.scan_ids)))
        if drawn.region is not None:
            order.sort(key=lambda i: (drawn.scan_ids[i], drawn.region[i].tolist()))
        return order

    def _readers(self, order: list[int], drawn: Drawn) -> Iterator[Callable[[], Any]]:
        """For each row in order what gives the reader of its voxels, fetched ahead where the store is far."""
        codes = not self.resize

        def near(ready: Callable[[], AtHand], i: int) -> Any:
            fetched = ready()
            return fetched if drawn.region is None else part_reader(self.store, *drawn.part(i), codes)

        if not is_url(self.store):
            yield from (partial(part_reader, self.store, *drawn.part(i), codes) for i in order)
            return
        with closing(self.fetched(order, drawn)) as coming:
            for rows, ready in coming:
                yield from (partial(near, ready, i) for i in rows)

    def fetched(self, order: list[int], drawn: Drawn) -> Iterator[tuple[list[int], Callable[[], AtHand]]]:
        """Rows that read the same, in order, and what waits for the stored bytes that they read; those of the next ones
        are fetched meanwhile."""
        codes = not self.resize
        chunks.lookup(self.store)  # once, and not in every thread

        def fetch(rows: list[int]) -> AtHand:
            scan_id, region = drawn.part(rows[0])
            if region is not None:
                return reader_of_region(self.store, scan_id, tuple(region.ravel().tolist()), codes)
            return fetch_boxes(volume_reader(self.store, scan_id, codes), drawn.box[rows[0]])

        def read_by(i: int) -> object:
            scan_id, region = drawn.part(i)
            return i if region is None else (scan_id, *region.ravel().tolist())

        together = [list(rows) for _, rows in groupby(order, read_by)]
        with closing(wire.ahead(fetch, together)) as coming:
            yield from zip(together, coming, strict=True)

    def _instead(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one row that shows the same draw of the next scan that can be read.

        Raises:
            UnreadableScan: of the last of SUBSTITUTES scans that cannot be read, either.
        """
        tries = min(SUBSTITUTES, len(self.scan_ids))
        for further in range(1, tries + 1):
            try:
                return replace(self, skip=False)({**row, "scan": (row["scan"] + further) % len(self.scan_ids)})
            except UnreadableScan:
                if further == tries:
                    raise
        raise AssertionError("there is at least one scan")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's voxels, at most."""
        size = self.views.size if self.resize else largest_crop(self.views)
        return 2 * 2 * math.prod(size) * (2 if self.deform else 1)

    def draw(self, rows: dict[str, np.ndarray], index: Index | None = None) -> Drawn:
        """All that is random of some rows but Genesis' deformations.

        Args:
            rows: of the plan.
            index: where it is known; none: the store's.
        """
        scan_ids, key = [self.scan_ids[scan] for scan in rows["scan"].tolist()], (self.seed, rows["epoch"])
        index = index or index_of(self.store)
        shape, body = index.numbers("shape", scan_ids), None
        if self.views.foreground:
            body = index.numbers("foreground_box", scan_ids).reshape(-1, 3, 2)
        u = uniforms(*key, scan_ids, rows["draw"], PAIR_NUMBERS + 2 * INTENSITY_NUMBERS)
        of_pair, of_views = np.split(u, [PAIR_NUMBERS], axis=1)
        region = None
        if self.pairs_per_region == 1:
            box, flip = sample_pairs(of_pair, shape, self.views, body, self.shared_box)
        else:
            of_region = uniforms(*key, scan_ids, rows["draw"] // self.pairs_per_region, 3, of=1)
            by_id = index.by_id
            chunk = np.array([chunk_shape(by_id[scan_id].array_metadata) for scan_id in scan_ids])
            region = sample_regions(of_region, shape, chunk, self.views, body)
            box, flip = sample_pairs_in(region, of_pair, self.views, body, self.shared_box)
        of_views = of_views.reshape(-1, 2, INTENSITY_NUMBERS)
        return Drawn(rows, scan_ids, region, box, flip, *sample_intensities(of_views, self.intensity))

    def _render(self, i: int, drawn: Drawn, out: dict[str, np.ndarray], reader: Any) -> None:
        """Views of row i."""
        index = index_of(self.store)
        crops = read_all_padded(reader, drawn.box[i], AIR)
        scan, rng = index.by_id[drawn.scan_ids[i]], None
        for k, crop in enumerate(crops):
            view = rendering.render(crop, self.views.size, drawn.flip[i, k], index.hu_window, scan.mean_hu, scan.std_hu)
            if self.augment:
                (std, *others), seed = drawn.intensity[i, k].tolist(), int(drawn.noise_seed[i, k])
                view = apply_intensity(view, Intensity(std, seed, *others))
            target = out[f"view_{k + 1}"][i, 0]
            to_half(view, target)
            if self.deform:
                from pgl_ray.data.deform import deform  # takes MONAI, whose import costs every process five seconds

                rng = rng or generator(self.seed, int(drawn.rows["epoch"][i]), scan.scan_id, int(drawn.rows["draw"][i]))
                out[f"deformed_{k + 1}"][i, 0] = deform(target.astype(np.float32), rng)

    def _cut(self, i: int, drawn: Drawn, out: dict[str, np.ndarray], reader: Any) -> None:
        """Crops of row i, as they are stored."""
        window = index_of(self.store).hu_window
        air = (
            AIR if out["crop_1"].dtype == np.int16 else round(255 * (max(AIR, window[0]) - window[0]) / np.ptp(window))
        )
        for k, crop in enumerate(read_all_padded(reader, drawn.box[i], air)):
            target, (depth, height, width) = out[f"crop_{k + 1}"][i, 0], crop.shape
            target[:depth, :height, :width] = crop
            target[depth:], target[:depth, height:], target[:depth, :height, width:] = 0, 0, 0

    def rebuild(self, scan_id: str, epoch: int, draw: int) -> dict[str, np.ndarray]:
        """One pair of a run again, bit for bit, with its priors: a batch of one row.

        Args:
            scan_id: one of `scan_ids`.
            epoch, draw: as recorded with the pair.
        """
        row = {"step": 0, "epoch": epoch, "scan": self.scan_ids.index(scan_id), "draw": draw}
        return self({name: np.array([value]) for name, value in row.items()})
