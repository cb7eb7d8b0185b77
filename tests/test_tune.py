"""Sweeps without Ray jobs: what is refused, which trials there are, what they share, what is read back and reported."""

import base64
import itertools
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats

from pgl_ray import config as c
from pgl_ray import pictures, report, sweep_report, sweeps, trial, tune
from pgl_ray.data.store import write_index, write_scan
from pgl_ray.train import checkpoint, launch, optim

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {"width": 8, "depths": [1, 1, 1, 1]}
BASE = {"base_pretrain": {"max_steps": 4, "encoder": ENCODER}, "base_finetune": {"max_steps": 4}}
LR = {"finetune.optim.lr": {"loguniform": [0.001, 0.1]}}


def sweep(tmp_path, **changes) -> c.TuneConfig:
    return c.build(c.TuneConfig, {"index": "s", "run": str(tmp_path / "sweep"), **BASE, **changes})


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
        tune.check(sweep(tmp_path, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))


def fine_tunes(path: Path) -> bool:
    """conf/tune_small.yaml is for spaces that do."""
    return OmegaConf.load(path).get("base_finetune", {}) is not None


@pytest.mark.parametrize(
    "path, small", [(path, small) for path in SPACES for small in (False, True) if not small or fine_tunes(path)]
)
def test_fine_tuning_takes_the_encoder_that_was_pretrained(tmp_path, path, small):
    """In every trial of every shipped space, at a laptop's size, too."""
    files = [str(path), *([str(ROOT / "conf/tune_small.yaml")] if small else [])]
    config = c.load(c.TuneConfig, [*files, "index=s", f"run={tmp_path}/sweep"])
    trials = tune.check(config)
    assert trials or config.search == "optuna"
    for each in trials:
        configs = trial.stage_configs(config, each.values, tmp_path)
        if "pretrain" in configs and "finetune" in configs:
            assert configs["finetune"].encoder == configs["pretrain"].encoder
            assert configs["finetune"].init == configs["pretrain"].run


def test_every_point_of_the_space_is_one_trial(tmp_path):
    space = {"finetune.seed + pretrain.seed": {"grid_search": [3, 4]}, "finetune.optim.lr": {"choice": [0.1, 0.2]}}
    config = sweep(tmp_path, arms={"x": {"finetune.init": "random"}, "y": {}, "z": None}, space=space, num_trials=3)
    trials = tune.check(config)
    assert trials == tune.check(config)  # the same draws again: what is finished is found by its name
    points = [tuple(t.values.values()) for t in trials]
    assert len(set(points)) == len(points) <= 12 and {p[:2] for p in points} == {(a, s) for a in "xy" for s in (3, 4)}
    configs = trial.stage_configs(config, {"arm": "y", "finetune.seed + pretrain.seed": 4}, tmp_path)
    assert configs["finetune"].seed == configs["pretrain"].seed == 4
    [only] = list(tune.check(sweep(tmp_path, space={"finetune.seed": {"choice": [7]}}, num_trials=5)))
    assert only.values == {"finetune.seed": 7}


def test_equal_pretrainings_share_a_folder(tmp_path):
    arms = {"random": {"finetune.init": "random"}, "pgl": {}, "byol": {"pretrain.method": "byol"}}
    config = sweep(tmp_path, arms=arms, base_probe={"num_scans": 2}, base_evaluate={"split": "val"})

    def of(arm, **values):
        return trial.stage_configs(config, {"arm": arm, **values}, tmp_path / "t")

    pgl, again, byol = of("pgl"), of("pgl", **{"finetune.seed": 5}), of("byol")
    assert pgl["pretrain"] == again["pretrain"] and pgl["pretrain"].run != byol["pretrain"].run
    assert pgl["finetune"].init == pgl["probe"].init == pgl["pretrain"].run and pgl["pretrain"].health.stop_on_collapse
    assert again["finetune"].seed == 5 and again["evaluate"].run == again["finetune"].run
    random = of("random")
    assert "pretrain" not in random and random["finetune"].init == random["probe"].init == "random"
    healthier = sweep(tmp_path, arms=arms, base_pretrain={**BASE["base_pretrain"], "health": {"every": 7}})
    assert trial.stage_configs(healthier, {"arm": "pgl"}, tmp_path)["pretrain"].run == pgl["pretrain"].run


