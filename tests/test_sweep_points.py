"""Which trials a space has, and what they share."""

import functools
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from small_sweeps import BASE, LR, sweep

from pgl_ray import config as c
from pgl_ray.sweep import checks, stages, trial
from pgl_ray.sweep.points import LEARNING_RATE, covers, domain, draw, name_of, of_space

ROOT = Path(__file__).resolve().parents[1]

SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))


def fine_tunes(path: Path) -> bool:
    """conf/tune_small.yaml is for spaces that do."""
    return OmegaConf.load(path).get("base_finetune", {}) is not None


@functools.cache
def trials_of(path: Path, small: bool) -> tuple[str, list[dict]]:
    """How a shipped space is searched, and the configs of each of its trials' stages."""
    files = [str(path), *([str(ROOT / "conf/tune_small.yaml")] if small else [])]
    config = c.load(c.TuneConfig, [*files, "index=s", "run=/no/such/sweep"])
    return config.search, [stages.stage_configs(config, each.values, Path("/no/such")) for each in checks.check(config)]


@pytest.mark.parametrize(
    ("verbs", "inside", "outside"),
    [
        ({"grid_search": [0.001, 0.01]}, [0.01], [100, "a", None]),
        ({"choice": [[1.0, 1.0], "a", None]}, [[1.0, 1.0], "a", None], [[1.0], "b", 1.0]),
        ({"choice": ["[16,32,32]", "b"]}, [[16, 32, 32], "b"], ["[16,32,32]", [16, 32]]),
        ({"loguniform": [0.001, 0.1]}, [0.001, 0.1], [0.0009, 0.11, "a", None]),
        ({"uniform": [0.1, 0.001]}, [0.001, 0.05, 0.1], [0.0009, 0.11]),
        ({"uniform": [0.0, 1.0]}, [0, 1], [-0.1]),
        ({"quniform": [0.1, 0.3, 0.1]}, [0.1, 0.1 * 3], [0.4]),
        ({"randint": [2, 4]}, [2, 3], [4]),
    ],
)
def test_whose_space_a_trial_is_of(tmp_path, verbs, inside, outside):
    """Its values, all keys and the arm decide."""
    config = sweep(tmp_path, arms={"a": {}}, space={"finetune.patience": verbs}).model_dump()
    for arm, values, one in (("a", inside, True), ("a", outside, False), ("gone", inside, False)):
        assert {of_space(config, {"arm": arm, "finetune.patience": value}) for value in values} == {one}
    assert not of_space(config, {"finetune.patience": inside[0]}) and not of_space(config, {"arm": "a"})
    assert not of_space(config, {"arm": "a", "finetune.patience": inside[0], "finetune.seed": 0})


def test_what_is_drawn_is_of_the_space(tmp_path):
    verbs = {"uniform": [0.1, 0.3]}, {"quniform": [0.1, 0.3, 0.1]}, {"loguniform": [0.1, 0.3]}, {"randint": [1, 3]}
    space = {f"finetune.{name}": verb for name, verb in zip(("val_share", "dice_weight", "optim.lr", "seed"), verbs)}
    config = sweep(tmp_path, space=space, num_trials=30)
    assert all(of_space(config.model_dump(), json.loads(json.dumps(point.values))) for point in draw(config))


def test_pbt_gives_learning_rates_of_its_own(tmp_path):
    for kind, one in (("pbt", True), ("none", False)):
        config = sweep(tmp_path, space=LR, scheduler={"kind": kind}).model_dump()
        assert of_space(config, {LEARNING_RATE: 5.0}) == one


