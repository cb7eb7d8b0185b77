"""The prediction for many GPUs: against sums done by hand, and that the limit it names is the one that moves it."""

from dataclasses import replace

import pytest
import scale_model
from scale_model import ASSUMED, Run

COST = {
    "gradient": 200e6,
    "norm_forward": 0.5e6,
    "norm_backward": 0.2e6,
    "norms": 100,
    "norms_learnt": 50,
    "pair": 0.6e6,
    "checkpoint": 700e6,
}
MEASURED = scale_model.measured()


def test_one_gpu_exchanges_nothing():
    part = scale_model.step_s(Run(1, 100), COST)
    assert part == {"computing": 32 / ASSUMED["gpu_pairs_per_s"], "gradients": 0, "norms": 0, "all": part["computing"]}


def test_a_step_of_two_nodes_by_hand():
    """16 GPUs: 2 x 15/16 of 200 MB over 12.5 GB/s, of which 0.6 x 32/1160 s hide; 150 exchanges of 30 us."""
    part = scale_model.step_s(Run(16, 100), COST, ASSUMED | {"gpu_pairs_per_s": 1160})
    assert part["gradients"] == pytest.approx(375e6 / 12.5e9 - 0.6 * 32 / 1160)
    assert part["norms"] == pytest.approx((15 * 0.5e6 + 1.875 * 0.2e6) / 12.5e9 + 150 * 30e-6)
    assert part["all"] == pytest.approx(32 / 1160 + part["gradients"] + part["norms"])


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
@pytest.mark.parametrize("regions, on_gpu", [(1, False), (8, False), (8, True)])
def test_the_named_limit_is_what_holds_the_run_up(gpus, regions, on_gpu):
    """Twice as much of it is more pairs/s; twice as much of anything else is none."""
    run = Run(gpus, 10**5, regions=regions, on_gpu=on_gpu)
    said, most = scale_model.predict(run, COST, MEASURED), scale_model.limits(run, COST, MEASURED)
    assert said["pairs_per_s"] == min(most.values()) == most[said["limit"]]
    twice = {
        "renderers": (MEASURED | {"ray_share": 2 * MEASURED["ray_share"]}, ASSUMED),
        "bucket": (MEASURED | {"bytes_per_pair": {k: v / 2 for k, v in MEASURED["bytes_per_pair"].items()}}, ASSUMED),
        "coordinator": (MEASURED | {"blocks_per_s": 2 * MEASURED["blocks_per_s"]}, ASSUMED),
        "GPUs": (MEASURED, ASSUMED | {"gpu_pairs_per_s": 2 * ASSUMED["gpu_pairs_per_s"], "latency_s": 0}),
    }
    for name, (figures, assumed) in twice.items():
        rate = scale_model.predict(run, COST, figures, assumed)["pairs_per_s"]
        assert (rate > said["pairs_per_s"]) == (name == said["limit"]), name


def test_more_scans_take_only_memory_and_longer_epochs():
    few, many = (scale_model.predict(Run(64, num), COST, MEASURED) for num in (10**4, 10**6))
    assert many["epoch_s"] == pytest.approx(100 * few["epoch_s"]) and many["index_mb"] > few["index_mb"]
    same = few.keys() - {"epoch_s", "index_mb"}
    assert {name: few[name] for name in same} == {name: many[name] for name in same}


def test_larger_blocks_and_more_nodes():
    """The coordinator hands out as many blocks whatever they hold; faults come as often as there are nodes."""
    run = Run(64, 10**4)
    rates = [scale_model.limits(replace(run, pairs=pairs), COST, MEASURED)["coordinator"] for pairs in (32, 128)]
    assert rates[1] == 4 * rates[0]
    lost = scale_model.predict(run, COST, MEASURED)["lost_share"]
    between = MEASURED["checkpoint_every"] * 64 * 32 / scale_model.predict(run, COST, MEASURED)["pairs_per_s"]
    assert lost == pytest.approx(8 * (MEASURED["resume_s"] + between / 2) / 3600 / ASSUMED["hours_between_faults"])


def test_workers_share_cores():
    assert scale_model.speedup(2, 2, 1.0, 0.0) == 2 and scale_model.speedup(4, 2, 1.0, 0.0) == 2
    assert scale_model.speedup(2, 2, 1.0, 0.25) == pytest.approx(1.6)
    assert scale_model.speedup(1, 2, 1.0, 0.0) == 1
