"""Schedulers and searches: what they hear of trials that ended, and what they draw."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from small_sweeps import CURVE, LR, ended, sweep

from pgl_ray import config as c
from pgl_ray import tune
from pgl_ray.sweep import checks, population, search, sweeps
from pgl_ray.sweep.points import name_of, values_of, whole_space
from pgl_ray.train import capacity, checkpoint, nodes, optim
from pgl_ray.train.metrics import metrics_path, read_metrics
from pgl_ray.train.run_files import STATE, write_json


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


@pytest.mark.parametrize(
    ("changes", "num_left", "said"),
    [
        ({}, 0, "a higher num_trials than 3 adds trials"),
        ({"num_trials": 5}, 2, ""),
        (
            {"space": {"finetune.optim.lr": {"loguniform": [0.001, 1.0]}}},
            3,
            "3 of them were drawn from an earlier space",
        ),
        ({"space": {"finetune.optim.lr": {"loguniform": [0.001, 0.02]}}}, 1, ""),  # two are in it
        ({"arms": {"a": {}, "b": {}}}, 3, "3 of them were drawn from an earlier space"),
    ],
)
def test_a_space_that_grew_is_drawn_from_anew(tmp_path, monkeypatch, capsys, changes, num_left, said):
    """What Optuna tried in a narrower space says nothing of the rest; trials of earlier versions count as before."""
    given = {"space": LR, "search": "optuna", "num_trials": 3, "arms": {"a": {}}}
    drawn_from, rounds = whole_space(sweep(tmp_path, **given).model_dump()), []
    for lr in (0.01, 0.02, 0.03):
        ended(tmp_path, {"arm": "a", "finetune.optim.lr": lr}, 0.5, drawn_from=drawn_from)
    monkeypatch.setattr(search, "fit", lambda *args: rounds.append(args[3] - len(args[5])))
    monkeypatch.setattr(tune.launch, "connect", lambda ray: None)
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({}, ({"CPU": 4.0},)))
    monkeypatch.setattr(tune, "room_for", lambda config, trials: 1)
    monkeypatch.setattr(tune, "REDRAWS", 1)
    monkeypatch.setattr(tune, "collect", lambda config, folder: None)
    tune.run_trials(sweep(tmp_path, **{**given, **changes}), [], tmp_path / "sweep")
    assert rounds == [num_left] * (num_left > 0) and said in capsys.readouterr().out
    tune.run_trials(sweep(tmp_path, **given), [], tmp_path / "sweep")  # the first space again: all count
    assert len(rounds) == (num_left > 0)


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
