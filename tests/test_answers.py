"""The answers at the top of a report of runs, on made-up runs: every verdict, its figures, and what is missing."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_report import CHANCE, ORGANS, judged, score_rows

from pgl_ray import config, finetune, pretrain, shipped
from pgl_ray.config import FinetuneConfig, PretrainConfig, build, load
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.judge import voxels
from pgl_ray.pages import answers, arms, next_steps, run_folders, speeds
from pgl_ray.pages.pages import NO, OPEN, YES, percent
from pgl_ray.train import runs
from pgl_ray.train.records import RunRecord

PGL = "/runs/pgl"


def run_of(door, rows=(), number=0, name=None, dice=None, torch="2.0+cpu", record=None, **values):
    """A run that no folder has; `dice` per scan makes it an evaluated one."""
    name = name or {"pretrain": "pgl", "finetune": "tuned"}[door]
    model = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}[door]
    resolved = build(model, {"index": "/store", "run": f"/runs/{name}", **values}).model_dump(mode="json")
    said = {"door": door, "config": resolved, "versions": {"torch": torch}, "num_steps": 100}
    said |= {"store": {"num_scans": 6, "labels": {"liver": 1}}, **(record or {})}
    scores = [] if dice is None else score_rows(dice)
    summary = None if dice is None else {"dice": float(np.mean(dice)), "index": "/store"}
    return run_folders.Run(name, Path(f"/runs/{name}"), number, RunRecord(**said), list(rows), summary, scores)


def health_rows(shares, chance=0.002, start=0.004, std=0.8, rank=10.0, blank_share=0.0):
    """Rows whose encoder finds the given shares of places again, after a first one of nearly random weights."""
    rows = []
    for k, share in enumerate([start, *shares]):
        row = {"step": 10.0 * k or 1.0, "time_s": 5.0 * k, "train/pairs_per_s": 8.0, "data/wait_share": 0.02}
        row |= {"health/collapsed": float(std**2 * rank < 1), "health/encoder_retrieval": share}
        row |= {"data/blank_share": blank_share}
        for part in ("", "encoder_"):
            row |= {f"health/{part}feature_std": std, f"health/{part}effective_rank": rank}
            row |= {f"health/{part}cosine_aligned": 0.5, f"health/{part}cosine_shuffled": 0.1}
        rows.append(row | {"health/encoder_retrieval_chance": chance, "train/loss": 1.0})
    rows[-1]["step"] = 100.0
    return rows


LEARNED = (0.10, 0.12, 0.09, 0.11, 0.13)


# -- did pre-training learn places? -----------------------------------------------------------------------------------


def test_places_that_are_recognised_are_learned_and_how_sure():
    line = answers.learned_places(run_of("pretrain", health_rows(LEARNED)), None)
    low, high = stats.t.interval(0.95, 4, np.mean(LEARNED), stats.sem(LEARNED))
    assert line.verdict == YES
    assert f"{np.mean(LEARNED):.0%}".replace("%", " %") in line.text and "last 5 judged batches" in line.text
    assert f"95 % interval {100 * low:.0f} to {100 * high:.0f} %" in line.text
    assert "0.40 % at step 1 and 0.20 % by the scan alone" in line.text


@pytest.mark.parametrize(
    ("shares", "options", "verdict", "words"),
    [
        ((0.001, 0.003, 0.002, 0.001), {}, NO, "wrong priors look like this"),
        ((0.001, 0.030, 0.002, 0.015), {}, OPEN, "does not leave these out"),
        ((0.05, 0.06, 0.05, 0.06), {"start": 0.06}, OPEN, "does not leave these out"),  # no more than random weights
        ((0.05,), {}, OPEN, "too few for an interval: lower health.every"),
        (LEARNED, {"std": 0.03}, NO, "features collapsed"),
        (LEARNED, {"rank": 1.1}, NO, "features collapsed"),
    ],
)
def test_what_was_not_learned_or_stays_open(shares, options, verdict, words):
    line = answers.learned_places(run_of("pretrain", health_rows(shares, **options)), None)
    assert line.verdict == verdict and words in line.text


def test_missing_figures_are_said_plainly():
    line = answers.learned_places(run_of("pretrain"), None)
    assert (line.verdict, line.text) == (OPEN, "no metrics are written yet")
    rows = [{"step": 1.0, "time_s": 1.0, "train/loss": 3.0}]
    assert answers.learned_places(run_of("pretrain", rows), None).text == "no health figures are written yet"
    old = [{k: v for k, v in row.items() if "retrieval" not in k} for row in health_rows(LEARNED)]
    assert "of an earlier version" in answers.learned_places(run_of("pretrain", old), None).text


@pytest.mark.parametrize(
    ("ahead", "verdict", "words"),
    [
        ((20.0, 13.0, 26.0), YES, "ahead of random weights with 41.0 mm by 20.0 (95 % interval 13.0 to 26.0)"),
        ((-5.0, -9.0, -2.0), NO, "behind random weights with 41.0 mm by 5.0 (95 % interval 2.0 to 9.0)"),
        (
            (3.0, -2.0, 7.0),
            OPEN,
            "not clearly ahead of random weights with 41.0 mm by +3.0 (95 % interval -2.0 to +7.0)",
        ),
    ],
)
def test_point_matching_decides_where_it_was_asked(ahead, verdict, words):
    said = judged(PGL, (0.5, 0.3, 21.0), ahead={"matching": ahead})
    line = answers.learned_places(run_of("pretrain", health_rows(LEARNED)), said)
    assert line.verdict == verdict and words in line.text
    assert "median error of 21.0 mm (95 % interval 18.9 to 23.1)" in line.text
    assert "the place in the body's box alone, without any encoder, gives 33.3 mm" in line.text
    assert "11 % of the places are found again" in line.text
    said["standing"]["matching"]["low_is"] = "control"
    assert "the control with" in answers.learned_places(run_of("pretrain", health_rows(LEARNED)), said).text


def test_a_collapse_counts_more_than_any_judge():
    run = run_of("pretrain", health_rows(LEARNED, rank=1.0))
    assert answers.learned_places(run, judged(PGL, (0.5, 0.3, 1.0))).verdict == NO


# -- is it better than random weights? --------------------------------------------------------------------------------

SURE, WORSE, UNSURE = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3)


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [
        ((SURE, SURE, SURE), YES),
        ((WORSE, WORSE, WORSE), NO),
        ((UNSURE, UNSURE, UNSURE), OPEN),
        ((SURE, UNSURE, SURE), "In part"),
        ((SURE, WORSE, SURE), "In part"),
        ((WORSE, UNSURE, WORSE), OPEN),
        (((0.2,), (0.2,), (0.2,)), OPEN),  # a single test scan
    ],
)
def test_judges_of_the_frozen_encoder(ahead, verdict):
    said = judged(PGL, ahead=dict(zip(("voxels", "decoder", "matching"), ahead)))
    line = answers.better_frozen(run_of("pretrain", health_rows(LEARNED)), said)
    assert line.verdict == verdict and "balanced accuracy of voxels" in line.text
    if len(ahead[0]) == 1:
        assert "one test scan alone has no interval" in line.text
    elif ahead[0] is SURE:
        assert "by 0.200 (95 % interval 0.100 to 0.300)" in line.text


def test_without_a_judge_the_probe_in_training_is_given():
    rows = health_rows(LEARNED)
    assert answers.better_frozen(run_of("pretrain", rows), None) == (
        OPEN,
        "no judge has looked at the frozen encoder",
        "",
    )
    for row, value in zip(rows, np.linspace(0.4, 0.65, len(rows))):
        row["probe/balanced_accuracy"] = value
    line = answers.better_frozen(run_of("pretrain", rows), None)
    assert line.verdict == OPEN and "from 0.400 at step 1 to 0.650, which has no interval" in line.text
    said = judged(PGL) | {"standing": {}}
    assert "ends=true" in answers.better_frozen(run_of("pretrain", rows), said).text


def tuned(dice, init=PGL, seed=0, **values):
    name = f"{Path(init).name}_{seed}"
    return run_of("finetune", health_rows(LEARNED), name=name, dice=dice, init=init, seed=seed, **values)


BASE = np.array([0.50, 0.62, 0.71, 0.44, 0.58, 0.66])


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ([0.05, 0.06, 0.05, 0.04, 0.06, 0.05], YES),
        ([-0.05, -0.06, -0.05, -0.04, -0.06, -0.05], NO),
        ([0.05, -0.06, 0.05, -0.04, 0.06, 0.0], OPEN),
    ],
)
def test_fine_tuned_against_random_weights(gain, verdict):
    (line,) = answers.better_tuned([tuned(BASE, "random"), tuned(BASE + gain)])
    wanted = stats.ttest_rel(BASE + gain, BASE).confidence_interval(0.95)
    assert line.verdict == verdict and line.of == "fine-tuned from pgl"
    said = re.search(r" ([+-][0-9.]+) \(95 % interval ([+-][0-9.]+) to ([+-][0-9.]+) over 6 scans\)", line.text)
    near = 0.2 * (wanted.high - wanted.low) + 0.001
    for number, value in zip(said.groups(), (np.mean(gain), wanted.low, wanted.high), strict=True):
        assert float(number) == pytest.approx(value, abs=near)
    assert "one training each: another seed may move it by more" in line.text and "differ in" not in line.text


def test_a_gain_that_seeds_do_not_share_stays_open():
    """Over the scans the mean of the seeds is clear; over the seeds it is not."""
    shifts = [0.20, -0.05, 0.02]
    runs = [tuned(BASE, "random", seed) for seed in range(3)]
    runs += [tuned(BASE + shift + 0.001 * np.arange(6), PGL, seed) for seed, shift in enumerate(shifts)]
    (line,) = answers.better_tuned(runs)
    by_seed = np.array(shifts) + 0.0025
    low, high = stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed))
    assert line.verdict == OPEN and "ahead with 2 of 3 seeds" in line.text
    assert f"({low:+.3f} to {high:+.3f} over these)" in line.text
    alike = [tuned(BASE + shift, PGL, seed) for seed, shift in enumerate((0.05, 0.06, 0.055))]
    scattered = [tuned(BASE + 0.001 * (-1) ** np.arange(6), "random", seed) for seed in range(3)]
    assert answers.better_tuned([*scattered, *alike])[0].verdict == YES


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "no fine-tuning is on this page"),
        ([tuned(BASE, "random")], "all runs were fine-tuned from random weights"),
        ([tuned(BASE)], "no evaluated run from random weights is on this page"),
        ([tuned(None), tuned(BASE, "random")], "not evaluated yet"),
        ([tuned(BASE, seed=1), tuned(BASE, "random", seed=2)], "the same seed and as many labelled scans"),
        ([tuned(BASE, num_scans=3), tuned(BASE, "random", num_scans=9)], "the same seed and as many labelled scans"),
        ([tuned(BASE[:1]), tuned(BASE[:1], "random")], "fewer than two scans were scored with both"),
    ],
)
def test_fine_tunings_that_cannot_be_compared(runs, words):
    (line,) = answers.better_tuned(runs)
    assert line.verdict == OPEN and words in line.text


def test_fine_tunings_scored_on_other_labels_stay_open():
    """Labels were corrected between two evaluations, or the tasks differ: in the answer and in a sweep's sentence."""
    runs = [tuned(BASE + 0.05), tuned(BASE, "random")]
    for run, size in zip(runs, (90, 91)):
        for row in run.scores:
            row["target_voxels"] = 900
        run.scores[3]["target_voxels"] = size
    (line,) = answers.better_tuned(runs)
    where = f"different labels of {runs[0].scores[3]['organ']} in scan {runs[0].scores[3]['scan_id']}"
    assert line.verdict == OPEN and where in line.text
    (sentence,) = arms.difference("pgl against random", [tuple(run.scores for run in runs)], [0.05], arms.DICE)
    assert sentence.startswith(f"pgl against random: scored on {where}: no statement")


