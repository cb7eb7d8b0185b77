"""Phantoms: determinism, anatomy, attenuation, and that brightness alone does not give the labels."""

import json
from itertools import pairwise

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from pgl_ray.phantom.canvas import COAT_MM, WARP_MM, Canvas, Pose
from pgl_ray.phantom.phantom import ORGANS, make_phantom, write_phantoms

pytestmark = pytest.mark.slow  # twelve phantoms of full size

SEEDS = range(12)
SMALL = {"shape": (12, 40, 36), "spacing_mm": (18.0, 8.0, 9.0)}


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(seed) for seed in SEEDS]


def test_same_seed_same_phantom_and_other_seeds_differ(phantoms):
    again = make_phantom(3)
    assert again.volume.dtype == np.int16 and again.label.dtype == np.uint8
    assert again.volume.shape == again.label.shape == (48, 112, 112)
    np.testing.assert_array_equal(again.volume, phantoms[3].volume)
    np.testing.assert_array_equal(again.label, phantoms[3].label)
    for one, two in pairwise(phantoms):
        labelled = (one.label > 0) | (two.label > 0)
        assert (one.label != two.label)[labelled].mean() > 0.2
    with pytest.raises(ValueError, match="seed=-1"):
        make_phantom(-1)


def test_every_organ_is_there_connected_and_of_a_plausible_size(phantoms):
    millilitres = {  # widest bounds a radiologist would still believe, partly cut organs included
        "liver": (500, 2200),
        "spleen": (30, 500),
        "right_kidney": (60, 400),
        "left_kidney": (60, 400),
        "stomach": (80, 900),
        "gallbladder": (3, 120),
        "pancreas": (20, 200),
        "aorta": (25, 200),
        "inferior_vena_cava": (25, 200),
    }
    assert list(millilitres) == list(ORGANS)
    for name, value in ORGANS.items():
        masks = [p.label == value for p in phantoms if (p.label == value).any()]
        assert len(masks) >= len(phantoms) - (4 if name == "gallbladder" else 0), name
        for mask in masks:
            parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            assert np.bincount(parts.ravel())[1:].max() > 0.85 * mask.sum(), name
            low, high = millilitres[name]
            assert low < mask.sum() * 5 * 3 * 3 / 1000 < high, name


def test_organs_lie_where_they_belong(phantoms):
    """The liver is right (small w), the spleen left, the aorta left of the cava and both before the spine."""
    for phantom in phantoms:
        centers = {name: np.argwhere(phantom.label == v).mean(0) for name, v in ORGANS.items() if name != "gallbladder"}
        d, h, w = ({name: center[axis] for name, center in centers.items()} for axis in range(3))
        assert w["liver"] < w["aorta"] < w["spleen"]
        assert w["right_kidney"] < w["inferior_vena_cava"] < w["aorta"] < w["left_kidney"]
        assert h["stomach"] < h["aorta"] < h["left_kidney"] + 5
        assert d["right_kidney"] < d["liver"]


def test_attenuation_is_that_of_tissue(phantoms):
    bounds = {  # over all contrast phases, partial volume included
        "liver": (0, 130),
        "spleen": (15, 140),
        "right_kidney": (5, 200),
        "left_kidney": (5, 200),
        "gallbladder": (-20, 50),
        "pancreas": (5, 130),
        "aorta": (15, 350),
        "inferior_vena_cava": (10, 170),
    }
    for phantom in phantoms:
        for name, (low, high) in bounds.items():
            hu = phantom.volume[phantom.label == ORGANS[name]]
            assert hu.size == 0 or low < np.median(hu) < high, name
        assert phantom.volume.min() >= -1024
        assert np.median(phantom.volume[:, 0]) == pytest.approx(-1000, abs=30)  # air before the body
        assert (phantom.volume > 250).mean() > 0.005  # bone
        assert ((phantom.volume[-8:] < -700) & (phantom.volume[-8:] > -930)).mean() > 0.05  # lungs at the top
    aortas = [np.median(p.volume[p.label == ORGANS["aorta"]]) for p in phantoms]
    assert min(aortas) < 70 and max(aortas) > 200  # contrast phases


