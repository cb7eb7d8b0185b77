"""What a sweep's trials are given: paths that hold in their own folders, encoders of one size, their own trainings."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from small_sweeps import BASE, CURVE, ENCODER, ended, sweep

from pgl_ray import config as c
from pgl_ray import tune
from pgl_ray.config.fields import with_absolute_paths
from pgl_ray.sweep import checks, stages, sweeps

PROBED = {"base_finetune": None, "judge": "probe/balanced_accuracy"}


@pytest.mark.parametrize("stage", list(c.STAGES))
def test_relative_paths_are_those_of_the_command(tmp_path, monkeypatch, stage):
    """Ray Tune runs trials in folders of their own; whichever keys take a path, nested and dotted alike."""
    door = c.STAGES[stage]
    known = {"pretrain": {"index", "run", "probe.index"}, "evaluate": {"index", "run", "output"}}
    known |= {"probe": {"index", "init", "control", "ceiling", "output"}, "finetune": {"index", "run", "init"}}
    monkeypatch.chdir(tmp_path)
    for key in known[stage]:
        nested = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=here/x"]))
        absolute = OmegaConf.create(with_absolute_paths(door, nested))
        assert (
            OmegaConf.select(absolute, key) == with_absolute_paths(door, {key: "here/x"})[key] == f"{tmp_path}/here/x"
        )
    others = {key: "here" for key, default, _ in c.keys(door) if key not in known[stage] and default == "random"}
    assert with_absolute_paths(door, {"init": "random", **others}) == {"init": "random", **others}


def test_a_trial_elsewhere_has_the_paths_of_the_command(tmp_path, monkeypatch):
    """As it is built again there, from what the command sent."""
    monkeypatch.chdir(tmp_path)
    arms = {"own": {}, "from a": {"finetune.init": "runs/a"}, "shipped": {"finetune.init": "pretrained:openkbp_small"}}
    base = {**BASE["base_pretrain"], "index": "stores/mine"}
    sent = sweep(tmp_path, arms=arms, base_pretrain=base).model_dump_json()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = c.build(c.TuneConfig, json.loads(sent))
    own, given, shipped = (stages.stage_configs(config, {"arm": arm}, tmp_path / "t") for arm in arms)
    assert own["pretrain"].index == f"{tmp_path}/stores/mine" and own["finetune"].index == config.index
    assert given["finetune"].init == f"{tmp_path}/runs/a" and shipped["finetune"].init == "pretrained:openkbp_small"


@pytest.mark.parametrize("last", ["probe", "finetune"])
def test_all_arms_have_the_encoder_of_the_pre_training(tmp_path, last):
    """Random weights, too, whatever the bases of the later stages say; an arm may ask for another one."""
    arms = {"random": {f"{last}.init": "random"}, "pgl": {}}
    arms["wide"] = {f"{last}.init": "random", f"{last}.encoder.width": 32}
    base = {"base_probe": {"encoder": {"width": 4}}, **(PROBED if last == "probe" else {})}
    space = {"pretrain.encoder.width": {"grid_search": [8, 16]}}
    config = sweep(tmp_path, arms=arms, space=space, **base)
    for width in (8, 16):
        for arm, expected in (("random", width), ("pgl", width), ("wide", 32)):
            point = {"arm": arm, "pretrain.encoder.width": width}
            found = stages.stage_configs(config, point, tmp_path / "t")[last].encoder
            assert (found.width, found.depths) == (expected, (1, 1, 1, 1) if arm != "wide" else found.depths)


GRID = {"grid_search": [4, 16]}
WIDTH, DECAY = {"pretrain.encoder.width": GRID}, {"pretrain.ema_decay": {"grid_search": [0.9, 0.99]}}
OF_TUNING, OF_PROBE = {"finetune.encoder.width": GRID}, {"probe.encoder.depths": {"grid_search": [[1, 1, 1, 2]]}}
GIVEN, ELSEWHERE = {"base_finetune": {"init": "random"}}, {"base_finetune": {"init": "/runs/a"}}
OLD, RANDOM = {"finetune.init": "/runs/a"}, {"finetune.init": "random"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"space": OF_TUNING},
            r"finetune\.encoder\.width=4: .* width is 8: give pretrain\.encoder\.width instead",
        ),
        ({"space": OF_PROBE, "base_probe": {}}, r"give pretrain\.encoder\.depths instead"),
        (
            {"arms": {"a": {}, "b": {"probe.encoder.width": 4}}, **PROBED, "base_probe": {}},
            "arm=b: probe.encoder.width",
        ),
        ({"space": DECAY, **GIVEN}, "space key 'pretrain.ema_decay' changes nothing, no trial is pre-trained"),
        ({"space": DECAY, "arms": {"a": RANDOM}}, "space key 'pretrain.ema_decay' changes nothing"),
        ({"space": WIDTH, **ELSEWHERE}, "space key 'pretrain.encoder.width' changes nothing"),
        (
            {"arms": {"a": {}, "b": {**RANDOM, "pretrain.ema_decay": 0.9}}},
            r"arms\.b: 'pretrain.ema_decay' changes",
        ),
        ({"arms": {"a": {"pretrain.method": "byol"}}, **GIVEN}, r"arms\.a: .* its init is random"),
        ({"space": {"finetune.ray.num_cpus": GRID}}, "'finetune.ray.num_cpus' is not a key"),
        ({"space": WIDTH, **GIVEN}, None),
        ({"space": {**DECAY, **WIDTH}, "arms": {"random": RANDOM, "old": OLD, "pgl": {}}}, None),
        ({"space": {"pretrain.seed + finetune.seed": GRID}, **GIVEN}, None),
        ({"space": {"pretrain.encoder.width + finetune.encoder.width": GRID}}, None),
        ({"space": OF_TUNING, **GIVEN}, None),
        ({"space": {"finetune.encoder.width": {"grid_search": [8]}}}, None),
    ],
)
def test_what_a_sweep_would_drop_is_refused(tmp_path, changes, said):
    """Trials of other names and the same settings; of arms some may leave a swept key out."""
    if said is None:
        assert checks.check(sweep(tmp_path, **changes))
        return
    with pytest.raises(ValueError, match=said) as caught:
        checks.check(sweep(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_whether_a_collapse_ends_it_tells_trainings_apart(tmp_path):
    """Else a trial that is to go on finds the other's, which was ended; what was named by default stays so."""
    arms = {"ends": {}, "said": {"pretrain.health.stop_on_collapse": True}, "on": {"pretrain.health.every": 7}}
    arms["on"]["pretrain.health.stop_on_collapse"] = False
    config = sweep(tmp_path, arms=arms)
    ends, named, on = (stages.stage_configs(config, {"arm": arm}, tmp_path / "t")["pretrain"] for arm in arms)
    assert ends.run == named.run != on.run
    Path(ends.run).mkdir(parents=True)  # an earlier version shared it: the same command goes on where it is
    for stops in (True, False):
        (Path(ends.run) / "run.json").write_text(json.dumps({"config": {"health": {"stop_on_collapse": stops}}}))
        again = stages.stage_configs(config, {"arm": "on"}, tmp_path / "t")["pretrain"]
        assert again.run == (on.run if stops else ends.run)


