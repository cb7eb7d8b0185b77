"""Pictures of features: colours against numpy's SVD, and drawn places, slices and errors against planted ones."""

import io
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from pgl_ray import probe
from pgl_ray.judge import components, dense, readings
from pgl_ray.pages import feature_pictures as fp
from pgl_ray.pages import figures

SPACING = (3.0, 1.0, 2.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- colours ----------------------------------------------------------------------------------------------------------


def svd_colors(fitted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By numpy's SVD, from the definition."""
    mean = fitted.mean(0)
    _, _, axes = np.linalg.svd(fitted - mean, full_matrices=False)
    axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes[:3]])
    low, high = np.percentile((fitted - mean) @ axes.T, (2, 98), axis=0)
    return np.clip(((values - mean) @ axes.T - low) / (high - low), 0, 1)


@pytest.mark.parametrize(("num", "channels"), [(300, 7), (40, 90)])
def test_colours_are_those_of_numpys_svd(num, channels):
    rng = np.random.default_rng(num)
    mixed = rng.normal(size=(channels, channels)) * np.linspace(3, 0.1, channels)[:, None]
    fitted, values = (wide * rng.normal(size=(n, channels)) @ mixed + 5 for n, wide in ((num, 1), (50, 4)))
    colors = components.Components.of(torch.from_numpy(fitted).float()).colors(torch.from_numpy(values).float())
    np.testing.assert_allclose(colors, svd_colors(fitted.astype(np.float32).astype(float), values), atol=1e-4)
    assert colors.min() == 0 and colors.max() == 1  # beyond the fitted range: clipped


def test_directions_that_do_not_exist_say_nothing():
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([1.0, -2.0, 0.5, 0.0])
    colors = components.Components.of(line).colors(line)
    assert np.ptp(colors[:, 0]) == 1 and (colors[:, 1:] == 0.5).all()
    assert (components.Components.of(torch.ones(9, 4)).colors(torch.randn(5, 4)) == 0.5).all()


class Waves(nn.Module):
    """A map whose features tell a voxel's HU, at stride 1."""

    strides, channels, last = ((1, 1, 1), (1, 1, 1)), (1, 3), 1
    centers = ((0.5, 0.5, 0.5),) * 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return [x, torch.cat([(x / 3).sin(), (x / 3).cos(), (x / 7).sin()], 1)]


def scan(number: int, shape=(16, 40, 48), organs=(1, 2)) -> SimpleNamespace:
    """What the pictures need of a labelled scan: smooth noise around 0 HU in air, with blocks as organs."""
    rng = np.random.default_rng(number)
    volume, target = np.full(shape, -1000), np.zeros(shape, np.uint8)
    volume[1:-1, 4:-4, 5:-5] = ndimage.gaussian_filter(rng.normal(0, 120, shape), 1)[1:-1, 4:-4, 5:-5]
    boxes = (np.s_[4:10, 8:20, 10:22], np.s_[6:13, 22:30, 26:36], np.s_[2:4, 30:34, 8:12])
    for k in organs:
        target[boxes[k - 1]] = k
    record = SimpleNamespace(scan_id=f"s{number}", spacing_mm=SPACING, shape=shape)
    scaling = ((-1024.0, 325.0), 0.0, 10.0)
    return SimpleNamespace(
        record=record, volume=volume.astype(np.int16), target=target, labelled=np.ones(4, bool), scaling=scaling
    )


def waves(scan: SimpleNamespace, voxels: np.ndarray) -> np.ndarray:
    """The features of `Waves` by hand, of length 1, after float16."""
    x = np.clip(scan.volume[tuple(voxels.T)], -1024, 325) / 10
    features = np.stack([np.sin(x / 3), np.cos(x / 3), np.sin(x / 7)], 1).astype(np.float16).astype(float)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("most", [10_000, 500])
def test_a_slice_has_the_colours_of_its_voxels_features(monkeypatch, most):
    """Fitted over all scans; a slice of many voxels is read at every second, third, ... one."""
    monkeypatch.setattr(components, "MOST_POINTS", most)
    monkeypatch.setattr(dense, "window_size", lambda size, strides: (64, 64, 64))
    scans, slices = [scan(0), scan(1), scan(2)], [5, 9]
    pictures = components.axial_colors(Waves(), scans, slices, (16, 40, 48))
    body = []
    for one in scans:
        voxels = readings.body_points(one.volume, SPACING, 8.0)
        take = np.linspace(0, len(voxels) - 1, min(components.NUM_POINTS, len(voxels))).round().astype(int)
        body.append(waves(one, voxels[take]))
    step = components.slice_step(scans[0].volume.shape)
    assert step == (1 if most == 10_000 else 2) and len(pictures) == 2
    for one, at, colors in zip(scans, slices, pictures):
        rows, columns = (np.arange(step // 2, n, step) for n in (40, 48))
        voxels = np.array([(at, row, column) for row in rows for column in columns])
        expected = svd_colors(np.concatenate(body), waves(one, voxels)).reshape(len(rows), len(columns), 3)
        np.testing.assert_allclose(colors, expected, atol=2e-3)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def pixels(figure) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(figures.to_bytes(figure, "png", dpi=80)))


def test_places_are_drawn_where_they_lie_with_their_errors():
    """Lines end at the true and the found place in both planes; the text says their distance in three dimensions."""
    first, second = scan(0), scan(1)
    true = {"brick": np.array([20.0, 14.0, 30.0]), "ball": np.array([30.0, 25.0, 60.0])}
    near = {"brick": true["brick"] + [3, 4, 0], "ball": true["ball"] + [0, 0, 12]}
    far = {organ: place + np.array([-9, 8, -12]) for organ, place in true.items()}
    places = [fp.Places(one.record.scan_id, one.volume, np.array(SPACING), true) for one in (first, second)]
    searches = [fp.Search("net", near), fp.Search("random", far)]
    figure = fp.matches(*places, searches, {"brick": 1, "ball": 2})
    assert len(figure.axes) == 2 * 5
    for row, matched in enumerate((near, far)):
        for k, (row_axis, column_axis) in ((1, (0, 2)), (3, (1, 2))):  # coronal, axial
            ax = figure.axes[5 * row + k]
            assert ax.get_title() == f"found in s1,\n{('coronal', 'axial')[k // 2]}"
            lines = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 2]
            for organ, line in zip(true, lines, strict=True):
                ends = [
                    (p[column_axis] / SPACING[column_axis], p[row_axis] / SPACING[row_axis])
                    for p in (true[organ], matched[organ])
                ]
                np.testing.assert_allclose(line, ends)
    texts = [[text.get_text() for text in figure.axes[k].texts] for k in (4, 9)]
    assert "5 mm" in texts[0] and "12 mm" in texts[0] and texts[1].count("17 mm") == 2
    assert pixels(figure)[..., :3].std() > 0.1


