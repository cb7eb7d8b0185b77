"""The plan and the renderers: what a batch holds depends only on (seed, epoch, scan, draw)."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pgl_ray.config import IntensityConfig, PatchConfig, PretrainConfig, StreamConfig, ViewsConfig, build
from pgl_ray.data import render_costs, rendering, scan_files, store, stream
from pgl_ray.data.array_reader import UnreadableScan
from pgl_ray.data.batch_views import finish, resize_and_flip
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.patch_renderer import PatchRenderer
from pgl_ray.data.render_cache import region_of
from pgl_ray.data.rendering import normalise
from pgl_ray.train import skipped

VIEWS = ViewsConfig(size=(8, 24, 16))


@pytest.fixture(scope="module")
def small_store(tmp_path_factory) -> str:
    """Five scans of noise over a ramp, three of them labelled with the values 2 and 7."""
    return write_store(tmp_path_factory.mktemp("store"))


def write_store(folder: Path, **settings) -> str:
    rng = np.random.default_rng(0)
    for i in range(5):
        shape = (14 + i, 50, 44 + i)
        volume = (rng.normal(0, 20, shape) + np.linspace(-800, 300, shape[1])[None, :, None]).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        label[4:8, 10:20, 10:20], label[6:10, 30:44, 20:30] = 2, 7
        known = (2, 7) if i < 2 else (2,)
        options = {"label": label, "labelled": known} if i < 3 else {}
        scan_files.write_scan(
            folder, f"scan_{i}", volume, np.diag([3.0, 1, 1, 1]), split="train", **options, **settings
        )
    store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0), encoding=settings.get("encoding", "int16"))
    return str(folder)


def make_plan(**changes) -> stream.Plan:
    values = {"draws_per_scan": 2, "global_batch_size": 4, "epochs": 4, "max_steps": None, "seed": 3} | changes
    return stream.Plan.make([f"scan_{i}" for i in range(5)], **values)


def test_every_scan_is_drawn_equally_often_and_epochs_differ():
    plan = make_plan()
    assert plan.num_steps == 4 * 5 * 2 // 4
    rows = np.concatenate(list(plan.batches(0)))
    assert len({tuple(r) for r in rows}) == len(rows) == 40
    for epoch in range(4):
        of_epoch = rows[rows[:, 0] == epoch]
        assert sorted(map(tuple, of_epoch[:, 1:])) == [(s, d) for s in range(5) for d in range(2)]
    assert not np.array_equal(rows[:10, 1:], rows[10:20, 1:])


def test_a_plan_continued_is_the_rest_of_the_plan():
    plan = make_plan()
    whole = list(plan.batches(0))
    for start in (1, 2, 7):
        for a, b in zip(plan.batches(start), whole[start:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_are_those_of_a_walk_row_by_row():
    """Against the plain definition: epoch by epoch, a permutation each, cut into batches."""
    plan = make_plan(draws_per_scan=3)
    line = [
        (epoch, *divmod(place, 3)) for epoch in range(4) for place in np.random.default_rng((3, epoch)).permutation(15)
    ]
    assert plan.rows(0, plan.num_steps).tolist() == [list(row) for row in line[: plan.num_steps * 4]]
    columns = plan.columns(3, 6)
    assert columns["step"].tolist() == np.repeat([3, 4, 5], 4).tolist()
    np.testing.assert_array_equal(np.stack([columns[c] for c in ("epoch", "scan", "draw")], 1), plan.rows(3, 6))


def test_a_long_plan_costs_no_more_than_a_short_one():
    """10,000 scans x 500 epochs: the last steps come as fast as the first of a small plan, and nothing accumulates."""
    ids = [f"scan_{i}" for i in range(10_000)]
    plan = stream.Plan.make(ids, 1, 128, epochs=500, max_steps=None, seed=0)
    plan.rows(0, 1), plan.rows(plan.num_steps - 1, plan.num_steps)
    tracemalloc.start()
    for step in range(plan.num_steps - 100, plan.num_steps):
        assert plan.rows(step, step + 1).shape == (128, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_run_killed_again_and_again_draws_the_undisturbed_list():
    """Mid-epoch, each start with another number of workers, from the last checkpoint on: what a checkpoint holds
    counts, what was drawn behind it is drawn again, the same."""
    plan = make_plan(draws_per_scan=3, global_batch_size=6, epochs=7)
    undisturbed = [tuple(row) for row in plan.rows(0, plan.num_steps).tolist()]
    assert len(set(undisturbed)) == len(undisturbed) == plan.num_steps * 6
    done, committed = [], 0
    for num_workers, killed_at in ((1, 4), (3, 8), (2, 11), (6, plan.num_steps)):
        del done[committed * 6 :]
        for rows in itertools.islice(plan.batches(committed), killed_at - committed):
            parts = np.split(rows, num_workers)  # block k of a step goes to worker k
            assert {len(part) for part in parts} == {6 // num_workers}
            done += [tuple(row) for part in parts for row in part.tolist()]
        committed = killed_at - killed_at % 3 if killed_at < plan.num_steps else killed_at  # a checkpoint every 3 steps
    assert done == undisturbed


def test_too_short_a_plan_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=64"):
        make_plan(global_batch_size=64, epochs=1)


def test_one_pair_per_region_is_the_plan_there_always_was():
    plan = make_plan()
    assert plan.identity == "a862fe9563042d21"  # runs begun before there were regions go on
    assert hashlib.sha256(np.concatenate(list(plan.batches(0))).tobytes()).hexdigest()[:16] == "d2c0a8c87decf15a"
    assert make_plan(pairs_per_region=2).identity != plan.identity


@pytest.mark.parametrize(("scans", "share"), [(100, 8), (37, 4), (7, 3)])
def test_regions_are_mixed(scans, share):
    """Every row once per epoch; the rows of a region lie near one another, yet among those of 16 to 31 regions."""
    plan = stream.Plan.make([f"s{i}" for i in range(scans)], 2 * share, 16, 3, None, 0, share)
    for epoch in range(2):
        order = plan.order(epoch)
        assert sorted(order) == list(range(scans * 2 * share))
        regions, most = order // share, 31 * share
        assert max(np.ptp(np.flatnonzero(regions == region)) for region in set(regions)) < most
        batches = [set(part) for part in np.split(regions, range(16, len(regions), 16)) if len(part) == 16]
        assert min(map(len, batches)) >= 3
    assert not np.array_equal(plan.order(0), plan.order(1))


def index_rows(rows: np.ndarray) -> dict:
    return {"step": np.zeros(len(rows), np.int64), "epoch": rows[:, 0], "scan": rows[:, 1], "draw": rows[:, 2]}


def test_pairs_do_not_depend_on_their_batch(small_store):
    ids = tuple(f"scan_{i}" for i in range(5))
    renderer = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig())
    rows = np.concatenate(list(make_plan().batches(0)))[:6]
    together = renderer(index_rows(rows))
    order = [4, 1, 3]
    apart = renderer(index_rows(rows[order]))
    for name in ("view_1", "view_2", "box_1", "box_2", "flip_1", "flip_2"):
        np.testing.assert_array_equal(together[name][order], apart[name])
    assert together["view_1"].shape == (6, 1, 8, 24, 16) and together["view_1"].dtype == np.float16
    assert np.isfinite(together["view_1"]).all()
    assert not np.array_equal(together["view_1"], together["view_2"])


def test_any_pair_can_be_built_again_bit_for_bit(small_store):
    """From (scan_id, epoch, draw), the index and the seed, deformations and ablations included."""
    ids = tuple(f"scan_{i}" for i in range(5))
    kinds = (
        PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig()),
        PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), shared_box=True, deform=True),
    )
    for renderer in kinds:
        batch = renderer(index_rows(np.concatenate(list(make_plan().batches(0)))[:8]))
        for i in (0, 3, 7):
            again = renderer.rebuild(ids[batch["scan"][i]], int(batch["epoch"][i]), int(batch["draw"][i]))
            for name in set(batch) - {"step"}:
                np.testing.assert_array_equal(again[name][0], batch[name][i], err_msg=name)
    assert set(batch) - {"deformed_1", "deformed_2"} == {
        *("step", "epoch", "scan", "draw", "missed", "view_1", "view_2", "box_1", "box_2", "flip_1", "flip_2")
    }
    np.testing.assert_array_equal(batch["box_1"], batch["box_2"])
    plain = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), shared_box=True)
    np.testing.assert_array_equal(plain.rebuild("scan_2", 1, 0)["view_1"], kinds[1].rebuild("scan_2", 1, 0)["view_1"])


def test_a_view_shows_what_its_prior_says(small_store):
    """Without intensity operations a view's mid-line along H is the scan's ramp at the coordinates of the box."""
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    renderer = PairRenderer(small_store, ("scan_0",), 3, VIEWS, off)
    rows = np.array([[epoch, 0, 0] for epoch in range(8)])
    batch = renderer(index_rows(rows))
    record = store.read_index(small_store).scans[0]
    ramp = np.linspace(-800, 300, 50)
    for i in range(8):
        start, stop = batch["box_1"][i, 1]
        at = start + (np.arange(24) + 0.5) / 24 * (stop - start) - 0.5  # voxel index of the view's voxel centres
        at = 2 * (start + stop) / 2 - 1 - at if batch["flip_1"][i, 1] else at
        expected = (np.interp(at, np.arange(50), ramp) - record.mean_hu) / record.std_hu
        got = batch["view_1"][i, 0].astype(np.float64).mean((0, 2))
        inside = (at > 0.5) & (at < 48.5)
        np.testing.assert_allclose(got[inside], expected[inside], atol=0.05)


@pytest.mark.parametrize("foreground", [False, True])
def test_pairs_of_a_region(tmp_path, foreground):
    """They lie in one region of whole chunks, are what the whole scan shows there, and depend on nothing but (epoch,
    scan, draw)."""
    small_store = write_store(tmp_path, chunk=(4, 8, 6))
    views = ViewsConfig(size=(4, 16, 12), foreground=foreground)
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    ids = tuple(f"scan_{i}" for i in range(5))
    renderer = PairRenderer(small_store, ids, 3, views, off, pairs_per_region=4)
    rows = np.array([[e, s, d] for e in range(2) for s in range(5) for d in range(8)])
    rows = np.random.default_rng(0).permutation(rows)
    batch = renderer(index_rows(rows))
    region_of.cache_clear()
    again = renderer(index_rows(rows[::-1]))
    index, starts = store.read_index(small_store), set()
    for name in batch:
        np.testing.assert_array_equal(again[name][::-1], batch[name])
    for key in {(e, s, d // 4) for e, s, d in rows.tolist()}:
        of_key = (rows[:, 0] == key[0]) & (rows[:, 1] == key[1]) & (rows[:, 2] // 4 == key[2])
        boxes = np.concatenate([batch["box_1"][of_key], batch["box_2"][of_key]])
        low, high = boxes[..., 0].min(0), boxes[..., 1].max(0)
        starts.add(tuple(low))
        most = np.array([8, 32, 24]) + np.where(high > index.scans[key[1]].shape - np.array([4, 8, 6]), (3, 7, 5), 0)
        assert len(boxes) == 8 and (high - low <= most).all()
        assert len({box.tobytes() for box in boxes}) > 4
    assert len(starts) > 10
    for i in range(0, len(rows), 7):
        record = index.scans[rows[i, 1]]
        volume = zarr.open_array(f"{small_store}/scans/{record.scan_id}/0", mode="r")[:]
        for view in ("1", "2"):
            cut = volume[tuple(slice(*axis) for axis in batch["box_" + view][i])]
            assert cut.shape == tuple(np.ptp(batch["box_" + view][i], axis=1))
            plain = normalise(cut, index.hu_window, record.mean_hu, record.std_hu)
            expected = resize_and_flip(plain, views.size, batch["flip_" + view][i].astype(bool))
            np.testing.assert_allclose(batch["view_" + view][i, 0], expected, atol=2e-3, rtol=2e-3)


def test_regions_of_scans_smaller_than_a_crop(small_store):
    """The region is the scan along such an axis, and crops reach beyond it as they always do."""
    ids, views = tuple(f"scan_{i}" for i in range(5)), ViewsConfig(size=(16, 48, 16))
    batch = PairRenderer(small_store, ids, 3, views, IntensityConfig(), pairs_per_region=8)(
        index_rows(np.array([[0, s, d] for s in range(5) for d in range(8)]))
    )
    assert np.isfinite(batch["view_1"]).all()
    assert (batch["box_1"][:, 0, 0] < 0).any() and (batch["box_1"][:, 1, 1] >= 50).all()
    assert (batch["box_1"][:, 2, 0] >= 0).all()


def test_pairs_per_region_divides_pairs_per_scan():
    with pytest.raises(ValueError, match=r"stream\.pairs_per_region=8 must divide pairs_per_scan=4"):
        build(PretrainConfig, {"index": "i", "run": "r", "pairs_per_scan": 4, "stream": {"pairs_per_region": 8}})


def test_patches_carry_classes_and_what_is_labelled(small_store):
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    ids = tuple(f"scan_{i}" for i in range(3))
    renderer = PatchRenderer(small_store, ids, 3, PatchConfig(size=(8, 24, 16)), off, 1.0)
    batch = renderer(index_rows(np.array([[e, s, 0] for e in range(6) for s in range(3)])))
    assert set(np.unique(batch["target"])) == {0, 1, 2}  # label values 2 and 7
    assert batch["labelled"][:3].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert (batch["target"] > 0).any((1, 2, 3, 4)).all()  # foreground_share=1: an organ in every patch
    drawn_only = renderer(index_rows(np.array([[e, 2, d] for e in range(6) for d in range(2)])))
    assert (drawn_only["target"] == 1).any((1, 2, 3, 4)).all()  # and one that is annotated


def test_augmenting_on_the_training_device_gives_the_same_views(small_store):
    """Both routes from the same rows: what differs is float16's rounding before instead of behind the operations."""
    ids = tuple(f"scan_{i}" for i in range(5))
    often = IntensityConfig(noise_prob=0.5, blur_prob=0.5, blur_sigma=(0.3, 1.0))
    rows = index_rows(np.concatenate(list(make_plan().batches(0))))
    there = PairRenderer(small_store, ids, 3, VIEWS, often)(rows)
    left = PairRenderer(small_store, ids, 3, VIEWS, often, augment=False)(rows)
    assert not np.array_equal(there["view_1"], left["view_1"])
    left = {name: torch.from_numpy(value) for name, value in left.items()}
    done = finish(left, VIEWS.size, often, (-1024.0, 325.0))
    for view in ("view_1", "view_2"):
        got, expected = done[view].numpy(), there[view].astype(np.float32)
        assert got.dtype == np.float32
        assert np.abs(got - expected).max() < 0.03 and np.abs(got - expected).mean() < 1e-3
    for name in ("box_1", "box_2", "flip_1", "flip_2", "epoch", "scan", "draw"):
        np.testing.assert_array_equal(done[name].numpy(), there[name])
    assert finish(there, VIEWS.size, often, (-1024.0, 325.0)) is there


