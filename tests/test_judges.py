"""The judges of frozen encoders: one state for all, whole-scan maps, the decoder and point matching, and their ends."""

import copy
import functools
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from pgl_ray import encoders, probe
from pgl_ray.config import EncoderConfig, FailedRun, ProbeConfig
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import read_index, write_index
from pgl_ray.files.resample import resample
from pgl_ray.judge import decoder, dense, judges, matching, readings, search, voxels
from pgl_ray.judge.features import ScanEncoder
from pgl_ray.model import metrics
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import LightDecoder

SIZE = (8, 16, 32)
TINY = {"depths": (1, 1, 1, 1), "width": 4}
LABELS = {"brick": 2, "ball": 5}
SPACING = (3.0, 1.0, 2.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_steps(monkeypatch):
    """Decoders that learn next to nothing, where it does not matter what they learn."""
    monkeypatch.setattr(decoder, "train_decoder", functools.partial(decoder.train_decoder, steps=20))


def paint(number: int, shape=(24, 40, 72)) -> tuple[np.ndarray, np.ndarray]:
    """A body in air with a brick and a ball, moved from scan to scan."""
    rng = np.random.default_rng(number)
    grid, move = np.indices(shape), rng.integers(-3, 4, 3)
    volume, label = np.full(shape, -1000), np.zeros(shape, np.uint8)
    volume[2:-2, 4:-4, 6:-6] = 0
    brick = tuple(slice(a + m, b + m) for (a, b), m in zip(((6, 14), (8, 18), (14, 30)), move))
    label[brick] = 2
    middle = np.array([13, 24, 50]) + move
    label[((grid - middle[:, None, None, None]) ** 2 / np.array([16, 49, 64])[:, None, None, None]).sum(0) < 1] = 5
    volume[label == 2], volume[label == 5] = 200, -120
    return (volume + rng.normal(0, 15, shape)).round().astype(np.int16), label


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for number in range(7):
        volume, label = paint(number)
        split = "train" if number < 4 else "test"
        more = {"label": label, "labelled": (2, 5), "split": split}
        write_scan(folder, f"s{number}", volume, np.diag([*SPACING, 1]), **more)
    return write_index(folder, LABELS, (-1024.0, 325.0))


def config(index, **changes) -> ProbeConfig:
    values = {"index": index.store, "size": SIZE, "num_scans": 3, "num_test_scans": 3, "voxels_per_class": 40}
    values["encoder"] = EncoderConfig(**TINY)
    return ProbeConfig(**(values | changes))


# -- readings ---------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_views_and_the_encoder_stays(store):
    """The stem's BatchNorm against mean and variance of its own input, by numpy, over passes of equal size."""
    torch.manual_seed(0)
    encoder = Encoder(**TINY).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    views = readings.unlabelled_views(store, list(store.scans[:4]), SIZE, 0)
    assert views.shape == (readings.NUM_VIEWS, 1, *SIZE)
    again = readings.unlabelled_views(store, list(store.scans[:4]), SIZE, 0)
    assert torch.equal(views, again)
    estimated = readings.read_as(encoder, "reestimated", views)
    with torch.no_grad():
        stem = encoder.conv1(views).numpy()
    assert estimated.bn1.running_mean.numpy() == pytest.approx(stem.mean((0, 2, 3, 4)), abs=1e-5)
    passes = [part.var((0, 2, 3, 4), ddof=1) for part in np.split(stem, len(stem) // readings.AT_A_TIME)]
    assert estimated.bn1.running_var.numpy() == pytest.approx(np.mean(passes, 0), rel=1e-4)
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items()) and encoder.training
    off = readings.read_as(encoder, "off", views)
    for part in readings.norms(off):
        assert not part.running_mean.any() and (part.running_var == 1).all() and not part.training
    encoder.bn1.running_mean.fill_(3.0)
    assert (readings.read_as(encoder, "trained", views).bn1.running_mean == 3).all()


@pytest.mark.parametrize("wanted_mm", [(3.0, 1.0, 1.5), (1.5, 2.0, 0.5)])
def test_views_have_the_voxel_size_that_is_asked_for(tmp_path, wanted_mm):
    """Of a scan whose HU rise evenly: per voxel of a view by what they rise within its length in mm."""
    own_mm, rise = (1.5, 1.0, 0.5), (1.0, 2.0, 4.0)  # HU a mm
    grid = np.indices((40, 60, 80)).astype(np.float64)
    voxels = sum(at * mm * by for at, mm, by in zip(grid, own_mm, rise)).astype(np.int16) - 100
    affine = np.array([[0, 0, -own_mm[2], 0], [0, -own_mm[1], 0, 0], [own_mm[0], 0, 0, 0], [0, 0, 0, 1]])
    write_scan(tmp_path, "s", voxels, affine, split="train")
    write_index(tmp_path, {}, (-1024.0, 1024.0))
    index = read_index(tmp_path)
    views = readings.unlabelled_views(index, list(index.scans), (8, 16, 16), 0, wanted_mm)[:, 0].numpy()
    hu = views * index.scans[0].std_hu
    for axis, (mm, by) in enumerate(zip(wanted_mm, rise)):
        steps = np.diff(hu, axis=axis + 1)
        assert steps.mean() == pytest.approx(mm * by, rel=0.05)
    assert views.shape == (readings.NUM_VIEWS, 8, 16, 16)


@pytest.mark.parametrize("ratio", [(3, 3, 3), (1, 2, 1), (2, 1, 0.5)])
def test_views_are_as_smooth_as_scans_of_that_voxel_size(tmp_path, ratio):
    """Noise of single voxels, which resampling a whole scan takes away."""
    noise = np.random.default_rng(0).normal(100, 50, (60, 90, 90)).round().astype(np.int16)
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    write_scan(tmp_path, "s", noise, affine, split="train")
    write_index(tmp_path, {}, (-1024.0, 1024.0))
    index = read_index(tmp_path)
    views = readings.unlabelled_views(index, list(index.scans), (8, 16, 16), 0, ratio)[:, 0].numpy()
    shown = resample(noise, None, affine, ratio)[0].std()
    # where a new voxel's middle lies between old ones, and so how smooth it is, is not the same for both
    assert views.std() * index.scans[0].std_hu == pytest.approx(shown, rel=0.25)


def test_readings_that_differ():
    encoder = Encoder(**TINY)
    assert readings.possible(encoder, True) == ("reestimated", "trained", "off")
    assert readings.possible(encoder, False) == ("reestimated", "off")
    without = build_encoder(kind="resenc", depths=(1, 1, 1, 1, 1), width=4)  # InstanceNorm: one state
    assert readings.possible(without, True) == ("trained",)
    views = torch.randn(4, 1, 16, 64, 64)
    with torch.no_grad():
        maps = [readings.read_as(without, name, views)(views)[-1] for name in readings.READINGS]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])


