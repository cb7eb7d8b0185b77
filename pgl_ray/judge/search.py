"""A place of one scan is looked for in another: the nearest feature, as the judge of point matching has it, on 8-bit
features, so that a page can hold them and compute the very same.

What is compared is fixed to the bit: features are whole numbers, they are read at voxels' middles by linear
interpolation, whose weights are multiples of a power of two, and sums of these are exact in float64 in any order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from pgl_ray.files.ct import Scan
from pgl_ray.judge.features import ScanEncoder, scan_maps, views_of
from pgl_ray.judge.matching import GRID_MM, place_levels
from pgl_ray.judge.readings import StandardisedMaps, body_points
from pgl_ray.judge.voxels import read_map
from pgl_ray.prior import triple

MOST = 127  # of an 8-bit feature
CLIPPED = 5e-4  # share of the features, the largest ones, that become MOST
SAMPLED = 2_000_000  # of a map's features that its scale is taken from, about
CHUNK = 8192  # points that features are read at together
FINE = 3  # a coarse step is divided by this for the search around the best point


@dataclass(frozen=True)
class Codes:
    """A scan's standardised maps as 8-bit numbers, and its grid.

    Attributes:
        maps: int8 [C, d, h, w] each.
        strides, centers: per map, as of the encoder.
        shape: of the scan (D, H, W).
        spacing_mm: (D, H, W).
        affine: [4, 4], voxel index (d, h, w, 1) -> RAS+ mm.
    """

    maps: list[np.ndarray]
    strides: list[tuple[int, int, int]]
    centers: list[tuple[float, float, float]]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray

    def read(self, voxels: np.ndarray) -> list[Tensor]:
        """Interpolated features at voxels' middles [points, 3]: per map float64 [points, C]."""
        at = torch.from_numpy(np.asarray(voxels) + 0.5)
        parts = zip(self.maps, self.strides, self.centers)
        return [read_map(torch.from_numpy(one).double(), at, stride, center) for one, stride, center in parts]

    def lengths(self, voxels: np.ndarray) -> np.ndarray:
        """Of the interpolated features at voxels' middles, float64 [maps, points]."""
        at, lengths = torch.from_numpy(np.asarray(voxels) + 0.5), []
        for one, stride, center in zip(self.maps, self.strides, self.centers):
            features = torch.from_numpy(one).double()
            parts = [read_map(features, chunk, stride, center).square().sum(1) for chunk in at.split(CHUNK)]
            lengths.append(np.sqrt(torch.cat(parts).numpy()))  # torch's own root may be one bit off
        return np.stack(lengths)


