"""files/resample against the world coordinates of functions whose values are known everywhere."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from pgl_ray import predict
from pgl_ray.config import PredictConfig
from pgl_ray.files.resample import onto_grid, resample
from pgl_ray.files.scans import ScanFile
from pgl_ray.train.records import CheckpointMeta

AFFINE = np.array([[0, 0, -0.7, 10], [0, -0.8, 0, 20], [2.5, 0, 0, 30], [0, 0, 0, 1]])


def world(affine, shape):
    """RAS+ mm of every voxel, [D, H, W, 3]."""
    index = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("spacing", [(1.0, 0.8, 0.7), (2.5, 1.6, 1.4), (3.0, 1.1, 0.5), (5.0, 2.4, 2.1)])
def test_a_plane_stays_where_it_is(spacing):
    plane = np.array([7.0, -11.0, 5.0])
    volume = np.rint(world(AFFINE, (24, 50, 60)) @ plane).astype(np.int16)
    moved, label, affine = resample(volume, None, AFFINE, spacing)
    assert label is None and np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(spacing)
    np.testing.assert_allclose(np.array(moved.shape) * spacing, np.array(volume.shape) * (2.5, 0.8, 0.7), atol=5)
    inner = tuple(slice(4, -4) for _ in range(3))
    np.testing.assert_allclose(moved[inner], (world(affine, moved.shape) @ plane)[inner], atol=1.1)
    edges = [(a @ [-0.5, -0.5, -0.5, 1])[:3] for a in (AFFINE, affine)]  # outer corner of the first voxel
    np.testing.assert_allclose(*edges, atol=1e-9)


def test_labels_take_the_nearest_voxel_of_simpleitks_grid():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, (20, 30, 40)).astype(np.uint8)
    _, resampled, _ = resample(label.astype(np.int16), label, AFFINE, (1.9, 1.3, 0.9))
    assert resampled.dtype == np.uint8
    image = sitk.GetImageFromArray(label)
    image.SetSpacing((0.7, 0.8, 2.5))
    origin = [(0.5 * (new - old)) for new, old in zip((0.9, 1.3, 1.9), (0.7, 0.8, 2.5))]
    size = [int(s) for s in resampled.shape[::-1]]
    frame = (size, sitk.Transform(), sitk.sitkNearestNeighbor, origin, (0.9, 1.3, 1.9), image.GetDirection(), 9)
    expected = sitk.GetArrayFromImage(sitk.Resample(image, *frame))
    inside = expected != 9
    assert inside.mean() > 0.9 and (resampled == expected)[inside].mean() > 0.999


def test_fine_noise_does_not_alias():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 300, (64, 64, 64)).clip(-1000, 1000).astype(np.int16)
    coarse, _, _ = resample(noise, None, np.eye(4), (4.0, 4.0, 4.0))
    assert coarse.shape == (16, 16, 16) and coarse.std() < 300 / 8 * 1.3  # mean of 64 voxels has a std of 300 / 8


def test_the_same_spacing_changes_nothing():
    volume = np.zeros((4, 5, 6), np.int16)
    same, _, affine = resample(volume, None, AFFINE, (2.5, 0.8, 0.7))
    assert same is volume and affine is AFFINE


@pytest.mark.parametrize("spacing", [(1.0, 0.8, 0.7), (3.1, 1.1, 0.5), (5.0, 2.4, 2.1)])
def test_labels_come_back_to_the_ct_they_were_predicted_for(tmp_path, monkeypatch, spacing):
    """With a network that marks what is above the middle of its scan's range."""
    grid = np.indices((60, 50, 24)) / np.array([60, 50, 24])[:, None, None, None]  # i, j, k
    volume = np.where(np.linalg.norm(grid - 0.45, axis=0) < 0.25, 100, -900).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([0.7, -0.8, 2.5, 1])), tmp_path / "ct.nii.gz")
    seen = []

    def segment(model, voxels, *args, **options):
        seen.append(voxels.shape)
        return (voxels > (voxels.min() + voxels.max()) / 2).astype(np.uint8)

    monkeypatch.setattr(predict, "segment", segment)
    values = {"labels": {"ball": 1}, "task": "multiclass", "patch_size": (16, 32, 32), "spacing_mm": spacing}
    meta = CheckpointMeta(encoder={}, hu_window=(-1000.0, 300.0), **values)
    job = predict.Job(ScanFile("ct", tmp_path / "ct.nii.gz"), tmp_path / "out.nii.gz")
    config = PredictConfig(run="r", input=job.scan.source, output=str(job.target), viewer=False)
    predict.predict_one(None, meta, job, "maker", config)
    assert seen == [resample(np.zeros((24, 50, 60), np.int16), None, AFFINE, spacing)[0].shape]
    written, true = nib.load(tmp_path / "out.nii.gz"), volume > 0
    assert written.shape == volume.shape and np.allclose(written.affine, np.diag([0.7, -0.8, 2.5, 1]))
    predicted = np.asarray(written.dataobj) > 0
    assert 2 * (predicted & true).sum() / (predicted.sum() + true.sum()) > 0.85
    centres = [np.argwhere(mask).mean(0) * (0.7, 0.8, 2.5) for mask in (predicted, true)]
    np.testing.assert_allclose(*centres, atol=0.2)  # mm: no shift


def test_onto_the_same_grid_is_the_same():
    label = np.random.default_rng(0).integers(0, 9, (5, 6, 7)).astype(np.uint8)
    np.testing.assert_array_equal(onto_grid(label, AFFINE, AFFINE, label.shape), label)
