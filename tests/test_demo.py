"""The demo's settings and what it says: one geometry throughout, nothing learnt from the phantoms it is judged on."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pgl_ray import config as c
from pgl_ray import demo, outlook
from pgl_ray.data import trainings
from pgl_ray.data.store import Index
from pgl_ray.data.voxel_statistics import foreground_box
from pgl_ray.judge.judges import Standing
from pgl_ray.model.places import PlacesPgl
from pgl_ray.pages.tables import Difference
from pgl_ray.phantom.phantom import make_phantom
from pgl_ray.probe import ProbeResult
from pgl_ray.train import networks


@pytest.fixture
def settings(tmp_path):
    """The demo's config, and that of each door."""
    config = c.DemoConfig(out=str(tmp_path), seed=3, pretrain_steps=7, finetune_steps=9, num_labelled=4, num_test=5)
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    doors = {"pretrain": demo.pretraining(config, store, run, {}), "probe": demo.probing(config, store, run)}
    doors |= {init: demo.finetuning(config, store, run, init, f"{run}_{init}", {}) for init in demo.INITS}
    return config, doors


def test_every_step_sees_one_encoder_and_the_training_phantoms(settings):
    _, doors = settings
    sizes = {(one.encoder.width, one.encoder.depths) for name, one in doors.items() if name != "probe"}
    assert len(sizes) == 1 and doors["probe"].encoder is None  # the run's own
    assert doors["probe"].size == doors["pretrain"].views.size
    assert {one.split for one in doors.values()} == {"train"} and doors["probe"].test_split == "test"
    assert {one.seed for one in doors.values()} == {3}
    assert (doors["pretrain"].max_steps, doors["random"].max_steps, doors["pgl"].max_steps) == (7, 9, 9)
    assert (doors["probe"].num_scans, doors["pgl"].num_scans, doors["probe"].num_test_scans) == (4, 4, 5)
    for name, one in doors.items():
        assert c.build(type(one), one.model_dump(mode="json")) == one, name


def test_both_fine_tunings_differ_only_in_their_init(settings):
    _, doors = settings
    random, pgl = (doors[init].model_dump(exclude={"run", "init"}) for init in demo.INITS)
    assert random == pgl and (doors["random"].init, doors["pgl"].init) == ("random", doors["pretrain"].run)


def test_pretraining_learns_by_place_on_maps_that_views_hold(settings):
    _, doors = settings
    model, geometry = networks.build_pretraining(doors["pretrain"])
    assert isinstance(model, PlacesPgl) and len(model.maps) == 3 and len(model.place) == 3
    for _, one in model.maps:
        cells = [size // stride for size, stride in zip(one.view_size, one.output_stride)]
        assert min(cells) >= 2, f"{one.output_stride}: a view has {cells} cells"
    assert geometry.view_size == tuple(demo.VIEW)


@pytest.mark.slow
def test_pre_training_begins_without_a_note(tmp_path):
    """The target turns over and few bins are clamped, on phantoms of the demo's kind and other seeds."""
    config = demo.pretraining(c.DemoConfig(), "store", str(tmp_path / "run"), {})
    bodies = [foreground_box(make_phantom(990 + i, demo.SHAPE, demo.SPACING_MM).volume) for i in range(4)]
    chunk = '{"codecs": [{"configuration": {"chunk_shape": [8, 64, 64]}}]}'
    scans = [
        SimpleNamespace(scan_id=f"s{i}", split="train", shape=demo.SHAPE, foreground_box=body, array_metadata=chunk)
        for i, body in enumerate(bodies)
    ]
    index = Index("store", tuple(scans), {}, (-1024.0, 325.0))
    plan, (model, geometry) = trainings.make_plan(config, index), networks.build_pretraining(config)
    renderer = trainings.make_renderer(config, index, plan)
    ahead = outlook.of(config, index, plan, renderer, model.get_submodule("online.encoder"), geometry)
    assert len(ahead.lines) == 2 and not any("note" in line for line in ahead.lines)


OTHERS = {"seed": 1, "num_unlabelled": 9, "num_labelled": 3, "num_test": 2, "pretrain_steps": 8, "finetune_steps": 7}


@pytest.mark.parametrize("key", ["num_labelled", "num_test"])
@pytest.mark.parametrize("number", [-1, 0, 1])
def test_too_few_phantoms_are_refused_at_once(tmp_path, key, number):
    """One scan to learn from and one to validate on; one scan to search in another: nothing is begun with fewer."""
    said = rf"^{key}={number}: Input should be greater than or equal to 2$"
    with pytest.raises(ValueError, match=said):
        c.load(c.DemoConfig, [f"out={tmp_path / 'out'}", f"{key}={number}"])
    least = c.load(c.DemoConfig, [f"out={tmp_path / 'out'}", f"{key}=2"])
    doors = demo.finetuning(least, "s", "p", "random", "r", {}), demo.probing(least, "s", "p")
    assert (doors[0].num_scans if key == "num_labelled" else doors[1].num_test_scans) == 2


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A folder in which a demo has begun, and what makes it go on: it ends where the phantoms would be written."""

    class Begins(Exception):
        pass

    def write(*args, **kwargs):
        raise Begins

    def go_on(**changes):
        with pytest.raises(Begins):
            demo.run(c.DemoConfig(out=str(tmp_path / "out"), **changes))

    monkeypatch.setattr(demo, "write_phantoms", write)
    go_on()
    return tmp_path / "out", go_on


@pytest.mark.parametrize("earlier_version", [False, True])
@pytest.mark.parametrize("key", sorted(c.DemoConfig.model_fields.keys() - {"out", "ray"}))
def test_a_demo_of_other_settings_needs_another_folder(begun, key, earlier_version):
    """Whichever setting it is, before anything there is touched; the same ones, and a cluster's, go on."""
    out, go_on = begun
    defaults = {name: field.default for name, field in c.DemoConfig.model_fields.items()}
    if earlier_version:  # which wrote no demo.json
        (out / "demo.json").unlink()
        for name, steps in (("pretrain_pgl", "pretrain_steps"), ("finetune_random", "finetune_steps")):
            (out / name).mkdir()
            record = {"door": name.split("_")[0], "config": {"seed": 0, "max_steps": defaults[steps], "index": "s"}}
            (out / name / "run.json").write_text(json.dumps(record))
        numbers = [defaults[name] for name in ("num_unlabelled", "num_labelled", "num_test")]
        for folder, num in (("imagesTr", sum(numbers[:2])), ("labelsTr", numbers[1]), ("labelsTs", numbers[2])):
            (out / "phantoms" / folder).mkdir(parents=True)
            for k in range(num):
                (out / "phantoms" / folder / f"{k}.nii.gz").touch()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError) as caught:
        demo.run(c.DemoConfig(out=str(out), **{key: OTHERS[key]}))
    said = f"out={out} holds a demo with {key}={defaults[key]}, here {key}={OTHERS[key]}: choose another out=..."
    assert str(caught.value) == said
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    go_on(ray={"num_cpus": 4})
    assert json.loads(Path(out, "demo.json").read_text()).keys() == OTHERS.keys()


