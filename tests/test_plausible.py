"""Values that are no HU: refused, left out or said; and no false alarm on any real CT."""

import nibabel as nib
import numpy as np
import pytest
from dicom_files import ct_series, save
from scipy import ndimage

from pgl_ray.files import ct
from pgl_ray.files.plausible import LabelMap

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def patient(seed=0, shape=(60, 50, 40)):
    """HU as a CT has them: air, a body of fat and muscle, lungs, bone; with noise."""
    rng = np.random.default_rng(seed)
    x, y, z = (
        np.linspace(-1, 1, size)[tuple(np.newaxis if i != a else slice(None) for i in range(3))]
        for a, size in enumerate(shape)
    )
    hu = np.full(shape, -1000.0)
    hu[(x**2 + y**2 < 0.8) & (z > -2)] = -100
    hu[(x**2 + y**2 < 0.6) & (z > -2)] = 50
    hu[((abs(x) - 0.4) ** 2 + y**2 < 0.05) & (z > -2)] = -800
    hu[(x**2 + (y - 0.5) ** 2 < 0.02) & (z > -2)] = 400
    return (ndimage.gaussian_filter(hu, 0.7) + rng.normal(0, 15, shape)).clip(-1024, 3000)


def read(path, array):
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return ct.read_scan(path)


