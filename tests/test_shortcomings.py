"""Scans and weights that judges cannot use as asked: each is said in one line, or done without a word being needed."""

import json

import numpy as np
import pytest
import torch
from test_judges import LABELS, SIZE, SPACING, TINY, config, few_steps, one_thread, paint, store  # noqa: F401

from pgl_ray import encoders, probe
from pgl_ray.config import EncoderConfig
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.judge import dense, judges, matching, readings
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.pages.feature_pictures import draw

SETTINGS = {"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}


def scans(folder, painted: list[tuple], spacing=SPACING):
    """A store of (split, HU, labels) each."""
    for number, (split, volume, label) in enumerate(painted):
        more = {"label": label, "labelled": (2, 5), "split": split}
        write_scan(folder, f"s{number}", volume, np.diag([*spacing, 1]), **more)
    return write_index(folder, LABELS, (-1024.0, 325.0))


def weights(place, told: dict, window=(-1024.0, 325.0), **changes) -> str:
    """A run's checkpoint whose training is told by its config."""
    settings = SETTINGS | changes
    meta = {"door": "pretrain", "encoder": settings, "hu_window": list(window), "config": json.dumps(told)}
    model = {f"online.encoder.{key}": value for key, value in build_encoder(**settings).state_dict().items()}
    place.mkdir()
    torch.save({"meta": meta, "model": model}, place / "state.pt")
    return str(place)


# -- scans ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_scans_that_show_no_organ_are_counted(tmp_path):
    """Of those to learn from and of those to test on; the others are used."""
    painted = [("train", *paint(0)), ("train", paint(1)[0], np.zeros_like(paint(1)[1])), ("test", *paint(2))]
    painted += [("test", paint(number)[0], np.zeros_like(paint(number)[1])) for number in (3, 4)]
    index = scans(tmp_path, painted)
    told = judges.Judges(index, config(index), ("voxels", "decoder"))
    assert "1 of the 2 scans to learn from show no organ: s1" in told.notes
    assert "2 of the 3 scans to test on show no organ: s3, s4" in told.notes
    torch.manual_seed(0)
    assert set(told.judge(Encoder(**TINY), "off")) == {"voxels", "decoder"}


@pytest.mark.parametrize("solid", [(), np.s_[10, 10, 10], np.s_[:, 5:12, :], np.s_[0::3, 4::8, 2::4]])
@pytest.mark.slow
def test_no_place_is_searched_in_a_scan_without_a_body(tmp_path, solid):
    """It is left out and named, the others are matched as if it were not there: air alone, and what lies between the
    points of the grid (every 8 mm from 4 mm on, in whole voxels)."""
    painted = [("train", *paint(0)), *(("test", *paint(number)) for number in (1, 2))]
    plain = scans(tmp_path / "plain", painted)
    air = np.full_like(painted[0][1], -1000)
    if solid:
        air[solid] = 200
    assert (air[1::3, 4::8, 2::4] == -1000).all()
    more = scans(tmp_path / "more", [*painted, ("test", air, painted[0][2])])
    torch.manual_seed(0)
    encoder = Encoder(**TINY)
    scores = []
    for index in (plain, more):
        judge = judges.Judges(index, config(index), ("matching",))
        scores.append(judge.judge(encoder, "off")["matching"].value)
        said = "no place is searched in scans with nothing above -500 HU on the grid of 8 mm: s3"
        assert (said in judge.notes) == (index is more)
        assert judge.body_box_mm() > 0
    assert scores[0] == scores[1]


@pytest.mark.parametrize("place", [(1, 4, 2), (13, 20, 34), (22, 36, 70)])
def test_a_deformed_copy_without_a_body_is_skipped(tmp_path, monkeypatch, place):
    """A voxel on the grid is a body; of its copy, moved by half a step, nothing is left on the grid."""
    air = np.full_like(paint(0)[0], -1000)
    air[place] = 200
    index = scans(tmp_path, [("train", *paint(0)), ("test", *paint(1)), ("test", air, paint(0)[1])])
    judge = judges.Judges(index, config(index), ("matching",))
    assert not any("no place is searched" in note for note in judge.notes)
    moved = np.indices(air.shape).astype(np.float32) + np.array([0, 4, 2], np.float32)[:, None, None, None]
    monkeypatch.setattr(matching, "deformation", lambda rng, shape, spacing_mm: moved)
    torch.manual_seed(0)
    maps = judge.maps(Encoder(**TINY), "off")
    assert len(matching.organ_errors(maps, judge.test, judge.names, SIZE)) == 4  # two organs, there and back
    assert matching.deformation_errors(maps, judge.test[1:], SIZE, 0) == []
    assert len(matching.deformation_errors(maps, judge.test, SIZE, 0)) == matching.NUM_LANDMARKS


@pytest.mark.parametrize("empty", [(1,), (2, 4), (3,)])
@pytest.mark.slow
def test_pictures_are_of_scans_with_a_body(tmp_path, monkeypatch, empty):
    """Scans 1 to 4 are tested on, and those in `empty` show air under their labels: neither asked nor searched."""
    painted = [("train" if number == 0 else "test", *paint(number)) for number in range(5)]
    for number in empty:
        painted[number][1][:] = -1000
    index = scans(tmp_path / "store", painted)
    drawn = {}
    monkeypatch.setattr(probe.feature_pictures, "draw", lambda *args: drawn.update(draw(*args)) or dict(drawn))
    run = weights(tmp_path / "run", {})
    more = {"encoder": None, "judges": ["matching"], "ends": False, "num_test_scans": 4}
    result = probe.run(config(index, init=run, **more))
    facts = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert facts["pictures"] == result.pictures == ["matching.png", "features.png"]
    assert all((tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG") for name in facts["pictures"])
    titles = [ax.get_title() for ax in drawn["matching.png"].axes]
    first, second = [number for number in range(1, 5) if number not in empty][:2]
    assert titles[0].startswith(f"asked in s{first},") and titles[1].startswith(f"found in s{second},")


@pytest.mark.parametrize("error", [ValueError, MemoryError, OSError])
def test_what_was_judged_is_kept_where_a_picture_fails(store, tmp_path, monkeypatch, error):  # noqa: F811
    def fails(*args):
        raise error("no picture")

    monkeypatch.setattr(probe.feature_pictures, "draw", fails)
    run = weights(tmp_path / "run", {})
    with pytest.raises(error, match="no picture"):
        probe.run(config(store, init=run, encoder=None, judges=["matching"], ends=False))
    facts = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert facts["readings"]["reestimated"]["matching"]["value"] > 0 and facts["pictures"] == []


@pytest.mark.parametrize(
    ("splits", "num", "ways"),
    [
        ({"test": [(2,), (5,), (5,)], "val": []}, 2, ["num_test_scans=3"]),
        ({"test": [(2,), (), (), (5,), (2, 5)], "val": []}, 3, ["num_test_scans=5"]),
        ({"test": [(2,), (5,)], "val": [(2,), (2, 5)]}, 4, ["test_split=val"]),
        ({"test": [(2,), (5,), (2,)], "val": [(2,), (2, 5)]}, 2, ["num_test_scans=3", "test_split=val"]),
        ({"test": [(2,), (5,)], "val": [(2,), (5,)]}, 4, []),
        ({"test": [(2, 5), None], "val": [None, (2, 5)]}, 4, []),  # the shared organs lie in air
        ({"test": [(2, 5), None, (2, 5)], "val": []}, 2, ["num_test_scans=3"]),
        ({"test": [(), (), (2,), (2,)], "val": []}, 2, ["num_test_scans=4"]),
    ],
)
def test_scans_that_share_no_organ_are_refused_first(tmp_path, monkeypatch, splits, num, ways):
    """Before any judging; each way out that is named, and no other, is one. Splits give each scan's label values; None:
    both, in air."""
    painted = [("train", *paint(0))]
    for number, (split, values) in enumerate((split, values) for split, of in splits.items() for values in of):
        volume, label = paint(number + 1)
        label[~np.isin(label, values or ())] = 0
        if values is None:
            volume, label = np.full_like(volume, -1000), paint(number + 1)[1]
        painted.append((split, volume, label))
    index = scans(tmp_path / "store", painted)
    run = weights(tmp_path / "run", {})
    asked = {"init": run, "encoder": None, "judges": ["voxels", "matching"], "num_test_scans": num}
    monkeypatch.setattr(judges.Judges, "judge", None)
    with pytest.raises(ValueError, match=r"^judges=\[voxels,matching\]: no organ occurs in ") as caught:
        probe.run(config(index, **asked))
    said = str(caught.value)
    assert "\n" not in said and f"(num_test_scans={num}, test_split='test')" in said
    named = said.partition("): ")[2].split(", or ")
    assert named[-1] == "leave matching out: judges=[voxels]"
    mends = [way.removeprefix("raise ").removeprefix("choose ").replace(" to ", "=") for way in named[:-1]]
    assert mends == ways
    for mend in mends:
        key, _, value = mend.partition("=")
        assert judges.Judges(index, config(index, **asked | {key: value}), ("voxels", "matching")).body_box_mm() > 0
    judges.Judges(index, config(index, **asked), ("voxels",))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_points_of_a_body_thinner_than_their_distance(depth):
    """One slice of 1 mm under a grid of 8 mm: the grid stands in the scan, on the body."""
    volume = np.full((depth, 30, 40), -1000)
    volume[:, 5:25, 10:30] = 0
    points = readings.body_points(volume, (1.0, 2.0, 2.0), 8.0)
    assert len(points) and (points < volume.shape).all() and (points >= 0).all()
    assert set(points[:, 0]) == {min(4, depth - 1)}
    assert (volume[tuple(points.T)] == 0).all()


def test_thin_scans_are_matched(tmp_path):
    """A slice or two of each body, 2 mm apart: places are found in them as in others."""
    thin = [(split, *(part[13:15] for part in paint(i))) for i, split in enumerate(("train", "test", "test"))]
    index = scans(tmp_path, thin, spacing=(2.0, 1.0, 2.0))
    torch.manual_seed(0)
    judge = judges.Judges(index, config(index), ("matching",))
    assert 0 < judge.judge(Encoder(**TINY), "off")["matching"].value < 200
    assert len(matching.organ_errors(None, judge.test, judge.names, SIZE)) == 4  # two organs, there and back


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "told", "said"),
    [
        ("ceiling", {"align": {"wrong_priors": False}}, "its encoder was trained without labels: it is no upper end"),
        ("ceiling", {"freeze": True}, "its encoder was trained without labels: it is no upper end"),
        ("ceiling", {"freeze": False}, None),
        ("ceiling", {"freeze": False, "num_scans": 1.0}, None),
        ("ceiling", {"freeze": False, "num_scans": 0.2}, "it was trained with num_scans=0.2, not with all labels: the"),
        ("ceiling", {"freeze": False, "num_scans": 5}, "it was trained with num_scans=5: where these were not all la"),
        ("ceiling", {"freeze": True, "num_scans": 5}, "its encoder was trained without labels: it is no upper end"),
        ("control", {"align": {"wrong_priors": False}}, "it was not trained with align.wrong_priors=true: it is no"),
        ("control", {"align": {"wrong_priors": True}}, None),
        ("control", {}, None),  # nothing is known of its training
        ("init", {"align": {"wrong_priors": False}}, None),
    ],
)
def test_ends_that_are_none_are_told(store, tmp_path, key, told, said):  # noqa: F811 - pytest's way
    own = {"init": "random"} if key != "init" else {}
    asked = config(store, **own, encoder=None, **{key: weights(tmp_path / key, told)})
    notes = encoders.read(key, asked, store).ready(store, [])[1]
    if said is None:
        assert notes == []
    else:
        assert [note.startswith(f"{key}={tmp_path / key}: {said}") for note in notes] == [True]


@pytest.mark.parametrize("split", ["train", "test"])  # of 4 and 3 labelled scans
@pytest.mark.parametrize("num", [2, 3, 4, 0.5, 0.74, 0.9, 1.0])
def test_an_upper_end_of_fewer_labels_is_told_by_its_store(store, tmp_path, split, num):  # noqa: F811
    """A share is rounded to scans, as in fine-tuning."""
    told = {"freeze": False, "num_scans": num, "index": store.store, "split": split}
    run = weights(tmp_path / "ceiling", told)
    notes = encoders.read("ceiling", config(store, ceiling=run), store).ready(store, [])[1]
    total = {"train": 4, "test": 3}[split]
    few = num < total if isinstance(num, int) else round(num * total) < total
    said = f"ceiling={run}: it was trained with num_scans={num}, not with all labels: the upper end lies higher"
    assert notes == ([said] if few else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "given"), [("random", ("control",)), ("run", ("ceiling",)), ("run", ("control", "ceiling"))]
)
def test_without_random_weights_given_ends_are_judged(store, tmp_path, init, given):  # noqa: F811
    """ends=false leaves out random weights alone: an end says what it says as the encoder that is asked about."""
    places = {}
    for number, name in enumerate(("run", "control", "ceiling")):
        torch.manual_seed(number)
        places[name] = weights(tmp_path / name, {})
    own = EncoderConfig(depths=(1, 1, 1, 1), width=4) if init == "random" else None
    ends = {key: places[key] for key in given}
    result = probe.run(config(store, init=places.get(init, init), encoder=own, ends=False, **ends))
    alone = {
        key: probe.run(config(store, init=places[key], encoder=None, ends=False, all_readings=True)) for key in given
    }
    words = {"reestimated": "re-estimated", "trained": "as trained", "off": "off"}
    expected = (
        {f"control, BatchNorm {words[name]}": of for name, of in alone["control"].readings.items()}
        if ("control" in given)
        else {}
    )
    assert result.controls == expected
    assert result.ceiling == (alone["ceiling"].readings["reestimated"] if "ceiling" in given else {})
    assert list(result.standing) == (["voxels"] if "control" in given else [])
    for one in result.standing.values():
        assert one["low_is"] in expected and (one["high"] is not None) == ("ceiling" in given)


