"""Principal components of an encoder's features as colours, for the eye: a place of the body looks the same in all
scans, where the features name it.

The components are fitted over several scans together, so that a colour means the same in each. Two encoders have
components of their own: their colours are not comparable.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgl_ray.judge.decoder import LabelledScan
from pgl_ray.judge.matching import grid_points, read_points
from pgl_ray.judge.readings import StandardisedMaps

NUM_POINTS = 300  # of the body per scan that the components are fitted on
MOST_POINTS = 128 * 128  # of a slice that features are read at; a larger one is read at every second, third, ... voxel
RANGE = (2, 98)  # percentiles of the fitted points that become the darkest and the brightest of a colour


@dataclass(frozen=True)
class Components:
    """The first three principal components of features, and what becomes of them as red, green and blue.

    Attributes:
        mean: [C].
        axes: [C, 3], of length 1, the strongest first; the largest entry of each is positive. Zeros where the features
            have fewer directions.
        low, high: [3], values along the axes that become 0 and 1.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Components":
        """
        Args:
            features: [points, C], of all scans together.
        """
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        # of the points' own products, few by few: wide encoders have more channels than there are points
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        values, vectors = values.flip(0)[:3], vectors.flip(1)[:, :3]
        known = values > 1e-9 * values[0].clamp_min(1e-300)
        axes = torch.where(known, centred.T @ vectors / values.clamp_min(1e-300).sqrt(), 0)
        sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        axes = axes * sign
        along = centred @ axes
        low, high = torch.quantile(along, torch.tensor(RANGE, device=along.device).double() / 100, 0)
        return cls(mean, axes, low, high)

    def colors(self, features: Tensor) -> np.ndarray:
        """RGB, float64 in [0, 1], [points, 3]; 0.5 along an axis that says nothing.

        Args:
            features: [points, C].
        """
        along = (features.double() - self.mean) @ self.axes
        room = self.high - self.low
        share = torch.where(room > 0, (along - self.low) / room.clamp_min(1e-300), 0.5)
        return share.clamp(0, 1).cpu().numpy()


def axial_colors(
    maps: StandardisedMaps, scans: list[LabelledScan], slices: list[int], size: tuple[int, int, int]
) -> list[np.ndarray]:
    """One axial slice of each scan in the colours of the features there, those that point matching compares.

    Args:
        maps: the encoder's.
        scans: that the components are fitted on.
        slices: index along D for each of the first scans, as many as are wanted.
        size: of the training views.

    Returns:
        Per slice float64 [h, w, 3], at every `slice_step`-th voxel of H and W.
    """
    body, wanted = [], []
    for number, scan in enumerate(scans):
        voxels = grid_points(scan, scan.volume)
        asked = [voxels[np.linspace(0, len(voxels) - 1, min(NUM_POINTS, len(voxels))).round().astype(int)]]
        if number < len(slices):
            step = slice_step(scan.volume.shape)
            rows, columns = np.meshgrid(*(np.arange(step // 2, n, step) for n in scan.volume.shape[1:]), indexing="ij")
            asked.append(np.stack([np.full(rows.size, slices[number]), rows.ravel(), columns.ravel()], 1))
        points = read_points(maps, scan, scan.volume, asked, size)
        body.append(points[0].features)
        wanted += [(part.features, rows.shape) for part in points[1:]]
    components = Components.of(torch.cat(body))
    return [components.colors(features).reshape(*shape, 3) for features, shape in wanted]


def slice_step(shape: tuple[int, ...]) -> int:
    """Voxels from one point of an axial slice that is read to the next, of a scan [D, H, W]."""
    return int(np.ceil(np.sqrt(max(1, shape[1] * shape[2] / MOST_POINTS))))