@pytest.mark.parametrize("encoding", ["int16", "uint8"])
@pytest.mark.parametrize("per_region", [1, 4])
def test_resizing_on_the_training_device_gives_the_same_views(tmp_path, encoding, per_region):
    """Scans smaller than a crop, whose boxes reach into the air, included."""
    folder, views = write_store(tmp_path, chunk=(4, 8, 6), encoding=encoding), ViewsConfig(size=(14, 24, 16))
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    options = {"views": views, "intensity": off, "augment": False, "pairs_per_region": per_region}
    rows = index_rows(np.concatenate(list(make_plan(draws_per_scan=4).batches(0))))
    there = PairRenderer(folder, tuple(f"scan_{i}" for i in range(5)), 3, **options)(rows)
    left = PairRenderer(folder, tuple(f"scan_{i}" for i in range(5)), 3, resize=False, **options)(rows)
    assert left["crop_1"].dtype == encoding and left["crop_1"].shape[1:] == (1, 19, 33, 22)
    assert (left["box_1"][:, 0, 0] < 0).any()
    left = {name: torch.from_numpy(value) for name, value in left.items()}
    done = finish(left, views.size, off, (-1024.0, 325.0))
    for view in ("view_1", "view_2"):
        assert done[view].dtype == torch.float32
        np.testing.assert_allclose(done[view].numpy(), there[view].astype(np.float32), atol=2e-3, rtol=2e-3)
    for name in there.keys() - {"view_1", "view_2"}:
        np.testing.assert_array_equal(done[name].numpy(), there[name])