def test_standardised_maps_and_constant_channels(store):
    views = readings.unlabelled_views(store, list(store.scans[:2]), SIZE, 0)
    torch.manual_seed(0)
    encoder = readings.read_as(Encoder(**TINY), "off", views)
    nn.init.zeros_(encoder.bn1.weight[:1])
    maps = readings.StandardisedMaps(encoder, views)
    batches = [maps(part) for part in views.split(16)]
    for level in range(5):
        values = torch.cat([one[level] for one in batches]).movedim(1, 0).flatten(1)
        std, mean = values.std(1), values.mean(1)
        assert ((std - 1).abs().lt(0.01) | (values == 0).all(1)).all() and mean.abs().max() < 0.01
    assert not torch.cat([one[0] for one in batches])[:, 0].any()
    assert not any(p.requires_grad for p in maps.parameters()) and not maps.train().encoder.training


# -- whole scans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40, 72), (9, 17, 130), (61, 33, 20)])
def test_whole_scan_maps_are_the_windows_own_cells(shape):
    """An encoder that sees cell by cell: windows leave no seam, whatever the size; scans that are no multiple, too."""

    class Cells(nn.Module):
        strides, channels, last = ((1, 2, 2), (2, 4, 4), (4, 8, 8)), (1, 1, 1), 2

        def forward(self, x):
            return [x[:, :, ::d, ::h, ::w] for d, h, w in self.strides]

    volume = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, shape)).float()
    for one, (d, h, w) in zip(dense.dense_maps(Cells(), volume, (4, 8, 16), [0, 2], -9.0), ((1, 2, 2), (4, 8, 8))):
        assert torch.equal(one[0].float(), volume[::d, ::h, ::w])


@pytest.mark.parametrize(("length", "window", "coarse"), [(64, 32, 8), (72, 32, 8), (32, 32, 16), (160, 64, 16)])
def test_each_cell_comes_from_the_nearest_window(length, window, coarse):
    parts = dense.windows_over(length, window, coarse)
    assert parts[0][1] == 0 and parts[-1][2] == length and parts[-1][0] + window == length
    for (_, _, last), (_, first, _) in itertools.pairwise(parts):
        assert last == first
    for start, first, last in parts:
        assert start <= first < last <= start + window and not any(at % coarse for at in (start, first, last))
        for cell in range(first, last, coarse):
            gaps = [abs(cell + coarse / 2 - other - window / 2) for other, _, _ in parts]
            assert abs(cell + coarse / 2 - start - window / 2) <= min(gaps) + coarse


