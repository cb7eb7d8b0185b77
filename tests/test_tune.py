"""Sweeps without Ray jobs: what is refused, which trials there are, what they share, what is read back and reported."""

import base64
import functools
import itertools
import json
import logging
import math
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from browser import CHROMIUM, faults
from omegaconf import OmegaConf
from scipy import stats

from pgl_ray import config as c
from pgl_ray import report, tune
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.pages import arms, sweep_plots, sweep_report
from pgl_ray.sweep import checks, population, progress_table, search, stages, stores, sweeps, trial
from pgl_ray.sweep.points import domain, name_of, values_of
from pgl_ray.sweep.room import room_for
from pgl_ray.train import capacity, checkpoint, nodes, optim
from pgl_ray.train.metrics import metrics_path, read_metrics
from pgl_ray.train.run_files import STATE, write_json

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {"width": 8, "depths": [1, 1, 1, 1]}
BASE = {"base_pretrain": {"max_steps": 4, "encoder": ENCODER}, "base_finetune": {"max_steps": 4}}
LR = {"finetune.optim.lr": {"loguniform": [0.001, 0.1]}}
CURVE = {"base_pretrain": {**BASE["base_pretrain"], "probe": {"every": 2}}}
PROBED = {"base_finetune": None, "base_probe": {"judges": ["voxels", "decoder", "matching"]}}


def sweep(tmp_path, **changes) -> c.TuneConfig:
    return c.build(c.TuneConfig, {"index": "s", "run": str(tmp_path / "sweep"), **BASE, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "space is empty"),
        ({"space": {"pretrain.ema": {"choice": [1]}}}, "'pretrain.ema' is not a key of pretrain"),
        ({"space": {"finetune.init": {"choice": ["a"]}}}, "'finetune.init' is not a key"),
        ({"space": {"evaluate.tta": {"choice": [True]}}}, "'evaluate.tta' needs base_evaluate"),
        ({"space": {"finetune.optim.lr": {"choice": []}}}, "needs one verb with its arguments"),
        ({"space": {"finetune.optim.lr": {"uniform": [1]}}}, "uniform[1]"),
        ({"space": {"finetune.seed": {"grid_search": list(range(9))}}, "num_trials": 8}, "72 trials, max_trials=64"),
        ({"space": LR, "base_finetune": {"optm": 1}}, "base_finetune: unknown key 'optm'"),
        ({"space": {"finetune.optim.lr": {"choice": [0.1, -1.0]}}, "num_trials": 8}, "optim.lr=-1.0: Input should be"),
        ({"space": {"pretrain.align.output_stride": {"grid_search": [[8, 8, 8]]}}}, "[8, 16, 16]: take one of them"),
        ({"space": LR, "judge": "train/loss"}, "not comparable between settings"),
        ({"space": LR, "first_judge": "train/loss"}, "a collapsed network minimises it"),
        ({"space": LR, "judge": "val/iou"}, "no figure of fine-tuning, which comes last: take val/dice"),
        ({"space": LR, "judge": "probe/balanced_accuracy"}, "take val/dice, or base_finetune=null"),
        ({"space": LR, "first_judge": "probe/balanced_accuracy"}, "with base_pretrain.probe.every"),
        (
            {"space": LR, "first_judge": "probe/matching_mm", **CURVE},
            "or probe/decoder_dice or probe/matching_mm, with a",
        ),
        (
            {"space": LR, "first_judge": "probe/decoder_dice", "base_probe": {"judges": ["voxels", "matching"]}},
            "probe/decoder_dice is said by decoder: add it to base_probe.judges=[voxels,matching]",
        ),
        (
            {"arms": {"a": {"probe.judges": ["decoder"]}}, "judge": "probe/balanced_accuracy", **PROBED},
            "arm=a: probe/balanced_accuracy is said by voxels: add it to base_probe.judges=[decoder]",
        ),
        ({"arms": {"a": {}}, "judge": "probe/matching_mm", "base_finetune": None}, "judge=probe/matching_mm: take"),
        ({"arms": {"a": {"finetune.run": "x"}}}, "arms.a: 'finetune.run' is not a key"),
        ({"space": {"finetune.seed": {"grid_search": [1]}}, "search": "optuna"}, "take choice instead of grid_search"),
        ({"space": LR, "scheduler": {"kind": "pbt"}}, "num_trials of at least 4"),
        ({"space": LR, "base_finetune": None, "base_pretrain": None}, "there is nothing to run"),
        ({"arms": {"a": {}}, "base_finetune": None}, "take probe/balanced_accuracy"),
        (
            {
                "arms": {"random": {"finetune.init": "random"}},
                "base_pretrain": {**BASE["base_pretrain"], "probe": {"every": 2}},
                "first_judge": "probe/balanced_accuracy",
            },
            "arm=random: it is not pre-trained: for first_judge=probe/balanced_accuracy it needs a base_probe",
        ),
    ],
)
def test_what_would_only_fail_in_a_trial_is_refused(tmp_path, changes, message):
    if changes.get("search") == "optuna":
        pytest.importorskip("optuna")
    with pytest.raises(ValueError) as caught:
        checks.check(sweep(tmp_path, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("judge", ["val/dice", sweeps.PROBE])
@pytest.mark.parametrize("section", ["probe", "views", "optim", "health"])
@pytest.mark.parametrize("given", [200, None, [1], "x"])
def test_a_base_of_another_kind_is_refused_in_a_line(tmp_path, given, section, judge):
    """Whatever is asked of it later on, among it whether it says what trials are judged by."""
    last = {} if judge == "val/dice" else {"base_finetune": None}
    config = sweep(tmp_path, space=LR, judge=judge, base_pretrain={"max_steps": 4, section: given}, **last)
    with pytest.raises(ValueError, match=r"^base_pretrain: .*: Input should be a valid dictionary"):
        checks.check(config)


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


def test_a_sweep_is_run_by_one_process(tmp_path):
    with (
        sweeps.locked(tmp_path),
        pytest.raises(ValueError, match="being run by another process"),
        sweeps.locked(tmp_path),
    ):
        pass
    with sweeps.locked(tmp_path):
        pass


def test_a_sweep_takes_more_trials_and_no_other_base(tmp_path):
    folder = tmp_path / "sweep"
    sweeps.remember(sweep(tmp_path, arms={"a": {}}), folder)
    sweeps.remember(sweep(tmp_path, arms={"a": {}, "b": {}}, space=LR, num_trials=3), folder)
    with pytest.raises(ValueError, match=r"another base_pretrain, arms\.a .*choose another run"):
        sweeps.remember(sweep(tmp_path, arms={"a": {"finetune.seed": 1}}, base_pretrain=None), folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="is no sweep"):
        sweeps.remember(sweep(tmp_path), tmp_path / "other")


@pytest.mark.parametrize(
    "earlier, now", [(None, sweeps.PROBE), (sweeps.PROBE, None), (sweeps.PROBE, "probe/matching_mm")]
)
def test_a_sweep_goes_on_by_the_same_first_judge(tmp_path, earlier, now):
    """Rungs and curves have one scale."""
    sweeps.remember(sweep(tmp_path, space=LR, first_judge=earlier), tmp_path / "sweep")
    sweeps.remember(sweep(tmp_path, space=LR, first_judge=earlier), tmp_path / "sweep")
    with pytest.raises(ValueError, match="is a sweep with another first_judge"):
        sweeps.remember(sweep(tmp_path, space=LR, first_judge=now), tmp_path / "sweep")


def test_a_refused_second_start_leaves_the_sweep_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "check_stores", lambda config, trials: None)
    folder = tmp_path / "sweep"
    sweeps.remember(sweep(tmp_path, arms={"a": {}}), folder)
    before = (folder / "sweep.json").read_bytes()
    with sweeps.locked(folder), pytest.raises(ValueError, match="is being run by another process"):
        tune.run(sweep(tmp_path, arms={"a": {}, "b": {}}))
    assert (folder / "sweep.json").read_bytes() == before


def test_resources_that_the_cluster_lacks_are_refused(tmp_path, monkeypatch):
    have = {"CPU": 4.0}
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, (have,)))
    config = sweep(tmp_path, space=LR, num_trials=8)
    assert room_for(config, checks.check(config)) == 2  # 1.5 CPUs each
    text = r"max_concurrent=3 trials of 1\.5 CPUs and 0 GPUs each do not fit, the cluster has 4 CPUs .*: at most 2"
    with pytest.raises(ValueError, match=text):
        room_for(config.model_copy(update={"max_concurrent": 3}), [])
    pbt = config.model_copy(update={"scheduler": c.SchedulerConfig(kind="pbt")})
    text = "its 8 trials together: they need 12 CPUs and 0 GPUs, the cluster has 4 CPUs .* higher ray.num_cpus"
    with pytest.raises(ValueError, match=text):
        room_for(pbt, checks.check(config))
    base = {"max_steps": 4, "train": {"num_workers": 2, "device": "cuda"}}
    with pytest.raises(ValueError, match="need 2 GPUs, the cluster has 4 CPUs and 0 GPUs: lower it"):
        room_for(sweep(tmp_path, space=LR, base_finetune=base), [])
    have |= {"GPU": 2.0, "CPU": 16.0}
    shared = {"gpus_per_worker": 0.5}
    bases = {f"base_{stage}": {**BASE[f"base_{stage}"], "train": shared} for stage in ("pretrain", "finetune")}
    assert room_for(sweep(tmp_path, space=LR, **bases), []) == 4
    assert nodes.check_resources(c.TrainConfig(gpus_per_worker=0.5))
    with pytest.raises(ValueError, match="cannot share a GPU"):
        c.build(c.TrainConfig, {"num_workers": 2, "gpus_per_worker": 0.5})


