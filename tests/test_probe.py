"""The linear probe: planted features, chance, interpolation and windows against independent oracles."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_loop as loop
from scipy import ndimage, optimize

from pgl_ray import pretrain, probe
from pgl_ray.config import EncoderConfig, FailedRun, PretrainConfig, ProbeConfig, build
from pgl_ray.data.scan_files import open_label, write_scan
from pgl_ray.data.store import write_index
from pgl_ray.judge import judges
from pgl_ray.judge import voxels as voxel_judge
from pgl_ray.model.resnet import Encoder
from pgl_ray.train import checkpoint, weights

LABELS = {"kidney": 2, "liver": 5, "spleen": 9}  # gaps on purpose: classes are not label values
SHAPE, SIZE = (13, 50, 37), (8, 24, 16)
HU_WINDOW = (-1000.0, 400.0)
TINY = {"depths": (1, 1, 1, 1), "width": 4}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OneMap(torch.nn.Module):
    """An encoder of five maps; each is the input at every stride-th voxel, after `transform`."""

    def __init__(self, transform, channels, strides):
        super().__init__()
        self.transform, self.channels, self.strides = transform, (channels,) * 5, strides
        self.last, self.centers = (
            4,
            ((0.5, 0.5, 0.5),) * 5,
        )  # cell j holds voxel stride * j, whose middle lies at stride * j + 0.5
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return [self.transform(x[:, :, ::d, ::h, ::w]) for d, h, w in self.strides]


def bins(x):
    """One-hot of the z-scored HU, fine enough to tell the planted attenuations."""
    return (-((x - torch.linspace(-4, 4, 33).view(1, -1, 1, 1, 1)) ** 2) * 8).exp()


def config(store, **changes):
    values = {"size": SIZE, "num_scans": 3, "num_test_scans": 2, "voxels_per_class": 40, "test_split": "val"}
    return ProbeConfig(index=str(store), **(values | changes))


def score(encoder, index, settings):
    """The voxel probe of an encoder as it is."""
    probed = voxel_judge.VoxelProbe(index, settings)
    probed.check(settings)
    return probed.score(probed.features(encoder.eval()))


def write_store(folder, hu_of, labelled=(2, 5, 9), num_scans=5, shape=SHAPE):
    """Scans of random label maps; hu_of(label, rng) gives the voxels."""
    for number in range(num_scans):
        rng = np.random.default_rng(number)
        blobs = ndimage.zoom(rng.integers(0, 4, (3, 6, 5)), np.array(shape) / (3, 6, 5), order=0)
        label = np.array([0, *LABELS.values()], np.uint8)[blobs]
        volume = hu_of(label, rng).astype(np.int16)
        split = "train" if number < 3 else "val"
        write_scan(
            folder, f"s{number}", volume, np.eye(4), label=label, labelled=labelled, split=split, hu_window=HU_WINDOW
        )
    return write_index(folder, LABELS, HU_WINDOW)


def read_label(store, scan):
    return open_label(store, scan).read(np.array([(0, n) for n in scan.shape]))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Every class has its own HU: the label can be read off the voxel."""
    return write_store(tmp_path_factory.mktemp("planted"), lambda label, rng: 40 * label.astype(int) - 200)


@pytest.mark.slow
def test_planted_features_are_read_perfectly(planted):
    encoder = OneMap(bins, 33, ((1, 1, 1),) * 5)
    result = score(encoder, planted, config(planted.store))
    assert result.balanced_accuracy == 1
    assert result.recall == dict.fromkeys(("background", *LABELS), 1)
    assert result.hits.shape == result.counts.shape == (2, 4) and (result.hits == result.counts).all()