def test_slabs_decode_as_the_whole_scan():
    torch.manual_seed(0)
    strides, shape = [(2, 4, 4), (4, 8, 8), (8, 16, 16)], (200, 32, 48)
    maps = [torch.randn(c, *(-(-n // s) for n, s in zip(shape, by))).half() for c, by in zip((3, 5, 7), strides)]
    model = LightDecoder((3, 5, 7), strides, 4, width=8).eval()
    with torch.no_grad():
        whole = model([one[None].float() for one in maps], shape)[0].argmax(0).numpy()
    classes = decoder.decode(model, maps, shape)
    assert classes.dtype == np.uint8 and (classes == whole).mean() > 0.9999  # ties of rounding alone


def test_parts_of_maps_and_labels_lie_together(store):
    """Maps that hold each cell's own first voxel: a part's labels start where its maps do, scans' ends included."""
    scan = decoder.LabelledScan(store, store.scans[0])
    strides = [(2, 4, 4), (8, 16, 16)]
    maps = [torch.from_numpy(scan.target[::d, ::h, ::w].astype(np.float32))[None] + 1 for d, h, w in strides]
    rng = np.random.default_rng(0)
    for _ in range(20):
        parts, target, labelled = decoder.draw_part(rng, scan, maps, strides, (16, 48, 32))
        assert target.shape == (16, 48, 32) and labelled.tolist() == [True, True, True] and target.any()
        for part, (d, h, w) in zip(parts, strides):
            inside = part[0] > 0
            assert torch.equal(part[0][inside] - 1, torch.from_numpy(target[::d, ::h, ::w].astype(np.float32))[inside])


@pytest.mark.parametrize("shape", [(47, 79, 79), (33, 65, 64), (39, 64, 95), (20, 70, 50), (64, 128, 128)])
@pytest.mark.parametrize("end", [0, -1])
def test_a_drawn_organ_lies_in_the_part_wherever_it_is(shape, end):
    """At the first and the last voxel of every axis, of scans that are no multiple of the maps' strides."""
    target = np.zeros(shape, np.uint8)
    target[end, end, end] = 1
    scan = SimpleNamespace(target=target, voxels=[np.argwhere(target)], labelled=np.array([True, True]))
    strides = [(1, 2, 2), (8, 16, 16)]
    maps = [torch.ones(1, *(-(-length // by) for length, by in zip(shape, stride))) for stride in strides]
    rng = np.random.default_rng(0)
    for _ in range(50):
        parts, part, _ = decoder.draw_part(rng, scan, maps, strides, (32, 64, 64))
        assert part.shape == (32, 64, 64) and part.sum() == 1
        at = np.argwhere(part)[0]
        for one, stride in zip(parts, strides):
            assert one.shape[1:] == tuple(np.array(part.shape) // stride) and one[(0, *(at // stride))] == 1


@pytest.mark.slow
def test_a_decoder_learns_where_the_features_tell(store):
    """The maps are the voxels: the two organs differ in HU, so a few steps find them."""
    torch.manual_seed(0)
    panel = judges.Judges(store, config(store), ("decoder",))
    plain = readings.read_as(Encoder(**TINY), "reestimated", panel.views)
    maps = readings.StandardisedMaps(plain, panel.views)
    trained = decoder.train_decoder(maps, panel.train, SIZE, 0, steps=200)
    (rows,) = decoder.score_decoder(maps, [trained], panel.test, panel.names, SIZE)
    assert {row["organ"] for row in rows} == {"brick", "ball"} and len(rows) == 6
    assert np.mean([row["dice"] for row in rows]) > 0.35
    untrained = decoder.train_decoder(maps, panel.train, SIZE, 0, steps=1)
    (before,) = decoder.score_decoder(maps, [untrained], panel.test, panel.names, SIZE)
    assert np.mean([row["dice"] for row in before]) < 0.15


# -- matching ---------------------------------------------------------------------------------------------------------


class Coordinates(nn.Module):
    """Maps whose features name the place: this judge's best case, at stride 1."""

    strides, channels, last = ((1, 1, 1), (1, 1, 1)), (1, 3), 1
    centers = ((0.5, 0.5, 0.5),) * 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        angle = x * 0.1  # on a circle: a cosine names the value
        return [x, torch.cat([angle.sin(), angle.cos(), 0 * x], 1)]


def test_organs_are_matched_where_features_name_their_place(store, monkeypatch):
    """Volumes that count voxels along W: the found place lies in the right plane, to half the grid; loops as oracle."""
    scans = [decoder.LabelledScan(store, scan) for scan in store.scans[4:]]
    for scan in scans:
        scan.volume = np.broadcast_to(np.arange(72, dtype=np.int16) - 36, (24, 40, 72)).copy()
        scan.scaling = ((-1024.0, 325.0), 0.0, 1.0)
    monkeypatch.setattr(dense, "window_size", lambda size, strides: (64, 64, 128))
    names = ["background", "brick", "ball"]
    rows = matching.organ_errors(Coordinates(), scans, names, SIZE)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        source, target = (next(s for s in scans if s.record.scan_id == row[key]) for key in ("source_id", "scan_id"))
        k = names.index(row["organ"])
        asked, right = (np.argwhere(scan.target == k).mean(0).round() for scan in (source, target))
        grid = readings.body_points(target.volume, SPACING, matching.GRID_MM)
        gaps = np.abs(grid[:, 2] - asked[2])
        candidates = grid[gaps == gaps.min()]
        errors = np.linalg.norm((candidates - right) * SPACING, axis=1)
        assert np.isclose(errors, row["error_mm"], atol=1e-4).any()


def test_places_in_the_bodys_box_against_numpy(store):
    scans = [decoder.LabelledScan(store, scan) for scan in store.scans[4:6]]
    rows = matching.organ_errors(None, scans, ["background", "brick", "ball"], SIZE)
    assert len(rows) == 4
    row, (source, target) = rows[0], scans[::-1]
    box, own = (np.reshape(scan.record.foreground_box, (3, 2)) for scan in (target, source))
    k = 1 if row["organ"] == "brick" else 2
    asked = np.argwhere(source.target == k).mean(0).round() + 0.5
    share = (asked - own[:, 0]) / (own[:, 1] - own[:, 0])
    grid = readings.body_points(target.volume, SPACING, matching.GRID_MM) + 0.5
    at = grid[np.linalg.norm((grid - box[:, 0]) / (box[:, 1] - box[:, 0]) - share, axis=1).argmin()]
    right = np.argwhere(target.target == k).mean(0).round() + 0.5
    assert row["error_mm"] == pytest.approx(np.linalg.norm((at - right) * SPACING), abs=1e-4)


def test_a_deformation_is_smooth_bounded_and_in_mm():
    shape = (20, 60, 40)
    source = matching.deformation(np.random.default_rng(0), shape, SPACING)
    assert source.shape == (3, *shape)
    step = np.diff(source, axis=1)[0]
    assert step.min() > 0.6 and step.max() < 1.4  # no fold, about the voxel's own length
    still = [getattr(matching, name) for name in ("TURN_DEG", "STRETCH", "WARP_MM")]
    assert still == [10.0, 0.1, 8.0]
    moved = np.linalg.norm((source - np.indices(shape)) * np.array(SPACING)[:, None, None, None], axis=0)
    reach = np.linalg.norm(np.array(shape) / 2 * SPACING)
    assert moved.max() < 8 * 3**0.5 * 1.3 + reach * (0.1 + np.deg2rad(10) + 0.02)


def test_good_features_match_places_in_a_deformed_copy(store):
    scans = [decoder.LabelledScan(store, store.scans[4])]
    grid = np.indices((24, 40, 72))
    scans[0].volume = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 4000, grid.shape[1:]), 2).astype(
        np.int16
    )
    rows = matching.deformation_errors(Coordinates(), scans, SIZE, 0)
    assert 0 < len(rows) <= matching.NUM_LANDMARKS and {row["organ"] for row in rows} == {"any"}
    again = matching.deformation_errors(Coordinates(), scans, SIZE, 0)
    assert rows == again


def test_body_points_cover_the_body_and_not_the_air():
    volume, _ = paint(0)
    points = readings.body_points(volume, SPACING, 6.0)
    assert (volume[tuple(points.T)] > -500).mean() > 0.95
    inside = np.argwhere(volume[2:-2, 4:-4, 6:-6] > -500) + np.array([2, 4, 6])
    gaps = [np.linalg.norm((points - voxel) * SPACING, axis=1).min() for voxel in inside[::997]]
    assert max(gaps) < 6.0 * 3**0.5


# -- scores, ends, the door -------------------------------------------------------------------------------------------


def test_intervals_of_the_voxel_probe_are_bootstraps_over_scans():
    hits, counts = np.array([[8, 1], [5, 9], [10, 0]]), np.array([[10, 10], [10, 10], [10, 0]])
    draws = np.array([[1, 1, 1], [3, 0, 0], [0, 2, 1], [0, 0, 3]])
    expected = [np.mean([23 / 30, 10 / 20]), np.mean([0.8, 0.1]), np.mean([20 / 30, 18 / 20]), 1.0]
    assert voxels.drawn_accuracies(hits, counts, draws) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("judge", "value", "lows", "high", "closed"),
    [
        ("decoder", 0.3, {"a": 0.1, "b": 0.2}, 0.4, 0.5),
        ("matching", 24.0, {"a": 30.0, "b": 35.0}, 18.0, 0.5),
        ("voxels", 0.8, {"a": 0.78}, 0.79, None),  # no room
        ("voxels", 0.8, {"a": 0.9}, 0.7, None),  # the wrong way round
        ("voxels", 0.8, {"a": 0.7}, None, None),
    ],
)
def test_where_a_value_stands_between_its_ends(judge, value, lows, high, closed):
    lows = {name: judges.Score(low, None) for name, low in lows.items()}
    standing = judges.Standing.of(judge, judges.Score(value, None), lows, high)
    assert standing.low == (max if judge != "matching" else min)(low.value for low in lows.values())
    assert standing.closed == (pytest.approx(closed) if closed is not None else None)
    text = standing.sentence(judge, value)
    assert ("of the room" in text) == (closed is not None)
    assert ("no room" in text) == (closed is None and high is not None)


@pytest.mark.parametrize("judge", judges.JUDGES)
@pytest.mark.parametrize(("gain", "words"), [(0.4, "ahead of b"), (0.0, "not clearly ahead of b"), (-0.4, "behind b")])
def test_a_difference_is_paired_over_draws_of_the_scans(judge, gain, words):
    """The draws differ far more than the encoders do: only the pairing shows the difference. More mm are worse."""
    rng = np.random.default_rng(0)
    scans = rng.normal(20, 5, 1000)
    sign = -1 if judge == "matching" else 1
    num = {"num_scans": 1000}
    other = judges.Score(20.0, None, drawn=scans, **num)
    ours = judges.Score(20.0 + sign * gain, None, drawn=scans + sign * gain + rng.uniform(-0.1, 0.1, 1000), **num)
    worse = judges.Score(20.0 - 9 * sign, None, drawn=scans - 9 * sign, **num)
    standing = judges.Standing.of(judge, ours, {"a": worse, "b": other}, None)
    assert standing.low_is == "b" and standing.ahead == pytest.approx(gain)
    assert standing.ahead_ci95 == pytest.approx([gain - 0.095, gain + 0.095], abs=0.005)
    text = standing.sentence(judge, ours.value)
    assert f", {words} 20.0" in text
    if gain:
        low, high = (float(number) for number in text.split("95 % interval ")[1].split(")")[0].split(" to "))
        assert 0.3 - 0.06 < low < high < 0.5 + 0.06
    answer = judges.answer("NET", {judge: standing}, {judge: ours.value})
    assert answer.startswith(f"NET is {words.removesuffix(' b')} the strongest control by ")
    chance = judges.Standing.of(judge, ours, {"random, off": other}, None)
    assert "random weights in their strongest reading" in judges.answer("NET", {judge: chance}, {judge: ours.value})


@pytest.mark.parametrize(("ours", "theirs"), [(3, 10), (10, 3), (1, 10)])
def test_a_difference_is_one_of_scans_that_both_have_scores_of(ours, theirs):
    """The fewer of both widen the interval, as Student's; of a single one there is none."""
    drawn = np.random.default_rng(0).normal(0, 1, 1000)
    scores = [judges.Score(mean, None, drawn=drawn * mean, num_scans=num) for mean, num in ((2, ours), (1, theirs))]
    bounds = judges.Standing.of("decoder", scores[0], {"a": scores[1]}, None).ahead_ci95
    num = min(ours, theirs)
    if num == 1:
        assert bounds is None
        return
    wider = stats.t.ppf(0.975, num - 1) / stats.norm.ppf(0.975) * (num / (num - 1)) ** 0.5
    assert bounds == pytest.approx(1 + wider * (np.percentile(drawn, [2.5, 97.5]) - 1), rel=0.01)


def test_an_interval_is_one_of_scans_with_a_score(store, monkeypatch):
    """Two of three scans show no organ, and nothing is invented in them: they have no Dice."""
    dice = {"s4": 0.5, "s5": np.nan, "s6": np.nan}
    rows = [
        {
            "scan_id": scan,
            "organ": "ball",
            "target_voxels": 9,
            "predicted_voxels": 9,
            **dict.fromkeys(metrics.SCORES, value),
        }
        for scan, value in dice.items()
    ]
    monkeypatch.setattr(decoder, "train_decoder", lambda *args: None)
    monkeypatch.setattr(decoder, "score_decoder", lambda *args: [rows])
    judge = judges.Judges(store, config(store), ("decoder",))
    score = judge.judge(build_encoder(**TINY), "off")["decoder"]
    assert score.num_scans == 1 and score.value == 0.5 and score.ci95 is None


@pytest.mark.parametrize("num", [1, 3, 63, 64, 65, 200, 1808])
def test_views_are_spread_over_all_scans(store, num):
    """Of a pool sorted by names, whose first 64 scans may all be one data set's, every part is seen."""
    asked = []

    class Scans(list):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    views = readings.unlabelled_views(store, Scans([store.scans[0]] * num), SIZE, 0)
    assert len(views) == len(asked) == readings.NUM_VIEWS
    times = np.bincount(asked, minlength=num)
    if num <= readings.NUM_VIEWS:
        assert times.max() - times.min() <= 1
    else:
        apart = np.diff([*sorted(asked), num])
        assert times.max() == 1 and apart.max() - apart.min() <= 1


@pytest.mark.parametrize(("test_split", "num_left"), [("test", 4), ("train", 2)])
def test_statistics_are_not_those_of_tested_scans(store, monkeypatch, test_split, num_left):
    drawn = []
    views = readings.unlabelled_views
    monkeypatch.setattr(
        readings, "unlabelled_views", lambda index, scans, *rest: drawn.extend(scans) or views(index, scans, *rest)
    )
    judge = judges.Judges(store, config(store, test_split=test_split, num_scans=1, num_test_scans=2))
    assert len(drawn) == num_left and not {scan.scan_id for scan in drawn} & {s.scan_id for s in judge.probe.scans[1]}


def test_one_sentence_names_every_judge_on_its_side():
    def standing(ahead, bounds):
        return judges.Standing(0.5, "random, BatchNorm off", ahead, bounds, None, None)

    two = {"voxels": standing(0.2, [0.1, 0.3]), "decoder": standing(0.02, [-0.1, 0.1])}
    text = judges.answer(
        "PGL", two | {"matching": standing(5.0, [4.0, 6.0])}, {"voxels": 0.7, "decoder": 0.52, "matching": 9}
    )
    first, second = text.split(". It is ")
    assert first.startswith("PGL is ahead of random weights") and "by 2 of 3 judges" in first
    assert "voxels 0.700 against 0.500, by 0.200 (95 % interval 0.100 to 0.300)" in first and "mm 9.0" in first
    assert second.startswith("not clearly ahead of") and "0.520 against 0.500, by +0.020" in second
    whole = judges.answer("PGL", {"voxels": two["voxels"]}, {"voxels": 0.7})
    assert "by every judge: balanced accuracy" in whole and "It is" not in whole


@pytest.mark.parametrize("ahead, words", [(0.2, "0.200"), (-0.2, "0.200")])
def test_a_difference_without_an_interval_stays_bare(ahead, words):
    standing = judges.Standing(0.5, "random, BatchNorm off", ahead, None, None, None)
    assert standing.by("voxels") == words and standing.against("voxels").endswith("random, BatchNorm off 0.500")


def test_judges_use_the_window_that_an_encoder_sees(store):
    with pytest.raises(ValueError, match=r"^size=null: give the window"):
        judges.Judges(store, config(store).model_copy(update={"size": None}))


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_an_encoder_is_not_ahead_of_itself(store):
    """The draws of all judges are the same for every encoder: a difference to itself has no width."""
    panel = judges.Judges(store, config(store), judges.JUDGES)
    torch.manual_seed(0)
    encoder = Encoder(**TINY)
    one, other = (panel.judge(encoder, "reestimated") for _ in range(2))
    for judge in judges.JUDGES:
        standing = judges.Standing.of(judge, one[judge], {"itself": other[judge]}, None)
        assert (standing.ahead, standing.ahead_ci95, standing.is_ahead) == (0, [0, 0], None)
        low, high = np.nanpercentile(one[judge].drawn, (2.5, 97.5))  # three scans: wider than their draws
        assert one[judge].ci95[0] <= low < high <= one[judge].ci95[1] and "drawn" not in one[judge].plain()


def test_intervals_of_the_decoder_are_over_scans_and_decoders():
    """Decoders that differ alone, scans that differ alone, and one scan."""

    def rows(*values):
        return [{"scan_id": f"s{i}", "organ": "ball", "dice": value} for i, value in enumerate(values)]

    apart = judges.drawn_dice([rows(0.2, 0.2, 0.2), rows(0.6, 0.6, 0.6)], 0)
    values, counts = np.unique(apart.round(6), return_counts=True)
    assert values.tolist() == [0.2, 0.4, 0.6]
    assert stats.chisquare(counts, len(apart) * np.array([0.25, 0.5, 0.25])).pvalue > 1e-3
    alike = judges.drawn_dice([rows(0.1, 0.5, 0.9)] * 3, 5)
    assert abs(alike.std() - np.std([0.1, 0.5, 0.9]) / 3**0.5) < 0.01 and abs(alike.mean() - 0.5) < 0.01
    assert judges.drawn_dice([rows(0.3)] * 2, 0) is None


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_the_door_judges_with_all_three_and_both_ends(store, tmp_path, capsys):
    torch.manual_seed(3)
    meta = {"door": "pretrain", "encoder": {**TINY, "depths": [1, 1, 1, 1], "stage_strides": "early"}}
    meta |= {"hu_window": [-1024.0, 325.0]}
    for name in ("run", "control", "ceiling"):
        (tmp_path / name).mkdir()
        model = {f"online.encoder.{key}": value for key, value in Encoder(**TINY).state_dict().items()}
        torch.save({"meta": meta, "model": model}, tmp_path / name / "state.pt")
    where = {name: str(tmp_path / name) for name in ("control", "ceiling")} | {"init": str(tmp_path / "run")}
    more = {"judges": ["voxels", "decoder", "matching"], "encoder": None, "num_scans": 9}
    result = probe.run(config(store, **where, **more))
    facts = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert list(facts["readings"]) == ["reestimated", "trained", "off"]
    of_control = [f"control, BatchNorm {state}" for state in ("re-estimated", "as trained", "off")]
    assert list(facts["controls"]) == ["random, BatchNorm re-estimated", "random, BatchNorm off", *of_control]
    for scores in (facts["readings"]["reestimated"], *facts["controls"].values(), facts["ceiling"]):
        assert list(scores) == ["voxels", "decoder", "matching"]
    assert list(facts["readings"]["off"]) == list(facts["readings"]["trained"]) == ["voxels"]
    assert set(facts["standing"]) == {"voxels", "decoder", "matching"} and len(result.sentences) == 3
    assert facts["body_box_mm"] > 0 and facts["readings"]["reestimated"]["matching"]["details"]["deformed_mm"] > 0
    assert "num_scans=9: split='train' has 4 labelled scans" in capsys.readouterr().out
    assert facts["pictures"] == ["matching.png", "features.png"]
    for name in facts["pictures"]:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    text = probe.describe(result)
    assert "BatchNorm off" in text and "trained with all labels" in text and "body's box" in text
    organs = facts["readings"]["reestimated"]["decoder"]["details"]["organs"]
    said = re.findall(r"(\w+) (\d\.\d{3}), ([\d.]+|-)(?:;|$)", text.split("organs by the decoder")[1].split("\n")[0])
    assert [(name, float(dice)) for name, dice, _ in said] == [(o, round(v["dice"], 3)) for o, v in organs.items()]
    assert "windows of 8x16x32" in text and facts["size"] == list(SIZE)


@pytest.mark.slow
def test_the_window_is_that_of_the_views_of_the_weights(store, tmp_path):
    """Unless it is given; what says nothing of its training is judged at the paper's size."""
    model = {f"online.encoder.{key}": value for key, value in Encoder(**TINY).state_dict().items()}
    meta = {"door": "pretrain", "encoder": {**TINY, "depths": [1, 1, 1, 1], "stage_strides": "early"}}
    meta |= {"hu_window": [-1024.0, 325.0]}
    known = {"views": {"size": [16, 16, 48]}, "method": "pgl"}
    texts = {"views": json.dumps(known), "tuned": json.dumps({"patch": {"size": [64, 64, 64]}}), "silent": "{}"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        torch.save({"meta": meta | {"config": text}, "model": model}, tmp_path / name / "state.pt")
    asked = {"encoder": None, "ends": False, "size": None, "voxels_per_class": 4}
    sizes = {name: probe.run(config(store, init=str(tmp_path / name), **asked)).size for name in texts}
    assert sizes == {"views": (16, 16, 48), "tuned": (16, 96, 96), "silent": (16, 96, 96)}
    assert probe.run(config(store, init=str(tmp_path / "views"), **asked | {"size": SIZE})).size == SIZE
    assert probe.run(config(store, **asked | {"encoder": EncoderConfig(**TINY)})).size == (16, 96, 96)


@pytest.mark.parametrize("key", ["control", "ceiling"])
@pytest.mark.slow
def test_ends_of_another_size_are_refused(store, tmp_path, monkeypatch, key):
    for name, width in (("run", 4), (key, 8)):
        settings = {"kind": "resnet", "depths": [1, 1, 1, 1], "width": width, "stage_strides": "early"}
        model = {f"online.encoder.{k}": value for k, value in build_encoder(**settings).state_dict().items()}
        meta = {"door": "pretrain", "encoder": settings, "hu_window": [-1024.0, 325.0]}
        (tmp_path / name).mkdir()
        torch.save({"meta": meta, "model": model}, tmp_path / name / "state.pt")
    asked = {"init": str(tmp_path / "run"), key: str(tmp_path / key), "encoder": None}
    monkeypatch.setattr(judges.Judges, "judge", None)  # before any judging
    with pytest.raises(ValueError, match=rf"^{key}=.*'width': 8.*init=.*'width': 4.*give a run of the same size$"):
        probe.run(config(store, **asked))
    with pytest.raises(ValueError, match=rf"^{key}=.*'width': 8.*init=random.*give encoder\.\* of that size$"):
        probe.run(config(store, **asked | {"init": "random"}))


def checkpoint_of(folder, level, seed):
    """A pre-training run whose encoder was trained up to a map; its path."""
    settings = {"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    torch.manual_seed(seed)
    model = {f"online.encoder.{k}": value for k, value in build_encoder(**settings).state_dict().items()}
    folder.mkdir()
    meta = {"door": "pretrain", "encoder": settings, "hu_window": [-1024.0, 325.0], "level": level}
    torch.save({"meta": meta, "model": model}, folder / "state.pt")
    return str(folder)


def test_ends_are_judged_by_as_many_maps(store, tmp_path):
    asked = {"init": checkpoint_of(tmp_path / "run", 3, 0), "ceiling": checkpoint_of(tmp_path / "ceiling", 4, 1)}
    given = config(store, **asked, encoder=None)
    own = encoders.read("init", given, store)
    (ceiling,) = encoders.read_ends(given, store, own).values()
    assert ceiling.ready(store, [])[0].last == own.ready(store, [])[0].last == 3
    for init in ("random", asked["ceiling"]):
        size = None if init != "random" else EncoderConfig(**TINY)
        given = config(store, init=init, control=asked["init"], encoder=size)
        own = encoders.read("init", given, store)
        (control,) = encoders.read_ends(given, store, own).values()
        encoder, notes = control.ready(store, [])
        assert encoder.last == 3 and own.ready(store, [])[0].last == 4
        fewer = "it was trained up to map 3: it is judged by fewer maps than init, up to 4"
        assert notes[-1] == f"control={asked['init']}: {fewer}"


@pytest.mark.parametrize("judge", ["matching", "decoder"])
def test_one_organ_is_enough_for_judges_of_places(tmp_path, few_steps, judge):
    """Where no background is known the voxel probe alone has nothing to tell it from."""
    for number in range(5):
        volume, label = paint(number)
        facts = {"label": label * (label == 2), "labelled": (2,), "split": "test" if number > 2 else "train"}
        write_scan(tmp_path, f"s{number}", volume, np.diag([*SPACING, 1]), **facts)
    index = write_index(tmp_path, LABELS, (-1024.0, 325.0))
    asked = judges.Judges(index, config(index, num_test_scans=2), (judge,))
    torch.manual_seed(0)
    assert asked.judge(Encoder(**TINY), "off")[judge].value >= 0
    with pytest.raises(ValueError, match="annotate more organs"):
        judges.Judges(index, config(index), ("voxels",))


@pytest.mark.parametrize("scores", [((0.8, 0.0), (0.8, None), (0.8, None)), ((0.5, 0.5), (0.7, 0.3), (0.6, None))])
def test_decoders_together_are_the_mean_of_each(store, monkeypatch, scores):
    """Also where an absent organ is invented by some: there the others have no score."""
    nan = float("nan")

    def rows(own):
        known = dict.fromkeys(metrics.SCORES, nan)
        facts = [{"target_voxels": 9, "predicted_voxels": 9}, {"target_voxels": 0, "predicted_voxels": 9}]
        both = zip(("s4", "s5"), own, facts)
        always = {"organ": "ball", **known}
        return [{**always, **fact, "scan_id": at, "dice": nan if one is None else one} for at, one, fact in both]

    monkeypatch.setattr(decoder, "train_decoder", lambda *_: None)
    monkeypatch.setattr(decoder, "score_decoder", lambda *_: [rows(own) for own in scores])
    asked = judges.Judges(store, config(store), ("decoder",), num_seeds=3)
    score = asked.judge(Encoder(**TINY), "off")["decoder"]
    means = [np.mean([one for one in own if one is not None]) for own in scores]
    assert score.value == pytest.approx(np.mean(means)) and score.details["seeds"] == pytest.approx(means)
    assert score.details["organs"]["ball"]["dice"] == pytest.approx(np.mean(means))


@pytest.mark.parametrize("absent", ["in no scan", "not annotated"])
def test_what_no_scan_to_learn_from_shows_is_said(tmp_path, absent):
    """An organ that is absent leaves the rest background; one that is not annotated could be anywhere in it."""
    labels = {**LABELS, "tip": 7}
    for number, split in ((0, "train"), (1, "train"), (2, "test")):
        volume, label = paint(number)
        label[:2, :4, :4] = 7 if split == "test" else 0
        labelled = (2, 5) if split == "train" and absent == "not annotated" else (2, 5, 7)
        write_scan(
            tmp_path, f"{split}{number}", volume, np.diag([*SPACING, 1]), label=label, labelled=labelled, split=split
        )
    write_index(tmp_path, labels, (-1024.0, 325.0))
    index = read_index(tmp_path)
    notes = [note for note in judges.Judges(index, config(index)).notes if note.startswith("no scan")]
    said = ["no scan to learn from shows tip: it counts", "no scan to learn from has every organ annotated"]
    said = said if absent == "not annotated" else said[:1]
    assert [note[: len(part)] for note, part in zip(notes, said, strict=True)] == said


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_shortcomings_of_the_scans_are_said(tmp_path):
    for number, split in ((0, "train"), (1, "train"), (0, "test")):
        volume, label = paint(number)
        label[label == 5] *= split == "test"
        more = {"label": label, "labelled": (2, 5), "split": split}
        write_scan(tmp_path, f"{split}{number}", volume, np.diag([*SPACING, 1]), **more)
    write_index(tmp_path, LABELS, (-1024.0, 325.0))
    index = read_index(tmp_path)
    notes = judges.Judges(index, config(index)).notes
    assert any(note.startswith("no scan to learn from shows ball: it counts as never recognised") for note in notes)
    assert any("the same voxels are learnt from and tested on: test0 and train0" in note for note in notes)
    assert any(note.startswith("num_test_scans=3") for note in notes)
    torch.manual_seed(0)
    scores = judges.Judges(index, config(index), ("voxels", "decoder")).judge(Encoder(**TINY), "off")
    assert scores["voxels"].details["recall"]["ball"] == scores["decoder"].details["organs"]["ball"]["dice"] == 0
    with pytest.raises(ValueError, match="two test scans or more"):
        judges.Judges(index, config(index), ("matching",))
    with pytest.raises(ValueError, match="no scan to estimate BatchNorm's statistics on"):
        readings.unlabelled_views(index, [], SIZE, 0)


# -- encoders and stores that are not as usual ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "compared"),
    [
        ({"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4}, ["layer1", "layer2", "layer3", "layer4"]),
        ({"kind": "resenc", "depths": [1, 1, 1, 1, 1], "width": 4}, ["stage2", "stage3", "stage4", "stage5"]),
    ],
)
def test_match_and_its_judge_compare_the_same_maps(settings, compared):
    encoder = build_encoder(**settings)
    judged = matching.place_levels(encoder.last + 1)
    match = ScanEncoder("x", encoder, (-1024.0, 325.0), {}, SIZE)
    assert search.compared_levels(match, ()) == judged and [match.names[level] for level in judged] == compared
    assert search.compared_levels(match, compared[-1:]) == judged[-1:]
    encoder.stop_at(0)
    assert matching.place_levels(encoder.last + 1) == [0]  # the only one


@pytest.mark.slow
def test_an_encoder_without_batchnorm_has_one_reading(store, tmp_path, capsys):
    settings = {"kind": "resenc", "depths": [1, 1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    torch.manual_seed(0)
    encoder = build_encoder(**settings)
    model = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    meta = {"door": "pretrain", "encoder": settings, "hu_window": [-1024.0, 325.0]}
    torch.save({"meta": meta, "model": model}, tmp_path / "run.pt")
    judged = {"judges": ["voxels", "matching"], "encoder": None, "size": (16, 32, 32)}
    result = probe.run(config(store, init=str(tmp_path / "run.pt"), **judged))
    assert list(result.readings) == ["trained"] and list(result.controls) == ["random, no BatchNorm"]
    assert f"the encoder of init={tmp_path}/run.pt has no BatchNorm: there is one reading of it" in result.notes
    text = probe.describe(result)
    assert "run.pt, no BatchNorm" in text and "as trained" not in text and "re-estimated" not in text
    printed = capsys.readouterr().out
    assert printed.count("probe: note:") == len(result.notes)


def test_statistics_that_do_not_follow_are_estimated_alike(store):
    """Frozen layers: in eval mode, without gradients, of momentum 0; they come back as they were."""
    views = readings.unlabelled_views(store, list(store.scans[:2]), SIZE, 0)
    torch.manual_seed(0)
    live = Encoder(**TINY).train()
    frozen = Encoder(**TINY).eval().requires_grad_(False)
    frozen.load_state_dict(live.state_dict())
    for part in readings.norms(frozen):
        part.momentum = 0.0
        part.running_mean.fill_(5.0)
    expected = readings.read_as(live, "reestimated", views).state_dict()
    estimated = readings.read_as(frozen, "reestimated", views).state_dict()
    assert all(torch.equal(value, estimated[key]) for key, value in expected.items())
    assert all((part.running_mean == 5).all() and part.momentum == 0 for part in readings.norms(frozen))
    readings.reestimate(frozen, views)
    assert all(torch.equal(value, estimated[key]) for key, value in frozen.state_dict().items())
    assert not any(part.training or part.momentum for part in readings.norms(frozen))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_encoder_of_several_workers_is_judged_by_one(store, tmp_path):
    """SyncBatchNorm would wait for the others, and cannot be run on a CPU at all."""
    views = readings.unlabelled_views(store, list(store.scans[:2]), SIZE, 0)
    torch.manual_seed(0)
    plain = Encoder(**TINY)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        estimated = readings.read_as(shared, "reestimated", views)
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in estimated.modules())
        expected = readings.read_as(plain, "reestimated", views)
        assert all(torch.equal(value, estimated.state_dict()[key]) for key, value in expected.state_dict().items())
        assert any(isinstance(part, nn.SyncBatchNorm) for part in shared.modules())
    finally:
        destroy_process_group()


@pytest.mark.parametrize("judge", ["voxels", "decoder", "matching"])
def test_features_that_are_not_finite_are_no_score(store, judge):
    broken = Encoder(**TINY)
    nn.init.constant_(broken.layer2[0].conv1.weight, torch.nan)
    with pytest.raises(FailedRun, match=r"^the encoder's features are not finite$"):
        judges.Judges(store, config(store), (judge,)).judge(broken, "off")


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_an_encoder_that_was_trained_in_part_is_judged_by_all(store):
    """As PGL at a finer output stride leaves it: the stages behind are not there."""
    torch.manual_seed(0)
    encoder = Encoder(**TINY)
    encoder.stop_at(2)
    scores = judges.Judges(store, config(store, num_scans=1), ("voxels", "decoder", "matching")).judge(encoder, "off")
    assert 0 <= scores["decoder"].value <= 1 and scores["matching"].value > 0
    assert list(scores["voxels"].details["recall"]) == ["background", "brick", "ball"]


def test_scans_without_organs_are_refused_in_one_line(tmp_path):
    for number in range(4):
        volume, label = paint(number)
        split = "train" if number < 2 else "test"
        more = {"label": label * (split == "train"), "labelled": (2, 5), "split": split}
        write_scan(tmp_path, f"s{number}", volume, np.diag([*SPACING, 1]), **more)
    index = write_index(tmp_path, LABELS, (-1024.0, 325.0))
    for judge in ("decoder", "matching"):
        with pytest.raises(
            ValueError,
            match=rf"no organ occurs in any of the 2 scans to test on .*: leave {judge} out: judges=\[voxels\]$",
        ) as got:
            judges.Judges(index, config(index), (judge,))
        assert "\n" not in str(got.value)