# -- schedulers and search --------------------------------------------------------------------------------------------


def ended(tmp_path, values, score, reports=(), state="done", **facts) -> sweeps.Trial:
    folder = tmp_path / "sweep" / "trials" / name_of(values)
    folder.mkdir(parents=True)
    sweeps.note(folder, values=values, started=time.time(), since=time.time() - 60, state="running", stage="finetune")
    for progress, value in reports:
        sweeps.add_report(folder, progress, value)
    sweeps.note(folder, **facts)
    sweeps.end(folder, state, facts.get("error"), score)
    return sweeps.read_trial(folder)


def test_what_the_stores_cannot_give_is_refused_before_training(tmp_path):
    """Two HU windows, and a split without labels for the probe; an arm may be probed without a pre-training."""
    for name, window in (("pool", (-1000.0, 400.0)), ("own", (-1024.0, 325.0))):
        for i in range(3):
            volume = np.zeros((24, 40, 40), np.int16)
            kept = {"label": np.ones_like(volume, np.uint8), "labelled": (1,)} if name == "own" else {}
            write_scan(tmp_path / name, f"s{i}", volume, np.eye(4), split="train", hu_window=window, **kept)
        write_index(tmp_path / name, {"a": 1} if name == "own" else {}, window)
    own, pool = str(tmp_path / "own"), str(tmp_path / "pool")
    geometry = {"views": {"size": [16, 32, 32]}, "global_batch_size": 1, "max_steps": 1, "encoder": ENCODER}
    config = sweep(tmp_path, index=own, space=LR, base_pretrain={**geometry, "index": pool})
    with pytest.raises(ValueError, match=r"pool has hu_window=\[-1000.0, 400.0\], index=.*own \[-1024.0, 325.0\]"):
        stores.check_stores(config, checks.check(config))
    config = sweep(tmp_path, index=own, space=LR, base_pretrain=geometry, base_probe={"test_split": "validation"})
    with pytest.raises(ValueError, match="test_split='validation': no labelled scan"):
        stores.check_stores(config, checks.check(config))
    bases = {"base_pretrain": geometry, "base_finetune": None, "base_probe": {"num_scans": 1, "test_split": "train"}}
    arms = {"random": {"probe.init": "random"}, "pgl": {"pretrain.method": "pgl"}}
    config = sweep(tmp_path, index=own, arms=arms, judge=sweeps.PROBE, **bases)
    random, pgl = (stages.stage_configs(config, one.values, tmp_path / "t") for one in checks.check(config))
    assert list(random) == ["probe"] and random["probe"].init == "random"
    assert list(pgl) == ["pretrain", "probe"] and pgl["probe"].init == pgl["pretrain"].run
    stores.check_stores(config, checks.check(config))


@pytest.mark.parametrize("swept", [False, True])
def test_flips_that_evaluation_would_refuse_are_refused_first(tmp_path, swept):
    """A network trained without flips is not evaluated with them: said before it is trained."""
    bases = {"base_finetune": {**BASE["base_finetune"], "patch": {"flip_prob": 0}}}
    bases["base_evaluate"] = {} if swept else {"tta": True}
    space = {"evaluate.tta": {"grid_search": [False, True]}} if swept else LR
    with pytest.raises(ValueError, match=r"evaluate.tta=true averages over flips: it needs finetune.patch.flip_prob"):
        checks.check(sweep(tmp_path, space=space, **bases))
    bases["base_finetune"]["patch"] = {"flip_prob": 0.5}
    checks.check(sweep(tmp_path, space=space, **bases))


@pytest.mark.parametrize("organ", ["lievr", "spleen", "liver ", "left_kidney"])
def test_a_judged_organ_that_validation_lacks_is_refused(tmp_path, organ):
    """A mistyped one, one that is labelled in no scan, and one that no scan shows."""
    volume = np.zeros((24, 40, 40), np.int16)
    for number in range(3):
        kept = {"label": np.ones_like(volume, np.uint8), "labelled": (1, 3)}
        write_scan(tmp_path / "own", f"s{number}", volume, np.eye(4), split="train", **kept)
    write_index(tmp_path / "own", {"liver": 1, "spleen": 2, "left_kidney": 3}, (-1024.0, 325.0))
    bases = {"index": str(tmp_path / "own"), "space": LR, "base_pretrain": None}
    for known in ("val/dice", "val/dice_liver"):
        stores.check_stores(sweep(tmp_path, judge=known, **bases), [])
    with pytest.raises(ValueError, match=rf"judge=val/dice_{organ}: .* show liver; take val/dice, or"):
        stores.check_stores(sweep(tmp_path, judge=f"val/dice_{organ}", **bases), [])


@pytest.mark.parametrize("space", [LR, {"pretrain.probe.every": {"grid_search": [2, 4]}}])
@pytest.mark.parametrize("named", [False, True])
def test_the_curve_of_a_pool_has_the_sweeps_labels(tmp_path, space, named):
    """The pool has none; a curve that names its store keeps it."""
    for name in ("pool", "own", "third"):
        for i, split in enumerate(("train", "train", "test")):
            volume = np.random.default_rng(i).integers(-200, 200, (24, 40, 40)).astype(np.int16)
            kept = {"label": np.ones_like(volume, np.uint8), "labelled": (1,)} if name != "pool" else {}
            write_scan(tmp_path / name, f"{name}{i}", volume, np.eye(4), split=split, **kept)
        write_index(tmp_path / name, {"a": 1} if name != "pool" else {}, (-1024.0, 325.0))
    own, pool, third = (str(tmp_path / name) for name in ("own", "pool", "third"))
    geometry = {"views": {"size": [16, 32, 32]}, "global_batch_size": 1, "max_steps": 4, "encoder": ENCODER}
    curve = {"every": 2} | ({"index": third} if named else {})
    bases = {"base_pretrain": {**geometry, "index": pool, "probe": curve}, "first_judge": sweeps.PROBE}
    config = sweep(tmp_path, index=own, space=space, **bases)
    trials = checks.check(config)
    stores.check_stores(config, trials)
    for one in trials or [SimpleNamespace(values={})]:
        found = stages.stage_configs(config, one.values, tmp_path / "t")["pretrain"]
        assert found.index == pool and found.probe.index == (third if named else own)


def test_a_curve_on_the_sweeps_own_store_stays_as_it_was(tmp_path):
    """What is trained alike has the same folder as in earlier versions; so has a pool with labels of its own."""
    config = c.build(c.TuneConfig, {"index": "s", "run": "r", "space": LR, **BASE, **CURVE})
    assert stages.stage_configs(config, {}, Path("t"))["pretrain"].probe.index is None
    write_scan(tmp_path / "pool", "a", np.zeros((4, 8, 8), np.int16), np.eye(4), label=np.ones((4, 8, 8), np.uint8))
    write_index(tmp_path / "pool", {"a": 1}, (-1024.0, 325.0))
    pool = {"base_pretrain": {**CURVE["base_pretrain"], "index": str(tmp_path / "pool")}}
    config = c.build(c.TuneConfig, {"index": "s", "run": "r", "space": LR, **BASE, **pool})
    assert stages.stage_configs(config, {}, Path("t"))["pretrain"].probe.index is None