def test_no_seed_counts_twice():
    """Three rates of one seed beside one run from random weights are no three seeds; nothing says which to take."""
    mine = [tuned(BASE + 0.05, optim={"lr": lr}) for lr in (0.1, 0.2, 0.3)]
    (line,) = answers.better_tuned([*mine, tuned(BASE, "random", optim={"lr": 0.5})])
    assert line.verdict == OPEN and "of several such, the same settings" in line.text
    (line,) = answers.better_tuned([*mine, tuned(BASE, "random", optim={"lr": 0.2})])
    assert line.verdict == YES and "one training each" in line.text and "differ in" not in line.text


@pytest.mark.parametrize("which", [0, 1])
def test_a_network_that_is_half_trained_is_no_answer(which):
    """Of either side; it is to be trained to its end first, as a pre-training is."""
    runs = [tuned(BASE + 0.05), tuned(BASE, "random")]
    runs[which].rows[-1]["step"] = 40.0
    (line,) = answers.better_tuned(runs)
    assert line.verdict == OPEN and f"{runs[which].name} stands at step 40 of 100" in line.text
    step = next_steps.first(runs, {})
    assert step.verdict == "Let it end" and f"{runs[which].name} stands at step 40 of 100" in step.text


@pytest.mark.parametrize(
    ("dice", "ends"),
    [((0.1, 0.3, 0.2, 0.25), True), ((0.1, 0.3, 0.2, 0.31), False), ((0.3, 0.0), False), ((0.0, 0.0, 0.0), False)],
)
def test_a_fine_tuning_that_lost_patience_has_ended(dice, ends):
    """Two validations without a better one, of which none counts as long as the best is 0."""
    run = tuned(BASE, patience=2)
    run.rows[:] = [{"step": 10.0 * (k + 1), "val/dice": value} for k, value in enumerate(dice)]
    assert bool(run.record.steps_left(run.rows)) != ends