@pytest.mark.parametrize("key", ["control", "ceiling"])
def test_what_is_judged_is_no_end_of_itself(store, tmp_path, key):  # noqa: F811
    place = weights(tmp_path / "run", {})
    with pytest.raises(ValueError, match=rf"^{key}={place} is init itself: give another, or leave it out$"):
        probe.run(config(store, init=place, encoder=None, **{key: place}))


def test_refusals_name_the_key_and_a_mend_that_helps(store, tmp_path):  # noqa: F811
    """A probe takes no part of what fits, and of an end the words are about the end."""
    run, wide = weights(tmp_path / "run", {}), weights(tmp_path / "wide", {}, width=8)
    other = weights(tmp_path / "other", {}, window=(-200.0, 300.0))
    eight, four = (EncoderConfig(depths=(1, 1, 1, 1), width=width) for width in (8, 4))
    with pytest.raises(ValueError, match=rf"^init={run} holds .* the config asks for .*: leave encoder\.\* out$"):
        probe.run(config(store, init=run, encoder=eight))
    with pytest.raises(ValueError, match=rf"^control={wide} holds .*init=random.*give encoder\.\* of that size$"):
        probe.run(config(store, init="random", encoder=four, control=wide))
    with pytest.raises(ValueError, match=rf"^ceiling={other} was trained with hu_window="):
        probe.run(config(store, init=run, encoder=None, ceiling=other))