def test_asha_remembers_the_rungs_of_ended_trials(tmp_path):
    """Ray Tune saves no scheduler: after a restart the reports of the trials that ended stand in."""
    config = sweep(tmp_path, space=LR, scheduler={"kind": "asha", "grace": 25})
    done = [ended(tmp_path, {"a": k}, 0.5 + k / 10, [(30, 0.5 + k / 10), (55, 0.6)]) for k in range(3)]
    asha, new = search.make_scheduler(config, done), SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, new)
    assert asha.on_trial_result(None, new, {"progress": 20, "score": 0.1}) == "CONTINUE"  # before the first rung
    assert asha.on_trial_result(None, new, {"progress": 26, "score": 0.1}) == "STOP"
    fresh = search.make_scheduler(config, [])
    fresh.on_trial_add(None, new)
    assert fresh.on_trial_result(None, new, {"progress": 26, "score": 0.1}) == "CONTINUE"


def test_optuna_knows_what_ended_trials_gave(tmp_path):
    pytest.importorskip("optuna")
    space = {**LR, "finetune.patch.crop_scale": {"choice": [[0.9, 1.1], [1.1, 1.4]]}}
    config = sweep(tmp_path, space=space, search="optuna", num_trials=5)
    assert checks.check(config) == []
    values = {"finetune.optim.lr": 0.05, "finetune.patch.crop_scale": [0.9, 1.1]}
    interrupted = {"finetune.optim.lr": 0.02, "finetune.patch.crop_scale": [1.1, 1.4]}
    begun = [ended(tmp_path, values, 0.7), ended(tmp_path, interrupted, None, state="failed")]
    optuna = search.make_optuna(config, begun)
    assert optuna._ot_study.best_value == 0.7
    assert values_of(optuna.suggest("w")["trial"]) == interrupted
    drawn = values_of(optuna.suggest("x")["trial"])
    assert 0.001 <= drawn["finetune.optim.lr"] <= 0.1
    assert drawn["finetune.patch.crop_scale"] in ([0.9, 1.1], [1.1, 1.4])


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("first_judge", [None, sweeps.PROBE])
def test_optuna_takes_no_figure_of_the_first_judge_for_a_score(tmp_path, first_judge, continued):
    """What ASHA stopped before its fine-tuning has a higher figure of another kind; what failed is bad all the same."""
    pytest.importorskip("optuna")
    config = sweep(tmp_path, space=LR, search="optuna", num_trials=9, first_judge=first_judge, **CURVE)
    ends = {"pruned": [(40, 0.6)], "at its end": [(50, 0.6), (100, 0.7)], "tuned": [(100, 0.8), (150, 0.3)]}
    states = dict.fromkeys(ends, "stopped") | {"done": "done", "failed": "failed"}
    ends |= {"done": [(100, 0.5), (200, 0.4)], "failed": [(60, 0.6), (0, 0.0)]}
    if continued:
        del ends["failed"]  # it is tried again
        facts = {"judged_from": 100 if first_judge else 0, "judge": config.judge}
        begun = []
        for k, (name, reports) in enumerate(ends.items()):
            score = 0.4 if name == "done" else None
            begun.append(ended(tmp_path, {"finetune.optim.lr": 0.01 + k / 100}, score, reports, states[name], **facts))
        optuna = search.make_optuna(config, begun)
    else:
        optuna = search.make_optuna(config, [])
        for name, reports in ends.items():
            optuna.suggest(name)
            for progress, score in reports:
                optuna.on_trial_result(name, {"progress": progress, "score": score, "training_iteration": progress})
            optuna.on_trial_complete(name, {"progress": progress, "score": score})
    trials = dict(zip(ends, optuna._ot_study.trials, strict=True))
    told = {name: one.value for name, one in trials.items() if one.state.name == "COMPLETE"}
    early = {} if first_judge else {"pruned": 0.6, "at its end": 0.7}
    assert told == {**early, "tuned": 0.3, "done": 0.4, **({} if continued else {"failed": 0.0})}
    assert {one.state.name for name, one in trials.items() if name not in told} <= {"PRUNED"}


def test_a_search_by_optuna_prints_nothing_of_its_own(tmp_path, capsys, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.INFO)  # as in a new process
    for handler in logging.getLogger("optuna").handlers:
        if type(handler) is logging.StreamHandler:  # its own
            monkeypatch.setattr(handler, "stream", sys.stderr)
    given = search.make_optuna(sweep(tmp_path, space=LR, search="optuna"), [])
    given.suggest("one")
    given.on_trial_complete("one", {"progress": 100, "score": 0.5})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "key, wide, narrow, value",
    [
        ("optim.lr", {"loguniform": [0.01, 1.0]}, {"loguniform": [0.01, 0.1]}, 0.5),
        ("global_batch_size", {"choice": [4, 8, 16]}, {"choice": [8, 16]}, 4),
        ("patience", {"randint": [1, 9]}, {"randint": [1, 5]}, 7),
        ("val_share", {"uniform": [0.0, 0.3]}, {"uniform": [0.1, 0.3]}, 0.05),
        ("patch.crop_scale", {"choice": [[1.0, 1.0], [0.9, 1.1]]}, {"choice": [[0.9, 1.1]]}, [1.0, 1.0]),
    ],
)
def test_optuna_is_not_told_of_what_left_the_space(tmp_path, capsys, key, wide, narrow, value):
    """Ended or interrupted, it is said; in a space that holds them nothing is."""
    pytest.importorskip("optuna")
    begun = [
        sweeps.Trial(name=name, folder=tmp_path, values={f"finetune.{key}": value}, state=state, score=score)
        for name, state, score in (("first", "done", 0.7), ("second", "failed", None))
    ]
    trials, said = [], []
    for verbs in (wide, narrow):
        config = sweep(tmp_path, space={f"finetune.{key}": verbs}, search="optuna", num_trials=4)
        optuna = search.make_optuna(config, begun)
        drawn = values_of(optuna.suggest("w")["trial"])[f"finetune.{key}"]
        trials.append((sum(one.state.is_finished() for one in optuna._ot_study.trials), drawn == value))
        said.append(capsys.readouterr().out)
    assert trials == [(1, True), (0, False)] and said[0] == ""
    assert said[1].count("\n") == 1 and "2 earlier trials" in said[1] and said[1].endswith("them: first, second\n")


def test_what_optuna_draws_again_is_no_new_trial(tmp_path, monkeypatch):
    """Three different points of five draws are asked for; there are three."""
    pytest.importorskip("optuna")
    space = {"finetune.seed": {"choice": [0, 1, 2]}}
    config = sweep(tmp_path, space=space, search="optuna", num_trials=3)
    draws, rounds = iter([0, 0, 1, 1, 2]), []

    def fit(config, folder, left, num, room, done, again):
        rounds.append(num - len(done))
        for _ in range(rounds[-1]):
            values = {"finetune.seed": next(draws)}
            if not (folder / "trials" / name_of(values)).exists():
                ended(tmp_path, values, 0.5)

    monkeypatch.setattr(search, "fit", fit)
    monkeypatch.setattr(tune.launch, "connect", lambda ray: None)
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, ({"CPU": 4.0},)))
    monkeypatch.setattr(tune, "room_for", lambda config, trials: 1)
    monkeypatch.setattr(tune, "collect", lambda config, folder: len(sweeps.read_trials(folder)))
    assert tune.run_trials(config, [], tmp_path / "sweep") == 3 and rounds == [3, 1, 1]


def test_pbt_without_anything_to_copy_goes_on_as_it_was(tmp_path, monkeypatch):
    """The better trial has no checkpoint yet: this one keeps its learning rate, and its run's folder."""
    from ray import tune as ray_tune

    (tmp_path / "told").mkdir()
    write_json(tmp_path / "told" / "source.json", {"name": "better", "progress": 25})
    given = ray_tune.Checkpoint.from_directory(str(tmp_path / "told"))
    monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: given)
    folder = tmp_path / "trials" / "mine"
    config = c.build(c.FinetuneConfig, {"index": "s", "run": str(folder / "finetune"), "optim": {"lr": 0.4}})
    assert population.take_over(folder, {}, config) == config  # it has not begun either
    (folder / "finetune").mkdir(parents=True)
    earlier = config.model_copy(update={"optim": c.FinetuneOptimConfig(lr=0.1)})
    write_json(folder / "finetune" / "run.json", {"door": "finetune", "config": earlier.model_dump(mode="json")})
    assert population.take_over(folder, {}, config).optim == c.FinetuneOptimConfig(lr=0.1)
    assert not (folder / "taken_over.json").exists()


