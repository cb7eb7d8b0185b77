"""What a sweep refuses before anything is trained, and what it says then."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_sweeps import BASE, CURVE, ENCODER, LR, PROBED, sweep

from pgl_ray import config as c
from pgl_ray import tune
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.sweep import checks, stages, stores, sweeps
from pgl_ray.sweep.room import room_for
from pgl_ray.train import capacity, nodes


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
        ({"space": {"finetune.optim": {"choice": [{"lr": 0.1}]}, **LR}}, "'finetune.optim' is not a key"),
        ({"space": LR, "arms": {"a": {"finetune": {"optim": {"lr": 0.1}}}}}, "arms.a: 'finetune' is not a key"),
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


SEED, BOTH = {"grid_search": [1]}, "finetune.seed + pretrain.seed"


@pytest.mark.parametrize(
    ("space", "arm", "said"),
    [
        (LR, {"finetune.optim.lr": 0.001}, "arms.b and space key 'finetune.optim.lr' both set finetune.optim.lr"),
        ({BOTH: SEED}, {"pretrain.seed": 2}, f"arms.b and space key {BOTH!r} both set pretrain.seed"),
        ({BOTH: SEED, "finetune.seed": SEED}, {}, f"space keys {BOTH!r} and 'finetune.seed' both set finetune.seed"),
        ({"pretrain.seed": SEED, BOTH: SEED}, {}, f"space keys 'pretrain.seed' and {BOTH!r} both set pretrain.seed"),
    ],
)
def test_a_key_that_is_set_in_two_ways_is_refused(tmp_path, space, arm, said):
    with pytest.raises(ValueError) as caught:
        checks.check(sweep(tmp_path, space=space, arms={"a": {}, "b": arm}))
    assert str(caught.value) == f"{said}, of which a trial would have one: leave it to one of them"


@pytest.mark.parametrize("judge", ["val/dice", sweeps.PROBE])
@pytest.mark.parametrize("section", ["probe", "views", "optim", "health"])
@pytest.mark.parametrize("given", [200, None, [1], "x"])
def test_a_base_of_another_kind_is_refused_in_a_line(tmp_path, given, section, judge):
    """Whatever is asked of it later on, among it whether it says what trials are judged by."""
    last = {} if judge == "val/dice" else {"base_finetune": None}
    config = sweep(tmp_path, space=LR, judge=judge, base_pretrain={"max_steps": 4, section: given}, **last)
    with pytest.raises(ValueError, match=r"^base_pretrain: .*: Input should be a valid dictionary"):
        checks.check(config)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("key", ["control", "ceiling"])
@pytest.mark.parametrize(("made", "said"), [(False, "does not exist"), (True, "holds no checkpoint")])
def test_ends_that_are_not_there_are_refused_first(tmp_path, key, made, said):
    """Of a trial's probe, before any trial is pre-trained."""
    for i in range(2):
        volume = np.zeros((24, 40, 40), np.int16)
        write_scan(tmp_path, f"s{i}", volume, np.eye(4), split="train", label=volume.astype(np.uint8), labelled=(1,))
    write_index(tmp_path, {"a": 1}, (-1024.0, 325.0))
    if made:
        (tmp_path / "end").mkdir()
    base = {"num_scans": 1, "test_split": "train", key: str(tmp_path / "end")}
    config = sweep(tmp_path, index=str(tmp_path), space=LR, base_probe=base)
    with pytest.raises(ValueError, match=rf"probe\.{key}: (run )?{tmp_path}/end {said}") as caught:
        stores.check_stores(config, checks.check(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("same", [False, True])
def test_test_scans_that_share_no_organ_are_refused_first(tmp_path, same):
    """Of a trial's point matching, before any trial is pre-trained."""
    for i, value in enumerate((1, 1, 1 if same else 2)):
        volume, split = np.zeros((24, 40, 40), np.int16), "test" if i else "train"
        label = np.full(volume.shape, value, np.uint8)
        write_scan(tmp_path, f"s{i}", volume, np.eye(4), split=split, label=label, labelled=(1, 2))
    write_index(tmp_path, {"a": 1, "b": 2}, (-1024.0, 325.0))
    base = {"num_scans": 1, "judges": ["matching"]}
    asked = {"base_pretrain": {"max_steps": 1, "global_batch_size": 1, "split": "train"}, "base_finetune": None}
    arms, judge = {"pgl": {}}, "probe/matching_mm"
    config = sweep(tmp_path, index=str(tmp_path), arms=arms, judge=judge, base_probe=base, **asked)
    if same:
        stores.check_stores(config, checks.check(config))
        return
    with pytest.raises(ValueError, match=r"no organ occurs in two of the 2 scans .* leave matching out") as caught:
        stores.check_stores(config, checks.check(config))
    assert "\n" not in str(caught.value)


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
    """A mistyped one, one that is labelled in no scan, though it is drawn, and one that no scan shows."""
    volume = np.zeros((24, 40, 40), np.int16)
    label = np.ones_like(volume, np.uint8)
    label[:4] = 2
    for number in range(3):
        kept = {"label": label, "labelled": (1, 3)}
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