GOOD = {
    "whole": lambda hu: hu,
    "fractions": lambda hu: hu.astype(np.float32),
    "clipped to a window": lambda hu: hu.clip(-1024, 325),
    "clipped to fat": lambda hu: hu.clip(-160, 240),
    "padded": lambda hu: np.where(np.hypot(*np.ogrid[-30:30, -25:25])[..., None] > 28, -2000, hu),
    "uint16 with slope": lambda hu: hu,
    "cropped to the trunk": lambda hu: hu[15:45, 12:38],
    "few slices": lambda hu: hu[..., :3],
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_a_ct_gives_no_note(tmp_path, make):
    values = make(patient())
    assert (
        read(tmp_path / "a.nii", values if values.dtype == np.float32 else np.rint(values).astype(np.int16)).notes == ()
    )


SAID = {
    "HU + 1024": (lambda hu: (hu + 1024).clip(0), "HU with 1000 or 1024 added"),
    "HU + 1000": (lambda hu: (hu + 1000).clip(0), "HU with 1000 or 1024 added"),
    "air at 24, padding at -2000": (
        lambda hu: np.where(np.hypot(*np.ogrid[-30:30, -25:25])[..., None] > 28, -2000, hu + 1024),
        "1000 or 1024 added",
    ),
    "offset twice": (lambda hu: hu - 1024, "was an offset taken twice"),
    "8 bits": (lambda hu: ((hu + 1024) / 16).clip(0, 255), "8-bit pictures"),
    "8 bits, saturated": (lambda hu: ((hu + 50) * 1.5).clip(0, 255), "8-bit pictures"),
    "MR": (lambda hu: np.abs(hu + 1000) ** 0.8 + np.random.default_rng(1).uniform(0, 30, hu.shape), "MR, dose"),
    "dose in cGy": (lambda hu: ndimage.gaussian_filter(hu + 1000, 6) * 6, "MR, dose"),
    "one value": (lambda hu: hu * 0 - 7, "all its voxels are -7: is it empty"),
}


@pytest.mark.parametrize("make, note", SAID.values(), ids=SAID)
def test_values_that_are_hardly_hu_are_said(tmp_path, make, note):
    notes = read(tmp_path / "a.nii.gz", np.rint(make(patient())).astype(np.int16)).notes
    assert len(notes) == 1 and note in notes[0]


REFUSED = {
    "0 to 1": lambda hu: (hu + 1024) / 4000,
    "z-scores": lambda hu: (hu - hu.mean()) / hu.std(),
    "1/cm": lambda hu: (hu / 1000 + 1) * 0.19,
    "1/m": lambda hu: (hu / 1000 + 1) * 19,
    "HU / 1000": lambda hu: hu / 1000,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_rounding_destroys_are_refused(tmp_path, make, dtype):
    values = make(patient()).astype(dtype)
    with pytest.raises(
        ValueError, match=rf"values from {values.min():.3g} to {values.max():.3g} with fractions, no HU"
    ):
        read(tmp_path / "a.nii.gz", values)


def classes(hu, values):
    """A label map of the patient's tissues."""
    smooth = ndimage.gaussian_filter(hu, 1.5)
    return np.select([smooth > 200, smooth > 0, smooth > -300, smooth > -900], values, 0)


SMALL, LARGE = [(1, 1, 1, 1), (1, 2, 3, 4), (117, 3, 52, 80), (255, 0, 0, 0)], (2000, 1000, 500, 40)


@pytest.mark.parametrize(
    "values, dtype",
    [
        *((some, np.uint8) for some in SMALL),
        *((some, wide) for some in [*SMALL, LARGE] for wide in (np.int16, np.float32)),
    ],
)
def test_label_maps_are_no_cts(tmp_path, values, dtype):
    with pytest.raises(LabelMap, match=rf"whole numbers from 0 to {max(values)} in patches: a label map"):
        read(tmp_path / "a.nii.gz", classes(patient(), values).astype(dtype))


def test_small_structures_in_a_large_volume_are_seen(tmp_path):
    label = np.zeros((100, 100, 900), np.uint8)
    label[50:55, 60:65, 701:704] = 1
    with pytest.raises(LabelMap):
        read(tmp_path / "a.nii.gz", label)


TINY = {  # slices of a mask's structure
    "a voxel": np.s_[30, 30, 20],
    "2 x 2 x 2": np.s_[30:32, 30:32, 20:22],
    "3 x 3": np.s_[30:33, 30:33, 20],
    **{f"a line along {axis}": tuple(slice(None) if a == axis else 30 for a in range(3)) for axis in range(3)},
}


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("place", TINY.values(), ids=TINY)
def test_masks_of_few_voxels_are_no_cts(tmp_path, place, value):
    mask = np.zeros((60, 60, 40), np.uint8)
    mask[place] = value
    with pytest.raises(LabelMap, match=f"whole numbers from 0 to {value} in patches"):
        read(tmp_path / "a.nii.gz", mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_empty_masks_are_no_cts(tmp_path, dtype):
    with pytest.raises(LabelMap, match="all its voxels are 0: an empty label map or mask"):
        read(tmp_path / "a.nii.gz", np.zeros((60, 60, 40), dtype))


def test_an_empty_series_of_dicom_stays_a_ct(tmp_path):
    folder = save(ct_series(np.full((4, 6, 7), 1024, np.int16)), tmp_path / "a")
    assert ct.read_scan(folder).notes == ("all its voxels are 0: is it empty?",)


@pytest.mark.parametrize("values", [(0, 256), (-1000, 40), (1, 2)])
def test_two_values_that_are_no_masks_give_a_note(tmp_path, values):
    volume = np.where(np.random.default_rng(0).random((30, 30, 20)) < 0.5, *values).astype(np.int16)
    assert read(tmp_path / "a.nii.gz", volume).voxels.min() == values[0]


@pytest.mark.slow
def test_no_real_ct_gives_a_note_and_no_label_map_passes(real_data):
    files = [*sorted((real_data / "openkbp/images").glob("*.gz"))[::12], *(real_data / "body/images").glob("*.gz")]
    files += sorted((real_data / "sts/images").glob("*.gz"))[::3]
    assert len(files) > 15
    assert {file.name: ct.read_scan(file).notes for file in files} == {file.name: () for file in files}
    for file in (*sorted((real_data / "openkbp/labels").glob("*.gz"))[::12], *(real_data / "body/labels").glob("*.gz")):
        with pytest.raises(LabelMap):
            ct.read_scan(file)
