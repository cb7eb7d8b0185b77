"""Whether a volume can be a CT of a patient in HU: size of its voxels and of the whole, and what its values look like.

What cannot be a CT is refused; what may be one and is unlikely gives a note.
"""

import math
from pathlib import Path

import numpy as np

from pgl_ray.config import LARGEST_VOXEL_MM, LEAST_VOXEL_MM
from pgl_ray.files.raw import Raw

LONGEST_MM = 5000.0  # along an axis; no table moves further
FLATTEST = 0.2  # share of a box' volume that sheared axes must leave; a gantry tilt of 30 degrees leaves 0.87
MOST_LABELS = 200  # of a label map; an 8-bit picture has more values, and patches where it is saturated
LARGEST_OF_MASKS = 255  # value of the one structure in a mask
PLANES = 64  # that are looked at for patches
SAMPLED = 2**15  # voxels whose values are looked at
AIR = -1024  # what lies below has been raised to it (see ct)
ROUNDED = 1e-3  # fractions below are the scale factor's own error
LEAST_RANGE = 100  # between the extremes of values with fractions; air, fat and muscle are already 1000 HU apart
HIGHEST_WITHOUT_FAT = -50  # fat lies at -100 HU, lung at -800, air at -1000
SHARE = 0.005  # of voxels that may lie beyond; interpolation makes some


class LabelMap(ValueError):
    """A label map stands where a CT is expected."""


def check_grid(path: str | Path, affine: np.ndarray, shape: tuple[int, ...], unit: str = "mm") -> None:
    """Refuses voxels and volumes of a size that no CT of a patient has.

    Args:
        affine: [4, 4], voxel index -> mm.
        shape: of the volume, in the affine's order of axes.
        unit: that the file's header names, for the message.

    Raises:
        ValueError: no direction or place, axes that are nearly parallel, voxels outside LEAST_VOXEL_MM to
            LARGEST_VOXEL_MM, or an axis longer than LONGEST_MM.
    """
    directions = affine[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        raise ValueError(
            f"{path}: affine {text_of(affine)} is singular: spacing or orientation is missing in the header"
        )
    size = " x ".join(f"{length:.3g}" for length in lengths)
    stated = f" (its header's unit of length is {unit})" if unit != "mm" else ""
    if lengths.min() < LEAST_VOXEL_MM or lengths.max() > LARGEST_VOXEL_MM:
        raise ValueError(
            f"{path}: voxels of {size} mm{stated}, expected {LEAST_VOXEL_MM:g} to {LARGEST_VOXEL_MM:g} mm: its header "
            "has another unit than it says, or a wrong spacing: mend it"
        )
    extent = lengths * shape
    if extent.max() > LONGEST_MM:
        raise ValueError(
            f"{path}: {extent.max():.0f} mm long ({size} mm voxels{stated}, shape {tuple(map(int, shape))}), expected "
            f"at most {LONGEST_MM:g} mm: its spacing is wrong, mend its header"
        )
    if abs(np.linalg.det(directions / lengths)) < FLATTEST:
        raise ValueError(f"{path}: affine {text_of(affine)} is singular: its axes are nearly parallel, mend its header")


def text_of(affine: np.ndarray) -> str:
    """An affine in a message."""
    return str(np.round(affine[:3], 3).tolist())


def check_fractions(path: str | Path, raw: Raw, rounding_error: float) -> None:
    """Refuses values that rounding to whole HU would destroy, as normalised ones and attenuation.

    Raises:
        ValueError: values with fractions that lie within LEAST_RANGE of each other.
    """
    ends = (float(end) * raw.slope + raw.inter for end in (raw.voxels.min(), raw.voxels.max()))
    low, high = sorted(ends)
    if rounding_error > ROUNDED and high - low < LEAST_RANGE:
        raise ValueError(
            f"{path}: values from {low:.3g} to {high:.3g} with fractions, no HU (normalised, or attenuation in 1/cm?): "
            "take the original file"
        )


def check_values(path: str | Path, voxels: np.ndarray, of_a_ct: bool = False) -> list[str]:
    """Looks whether whole values can be HU, on a sample of the volume.

    Args:
        voxels: int16, any shape of three axes, -1024 and above.
        of_a_ct: whether their file says so, as a DICOM series does: then it may be as empty as a mask.

    Returns:
        What is doubtful, a sentence each.

    Raises:
        LabelMap: zeros alone, or whole numbers from 0 on that stand in patches or are two.
    """
    step = max(1, math.ceil((voxels.size / SAMPLED) ** (1 / 3)))
    sample = voxels[::step, ::step, ::step].ravel()
    low = int(sample.min())
    high = int(sample.max())
    if low >= 0 or low == high:  # a CT has air, in every sample
        low, high = int(voxels.min()), int(voxels.max())
    if low == high == 0 and not of_a_ct:
        raise LabelMap(f"{path}: all its voxels are 0: an empty label map or mask, no CT")
    if low >= 0 and high > low and ((not of_a_ct and _is_mask(voxels, low, high)) or _stands_in_patches(voxels)):
        raise LabelMap(f"{path}: whole numbers from {low} to {high} in patches: a label map or mask, no CT")
    if low == high:
        return [f"all its voxels are {low}: is it empty?"]
    sample = sample[sample > AIR] if low == AIR else sample
    return _doubts(sample, low, high) if sample.size else []


def _is_mask(voxels: np.ndarray, low: int, high: int) -> bool:
    """Whether there are but 0 and one small value, in however few voxels."""
    return low == 0 and high <= LARGEST_OF_MASKS and bool(((voxels == low) | (voxels == high)).all())


def _stands_in_patches(voxels: np.ndarray) -> bool:
    """Whether most neighbours have one value outside the most frequent value, in planes of the first axis."""
    filled = np.flatnonzero(voxels.max((1, 2)) > voxels.min())  # a lesion may lie in a few of many planes
    middle = voxels[filled[:: math.ceil(len(filled) / PLANES)]]
    values, counts = np.unique(middle, return_counts=True)
    if len(values) > MOST_LABELS:
        return False
    outside = middle[:, :, :-1] != values[counts.argmax()]
    equal = middle[:, :, :-1] == middle[:, :, 1:]
    return bool(outside.any() and equal[outside].mean() > 0.5)


def _doubts(sample: np.ndarray, low: int, high: int) -> list[str]:
    lowest, middle, highest = np.quantile(sample, [SHARE, 0.5, 1 - SHARE])
    if lowest <= HIGHEST_WITHOUT_FAT:
        if highest < -200:
            return [
                f"hardly a value is above {highest:.0f}, where tissue has -100 to 100 HU: was an offset taken twice?"
            ]
        return []
    if high <= 255 and low >= 0:
        return [f"its values go from {low} to {high}, as 8-bit pictures' do: is it in HU?"]
    tissue = sample[(sample > 900) & (sample < 1150)].size / sample.size
    if lowest < 100 and tissue > 0.02:
        return [
            f"hardly a value is below {lowest:.0f}, and {tissue:.0%} lie around 1000: HU with 1000 or 1024 added? Then "
            "subtract it"
        ]
    return [
        f"hardly a value is below {lowest:.0f} (half of them below {middle:.0f}), but air, lung and fat have -1000 to "
        "-50 HU: is it a CT in HU, and no MR, dose or other picture?"
    ]
