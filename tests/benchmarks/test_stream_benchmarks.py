"""The stream's benchmarks, for correctness alone: every way of ours does its work, and an index may list a CT often."""

import itertools

import numpy as np
import pytest
import stream_through_ray
import stream_vs_peers


@pytest.fixture(scope="module")
def volumes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    coarse = [rng.integers(-900, 300, (6, 9, 9)) for _ in range(2)]
    return {f"ct_{i}": np.kron(part, np.ones((4, 16, 16))).astype(np.int16) for i, part in enumerate(coarse)}


@pytest.mark.slow
def test_all_of_our_ways_run(volumes, tmp_path):
    ways = {name: (2, make(volumes, tmp_path)) for name, _, make in stream_vs_peers.WAYS if name.startswith("pgl_ray")}
    rates = stream_vs_peers.measure(ways, 1)
    assert all(rate > 0 for (rate,) in rates.values())
    table = stream_vs_peers.table(rates)
    assert all(name in table for name in ways) and len(table.splitlines()) == 1 + len(ways)
    # a crop of about 0.3 million voxels lies in chunks of 32,768 that compress well here
    assert 0 < stream_vs_peers.bytes_per_voxel(volumes, tmp_path) < 4


def test_an_index_of_many_rows_shows_the_same_pairs(volumes, tmp_path):
    few = stream_vs_peers.our_store(volumes, tmp_path, "int16")
    many = stream_through_ray.repeated(few, 50, tmp_path)
    assert len({scan.scan_id for scan in many.scans}) == 50
    plan, renderer = stream_through_ray.parts(many, 4, 1)
    batch = renderer(plan.columns(0, 1))
    assert batch["view_1"].shape == (4, 1, 16, 96, 96) and np.ptp(batch["view_1"].astype(np.float32)) > 1
    shapes = {scan.shape for scan in many.scans}
    assert shapes == {(24, 144, 144)} and len(list(itertools.islice(plan.batches(0), 3))) == 3
