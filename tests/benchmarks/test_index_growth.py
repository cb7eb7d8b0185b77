"""The benchmark of long indexes, only for correctness: its stores can be rendered, and every figure is there."""

import index_growth
import numpy as np
import pytest

from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import store, stream
from pgl_ray.data.pair_renderer import PairRenderer


def test_every_scan_of_the_made_up_store_can_be_rendered(tmp_path):
    index = store.read_index(index_growth.make_store(tmp_path, 40))
    ids = tuple(scan.scan_id for scan in index.scans)
    plan = stream.Plan.make(ids, 1, 40, 1, None, 0)
    batch = PairRenderer(index.store, plan.scan_ids, 0, ViewsConfig(), IntensityConfig())(plan.columns(0, 1))
    assert (
        sorted(batch["scan"].tolist()) == list(range(40)) and (np.ptp(batch["view_1"].reshape(40, -1), 1) > 0.5).all()
    )
    assert {len(scan.label_boxes) for scan in index.scans} == {13}


@pytest.mark.slow
def test_a_process_is_measured(tmp_path):
    folder = index_growth.make_store(tmp_path, 20)
    figures = index_growth.measure(index_growth.HERE, folder, 20, seconds=0.2)
    assert set(figures) == {"first_s", "first_cpu_s", "memory_mb", "pairs_per_cpu_s"}
    assert figures["first_cpu_s"] > 0 and figures["pairs_per_cpu_s"] > 0
