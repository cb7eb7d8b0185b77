"""The voxel probe: a linear classifier names the organ of single voxels from a frozen encoder's features there.

It needs a handful of labelled scans and seconds, so it compares encoders long before a fine-tuning would.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl_ray.config import FailedRun, ProbeSettings
from pgl_ray.data.random_numbers import generator
from pgl_ray.data.rendering import AIR, normalise
from pgl_ray.data.scan_files import open_label, open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index, check_labelled, class_lookup
from pgl_ray.data.voxel_statistics import BODY_HU
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder

BACKGROUND = "background"
L2 = 1e-3  # of the classifier, times the number of features: then wide and narrow encoders are held alike
MAX_ITERATIONS = 300  # of L-BFGS


@dataclass(frozen=True)
class VoxelScore:
    """What the classifier reached.

    Attributes:
        balanced_accuracy: mean recall over the classes that occur among the test voxels.
        recall: of background and every organ that occurs among the test voxels; an organ that no training scan showed
            counts as 0.
        hits, counts: int [test scans, classes], voxels that were named rightly and voxels asked, for intervals.
    """

    balanced_accuracy: float
    recall: dict[str, float]
    hits: np.ndarray
    counts: np.ndarray


class VoxelProbe:
    """Labelled scans that are read once and judge any number of encoders, by the same voxels.

    Keeps the scans' voxels in memory, 2 bytes each.
    """

    def __init__(self, index: Index, config: ProbeSettings):
        """
        Args:
            index: a store with labels.
            config: its `index` only serves messages.

        Raises:
            ValueError: no labelled scans.
        """
        self.names = {0: BACKGROUND} | dict(enumerate(sorted(index.labels, key=lambda name: index.labels[name]), 1))
        self.scans = choose_scans(index, config)
        self.train, self.test = ([read_sample(index, scan, config) for scan in scans] for scans in self.scans)
        self.has_more = len(index.labelled(config.split)) > len(self.train)  # labelled scans than are learnt from
        seen, asked = self._classes(self.train), self._classes(self.test)
        self.unseen = [self.names[k] for k in sorted(asked - seen)]

    @staticmethod
    def _classes(samples: list["Sample"]) -> set[int]:
        return {k for sample in samples for k in sample.classes.tolist()}

    def check(self, config: ProbeSettings) -> None:
        """Refuses scans that no classifier can be trained or tested on.

        Raises:
            ValueError: too few to tell two classes apart.
        """
        seen, num_test = self._classes(self.train), sum(len(sample.classes) for sample in self.test)
        if len(seen) >= 2 and num_test:
            return
        mends = [f"raise num_scans={config.num_scans}"] * self.has_more or ["annotate more organs"]
        mends += [] if num_test else [f"raise num_test_scans={config.num_test_scans}"]
        only = "; judges=[decoder] and [matching] need one organ alone" if len(seen) == 1 else ""
        raise ValueError(
            f"index={config.index}: the scans drawn show {len(seen)} classes to train on and {num_test} voxels to test "
            f"on: {' or '.join(mends)}{only}"
        )

    def features(self, encoder: Encoder | ResEncoder) -> list[list[tuple[Tensor, Tensor]]]:
        """Features and classes of the drawn voxels, of training and test scans, by scan; see `scan_features`.

        Args:
            encoder: in eval mode, so that a voxel's features depend only on its window; on the device to compute on.
        """
        return [[scan_features(encoder, sample) for sample in part] for part in (self.train, self.test)]

    def score(self, samples: list[list[tuple[Tensor, Tensor]]], columns: slice = slice(None)) -> VoxelScore:
        """Trains and tests the classifier.

        Args:
            samples: from `features`.
            columns: of the features, e.g. only those of the last map.

        Raises:
            FailedRun: features that are not finite.
        """
        (x, y), (x_test, y_test) = (tuple(torch.cat(parts) for parts in zip(*part)) for part in samples)
        x, x_test = x[:, columns], x_test[:, columns]
        if not (x.isfinite().all() and x_test.isfinite().all()):
            raise FailedRun("the encoder's features are not finite")
        mean, std = x.mean(0), x.std(0)
        scale = torch.where(std > 1e-4 * mean.abs(), 1 / std, 0)  # a constant feature says nothing
        weight, bias = fit_linear((x - mean) * scale, y, len(self.names))
        hit = ((x_test - mean) * scale @ weight + bias).argmax(1) == y_test
        recall = {self.names[k]: hit[y_test == k].float().mean().item() for k in y_test.unique().tolist()}
        sizes = [len(classes) for _, classes in samples[1]]
        by_scan = list(zip(hit.cpu().split(sizes), y_test.cpu().split(sizes)))
        hits, counts = (
            np.array([of[chosen].bincount(minlength=len(self.names)).tolist() for of, chosen in each])
            for each in (
                [(of, right) for right, of in by_scan],
                [(of, torch.ones_like(right)) for right, of in by_scan],
            )
        )
        return VoxelScore(float(np.mean(list(recall.values()))), recall, hits, counts)


def drawn_accuracies(hits: np.ndarray, counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The balanced accuracy of bootstrap draws of the test scans.

    Args:
        hits, counts: of a `VoxelScore`.
        draws: how often each scan is drawn, int [draws, test scans].

    Returns:
        float [draws].
    """
    num = draws @ counts
    with np.errstate(invalid="ignore"):
        recall = np.where(num > 0, draws @ hits / num, np.nan)
    return np.nanmean(recall, 1)


