"""Whether a label map lies on its CT's grid, and what to do where it does not."""

from pathlib import Path

import numpy as np

from pgl_ray.files.geometry import corners, shift
from pgl_ray.files.plausible import text_of

TOLERANCE = 0.1  # how far a label's corner may lie from its CT's, in voxels
COPY = "a=s.ReadImage('{path}'); a.CopyInformation(s.ReadImage('CT')); s.WriteImage(a, '{path}')"
SAMPLE = (
    "s.WriteImage(s.Resample(s.ReadImage('{path}'), s.ReadImage('CT'), s.Transform(), s.sitkNearestNeighbor), 'NEW')"
)


def difference(
    label_shape: tuple[int, ...], label_affine: np.ndarray, shape: tuple[int, ...], affine: np.ndarray
) -> str:
    """How a label map's stored grid (D, H, W) differs from its CT's; "" where it is the same."""
    if label_shape != shape:
        return f"label shape {label_shape} differs from its CT's {shape} (D, H, W)"
    if shift(label_affine, affine, shape) > TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min():
        return f"label affine {text_of(label_affine)} differs from its CT's {text_of(affine)}"
    return ""


def mend(path: Path, label_shape: tuple[int, ...], label_affine: np.ndarray, shape: tuple[int, ...]) -> str:
    """What to do about a label map on another grid: the CT's header for one that lost its own, else resampling."""
    spacing = np.linalg.norm(label_affine[:3, :3], axis=0)
    lost = np.allclose(spacing, 1) or _begins_at_zero(label_affine, label_shape)
    if sorted(label_shape) == sorted(shape) and lost:
        symptom = "spacing 1" if np.allclose(spacing, 1) else "origin 0"
        return (
            f"its shape is the CT's, and {symptom} looks like a lost header: copy the CT's onto it, python -c \"import "
            f'SimpleITK as s; {COPY.format(path=path)}"'
        )
    return f'resample it onto the CT\'s grid, python -c "import SimpleITK as s; {SAMPLE.format(path=path)}"'


def _begins_at_zero(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether the origin lies at a corner voxel, whichever the file's first voxel was, or in the middle."""
    middle = (*((size - 1) / 2 for size in shape), 1)
    return any(np.allclose(affine @ place, (0, 0, 0, 1), atol=1e-3) for place in [*corners(shape), middle])