def test_runs_of_other_settings_are_no_seeds():
    """One seed with three numbers of labelled scans: an answer for each, and no use of any."""
    shifts = {3: 0.05, 5: 0.06, 9: -0.07}
    runs = [tuned(BASE + shift, num_scans=num) for num, shift in shifts.items()]
    runs += [tuned(BASE, "random", num_scans=num) for num in shifts]
    lines = answers.better_tuned(runs)
    assert [line.verdict for line in lines] == [YES, YES, NO]
    assert [line.of for line in lines] == [f"fine-tuned from pgl, num_scans={num}" for num in shifts]
    assert all("one training each" in line.text and "seeds" not in line.text for line in lines)
    step = next_steps.first(runs, {})
    assert step.verdict == "Repeat" and step.text.startswith("num_scans=3: fine-tune both with three or more seeds")
    enough = [
        tuned(BASE + gain, init, seed, num_scans=3, train={"num_workers": seed})
        for init, gain in ((PGL, 0.05), ("random", 0))
        for seed in (1, 2)
    ]
    first = answers.better_tuned([*runs, *enough])[0]
    assert "ahead with 3 of 3 seeds" in first.text and first.of.endswith("num_scans=3")
    assert next_steps.first([*runs, *enough], {}).text.startswith("num_scans=5: ")