def test_labels_lie_inside_the_body(phantoms):
    for phantom in phantoms:
        solid = ndimage.binary_opening(phantom.volume > -500, iterations=1)
        parts, _ = ndimage.label(solid)
        body = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        body = np.stack([ndimage.binary_fill_holes(axial) for axial in body])
        assert body[phantom.label > 0].mean() > 0.999


def test_brightness_does_not_give_the_labels(phantoms):
    """Bayes' classifier of a voxel's HU, trained on half of the phantoms: balanced accuracy over organs and body."""
    edges = np.arange(-1030, 3080, 10)

    def histograms(chosen):
        counts = np.zeros((len(ORGANS) + 1, len(edges) - 1))
        for phantom in chosen:
            for value in range(len(ORGANS) + 1):
                voxels = phantom.volume[(phantom.label == value) & (phantom.volume > -500)]
                counts[value] += np.histogram(voxels, edges)[0]
        return counts / counts.sum(1, keepdims=True)

    train, test = histograms(phantoms[::2]), histograms(phantoms[1::2])
    accuracy = np.mean([test[value][train.argmax(0) == value].sum() for value in range(len(test))])
    assert 0.1 < accuracy < 0.5


@pytest.fixture(scope="module")
def canvas():
    pose = Pose(np.array([1.1, 0.9, 1.05]), np.array([20.0, -30.0, 10.0]), roll=25, pitch=-20)
    return Canvas(np.random.default_rng(0), (30, 50, 40), (6.0, 5.0, 7.0), -1000, pose)


def test_deformed_coordinates_keep_place_size_and_turn(canvas):
    """The middle of the grid, less the shift, is the body's origin; steps along an axis are turned and scaled."""
    place = np.stack([canvas.z, canvas.y, canvas.x])
    roll, pitch = np.deg2rad((25, -20))
    about_z = np.array([[1, 0, 0], [0, np.cos(roll), np.sin(roll)], [0, -np.sin(roll), np.cos(roll)]])
    about_x = np.array([[np.cos(pitch), np.sin(pitch), 0], [-np.sin(pitch), np.cos(pitch), 0], [0, 0, 1]])
    steps = np.indices(canvas.hu.shape).reshape(3, -1) - np.array([[14.5], [24.5], [19.5]])
    straight = steps * np.array([[6.0], [5.0], [7.0]]) - np.array([[20.0], [-30.0], [10.0]])
    expected = about_x @ about_z @ (straight / np.array([[1.1], [0.9], [1.05]]))
    off = np.abs(place.reshape(3, -1) - expected).max(1)
    assert (off > 2).all() and (off < np.array(WARP_MM) + 0.01).all()


def test_brushes_hold_every_voxel_of_their_shape(canvas):
    """Against the shape's equation on the whole grid; shapes all over it, partly outside."""
    rng = np.random.default_rng(1)
    place = np.stack([canvas.x, canvas.y, canvas.z], -1)
    for _ in range(8):
        center, radii = rng.uniform(-90, 90, 3), rng.uniform(8, 40, 3)
        turn, tilt = np.deg2rad(rng.uniform(-60, 60, 2))
        axes = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        axes = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]]) @ axes
        inside = (((place - center) @ axes.T / radii) ** 2).sum(-1) < 1
        painted = canvas.ellipsoid(center, radii, *np.rad2deg((turn, tilt))) < 0
        assert (painted != inside).sum() <= 1 and np.isfinite(canvas.ellipsoid(center, radii)).all()

        points = np.column_stack([rng.uniform(-90, 90, (3, 3)), rng.uniform(5, 20, 3)])
        beads = np.concatenate([np.linspace(a, b, 60) for a, b in pairwise(points)])
        distance = (np.linalg.norm(place[..., None, :] - beads[:, :3], axis=-1) - beads[:, 3]).min(-1)
        tube = canvas.tube(points)
        near = distance < COAT_MM - 1
        assert np.abs(tube - distance)[near].max(initial=0) < 2.5  # round cones against beads
        assert (tube[~near] > COAT_MM - 4).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (30, 60, 200)])