def test_a_channel_that_only_this_scan_wakes_stays_finite():
    """Standardised by next to nothing it is far above what 16 bits hold: the highest of them, and no infinity."""

    class Huge:
        strides = ((1, 1, 1),)

        def __call__(self, x):
            return [torch.cat([x, x * 1e9, -x * 1e9], 1)]

    volume = torch.linspace(1, 2, 4 * 8 * 8).reshape(4, 8, 8)
    (values,) = dense.dense_maps(Huge(), volume, (4, 8, 8), [0], 0.0)
    assert values.isfinite().all() and values[1].min() == 65504 and values[2].max() == -65504
    torch.testing.assert_close(values[0], volume.half())


@pytest.mark.slow
def test_a_side_reading_that_overflows_is_left_out(store, tmp_path, capsys):  # noqa: F811
    """Without statistics of its own maps the layers' gains multiply; what counts is judged all the same."""
    encoder = build_encoder(**SETTINGS)
    model = {f"online.encoder.{k}": v * (1e10 if "conv" in k else 1) for k, v in encoder.state_dict().items()}
    meta = {"door": "pretrain", "encoder": SETTINGS, "hu_window": [-1024.0, 325.0]}
    torch.save({"meta": meta, "model": model}, tmp_path / "run.pt")
    result = probe.run(config(store, init=str(tmp_path / "run.pt"), encoder=None, ends=False, all_readings=True))
    assert list(result.readings) == ["reestimated"] and 0 < result.value("voxels") < 1
    printed = capsys.readouterr().out
    for reading in ("BatchNorm as trained", "BatchNorm off"):
        said = f"{reading}: the encoder's features are not finite: not judged so"
        assert said in result.notes and f"probe: note: {said}" in printed