@pytest.mark.parametrize(
    ("earlier", "now", "one"),
    [
        ({"uniform": [0.0, 1.0]}, {"uniform": [0.1, 1.0]}, True),
        ({"uniform": [0.0, 1.0]}, {"uniform": [0.1, 1.1]}, False),
        ({"uniform": [0.0, 1.0]}, {"loguniform": [0.1, 1.0]}, False),
        ({"choice": [1, 2, 3]}, {"choice": [1, 3]}, True),
        ({"choice": [1, 2, 3]}, {"choice": [1, 4]}, False),
        ({"randint": [1, 4]}, {"randint": [1, 4]}, True),
        ({"randint": [1, 4]}, {"randint": [1, 5]}, False),
    ],
)
def test_which_spaces_hold_another(earlier, now, one):
    assert covers({"a": earlier}, {"a": now}) == one and not covers({"a": earlier}, {"a": earlier, "b": now})


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, small", [(path, small) for path in SPACES for small in (False, True) if not small or fine_tunes(path)]
)
def test_fine_tuning_takes_the_encoder_that_was_pretrained(path, small):
    """In every trial of every shipped space, at a laptop's size, too."""
    search, trials = trials_of(path, small)
    assert trials or search == "optuna"
    for configs in trials:
        if "pretrain" in configs and "finetune" in configs:
            assert configs["finetune"].encoder == configs["pretrain"].encoder
            assert configs["finetune"].init == configs["pretrain"].run


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_no_shipped_space_pretrains_on_what_it_tests_on(path):
    """Where pool and tested scans lie in one store, they are of different splits; else the file says what to add."""
    for configs in trials_of(path, False)[1]:
        tested = {configs[stage].split for stage in ("evaluate",) if stage in configs}
        tested |= {configs["probe"].test_split} if "probe" in configs else set()
        pool = configs.get("pretrain")
        tested |= {pool.probe.test_split} if pool and pool.probe.every else set()
        if pool and tested:
            apart = pool.split is not None and pool.split not in tested
            assert apart or "add base_pretrain.split=train" in " ".join(path.read_text().split())


def test_every_point_of_the_space_is_one_trial(tmp_path):
    space = {"finetune.seed + pretrain.seed": {"grid_search": [3, 4]}, "finetune.optim.lr": {"choice": [0.1, 0.2]}}
    config = sweep(tmp_path, arms={"x": {"finetune.init": "random"}, "y": {}, "z": None}, space=space, num_trials=3)
    trials = checks.check(config)
    assert trials == checks.check(config)  # the same draws again: what is finished is found by its name
    points = [tuple(t.values.values()) for t in trials]
    assert len(set(points)) == len(points) <= 12 and {p[:2] for p in points} == {(a, s) for a in "xy" for s in (3, 4)}
    configs = stages.stage_configs(config, {"arm": "y", "finetune.seed + pretrain.seed": 4}, tmp_path)
    assert configs["finetune"].seed == configs["pretrain"].seed == 4
    [only] = list(checks.check(sweep(tmp_path, space={"finetune.seed": {"choice": [7]}}, num_trials=5)))
    assert only.values == {"finetune.seed": 7}


MIXED = {"pretrain.seed": {"grid_search": [3, 4]}, **LR, "finetune.seed": {"randint": [0, 999]}}


def test_arms_and_grids_share_every_draw(tmp_path):
    """Each arm meets each point: what is drawn, and what the grids say."""
    config = sweep(tmp_path, arms={"a": {}, "b": {}, "c": {}}, space=MIXED, num_trials=4)
    points = [one.values for one in checks.check(config)]
    draws = {(point["finetune.optim.lr"], point["finetune.seed"]) for point in points}
    cells = {(arm, seed, *draw) for arm, seed, draw in itertools.product("abc", (3, 4), draws)}
    assert len(draws) == 4 and len(points) == 24
    assert {(p["arm"], p["pretrain.seed"], p["finetune.optim.lr"], p["finetune.seed"]) for p in points} == cells


@pytest.mark.parametrize(
    "more",
    [
        {"arms": {"a": {}, "new": {}, "b": {}}},
        {"space": {**MIXED, "pretrain.seed": {"grid_search": [5, 3, 4]}}},
        {"space": {"probe.seed": {"grid_search": [0]}, **MIXED}, "of_each": {"probe.seed": 0}},
        {"num_trials": 5},
    ],
)
def test_a_larger_space_has_all_trials_of_the_smaller(tmp_path, more):
    """More arms, more points of a grid, another grid, more draws: what is finished stays a trial of the sweep."""
    of_each = more.pop("of_each", {})
    known = {"arms": {"a": {}, "b": {}}, "space": MIXED, "num_trials": 3, "base_probe": {}}
    small, large = (checks.check(sweep(tmp_path, **known | changes)) for changes in ({}, more))
    assert len(small) == 12 and {name_of(one.values | of_each) for one in small} <= {one.name for one in large}


