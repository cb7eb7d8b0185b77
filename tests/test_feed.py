"""The stream through Ray Data: what reaches which worker, and how much of it lies about."""

import time

import numpy as np
import pytest

from pgl_ray.data import stream

pytestmark = pytest.mark.cluster


def plan_of(num_scans: int, batch: int = 12, **changes) -> stream.Plan:
    limits = {"epochs": 20, "max_steps": None, "seed": 1} | changes
    return stream.Plan.make([f"scan_{i}" for i in range(num_scans)], 1, batch, **limits)


def take(plan: stream.Plan, num_workers: int, start: int, num_steps: int, folder) -> list[dict]:
    """The first steps of a stream, as one consumer gets the workers' batches in turn; a file in `folder` for each part
    of the plan that was laid out."""

    class Counted(stream.Plan):
        def columns(self, first: int, last: int) -> dict:
            (folder / f"{num_workers}_{first}").touch()
            return super().columns(first, last)

    plan = Counted(**vars(plan))

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


def test_a_stream_continued_by_others_loses_and_repeats_no_pair(ray_cluster, tmp_path):
    """20 epochs of 10,000 scans: two workers get as far as step 4, three go on; to compare, the plan itself. No more
    of it is laid out than what may lie ahead of the renderers."""
    plan = plan_of(10_000)
    batches = take(plan, 2, 0, 4, tmp_path) + take(plan, 3, 4, 4, tmp_path)
    per_step = [2] * 4 + [3] * 4
    assert [set(b["step"].tolist()) for b in batches] == [{s} for s, n in enumerate(per_step) for _ in range(n)]
    assert [set(b["block"].tolist()) for b in batches] == [{12 // n} for n in per_step for _ in range(n)]
    rows = np.concatenate([np.stack([b[c] for c in ("epoch", "scan", "draw")], 1) for b in batches])
    np.testing.assert_array_equal(rows, plan.rows(0, 8))
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert len(list(tmp_path.iterdir())) <= 4 < plan.num_steps // stream.BLOCKS_AHEAD


@pytest.mark.timeout(180)
def test_an_object_store_for_three_batches_keeps_streaming(ray_cluster):
    """And more than is under way is not made, however slow the consumer is."""
    import ray

    size = int(ray.cluster_resources()["object_store_memory"] / 3.5)

    @ray.remote(num_cpus=0)
    class Made:
        def __init__(self):
            self.num = 0

        def add(self, num: int) -> int:
            self.num += num
            return self.num

    made = Made.remote()

    def mark(rows: dict) -> dict:
        ray.get(made.add.remote(1))
        return rows | {"view": np.zeros((len(rows["step"]), size // len(rows["step"])), np.uint8)}

    # to its end: a stream that goes on as Ray is shut down takes the process along
    data = stream.dataset(plan_of(100), mark, 1, 0, 0.5, stop=20)
    steps = []
    for batch in data.iterator().iter_torch_batches(batch_size=12, prefetch_batches=2, drop_last=True):
        assert batch["view"].nbytes > 100e6
        steps.append(int(batch["step"][0]))
        if len(steps) == 3:
            time.sleep(8)
            ahead = ray.get(made.add.remote(0)) - 3
    assert steps == list(range(20))
    assert ahead < 3 + 1 + stream.BLOCKS_TAKEN  # tasks, one for the worker, and what it has, the third among them