def test_a_copied_run_goes_on_with_its_own_learning_rate(tmp_path):
    """What pbt does: weights, momentum and step of another run, the polynomial of one's own rate."""
    config = c.build(c.FinetuneConfig, {"index": "s", "run": str(tmp_path / "mine"), "optim": {"lr": 0.4}})
    theirs = config.model_copy(update={"optim": c.FinetuneOptimConfig(lr=0.1), "run": str(tmp_path / "theirs")})

    def step(sgd, schedule, net):
        net(torch.ones(1, 3)).sum().backward()
        sgd.step()
        schedule.step()

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    sgd = optim.build_finetuning(net, theirs.optim)
    schedule = optim.polynomial(sgd, 10)
    for _ in range(4):
        step(sgd, schedule, net)
    state = {"step": 4, "model": net.state_dict(), "optimizer": sgd.state_dict(), "schedule": schedule.state_dict()}
    place = tmp_path / "theirs" / "checkpoint_00000004"
    place.parent.mkdir()
    checkpoint.write_checkpoint(tmp_path / "theirs", 4, state, {})
    torch.save({}, tmp_path / "theirs" / "best.pt")
    record = {"door": "finetune", "config": json.loads(theirs.model_dump_json()), "num_steps": 10, "later": [1, None]}
    write_json(place.parent / "run.json", record)
    metrics_path(place.parent).write_text('{"step": 4, "val/dice": 0.5}\n{"step": 5}\n')

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old").touch()
    assert population.fork(tmp_path / "theirs", tmp_path / "mine", config)
    assert checkpoint.committed_step(config.run) == 4 and not (tmp_path / "mine" / "old").exists()
    assert [row["step"] for row in read_metrics(config.run)] == [4]
    assert json.loads((tmp_path / "mine" / "run.json").read_text()) == record | {
        "config": config.model_dump(mode="json")
    }
    state = checkpoint.read_state(checkpoint.committed(config.run)[0] / STATE)
    net = torch.nn.Linear(3, 2)
    sgd = optim.build_finetuning(net, config.optim)
    schedule = optim.polynomial(sgd, 10)
    net.load_state_dict(state["model"])
    sgd.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert schedule.get_last_lr()[0] == sgd.param_groups[0]["lr"] == pytest.approx(0.4 * 0.6**0.9)
    step(sgd, schedule, net)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.4 * 0.5**0.9)
    assert not population.fork(tmp_path / "nothing", tmp_path / "mine", config)


# -- judges of which lower is better ----------------------------------------------------------------------------------


def test_a_probe_in_a_trial_takes_the_sweeps_own_ends(tmp_path):
    """Random weights are an arm; a trial judges none beside it, unless it is said."""
    config = sweep(tmp_path, arms={"random": {"probe.init": "random"}, "pgl": {}}, judge="probe/matching_mm", **PROBED)
    for one in checks.check(config):
        found = stages.stage_configs(config, one.values, tmp_path / "t")["probe"]
        assert not found.ends and found.judges == ("voxels", "decoder", "matching")
        assert found.output == str(tmp_path / "t" / "probe.json")
    base = {"judges": ["matching"], "ends": True}
    asked = sweep(tmp_path, arms={"pgl": {}}, judge="probe/matching_mm", base_finetune=None, base_probe=base)
    assert stages.stage_configs(asked, {"arm": "pgl"}, tmp_path)["probe"].ends
    assert c.ProbeConfig(index="s").ends  # of the door itself it stays


def said(value: float, scans=("p", "q"), init="run", off: float | None = None, all_readings=False) -> dict:
    """A probe's file in which every judge says what follows from one value; higher is better of all but matching."""

    def scores(level):
        organs, num = ("liver", "spleen"), 1000
        hits = [[round(num * level)] * 2 for _ in scans]
        rows = [{"scan_id": scan, "organ": organ, "dice": level / 2} for scan in scans for organ in organs]
        errors = [{"scan_id": scan, "organ": organ, "error_mm": 50 * (1 - level)} for scan in scans for organ in organs]
        details = {"scans": list(scans), "classes": list(organs), "hits": hits, "counts": [[num] * 2 for _ in scans]}
        return {
            "voxels": {"value": level, "details": details},
            "decoder": {"value": level / 2, "details": {"rows": rows}},
            "matching": {"value": 50 * (1 - level), "details": {"rows": errors}},
        }

    readings = {"reestimated": scores(value)} | ({} if off is None else {"off": scores(off)})
    if init != "random" and off is not None and not all_readings:
        readings["off"] = {"voxels": readings["off"]["voxels"]}
    return {"init": init, "readings": readings, "balanced_accuracy": value, "recall": {}, "notes": []}


@pytest.fixture
def alone(monkeypatch):
    """Trials without Ray: what is reported is kept, with the state of the trial as it is; values give what their probes
    find, none a failure."""
    told: list[tuple[str, dict, str]] = []

    class Trial:
        def __init__(self, folder):
            self.folder = folder

        def get_trial_dir(self):
            return str(self.folder)

    def run(config, values, folder, found):
        from ray import tune as ray_tune

        def apart(door, probed, train, room):
            assert isinstance(train, c.TrainConfig)
            if found is None:
                raise c.FailedRun("out of memory")
            write_json(Path(probed.output), found)

        def report(figures, checkpoint):
            told.append((folder.name, figures, sweeps.read_trial(folder).state))

        folder.mkdir(parents=True)
        monkeypatch.setattr(trial, "_apart", apart)
        monkeypatch.setattr(trial, "_pretrain", lambda config: None)
        monkeypatch.setattr(trial, "_gpus", lambda train: 0.0)
        monkeypatch.setattr(ray_tune, "get_context", lambda: Trial(folder / "ray"))
        monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: None)
        monkeypatch.setattr(ray_tune, "report", report)
        trial.run_stages(config, values, folder, 1)
        return sweeps.read_trial(folder)

    return run, told


@pytest.mark.parametrize("figure", list(sweeps.FIGURES))
def test_the_best_trial_is_the_best_whatever_its_judge(tmp_path, alone, figure):
    """Four trials, one of which fails: reports to Ray Tune, ASHA, Optuna, the table, best.yaml and the page agree."""
    run, told = alone
    space = {"pretrain.optim.lr": {"choice": [0.1, 0.2, 0.3, 0.4]}}
    config = sweep(tmp_path, space=space, judge=figure, scheduler={"kind": "asha", "grace": 50}, **PROBED)
    sweeps.remember(config, tmp_path / "sweep")
    levels = {0.1: 0.5, 0.2: 0.9, 0.3: None, 0.4: 0.7}
    found = {}
    for lr, level in levels.items():
        values = {"pretrain.optim.lr": lr}
        folder = tmp_path / "sweep" / "trials" / name_of(values)
        found[lr] = run(config, values, folder, None if level is None else said(level))
    states = {0.1: ("done", None), 0.2: ("done", None), 0.3: ("failed", "out of memory"), 0.4: ("done", None)}
    assert {lr: (one.state, one.error) for lr, one in found.items()} == states
    value = {"voxels": lambda v: v, "decoder": lambda v: v / 2, "matching": lambda v: 50 * (1 - v)}[
        sweeps.FIGURES[figure]
    ]
    assert all(
        found[lr].score == pytest.approx(value(level)) for lr, level in levels.items() if level
    )  # in its own unit
    order = [0.2, 0.4, 0.1, 0.3]  # from the best to the failed one
    last = {lr: next(f["score"] for name, f, _ in reversed(told) if name == one.name) for lr, one in found.items()}
    assert sorted(last, key=last.get, reverse=True) == order and all(map(math.isfinite, last.values()))
    assert sorted(found, key=lambda lr: found[lr].merit, reverse=True) == order

    result = tune.collect(config, tmp_path / "sweep")
    assert result.best == {"pretrain.optim.lr": 0.2} and result.score == found[0.2].score
    assert c.load(c.PretrainConfig, [str(tmp_path / "sweep/best.yaml"), "index=s", "run=r"]).optim.lr == 0.2
    page = Path(tmp_path / "sweep/report.html").read_text()
    assert f"{figure} {found[0.2].score:.4f} (trial {found[0.2].name})" in page
    assert (f"Judged by {figure} (lower is better);" in page) == (figure == "probe/matching_mm")
    rows = [page.index(f"<td>{found[lr].name}</td>") for lr in order]
    assert rows == sorted(rows) and "decoder Dice</th><th>matching, mm</th>" in page
    table = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert {(r["probe"], r["decoder_dice"], round(r["matching_mm"], 6)) for r in table if r["probe"]} == {
        (level, level / 2, round(50 * (1 - level), 6)) for level in levels.values() if level
    }

    asha, new = (
        search.make_scheduler(config, [one for one in found.values() if one.state == "done"]),
        SimpleNamespace(trial_id="n"),
    )
    for level, decision in ((0.6, "STOP"), (0.95, "CONTINUE")):
        asha.on_trial_add(None, new)
        report = {"progress": 60, "score": sweeps.merit(figure, value(level))}
        assert asha.on_trial_result(None, new, report) == decision
        new = SimpleNamespace(trial_id="another")
    pytest.importorskip("optuna")
    optuna = search.make_optuna(config.model_copy(update={"search": "optuna"}), list(found.values()))
    assert optuna._ot_study.best_value == pytest.approx(found[0.2].merit)


