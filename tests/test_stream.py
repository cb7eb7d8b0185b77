"""The plan and the renderers: what a batch holds depends on (seed, epoch, scan, draw) alone."""

import numpy as np
import pytest

from pgl_ray.config import DeformConfig, IntensityConfig, PatchConfig, ViewsConfig
from pgl_ray.data import kernels, store, stream

VIEWS = ViewsConfig(size=(8, 24, 16))


@pytest.fixture(scope="module")
def small_store(tmp_path_factory) -> str:
    """Five scans of noise over a ramp, three of them labelled with the values 2 and 7."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for i in range(5):
        shape = (14 + i, 50, 44 + i)
        volume = (rng.normal(0, 20, shape) + np.linspace(-800, 300, shape[1])[None, :, None]).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        label[4:8, 10:20, 10:20], label[6:10, 30:44, 20:30] = 2, 7
        known = (2, 7) if i < 2 else (2,)
        kept = {"label": label, "labelled": known} if i < 3 else {}
        store.write_scan(folder, f"scan_{i}", volume, np.diag([3.0, 1, 1, 1]), split="train", **kept)
    store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0))
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


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_blocks_are_worker_batches_in_step_order(workers):
    plan = make_plan()
    blocks = plan.blocks(2, workers)
    assert [b["step"][0].as_py() for b in blocks] == [s for s in range(2, 10) for _ in range(workers)]
    assert {b.num_rows for b in blocks} == {4 // workers}
    got = np.concatenate([np.stack([b[c].to_numpy() for c in ("epoch", "scan", "draw")], 1) for b in blocks])
    np.testing.assert_array_equal(got, np.concatenate(list(plan.batches(2))))


def test_too_short_a_plan_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=64"):
        make_plan(global_batch_size=64, epochs=1)


def index_rows(rows: np.ndarray) -> dict:
    return {"step": np.zeros(len(rows), np.int64), "epoch": rows[:, 0], "scan": rows[:, 1], "draw": rows[:, 2]}


def test_pairs_do_not_depend_on_their_batch(small_store):
    ids = tuple(f"scan_{i}" for i in range(5))
    renderer = stream.PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig())
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
        stream.PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig()),
        stream.PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), shared_box=True, deform=DeformConfig()),
    )
    for renderer in kinds:
        batch = renderer(index_rows(np.concatenate(list(make_plan().batches(0)))[:8]))
        for i in (0, 3, 7):
            again = renderer.rebuild(ids[batch["scan"][i]], int(batch["epoch"][i]), int(batch["draw"][i]))
            for name in set(batch) - {"step"}:
                np.testing.assert_array_equal(again[name][0], batch[name][i], err_msg=name)
    assert set(batch) - {"deformed_1", "deformed_2"} == {
        *("step", "epoch", "scan", "draw", "view_1", "view_2", "box_1", "box_2", "flip_1", "flip_2")
    }
    np.testing.assert_array_equal(batch["box_1"], batch["box_2"])
    plain = stream.PairRenderer(small_store, ids, 3, VIEWS, IntensityConfig(), shared_box=True)
    np.testing.assert_array_equal(plain.rebuild("scan_2", 1, 0)["view_1"], kinds[1].rebuild("scan_2", 1, 0)["view_1"])


def test_a_view_shows_what_its_prior_says(small_store):
    """Without intensity operations a view's mid-line along H is the scan's ramp at the coordinates of the box."""
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    renderer = stream.PairRenderer(small_store, ("scan_0",), 3, VIEWS, off)
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


def test_without_the_compiled_kernels_the_views_are_the_same(small_store, monkeypatch):
    """To half a float16 step of either side; priors exactly."""
    rows = index_rows(np.concatenate(list(make_plan().batches(0)))[:8])
    renderer = stream.PairRenderer(small_store, tuple(f"scan_{i}" for i in range(5)), 3, VIEWS, IntensityConfig())
    fast = renderer(rows)
    monkeypatch.setattr(kernels, "load", lambda: None)
    plain = renderer(rows)
    for name in fast:
        near = 2e-3 if name.startswith("view") else 0
        np.testing.assert_allclose(fast[name].astype(np.float64), plain[name], atol=near, rtol=near, err_msg=name)


def test_patches_carry_classes_and_what_is_labelled(small_store):
    off = IntensityConfig(noise_prob=0, blur_prob=0, gain_prob=0, gamma_prob=0)
    ids = tuple(f"scan_{i}" for i in range(3))
    renderer = stream.PatchRenderer(small_store, ids, 3, PatchConfig(size=(8, 24, 16)), off, 1.0)
    batch = renderer(index_rows(np.array([[e, s, 0] for e in range(6) for s in range(3)])))
    assert set(np.unique(batch["target"])) == {0, 1, 2}  # label values 2 and 7
    assert batch["labelled"][:3].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert (batch["target"] > 0).any((1, 2, 3, 4)).all()  # foreground_share=1: an organ in every patch