class Candidates(NamedTuple):
    """Voxels of a scan that a place may be found at first: those of a regular grid that lie in the body.

    Attributes:
        voxels: int64 [points, 3], in C order.
        step: of the grid, voxels; the first point of an axis lies at step // 2.
        lengths: float32 [maps, points], of the features there.
    """

    voxels: np.ndarray
    step: tuple[int, int, int]
    lengths: np.ndarray

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the grid in a scan of a shape."""
        return tuple(len(range(by // 2, n, by)) for by, n in zip(self.step, shape))


class Hit(NamedTuple):
    """Where a place was found.

    Attributes:
        voxel: int64 [3].
        similarity: mean cosine over maps, -1 to 1.
        other_voxel, other_similarity: the runner-up, the highest other peak that is far away; none: there is no such.
        similarities: float64 [candidates].
    """

    voxel: np.ndarray
    similarity: float
    other_voxel: np.ndarray | None
    other_similarity: float | None
    similarities: np.ndarray


def compared_levels(encoder: ScanEncoder, names: Sequence[str]) -> list[int]:
    """Numbers of the maps that places are compared by; none named: those of the judge of point matching."""
    return encoder.levels(names) if names else place_levels(len(encoder.names))


def encode(encoder: ScanEncoder, scans: Sequence[Scan], names: Sequence[str] = (), seed: int = 0) -> list[Codes]:
    """Scans that shall be compared as 8-bit features of one scale.

    Channels are standardised over the encoder's views of its store, or else over views of these scans.

    Args:
        encoder: frozen.
        scans: in the stored orientation.
        names: of the maps that are compared; as of `compared_levels`.
        seed: of the views.
    """
    levels = compared_levels(encoder, names)
    views = encoder.views if encoder.views is not None else views_of(encoder, scans, seed)
    standard = StandardisedMaps(encoder.network, views)
    all_maps = [[one.cpu() for one in scan_maps(standard, encoder, scan, levels)] for scan in scans]
    scales = [_scale([maps[k] for maps in all_maps]) for k in range(len(levels))]
    strides, centers = [standard.strides[i] for i in levels], [standard.centers[i] for i in levels]
    codes = []
    for scan, maps in zip(scans, all_maps):
        whole = [(one.float() * by).round().clamp(-MOST, MOST).to(torch.int8).numpy() for one, by in zip(maps, scales)]
        codes.append(Codes(whole, strides, centers, scan.voxels.shape, scan.spacing_mm, scan.affine))
    return codes


def _scale(maps: list[Tensor]) -> float:
    """8-bit steps per unit, for all scans alike; few outliers are clipped, which leaves finer steps to the rest."""
    sizes = torch.cat([one.flatten()[:: max(1, one.numel() // SAMPLED)].float().abs() for one in maps])
    largest = sizes.kthvalue(max(1, round(len(sizes) * (1 - CLIPPED)))).values.item()
    return MOST / max(largest, 1e-6)


def grid_points(scan: Scan) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The grid of about 8 mm in the body that the judge of point matching searches; all of it where nothing is body.

    Returns:
        Voxels int64 [points, 3] in C order, and the grid's step.

    Raises:
        ValueError: the scan is thinner than half a step of the grid.
    """
    step = triple(max(1, round(GRID_MM / length)) for length in scan.spacing_mm)
    size = [len(range(by // 2, n, by)) for by, n in zip(step, scan.voxels.shape)]
    if 0 in size:
        raise ValueError(f"a scan of {scan.voxels.shape} voxels (D, H, W) is too thin to be searched on a grid of 8 mm")
    voxels = body_points(scan.voxels, scan.spacing_mm, GRID_MM)
    if not len(voxels):
        voxels = np.argwhere(np.ones(size, bool)) * step + np.array(step) // 2
    return voxels, step


def away_from_body(scan: Scan, voxels: np.ndarray) -> np.ndarray:
    """Whether voxels [points, 3] lie two steps of the grid, or farther, from all of it in the body: bool [points]; none
    does where nothing is body. The scan may be thinner than a step."""
    middles, spacing = body_points(scan.voxels, scan.spacing_mm, GRID_MM), np.array(scan.spacing_mm)
    if not len(middles):
        return np.zeros(len(voxels), bool)
    return np.asarray(cKDTree(middles * spacing).query(np.asarray(voxels) * spacing)[0] > 2 * GRID_MM)


def candidates(scan: Scan, codes: Codes) -> Candidates:
    """Where places may be found in a scan at first; errors as of `grid_points`."""
    voxels, step = grid_points(scan)
    return Candidates(voxels, step, codes.lengths(voxels).astype(np.float32))


def search(query: Codes, voxel: np.ndarray, target: Codes, among: Candidates, apart_mm: float) -> Hit:
    """Finds a voxel of one scan in another: on the coarse grid, then around the best point of it at finer steps.

    Args:
        query: the scan that is asked from.
        voxel: int [3].
        target: the scan that is searched, of the same maps.
        among: of the target.
        apart_mm: how far from the best point the runner-up must lie.
    """
    asked = [one[0] for one in query.read(np.asarray(voxel)[None])]
    # the product with every cell comes first: interpolating it is the same as interpolating features
    products = []
    for one, target_map in zip(asked, target.maps):
        cells = torch.from_numpy(target_map).flatten(1)
        parts = [one @ chunk.double() for chunk in cells.split(2**16, 1)]
        products.append(torch.cat(parts).view(1, *target_map.shape[1:]))

    def similarities(voxels: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        at, total = torch.from_numpy(voxels + 0.5), np.zeros(len(voxels))
        for level, product in enumerate(products):
            dot = read_map(product, at, target.strides[level], target.centers[level])[:, 0].numpy()
            both = math.sqrt(float(asked[level].square().sum())) * lengths[level].astype(np.float64)
            total += np.divide(dot, both, out=np.zeros(len(voxels)), where=both > 0)
        return total / len(products)

    coarse = similarities(among.voxels, among.lengths)
    best = int(coarse.argmax())
    near = _around(among.voxels[best], among.step, target.shape)
    fine = similarities(near, target.lengths(near))
    nearest = int(fine.argmax())
    other = _runner_up(among, coarse, best, target, apart_mm)
    place, value = (None, None) if other is None else (among.voxels[other], float(coarse[other]))
    return Hit(near[nearest], float(fine[nearest]), place, value, coarse)


def fine_steps(step: Sequence[int]) -> list[int]:
    """Steps of the search around the best point, voxels per axis."""
    return [max(1, by // FINE) for by in step]


def _around(voxel: np.ndarray, step: tuple[int, int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Voxels less than a coarse step away, at finer steps, inside of the scan; in C order."""
    axes = []
    for middle, by, fine, length in zip(voxel.tolist(), step, fine_steps(step), shape):
        reach = (by - 1) // fine
        axes.append([at for k in range(-reach, reach + 1) if 0 <= (at := middle + k * fine) < length])
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _runner_up(among: Candidates, values: np.ndarray, best: int, target: Codes, apart_mm: float) -> int | None:
    """The highest candidate that no neighbour on the grid is above and that lies far enough from the best one."""
    grid = np.full(among.size(target.shape), -np.inf)
    at = tuple((among.voxels // np.array(among.step)).T)
    grid[at] = values
    peaks = values >= ndimage.maximum_filter(grid, 3, mode="constant", cval=-np.inf)[at]
    away = (among.voxels - among.voxels[best]) * np.array(target.spacing_mm)
    far = away[:, 0] * away[:, 0] + away[:, 1] * away[:, 1] + away[:, 2] * away[:, 2] > apart_mm * apart_mm
    rivals = np.flatnonzero(peaks & far)
    return int(rivals[values[rivals].argmax()]) if len(rivals) else None


def similarity_map(among: Candidates, values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Similarities on the scan's own grid, float32 [D, H, W]: each voxel has its cell's, 0 outside of the body."""
    grid = np.zeros(among.size(shape), np.float32)
    grid[tuple((among.voxels // np.array(among.step)).T)] = values
    # a grid ends with its last whole step's middle; voxels behind that belong to the last cell
    index = [np.minimum(np.arange(n) // by, size - 1) for n, by, size in zip(shape, among.step, grid.shape)]
    return grid[np.ix_(*index)]


def voxel_at(scan: Scan, place_mm: np.ndarray) -> np.ndarray:
    """The voxel (d, h, w) that a place lies in, RAS+ mm.

    Raises:
        ValueError: it lies outside of the scan.
    """
    index = (np.linalg.inv(scan.affine) @ [*place_mm, 1.0])[:3]
    voxel, shape = np.floor(index + 0.5).astype(np.int64), np.array(scan.voxels.shape)
    if ((voxel < 0) | (voxel >= shape)).any():
        corners = np.array([[low, high] for low, high in zip(-0.5 * np.ones(3), shape - 0.5)])
        ends = np.stack(np.meshgrid(*corners, [1.0], indexing="ij"), -1).reshape(-1, 4) @ scan.affine.T
        low, high = ends[:, :3].min(0), ends[:, :3].max(0)
        spans = ", ".join(f"{name} {a:.0f} to {b:.0f}" for name, a, b in zip("xyz", low, high))
        given = ", ".join(f"{value:g}" for value in place_mm)
        raise ValueError(f"the place [{given}] mm (RAS+) lies outside of the scan, which spans {spans} mm")
    return voxel


def place_of(scan: Scan, voxel: np.ndarray) -> np.ndarray:
    """RAS+ mm of a voxel's middle, [3]."""
    return (scan.affine @ [*voxel, 1.0])[:3]