def test_a_sweep_in_a_submitted_job_finds_its_room(tmp_path, monkeypatch):
    """Where relative paths are refused."""
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, ({"CPU": 4.0},)))
    config = c.build(c.TuneConfig, {"index": "/s", "run": str(tmp_path / "sweep"), **BASE, "space": LR})
    assert room_for(config, []) == 2


def test_a_sweep_on_a_cluster_that_grows_counts_what_can_be(tmp_path, monkeypatch):
    """A head alone is up: its cores bound nothing."""
    config = sweep(tmp_path, space=LR, num_trials=8)
    gpus = (capacity.Kind({"CPU": 8.0, "GPU": 1.0}, 6),)
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({"CPU": 1.0}, (), gpus, 5))
    assert room_for(config, checks.check(config)) == 5
    pbt = config.model_copy(update={"scheduler": c.SchedulerConfig(kind="pbt")})
    with pytest.raises(ValueError, match="lower num_trials, or raise the autoscaler's maximum"):
        room_for(pbt, checks.check(config))
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({"CPU": 1.0}, (), unknown=True))
    base = {"max_steps": 4, "train": {"device": "cpu"}}
    small = sweep(tmp_path, space=LR, base_finetune=base, base_pretrain=None, max_concurrent=3)
    assert room_for(small, []) == 3


def test_an_arm_may_be_a_probe_of_random_weights_alone(tmp_path, alone, monkeypatch):
    """It trains nothing; it is judged on the resources of the others' pre-training."""
    config = sweep(tmp_path, arms={"random": {"probe.init": "random"}}, judge="probe/decoder_dice", **PROBED)
    (only,) = checks.check(config)
    run, told = alone
    found = run(config, only.values, tmp_path / "trials" / only.name, said(0.4, init="random", off=0.6))
    assert (found.state, found.error, found.score) == ("done", None, 0.2)  # of the reading that counts
    assert [(figures["score"], state) for _, figures, state in told] == [(0.2, "done")]
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, ({"CPU": 4.0},)))
    assert room_for(config, [only]) == 2


@pytest.mark.parametrize("last", ["probe", "curve", "curve and probe", "fine-tuning"])
def test_a_scheduler_hears_of_the_end_when_a_trial_is_done(tmp_path, alone, monkeypatch, last):
    """Or it would stop what is finished. ASHA has seen better ones; the trial's notes have all figures."""

    def train(config, figure):
        Path(config.run).mkdir(parents=True)
        write_json(Path(config.run) / "run.json", {"door": "d", "config": {}, "num_steps": 4})
        rows = [{"step": step, figure: value} for step, value in ((2, 0.3), (4, 0.2))]
        metrics_path(config.run).write_text("".join(json.dumps(row) + "\n" for row in rows))

    run, told = alone
    bases = {} if last == "fine-tuning" else {"base_finetune": None, "judge": sweeps.PROBE, **CURVE}
    if "probe" in last:
        bases |= {"base_probe": {}} | ({} if "curve" in last else {"base_pretrain": BASE["base_pretrain"]})
    config = sweep(tmp_path, arms={"a": {}}, scheduler={"kind": "asha", "grace": 60}, **bases)
    place = stages.stage_configs(config, {"arm": "a"}, tmp_path / "t")["pretrain"].run
    train(SimpleNamespace(run=place), sweeps.PROBE if "curve" in last else "train/loss")
    monkeypatch.setattr(trial.finetune, "run", lambda config: train(config, "val/dice"))
    found = run(config, {"arm": "a"}, tmp_path / "trials" / "t", said(0.1))
    assert found.error is None
    assert [figures["progress"] for _, figures, state in told if state != "done"] == [50] * (last != "probe")
    (end,) = (figures for _, figures, state in told if state == "done")
    best = {"probe": 0.1, "curve": 0.2, "curve and probe": 0.1, "fine-tuning": 0.3}[last]
    assert (found.state, found.score, end["score"], end["progress"]) == ("done", best, best, 100)
    assert found.reports == ([] if last == "probe" else [(50, 0.3)]) + [(100, best)]

    better = [found.model_copy(update={"name": str(k), "reports": [(100, 0.8 + k / 10)]}) for k in range(2)]
    asha, one = search.make_scheduler(config, better), SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, one)
    for _, figures, state in told:
        assert asha.on_trial_result(None, one, figures) == "CONTINUE" or state == "done"


def test_the_first_judges_rungs_have_its_own_sign(tmp_path):
    """Matching before fine-tuning (lower is better), Dice after it: each rung compares its own figure."""
    base = {"base_probe": {"judges": ["matching"]}, "first_judge": "probe/matching_mm"}
    config = sweep(tmp_path, space=LR, scheduler={"kind": "asha", "grace": 50}, **base)
    done = [
        ended(tmp_path, {"a": k}, dice, [(100, mm), (150, dice)], judged_from=100, judge="val/dice")
        for k, (mm, dice) in enumerate(((20.0, 0.5), (30.0, 0.6), (40.0, 0.7)))
    ]
    assert [one.score for one in done] == [one.merit for one in done] == [0.5, 0.6, 0.7]
    for mm, decision in ((45.0, "STOP"), (18.0, "CONTINUE")):
        asha, new = search.make_scheduler(config, done), SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, new)
        score = sweeps.merit(config.first_judge, mm)
        assert asha.on_trial_result(None, new, {"progress": 100, "score": score}) == decision


def test_arms_are_compared_to_the_strongest_control_by_all(tmp_path):
    """Controls are stronger with BatchNorm off here, of which one row each is held against the strongest; matching's
    sign is turned in words, too."""
    controls = {"random": {"probe.init": "random"}, "wrong priors": {"pretrain.align.wrong_priors": True}}
    space = {"pretrain.seed + probe.seed": {"grid_search": [0, 1, 2]}}
    config = sweep(tmp_path, arms=controls | {"pgl": {}}, space=space, judge="probe/matching_mm", **PROBED)
    sweeps.remember(config, tmp_path / "sweep")
    seen = "2 of the 2 evaluated scans were pre-trained on (without labels): figures may be optimistic"
    for seed in range(3):
        for arm, level, off in (("random", 0.4, 0.6), ("wrong priors", 0.5, 0.65), ("pgl", 0.7 + 0.01 * seed, 0.1)):
            values = {"arm": arm, "pretrain.seed + probe.seed": seed}
            place = ended(tmp_path, values, 50 * (1 - level), judge="probe/matching_mm").folder
            kind = "random" if arm == "random" else "run"
            found = said(level, init=kind, off=off, all_readings=arm != "pgl")
            found |= {"notes": [seen]} if arm != "random" else {}
            write_json(place / "probe.json", found)
    (block,) = arms.judged(json.loads(config.model_dump_json()), sweeps.read_trials(tmp_path / "sweep"))
    assert [row["name"] for row in block["rows"]] == [
        *("random", "random, BatchNorm off", "wrong priors", "wrong priors, BatchNorm off", "pgl")
    ]
    spread = np.std([0.7, 0.71, 0.72], ddof=1)
    assert block["rows"][4]["cells"] == [
        f"0.710 ± {spread:.3f}",
        f"0.355 ± {spread / 2:.3f}",
        f"14.5 ± {50 * spread:.1f}",
    ]
    low, high = stats.t.interval(0.95, 2, 6, 100 * spread / 3**0.5)
    ours = [line for line in block["sentences"] if line.startswith("pgl against wrong priors, BatchNorm off: ")]
    assert ours[0].endswith(
        "+6.00 points of balanced accuracy, more than the noise of 2 scans (95 % interval +6.00 to +6.00); "
        f"ahead with 3 of 3 seeds, more than their noise ({low:+.2f} to {high:+.2f})."
    )
    assert "+3.00 points of Dice, more than" in ours[1] and "-3.00 mm of error (lower is better), more than" in ours[2]
    assert all("ahead with 3 of 3 seeds" in line for line in ours) and len(ours) == 3
    start = "random, BatchNorm off against wrong priors, BatchNorm off: "
    behind = [line for line in block["sentences"] if line.startswith(start)]
    assert len(behind) == 3 and "+2.50 mm" in behind[2] and all("ahead with 0 of 3" in line for line in behind)
    assert len(block["sentences"]) == 6  # a control is not held against itself
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert f"<p>wrong priors, pgl: {seen}.</p>" in page and "Frozen encoders" in page and ours[2] in page