def test_runs_of_one_seed_meet_those_of_their_own_settings():
    """Whatever their order; what differs in any pair is said."""
    paper, light = {"decoder": "paper"}, {"decoder": "light"}
    runs = [tuned(BASE + 0.3, **paper), tuned(BASE + 0.1, **light)]
    runs += [tuned(BASE, "random", **light), tuned(BASE + 0.25, "random", **paper)]
    lines = {line.of: line.text for line in answers.better_tuned(runs)}
    assert "+0.050 (" in lines["fine-tuned from pgl, decoder=paper"] and not any("differ in" in one for one in lines)
    assert "+0.100 (" in lines["fine-tuned from pgl, decoder=light"]
    two = [tuned(BASE + 0.1), tuned(BASE + 0.1, seed=1, decoder="light")]
    two += [tuned(BASE, "random"), tuned(BASE, "random", seed=1)]
    assert "they differ in decoder, too" in answers.better_tuned(two)[0].text


def test_invented_organs_are_no_gain():
    """What both scored is better; the mean Dice, to which an organ that is not there counts 0, is worse."""
    of_none = ((0.02, 0.0, PGL), (0.0, np.nan, "random"))
    better, base = (tuned(np.append(BASE + gain, dice), init) for gain, dice, init in of_none)
    (line,) = answers.better_tuned([better, base])
    assert line.verdict == OPEN and "+0.020 (95 % interval +0.020 to +0.020" in line.text


@pytest.mark.parametrize("without", [PGL, "random"])
@pytest.mark.parametrize(
    ("key", "names", "said"), [("scan_id", ("s0", "s1"), "over 4 scans)"), ("organ", ORGANS[:1], "over 6 scans)")]
)
def test_what_one_side_was_not_scored_on_is_no_gain(without, key, names, said):
    """Hard scans, or a hard organ, that one side did without; where both were scored the seeds disagree."""
    shifts, sides = (0.06, -0.03, 0.03), {}
    for init in (PGL, "random"):
        sides[init] = [tuned(BASE + shift * (init == PGL), init, seed) for seed, shift in enumerate(shifts)]
        for run in sides[init]:
            hard = [row for row in run.scores if row[key] in names]
            for row in hard:
                row["dice"] -= 0.4
            run.scores[:] = [row for row in run.scores if init != without or row not in hard]
            run.summary["dice"] = float(np.mean([row["dice"] for row in run.scores]))
    (line,) = answers.better_tuned([*sides[PGL], *sides["random"]])
    low, high = stats.t.interval(0.95, 2, np.mean(shifts), stats.sem(shifts))
    assert line.verdict == OPEN and said in line.text and "ahead with 2 of 3 seeds" in line.text
    assert f"({low:+.3f} to {high:+.3f} over these)" in line.text
    mine, theirs = map(
        float,
        re.search(r"Dice ([0-9.]+) against ([0-9.]+) from random weights where both were scored, ", line.text).groups(),
    )
    assert mine - theirs == pytest.approx(np.mean(shifts), abs=0.0011)


