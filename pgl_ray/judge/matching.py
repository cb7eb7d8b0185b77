"""Point matching: a voxel of one scan is found in another by the nearest feature. No training, no labels to learn from.

What PGL asks for, judged directly: features that name a place. In mm, at organ centroids between scans of different
people, and at any place between a scan and its own copy under a known deformation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from pgl_ray.data.random_numbers import generator
from pgl_ray.data.rendering import AIR, normalise
from pgl_ray.judge.decoder import LabelledScan
from pgl_ray.judge.dense import dense_maps
from pgl_ray.judge.readings import StandardisedMaps, body_points
from pgl_ray.judge.voxels import read_map

GRID_MM = 8.0  # between candidate points; half of it is the best median that can be
NUM_LANDMARKS = 40  # per scan under a known deformation
TURN_DEG, STRETCH, WARP_MM, NOISE_HU = 10.0, 0.1, 8.0, 30.0  # largest of each deformation
CONTROL_MM = 80.0  # between the points of the smooth displacement: shorter ones would fold


@dataclass(frozen=True)
class Points:
    """Places of a scan and their features.

    Attributes:
        at_mm: [points, 3], along the scan's own axes.
        features: [points, C], each map's part of length 1; none where the judge is the place in the body's box.
    """

    at_mm: np.ndarray
    features: Tensor


def place_levels(num_maps: int) -> list[int]:
    """Numbers of the maps that a place is found by: all but the finest, which sees only what lies about a voxel, where
    there are others."""
    return list(range(min(1, num_maps - 1), num_maps))


def grid_points(scan: LabelledScan, volume: np.ndarray) -> np.ndarray:
    """Where places of a scan are searched, of its own volume or of a deformed copy: int64 [points, 3]."""
    return body_points(volume, scan.record.spacing_mm, GRID_MM)


def has_body(scan: LabelledScan) -> bool:
    """Whether there is any place to search: what lies between the points of the grid alone is no body."""
    return len(grid_points(scan, scan.volume)) > 0


def read_points(
    encoder: StandardisedMaps, scan: LabelledScan, volume: np.ndarray, asked: list[np.ndarray], size: tuple
) -> list[Points]:
    """Features at voxels of a scan, or of a deformed copy of it.

    Args:
        encoder: in eval mode.
        scan: whose scaling and spacing count.
        volume: int16 HU [D, H, W].
        asked: lists of voxels, int64 [points, 3].
        size: of the training views (D, H, W).
    """
    device, air = next(encoder.parameters()).device, float(normalise(np.array(AIR), *scan.scaling))
    levels = place_levels(encoder.last + 1)
    voxels = torch.from_numpy(normalise(volume, *scan.scaling)).to(device)
    maps = dense_maps(encoder, voxels, size, levels, air)
    all_points = []
    for points in asked:
        at = torch.from_numpy(points + 0.5).to(device)
        parts = [
            F.normalize(read_map(one.float(), at, encoder.strides[level], encoder.centers[level]), dim=1)
            for one, level in zip(maps, levels)
        ]
        all_points.append(Points((points + 0.5) * np.array(scan.record.spacing_mm), torch.cat(parts, 1)))
    return all_points


def box_points(scan: LabelledScan, voxels: np.ndarray) -> Points:
    """The reference that needs no encoder: where a voxel lies in the box around the body, 0 to 1 per axis."""
    box = np.reshape(scan.record.foreground_box, (3, 2))
    share = (voxels + 0.5 - box[:, 0]) / (box[:, 1] - box[:, 0])
    return Points((voxels + 0.5) * np.array(scan.record.spacing_mm), torch.from_numpy(share).float())


def nearest(query: Points, among: Points, by_distance: bool = False) -> np.ndarray:
    """Index of the most similar point for each query, int [queries].

    Args:
        query, among: of one kind of features.
        by_distance: Euclidean distance instead of the mean cosine over maps.
    """
    if by_distance:
        return torch.cdist(query.features, among.features).argmin(1).cpu().numpy()
    return (query.features @ among.features.T).argmax(1).cpu().numpy()


def centroids(scan: LabelledScan, names: list[str]) -> dict[str, np.ndarray]:
    """The voxel at the middle of each annotated organ that occurs."""
    organ_voxels = {names[k]: np.argwhere(scan.target == k) for k in np.flatnonzero(scan.labelled)[1:]}
    return {organ: voxels.mean(0).round().astype(np.int64) for organ, voxels in organ_voxels.items() if len(voxels)}


def organ_errors(
    maps: StandardisedMaps | None, scans: list[LabelledScan], names: list[str], size: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Finds each organ's centroid of every scan in every other scan.

    Args:
        maps: the encoder; none: by the place in the body's box.
        scans: labelled, two or more.
        names: of the classes.
        size: of the training views.

    Returns:
        A row per ordered pair of scans and organ that both have: source_id, scan_id, which was searched, organ,
        error_mm, and found_mm, the place that was found along the searched scan's own axes.
    """
    scans = [scan for scan in scans if has_body(scan)]
    grids: list[Points] = []
    queries: list[Points] = []
    organs = [centroids(scan, names) for scan in scans]
    for scan, middles in zip(scans, organs):
        voxels = grid_points(scan, scan.volume)
        asked = np.array(list(middles.values()), np.int64).reshape(-1, 3)
        if maps is None:
            grid, query = box_points(scan, voxels), box_points(scan, asked)
        else:
            grid, query = read_points(maps, scan, scan.volume, [voxels, asked], size)
        grids.append(grid)
        queries.append(query)
    rows = []
    for target, grid, target_organs in zip(scans, grids, organs):
        for source, query, source_organs in zip(scans, queries, organs):
            if source is target or not source_organs or not target_organs:
                continue
            nearest_mm = grid.at_mm[nearest(query, grid, by_distance=maps is None)]
            for place, organ in zip(nearest_mm, source_organs):
                if organ in target_organs:
                    right = (target_organs[organ] + 0.5) * np.array(target.record.spacing_mm)
                    error = float(np.linalg.norm(place - right))
                    pair = {"source_id": source.record.scan_id, "scan_id": target.record.scan_id}
                    rows.append({**pair, "organ": organ, "error_mm": error, "found_mm": place.tolist()})
    return rows