def test_the_second_of_two_equal_pretrainings_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    order, inside = [], threading.Event()

    def second():
        inside.wait(10)
        with trial._alone(str(tmp_path / "pretrain" / "a")):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with trial._alone(str(tmp_path / "pretrain" / "a")):
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_sweep_is_run_by_one_process(tmp_path):
    with (
        tune._locked(tmp_path),
        pytest.raises(ValueError, match="being run by another process"),
        tune._locked(tmp_path),
    ):
        pass
    with tune._locked(tmp_path):
        pass


def test_a_sweep_takes_more_trials_and_no_other_base(tmp_path):
    folder = tmp_path / "sweep"
    tune._remember(sweep(tmp_path, arms={"a": {}}), folder)
    tune._remember(sweep(tmp_path, arms={"a": {}, "b": {}}, space=LR, num_trials=3), folder)
    with pytest.raises(ValueError, match=r"another base_pretrain, arms\.a .*choose another run"):
        tune._remember(sweep(tmp_path, arms={"a": {"finetune.seed": 1}}, base_pretrain=None), folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="is no sweep"):
        tune._remember(sweep(tmp_path), tmp_path / "other")


def test_resources_that_the_cluster_lacks_are_refused(tmp_path, monkeypatch):
    import ray

    have = {"CPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(ray, "nodes", lambda: [1, 2])
    config = sweep(tmp_path, space=LR, num_trials=8)
    assert tune._room(config, tune.check(config)) == 2  # 1.5 CPUs each
    with pytest.raises(ValueError, match=r"max_concurrent=3 trials of 1\.5 CPUs .* \(4 CPUs, 0 GPUs\): at most 2"):
        tune._room(config.model_copy(update={"max_concurrent": 3}), [])
    pbt = config.model_copy(update={"scheduler": c.SchedulerConfig(kind="pbt")})
    with pytest.raises(ValueError, match=r"its 8 trials together: they need 12 CPUs and 0 GPUs, the cluster has 4"):
        tune._room(pbt, tune.check(config))
    base = {"max_steps": 4, "train": {"num_workers": 2, "device": "cuda"}}
    with pytest.raises(ValueError, match="need 2 GPUs, the cluster has 0"):
        tune._room(sweep(tmp_path, space=LR, base_finetune=base), [])
    have |= {"GPU": 2.0, "CPU": 16.0}
    shared = {"gpus_per_worker": 0.5}
    bases = {f"base_{stage}": {**BASE[f"base_{stage}"], "train": shared} for stage in ("pretrain", "finetune")}
    assert tune._room(sweep(tmp_path, space=LR, **bases), []) == 4
    assert launch.check_resources(c.TrainConfig(gpus_per_worker=0.5))
    with pytest.raises(ValueError, match="cannot share a GPU"):
        c.build(c.TrainConfig, {"num_workers": 2, "gpus_per_worker": 0.5})


# -- schedulers and search --------------------------------------------------------------------------------------------


def ended(tmp_path, values, score, reports=(), state="done", **facts) -> sweeps.Trial:
    folder = tmp_path / "sweep" / "trials" / trial.name_of(values)
    folder.mkdir(parents=True)
    sweeps.note(folder, values=values, started=time.time(), since=time.time() - 60, state="running", stage="finetune")
    for progress, value in reports:
        sweeps.add_report(folder, progress, value)
    sweeps.note(folder, **facts)
    sweeps.end(folder, state, facts.get("error"), score)
    return sweeps.read_trial(folder)


def test_what_the_stores_cannot_give_is_refused_before_anything_is_trained(tmp_path):
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
        tune._check_stores(config, tune.check(config))
    config = sweep(tmp_path, index=own, space=LR, base_pretrain=geometry, base_probe={"test_split": "validation"})
    with pytest.raises(ValueError, match="test_split='validation': no labelled scan"):
        tune._check_stores(config, tune.check(config))
    bases = {"base_pretrain": geometry, "base_finetune": None, "base_probe": {"num_scans": 1, "test_split": "train"}}
    arms = {"random": {"probe.init": "random"}, "pgl": {"pretrain.method": "pgl"}}
    config = sweep(tmp_path, index=own, arms=arms, judge=trial.PROBE, **bases)
    random, pgl = (trial.stage_configs(config, one.values, tmp_path / "t") for one in tune.check(config))
    assert list(random) == ["probe"] and random["probe"].init == "random"
    assert list(pgl) == ["pretrain", "probe"] and pgl["probe"].init == pgl["pretrain"].run
    tune._check_stores(config, tune.check(config))


def test_asha_remembers_the_rungs_of_ended_trials(tmp_path):
    """Ray Tune saves no scheduler: after a restart the reports of the trials that ended stand in."""
    config = sweep(tmp_path, space=LR, scheduler={"kind": "asha", "grace": 25})
    done = [ended(tmp_path, {"a": k}, 0.5 + k / 10, [(30, 0.5 + k / 10), (55, 0.6)]) for k in range(3)]
    asha, new = tune._scheduler(config, done), SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, new)
    assert asha.on_trial_result(None, new, {"progress": 20, "score": 0.1}) == "CONTINUE"  # before the first rung
    assert asha.on_trial_result(None, new, {"progress": 26, "score": 0.1}) == "STOP"
    fresh = tune._scheduler(config, [])
    fresh.on_trial_add(None, new)
    assert fresh.on_trial_result(None, new, {"progress": 26, "score": 0.1}) == "CONTINUE"


