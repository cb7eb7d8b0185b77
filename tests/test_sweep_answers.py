"""The answers at the top of a sweep's page, on made-up trials: which is best, how sure, against what, and what next."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_report import judged

from pgl_ray.pages import arms, speeds, sweep_answers
from pgl_ray.pages.pages import NO, OPEN, YES
from pgl_ray.sweep import sweeps

LR = {"pretrain.optim.lr": {"loguniform": [0.01, 1.0]}}
ARMS = {"random": {"finetune.init": "random"}, "pgl": {}}


def trial_of(score, state="done", judge="val/dice", folder=Path("/none"), error=None, **values):
    values = {key.replace("__", "."): value for key, value in values.items()}
    facts = {"values": values, "state": state, "stage": "pretrain", "error": error, "judge": judge, "score": score}
    return sweeps.Trial(name=f"t{score}", folder=folder, **facts)


def config_of(space=None, judge="val/dice", arms=None):
    given = {"judge": judge, "space": space or {}, "arms": arms or {}, "run": "/sweep", "base_pretrain": {}}
    return given | {"search": "random"}


# -- which is best? ---------------------------------------------------------------------------------------------------


def test_one_seed_each_stays_open():
    trials = [trial_of(score, pretrain__optim__lr=lr) for score, lr in ((0.5, 0.1), (0.7, 0.2), (0.6, 0.3))]
    (line,) = sweep_answers.best(config_of(LR), trials)
    assert line.verdict == OPEN and line.of == ""
    assert line.text.startswith("lr 0.2 leads with val/dice 0.7000, the second is lr 0.3, +0.1000 away")
    assert "they share fewer than two seeds" in line.text


@pytest.mark.parametrize("shifts", [(0.1, 0.11, 0.105), (0.3, -0.05, 0.02)])
def test_seeds_tell_whether_a_lead_is_one(shifts):
    base = [0.5, 0.62, 0.57]
    trials = [
        trial_of(value + (shift if lr == 0.2 else 0.0), pretrain__optim__lr=lr, pretrain__seed=seed)
        for seed, (value, shift) in enumerate(zip(base, shifts))
        for lr in (0.1, 0.2)
    ]
    (line,) = sweep_answers.best(config_of(LR), trials)
    low, high = stats.t.interval(0.95, 2, np.mean(shifts), stats.sem(shifts))
    assert line.verdict == ("lr 0.2" if low > 0 else OPEN)
    assert f"95 % interval {low:+.4f} to {high:+.4f} over 3 seeds" in line.text


@pytest.mark.parametrize(("judge", "sign"), [("val/dice", 1), ("probe/matching_mm", -1)])
def test_a_leader_by_other_seeds_is_none(judge, sign):
    """Its mean is better for the seeds that the second lacks; with those of both it is worse, and surely so."""
    levels = {0.1: [0.70, 0.71, 0.90, 0.90], 0.2: [0.79, 0.79]}
    trials = [
        trial_of(sign * value, judge=judge, pretrain__optim__lr=lr, pretrain__seed=seed)
        for lr, values in levels.items()
        for seed, value in enumerate(values)
    ]
    (line,) = sweep_answers.best(config_of(LR, judge), trials)
    assert line.verdict == OPEN and line.text.startswith("lr 0.1 leads with")
    assert f"over 2 seeds, those of both, with {-0.085 * sign:+.4f}" in line.text


@pytest.mark.parametrize(("judge", "stage"), [("val/dice", "probe"), ("probe/matching_mm", "finetune")])
def test_a_seed_that_changes_nothing_that_is_judged_is_none(judge, stage):
    """One training that counted once per seed of another stage would look as sure as three."""
    trials = [
        trial_of(lr, judge=judge, pretrain__optim__lr=lr, **{f"{stage}__seed": seed})
        for lr in (0.1, 0.2)
        for seed in range(3)
    ]
    (line,) = sweep_answers.best(config_of(LR, judge), trials)
    assert line.verdict == OPEN and "they share fewer than two seeds" in line.text


def test_the_lower_error_is_the_best():
    trials = [trial_of(mm, judge="probe/matching_mm", pretrain__optim__lr=lr) for mm, lr in ((30.0, 0.1), (20.0, 0.2))]
    (line,) = sweep_answers.best(config_of(LR, "probe/matching_mm"), trials)
    assert "lr 0.2 leads with probe/matching_mm 20.0000 (lower is better)" in line.text and "-10.0000 away" in line.text


def test_arms_are_compared_only_within_a_point():
    """More labels are better, whatever the arm: that is no answer."""
    trials = [
        trial_of(score, arm=arm, finetune__num_scans=share)
        for arm, share, score in (("random", 1.0, 0.8), ("pgl", 1.0, 0.7), ("random", 0.1, 0.3), ("pgl", 0.1, 0.5))
    ]
    lines = {line.of: line.text for line in sweep_answers.best(config_of(arms=ARMS), trials)}
    assert lines["num_scans 1"].startswith("random leads") and lines["num_scans 0.1"].startswith("pgl leads")


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "none has begun"),
        (
            [trial_of(None, "failed"), trial_of(0.4, "stopped"), trial_of(None, "running")],
            "1 stopped, 1 failed, 1 running",
        ),
        ([trial_of(0.4, pretrain__optim__lr=0.1)], "lr 0.1 with val/dice 0.4000 has nothing beside it"),
    ],
)
def test_nothing_to_compare(trials, words):
    (line,) = sweep_answers.best(config_of(LR), trials)
    assert line.verdict == OPEN and words in line.text


# -- is pre-training better than random weights? ----------------------------------------------------------------------


def gain(mean, low, high, by_seed=(1.0,), measure=arms.DICE):
    return arms.Gain(mean, low, high, 6, list(by_seed), measure)


SURE, WORSE, UNSURE = gain(3.0, 1.0, 5.0), gain(-3.0, -5.0, -1.0, [-3.0]), gain(1.0, -1.0, 3.0)
NEARER, FARTHER = (gain(mm, mm - 2, mm + 2, [mm], arms.MEASURES["matching"]) for mm in (-5.0, 5.0))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({"decoder": SURE, "matching": NEARER}, YES),
        ({"decoder": SURE, "matching": FARTHER}, "In part"),
        ({"decoder": WORSE, "matching": FARTHER}, NO),
        ({"decoder": WORSE, "matching": UNSURE}, OPEN),
        ({"decoder": gain(3.0, 1.0, 5.0, [0.3, -0.2, 0.0])}, OPEN),  # the seeds do not agree
        ({"decoder": gain(3.0, 1.0, 5.0, [-0.02, -0.021, -0.02])}, OPEN),  # nor do the means: an organ was invented
    ],
)
def test_frozen_arms_against_the_strongest_control(gains, verdict):
    block = {"point": "all trials", "gains": {"pgl": gains}, "controls": ["random", "wrong priors"]}
    (answer,) = (one for one in sweep_answers.of_sweep(config_of(), [], None, [block]) if "random" in one.question)
    assert [(line.verdict, line.of) for line in answer.lines] == [(verdict, "frozen, pgl")]
    first = next(iter(gains.values()))
    assert (
        f"{first.mean:+.2f} points of Dice (95 % interval {first.low:+.2f} to {first.high:+.2f}" in answer.lines[0].text
    )
    (line,) = sweep_answers.of_frozen([block | {"gains": {"pgl": {}}}])
    assert line.verdict == OPEN and line.text.startswith("no seed, or fewer than two test scans")
    block["controls"] = []
    (line,) = sweep_answers.of_frozen([block])
    assert line.verdict == OPEN and "no arm of random weights" in line.text


def test_fine_tuned_arms_against_the_first_if_it_is_random():
    points = {"num_scans 0.1": SURE, "all": None}
    grid = {"blocks": [{"point": at, "first": "random", "gains": {"pgl": one}} for at, one in points.items()]}
    lines = sweep_answers.of_tuned(config_of(arms=ARMS), grid)
    assert [(line.of, line.verdict) for line in lines] == [
        ("fine-tuned, pgl, num_scans 0.1", YES),
        ("fine-tuned, pgl, all", OPEN),
    ]
    for block in grid["blocks"]:  # no trial of random weights was evaluated there
        block["first"] = "byol"
    lines = sweep_answers.of_tuned(config_of(arms=ARMS | {"byol": {}}), grid)
    assert all(line.verdict == OPEN and "byol, the first arm evaluated, which is not of" in line.text for line in lines)
    alone = {"blocks": [{"point": "all", "first": "random", "gains": {}}]}
    (line,) = sweep_answers.of_tuned(config_of(arms=ARMS), alone)
    assert line.verdict == OPEN and "random weights alone" in line.text


def test_without_arms_the_best_trials_probe_is_asked(tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps(judged("/run", (0.5, 0.3, 20.0))))
    (line,) = sweep_answers.of_sweep(
        config_of(LR), [trial_of(0.5, folder=tmp_path, pretrain__optim__lr=0.1)], None, []
    )[1].lines
    assert line.verdict == YES and line.text.startswith("the best trial, lr 0.1, is ahead of random weights")
    (line,) = sweep_answers.of_sweep(config_of(LR), [trial_of(0.5)], None, [])[1].lines
    assert line.verdict == OPEN and "no arm of random weights" in line.text


# -- what limited speed, and what is next? ----------------------------------------------------------------------------


def test_speed_is_that_of_the_trainings(tmp_path):
    run = tmp_path / "pretrain"
    run.mkdir()
    values = {"global_batch_size": 4, "train": {"device": "cpu"}}
    (run / "run.json").write_text(json.dumps({"door": "pretrain", "config": values, "versions": {"torch": "2"}}))
    rows = [{"step": k, "time_s": k, "train/pairs_per_s": 9.0, "data/wait_share": 0.7} for k in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trials = [trial_of(score, pretrain__optim__lr=score) for score in (0.1, 0.2)]
    shared = [trial.model_copy(update={"pretrain": str(run)}) for trial in trials]
    (line,) = sweep_answers.of_sweep(config_of(LR), shared, None, [])[2].lines
    assert line.verdict == speeds.DATA and "3 rows" in line.text  # once, though two trials share it
    (line,) = sweep_answers.of_sweep(config_of(LR), [], None, [])[2].lines
    assert line == (OPEN, "no training has begun", "")


def spread(best, others=(0.02, 0.9), seeds=1):
    return [
        trial_of(0.9 if lr == best else 0.5, pretrain__optim__lr=lr, pretrain__seed=seed)
        for lr in (best, *others)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("trials", "verdict", "words"),
    [
        ([], "Let it end", "none has begun"),
        ([trial_of(0.5), trial_of(None, "running")], "Let it end", "1 done, 1 running"),
        (
            [trial_of(0.5), trial_of(None, "failed", error="disk full\nx")],
            "Mend what failed",
            "1 trial, the first: disk full x",
        ),
        ([trial_of(0.5, "stopped")], "Widen the space", "no trial came to its end: 1 stopped"),
        (spread(0.95), "Widen the space", "pretrain.optim.lr=0.95, near the highest of 0.01 to 1"),
        (spread(0.011), "Widen the space", "near the lowest"),
        (spread(0.1), "Repeat", "three seeds"),
        (spread(0.1, seeds=3), "Use it", "pgl_ray.pretrain /sweep/best.yaml"),
    ],
)
def test_the_first_step_that_is_open(trials, verdict, words):
    line = sweep_answers.next_step(config_of(LR), trials, [], [])
    assert line.verdict == verdict and words in line.text


@pytest.mark.parametrize("state", ["failed", "running"])
@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, True),  # of an earlier version
        ({"drawn": ["tNone"]}, True),
        ({"drawn": ["other"]}, False),  # of other draws from the same space
        ({"search": "optuna", "num_trials": 4}, True),
        ({"search": "optuna", "num_trials": 3}, False),
    ],
)
def test_what_no_command_tries_again_is_no_step(state, changes, again):
    trials = [*spread(0.1), trial_of(None, state, pretrain__optim__lr=0.3)]
    line = sweep_answers.next_step(config_of(LR) | changes, trials, [], [])
    wanted = {"failed": "Mend what failed", "running": "Let it end"}[state]
    assert line.verdict == (wanted if again else "Repeat")


def test_the_command_to_use_is_one_that_takes_the_best():
    """Where nothing was pre-trained, best.yaml has no part for that door."""
    tuned = config_of(LR) | {"base_pretrain": None}
    assert "pgl_ray.finetune /sweep/best.yaml" in sweep_answers.next_step(tuned, spread(0.1, seeds=3), [], []).text


@pytest.mark.parametrize(
    ("seeds", "leading", "better", "verdict"),
    [
        ((3, 3), "pgl", YES, "Use it"),
        ((3, 3), OPEN, YES, "Repeat"),
        ((3, 3), "pgl", OPEN, "Repeat"),
        ((3, 3), "random", NO, "Train on"),
        ((3, 1), "pgl", YES, "Repeat"),  # the second has one seed
    ],
)
def test_arms_are_used_only_where_nothing_is_open(seeds, leading, better, verdict):
    trials = [
        trial_of(score, arm=arm, finetune__seed=seed)
        for arm, score, num in (("pgl", 0.7, seeds[0]), ("random", 0.5, seeds[1]))
        for seed in range(num)
    ]
    answered = [sweep_answers.Line(leading, "")], [sweep_answers.Line(better, "")]
    assert sweep_answers.next_step(config_of(arms=ARMS), trials, *answered).verdict == verdict


@pytest.mark.parametrize(
    ("key", "entry", "value", "text"),
    [
        ("a.lr", {"choice": [1, 2, 3]}, 3, "a.lr=3, the highest of 1 to 3"),
        ("a.lr", {"choice": [1, 2, 3]}, 2, None),
        ("a.lr", {"choice": [1, 2]}, 2, None),  # two values have no middle
        ("a.kind", {"choice": ["x", "y", "z"]}, "x", None),
        ("a.seed", {"grid_search": [0, 1, 2]}, 2, None),
        ("a.num_scans", {"grid_search": [0.1, 0.5, 1.0]}, 1.0, None),  # more labels are better, whatever the rest
        ("a.lr", {"uniform": [0.0, 1.0]}, 0.05, "a.lr=0.05, near the lowest of 0 to 1"),
        ("a.lr", {"loguniform": [0.001, 1.0]}, 0.05, None),
        ("a.lr", {"uniform": [0.0, 1.0]}, None, None),
    ],
)
def test_the_edge_of_a_space(key, entry, value, text):
    assert sweep_answers.at_edge(key, entry, value) == text


def test_gain_of_matching_is_that_of_the_judge_s_medians():
    """A few places far off move a mean by far more than the median that the table shows."""
    rng = np.random.default_rng(5)
    errors = rng.exponential(10, (2, 12, 4))  # of both arms, scans, organs
    errors[1, :, 0] += 200
    both = [
        [
            {"scan_id": f"s{scan}", "organ": f"o{organ}", "error_mm": float(errors[arm, scan, organ])}
            for scan in range(12)
            for organ in range(4)
        ]
        for arm in (0, 1)
    ]
    by_seed = [float(np.median(errors[0]) - np.median(errors[1]))]
    gap = arms.gain([tuple(both)], by_seed, arms.MEASURES["matching"])
    drawn = []
    for _ in range(1000):
        scans = [int(rng.integers(12)) for _ in range(12)]
        drawn.append(np.median(errors[0][scans]) - np.median(errors[1][scans]))
    assert gap.mean == pytest.approx(by_seed[0]) and gap.num_scans == 12
    wider = stats.t.ppf(0.975, 11) / stats.norm.ppf(0.975) * (12 / 11) ** 0.5  # of so few scans
    expected = by_seed[0] + wider * (np.percentile(drawn, (2.5, 97.5)) - by_seed[0])
    np.testing.assert_allclose((gap.low, gap.high), expected, atol=1.0)
    assert arms.gain([([both[0][0]], [both[1][0]])], by_seed, arms.MEASURES["matching"]) is None, "one scan"