@pytest.mark.parametrize("side", [PGL, "random"])
def test_a_seed_scored_on_other_scans_is_not_counted(side):
    """One of three seeds was evaluated on another split: that is no difference of 0."""
    runs = [tuned(BASE + 0.05 * (init == PGL), init, seed) for seed in range(3) for init in (PGL, "random")]
    for row in next(
        run for run in runs if run.record.seed == 2 and (run.record.init == "random") == (side == "random")
    ).scores:
        row["scan_id"] = f"validation_{row['scan_id']}"
    (line,) = answers.better_tuned(runs)
    (of_two,) = answers.better_tuned([run for run in runs if run.record.seed < 2])
    assert line == of_two and line.verdict == YES and "ahead with 2 of 2 seeds" in line.text
    alone = [run for run in runs if run.record.seed == 2]
    assert "fewer than two scans were scored with both" in answers.better_tuned(alone)[0].text


def test_a_judge_of_an_earlier_checkpoint_does_not_count(tmp_path):
    run = run_of("pretrain", health_rows(LEARNED))
    file = tmp_path / "probe.json"
    file.write_text("{}")
    for steps, verdict in ((None, YES), (100, YES), (50, OPEN)):
        said = judged(PGL, ahead=AHEAD) | {"steps": steps}
        (frozen, _) = answers.of_runs([run], [(file, said)])[1].lines
        assert frozen.verdict == verdict
        assert ("no judge has looked" in frozen.text) == (verdict == OPEN)
    moved = judged("/old/place", ahead=AHEAD)
    inside = dataclasses.replace(run, path=tmp_path)
    assert answers.of_runs([inside], [(file, moved)])[1].lines[0].verdict == YES  # its folder was moved with it


def test_other_settings_that_differ_are_named():
    (line,) = answers.better_tuned([tuned(BASE, "random", optim={"lr": 0.5}), tuned(BASE + 0.1)])
    assert line.text.endswith("; they differ in optim.lr, too")


# -- what limited speed? ----------------------------------------------------------------------------------------------


def waited(*shares, unit="pairs", **more):
    """Rows with these shares, after a first one that holds the start-up."""
    speed = {f"train/{unit}_per_s": 20.0}
    return [
        {"step": k + 1.0, "time_s": 1.0 + k, "data/wait_share": share, **speed, **more}
        for k, share in enumerate((0.95, *shares))
    ]


@pytest.mark.parametrize(
    ("shares", "torch", "verdict", "words"),
    [
        ((0.01, 0.02, 0.015), "2.0+cpu", speeds.NETWORK, "it ran on CPUs, so a GPU or a smaller encoder would help"),
        ((0.01, 0.02, 0.015), "2.0+cu121", speeds.NETWORK, "faster or more devices for it would help"),
        ((0.80, 0.85, 0.82), "2.0+cpu", speeds.DATA, "more CPU cores for it would help"),
        ((0.30, 0.31, 0.29), "2.0+cpu", speeds.PARTLY, "up to that share"),
        ((0.02, 0.20, 0.09), "2.0+cpu", speeds.EITHER, "more than a tenth"),
        ((0.80,), "2.0+cpu", speeds.DATA, "of one row alone there is no interval"),
        ((), "2.0+cpu", OPEN, "no row after the first"),
    ],
)
def test_what_set_the_pace(shares, torch, verdict, words):
    (line,) = speeds.limits([run_of("pretrain", waited(*shares), torch=torch)])
    assert line.verdict == verdict and words in line.text and line.of == ""
    if len(shares) > 1:
        low, high = stats.t.interval(0.95, len(shares) - 1, np.mean(shares), stats.sem(shares))
        assert f"{percent(np.mean(shares))} of the time" in line.text
        assert f"95 % interval {percent(max(0, low), high)}, {len(shares)} rows" in line.text
        assert "at 20.0 view pairs per second" in line.text


def test_the_start_after_an_interruption_does_not_count():
    rows = [*waited(0.01, 0.02), *({**row, "step": row["step"] + 3} for row in waited(0.03, 0.02))]
    wait = speeds.wait_of(run_of("pretrain", rows))
    assert wait.num == 4 and wait.mean == pytest.approx(0.02)