@pytest.mark.parametrize(
    ("keys", "num"),
    [(["finetune.seed"], 1), (["finetune.seed", "probe.seed"], 3), (["pretrain.seed + finetune.seed"], 3)],
)
def test_frozen_encoders_are_counted_by_their_own_seeds(tmp_path, keys, num):
    """Judged once more with each fine-tuning, an encoder says what it said before."""
    space = {key: {"grid_search": [0, 1, 2]} for key in keys}
    init = {"finetune.init": "random", "probe.init": "random"}
    config = sweep(tmp_path, arms={"random": init, "pgl": {}}, space=space, base_probe={"judges": ["voxels"]})
    sweeps.remember(config, tmp_path / "sweep")
    for seeds in itertools.product(range(3), repeat=len(keys)):
        for arm, level in (("random", 0.4), ("pgl", 0.5)):
            values = {"arm": arm, **dict(zip(keys, seeds))}
            level += 0.01 * next((seed for key, seed in zip(keys, seeds) if not key.startswith("finetune")), 0)
            write_json(ended(tmp_path, values, level).folder / "probe.json", said(level, init=arm))
    (block,) = arms.judged(json.loads(config.model_dump_json()), sweeps.read_trials(tmp_path / "sweep"))
    assert [row["seeds"] for row in block["rows"]] == [num, num]
    assert [("±" in cell) for row in block["rows"] for cell in row["cells"]] == [num > 1] * 6
    assert all(f"ahead with {num} of {num} seeds" in line for line in block["sentences"]) and block["sentences"]
    assert all(len(one.by_seed) == num for one in block["gains"]["pgl"].values())


def test_scans_both_trained_and_tested_on_are_said_before(tmp_path, capsys):
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        for i in numbers:
            volume = np.random.default_rng(i).integers(-200, 200, (24, 40, 40)).astype(np.int16)
            kept = {"label": np.ones_like(volume, np.uint8), "labelled": (1,), "split": split}
            write_scan(tmp_path / "own", f"s{i}", volume, np.eye(4), **kept)
    write_index(tmp_path / "own", {"a": 1}, (-1024.0, 325.0))
    geometry = {"views": {"size": [16, 32, 32]}, "global_batch_size": 1, "max_steps": 1, "encoder": ENCODER}
    bases = {"base_probe": {"num_scans": 2, "judges": ["matching"]}, "base_evaluate": {"split": "test"}}
    line = (
        "tune: note: 2 of the 2 scans to test on are pre-trained on (without labels): base_pretrain.split=train leaves"
    )
    for split, expected in ((None, 1), ("train", 0)):
        base = {**geometry, "split": split}
        config = sweep(tmp_path, index=str(tmp_path / "own"), space=LR, num_trials=3, base_pretrain=base, **bases)
        stores.check_stores(config, checks.check(config))
        assert capsys.readouterr().out.count(line) == expected
    chosen = "2 of the 2 scans to evaluate on also choose among the trials (first_judge=probe/...)"
    for first_judge, expected in ((None, 0), ("probe/matching_mm", 1)):
        own = {"base_pretrain": {**geometry, "split": "train"}, "first_judge": first_judge, **bases}
        config = sweep(tmp_path, index=str(tmp_path / "own"), space=LR, num_trials=3, **own)
        stores.check_stores(config, checks.check(config))
        assert capsys.readouterr().out.count(chosen) == expected
    config = sweep(
        tmp_path, index=str(tmp_path / "own"), space=LR, base_probe={"judges": "matching", "num_test_scans": 1}
    )
    with pytest.raises(ValueError, match="judges=matching needs two test scans or more: num_test_scans=1"):
        stores.check_stores(config, checks.check(config))


# -- what is read back ------------------------------------------------------------------------------------------------


def test_best_yaml_serves_both_doors(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text("pretrain: {ema_decay: 0.99}\nfinetune: {optim: {lr: 0.5}}\n")
    places = [str(path), "index=s", "run=r"]
    assert c.load(c.PretrainConfig, places).ema_decay == 0.99 and c.load(c.FinetuneConfig, places).optim.lr == 0.5
    assert c.load(c.BenchConfig, places[:2]).ema_decay == 0.99
    path.write_text("finetune: {optim: {lr: 0.5}}\n")
    with pytest.raises(ValueError, match="has settings for finetune alone, none for this door"):
        c.load(c.PretrainConfig, places)


def test_the_best_trial_is_written_for_both_doors(tmp_path):
    """The better of two that ended; one that was stopped with a higher figure on the way is none."""
    config = sweep(tmp_path, space={"finetune.optim.lr": {"choice": [0.1, 0.2, 0.3]}})
    sweeps.remember(config, tmp_path / "sweep")
    for lr, score, state in ((0.1, 0.4, "done"), (0.2, 0.6, "done"), (0.3, None, "stopped")):
        ended(tmp_path, {"finetune.optim.lr": lr}, score, [(50, 0.9 if state == "stopped" else 0.1)], state=state)
    result = tune.collect(config, tmp_path / "sweep")
    assert result.best == {"finetune.optim.lr": 0.2} and result.score == 0.6
    assert result.states == {"done": 2, "stopped": 1}
    places = [str(tmp_path / "sweep/best.yaml"), "index=s", "run=r"]
    tuned, pretrained = c.load(c.FinetuneConfig, [*places, "init=r0"]), c.load(c.PretrainConfig, places)
    assert tuned.optim.lr == 0.2 and Path(tuned.init).name == "r0" and tuned.max_steps == 4
    assert tuned.encoder == pretrained.encoder and pretrained.encoder.width == 8 and pretrained.max_steps == 4
    assert (tmp_path / "sweep/report.html").exists() and (tmp_path / "sweep/trials.parquet").exists()


def test_a_continued_trial_replaces_what_it_reports_again(tmp_path):
    for progress, score in ((10, 0.1), (20, 0.2), (30, 0.3), (20, 0.25)):
        sweeps.add_report(tmp_path, progress, score)
    sweeps.note(
        tmp_path, values={"arm": "x", "finetune.optim.lr": 0.0123456}, started=1, since=time.time() - 9, state="running"
    )
    sweeps.end(tmp_path, "stopped", None)
    sweeps.end(tmp_path, "failed", "its process was ended")
    found = sweeps.read_trial(tmp_path)
    assert found.reports == [(10, 0.1), (20, 0.25)] and found.score == 0.25
    assert found.title == "x, lr 0.01235" and 9 <= found.took_s < 60
    assert "stopped in" in progress_table.table([found])
    sweeps.note(tmp_path, judged_from=100)
    assert sweeps.read_trial(tmp_path).score is None  # the first judge's figure is no score
    line = progress_table.counts([found], 3, 1, began=0.0)
    assert line.startswith("  1 stopped; about ") and line.endswith(" left, of 3")


def left_s(line: str) -> int:
    """The time left in a line, "1:02" or "1:02:03", in seconds."""
    (words,) = re.findall(r"[\d:]*\d:\d\d\b", line)
    return sum(int(part) * 60**place for place, part in enumerate(reversed(words.split(":"))))


@pytest.mark.parametrize("newest", [420, 500, 700, 990])
@pytest.mark.parametrize("earlier_s", [0.2, 1.0, 5.0])
def test_time_left_of_a_continued_stage_is_of_its_own_pace(tmp_path, earlier_s, newest):
    """It went on at step 400 of 1000, at a second per step; before and after its clock has passed the earlier one's."""
    starts = [(0, 200, 9.0), (200, 400, earlier_s), (400, newest, 1.0)]
    rows = [(step, (step - first) * pace) for first, last, pace in starts for step in range(first + 10, last + 1, 10)]
    metrics_path(tmp_path).write_text("".join(json.dumps({"step": s, "time_s": t}) + "\n" for s, t in rows))
    write_json(tmp_path / "run.json", {"door": "pretrain", "config": {}, "num_steps": 1000})
    running = {"state": "running", "stage": "pretrain", "pretrain": str(tmp_path)}
    one = sweeps.Trial(name="x", folder=tmp_path, values={"seed": 1}, **running)
    assert left_s(progress_table.table([one], head=False)) == 1000 - newest


def test_an_interrupted_trial_saves_no_time_before_it_goes_on(tmp_path):
    """Six of a hundred seconds each are left; one of them runs for 40 s."""
    now = time.time()

    def one(state, **facts):
        return sweeps.Trial(name="x", folder=tmp_path, values={}, state=state, **facts)

    begun = [one("done", took_s=100.0), one("running", since=now - 40), one("running", since=now - 86400)]
    assert 555 <= left_s(progress_table.counts(begun, 7, 1, began=now - 60)) <= 560


def test_a_collapse_is_told_from_other_ends(tmp_path):
    def rows(*collapsed):
        figures = {"health/feature_std": 0.01, "health/effective_rank": 1.0, "train/loss": 0.0}
        lines = [{"step": k + 1, "health/collapsed": float(v), **figures} for k, v in enumerate(collapsed)]
        metrics_path(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in lines))

    goes_on = {"door": "pretrain", "config": {"health": {"stop_on_collapse": False}}}
    write_json(tmp_path / "run.json", {"num_steps": 4} | goes_on)
    rows(0, 1, 1)
    assert sweeps.collapsed(str(tmp_path)) is None
    stops = {"door": "pretrain", "config": {"health": {"stop_on_collapse": True}}}
    write_json(tmp_path / "run.json", {"num_steps": 4} | stops)
    assert "stopped at step 3: features collapsed" in sweeps.collapsed(str(tmp_path))
    for others in ((1, 0, 1), (1,), (0, 1, 1, 1)):  # the last ran to its end
        rows(*others)
        assert sweeps.collapsed(str(tmp_path)) is None