def deformation_errors(
    maps: StandardisedMaps, scans: list[LabelledScan], size: tuple[int, int, int], seed: int
) -> list[dict[str, Any]]:
    """Finds drawn places of every scan in its own deformed, noisy copy; rows as of `organ_errors`, the organ "any"."""
    rows = []
    for scan in [scan for scan in scans if has_body(scan)]:
        rng = generator(seed, 2, scan.record.scan_id, 0)
        source = deformation(rng, scan.volume.shape, scan.record.spacing_mm)
        copy = ndimage.map_coordinates(scan.volume.astype(np.float32), source, order=1, cval=float(AIR))
        copy = (copy + rng.normal(0, NOISE_HU, copy.shape)).astype(np.int16)
        voxels = grid_points(scan, copy)
        inside = source[(slice(None), *voxels.T)].T.round().astype(np.int64)  # none of a copy without a body
        whole = ((inside >= 0) & (inside < scan.volume.shape)).all(1)
        if not whole.any():
            continue
        drawn = rng.choice(np.flatnonzero(whole), min(NUM_LANDMARKS, int(whole.sum())), replace=False)
        (grid,) = read_points(maps, scan, copy, [voxels], size)
        (query,) = read_points(maps, scan, scan.volume, [inside[drawn]], size)
        errors = np.linalg.norm(grid.at_mm[nearest(query, grid)] - grid.at_mm[drawn], axis=1)
        own = scan.record.scan_id
        rows += [{"source_id": own, "scan_id": own, "organ": "any", "error_mm": float(error)} for error in errors]
    return rows


def deformation(rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Where each voxel of a deformed copy comes from: turned about D, stretched per axis, and smoothly displaced.

    Args:
        rng: random numbers.
        shape: of the scan.
        spacing_mm: voxel size.

    Returns:
        float32 [3, D, H, W], voxel indices in the scan.
    """
    turn = np.deg2rad(rng.uniform(-TURN_DEG, TURN_DEG))
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.diag(rng.uniform(1 - STRETCH, 1 + STRETCH, 3))
    size, middle = np.array(spacing_mm), (np.array(shape) - 1) / 2
    at = np.stack(np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")).reshape(3, -1)
    mm = (at - middle[:, None]) * size[:, None]
    points = np.maximum(2, np.ceil(np.array(shape) * size / CONTROL_MM).astype(int) + 1)
    coarse = rng.uniform(-WARP_MM, WARP_MM, (3, *points))
    where = at * (size / CONTROL_MM)[:, None]
    warp = np.stack([ndimage.map_coordinates(part, where, order=3, mode="nearest") for part in coarse])
    return ((linear @ mm + warp) / size[:, None] + middle[:, None]).reshape(3, *shape).astype(np.float32)


def median_error(rows: list[dict[str, Any]]) -> float:
    """mm; the median over all pairs and organs."""
    return float(np.median([row["error_mm"] for row in rows]))


def by_organ(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median error of each organ, mm."""
    organs = sorted({row["organ"] for row in rows})
    return {organ: median_error([row for row in rows if row["organ"] == organ]) for organ in organs}
