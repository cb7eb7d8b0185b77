"""Whether a label map lies on its CT's grid, and what to do where it does not."""

from pathlib import Path

import numpy as np

from pgl_ray.files import itk, nifti
from pgl_ray.files.detached import is_segmentation
from pgl_ray.files.geometry import corners, shift
from pgl_ray.files.plausible import text_of

TOLERANCE = 0.1  # how far a label's corner may lie from its CT's, in voxels
COPY = {
    "nibabel": "import nibabel as n; c = n.load('{ct}'); a = n.load('{path}'); "
    "n.save(n.Nifti1Image(a.dataobj, c.affine, c.header, dtype=a.get_data_dtype()), 'NEW.nii.gz')",
    "ITK": "import SimpleITK as s; a = s.ReadImage('{path}'); a.CopyInformation(s.ReadImage('{ct}')); "
    "s.WriteImage(a, 'NEW.nrrd')",
}
SAMPLE = {
    "nibabel": "import nibabel as n; from nibabel.processing import resample_from_to as r; "
    "n.save(r(*(n.squeeze_image(n.load(p)) for p in ('{path}', '{ct}')), order=0), 'NEW.nii.gz')",
    "ITK": "import SimpleITK as s; s.WriteImage(s.Resample(s.ReadImage('{path}'), s.ReadImage('{ct}'), s.Transform(), "
    "s.sitkNearestNeighbor), 'NEW.nrrd')",
}


def difference(
    label_shape: tuple[int, ...], label_affine: np.ndarray, shape: tuple[int, ...], affine: np.ndarray
) -> str:
    """How a label map's stored grid (D, H, W) differs from its CT's; "" where it is the same."""
    if label_shape != shape:
        return f"label shape {label_shape} differs from its CT's {shape} (D, H, W)"
    if shift(label_affine, affine, shape) > TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min():
        return f"label affine {text_of(label_affine)} differs from its CT's {text_of(affine)}"
    return ""


def mend(
    path: Path,
    label_shape: tuple[int, ...],
    label_affine: np.ndarray,
    shape: tuple[int, ...],
    affine: np.ndarray,
    ct: str,
) -> str:
    """What to do about a label map on another grid: the CT's header for one that lost its own, else resampling.

    Args:
        ct: the CT's path; "" where it is not known.
    """
    spacing, ct_spacing = (np.linalg.norm(one[:3, :3], axis=0) for one in (label_affine, affine))
    unit = np.allclose(spacing, 1) and not np.allclose(ct_spacing, 1)
    if sorted(label_shape) == sorted(shape) and (
        unit or (_begins_at_zero(label_affine, label_shape) and not _begins_at_zero(affine, shape))
    ):
        symptom = "spacing 1" if unit else "origin 0"
        what = f"its shape is the CT's, and {symptom} looks like a lost header: "
        return what + _how(path, ct, "copy the CT's onto it", COPY, "export it again with the CT's")
    again = "resample it onto the CT's grid"
    return _how(path, ct, again, SAMPLE, f"{again}; dcm2niix makes a NIfTI of DICOM for that")


def _how(path: Path, ct: str, what: str, code: dict[str, str], of_dicom: str) -> str:
    """What is to be done, with a command where one does it for files of these formats."""
    if path.is_dir() or (ct and Path(ct).is_dir()):
        return of_dicom
    if is_segmentation(path):  # commands lose the segments' names
        return f"{what}, as 3D Slicer does (Segmentations, Export to files, the CT as reference volume)"
    files = [path, *([Path(ct)] if ct else [])]
    kind = "nibabel" if all(map(nifti.is_nifti, files)) else "ITK"
    if kind == "ITK" and not all(_is_itks(one) for one in files[code is COPY :] if nifti.is_nifti(one)):
        return f"{what}: with both as NIfTI, this line holds a command"
    command = code[kind].format(path=path, ct=ct or "CT")
    return f'{what}, and put the new file in its place, python -c "{command}"'


def _is_itks(path: Path) -> bool:
    """Whether ITK reads a NIfTI's grid as it is read here: it refuses a sheared sform, and may take the qform."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return False
    image = nifti.open_image(path)
    affine = nifti.geometry(image).affine
    apart = shift(itk.geometry(path, reader).affine, affine, image.shape[:3])
    return apart <= TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min()


def _begins_at_zero(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether the origin lies at a corner voxel, whichever the file's first voxel was, or in the middle."""
    middle = (*((size - 1) / 2 for size in shape), 1)
    return any(np.allclose(affine @ place, (0, 0, 0, 1), atol=1e-3) for place in [*corners(shape), middle])