@pytest.mark.slow
def test_scale_and_offset_of_the_features_do_not_matter(planted):
    """Faint, far from zero, and one feature constant."""

    def disguised(x):
        return torch.cat([1e-3 * bins(x) + 0.5, torch.full_like(x, 1e5)], 1)

    result = score(OneMap(disguised, 34, ((1, 1, 1),) * 5), planted, config(planted.store))
    assert result.balanced_accuracy == 1


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Attenuations that overlap; the scans to test on are brighter."""
    folder = tmp_path_factory.mktemp("noisy")
    write_store(folder, lambda label, rng: 40 * label.astype(int) - 200 + rng.normal(0, 100, label.shape))
    for number in (3, 4):
        rng = np.random.default_rng(number)
        label = rng.choice(np.array([0, 5, 9, 9, 9], np.uint8), SHAPE)
        volume = (40 * label.astype(int) - 100 + rng.normal(0, 100, SHAPE)).astype(np.int16)
        fields = {"labelled": (2, 5, 9), "split": "val", "hu_window": HU_WINDOW}
        write_scan(folder, f"s{number}", volume, np.eye(4), label=label, **fields)
    return write_index(folder, LABELS, HU_WINDOW)


def test_recall_is_of_standardised_features_and_tested_classes(noisy):
    """In numpy but for sampling and fit: training statistics for both sets, absent classes are no part of the mean."""
    encoder = OneMap(lambda x: 1e-3 * x + 0.5, 1, ((1, 1, 1),) * 5)
    settings = config(noisy.store)
    result = score(encoder, noisy, settings)
    sets = voxel_judge.choose_scans(noisy, settings)
    samples = [
        [voxel_judge.scan_features(encoder, voxel_judge.read_sample(noisy, s, settings)) for s in part] for part in sets
    ]
    (x, y), (x_test, y_test) = ([np.concatenate(parts) for parts in zip(*part)] for part in samples)
    weight, bias = voxel_judge.fit_linear(torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(y), 4)
    predicted = ((x_test - x.mean(0)) / x.std(0) @ weight.numpy() + bias.numpy()).argmax(1)
    assert set(result.recall) == {"background", "liver", "spleen"}  # no kidney to test on
    for k, name in ((0, "background"), (2, "liver"), (3, "spleen")):
        assert result.recall[name] == pytest.approx((predicted == k)[y_test == k].mean(), abs=0.01)
    assert result.balanced_accuracy == pytest.approx(np.mean(list(result.recall.values())))
    assert 0.3 < result.balanced_accuracy < 0.9


@pytest.mark.slow
def test_labels_without_relation_to_the_voxels_give_chance(tmp_path):
    index = write_store(tmp_path, lambda label, rng: rng.integers(-400, 300, label.shape))
    encoder = OneMap(bins, 33, ((1, 1, 1),) * 5)
    result = score(encoder, index, config(tmp_path, voxels_per_class=400))
    assert result.balanced_accuracy == pytest.approx(1 / 4, abs=0.05)


@pytest.mark.slow
def test_an_organ_absent_from_training_scans_counts_as_missed(tmp_path):
    def paint(label, rng):
        return 40 * label.astype(int) - 200

    index = write_store(tmp_path, paint)
    for scan in index.scans[:3]:  # the training scans again: the same voxels, the spleen called background
        label = read_label(tmp_path, scan)
        volume, label = paint(label, None).astype(np.int16), np.where(label == 9, 0, label).astype(np.uint8)
        fields = {"labelled": scan.labelled, "split": scan.split, "hu_window": HU_WINDOW}
        write_scan(tmp_path, scan.scan_id, volume, np.eye(4), label=label, **fields)
    index = write_index(tmp_path, LABELS, HU_WINDOW)
    result = score(OneMap(bins, 33, ((1, 1, 1),) * 5), index, config(tmp_path))
    assert result.recall["spleen"] == 0
    assert result.balanced_accuracy == pytest.approx(np.mean(list(result.recall.values())))
    assert result.recall["liver"] == 1


@pytest.mark.parametrize("shape", [SHAPE, (5, 24, 60)])
def test_features_are_the_maps_at_the_voxels_true_position(tmp_path, shape):
    """Ramps of three different slopes through strided maps: scipy's interpolation in each voxel's own window."""
    grid = np.indices(shape)
    ramp = 17 * grid[0] - 5 * grid[1] + 9 * grid[2] - 100
    index = write_store(tmp_path, lambda label, rng: ramp, num_scans=1, shape=shape)
    scan, settings = index.scans[0], config(tmp_path)
    strides = ((1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16))
    features, classes = voxel_judge.scan_features(
        OneMap(lambda x: x, 1, strides), voxel_judge.read_sample(index, scan, settings)
    )
    voxels, drawn = voxel_judge.draw_voxels(index, scan, ramp, read_label(tmp_path, scan), settings)
    assert features.shape == (len(voxels), 5) and classes.tolist() == drawn.tolist()

    padded = np.pad(ramp, [(0, max(0, s - n)) for s, n in zip(SIZE, shape)], constant_values=-1000).clip(*HU_WINDOW)
    scored = (padded - scan.mean_hu) / scan.std_hu
    starts, window_of = voxel_judge.assign_windows(voxels, scored.shape, SIZE)
    for feature, voxel, window in zip(features.numpy(), voxels, window_of):
        start = starts[window]
        crop = scored[tuple(slice(a, a + n) for a, n in zip(start, SIZE))]
        for value, stride in zip(feature, strides):
            cells = crop[tuple(slice(None, None, s) for s in stride)]
            index_in_map = (voxel - start) / np.array(stride)
            expected = ndimage.map_coordinates(cells, index_in_map[:, None], order=1, mode="nearest")[0]
            assert value == pytest.approx(expected, abs=1e-4)
        inner = (voxel - start <= np.array(SIZE) - np.array(strides[2])).all()  # not clamped: a ramp stays a ramp
        if inner and shape == SHAPE:
            assert feature[:3] == pytest.approx(np.full(3, scored[tuple(voxel)]), abs=1e-4)


def test_read_map_agrees_with_grid_sample():
    generator = torch.Generator().manual_seed(0)
    sizes, stride, center = (3, 5, 7), (8, 4, 2), (0.5, 1.5, 0.0)
    feature_map = torch.randn(6, *sizes, generator=generator, dtype=torch.float64)
    point = torch.rand(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([30, 26, 18]) - 2
    cell = (point - torch.tensor(center)) / torch.tensor(stride)  # index; edge coordinate of a cell's middle + 0.5
    grid = (2 * (cell + 0.5) / torch.tensor(sizes) - 1).flip(-1).view(1, -1, 1, 1, 3)
    expected = F.grid_sample(feature_map[None], grid, align_corners=False, padding_mode="border")[0, :, :, 0, 0].T
    torch.testing.assert_close(voxel_judge.read_map(feature_map, point, stride, center), expected)
    few = voxel_judge.read_map(feature_map, point[:9], stride, center)  # what they read is taken out first
    torch.testing.assert_close(few, expected[:9])
    one_cell = voxel_judge.read_map(feature_map[:, :1, :1, :1], point, stride, center)
    torch.testing.assert_close(one_cell, feature_map[:, 0, 0, 0].expand(200, 6))


def test_windows_contain_their_voxels_and_lie_nearest():
    rng = np.random.default_rng(0)
    shape, size = (20, 33, 16), (8, 15, 16)
    voxels = rng.integers(0, shape, (500, 3))
    starts, window_of = voxel_judge.assign_windows(voxels, shape, size)
    assert (starts >= 0).all() and (starts + size <= shape).all()
    assert sorted(set(starts[:, 0])) == [0, 4, 8, 12] and sorted(set(starts[:, 1])) == [0, 7, 14, 18]
    for voxel, window in zip(voxels, window_of):
        start = starts[window]
        assert (start <= voxel).all() and (voxel < start + size).all()
        distances = np.abs(voxel + 0.5 - starts - np.array(size) / 2)
        assert np.abs(voxel + 0.5 - start - np.array(size) / 2) == pytest.approx(distances.min(0))


def test_voxels_drawn_are_balanced_and_background_is_certain(planted, tmp_path):
    scan, settings = planted.scans[0], config(planted.store)
    label = read_label(planted.store, scan)
    volume = np.where(np.indices(SHAPE)[1] < 25, 0, -800)  # half of the scan is air
    voxels, classes = voxel_judge.draw_voxels(planted, scan, volume, label, settings)
    assert np.bincount(classes).tolist() == [40] * 4
    assert len(np.unique(voxels, axis=0)) == len(voxels)
    np.testing.assert_array_equal(np.array([0, 2, 5, 9])[classes], label[tuple(voxels.T)])
    assert (voxels[classes == 0, 1] < 25).all()
    again, _ = voxel_judge.draw_voxels(planted, scan, volume, label, settings)
    np.testing.assert_array_equal(voxels, again)
    other, _ = voxel_judge.draw_voxels(planted, scan, volume, label, config(planted.store, seed=1))
    assert (voxels != other).any()

    partly = write_store(tmp_path, lambda label, rng: 40 * label.astype(int) - 200, labelled=(2, 9))
    _, classes = voxel_judge.draw_voxels(partly, partly.scans[0], volume, label, settings)
    assert set(classes) == {1, 3}


def test_classifier_minimises_its_objective():
    """Against scipy's BFGS on the objective written out in numpy; classes of very different size."""
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 2, 3], [80, 9, 25])
    features = rng.normal(size=(len(classes), 4)) + 0.8 * classes[:, None] * np.array([1, -1, 0.5, 0])

    def objective(flat):
        weight, bias = flat[:12].reshape(4, 3), flat[12:]
        logits = features @ weight + bias
        entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(classes)), np.searchsorted([0, 2, 3], classes)]
        means = [entropy[classes == k].mean() for k in (0, 2, 3)]
        return np.mean(means) + voxel_judge.L2 * 4 / 2 * (weight**2).sum()

    expected = optimize.minimize(objective, np.zeros(15)).fun
    weight, bias = voxel_judge.fit_linear(torch.from_numpy(features), torch.from_numpy(classes), 5)
    reached = objective(np.concatenate([weight[:, [0, 2, 3]].numpy().ravel(), bias[[0, 2, 3]].numpy()]))
    assert reached == pytest.approx(expected, abs=1e-4)
    predicted = (torch.from_numpy(features) @ weight + bias).argmax(1)
    assert set(predicted.tolist()) <= {0, 2, 3}


