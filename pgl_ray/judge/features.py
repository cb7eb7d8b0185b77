"""A frozen encoder's features of whole scans, each with its place in mm."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pgl_ray.config import CropConfig
from pgl_ray.data.random_numbers import generator
from pgl_ray.data.rendering import AIR, normalise, read_padded, render
from pgl_ray.data.sampling import sample_prior
from pgl_ray.data.voxel_statistics import foreground_box, statistics
from pgl_ray.files.ct import Scan
from pgl_ray.files.resample import resample
from pgl_ray.judge.dense import dense_maps
from pgl_ray.judge.readings import NUM_VIEWS, StandardisedMaps, body_points, norms, read_as
from pgl_ray.judge.voxels import read_map
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import triple

BODY_MM = 4.0  # between the points of the body that a map is pooled over


@dataclass(frozen=True)
class FeatureMap:
    """One of an encoder's maps of a whole scan.

    Attributes:
        name: "stem", "layer1", ... of a ResNet, "stage1", ... of a ResEnc.
        values: float16 [C, d, h, w], on the encoder's device.
        stride: voxels of the scan per cell (D, H, W).
        center: where cell 0's receptive field is centred, in edge coordinates of the scan: voxel v is v to v + 1.
        affine: float64 [4, 4], cell index (d, h, w, 1) -> RAS+ mm of the receptive field's centre.
    """

    name: str
    values: Tensor
    stride: tuple[int, int, int]
    center: tuple[float, float, float]
    affine: np.ndarray

    def at(self, places_mm: np.ndarray) -> Tensor:
        """Features by linear interpolation between receptive-field centres; beyond the outermost they are repeated.

        Args:
            places_mm: [places, 3], RAS+.

        Returns:
            float32 [places, C], on the device of `values`.
        """
        homogeneous = np.column_stack([places_mm, np.ones(len(places_mm))])
        cells = (homogeneous @ np.linalg.inv(self.affine).T)[:, :3]
        points = torch.from_numpy(cells * np.array(self.stride) + np.array(self.center)).to(self.values.device)
        return read_map(self.values.float(), points, self.stride, self.center)


class ScanEncoder:
    """A frozen encoder with all that it expects of a scan.

    Attributes:
        init: where the weights come from, as given.
        network: in eval mode; gives maps, finest first.
        names: of these maps.
        hu_window: that HU are clipped to.
        facts: of the scans of its training (`data.facts.training_facts`); {} where nothing is known of them.
        size: of the training views (D, H, W); scans are covered by windows of twice that.
        reading: "reestimated", "trained" or "none", the state of its BatchNorm.
        views: unlabelled views of a store, [N, 1, D, H, W], that BatchNorm was estimated on; none: as trained.
    """

    def __init__(
        self,
        init: str,
        network: Encoder | ResEncoder,
        hu_window: tuple[float, float],
        facts: dict[str, Any],
        size: tuple[int, int, int],
    ):
        self.init, self.network = init, network.eval().requires_grad_(False)
        low, high = hu_window
        self.hu_window, self.facts, self.size = (low, high), facts, triple(size)
        first = ["stem"] if isinstance(network, Encoder) else []
        kind = "layer" if first else "stage"
        num = network.last + 1 - len(first)
        self.names = (*first, *(f"{kind}{i}" for i in range(1, num + 1)))
        self.reading = "trained" if norms(network) else "none"
        self.views: Tensor | None = None

    def reestimated(self, views: Tensor) -> "ScanEncoder":
        """The same with BatchNorm's statistics of unlabelled views, [N, 1, D, H, W], as the judges have it."""
        other = copy.copy(self)
        other.views = views
        if self.reading != "none":
            other.network, other.reading = read_as(self.network, "reestimated", views), "reestimated"
        return other

    def statistics(self) -> dict[str, np.ndarray]:
        """BatchNorm's mean, variance and number of batches, by their names in the network."""
        norm_ids = set(map(id, norms(self.network)))
        buffers: dict[str, np.ndarray] = {}
        for name, part in self.network.named_modules():
            if id(part) in norm_ids:
                buffers |= {f"{name}.{key}": one.cpu().numpy() for key, one in part.named_buffers(recurse=False)}
        return buffers

    def with_statistics(self, statistics: dict[str, np.ndarray]) -> "ScanEncoder":
        """The same with BatchNorm's statistics as `statistics` gave them once they were estimated."""
        other = copy.copy(self)
        other.network, other.reading = copy.deepcopy(self.network), "reestimated"
        tensors = {name: torch.from_numpy(np.array(one)) for name, one in statistics.items()}
        other.network.load_state_dict(tensors, strict=False)
        return other

    @property
    def device(self) -> torch.device:
        """Where the network is, and its maps are."""
        return next(self.network.parameters()).device

    @property
    def hash(self) -> str:
        """sha256 of weights, BatchNorm's statistics and what a scan is prepared by."""
        digest = hashlib.sha256(json.dumps([self.network.settings, self.names, self.hu_window, self.size]).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(name.encode() + content)
        return digest.hexdigest()

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Voxel size (D, H, W) of the training scans, their median; none: not known."""
        known = self.facts.get("resampled_mm") or (self.facts.get("spacing_mm") or [None] * 3)[1]
        return triple(float(length) for length in known) if known else None

    def levels(self, names: Sequence[str]) -> list[int]:
        """Numbers of maps by their names; none named: the last.

        Raises:
            ValueError: there is no such map.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            known = ", ".join(self.names)
            raise ValueError(f"maps={','.join(names)}: init={self.init} has no {unknown[0]!r}; it has {known}")
        return sorted({self.names.index(name) for name in names}) or [len(self.names) - 1]

    def scaling(self, voxels: np.ndarray) -> tuple:
        """HU window, mean and standard deviation of a scan, as `normalise` takes them."""
        return self.hu_window, *statistics(np.ascontiguousarray(voxels), self.hu_window)

    def dense(self, scan: Scan, names: Sequence[str] = ()) -> list[FeatureMap]:
        """Maps of a whole scan, window by window; of the memory it takes, most is the maps themselves.

        Args:
            scan: in the stored orientation.
            names: of maps; none: the last.
        """
        levels = self.levels(names)
        values = scan_maps(self.network, self, scan, levels)
        maps = []
        for level, one in zip(levels, values):
            stride, center = self.network.strides[level], self.network.centers[level]
            maps.append(FeatureMap(self.names[level], one, stride, center, map_affine(scan.affine, stride, center)))
        return maps


def scan_maps(
    network: Encoder | ResEncoder | StandardisedMaps, encoder: ScanEncoder, scan: Scan, levels: list[int]
) -> list[Tensor]:
    """Maps of a whole scan, float16 [C, d, h, w] each.

    Args:
        network: the encoder's own, or the same with standardised maps.
        encoder: says how a scan is prepared.
        scan: in the stored orientation.
        levels: numbers of the maps.
    """
    scaling, device = encoder.scaling(scan.voxels), next(network.parameters()).device
    volume = torch.from_numpy(normalise(scan.voxels, *scaling)).to(device)
    return dense_maps(network, volume, encoder.size, levels, float(normalise(np.array(AIR), *scaling)))


def map_affine(affine: np.ndarray, stride: Sequence[int], center: Sequence[float]) -> np.ndarray:
    """Of a map from its scan's affine: cell j is centred at edge coordinate stride * j + center, which is voxel index
    stride * j + center - 0.5."""
    step = np.diag([*map(float, stride), 1.0])
    step[:3, 3] = np.array(center) - 0.5
    return np.asarray(affine, np.float64) @ step


def pooled(scan: Scan, maps: Sequence[FeatureMap]) -> np.ndarray:
    """Mean of each map over the body, one map's channels after the other's; over all where nothing is body.

    The body is sampled every 4 mm or so, small air spaces closed; each point counts for the cell whose centre is
    nearest.

    Returns:
        float32 [sum of channels].
    """
    points = body_points(scan.voxels, scan.spacing_mm, BODY_MM) + 0.5
    means = []
    for one in maps:
        shape = one.values.shape[1:]
        cells = np.floor((points - one.center) / one.stride + 0.5).astype(np.int64).clip(0, np.array(shape) - 1)
        flat = np.ravel_multi_index(tuple(cells.T), tuple(shape))
        weight = np.bincount(flat, minlength=int(np.prod(shape))) if len(flat) else np.ones(int(np.prod(shape)))
        share = torch.from_numpy(weight / weight.sum()).to(one.values.device)
        inside = share.nonzero().flatten()  # channels of a wide map times all cells would not fit
        means.append(one.values.flatten(1)[:, inside].double() @ share[inside])
    return torch.cat(means).float().cpu().numpy()


def spacing_of(spacing: Literal["own", "weights"], encoder: ScanEncoder) -> tuple[float, float, float] | None:
    """What scans are resampled to, in mm; none: nothing.

    Raises:
        ValueError: the training's is asked for, and not known.
    """
    if spacing == "own":
        return None
    if encoder.spacing_mm is None:
        raise ValueError(f"spacing=weights: init={encoder.init} does not say its voxel size: take spacing=own")
    return encoder.spacing_mm


def at_spacing(scan: Scan, spacing_mm: tuple[float, float, float]) -> Scan:
    """A scan resampled to a voxel size (D, H, W)."""
    voxels, _, affine = resample(scan.voxels, None, scan.affine, spacing_mm)
    spacing = triple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return replace(scan, voxels=voxels, affine=affine, spacing_mm=spacing)


class _InMemory:
    """A scan that parts are read of, as of a store's."""

    def __init__(self, voxels: np.ndarray):
        self.voxels, self.shape = voxels, voxels.shape

    def read_boxes(self, boxes: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        return [self.voxels[tuple(slice(*axis) for axis in box)] for box in boxes]


def views_of(encoder: ScanEncoder, scans: Sequence[Scan], seed: int) -> Tensor:
    """Plain crops around the body of scans in memory, as `readings.unlabelled_views` has them of a store.

    Returns:
        float32 [NUM_VIEWS, 1, D, H, W].
    """
    crops = CropConfig(size=encoder.size, crop_scale=(1.0, 1.0), flip_prob=0.0, foreground=True)
    facts = [(_InMemory(one.voxels), foreground_box(one.voxels), encoder.scaling(one.voxels)) for one in scans]
    views = []
    for number in range(NUM_VIEWS):
        which = number % len(scans)
        reader, body, scaling = facts[which]
        prior = sample_prior(generator(seed, 1, str(which), number), reader.shape, crops, body)
        views.append(render(read_padded(reader, prior.box, AIR), encoder.size, prior.flip, *scaling))
    return torch.from_numpy(np.stack(views))[:, None]