def test_optuna_knows_what_ended_trials_gave(tmp_path):
    pytest.importorskip("optuna")
    space = {**LR, "finetune.patch.crop_scale": {"choice": [[0.9, 1.1], [1.1, 1.4]]}}
    config = sweep(tmp_path, space=space, search="optuna", num_trials=5)
    assert tune.check(config) == []
    values = {"finetune.optim.lr": 0.05, "finetune.patch.crop_scale": [0.9, 1.1]}
    interrupted = {"finetune.optim.lr": 0.02, "finetune.patch.crop_scale": [1.1, 1.4]}
    begun = [ended(tmp_path, values, 0.7), ended(tmp_path, interrupted, None, state="failed")]
    search = tune._optuna(config, begun)
    assert search._ot_study.best_value == 0.7
    assert trial.values_of(search.suggest("w")["trial"]) == interrupted
    drawn = trial.values_of(search.suggest("x")["trial"])
    assert 0.001 <= drawn["finetune.optim.lr"] <= 0.1
    assert drawn["finetune.patch.crop_scale"] in ([0.9, 1.1], [1.1, 1.4])


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
            if not (folder / "trials" / trial.name_of(values)).exists():
                ended(tmp_path, values, 0.5)

    monkeypatch.setattr(tune, "_fit", fit)
    monkeypatch.setattr(tune.launch, "connect", lambda ray: None)
    monkeypatch.setattr(tune, "_room", lambda config, trials: 1)
    monkeypatch.setattr(tune, "_collect", lambda config, folder: len(sweeps.read_trials(folder)))
    assert tune._run(config, [], tmp_path / "sweep") == 3 and rounds == [3, 1, 1]


