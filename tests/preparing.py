"""What the tests of prepare share: made-up CTs and labels on the disk, and prepare called on them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from pgl_ray import prepare
from pgl_ray.config import PrepareConfig
from pgl_ray.data import store

AFFINE = np.diag([-1.5, -1.5, 3, 1])


def ct_array(seed=0, shape=(20, 18, 9)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def label_array(values=(1, 2), seed=0, shape=(20, 18, 9)):
    label = np.zeros(shape, np.uint8)
    for place, value in enumerate(values):
        label[2 + 4 * place : 5 + 4 * place, 3:9, 2:6] = value
    return label


def put(path, array=None, seed=0):
    """Writes a CT (or the given array) in the format of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = ct_array(seed) if array is None else array
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, AFFINE), path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def go(source, target, **values):
    return prepare.run(PrepareConfig(source=str(source), store=str(target), **values))


def records(target):
    return {scan.scan_id: scan for scan in store.read_index(target).scans}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def counts(result):
    return result.converted, result.skipped, len(result.failed)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)