def test_memory_of_a_batch_is_used_again_once_nobody_holds_it(small_store):
    """Not while somebody holds a row, a tensor or an Arrow column of it; and nothing of the earlier batch shows."""
    import pyarrow as pa

    plan = make_plan()
    ids = plan.scan_ids
    rows = [index_rows(batch) for batch in itertools.islice(plan.batches(0), 4)]
    for change in ({"augment": True}, {"augment": False, "resize": False}):
        render = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), **change)
        name = "view_1" if render.resize else "crop_1"
        held, copies = [], []
        for each, hold in zip(rows, (lambda a: a, lambda a: a[2], torch.from_numpy, lambda a: pa.array(a.reshape(-1)))):
            batch = render(each)
            held.append(hold(batch[name]))
            copies.append({key: value.copy() for key, value in batch.items()})
        del batch
        for part, copy in zip(held, copies):
            whole = copy[name][2] if np.shape(part) == copy[name].shape[1:] else copy[name]
            np.testing.assert_array_equal(np.asarray(part).reshape(-1), whole.reshape(-1))
        del held, part
        first = render(rows[0])[name].ctypes.data
        again = [render(each) for each in rows[1:2]]
        assert again[0][name].ctypes.data == first
        for key, value in again[0].items():
            np.testing.assert_array_equal(value, copies[1][key])


