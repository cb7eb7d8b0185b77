"""A volume as its file holds it, before it is brought into the stored orientation."""

from typing import NamedTuple

import numpy as np


class Geometry(NamedTuple):
    """Where a file's voxels lie.

    Attributes:
        affine: float64 [4, 4], (i, j, k, 1) -> RAS+ mm.
        unit: of length in the file's header; the affine is in mm whatever it is.
        notes: what is doubtful, a sentence each.
    """

    affine: np.ndarray
    unit: str = "mm"
    notes: tuple[str, ...] = ()


class Raw(NamedTuple):
    """Voxels [i, j, k] in the file's axis order, not scaled yet: value = voxel * slope + inter."""

    voxels: np.ndarray
    slope: float
    inter: float
    geometry: Geometry