@pytest.mark.parametrize("seed", [0, 7])
def test_draws_without_arms_and_grids_follow_the_seed_alone(tmp_path, seed):
    """One after another, each key in its order: sweeps of earlier versions go on."""
    space = {
        **LR,
        "finetune.seed": {"randint": [0, 999]},
        "finetune.patch.crop_scale": {"choice": [[1, 1], [0.9, 1.1]]},
    }
    rng = np.random.RandomState(seed)
    expected = [[domain(verbs).sample(random_state=rng) for verbs in space.values()] for _ in range(6)]
    trials = checks.check(sweep(tmp_path, space=space, num_trials=6, seed=seed))
    found = [list(one.values.values()) for one in trials]
    assert found == [[lr, number, json.loads(scale)] for lr, number, scale in expected]


def test_equal_pretrainings_share_a_folder(tmp_path):
    arms = {"random": {"finetune.init": "random"}, "pgl": {}, "byol": {"pretrain.method": "byol"}}
    config = sweep(tmp_path, arms=arms, base_probe={"num_scans": 2}, base_evaluate={"split": "val"})

    def of(arm, **values):
        return stages.stage_configs(config, {"arm": arm, **values}, tmp_path / "t")

    pgl, again, byol = of("pgl"), of("pgl", **{"finetune.seed": 5}), of("byol")
    assert pgl["pretrain"] == again["pretrain"] and pgl["pretrain"].run != byol["pretrain"].run
    assert pgl["finetune"].init == pgl["probe"].init == pgl["pretrain"].run and pgl["pretrain"].health.stop_on_collapse
    assert again["finetune"].seed == 5 and again["evaluate"].run == again["finetune"].run
    random = of("random")
    assert "pretrain" not in random and random["finetune"].init == random["probe"].init == "random"
    assert random["probe"].size == pgl["probe"].size == (16, 96, 96) and not random["probe"].ends
    pretraining = {**BASE["base_pretrain"], "views": {"size": [32, 64, 64]}}
    smaller = sweep(tmp_path, arms=arms, base_probe={"num_scans": 2}, base_pretrain=pretraining)
    for arm in arms:  # random weights see the windows of the others
        assert stages.stage_configs(smaller, {"arm": arm}, tmp_path)["probe"].size == (32, 64, 64)
    given = sweep(tmp_path, arms=arms, base_probe={"size": [8, 16, 16]}, base_pretrain=pretraining)
    assert stages.stage_configs(given, {"arm": "pgl"}, tmp_path)["probe"].size == (8, 16, 16)
    healthier = sweep(tmp_path, arms=arms, base_pretrain={**BASE["base_pretrain"], "health": {"every": 7}})
    assert stages.stage_configs(healthier, {"arm": "pgl"}, tmp_path)["pretrain"].run == pgl["pretrain"].run


def test_wrong_priors_are_judged_in_every_reading(tmp_path):
    """A control counts in its strongest; a base that says otherwise is followed."""
    arms = {"wrong priors": {"pretrain.align.wrong_priors": True}, "pgl": {}}
    for base, expected in (({}, [True, False]), ({"all_readings": False}, [False, False])):
        config = sweep(tmp_path, arms=arms, base_probe={"num_scans": 2, **base})
        probes = [stages.stage_configs(config, {"arm": arm}, tmp_path)["probe"] for arm in arms]
        assert [one.all_readings for one in probes] == expected


def test_the_second_of_two_equal_pretrainings_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    order, inside = [], threading.Event()

    def second():
        inside.wait(10)
        with trial.locked(str(tmp_path / "pretrain" / "a")):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with trial.locked(str(tmp_path / "pretrain" / "a")):
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