def cut(small_store, tmp_path, scan_id: str) -> str:
    """A copy of the store with one shard cut off after its chunk index was read by nobody yet."""
    broken = tmp_path / "broken"
    shutil.copytree(small_store, broken)
    shard = broken / f"scans/{scan_id}/0/c/0/0/0"
    shard.write_bytes(b"\0" * 100 + shard.read_bytes()[100:])  # the first chunk
    return str(broken)


def test_a_damaged_scan_ends_the_stream_or_is_skipped_counted(small_store, tmp_path):
    ids = tuple(f"scan_{i}" for i in range(5))
    broken = cut(small_store, tmp_path, "scan_2")
    rows = index_rows(make_plan().rows(0, 5))
    whole = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig())(rows)
    with pytest.raises(RuntimeError, match=r"volume of scan 'scan_2' is damaged in chunk \(0, 0, 0\)"):
        PairRenderer(broken, ids, 3, VIEWS, IntensityConfig())(rows)
    got = PairRenderer(broken, ids, 3, VIEWS, IntensityConfig(), skip=True)(rows)
    bad = got["missed"] >= 0
    assert set(got["missed"][bad]) == {2} and bad.sum() == (rows["scan"] == 2).sum() == 4
    for name in set(whole) - {"missed"}:
        np.testing.assert_array_equal(got[name][~bad], whole[name][~bad], err_msg=name)
        assert got[name].shape == whole[name].shape
    sound = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig())
    for i in np.flatnonzero(bad):  # the same draw of the next scan, whatever else is in the batch
        other = sound.rebuild("scan_3", int(rows["epoch"][i]), int(rows["draw"][i]))
        for name in set(whole) - {"missed", "step"}:
            np.testing.assert_array_equal(got[name][i], other[name][0], err_msg=name)
        single = {name: value[i : i + 1] for name, value in rows.items()}
        single = PairRenderer(broken, ids, 3, VIEWS, IntensityConfig(), skip=True)(single)
        for name in set(whole):
            np.testing.assert_array_equal(single[name][0], got[name][i], err_msg=name)
    np.testing.assert_array_equal(rows["scan"], make_plan().rows(0, 5)[:, 1])  # Ray's own columns are left alone
    only = PairRenderer(broken, ("scan_2",), 3, VIEWS, IntensityConfig(), skip=True)
    with pytest.raises(UnreadableScan, match="scan_2"):
        only({name: np.zeros(1, np.int64) for name in rows})


