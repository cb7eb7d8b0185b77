"""A trial: its stages one after the other, its judge, its progress, how it ends."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from small_sweeps import BASE, CURVE, PROBED, said, sweep

from pgl_ray import config as c
from pgl_ray import encoders, tune
from pgl_ray.sweep import checks, progress_table, search, stages, sweeps, trial
from pgl_ray.sweep.points import name_of
from pgl_ray.sweep.room import room_for
from pgl_ray.train import capacity, nodes
from pgl_ray.train.metrics import metrics_path
from pgl_ray.train.run_files import write_json


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


@pytest.mark.parametrize("given", [("control",), ("ceiling",), ("control", "ceiling")])
@pytest.mark.parametrize("where", ["base", "arm"])
def test_ends_that_a_sweep_names_are_judged_in_its_trials(tmp_path, given, where):
    """Beside no random weights, which are an arm."""
    ends = {key: str(tmp_path / key) for key in given}
    base = {"judges": ["matching"], **(ends if where == "base" else {})}
    arm = {f"probe.{key}": place for key, place in ends.items()} if where == "arm" else {}
    asked = sweep(tmp_path, arms={"pgl": arm}, judge="probe/matching_mm", base_finetune=None, base_probe=base)
    found = stages.stage_configs(asked, {"arm": "pgl"}, tmp_path)["probe"]
    assert {key: getattr(found, key) for key in encoders.ENDS} == dict.fromkeys(encoders.ENDS) | ends
    assert not found.ends


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


@pytest.mark.parametrize("judge", ["val/dice", "val/dice_tumour"])
def test_the_score_is_that_of_the_network_that_is_kept(tmp_path, alone, monkeypatch, judge):
    """Which fine-tuning chooses by the mean over organs, whichever of them is asked for."""
    rows = {20: (0.0, 0.0), 40: (0.40, 0.50), 60: (0.55, 0.20), 80: (0.50, 0.60)}

    def train(config):
        Path(config.run).mkdir(parents=True)
        write_json(Path(config.run) / "run.json", {"door": "finetune", "config": {}, "num_steps": 80})
        lines = [{"step": step, "val/dice": mean, "val/dice_tumour": one} for step, (mean, one) in rows.items()]
        metrics_path(config.run).write_text("".join(json.dumps(line) + "\n" for line in lines))

    run, _ = alone
    config = sweep(tmp_path, arms={"a": {"finetune.init": "random"}}, judge=judge)
    monkeypatch.setattr(trial.finetune, "run", train)
    found = run(config, {"arm": "a"}, tmp_path / "trials" / "t", said(0.1))
    assert found.error is None and found.score == {"val/dice": 0.55, "val/dice_tumour": 0.20}[judge]


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
