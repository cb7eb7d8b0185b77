"""What a sweep leaves behind: the best trial's settings, arms compared, the paper's tables, plots."""

import base64
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from browser import CHROMIUM, faults
from omegaconf import OmegaConf
from scipy import stats
from small_sweeps import LR, PROBED, ended, said, sweep, tuned_run

from pgl_ray import config as c
from pgl_ray import report, tune
from pgl_ray.pages import arms, sweep_plots, sweep_report
from pgl_ray.pages.pages import OPEN
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import name_of
from pgl_ray.train.run_files import write_json

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.slow
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


def test_values_left_out_later_are_in_no_answer(tmp_path):
    """Of a grid the best value, one that failed and one that was interrupted are dropped: the page names them in one
    line, no answer speaks of them, and a grid that has them again has their trials again."""
    key, states = "finetune.global_batch_size", {2: "done", 4: "done", 8: "done", 16: "failed", 32: "running"}
    sweeps.remember(sweep(tmp_path, space={key: {"grid_search": list(states)}}), tmp_path / "sweep")
    for value, state in states.items():
        ended(tmp_path, {key: value}, value / 10 if state == "done" else None, state=state)

    def judged(values):
        config = sweep(tmp_path, space={key: {"grid_search": values}})
        sweeps.remember(config, tmp_path / "sweep", [name_of({key: value}) for value in values])
        result = tune.collect(config, tmp_path / "sweep")
        page = (tmp_path / "sweep/report.html").read_text().partition("<h2>The sweep</h2>")[0]
        return result.best[key], sum(result.states.values()), page

    best, num, page = judged([2, 4])
    names = "global_batch_size 16; global_batch_size 32; global_batch_size 8"
    assert (best, num) == (4, 2) and f"3 of settings that the space has no more ({names})" in page
    assert "Let it end" not in page and "Mend what failed" not in page
    best, num, page = judged(list(states))
    assert (best, num) == (8, 5) and "Not on this page" not in page and "Let it end" in page
    assert pq.read_table(tmp_path / "sweep" / "trials.parquet").num_rows == len(states)


def test_the_best_settings_are_so_in_the_mean_over_their_seeds(tmp_path):
    """A lucky seed of others is in no best.yaml, and the first answer, the headline and the next step agree."""
    space = {"finetune.optim.lr": {"grid_search": [0.1, 0.15, 0.2, 0.3]}, "finetune.seed": {"grid_search": [0, 1, 2]}}
    config = sweep(tmp_path, space=space)
    sweeps.remember(config, tmp_path / "sweep")
    for lr, scores in {0.1: (0.30, 0.31, 0.32), 0.2: (0.60, 0.62, 0.61), 0.3: (0.75, 0.40, 0.41)}.items():
        for seed, score in enumerate(scores):
            ended(tmp_path, {"finetune.optim.lr": lr, "finetune.seed": seed}, score)
    for seed, score in enumerate((0.9, 0.2, 0.3)):  # ASHA has stopped all but one
        values = {"finetune.optim.lr": 0.15, "finetune.seed": seed}
        ended(tmp_path, values, score, [(50, score)], state="stopped" if seed else "done")
    result = tune.collect(config, tmp_path / "sweep")
    assert ", finetune.seed=1, which leads in the mean over 3 seeds; " in tune.describe(result)
    assert "# of the settings that lead in the mean over 3 trials" in (tmp_path / "sweep/best.yaml").read_text()
    assert (result.best["finetune.optim.lr"], result.best["finetune.seed"], result.score) == (0.2, 1, 0.62)
    best = yaml.safe_load((tmp_path / "sweep/best.yaml").read_text())["finetune"]
    assert (best["optim"]["lr"], best["seed"]) == (0.2, 1)
    page = (tmp_path / "sweep/report.html").read_text().partition("<h2>The sweep</h2>")[0]
    assert "lr 0.2 leads with val/dice 0.6100" in page and "lies at its edge" not in page
    whole = (tmp_path / "sweep/report.html").read_text()
    assert "of the settings that lead in the mean over 3 trials with other seeds" in whole


@pytest.mark.parametrize(("scans", "seeds"), [(("p",), (0, 0)), (("p", "q"), (0, 1)), (("p", "q"), (0, None))])
def test_arms_that_cannot_be_compared_are_named(tmp_path, scans, seeds):
    """One test scan, no seed in common, or random weights alone: the arm of random weights is there all the same."""
    space = {"pretrain.seed + probe.seed": {"grid_search": [0, 1]}}
    arms_of = {"random": {"probe.init": "random"}, "pgl": {}}
    config = sweep(tmp_path, arms=arms_of, space=space, judge="probe/balanced_accuracy", **PROBED)
    sweeps.remember(config, tmp_path / "sweep")
    for (arm, level), seed in zip((("random", 0.4), ("pgl", 0.7)), seeds):
        if seed is not None:
            place = ended(tmp_path, {"arm": arm, "pretrain.seed + probe.seed": seed}, level).folder
            write_json(place / "probe.json", said(level, scans, init="random" if arm == "random" else "run"))
    content = sweep_report.content(tmp_path / "sweep", lambda runs: {"scans": [], "legend": []})
    (line,) = content["answers"][1].lines
    wanted = "no seed, or fewer than two test scans on alike labels, in common with random weights or wrong priors"
    wanted = wanted if seeds[1] is not None else "random weights or wrong priors alone are judged so far"
    assert line == (OPEN, wanted, "frozen, pgl" if seeds[1] is not None else "frozen")


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
    shares = {"finetune.num_scans": {"grid_search": [0.2, 1.0]}}
    config = sweep(tmp_path, arms={"random": {"finetune.init": "random"}}, published="liver", space=shares)
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
    ended(tmp_path, {"finetune.optim.lr": 0.01}, None, state="failed", error="train/loss is nan")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "train/loss is nan" in page
    for lr in (0.02, 0.03):
        ended(tmp_path, {"finetune.optim.lr": lr}, 0.5, [(40, 0.5)], state="stopped" if lr == 0.03 else "done")
    page = Path(report.run(c.ReportConfig(run=[str(tmp_path / "sweep")]))).read_text()
    assert "stopped in finetune" in page and "Too few trials came to their end to tell" in page
    assert math.isclose(page.count("<figure"), 3)