def test_runs_that_one_thing_limited_share_a_sentence():
    runs = [run_of("finetune", waited(share, share + 0.01, unit="patches"), name=f"f{share}") for share in (0.01, 0.03)]
    runs += [run_of("pretrain", waited(0.9, 0.91)), run_of("finetune", waited(0.7, 0.71, unit="patches"), name="slow")]
    lines = speeds.limits(runs)
    assert [(line.of, line.verdict) for line in lines] == [
        ("2 fine-tunings", speeds.NETWORK),
        ("pgl", speeds.DATA),
        ("slow", speeds.DATA),
    ]
    assert lines[0].text.startswith("1.5 to 3.5 % of the time") and "patches per second" in lines[0].text


def test_dear_checkpoints_are_said():
    (line,) = speeds.limits([run_of("pretrain", waited(0.01, 0.02, **{"checkpoint/share": 0.2}))])
    assert "checkpoints took 20 %" in line.text


# -- what to do next? -------------------------------------------------------------------------------------------------

AHEAD = dict.fromkeys(("voxels", "decoder", "matching"), SURE)
BEHIND = dict.fromkeys(("voxels", "decoder", "matching"), WORSE)
GAIN = np.array([0.05, 0.06, 0.05, 0.04, 0.06, 0.05])


def pretrained(shares=LEARNED, **options):
    record = {"record": options.pop("record", {})}
    return run_of("pretrain", health_rows(shares, **options), **record)


def unfinished():
    return pretrained(record={"num_steps": 900})


def starved():
    rows = health_rows(LEARNED)
    for row in rows:
        row["data/wait_share"] = 0.8
    return run_of("pretrain", rows)


def seeds(gains):
    return [tuned(BASE + 0.001 * (-1) ** np.arange(6), "random", k) for k in range(len(gains))] + [
        tuned(BASE + gain, PGL, k) for k, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("runs", "said", "verdict", "words"),
    [
        ([run_of("pretrain")], None, "Wait", "no metrics yet"),
        ([pretrained(rank=1.0)], None, "Train again", "lower optim.lr than"),
        ([pretrained(blank_share=1.0)], None, "Look at the scans", "100% of the views have one value throughout; "),
        ([unfinished()], None, "Let it end", "step 100 of 900"),
        ([starved()], None, "Feed it", "pgl_ray.bench /runs/pgl/config.yaml index=/store"),
        ([pretrained()], None, "Judge it", f"pgl_ray.probe init={PGL}"),
        ([pretrained(record={"store": {"labels": {}}})], None, "Judge it", "this run's has no labels"),
        ([pretrained()], BEHIND, "Train on", "after 100 steps, on 4 test scans"),
        ([pretrained(record={"outlook": {"target_turnover": 1.0}})], BEHIND, "Train on", "turned over 1.0 times"),
        ([pretrained(record={"outlook": {"clamped_share": [0.1, 0.4, 0.3]}})], BEHIND, "Enlarge the views", "40 %"),
        ([pretrained()], AHEAD, "Fine-tune", f"init={PGL}"),
        ([pretrained(), tuned(None)], AHEAD, "Evaluate", "pgl_ray.evaluate run=/runs/pgl_0"),
        ([pretrained(), tuned(BASE)], AHEAD, "Fine-tune from random weights", "without init"),
        ([tuned(BASE, "random")], None, "Pre-train", "pretrained:openkbp_small"),
        ([tuned(BASE), tuned(BASE, "random", seed=3)], None, "Compare alike", "the same seed"),
        ([tuned(BASE[:1] + 0.1), tuned(BASE[:1], "random")], None, "Score on more scans", "fewer than two scans"),
        ([tuned(BASE + GAIN), tuned(BASE, "random")], None, "Repeat", "three or more seeds"),
        (seeds([0.05, 0.06, 0.055]), None, "Use it", ""),
        (seeds([-0.05, -0.06, -0.055]), None, "Begin from random weights", "costs Dice"),
        (seeds([0.20, 0.01, 0.02]), None, "Repeat", "more than the gain"),
    ],
)
def test_the_first_step_that_is_open(runs, said, verdict, words):
    results = {run.name: said and judged(PGL, ahead=said) for run in runs if run.door == "pretrain"}
    line = next_steps.first(runs, results)
    assert line.verdict == verdict and words in line.text
    for door, rest in re.findall(r"python -m pgl_ray\.(\w+)((?: '?[\w.\[]+[=/][^ ]+)+)", line.text):
        args = [arg.rstrip(",") for arg in shlex.split(rest) if "=" in arg]
        load(getattr(config, f"{door.title()}Config"), args)