def test_pbt_without_anything_to_copy_goes_on_as_it_was(tmp_path, monkeypatch):
    """The better trial has no checkpoint yet: this one keeps its learning rate, and its run's folder."""
    from ray import tune as ray_tune

    (tmp_path / "told").mkdir()
    checkpoint.write_json(tmp_path / "told" / "source.json", {"name": "better", "progress": 25})
    given = ray_tune.Checkpoint.from_directory(str(tmp_path / "told"))
    monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: given)
    folder = tmp_path / "trials" / "mine"
    config = c.build(c.FinetuneConfig, {"index": "s", "run": str(folder / "finetune"), "optim": {"lr": 0.4}})
    assert trial._take_over(folder, {}, config) == config  # it has not begun either
    (folder / "finetune").mkdir(parents=True)
    record = {"config": config.model_copy(update={"optim": c.FinetuneOptimConfig(lr=0.1)}).model_dump(mode="json")}
    checkpoint.write_json(folder / "finetune" / "run.json", record)
    assert trial._take_over(folder, {}, config).optim == c.FinetuneOptimConfig(lr=0.1)
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
    schedule = optim.polynomial(sgd, 10, 0.9)
    for _ in range(4):
        step(sgd, schedule, net)
    state = {"step": 4, "model": net.state_dict(), "optimizer": sgd.state_dict(), "schedule": schedule.state_dict()}
    place = tmp_path / "theirs" / "checkpoint_00000004"
    place.mkdir(parents=True)
    torch.save(state, place / checkpoint.STATE)
    torch.save({}, tmp_path / "theirs" / "best.pt")
    one = {"checkpoint_dir_name": place.name, "metrics": {"step": 4}}
    snapshot = {"latest_checkpoint_result": one, "checkpoint_results": [one | {"checkpoint_dir_name": "old"}, one]}
    checkpoint.write_json(place.parent / checkpoint.SNAPSHOT, snapshot | {"checkpoint_report_indices": [0, 1]})
    checkpoint.write_json(place.parent / "run.json", {"config": json.loads(theirs.model_dump_json()), "num_steps": 10})
    checkpoint.metrics_path(place.parent).write_text('{"step": 4, "val/dice": 0.5}\n{"step": 5}\n')

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old").touch()
    assert trial._fork(tmp_path / "theirs", tmp_path / "mine", config)
    assert checkpoint.committed_step(config.run) == 4 and not (tmp_path / "mine" / "old").exists()
    assert [row["step"] for row in checkpoint.read_metrics(config.run)] == [4]
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["config"]["optim"]["lr"] == 0.4
    state = checkpoint.read_state(checkpoint.committed(config.run)[0] / checkpoint.STATE)
    net = torch.nn.Linear(3, 2)
    sgd = optim.build_finetuning(net, config.optim)
    schedule = optim.polynomial(sgd, 10, 0.9)
    net.load_state_dict(state["model"])
    sgd.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert schedule.get_last_lr()[0] == sgd.param_groups[0]["lr"] == pytest.approx(0.4 * 0.6**0.9)
    step(sgd, schedule, net)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.4 * 0.5**0.9)
    assert not trial._fork(tmp_path / "nothing", tmp_path / "mine", config)


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
    tune._remember(config, tmp_path / "sweep")
    for lr, score, state in ((0.1, 0.4, "done"), (0.2, 0.6, "done"), (0.3, None, "stopped")):
        ended(tmp_path, {"finetune.optim.lr": lr}, score, [(50, 0.9 if state == "stopped" else 0.1)], state=state)
    result = tune._collect(config, tmp_path / "sweep")
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
    assert found.title == "x, lr 0.01235" and 9 <= found.record["took_s"] < 60
    assert "stopped in" in sweeps.table([found])
    sweeps.note(tmp_path, judged_from=100)
    assert sweeps.read_trial(tmp_path).score is None  # the first judge's figure is no score
    line = sweeps.counts([found], 3)
    assert line.startswith("  1 stopped; about ") and line.endswith(" left, of 3")


def test_a_collapse_is_told_from_other_ends(tmp_path):
    def rows(*collapsed):
        figures = {"health/feature_std": 0.01, "health/effective_rank": 1.0, "train/loss": 0.0}
        lines = [{"step": k + 1, "health/collapsed": float(v), **figures} for k, v in enumerate(collapsed)]
        checkpoint.metrics_path(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in lines))

    goes_on = {"config": {"health": {"stop_on_collapse": False}}}
    checkpoint.write_json(tmp_path / "run.json", {"num_steps": 4} | goes_on)
    rows(0, 1, 1)
    assert sweeps.collapsed(str(tmp_path)) is None
    stops = {"config": {"health": {"stop_on_collapse": True}}}
    checkpoint.write_json(tmp_path / "run.json", {"num_steps": 4} | stops)
    assert "stopped at step 3: features collapsed" in sweeps.collapsed(str(tmp_path))
    for others in ((1, 0, 1), (1,), (0, 1, 1, 1)):  # the last ran to its end
        rows(*others)
        assert sweeps.collapsed(str(tmp_path)) is None


