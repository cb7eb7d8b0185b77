"""8-bit codes of HU: 256 steps over the store's HU window, in place of 16 bits per voxel."""

import numpy as np


def code_table(attributes: dict) -> np.ndarray | None:
    """int16 HU of the 256 codes of an 8-bit array, by its attributes; none: the array holds HU."""
    if "scale_factor" not in attributes:
        return None
    return np.rint(attributes["add_offset"] + attributes["scale_factor"] * np.arange(256)).astype(np.int16)