@pytest.mark.slow
def test_a_live_encoder_comes_back_as_it_was(planted):
    encoder = Encoder(**TINY).train()
    encoder.layer1.eval()  # a part of it may be frozen
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    judge = judges.Judges(planted, config(planted.store))
    first = judge.judge(encoder, "reestimated")["voxels"]
    assert [part.training for part in (encoder, encoder.layer1, encoder.layer2)] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    with torch.no_grad():  # as inside a training loop's validation
        assert judge.judge(encoder, "reestimated")["voxels"].details == first.details


@pytest.mark.slow
def test_scans_are_read_once_for_many_encoders(planted, monkeypatch):
    settings = config(planted.store)
    reads, read = [], voxel_judge.open_volume
    monkeypatch.setattr(voxel_judge, "open_volume", lambda *args: reads.append(args) or read(*args))
    judge = judges.Judges(planted, settings)
    for seed in range(3):
        torch.manual_seed(seed)
        encoder = Encoder(**TINY)
        assert judge.judge(encoder, "trained")["voxels"].details["recall"] == score(encoder, planted, settings).recall
    assert len(reads) == (1 + 3) * 5  # the judges' own, and one each of those that they are compared with


def test_scans_are_never_in_both_sets(planted):
    both = config(planted.store, test_split="train", num_scans=2)
    train, test = voxel_judge.choose_scans(planted, both)
    assert len(train) == 2 and len(test) == 1 and test[0] not in train
    other, _ = voxel_judge.choose_scans(planted, config(planted.store, num_scans=2, seed=5))
    assert [s.scan_id for s in other] != [s.scan_id for s in train]
    assert [s.scan_id for s in voxel_judge.choose_scans(planted, config(planted.store))[1]] == ["s3", "s4"]


