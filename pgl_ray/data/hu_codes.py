"""8-bit codes of HU: 256 steps over the store's HU window, in place of 16 bits per voxel."""

import math
from typing import NamedTuple

import numpy as np

ALL_HU = np.arange(2**16, dtype=np.uint16).view(np.int16)  # by its bits as uint16, the order that voxels are counted in


class StoredVoxels(NamedTuple):
    """A volume as it is stored: HU, or codes of it.

    Attributes:
        array: int16 or uint8 [D, H, W].
        table: int16 HU [256] of the codes; none: the array holds HU.
        attributes: of the array, which say what the codes are.
        counts: voxels of each HU that a reader gives, int64 [2**16] as ALL_HU.
        rms_hu: root mean square error by codes inside the HU window.
        clipped_share: share of voxels outside of it.
    """

    array: np.ndarray
    table: np.ndarray | None
    attributes: dict[str, float]
    counts: np.ndarray
    rms_hu: float = 0.0
    clipped_share: float = 0.0


def coded(volume: np.ndarray, counts: np.ndarray, hu_window: tuple[float, float]) -> StoredVoxels:
    """8-bit codes of a volume.

    Args:
        volume: int16 [D, H, W], HU.
        counts: its voxels of each HU, int64 [2**16] as ALL_HU.
        hu_window: that the codes cover.
    """
    codes, attributes = _codes(hu_window)
    table = _hu_of(attributes)
    inside = (hu_window[0] <= ALL_HU) & (hu_window[1] >= ALL_HU)
    errors, num = table[codes] - ALL_HU.astype(np.float64), int(counts[inside].sum())
    rms = math.sqrt(np.sum((counts * errors**2)[inside]) / max(num, 1))
    clipped = float(1 - num / counts.sum())
    of_codes = np.bincount(table[codes].view(np.uint16), counts, 2**16).astype(np.int64)
    return StoredVoxels(codes[volume.view(np.uint16)], table, attributes, of_codes, rms, clipped)


def _codes(hu_window: tuple[float, float]) -> tuple[np.ndarray, dict[str, float]]:
    """Table from int16 HU (viewed as uint16) to 8-bit codes, and the array attributes that undo it, by CF's names."""
    low, high = hu_window
    step = (high - low) / 255
    return np.rint((ALL_HU.clip(low, high) - low) / step).astype(np.uint8), {"scale_factor": step, "add_offset": low}


def _hu_of(attributes: dict[str, float]) -> np.ndarray:
    """int16 HU [256] of the codes of an array with these attributes."""
    codes = np.arange(256)
    return np.rint(attributes["add_offset"] + attributes["scale_factor"] * codes).astype(np.int16)


def code_table(attributes: dict) -> np.ndarray | None:
    """int16 HU of the 256 codes of an 8-bit array, by its attributes; none: the array holds HU."""
    return _hu_of(attributes) if "scale_factor" in attributes else None


def hu_of_codes(hu_window: tuple[float, float]) -> np.ndarray:
    """int16 HU [256] of the 8-bit codes of a store with a HU window."""
    return _hu_of(_codes(hu_window)[1])