def test_adjacent_slices_have_one_scale():
    """Bodies of different size, in pixels per mm of the drawn axes."""
    bodies = [(16, 40, 48), (10, 60, 44)]
    places = [
        fp.Places(f"s{k}", scan(k, shape, ()).volume, np.array(SPACING), {"brick": np.array([12.0, 30.0, 50.0])})
        for k, shape in enumerate(bodies)
    ]
    figure = fp.matches(*places, [fp.Search("net", places[1].at_mm)] * 2, {"brick": 1})
    pixels(figure)
    scales = []
    for k, ax in enumerate(figure.axes):
        if ax.images:
            row_axis, box = 0 if k % 5 < 2 else 1, ax.get_window_extent()  # coronal, axial
            scales.append(box.width / (np.ptp(ax.get_xlim()) * SPACING[2]))
            scales.append(box.height / (np.ptp(ax.get_ylim()) * SPACING[row_axis]))
    assert len(scales) == 16
    np.testing.assert_allclose(scales, scales[0], rtol=0.02)


def test_axial_slices_face_the_front_coronal_ones_have_head_up():
    place = fp.Places("s", scan(0).volume, np.array(SPACING), {"brick": np.array([20.0, 14.0, 30.0])})
    figure = fp.matches(place, place, [fp.Search("net", place.at_mm)], {"brick": 1})
    assert np.subtract(*figure.axes[0].get_ylim()) < 0 < np.subtract(*figure.axes[2].get_ylim())


@pytest.mark.slow
def test_colours_are_painted_only_over_the_body():
    rng = np.random.default_rng(0)
    image, organs, body = np.zeros((11, 9)), np.zeros((11, 9), int), np.zeros((11, 9), bool)
    body[2:9, 1:8], organs[4:6, 3:5] = True, 2
    colors = [rng.uniform(0.2, 1, (6, 5, 3)) for _ in range(2)]  # at every second voxel, the last one included
    row = fp.Colored("s, D = 3", image, organs, body, np.array(SPACING), colors, 2)
    figure = fp.features([row, row], ["random: 9 mm", "net: 4 mm"])
    assert [ax.get_title() for ax in figure.axes] == ["s, D = 3", "random\n9 mm", "net\n4 mm", "s, D = 3", "", ""]
    for k, painted in ((1, colors[0]), (2, colors[1]), (5, colors[1])):
        drawn = figure.axes[k].images[-1].get_array()
        for i, j in np.ndindex(image.shape):
            np.testing.assert_allclose(drawn[i, j], painted[i // 2, j // 2] if body[i, j] else 0)
    assert pixels(figure)[..., :3].std() > 0.1


@pytest.mark.slow
def test_both_pictures_of_labelled_scans(monkeypatch):
    """The first two scans that share the most organs; features that tell the HU alone find no place."""
    monkeypatch.setattr(dense, "window_size", lambda size, strides: (64, 64, 64))
    scans = [scan(0, organs=(1,)), scan(1), scan(2, organs=(1, 2)), scan(3)]
    assert [one.record.scan_id for one in fp.in_order(scans)] == ["s1", "s2", "s0", "s3"]
    names = ["background", "brick", "ball", "crumb"]
    figures = fp.draw(scans, names, (16, 40, 48), {"net, a: 3 mm": Waves(), "random, b: 9 mm": Waves()})
    assert list(figures) == ["matching.png", "features.png"]
    titles = [ax.get_title() for ax in figures["matching.png"].axes]
    assert titles.count("asked in s1,\ncoronal") == titles.count("found in s2,\naxial") == 2
    heads = [ax.get_title() for ax in figures["features.png"].axes]
    assert heads[:4] == ["s1, D = 6 of 16", "random\nb\n9 mm", "net\na\n3 mm", "s2, D = 6 of 16"]
    for figure in figures.values():
        assert pixels(figure)[..., :3].std() > 0.1


def test_the_body_excludes_the_table():
    one = scan(0, shape=(16, 60, 48))
    one.volume[:, 40:, :] = -1000
    one.volume[:, 50:52, 4:44] = 100  # 2 mm thin
    body = fp.in_body(one.volume, np.array(SPACING))
    assert not body[:, 45:].any() and body[8, 10:30, 12:36].all()
    assert fp.in_body(np.full((4, 5, 6), -1000), np.array(SPACING)).all()


@pytest.mark.parametrize(
    ("name", "picture"),
    [("probe.json", "matching.png"), ("net.pt.probe.json", "net.pt.matching.png"), ("pgl.json", "pgl.matching.png")],
)
def test_results_in_one_folder_have_pictures_of_their_own(name, picture):
    assert probe.picture_name(name, "matching.png") == picture