def choose_scans(index: Index, config: ProbeSettings) -> tuple[list[ScanRecord], list[ScanRecord]]:
    """Scans to train on, drawn with the seed, and to test on, the first ones by scan_id; none is in both.

    Raises:
        ValueError: a split without labelled scans.
    """
    check_labelled(index, config.index)
    pool = index.labelled(config.split)
    order = np.random.default_rng((config.seed, 1)).permutation(len(pool))
    train = [pool[i] for i in order[: config.num_scans]]
    trained_on = {scan.scan_id for scan in train}
    pool = [scan for scan in index.labelled(config.test_split) if scan.scan_id not in trained_on]
    test = pool[: config.num_test_scans]
    for key, split, scans in (("split", config.split, train), ("test_split", config.test_split, test)):
        if not scans:
            raise ValueError(
                f"{key}={split!r}: no labelled scan left there in {config.index}; it has labels in "
                f"{index.labelled_splits}"
            )
    return train, test


# -- voxels -----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What a probe keeps of a scan.

    Attributes:
        volume: int16 HU [D, H, W], at least a window on every axis.
        voxels, classes: those drawn, int64 [voxels, 3] and [voxels].
        size: of the windows.
        scaling: HU window, mean and standard deviation.
    """

    volume: np.ndarray
    voxels: np.ndarray
    classes: np.ndarray
    size: tuple[int, int, int]
    scaling: tuple


def window_size(config: ProbeSettings) -> tuple[int, int, int]:
    """The window that the encoder sees, voxels (D, H, W).

    Raises:
        ValueError: it is still left to the views of the training.
    """
    if config.size is None:
        raise ValueError("size=null: give the window that the encoder sees, e.g. size=[16,96,96]")
    return config.size


def read_sample(index: Index, scan: ScanRecord, config: ProbeSettings) -> Sample:
    """Reads a scan and draws its voxels; a scan smaller than a window is continued by air."""
    whole = np.array([(0, size) for size in scan.shape])
    volume = open_volume(index.store, scan).read(whole)
    drawn = draw_voxels(index, scan, volume, open_label(index.store, scan).read(whole), config)
    size = window_size(config)
    short = [(0, max(0, least - length)) for least, length in zip(size, volume.shape)]
    volume = np.pad(volume, short, constant_values=AIR)
    return Sample(volume, *drawn, size, (index.hu_window, scan.mean_hu, scan.std_hu))


def scan_features(encoder: Encoder | ResEncoder, sample: Sample) -> tuple[Tensor, Tensor]:
    """Features and classes of the voxels drawn from one scan.

    The scan is covered by windows that overlap by half; a voxel is read in the window whose centre is nearest.

    Returns:
        float32 [voxels, sum of channels] and int64 [voxels], on the encoder's device.
    """
    volume, voxels, classes, size, scaling = sample
    device = next(encoder.parameters()).device
    starts, window_of = assign_windows(voxels, volume.shape, size)
    features = torch.empty(len(voxels), sum(encoder.channels[: encoder.last + 1]), device=device)
    for number, start in enumerate(starts):
        part = volume[tuple(slice(s, s + length) for s, length in zip(start, size))]
        crop = torch.from_numpy(normalise(part, *scaling)).to(device)
        inside = np.flatnonzero(window_of == number)
        point = torch.from_numpy(voxels[inside] - start + 0.5).to(device)  # the voxel's middle, window edge coordinates
        with torch.no_grad():
            maps = encoder(crop[None, None])
        levels = zip(maps, encoder.strides, encoder.centers, strict=False)
        features[torch.from_numpy(inside).to(device)] = torch.cat(
            [read_map(m[0], point, s, c) for m, s, c in levels], 1
        )
    return features, torch.from_numpy(classes).to(device)


def draw_voxels(
    index: Index, scan: ScanRecord, volume: np.ndarray, label: np.ndarray, config: ProbeSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `voxels_per_class` voxels of every class; the same ones whatever the encoder.

    Background is a voxel of label 0 in the body (above -500 HU). A scan in which some organ is not annotated gives
    none: the organ may hide there.

    Args:
        volume, label: [D, H, W], the whole scan.

    Returns:
        Voxel indices int64 [voxels, 3] and classes int64 [voxels].
    """
    rng = generator(config.seed, 0, scan.scan_id, 0)
    candidates = [(value, np.argwhere(label == value)) for value in index.label_values if value in scan.label_voxels]
    candidates = [(value, indices) for value, indices in candidates if value in scan.labelled]
    if set(scan.labelled) >= set(index.label_values):
        candidates.insert(0, (0, np.argwhere((label == 0) & (volume > BODY_HU))))
    lookup = class_lookup(index.label_values)
    voxels, classes = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)]
    for value, indices in candidates:
        chosen = rng.choice(len(indices), min(config.voxels_per_class, len(indices)), replace=False)
        voxels.append(indices[chosen])
        classes.append(np.full(len(chosen), lookup[value], np.int64))
    return np.concatenate(voxels), np.concatenate(classes)