def test_an_init_may_be_named_a_control(tmp_path):
    """Wrong priors in an arm that is not pre-trained say in which readings its probe is judged."""
    control = {"probe.init": "/runs/a", "pretrain.align.wrong_priors": True}
    config = sweep(tmp_path, arms={"control": control, "pgl": {}}, **PROBED, base_probe={})
    checks.check(config)
    assert stages.stage_configs(config, {"arm": "control"}, tmp_path / "t")["probe"].all_readings


@pytest.mark.parametrize(
    "tuning, pretrained", [*itertools.product((None, "random", "/runs/a"), (True, False)), ("no stage", True)]
)
def test_a_probe_judges_the_init_it_is_given_or_is_refused(tmp_path, tuning, pretrained):
    """Given by the base or the arm (which goes before), with a pre-training or a fine-tuning that starts elsewhere."""
    for of_base, of_arm in itertools.product((None, "random", "/runs/a"), repeat=2):
        arm = {"probe.init": of_arm} if of_arm else {}
        bases = {"base_probe": {"init": of_base} if of_base else {}}
        bases |= {} if pretrained else {"base_pretrain": None}
        if tuning == "no stage":
            bases |= PROBED
            possible = bool(of_arm or not of_base)
        else:
            arm |= {"finetune.init": tuning} if tuning else {}
            start = tuning or ("its pre-training" if pretrained else "random")
            possible = (of_arm or of_base) in (None, start)
        config = sweep(tmp_path, arms={"one": {"probe.seed": 1, **arm}}, **bases)
        if possible:
            (only,) = checks.check(config)
            judged = stages.stage_configs(config, only.values, tmp_path / "t")["probe"].init
            assert judged == (of_arm or of_base) or not (of_arm or of_base)
            continue
        with pytest.raises(ValueError, match=rf"^arm=one: (base_)?probe.init={of_arm or of_base}: the probe judges"):
            checks.check(config)