def test_an_arms_difference_is_held_against_the_seeds_noise_too():
    for values, worth in (([0.02, 0.04, -0.01], "within"), ([0.02, 0.03, 0.025], "more than")):
        wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        text = f", {worth} their noise ({100 * wanted.low:+.2f} to {100 * wanted.high:+.2f})"
        assert arms.over(values) == text
    assert arms.over([0.02]) == ""


@pytest.mark.parametrize("out", [("winner",), ("broken", "halted"), ("winner", "broken", "halted", "runner_up")])
def test_arms_left_out_later_are_in_no_answer(tmp_path, out):
    """A sweep that has run goes on without the best arm, one that failed, one that was interrupted, or all that a point
    has. The page names them in one line, and all else is about the others; the table of trials keeps them."""
    known = {"random": {"probe.init": "random", "finetune.init": "random"}}
    levels = {"random": 0.3, "runner_up": 0.5, "winner": 0.7, "broken": None, "halted": None}
    known |= {arm: {} for arm in levels if arm not in known}
    states = {"broken": "failed", "halted": "running"}
    base = {"space": {"probe.num_scans": {"grid_search": [5, 10]}}, "base_probe": PROBED["base_probe"]}
    sweeps.remember(sweep(tmp_path, arms=known, **base), tmp_path / "sweep")
    for arm, level in levels.items():
        for num in (5,) if arm in ("random", "runner_up") else (5, 10):
            values = {"arm": arm, "probe.num_scans": num}
            run = tmp_path / "sweep" / "trials" / name_of(values) / "finetune"
            place = ended(tmp_path, values, level, state=states.get(arm, "done"), finetune=str(run)).folder
            if level:
                tuned_run(run, 0, {"liver": {"p": level, "q": level}})
                write_json(place / "probe.json", said(level, init="random" if arm == "random" else "run"))
    left = {arm: own for arm, own in known.items() if arm not in out}
    config = sweep(tmp_path, arms=left, **base)
    sweeps.remember(config, tmp_path / "sweep")
    result = tune.collect(config, tmp_path / "sweep")
    assert result.best["arm"] == max(left, key=lambda arm: levels[arm] or 0)
    assert sum(result.states.values()) == sum(1 if arm in ("random", "runner_up") else 2 for arm in left)
    shown = (tmp_path / "sweep/report.html").read_text().partition("<h2>The sweep</h2>")[0]  # sweep.json knows them all
    assert f"arms that the sweep leaves out now ({', '.join(sorted(out))})" in shown
    assert all(shown.count(arm) == 1 for arm in out)
    rows = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert {row["arm"] for row in rows} == set(known)


def test_optuna_knows_nothing_of_arms_left_out(tmp_path, monkeypatch):
    """Neither what they gave, for it has no such choice, nor that they were interrupted; nor do they count as done."""
    pytest.importorskip("optuna")
    config = sweep(tmp_path, arms={"here": {}}, space=LR, search="optuna", num_trials=2)
    for arm, score, state in (("here", 0.4, "done"), ("gone", 0.9, "done"), ("gone", None, "failed")):
        ended(tmp_path, {"arm": arm, "finetune.optim.lr": 0.01 if score else 0.02}, score, state=state)
    searches = []

    class Tuner:
        def __init__(self, trainable, tune_config, **others):
            searches.append((tune_config.search_alg, tune_config.num_samples))

        def fit(self):
            pass

    from ray import tune as ray_tune

    monkeypatch.setattr(ray_tune, "Tuner", Tuner)
    monkeypatch.setattr(tune.launch, "connect", lambda ray: None)
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, ({"CPU": 4.0},)))
    monkeypatch.setattr(tune, "room_for", lambda config, trials: 1)
    monkeypatch.setattr(tune, "REDRAWS", 1)
    monkeypatch.setattr(tune, "collect", lambda config, folder: None)
    tune.run_trials(config, [], tmp_path / "sweep")
    ((optuna, num),) = searches
    assert num == 1 and optuna._ot_study.best_value == 0.4
    assert values_of(optuna.suggest("w")["trial"])["arm"] == "here"


def test_settings_that_matter_and_their_intervals(tmp_path):
    """Adjusted shares against statistics by hand; Student's interval against scipy's."""
    rng = np.random.default_rng(0)
    space = {"finetune.optim.lr": {"loguniform": [0.001, 0.1]}, "finetune.seed": {"choice": [0, 1]}}
    config = json.loads(sweep(tmp_path, space=space).model_dump_json())
    rates = 10 ** rng.uniform(-3, -1, 24)
    trials = [
        SimpleNamespace(
            values={"finetune.optim.lr": float(lr), "finetune.seed": k % 2}, score=float(lr**2), state="done"
        )
        for k, lr in enumerate(rates)
    ]
    shares = dict(sweep_report.importance(config, trials))
    assert shares["lr"] == "100%" and next(iter(shares)) == "lr"
    scores, seeds = rates**2, np.arange(24) % 2
    eta = 1 - sum(((scores[seeds == k] - scores[seeds == k].mean()) ** 2).sum() for k in (0, 1)) / scores.var() / 24
    assert shares["seed"] == f"{max(0.0, 1 - (1 - eta) * 23 / 22):.0%}"
    assert sweep_report.importance(config, trials[:7]) == []
    low, high = stats.t.interval(0.95, 3, np.mean(scores[:4]), stats.sem(scores[:4]))
    assert sweep_report.reach(list(scores[:4])) == pytest.approx((high - low) / 2)
    axis = sweep_plots.Axis("seed", list(map(float, seeds)), [str(k) for k in seeds])
    found = sweep_report.means(axis, list(scores), [k > 0 for k in range(24)])
    assert found[0][1] == pytest.approx(scores[2::2].mean()) and found[1][1] == pytest.approx(scores[1::2].mean())


def test_the_published_tables_are_consistent():
    """The mean column is the mean of the organs, but for the one figure that the paper prints otherwise."""
    known, off = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "published.yaml")), []
    assert {number for block in known.values() for number in block["tables"]} == set(range(1, 9))
    for name, block in known.items():
        for number, scores in block["tables"].items():
            assert set(scores) == {"dice", "iou", "hd_mm"}
            for score, rows in scores.items():
                for arm, values in rows.items():
                    assert len(values) == len(block["columns"])
                    if len(values) > 1 and abs(np.mean(values[:-1]) - values[-1]) > 0.011:
                        off.append((name, number, score, arm))
    assert off == [("bcv", 5, "hd_mm", "pgl")]


