"""Where a scan's voxels lie, and what is worth saying of it."""

from itertools import product

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MOST_SHEAR = 2.0  # degrees; what rounding in headers makes of right angles is far less


def corners(shape: tuple[int, ...]) -> np.ndarray:
    """The corner voxels of a grid as affines take them, [8, 4]."""
    return np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape))])


def shift(affine_1: np.ndarray, affine_2: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two affines put a corner voxel of a grid, in their unit."""
    return float(np.linalg.norm(corners(shape) @ (affine_1 - affine_2)[:3].T, axis=1).max())


def shear_degrees(affine: np.ndarray) -> float:
    """How far the angles between a grid's axes are from right ones, the largest, in degrees.

    Args:
        affine: [4, 4], voxel index -> mm.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes - np.eye(3))
    return float(np.degrees(np.arcsin(cosines.max().clip(0, 1))))


def shear_notes(affine: np.ndarray) -> list[str]:
    """A sentence where a grid is sheared, as a converter leaves a scan with a tilted gantry."""
    angle = shear_degrees(affine)
    if angle <= MOST_SHEAR:
        return []
    return [
        f"its grid is sheared by {angle:.0f} degrees (gantry tilt?), and is taken as if it were straight; of the two "
        "files that dcm2niix writes, the one whose name ends in _Tilt or _Tilt_1 is straight"
    ]