def test_a_disk_that_fails_while_reading_is_named(small_store, monkeypatch):
    """EIO after the file was opened: the scan and the chunk, and no other error counts as a broken scan."""
    reader = scan_files.open_volume(small_store, store.read_index(small_store).scans[0])

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(UnreadableScan, match=r"'scan_0' cannot be read at chunk \(0, 0, 0\) \(Input/output error"):
            reader.read(np.array([(0, 4), (0, 4), (0, 4)]))
    monkeypatch.setattr(rendering, "render", fail)
    with pytest.raises(OSError, match="Input/output"):
        renderer = PairRenderer(small_store, ("scan_0",), 3, VIEWS, IntensityConfig(), skip=True)
        renderer({name: np.zeros(1, np.int64) for name in ("step", "epoch", "scan", "draw")})


def test_skipped_pairs_are_counted_and_bounded(tmp_path):
    plan = make_plan()
    assert (plan.global_batch_size, plan.rows_per_epoch) == (4, 10)
    counter = skipped.Skipped(plan, StreamConfig(on_error="skip", max_skipped_share=0.2), {})
    counter.add(torch.tensor([-1, -1, 3, -1]))
    assert counter.share(1, str(tmp_path)) == (1 / 4, None)  # a quarter so far, but a tenth of an epoch
    counter.add(torch.tensor([-1, -1, -1, -1]))
    assert counter.share(2, str(tmp_path)) == (1 / 8, None)
    assert json.loads((tmp_path / "skipped.json").read_text()) == {"scan_3": 1}
    counter = skipped.Skipped(plan, counter.config, dict(counter.rows))  # another start of the workers
    counter.add(torch.tensor([3, 1, -1, -1]))
    share, why = counter.share(3, str(tmp_path))
    assert share == 3 / 12
    assert "25.0%" in why and "stream.max_skipped_share=0.2" in why and "scan_3, scan_1" in why