def assign_windows(voxels: np.ndarray, shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Windows that cover the voxels, and the one whose centre is nearest to each voxel.

    Args:
        voxels: int [voxels, 3].
        shape: of the volume, at least `size` on every axis.
        size: of the windows.

    Returns:
        First voxels of the windows that are needed, int [windows, 3], and the window of each voxel, int [voxels].
    """
    first = np.empty_like(voxels)
    for axis, (length, window) in enumerate(zip(shape, size)):
        starts = np.append(np.arange(0, length - window, max(1, window // 2)), length - window)
        middle = voxels[:, axis, None] + 0.5
        first[:, axis] = starts[np.abs(middle - (starts + window / 2)).argmin(1)]
    starts, window_of = np.unique(first, axis=0, return_inverse=True)
    return starts, window_of.reshape(-1)


def read_map(feature_map: Tensor, point: Tensor, stride: tuple[int, ...], center: tuple[float, ...]) -> Tensor:
    """Trilinear interpolation where the cells' receptive fields are centred; clamped to the outermost.

    Args:
        feature_map: [C, d, h, w].
        point: [points, 3] edge coordinates in the encoder's input; a point at u lies at index (u - center) / stride.
        stride, center: of the map, per axis.

    Returns:
        [points, C].
    """
    sizes = torch.tensor(feature_map.shape[1:], device=point.device)
    position = (point - torch.tensor(center, device=point.device)) / torch.tensor(stride, device=point.device)
    position = torch.minimum(position.clamp_min(0), sizes - 1)
    low = position.long()
    high, share = torch.minimum(low + 1, sizes - 1)[:, None], (position - low)[:, None]
    upper = torch.tensor(list(product((False, True), repeat=3)), device=point.device)  # [corners, axes]
    d, h, w = torch.where(upper, high, low[:, None]).unbind(2)
    weights = torch.where(upper, share, 1 - share).prod(2).to(feature_map.dtype)
    cell, values = (d * sizes[1] + h) * sizes[2] + w, feature_map.flatten(1)
    if cell.numel() < values.shape[1]:  # few points: what they read is laid out by cells, not the whole map
        cell, values = torch.arange(cell.numel(), device=cell.device).view_as(cell), values[:, cell.flatten()]
    return F.embedding_bag(cell, values.T.contiguous(), mode="sum", per_sample_weights=weights)


# -- the classifier ---------------------------------------------------------------------------------------------------


def fit_linear(features: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression in which all classes weigh the same, by L-BFGS on the full batch.

    Minimises the mean over classes of a class' mean cross-entropy, plus L2 * F / 2 times the squared weights.

    Args:
        features: [voxels, F], standardised.
        classes: int64 [voxels].
        num_classes: outputs; a class that does not occur gets no voxel later either.

    Returns:
        Weights [F, num_classes] and biases [num_classes].
    """
    counts = classes.bincount(minlength=num_classes)
    share = (1 / (counts * (counts > 0).sum()))[classes]
    weight = features.new_zeros(features.shape[1], num_classes).requires_grad_()
    bias = torch.where(counts > 0, 0.0, -1e4).to(features).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(features @ weight + bias, classes, reduction="none")
        value = (share * entropy).sum() + L2 * features.shape[1] / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