def test_curves_that_are_judged_belong_to_one_trial(tmp_path):
    """Trials that differ in the probe of a training share it, unless its curve is what they are judged by."""
    space = {"pretrain.probe.num_scans": {"grid_search": [1, 5]}}
    judged = sweep(tmp_path, space=space, base_finetune=None, judge=sweeps.PROBE, **CURVE)
    shared = sweep(tmp_path, space=space, **CURVE)
    for config, num in ((judged, 2), (shared, 1)):
        points = [{"pretrain.probe.num_scans": n} for n in (1, 5)]
        runs = {stages.stage_configs(config, point, tmp_path / "t")["pretrain"].run for point in points}
        assert len(runs) == num


@pytest.mark.parametrize(
    ("arm", "views", "message"),
    [
        ({"pretrain.align.more_strides": [[3, 3, 3]]}, [16, 32, 32], r"output_stride=\[3, 3, 3\]"),
        ({"pretrain.method": "byol"}, [20, 40, 40], "multiple"),
        ({"pretrain.method": "genesis"}, [20, 40, 40], "multiple"),
        ({}, [20, 40, 40], None),  # its own stride divides these views
    ],
)
def test_maps_that_an_encoder_has_not_are_refused_before(tmp_path, arm, views, message):
    base = {"max_steps": 4, "encoder": ENCODER, "views": {"size": views}, "align": {"output_stride": [4, 8, 8]}}
    config = sweep(tmp_path, arms={"one": arm}, base_pretrain=base)
    if message is None:
        assert len(checks.check(config)) == 1
        return
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def test_an_arm_that_was_left_out_keeps_its_name(tmp_path):
    """Its results stay in the table; the best settings are of an arm that the sweep has."""
    folder = tmp_path / "sweep"
    both = {"a": {"finetune.optim.lr": 0.1}, "b": {"finetune.optim.lr": 0.2}}
    sweeps.remember(sweep(tmp_path, arms=both), folder)
    for arm, score in (("a", 0.4), ("b", 0.6)):
        ended(tmp_path, {"arm": arm}, score)
    without = sweep(tmp_path, arms={**both, "b": None})
    sweeps.remember(without, folder)
    result = tune.collect(without, folder)
    assert result.best == {"arm": "a"} and result.states == {"done": 1}
    assert OmegaConf.load(folder / "best.yaml").finetune.optim.lr == 0.1
    with pytest.raises(ValueError, match=r"another arms\.b .*choose another run"):
        sweeps.remember(sweep(tmp_path, arms={**both, "b": {"finetune.optim.lr": 0.3}}), folder)
    sweeps.remember(sweep(tmp_path, arms=both), folder)
    assert tune.collect(sweep(tmp_path, arms=both), folder).best == {"arm": "b"}
    shutil.rmtree(folder)


@pytest.mark.parametrize("preset", ["small", "medium", "full"])
@pytest.mark.parametrize("method", ["byol", "genesis"])
def test_the_mend_for_another_method_over_a_preset_is_one(preset, method):
    """A command line cannot take out what a file gives: it is told which values to give instead."""
    args = [f"conf/pretrain_{preset}.yaml", "index=s", "run=r", f"method={method}", "optim.lr=null"]
    with pytest.raises(ValueError, match=f"of method=pgl, not {method}") as refused:
        c.load(c.PretrainConfig, args)
    mend = str(refused.value).split("gives them take ")[1].split()
    mended = c.load(c.PretrainConfig, [*args, *mend])
    assert mended.method == method and mended.loss == c.PretrainLossConfig()
