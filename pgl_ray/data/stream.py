"""Ray Data streams of view pairs and patches: one (step, epoch, scan, draw) plan, streamed once, resumable at any step.

Every block is one worker's batch, so nothing is re-cut on the way; block k of a step goes to worker k. A row depends
on (seed, epoch, scan, draw) alone, never on the number of workers, on arrival order or on restarts.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pgl_ray import ray_internals
from pgl_ray.config import IntensityConfig, PatchConfig, ViewsConfig
from pgl_ray.data import chunks, rendering, wire
from pgl_ray.data.array_reader import ArrayReader, Chunks, UnreadableScan
from pgl_ray.data.batch_views import apply_intensities, render_each
from pgl_ray.data.columns import Names
from pgl_ray.data.hu_codes import hu_of_codes
from pgl_ray.data.intensity_ops import (
    INTENSITY_NUMBERS,
    Intensity,
    apply_intensity,
    sample_intensities,
    sample_intensity,
)
from pgl_ray.data.place import is_far
from pgl_ray.data.random_numbers import generator, uniforms
from pgl_ray.data.regions import Region, sample_pairs_in, sample_regions
from pgl_ray.data.rendering import read_all_padded, read_padded, resize_and_flip
from pgl_ray.data.sampling import PAIR_NUMBERS, centred_start, largest_crop, sample_pairs, sample_prior
from pgl_ray.data.scan_files import open_label, open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.shard import chunk_of
from pgl_ray.data.store import Index, class_lookup, read_index
from pgl_ray.prior import Prior

if TYPE_CHECKING:
    from ray.data import Dataset

AIR = -1024  # HU outside a scan
ABOUT_ROWS = frozenset(("step", "epoch", "scan", "draw", "missed"))  # columns that no network sees
BLOCKS_AHEAD = 256  # blocks of rows laid out at a time, by a task of 1 CPU: Ray Data's repartition takes no less
BLOCKS_TAKEN = 6  # that a worker has at a time: five in the buffers of prefetch_batches=2, and one that is trained on
SUBSTITUTES = 32  # scans that are tried in the place of one that cannot be read
REGIONS_MIXED = 16  # regions whose pairs are shuffled with one another; up to 31 at an epoch's end


@dataclass(frozen=True)
class Plan:
    """Which scan is drawn at which step.

    All epochs' shuffled rows stand in one line that is cut into global batches, so no scan is dropped at an epoch's
    end, and a batch may hold the end of one epoch and the start of the next. What the last whole batch leaves over
    (less than one batch in the entire run) is not drawn.

    Attributes:
        scan_ids: the scans, in a fixed order.
        draws_per_scan: rows per scan and epoch.
        global_batch_size: rows per step over all workers.
        num_steps: length of the run.
        seed: of order and rows.
        pairs_per_region: rows in turn that share a region of their scan; divides `draws_per_scan`.
    """

    scan_ids: Sequence[str]
    draws_per_scan: int
    global_batch_size: int
    num_steps: int
    seed: int
    pairs_per_region: int = 1

    @classmethod
    def make(
        cls,
        scan_ids: Sequence[str],
        draws_per_scan: int,
        global_batch_size: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        pairs_per_region: int = 1,
    ) -> "Plan":
        """Plan for `max_steps` steps, or for `epochs` passes where that is none.

        Raises:
            ValueError: not even one step.
        """
        steps = max_steps or epochs * len(scan_ids) * draws_per_scan // global_batch_size
        if not steps:
            raise ValueError(
                f"{epochs} epochs of {len(scan_ids)} scans x {draws_per_scan} draws do not fill one batch of "
                f"global_batch_size={global_batch_size}: lower it or raise epochs"
            )
        return cls(Names(scan_ids), draws_per_scan, global_batch_size, steps, seed, pairs_per_region)

    @property
    def identity(self) -> str:
        """Hash of all that decides which row is drawn when; a run that continues must have the same."""
        text = repr(self).replace(", pairs_per_region=1)", ")")  # as it was before there were regions
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def rows_per_epoch(self) -> int:
        """Scans times draws."""
        return len(self.scan_ids) * self.draws_per_scan

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step * self.global_batch_size / self.rows_per_epoch

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the steps `start` to `stop`: int64 [(stop - start) * global_batch_size, 3] of (epoch, scan number,
        draw). No step costs more than another, wherever in the run it stands."""
        at = np.arange(start * self.global_batch_size, stop * self.global_batch_size)
        epoch, place = np.divmod(at, self.rows_per_epoch)
        order = np.empty_like(at)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            order[here] = self.order(e)[place[here]]
        return np.stack([epoch, *np.divmod(order, self.draws_per_scan)], -1)

    def batches(self, start: int) -> Iterator[np.ndarray]:
        """Global batches from step `start` on: int64 [global_batch_size, 3] of (epoch, scan number, draw)."""
        return (self.rows(step, step + 1) for step in range(start, self.num_steps))

    def columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What renderers are given of the steps `start` to `stop`: step, epoch, scan, draw, int64 [rows]."""
        epoch, scan, draw = self.rows(start, stop).T
        step = np.repeat(np.arange(start, stop), self.global_batch_size)
        return {"step": step, "epoch": epoch, "scan": scan, "draw": draw}

    def order(self, epoch: int) -> np.ndarray:
        """An epoch's rows (scan number * draws_per_scan + draw) as they are drawn, int64 [rows_per_epoch].

        Where rows share regions, those of REGIONS_MIXED regions at a time are shuffled, so that a process that renders
        some of them can keep their regions.
        """
        return _order(self.seed, epoch, self.rows_per_epoch, self.pairs_per_region)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int, pairs_per_region: int) -> np.ndarray:
    rng = np.random.default_rng((seed, epoch))
    if pairs_per_region == 1:
        return rng.permutation(num_rows)
    regions = rng.permutation(num_rows // pairs_per_region)
    rows = regions[:, None] * pairs_per_region + np.arange(pairs_per_region)
    cuts = np.arange(REGIONS_MIXED, len(rows) - REGIONS_MIXED + 1, REGIONS_MIXED)
    return np.concatenate([rng.permutation(part.reshape(-1)) for part in np.split(rows, cuts)])


def dataset(
    plan: Plan, render: Callable[[dict], dict], num_workers: int, start: int, num_cpus: float, stop: int | None = None
) -> "Dataset":
    """A Ray Dataset of rendered batches from step `start` on: block k of a step is worker k's batch.

    Called in Ray Train's controller at every start of a worker group; what the driver set in its DataContext does not
    reach there, so it is set here. The plan is laid out as the stream goes on, `BLOCKS_AHEAD` blocks of rows at a time:
    nothing grows with the length of the run but one row of two numbers per `BLOCKS_AHEAD` blocks.

    Args:
        plan: what to draw.
        render: index columns -> columns of a batch; picklable.
        num_workers: workers the blocks go to in turn; every one gets as many.
        start: first step.
        num_cpus: Ray CPUs of one rendering task.
        stop: step to end before; none: the plan's end.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a block is a batch: never split it
    room = ray.cluster_resources().get("object_store_memory", 0) / 2  # workers hold blocks, too
    ray_internals.bound_blocks(context, LayOut, BLOCKS_AHEAD, _num_tasks() + num_workers, room)
    stride = max(1, BLOCKS_AHEAD // num_workers)
    stop = min(stop or plan.num_steps, plan.num_steps)
    segments = [{"start": at, "stop": min(at + stride, stop)} for at in range(start, stop, stride)]
    segments = ray.data.from_items(segments, override_num_blocks=len(segments))  # from_arrow would take a task for each
    rows = segments.map_batches(LayOut(plan), batch_size=None)
    # Ray fuses this with the line above, as their CPUs agree, and neither with the renderer: a block, a rendering task
    rows = rows.repartition(target_num_rows_per_block=plan.global_batch_size // num_workers)
    return rows.map_batches(render, batch_size=None, num_cpus=num_cpus, compute=ray.data.TaskPoolStrategy(_num_tasks()))


def _num_tasks() -> int:
    """Rendering tasks at a time. Each takes less than a CPU, to fit in beside the workers on small nodes; more tasks
    than CPUs would cost a fifth."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)


def too_large(block_bytes: int, num_workers: int) -> str | None:
    """What to say where the cluster's object stores are too small for the blocks that are under way; none: they are
    not. What finds no room in them goes over the disk.

    Args:
        block_bytes: of a worker's batch.
        num_workers: of the run.
    """
    import ray

    have, num = ray.cluster_resources().get("object_store_memory", 0), _num_tasks() + (1 + BLOCKS_TAKEN) * num_workers
    if num * block_bytes <= have:
        return None
    return (
        f"Ray's object store of {have / 2**30:.1f} GiB is too small for the stream's {num} blocks of "
        f"{block_bytes / 2**20:.0f} MiB: some will go over the disk; raise ray.object_store_mb to "
        f"{num * block_bytes // 2**20 + 1} or lower global_batch_size"
    )


@dataclass(frozen=True)
class LayOut:
    """First and past-the-last step -> their rows; a class of its own because Ray names its operator after it."""

    plan: Plan

    def __call__(self, segment: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows of some steps."""
        (start,), (stop,) = segment["start"].tolist(), segment["stop"].tolist()
        return self.plan.columns(start, stop)


# -- renderers: run in Ray Data's tasks -------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _index(store: str) -> Index:
    read = partial(read_index, store)
    return wire.patiently(read, store) if is_far(store) else read()


@lru_cache(maxsize=256)
def volume_reader(store: str, scan_id: str, codes: bool = False) -> ArrayReader:
    """A scan's volume [D, H, W], opened; `codes`: as it is stored, not in HU."""
    found = chunks.lookup(store)(scan_id, "volume")
    return open_volume(store, _index(store).by_id[scan_id], codes, found)


@lru_cache(maxsize=256)
def _label(store: str, scan_id: str) -> ArrayReader:
    found = chunks.lookup(store)(scan_id, "label")
    return open_label(store, _index(store).by_id[scan_id], found)


@lru_cache(maxsize=4096)
def _chunk(array_metadata: str) -> tuple[int, int, int]:
    return chunk_of(json.loads(array_metadata))


@lru_cache(maxsize=2 * REGIONS_MIXED)
def region_of(store: str, scan_id: str, box: tuple[int, ...], codes: bool) -> Region:
    """A region of a scan, kept while its pairs are drawn: int16, 2.4 MB for views of 16x96x96."""
    bounds, volume = np.reshape(box, (3, 2)), volume_reader(store, scan_id, codes)
    near = reader_of_region(store, scan_id, box, codes) if volume.far else volume
    return Region(near.read_boxes([bounds])[0], tuple(bounds[:, 0].tolist()), volume.shape)


class AtHand(NamedTuple):
    """What reads boxes of an array whose stored bytes are here already.

    Attributes:
        reader: of the array.
        chunks: those that the boxes touch.
    """

    reader: ArrayReader
    chunks: Chunks

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.reader.shape

    def read_boxes(self, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As ArrayReader's."""
        return self.reader.read_boxes(boxes, chunks=self.chunks)


def _fetch(reader: ArrayReader, boxes: Sequence[np.ndarray]) -> AtHand:
    """Brings what boxes touch here, as far as they lie inside the array."""
    shape = np.asarray(reader.shape)[:, None]
    return AtHand(reader, reader.fetch([np.clip(box, 0, shape) for box in boxes]))


@lru_cache(maxsize=2 * REGIONS_MIXED)
def reader_of_region(store: str, scan_id: str, box: tuple[int, ...], codes: bool) -> AtHand:
    """As long as its region is kept, lest it be fetched again."""
    reader, places = _fetch(volume_reader(store, scan_id, codes), [np.reshape(box, (3, 2))])
    return AtHand(reader, {place: memoryview(bytes(data)) for place, data in places.items()})  # of more than that


def _reader(store: str, scan_id: str, region: np.ndarray | None, codes: bool = False) -> ArrayReader | Region:
    """What reads a scan's voxels, or those of its region alone."""
    if region is None:
        return volume_reader(store, scan_id, codes)
    return region_of(store, scan_id, tuple(region.ravel().tolist()), codes)


_kept: dict[str, list[np.ndarray]] = {}


def _recycled(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that an earlier batch had under this name, as it was left, if nobody holds it any more; else a new one.
    New memory costs a page fault every 4 KB, dear on virtual machines. For one thread: Ray's tasks have one."""
    kept = _kept.setdefault(name, [])
    for i in range(len(kept)):
        if kept[i].shape == shape and kept[i].dtype == dtype and sys.getrefcount(kept[i]) == 2:
            return kept[i]
    kept[:] = [np.empty(shape, dtype), *kept[:1]]
    return kept[0]


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
        torch.set_num_threads(1)  # one task per core already
        num, drawn, index = len(rows["step"]), self.draw(rows), _index(self.store)
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
                out["view_" + view] = _recycled("view_" + view, (num, 1, *self.views.size), np.float16)
            else:
                stored = np.dtype(json.loads(index.by_id[drawn.scan_ids[0]].array_metadata)["data_type"])
                out["crop_" + view] = _recycled("crop_" + view, (num, 1, *largest_crop(self.views)), stored)
            if self.deform:
                out["deformed_" + view] = _recycled("deformed_" + view, out["view_" + view].shape, np.float16)
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
            shown = self._instead({name: column[i : i + 1] for name, column in rows.items()})
            for name in out.keys() - {"step", "missed"}:
                out[name][i] = shown[name][0]
            out["missed"][i] = rows["scan"][i]
        return out

    def in_turn(self, drawn: "Drawn") -> list[int]:
        """Rows as they are rendered: pairs of a region one after the other, while it lies in the processor's cache."""
        order = list(range(len(drawn.scan_ids)))
        if drawn.region is not None:
            order.sort(key=lambda i: (drawn.scan_ids[i], drawn.region[i].tolist()))
        return order

    def _readers(self, order: list[int], drawn: "Drawn") -> Iterator[Callable[[], Any]]:
        """For each row in order what gives the reader of its voxels, fetched ahead where the store is far."""
        codes = not self.resize

        def near(ready: Callable[[], AtHand], i: int) -> Any:
            fetched = ready()
            return fetched if drawn.region is None else _reader(self.store, *drawn.part(i), codes)

        if not is_far(self.store):
            yield from (partial(_reader, self.store, *drawn.part(i), codes) for i in order)
            return
        with closing(self.fetched(order, drawn)) as coming:
            for rows, ready in coming:
                yield from (partial(near, ready, i) for i in rows)

    def fetched(self, order: list[int], drawn: "Drawn") -> Iterator[tuple[list[int], Callable[[], AtHand]]]:
        """Rows that read the same, in order, and what waits for the stored bytes that they read; those of the next ones
        are fetched meanwhile."""
        codes = not self.resize
        chunks.lookup(self.store)  # once, and not in every thread

        def fetch(rows: list[int]) -> AtHand:
            scan_id, region = drawn.part(rows[0])
            if region is not None:
                return reader_of_region(self.store, scan_id, tuple(region.ravel().tolist()), codes)
            return _fetch(volume_reader(self.store, scan_id, codes), drawn.box[rows[0]])

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

    def draw(self, rows: dict[str, np.ndarray], index: Index | None = None) -> "Drawn":
        """All that is random of some rows but Genesis' deformations.

        Args:
            rows: of the plan.
            index: where it is known; none: the store's.
        """
        scan_ids, key = [self.scan_ids[scan] for scan in rows["scan"].tolist()], (self.seed, rows["epoch"])
        index = index or _index(self.store)
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
            chunk = np.array([_chunk(by_id[scan_id].array_metadata) for scan_id in scan_ids])
            region = sample_regions(of_region, shape, chunk, self.views, body)
            box, flip = sample_pairs_in(region, of_pair, self.views, body, self.shared_box)
        of_views = of_views.reshape(-1, 2, INTENSITY_NUMBERS)
        return Drawn(rows, scan_ids, region, box, flip, *sample_intensities(of_views, self.intensity))

    def _render(self, i: int, drawn: "Drawn", out: dict[str, np.ndarray], reader: Any) -> None:
        """Views of row i."""
        index = _index(self.store)
        crops = read_all_padded(reader, drawn.box[i], AIR)
        scan, rng = index.by_id[drawn.scan_ids[i]], None
        for k, crop in enumerate(crops):
            view = rendering.render(crop, self.views.size, drawn.flip[i, k], index.hu_window, scan.mean_hu, scan.std_hu)
            if self.augment:
                (std, *others), seed = drawn.intensity[i, k].tolist(), int(drawn.noise_seed[i, k])
                view = apply_intensity(view, Intensity(std, seed, *others))
            shown = out[f"view_{k + 1}"][i, 0]
            torch.from_numpy(shown).copy_(view)  # numpy's cast is slow
            if self.deform:
                from pgl_ray.data.deform import deform  # takes MONAI, whose import costs every process five seconds

                rng = rng or generator(self.seed, int(drawn.rows["epoch"][i]), scan.scan_id, int(drawn.rows["draw"][i]))
                out[f"deformed_{k + 1}"][i, 0] = deform(torch.from_numpy(shown.astype(np.float32)), rng)

    def _cut(self, i: int, drawn: "Drawn", out: dict[str, np.ndarray], reader: Any) -> None:
        """Crops of row i, as they are stored."""
        window = _index(self.store).hu_window
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
        threads = torch.get_num_threads()
        batch = self({name: np.array([value]) for name, value in row.items()})
        torch.set_num_threads(threads)
        return batch


def measure(renderer: PairRenderer, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """What the stages of rendering cost on one core, by leaving out one after the other.

    Args:
        renderer: is called as it is, and without its intensity operations.
        rows: of the plan, in its order, so that pairs share regions as they will.

    Returns:
        CPU ms per pair: draw (priors), read (bytes of the chunks that are touched, from the page cache where they are
        in it), decode, resize (window, z-score, resize, flip; or what it takes to put crops into a batch), intensity;
        bytes_read, crop_bytes per pair (of the stored type); place, the wall ms per pair that one process waits for
        those bytes alone; and place_requests, place_bytes per pair: where the store is far, with what lies between.
    """
    num, codes = len(rows["step"]), not renderer.resize
    drawn = renderer.draw(rows)

    def fetch() -> tuple[int, list[tuple[int, int]]]:
        done, requests, seen = 0, [], set()
        for i, boxes in enumerate(drawn.box):
            scan_id, region = drawn.part(i)
            reader = volume_reader(renderer.store, scan_id)
            if region is not None:
                key = scan_id, region.tobytes()
                boxes = [] if key in seen else [region]
                seen.add(key)
            shape = np.asarray(reader.shape)[:, None]
            found = reader.fetch([np.clip(box, 0, shape) for box in boxes])
            done += sum(map(len, found.values()))
            requests += wire.joined(reader.spans(found)) if reader.far else []
        return done, requests

    def read() -> None:
        for i, boxes in enumerate(drawn.box):
            read_all_padded(_reader(renderer.store, *drawn.part(i), codes), boxes, AIR if not codes else 0)

    def fetch_ahead() -> None:
        for _, ready in renderer.fetched(renderer.in_turn(drawn), drawn):
            ready()

    seconds = {}
    stages = {"draw": partial(renderer.draw, rows), "fetch": fetch, "read": read}
    stages |= {"plain": partial(replace(renderer, augment=False), rows), "whole": partial(renderer, rows)}
    for name, work in stages.items():
        work()  # opens files, compiles
        region_of.cache_clear(), reader_of_region.cache_clear()
        began = time.process_time()
        work()
        seconds[name] = time.process_time() - began
    reader_of_region.cache_clear()
    began = time.perf_counter()
    fetch_ahead() if is_far(renderer.store) else fetch()
    costs = {"place": time.perf_counter() - began}
    itemsize = volume_reader(renderer.store, drawn.scan_ids[0]).stored_dtype.itemsize
    done, requests = fetch()
    costs |= {
        "draw": seconds["draw"],
        "read": seconds["fetch"],
        "decode": seconds["read"] - seconds["fetch"],
        "resize": seconds["plain"] - seconds["read"] - seconds["draw"],
        "intensity": seconds["whole"] - seconds["plain"] if renderer.augment else 0.0,
    }
    return {name: max(0.0, 1000 * cost / num) for name, cost in costs.items()} | {
        "bytes_read": done / num,
        "place_requests": len(requests) / num,
        "place_bytes": (sum(length for _, length in requests) or done) / num,
        "crop_bytes": int((drawn.box[..., 1] - drawn.box[..., 0]).prod(-1).sum()) * itemsize / num,
    }


def finish(
    batch: dict[str, torch.Tensor], size: tuple[int, int, int], intensity: IntensityConfig, hu_window: Sequence[float]
) -> dict[str, torch.Tensor]:
    """What the renderer of a batch left to do, where the batch's tensors lie; the views are the same to float16's
    rounding.

    Args:
        batch: of a PairRenderer.
        size: P (D, H, W), of the views.
        intensity: its ranges.
        hu_window: of the store.
    """
    done = {}
    for view in ("1", "2"):
        if "crop_" + view in batch:
            crops, prior = batch["crop_" + view], (batch["box_" + view], batch["flip_" + view])
            if crops.dtype == torch.uint8:
                crops = _hu_of_codes(tuple(hu_window), crops.device)[crops.int()]
            done["view_" + view] = render_each(crops, *prior, size, hu_window, batch["scaling"])
        if "intensity_" + view in batch:
            params = batch["intensity_" + view], batch["noise_seed_" + view]
            views = done.get("view_" + view, batch.get("view_" + view))
            done["view_" + view] = apply_intensities(views, *params, intensity.blur_sigma[1])
    return batch | done if done else batch


@lru_cache(maxsize=4)
def _hu_of_codes(hu_window: tuple[float, float], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(hu_of_codes(hu_window)).to(device)


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
        torch.set_num_threads(1)
        index = _index(self.store)
        values = index.label_values
        lookup = class_lookup(values)
        num, size = len(rows["step"]), self.patch.size
        out = dict(rows)
        out["patch"] = _recycled("patch", (num, 1, *size), np.float16)
        out["target"] = _recycled("target", (num, 1, *size), np.uint8)
        out["labelled"] = np.empty((num, len(values) + 1), np.uint8)
        found = [index.by_id[self.scan_ids[scan]] for scan in rows["scan"].tolist()]
        drawn = []
        for i, record in enumerate(found):
            rng = generator(self.seed, int(rows["epoch"][i]), record.scan_id, int(rows["draw"][i]))
            drawn.append((record.scan_id, self._prior(rng, record), sample_intensity(rng, self.intensity)))
        with closing(self._readers(drawn)) as readers:
            for i, (record, (_, prior, params), ready) in enumerate(zip(found, drawn, readers, strict=True)):
                volume, labels = ready()
                (crop,) = read_all_padded(volume, [prior.box], AIR)
                crop = rendering.render(crop, size, prior.flip, index.hu_window, record.mean_hu, record.std_hu)
                classes = lookup[read_padded(labels, prior.box, 0)].astype(np.float32)
                torch.from_numpy(out["patch"][i, 0]).copy_(apply_intensity(crop, params))
                out["target"][i, 0] = resize_and_flip(classes, size, prior.flip, "nearest-exact").numpy()
                out["labelled"][i] = [1, *(value in record.labelled for value in values)]
        return out

    def _readers(self, drawn: list[tuple[str, Prior, Intensity]]) -> Iterator[Callable[[], Sequence[Any]]]:
        """For each patch in turn what gives the readers of its voxels and labels, fetched ahead where the store is
        far."""

        def readers(one: tuple[str, Prior, Intensity]) -> Sequence[Any]:
            return volume_reader(self.store, one[0]), _label(self.store, one[0])

        def fetch(one: tuple[str, Prior, Intensity]) -> Sequence[Any]:
            return [_fetch(reader, [one[1].box]) for reader in readers(one)]

        if not is_far(self.store):
            return (partial(readers, one) for one in drawn)
        chunks.lookup(self.store)  # once, and not in every thread
        return wire.ahead(fetch, drawn)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's voxels."""
        return 3 * math.prod(self.patch.size)

    def _prior(self, rng: np.random.Generator, record: ScanRecord) -> Prior:
        """A crop as the views', or with `foreground_share` one whose middle lies in a random organ's box."""
        prior = sample_prior(rng, record.shape, self.patch, record.foreground_box)
        centred = rng.random() < self.foreground_share
        boxes = sorted(record.label_boxes.items())
        if not centred or not boxes:
            return prior
        length = prior.box[:, 1] - prior.box[:, 0]
        start = centred_start(rng, boxes[rng.integers(len(boxes))][1], record.shape, length)
        return Prior(np.stack([start, start + length], -1), prior.flip)