def test_any_grid(shape):
    phantom = make_phantom(0, shape, (4.0, 6.0, 2.0))
    assert phantom.volume.shape == phantom.label.shape == shape


def test_written_folder_reads_back_on_its_grid(tmp_path):
    write_phantoms(tmp_path, num_unlabelled=2, num_labelled=1, num_test=1, seed=5, **SMALL)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "dataset.json",
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTr/phantom_002_0000.nii.gz",
        "imagesTs/phantom_003_0000.nii.gz",
        "labelsTr/phantom_002.nii.gz",
        "labelsTs/phantom_003.nii.gz",
    ]
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, **ORGANS}
    assert dataset["numTraining"] == 3 and dataset["file_ending"] == ".nii.gz"
    image = nibabel.load(tmp_path / "imagesTr/phantom_002_0000.nii.gz")
    label = nibabel.load(tmp_path / "labelsTr/phantom_002.nii.gz")
    assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(image.affine, label.affine)
    np.testing.assert_allclose(image.header.get_zooms(), SMALL["spacing_mm"][::-1])
    own_seed = int(np.random.SeedSequence((5, 2)).generate_state(1)[0])
    phantom = make_phantom(own_seed, **SMALL)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).transpose(2, 1, 0), phantom.volume)
    np.testing.assert_array_equal(np.asanyarray(label.dataobj).transpose(2, 1, 0), phantom.label)
    assert set(np.unique(phantom.label)) > {0, 1, 2}


def test_rerun_leaves_whole_files_and_mends_damaged_ones(tmp_path):
    counts = {"num_unlabelled": 1, "num_labelled": 1, "num_test": 0, "seed": 0}
    write_phantoms(tmp_path, **counts, **SMALL)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    assert all(content[4:8] == bytes(4) for p, (_, content) in before.items() if p.suffix == ".gz")  # no time of day
    damaged = tmp_path / "imagesTr/phantom_001_0000.nii.gz"
    damaged.write_bytes(b"cut short")
    write_phantoms(tmp_path, **counts, **SMALL)
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    assert {p: c for p, (_, c) in after.items()} == {p: c for p, (_, c) in before.items()}
    assert all(after[p][0] == before[p][0] for p in before if p != damaged)


@pytest.mark.parametrize("wavelength_mm", [8, 30, 110])
def test_a_noise_field_is_a_gaussian_blur_of_its_knots(wavelength_mm):
    """Voxel by voxel: knots of half a wavelength, weighted by their distance on each axis, of length 1."""
    pose = Pose(np.array((0.9, 1.1, 1.0)), np.zeros(3), 0, 0)
    canvas = Canvas(np.random.default_rng(3), SMALL["shape"], SMALL["spacing_mm"], -1000, pose)
    canvas.rng = np.random.default_rng(7)
    field, cell = canvas.noise(wavelength_mm), wavelength_mm / 2
    knots = [np.arange(axis[0] - 2 * cell, axis[-1] + 2 * cell, cell) for axis in canvas.axes]
    values = np.random.default_rng(7).standard_normal([len(k) for k in knots], dtype=np.float32).astype(float)
    for at in np.random.default_rng(1).integers(0, SMALL["shape"], (40, 3)):
        weights = [np.exp(-(((a[i] - k) / (0.6 * cell)) ** 2) / 2) for a, i, k in zip(canvas.axes, at, knots)]
        d, h, w = (weight / np.sqrt((weight**2).sum()) for weight in weights)
        assert abs(field[tuple(at)] - d @ (values @ w) @ h) < 1e-5