@pytest.mark.slow
def test_run_writes_its_result(planted, tmp_path):
    encoder = EncoderConfig(**TINY)
    output = tmp_path / "new" / "probe.json"
    result = probe.run(config(planted.store, encoder=encoder, output=str(output)))
    facts = json.loads(output.read_text())
    assert facts == json.loads(json.dumps(dataclasses.asdict(result)))
    assert facts["init"] == "random" and list(facts["readings"]) == ["reestimated", "off"]
    assert facts["balanced_accuracy"] == facts["readings"]["reestimated"]["voxels"]["value"]
    assert list(facts["controls"]) == ["random, BatchNorm re-estimated", "random, BatchNorm off"]
    assert probe.run(config(planted.store, encoder=encoder)).recall == result.recall  # the seed decides
    assert "balanced accuracy" in probe.describe(result)


@pytest.mark.slow
def test_run_reads_a_checkpoint(planted, tmp_path):
    encoder = Encoder(**TINY)
    settings = {"depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    weights = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    meta = {"door": "pretrain", "encoder": settings, "hu_window": list(HU_WINDOW)}
    torch.save({"meta": meta, "model": weights}, tmp_path / "state.pt")
    result = probe.run(config(planted.store, init=str(tmp_path)))
    assert json.loads((tmp_path / "probe.json").read_text())["init"] == str(tmp_path)
    assert list(result.readings) == ["reestimated", "trained", "off"]
    trained = result.readings["trained"]["voxels"]["details"]["recall"]
    assert trained == score(encoder, planted, config(planted.store)).recall
    for name in ("one.pt", "two.pt"):
        torch.save({"meta": meta, "model": weights}, tmp_path / name)
        assert probe.run(config(planted.store, init=str(tmp_path / name))).recall == result.recall
    one = checkpoint.folder_of(tmp_path, 2)  # which a later one removes with all that lies in it
    checkpoint.write_checkpoint(tmp_path, 2, {"meta": meta, "model": weights}, {})
    assert probe.run(config(planted.store, init=f"{one}/")).recall == result.recall and len(list(one.iterdir())) == 2
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {f"{name}probe.json" for name in ("", "one.pt.", "two.pt.", f"{one.name}.")}
    torch.save({"meta": meta | {"hu_window": [-500.0, 500.0]}, "model": weights}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"trained with hu_window=\[-500.0, 500.0\]"):
        probe.run(config(planted.store, init=str(tmp_path)))


def test_what_cannot_be_probed_is_said(planted, tmp_path):
    with pytest.raises(ValueError, match=r"split='nowhere'.*it has labels in.*'train', 'val'"):
        probe.run(config(planted.store, split="nowhere", encoder=EncoderConfig(**TINY)))
    write_scan(tmp_path, "a", np.zeros(SHAPE, np.int16), np.eye(4), split="train", hu_window=HU_WINDOW)
    write_index(tmp_path, {}, HU_WINDOW)
    with pytest.raises(ValueError, match="holds no labels"):
        probe.run(config(tmp_path, encoder=EncoderConfig(**TINY)))
    only_organ = write_store(tmp_path / "one", lambda label, rng: label * 0, labelled=(5,))
    with pytest.raises(ValueError, match=r"1 classes to train on.*: annotate more organs; judges=\[decoder\] and"):
        score(Encoder(**TINY), only_organ, config(tmp_path))
    with pytest.raises(ValueError, match="raise num_scans=1;"):
        score(Encoder(**TINY), only_organ, config(tmp_path, num_scans=1))
    broken = Encoder(**TINY)
    torch.nn.init.constant_(broken.conv1.weight, torch.nan)
    with pytest.raises(FailedRun, match="not finite"):
        score(broken, planted, config(planted.store))


# -- while pre-training -----------------------------------------------------------------------------------------------


def curve(where, run, **changes):
    """A pre-training that is probed at each step."""
    settings = {"every": 1, "num_scans": 3, "num_test_scans": 3, "test_split": "train", "voxels_per_class": 60}
    return loop.pretraining(where, run, probe=settings, max_steps=2, train={"checkpoint_every": 1}, **changes)


@pytest.mark.parametrize("key", ["index", "probe.index"])
def test_a_curve_without_labels_says_which_store_to_give(planted, tmp_path, key):
    for name in ("pool", "other"):
        write_scan(tmp_path / name, "a", np.zeros(SHAPE, np.int16), np.eye(4), split="train", hu_window=HU_WINDOW)
        write_index(tmp_path / name, {}, HU_WINDOW)
    pool, other = str(tmp_path / "pool"), str(tmp_path / "other")
    given = {"every": 7, "test_split": "val"} | ({"index": other} if key == "probe.index" else {})
    settings = build(PretrainConfig, {"index": pool, "run": str(tmp_path / "run"), "probe": given})
    with pytest.raises(ValueError) as caught:
        pretrain.make_probe(settings)
    value = other if key == "probe.index" else pool
    assert str(caught.value).startswith(f"{key}={value} holds no labels, and probe.every=7 needs some")
    mended = build(PretrainConfig, {**settings.model_dump(), "probe": {**given, "index": str(planted.store)}})
    assert pretrain.make_probe(mended).probe.scans[1]  # what it says to do


def test_a_curve_of_another_window_says_how_to_prepare(planted, tmp_path):
    write_scan(tmp_path / "pool", "a", np.zeros(SHAPE, np.int16), np.eye(4), split="train", hu_window=(-900.0, 300.0))
    write_index(tmp_path / "pool", {}, (-900.0, 300.0))
    given = {"every": 7, "index": str(planted.store)}
    settings = build(PretrainConfig, {"index": str(tmp_path / "pool"), "run": str(tmp_path / "run"), "probe": given})
    with pytest.raises(ValueError, match=r"has \[-900.0, 300.0\]: prepare .* with 'hu_window=\[-900.0,300.0\]'$"):
        pretrain.make_probe(settings)


def recorded(run):
    """Step -> what the metrics say of the probe."""
    rows = {int(row["step"]): row for row in loop.rows_of(run)}
    return {step: {key: row[key] for key in row if key.startswith("probe/")} for step, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_curve_is_what_the_checkpoints_weights_are_worth(tmp_path, world):
    """Whatever the workers' own BatchNorm has seen: a judge that starts from the checkpoint says the same."""
    scans = loop.scans(tmp_path / "store")
    settings = curve(scans, tmp_path / "run", global_batch_size=4 * world)
    loop.train(settings, world=world)
    judge = pretrain.make_probe(settings)
    for place, step in checkpoint.checkpoints(tmp_path / "run"):
        encoder, _ = weights.load_encoder(str(place))
        score = judge.judge(encoder, "reestimated")["voxels"]
        expected = {"probe/balanced_accuracy": score.value}
        expected |= {f"probe/recall_{name}": value for name, value in score.details["recall"].items()}
        assert recorded(tmp_path / "run")[step] == expected
    assert step == 2


@pytest.mark.slow
def test_the_curve_does_not_depend_on_the_number_of_workers(tmp_path):
    """At a rate that moves no weight: statistics differ between one worker and two, the figures do not."""
    scans, states = loop.scans(tmp_path / "store"), {}
    for world in (1, 2):
        settings = curve(scans, tmp_path / str(world), optim={"lr": 1e-30}, global_batch_size=4)
        loop.train(settings, world=world)
        states[world] = loop.state_of(tmp_path / str(world))["model"]
    assert recorded(tmp_path / "1") == recorded(tmp_path / "2") and set(recorded(tmp_path / "1")) == {1, 2}
    online = {key: value for key, value in states[1].items() if key.startswith("online.encoder.")}
    for key, value in online.items():
        assert "running_" in key or torch.allclose(value.float(), states[2][key].float(), rtol=0, atol=1e-20), key
    assert not torch.equal(online["online.encoder.bn1.running_var"], states[2]["online.encoder.bn1.running_var"])