def tuned_run(folder: Path, seed: int, dice: dict[str, dict[str, float]], share: float = 1.0, missed: int = 0) -> None:
    """A fine-tuning run's folder with an evaluation: organ -> scan -> Dice."""
    import pyarrow as pa

    (folder / "evaluation").mkdir(parents=True)
    config = {"seed": seed, "global_batch_size": 4, "index": "s", "init": "random", "num_scans": share}
    scans = {"train": ["a"] * round(6 * share), "val": ["b"] * round(2 * share)}
    record = {"door": "finetune", "config": config, "num_steps": 10, "scans": scans}
    write_json(folder / "run.json", record)
    metrics_path(folder).write_text('{"step": 5, "time_s": 2.0}\n{"step": 10, "time_s": 4.0}\n')
    rows = [
        {"scan_id": scan, "organ": organ, "dice": v, "iou": v / 2, "hd_mm": 5.0, "hd95_mm": 4.0}
        for organ, scans in dice.items()
        for scan, v in scans.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation" / "metrics.parquet")
    counts = {"iou": 0.5, "hd_mm": 5.0, "hd95_mm": 4.0, "num_missed": missed, "num_invented": 0}
    organs = {o: {"dice": float(np.mean(list(v.values()))), **counts} for o, v in dice.items()}
    mean = float(np.mean([v["dice"] for v in organs.values()]))
    summary = {"dice": mean, "iou": 0.5, "hd_mm": 5.0, "hd95_mm": 4.0, "organs": organs, "index": "s"}
    write_json(folder / "evaluation" / "summary.json", summary)


@pytest.mark.slow
def test_a_grid_becomes_the_papers_tables(tmp_path, monkeypatch):
    """Two shares of the labels; the paper's figures stand under all of them alone. One cell of the second share failed,
    so that Figure 8 takes the other seed."""
    arms = {"random": {"finetune.init": "random"}, "pgl": {}}
    space = {"finetune.seed": {"grid_search": [0, 1]}, "finetune.num_scans": {"grid_search": [0.5, 1.0]}}
    config = sweep(tmp_path, arms=arms, space=space, published="liver")
    sweeps.remember(config, tmp_path / "sweep")
    dice = {("random", 0): 0.5, ("random", 1): 0.6, ("pgl", 0): 0.7, ("pgl", 1): 0.9}
    for share, (arm, seed) in itertools.product((0.5, 1.0), dice):
        values = {"arm": arm, "finetune.seed": seed, "finetune.num_scans": share}
        level = dice[arm, seed] * share
        run = tmp_path / "sweep" / "trials" / name_of(values) / "finetune"
        if (arm, seed, share) == ("random", 0, 1.0):
            ended(tmp_path, values, None, state="failed", error="disk full")
            continue
        found = ended(tmp_path, values, level, [(50, level / 2)], finetune=str(run), finetune_gpus=2.0)
        scans = {"liver": {"p": level, "q": level}, "tumour": {"p": level - 0.2, "q": level - 0.4}}
        tuned_run(run, seed, scans, share, missed=seed if arm == "pgl" else 2)
    assert sweeps.cost(found) == {
        "pairs": 0,
        "patches": 40,
        "pretrain_s": 0.0,
        "finetune_s": 4.0,
        "pretrain_gpu_s": 0.0,
        "finetune_gpu_s": 8.0,
        "gpu_hours": 8 / 3600,
    }
    sweeps.write_table(tmp_path / "sweep")
    rows = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert {(r["arm"], r["finetune.seed"]): r["score"] for r in rows if r["finetune.num_scans"] == 0.5} == {
        key: value / 2 for key, value in dice.items()
    }
    content = sweep_report.content(tmp_path / "sweep", lambda runs: {"scans": [], "legend": []})
    half, whole = content["grid"]["blocks"]
    assert "0.5" in half["point"] and not any(row["paper"] for table in half["tables"] for row in table["rows"])
    first, *_, last = whole["tables"]
    assert first["heads"] == ["mean", "liver", "tumour"] and last["heads"] == [*first["heads"], "left out"]
    texts = {(row["name"], row["paper"]): row["cells"] for row in first["rows"]}
    assert texts["random", False][1] == "60.00"  # the seed that is there
    assert texts["pgl", False][0] == f"{(80 + 50) / 2:.2f} ± {100 * np.std([0.55, 0.75], ddof=1):.2f}"
    assert texts["paper, Table 2", True] == ["76.05", "96.43", "55.66"]  # of the last arm, pgl
    names = ["random", "paper, Table 2", "pgl", "paper, Table 2", "paper, Table 6"]
    assert [row["name"] for row in first["rows"]] == names
    left_out = {row["name"]: row["cells"][-1] for row in last["rows"]}
    assert left_out["random"] == "4.0" and left_out["pgl"] == f"1.0 ± {np.std([0, 2], ddof=1):.1f}"  # of two organs
    assert whole["sentences"] == [
        "pgl against random: +30.00 points of Dice, more than the noise of 2 scans (95 % interval +30.00 to +30.00); "
        "ahead with 1 of 1 seeds."
    ]
    figure = content["grid"]["over"]  # Figure 5: two arms over 4 and 8 labelled scans
    figure = base64.b64decode(figure.partition("base64,")[2]).decode().lower()
    assert all(color.lower() in figure for color in content["grid"]["colors"].values())
    written = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")])))
    assert not CHROMIUM or faults(written) == []
    page = written.read_text()
    assert "paper, Table 6" in page and "overlays left out" in page and "pgl, seed 1, num_scans 0.5" in page
    drawn, shown = {"scans": [("data:,", "Scan p")], "legend": [(1, "liver", "#E69F00")]}, []
    monkeypatch.setattr(report, "overlays", lambda runs: shown.extend(runs) or drawn)
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "Scan p" in page and "1 liver" in page
    assert [(run.name, run.config["seed"]) for run in shown] == [("random", 1), ("pgl", 1)]


@pytest.mark.parametrize(
    "keys", [["pretrain.seed"], ["pretrain.seed", "finetune.seed"], ["pretrain.seed + finetune.seed", "probe.seed"]]
)
def test_fine_tuned_arms_are_paired_by_all_their_seeds(tmp_path, keys):
    """A training meets that of the other arm with the same seeds, whichever are swept; those of probes do not count."""
    space = {key: {"grid_search": [0, 1, 2]} for key in keys}
    config = sweep(tmp_path, arms={"random": {"finetune.init": "random"}, "pgl": {}}, space=space)
    sweeps.remember(config, tmp_path / "sweep")
    expected = {}
    for seeds in itertools.product(range(3), repeat=len(keys)):
        of_tuning = {key: seed for key, seed in zip(keys, seeds) if key != "probe.seed"}
        base = 0.2 + sum(0.1 * 2**k * seed for k, seed in enumerate(of_tuning.values()))
        gain = 0.01 * (1 + sum(3**k * seed for k, seed in enumerate(of_tuning.values())))
        expected[tuple(of_tuning.values())] = gain
        for arm, level in (("random", base), ("pgl", base + gain)):
            values = {"arm": arm, **dict(zip(keys, seeds))}
            run = tmp_path / "sweep" / "trials" / name_of(values) / "finetune"
            ended(tmp_path, values, level, finetune=str(run), finetune_gpus=0.0)
            seed = next((seed for key, seed in of_tuning.items() if "finetune" in key), 0)
            tuned_run(run, seed, {"liver": {"p": level, "q": level}})
    shown = []
    content = sweep_report.content(tmp_path / "sweep", lambda runs: shown.extend(runs) or {"scans": [], "legend": []})
    (block,) = content["grid"]["blocks"]
    assert sorted(block["gains"]["pgl"].by_seed) == pytest.approx(sorted(expected.values()))
    assert f"ahead with {len(expected)} of {len(expected)} seeds" in block["sentences"][0]
    assert [row["seeds"] for row in block["tables"][0]["rows"]] == [len(expected)] * 2
    assert [run.name for run in shown] == ["random", "pgl"]
    gap = shown[1].summary["dice"] - shown[0].summary["dice"]
    assert gap == pytest.approx(block["gains"]["pgl"].by_seed[0])


def test_figures_of_few_labels_have_no_published_ones(tmp_path):
    """A grid that was cut off before its largest share, or that names a number of scans."""
    config = sweep(tmp_path, arms={"random": {"finetune.init": "random"}}, published="liver", space=LR)
    sweeps.remember(config, tmp_path / "sweep")
    values = {"arm": "random", "finetune.num_scans": 0.2}
    run = tmp_path / "sweep" / "trials" / name_of(values) / "finetune"
    ended(tmp_path, values, 0.5, [(50, 0.5)], finetune=str(run), finetune_gpus=0.0)
    tuned_run(run, 0, {"liver": {"p": 0.5}, "tumour": {"p": 0.5}}, 0.5)
    grid = sweep_report.content(tmp_path / "sweep", lambda runs: {"scans": [], "legend": []})["grid"]
    assert not grid["published"] and not any(row["paper"] for row in grid["blocks"][0]["tables"][0]["rows"])


def test_scores_that_cannot_be_drawn_leave_no_hole(tmp_path):
    """A sweep of failures alone still has its page; equal scores have a colour."""
    sweeps.remember(sweep(tmp_path, space=LR), tmp_path / "sweep")
    ended(tmp_path, {"finetune.optim.lr": 0.1}, None, state="failed", error="train/loss is nan")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "train/loss is nan" in page
    for lr in (0.2, 0.3):
        ended(tmp_path, {"finetune.optim.lr": lr}, 0.5, [(40, 0.5)], state="stopped" if lr == 0.3 else "done")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "stopped in finetune" in page and math.isclose(page.count("<figure"), 3)
