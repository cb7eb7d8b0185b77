"""The stream through Ray Data: what reaches which worker, and how much of it lies about."""

import time

import numpy as np
import pytest

from pgl_ray.data import stream

pytestmark = pytest.mark.cluster


def plan_of(num_scans: int, batch: int = 12, **changes) -> stream.Plan:
    limits = {"epochs": 500, "max_steps": None, "seed": 1} | changes
    return stream.Plan.make([f"scan_{i}" for i in range(num_scans)], 1, batch, **limits)


def take(plan: stream.Plan, num_workers: int, start: int, num_steps: int) -> list[dict]:
    """The first steps of a stream, as one consumer gets the workers' batches in turn."""

    def mark(rows: dict) -> dict:  # instead of rendering; in here, so that Ray's tasks need not import the tests
        num = len(rows["step"])
        return rows | {"block": np.full(num, num), "view": np.zeros((num, 50_000), np.float16)}

    data = stream.dataset(plan, mark, num_workers, start, 0.5)
    batches, size = [], plan.global_batch_size // num_workers
    for batch in data.iterator().iter_torch_batches(batch_size=size, prefetch_batches=2, drop_last=True):
        batches.append({name: batch[name].numpy() for name in ("step", "epoch", "scan", "draw", "block")})
        if len(batches) == num_steps * num_workers:
            break
    return batches


def test_one_two_and_three_workers_see_the_same_pairs_per_step(ray_cluster):
    plan = plan_of(10_000)
    for num_workers in (1, 2, 3):
        batches = take(plan, num_workers, 5, 6)
        assert [set(b["step"].tolist()) for b in batches] == [{s} for s in range(5, 11) for _ in range(num_workers)]
        assert {n for b in batches for n in b["block"].tolist()} == {12 // num_workers}  # one block, one batch
        rows = np.concatenate([np.stack([b[c] for c in ("epoch", "scan", "draw")], 1) for b in batches])
        np.testing.assert_array_equal(rows, plan.rows(5, 11))


def test_the_rate_does_not_fall_with_the_length_of_the_index(ray_cluster, monkeypatch):
    """64 and 10,000 scans x 500 epochs; the first batch comes as soon, and only some hundred blocks are laid out."""
    seconds = {}
    for num_scans in (64, 10_000, 64, 10_000):
        began = time.monotonic()
        take(plan_of(num_scans), 1, 0, 40)
        seconds.setdefault(num_scans, []).append(time.monotonic() - began)
    print(seconds)
    assert min(seconds[10_000]) < 3 * min(seconds[64]) + 3  # a loose bound: other programs share the machine