def test_a_demo_whose_phantoms_were_deleted_goes_on(begun):
    """Of an earlier version, with its pre-training alone: what cannot be known is not held against it."""
    out, go_on = begun
    (out / "demo.json").unlink()
    (out / "pretrain_pgl").mkdir()
    record = {"door": "pretrain", "config": {"seed": 0, "max_steps": 120, "index": "s"}}
    (out / "pretrain_pgl/run.json").write_text(json.dumps(record))
    go_on(finetune_steps=50)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (
            Difference(0.1, 0.05, 0.15, 8),
            "+0.100, more than the noise of 8 test scans (95 % interval +0.050 to +0.150)",
        ),
        (Difference(-0.1, -0.25, 0.05, 8), "-0.100, within the noise"),
        (Difference(-0.1, -0.15, -0.05, 8), "-0.100, more than the noise"),
    ],
)
def test_what_fine_tuning_gained_is_said_with_its_noise(gain, said):
    assert said in demo.fine_tuned({"random": 0.3, "pgl": 0.4}, gain)


def test_the_closing_lines_answer_whether_pgl_helps(capsys):
    """The judges' sentence, the table with random weights, the gain in Dice, and where the page lies."""
    standing = Standing(0.5, "random, BatchNorm off", 0.2, [0.1, 0.3], None, None)
    score = {"value": 0.7, "ci95": [0.6, 0.8], "details": {"last_map": 0.6}}
    chance = score | {"value": 0.5}
    judged = ProbeResult(
        *(
            "/runs/pretrain_pgl",
            5,
            12,
            (16, 48, 48),
            100,
            {"reestimated": {"voxels": score}},
            {"random, BatchNorm off": {"voxels": chance}},
        ),
        *({}, {"voxels": dataclasses.asdict(standing)}, ["voxels: a sentence"], [], 0.7, {"liver": 0.7}, None, [], 1.0),
    )
    dice = {"random": 0.3, "pgl": 0.4}
    lines = demo.describe(
        demo.Result("/x/report.html", judged, dice, Difference(0.1, 0.05, 0.15, 8), 12.3)
    ).splitlines()
    assert any(line.startswith("random, BatchNorm off") and "0.500" in line for line in lines)
    assert any(line.startswith("PGL is ahead of random weights in their strongest reading") for line in lines)
    assert lines[-1] == "demo: done in 12 s; report in /x/report.html"
    assert any(line.startswith("Fine-tuned, test Dice is 0.400 from PGL") for line in lines)