def typed(line, door):
    """The arguments of the command that a line says."""
    command = re.search(rf"python -m pgl_ray\.{door} ((?:'?[\w.]+=[^ ]* ?)+)", line)[1]
    return [arg.rstrip(",") for arg in shlex.split(command)]


@pytest.mark.parametrize("method", ["pgl", "byol", "genesis"])
@pytest.mark.parametrize("folder", ["runs", "my runs"])
def test_bench_is_of_the_training_that_waited(tmp_path, method, folder):
    """The command takes the run's own file, whatever differs from the defaults."""
    changes = {"method": method, "encoder": {"width": 8}, "global_batch_size": 6, "views": {"size": [16, 64, 64]}}
    changes |= {"train": {"num_workers": 2}, "pairs_per_scan": 3, "optim": {"kind": "sgd", "lr": 0.3}}
    asked = build(PretrainConfig, {"index": "/store", "run": str(tmp_path / folder), "max_steps": 50, **changes})
    place = Path(runs.open_run(asked, "pretrain", {"plan": "p"}))
    waiting = dataclasses.replace(starved(), path=place)
    line = next_steps.first([waiting], {waiting.name: None})
    words = shlex.split(re.search(r"python -m pgl_ray\.bench (.+) says which part", line.text)[1])
    timed = load(config.BenchConfig, words).model_dump(exclude={"run", "bench_s"})
    assert line.verdict == "Feed it" and timed == asked.model_dump(exclude={"run"})


def test_bench_of_a_run_in_a_bucket_reads_the_copy_here(tmp_path, monkeypatch):
    """A file of settings is one of this machine: the copy that the page was made of."""
    monkeypatch.setattr(next_steps.run_paths, "origin", lambda path: "s3://bucket/runs/pgl")
    waiting = dataclasses.replace(starved(), path=tmp_path)
    assert f"bench {tmp_path}/config.yaml " in next_steps.first([waiting], {waiting.name: None}).text


LABELLED = [("train", "test"), ("train", "validation"), ("a", "b", "train"), ("test",), ("validation",), ("", "train")]


@pytest.mark.parametrize("splits", LABELLED)
@pytest.mark.slow
def test_the_commands_to_type_find_scans_to_test_on(tmp_path, splits):
    """Whatever the splits that a store has labels in: neither the judges nor an evaluation has to refuse."""
    store = tmp_path / "store"
    for number, split in enumerate([split for split in splits for _ in range(8)]):
        label = np.ones((4, 6, 6), np.uint8)
        more = {"label": label, "labelled": (1,), "split": split}
        write_scan(store, f"s{number}", np.zeros((4, 6, 6), np.int16), np.eye(4), **more)
    write_scan(store, "bare", np.zeros((4, 6, 6), np.int16), np.eye(4), split="held")  # without labels
    index = write_index(store, {"liver": 1}, (-1024.0, 325.0))
    noted = {"store": {"labels": {"liver": 1}, "splits": index.labelled_splits}}
    assert set(index.labelled_splits) == set(splits)
    run = run_of("pretrain", health_rows(LEARNED), index=str(store), record=noted)
    line = next_steps.first([run], {run.name: None})
    assert line.verdict == "Judge it"
    asked = load(config.ProbeConfig, typed(line.text, "probe"))
    train, test = voxels.choose_scans(index, asked)
    assert train and len(test) > 1 and ("test" not in splits or asked.test_split == "test")
    trained = next((split for split in splits if split != "test"), None)
    if trained is not None and len(splits) > 1:
        tuned_on = run_of("finetune", index=str(store), record=noted, split=trained)
        asked = load(config.EvaluateConfig, typed(next_steps.evaluation(tuned_on), "evaluate"))
        assert index.labelled(asked.split) and asked.split != trained
        assert asked.split == ("test" if "test" in splits else asked.split)


def test_where_no_labels_are_left_to_test_on_it_is_said():
    noted = {"store": {"labels": {"liver": 1}, "splits": ["train"]}}
    said = next_steps.evaluation(run_of("finetune", record=noted))
    assert typed(said, "evaluate") == ["run=/runs/tuned", "index=/store"]
    assert "once its store has labelled scans beside those of split train: prepare some as split test" in said
    run = run_of("pretrain", health_rows(LEARNED), record=noted)
    assert "prepare some as split test" in next_steps.first([run], {run.name: None}).text


def test_runs_without_a_note_of_splits_have_plain_commands():
    """Those of earlier versions."""
    assert next_steps.evaluation(run_of("finetune")) == "python -m pgl_ray.evaluate run=/runs/tuned index=/store"