def test_an_arms_difference_is_held_against_the_seeds_noise_too():
    for values, worth in (([0.02, 0.04, -0.01], "within"), ([0.02, 0.03, 0.025], "more than")):
        wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        text = f", {worth} their noise ({100 * wanted.low:+.2f} to {100 * wanted.high:+.2f})"
        assert sweep_report._over(values) == text
    assert sweep_report._over([0.02]) == ""


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
    axis = pictures.Axis("seed", list(map(float, seeds)), [str(k) for k in seeds])
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
    config = {"seed": seed, "global_batch_size": 4, "index": "s", "init": "random", "num_scans": None}
    scans = {"train": ["a"] * round(6 * share), "val": ["b"] * round(2 * share)}
    record = {"door": "finetune", "config": config | {"scan_share": share}, "num_steps": 10, "scans": scans}
    checkpoint.write_json(folder / "run.json", record)
    checkpoint.metrics_path(folder).write_text('{"step": 5, "time_s": 2.0}\n{"step": 10, "time_s": 4.0}\n')
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
    checkpoint.write_json(folder / "evaluation" / "summary.json", summary)


def test_a_grid_becomes_the_papers_tables(tmp_path, monkeypatch):
    """Two shares of the labels; the paper's figures stand under all of them alone. One cell of the second share failed,
    so that Figure 8 takes the other seed."""
    arms = {"random": {"finetune.init": "random"}, "pgl": {}}
    space = {"finetune.seed": {"grid_search": [0, 1]}, "finetune.scan_share": {"grid_search": [0.5, 1.0]}}
    config = sweep(tmp_path, arms=arms, space=space, published="liver")
    tune._remember(config, tmp_path / "sweep")
    dice = {("random", 0): 0.5, ("random", 1): 0.6, ("pgl", 0): 0.7, ("pgl", 1): 0.9}
    for share, (arm, seed) in itertools.product((0.5, 1.0), dice):
        values = {"arm": arm, "finetune.seed": seed, "finetune.scan_share": share}
        level = dice[arm, seed] * share
        run = tmp_path / "sweep" / "trials" / trial.name_of(values) / "finetune"
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
    assert {(r["arm"], r["finetune.seed"]): r["score"] for r in rows if r["finetune.scan_share"] == 0.5} == {
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
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "paper, Table 6" in page and "overlays left out" in page and "pgl, seed 1, scan_share 0.5" in page
    drawn, shown = {"scans": [("data:,", "Scan p")], "legend": [(1, "liver", "#E69F00")]}, []
    monkeypatch.setattr(report, "overlays", lambda runs: shown.extend(runs) or drawn)
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "Scan p" in page and "1 liver" in page
    assert [(run.name, run.config["seed"]) for run in shown] == [("random", 1), ("pgl", 1)]


def test_figures_of_few_labels_have_no_published_ones_beside_them(tmp_path):
    """A grid that was cut off before its largest share, or that names a number of scans."""
    config = sweep(tmp_path, arms={"random": {"finetune.init": "random"}}, published="liver", space=LR)
    tune._remember(config, tmp_path / "sweep")
    values = {"arm": "random", "finetune.scan_share": 0.2}
    run = tmp_path / "sweep" / "trials" / trial.name_of(values) / "finetune"
    ended(tmp_path, values, 0.5, [(50, 0.5)], finetune=str(run), finetune_gpus=0.0)
    tuned_run(run, 0, {"liver": {"p": 0.5}, "tumour": {"p": 0.5}}, 0.5)
    grid = sweep_report.content(tmp_path / "sweep", lambda runs: {"scans": [], "legend": []})["grid"]
    assert not grid["published"] and not any(row["paper"] for row in grid["blocks"][0]["tables"][0]["rows"])


def test_scores_that_cannot_be_drawn_leave_no_hole(tmp_path):
    """A sweep of failures alone still has its page; equal scores have a colour."""
    tune._remember(sweep(tmp_path, space=LR), tmp_path / "sweep")
    ended(tmp_path, {"finetune.optim.lr": 0.1}, None, state="failed", error="train/loss is nan")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "train/loss is nan" in page
    for lr in (0.2, 0.3):
        ended(tmp_path, {"finetune.optim.lr": lr}, 0.5, [(40, 0.5)], state="stopped" if lr == 0.3 else "done")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "stopped in finetune" in page and math.isclose(page.count("<figure"), 3)