def test_what_counts_skipped_pairs_keeps_no_batch():
    """A column of a batch that came through Ray is a part of its block in the object store."""
    counter = skipped.Skipped(make_plan(), StreamConfig(), {})
    missed = torch.full((4,), -1)
    reference = weakref.ref(missed)
    counter.add(missed)
    del missed
    assert reference() is None and counter.waiting == []


@pytest.mark.parametrize("per_region", [1, 4])
def test_stages_and_bytes_are_measured(small_store, per_region):
    """Bytes: against the chunks that the boxes touch, counted from zarr's own shard index."""
    ids = tuple(f"scan_{i}" for i in range(5))
    renderer = PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), pairs_per_region=per_region)
    plan = make_plan(draws_per_scan=4, pairs_per_region=per_region)
    rows = index_rows(plan.rows(0, 5))
    costs = render_costs.measure(renderer, rows)
    names = {"draw", "read", "decode", "resize", "intensity", "bytes_read", "crop_bytes"}
    assert set(costs) == names | {"place", "place_requests", "place_bytes"}
    assert costs["place_requests"] == 0 and costs["place_bytes"] == costs["bytes_read"]
    assert all(np.isfinite(value) and value >= 0 for value in costs.values())
    batch = renderer(rows)
    lengths = np.concatenate([batch[name][..., 1] - batch[name][..., 0] for name in ("box_1", "box_2")])
    assert costs["crop_bytes"] == 2 * lengths.prod(-1).sum() / 20
    if per_region == 1:
        volumes = {i: scan_files.open_volume(small_store, store.read_index(small_store).scans[i]) for i in range(5)}
        total = 0
        for i, scan in enumerate(batch["scan"]):
            reader, touched = volumes[scan], set()
            for name in ("box_1", "box_2"):
                box = np.clip(batch[name][i], 0, np.array(reader.shape)[:, None])
                first, last = box[:, 0] // reader.chunk, (box[:, 1] - 1) // reader.chunk
                touched |= set(itertools.product(*(range(a, b + 1) for a, b in zip(first, last, strict=True))))
            footer = next(iter(Path(small_store, f"scans/scan_{scan}").rglob("0/c/0/0/0"))).read_bytes()
            grid = [-(-n // c) for n, c in zip(reader.shape, reader.chunk, strict=True)]
            sizes = np.frombuffer(footer[-4 - 16 * np.prod(grid) : -4], "<u8").reshape(*grid, 2)[..., 1]
            total += sum(int(sizes[place]) for place in touched)
        assert costs["bytes_read"] == total / 20
    quiet = render_costs.measure(replace(renderer, augment=False), rows)
    assert quiet["intensity"] == 0


def test_a_batch_too_large_for_the_object_store_is_named(monkeypatch, small_store):
    """The bytes of a row are those of its columns of voxels."""
    import ray

    renderer = PairRenderer(small_store, ("scan_0",), 3, VIEWS, IntensityConfig())
    columns = renderer({name: np.array([0]) for name in ("step", "epoch", "scan", "draw")})
    assert renderer.row_bytes == columns["view_1"].nbytes + columns["view_2"].nbytes
    cut = replace(renderer, resize=False, augment=False)
    columns = cut({name: np.array([0]) for name in ("step", "epoch", "scan", "draw")})
    assert cut.row_bytes == columns["crop_1"].nbytes + columns["crop_2"].nbytes
    have = {"object_store_memory": float(2**30), "CPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    assert stream.too_large(2**30 // 17, 2) is None  # three tasks, and seven blocks for each worker
    text = "of 1.0 GiB is too small for the stream's 17 blocks of 100 MiB: some will go over the disk; raise"
    assert f"{text} ray.object_store_mb to 1701 or lower global_batch_size" in stream.too_large(100 * 2**20, 2)