@pytest.mark.parametrize("door", [pretrain, finetune])
def test_a_run_notes_in_which_splits_labels_are(tmp_path, monkeypatch, door):
    noted = {}

    class Opened(Exception):
        pass

    def open_run(config, name, facts):
        noted.update(facts["store"])
        raise Opened

    for number, split in enumerate(("train", "train", "held", "open")):
        volume = np.random.default_rng(number).integers(-200, 200, (18, 36, 36)).astype(np.int16)
        more = {"label": np.ones(volume.shape, np.uint8), "labelled": (1,)} if split != "open" else {}
        write_scan(tmp_path / "store", f"s{number}", volume, np.eye(4), split=split, **more)
    write_index(tmp_path / "store", {"organ": 1}, (-1024.0, 325.0))
    monkeypatch.setattr(runs, "open_run", open_run)
    values = {"index": str(tmp_path / "store"), "run": str(tmp_path / "run"), "encoder": {"width": 4}, "max_steps": 1}
    values |= {"global_batch_size": 1} | ({"views": {"size": [8, 16, 32]}} if door is pretrain else {})
    with pytest.raises(Opened):
        door.run(build({pretrain: PretrainConfig, finetune: FinetuneConfig}[door], values))
    assert noted["splits"] == ["held", "train"]


@pytest.mark.parametrize("encoder", [{}, {"width": 8, "depths": [1, 1, 2, 1]}, {"width": 16}])
def test_the_fine_tuning_to_type_has_the_run_s_encoder(encoder):
    """Whatever was pre-trained: the file that is named has another one."""
    run = run_of("pretrain", health_rows(LEARNED), encoder=encoder)
    line = next_steps.first([run], {run.name: judged(PGL, ahead=AHEAD)})
    words = shlex.split(re.search(r"python -m pgl_ray\.finetune (.+?),? and once", line.text)[1])
    asked = load(FinetuneConfig, [str(shipped.path_of(words[0])), *words[1:]])
    assert asked.encoder.model_dump(mode="json") == run.config["encoder"]


def test_more_scans_are_asked_for_by_number():
    """So many as make the interval of the same spread leave 0 out, by simulation of nothing but that spread."""
    gain = np.array([0.05, -0.06, 0.07, -0.02, 0.06, 0.02])
    line = next_steps.first([tuned(BASE + gain), tuned(BASE, "random")], {})
    needed = int(re.search(r"about ([\d,]+) test scans", line.text)[1])
    half = [stats.norm.ppf(0.975) * np.std(gain, ddof=1) / num**0.5 for num in (needed - 1, needed)]
    assert line.verdict == "Score on more scans" and half[1] <= gain.mean() < half[0] and "(6 now)" in line.text
    gain -= gain.mean() - 1e-5
    assert "too small for any number" in next_steps.first([tuned(BASE + gain), tuned(BASE, "random")], {}).text


# -- all together -----------------------------------------------------------------------------------------------------


def test_every_page_of_runs_has_the_four_answers(tmp_path):
    said = judged(PGL, ahead=AHEAD)
    file = tmp_path / "probe.json"
    file.write_text("{}")
    runs = [pretrained(), tuned(BASE + GAIN), tuned(BASE, "random")]
    answered = answers.of_runs(runs, [(file, said)])
    assert [one.question for one in answered] == [answers.PLACES, answers.BETTER, answers.SPEED, answers.NEXT]
    verdicts = [[line.verdict for line in one.lines] for one in answered]
    assert verdicts == [[YES], [YES, YES], [speeds.NETWORK, OPEN], ["Repeat"]]
    assert [line.of for line in answered[1].lines] == ["pgl", "fine-tuned from pgl"] and answered[0].lines[0].of == ""
    (single,) = answers.of_runs(runs[1:], [])[0].lines
    assert single.verdict == OPEN and f"run=[{PGL},...] puts it here" in single.text
    two = answers.of_runs([pretrained(), run_of("pretrain", name="byol")], [])
    assert [line.of for line in two[0].lines] == ["pgl", "byol"]


@pytest.mark.parametrize(
    ("shares", "text"),
    [((0.0,), "0 %"), ((0.5,), "50 %"), ((0.034,), "3.4 %"), ((0.00012, 0.0037), "0.01 to 0.37 %"), ((1.0,), "100 %")],
)
def test_shares_are_written_short(shares, text):
    assert percent(*shares) == text


def test_chance_is_that_of_the_planted_probe():
    """The made-up results above stand where they say."""
    assert judged(PGL)["standing"]["matching"]["low"] == pytest.approx(0.9 * CHANCE[2])
