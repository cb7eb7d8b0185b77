"""Views and patches: sample what will be done, record it, then do it (paper, Sec. 3.2).

Everything random is drawn from one Generator per (seed, epoch, scan, draw), so a view can be made again anywhere.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from pgl_ray.config import AlignConfig, CropConfig, IntensityConfig, ViewsConfig
from pgl_ray.data import kernels
from pgl_ray.prior import Prior, overlap_share

OVERLAP_OF = "smaller"  # box: the paper asks for 10 % and does not say of what
TRIES, FURTHER_TRIES = 16, 512
_STEP = -0x61C8864680B583EB  # of splitmix64's counter, modulo 2**64


@lru_cache(maxsize=2**12)
def _scan_key(scan_id: str) -> int:
    return int.from_bytes(hashlib.sha256(scan_id.encode()).digest()[:8], "little")


def generator(seed: int, epoch: int, scan_id: str, draw: int) -> np.random.Generator:
    """The random numbers of one draw from one scan in one epoch, for what is drawn one by one."""
    return np.random.default_rng((seed, epoch, _scan_key(scan_id), draw))


def uniforms(
    seed: int, epoch: np.ndarray, scan_ids: Sequence[str], draw: np.ndarray, num: int, of: int = 0
) -> np.ndarray:
    """The random numbers of many draws at once; each row depends on its own (seed, epoch, scan, draw) alone.

    A counter through splitmix64 (Steele et al. 2014), as `noise`.

    Args:
        seed: of the run.
        epoch, draw: int [N].
        scan_ids: [N].
        num: numbers per draw.
        of: another number, another kind of draw.

    Returns:
        float64 [N, num], in [0, 1).
    """
    scan = np.array([_scan_key(each) for each in scan_ids], np.uint64).view(np.int64)
    state = torch.full((len(scan),), seed) ^ _mix(torch.tensor(of + 1))
    for part in (scan, epoch, draw):
        state = _mix(state + _STEP) ^ torch.from_numpy(part.copy())
    bits = _mix(_mix(state + _STEP)[:, None] + torch.arange(1, num + 1) * _STEP)
    return ((bits >> 11) & (2**53 - 1)).numpy() * 2.0**-53


# -- sampling ---------------------------------------------------------------------------------------------------------


def sample_boxes(u: np.ndarray, shape: np.ndarray, views: CropConfig, body: np.ndarray | None = None) -> np.ndarray:
    """Crop boxes from uniform random numbers.

    Per axis the crop's length is a whole number within `crop_scale` times the view size. Where a scan is smaller than
    the crop, the box reaches beyond the scan by a random part on either side; what lies outside is air.

    Args:
        u: [..., 2, 3], for length and place.
        shape: of the scan, int [..., 3].
        views: sizes, scales and whether the middle is a foreground voxel.
        body: the scan's foreground box, int [..., 3, 2]; used with `views.foreground`.

    Returns:
        int64 [..., 3, 2].
    """
    length = _lengths(u[..., 0, :], views)
    places = _places(shape, length, views, body)
    return _boxes(places.starts((u[..., 1, :] * places.num).astype(np.int64)), length)


def _boxes(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    return np.stack([start, start + length], -1)


def _lengths(u: np.ndarray, views: CropConfig) -> np.ndarray:
    least, past = _length_range(views.size, views.crop_scale)
    return least + (u * (past - least)).astype(np.int64)


class _Places(NamedTuple):
    """Where boxes may stand along an axis, all places being as likely; int [..., 3] each.

    Attributes:
        first: start of place 0, before it is brought into the range of starts.
        num: of places.
        low, high: first and last start. Several places share one where a foreground's middle is near the border.
    """

    first: np.ndarray
    num: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def starts(self, place: np.ndarray) -> np.ndarray:
        """Starts of boxes at these places."""
        return np.clip(self.first + place, self.low, self.high)

    def between(self, least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First place whose start lies in [least, most], and how many do, at most 0 where none."""
        begin = np.where(least <= self.low, 0, np.maximum(least - self.first, 0))
        end = np.where(most >= self.high, self.num, np.minimum(most - self.first + 1, self.num))
        return begin, end - begin


def _places(shape: np.ndarray, length: np.ndarray, views: CropConfig, body: np.ndarray | None) -> _Places:
    """Places of boxes of these lengths; all arguments as in `sample_boxes`."""
    low, past = start_range(shape, length)
    if views.foreground and body is not None:
        return _Places(body[..., 0] - length // 2, body[..., 1] - body[..., 0], low, past - 1)
    return _Places(low, past - low, low, past - 1)


def sample_prior(
    rng: np.random.Generator, shape: tuple[int, int, int], views: CropConfig, body: tuple[int, ...] | None = None
) -> Prior:
    """Draws one crop box and its flips.

    Args:
        rng: random numbers.
        shape: of the scan (D, H, W).
        views: sizes, scales and flip probability.
        body: the scan's foreground box (d0, d1, h0, h1, w0, w1); used with `views.foreground`.
    """
    bounds = None if body is None else np.reshape(body, (3, 2))
    return Prior(sample_boxes(rng.random((2, 3)), np.asarray(shape), views, bounds), rng.random(3) < views.flip_prob)


@lru_cache(maxsize=16)
def _length_range(size: tuple[int, int, int], scale: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last length of a crop."""
    least, most = np.ceil(scale[0] * np.asarray(size) - 1e-9), np.floor(scale[1] * np.asarray(size) + 1e-9)
    return least.astype(np.int64), np.maximum(least, most).astype(np.int64) + 1


def largest_crop(views: CropConfig) -> tuple[int, int, int]:
    """Voxels per axis that no crop exceeds."""
    return tuple((_length_range(views.size, views.crop_scale)[1] - 1).tolist())


def start_range(shape: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last start of a box of a length: inside the scan, or around it where the scan is smaller."""
    room = np.asarray(shape) - length
    return np.minimum(room, 0), np.maximum(room, 0) + 1


def centred_start(
    rng: np.random.Generator, box: tuple[int, ...], shape: tuple[int, int, int], length: np.ndarray
) -> np.ndarray:
    """Start of a box whose middle is a random voxel of another box, as far as the scan's borders allow.

    Args:
        rng: random numbers.
        box: (d0, d1, h0, h1, w0, w1) that the middle is drawn from.
        shape: of the scan.
        length: int [3], of the box to place.
    """
    bounds = np.asarray(box).reshape(3, 2)
    low, high = start_range(shape, length)
    return np.clip(rng.integers(bounds[:, 0], bounds[:, 1]) - length // 2, low, high - 1)


def ablated(views: ViewsConfig, align: AlignConfig) -> ViewsConfig:
    """The views of an ablation: without flips (`align.flip=false`), without scaling (`align.crop=false`)."""
    flips = {} if align.flip else {"flip_prob": 0.0}
    return views.model_copy(update=flips if align.crop else flips | {"crop_scale": (1.0, 1.0)})


PAIR_NUMBERS = 6 + 12 * TRIES  # uniform numbers that a pair's priors take


def sample_pairs(
    u: np.ndarray,
    shape: np.ndarray,
    views: ViewsConfig,
    body: np.ndarray | None = None,
    shared_box: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the priors of many pairs; the two boxes of each overlap by at least `views.min_overlap`.

    Their law is that of two boxes by `sample_boxes`, both drawn again until the bound holds, in scans of any size.
    Bounds so high that it fails TRIES + FURTHER_TRIES times are met by force: the last second box is moved towards the
    first one's middle; where even the middle is not enough it takes the first one's size, too.

    Args:
        u: [N, PAIR_NUMBERS], uniform random numbers.
        shape: of the scans, int [N, 3].
        views: sizes, scales, flip probability and the bound.
        body: the scans' foreground boxes, int [N, 3, 2]; used with `views.foreground`.
        shared_box: both views take one box (`align.crop=false`); their flips differ.

    Returns:
        int64 [N, 2, 3, 2] boxes and bool [N, 2, 3] flips.
    """
    flips, tries = u[:, :6].reshape(-1, 2, 3) < views.flip_prob, u[:, 6:].reshape(-1, TRIES, 4, 3)
    if shared_box:
        box = sample_boxes(tries[:, 0, :2], shape, views, body)
        return np.stack([box, box], 1), flips
    boxes, held = _tried(tries, shape, views, body)
    left = np.flatnonzero(~held)  # few pairs of the default bound
    for some in (left[at : at + 64] for at in range(0, len(left), 64)):  # their tries take room
        seeds = (u[some, -1] * 2**53).astype(np.int64).tolist()
        more = np.stack([np.random.default_rng(seed).random((FURTHER_TRIES, 4, 3)) for seed in seeds])
        around = None if body is None else body[some]
        boxes[some], held[some] = _tried(more, shape[some], views, around)
    if not held.all():
        boxes[~held, 1] = _moved(boxes[~held, 0], boxes[~held, 1], shape[~held], views)
    return boxes, flips


def _tried(
    u: np.ndarray, shape: np.ndarray, views: ViewsConfig, body: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first of several tries, [N, tries, 4, 3], that holds the bound, else the last: int64 [N, 2, 3, 2], and
    whether it does, bool [N]."""
    shape, body = shape[:, None], None if body is None else body[:, None]
    first = sample_boxes(u[..., :2, :], shape, views, body)
    second, holds = _second_boxes(u[..., 2:, :], first, shape, views, body)
    holds &= overlap_share(first, second, OVERLAP_OF) >= views.min_overlap
    held = holds.any(1)
    taken = np.where(held, holds.argmax(1), u.shape[1] - 1)
    return np.stack([first, second], 2)[np.arange(len(u)), taken], held


def _second_boxes(
    u: np.ndarray, first: np.ndarray, shape: np.ndarray, views: ViewsConfig, body: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws boxes, nearly all of them where they overlap the first ones, without a change of the law given the bound.

    A share of the volume is at most the share along any axis, so only places that overlap that much along each axis
    can hold the bound. `_crowd` is at least the share of them among a box's places, whatever the first box and the
    lengths are. Each takes one of num * crowd slots: its chance, 1 / (num * crowd), is that of a draw from all places
    times a constant, near a border and for every length alike; the slots that are left over are draws in vain.

    Args:
        u: [..., 2, 3], for length and place.
        first: int64 [..., 3, 2].
        shape, views, body: as in `sample_boxes`.

    Returns:
        int64 [..., 3, 2], and bool [...] of draws not in vain.
    """
    length, other = _lengths(u[..., 0, :], views), first[..., 1] - first[..., 0]
    places = _places(shape, length, views, body)
    least = np.maximum(np.ceil(views.min_overlap * np.minimum(length, other) - 1e-9).astype(np.int64), 1)
    begin, num = places.between(first[..., 0] + least - length, first[..., 1] - least)
    slot = (u[..., 1, :] * (_crowd(shape, views, body) * places.num)).astype(np.int64)
    place = np.clip(begin + np.minimum(slot, num - 1), 0, places.num - 1)
    return _boxes(places.starts(place), length), (slot < num).all(-1)


def _crowd(shape: np.ndarray, views: ViewsConfig, body: np.ndarray | None) -> np.ndarray:
    """A bound of the share of a box's places, along each axis, that overlap another box enough; float64 [..., 3]."""
    least, past = _length_range(views.size, views.crop_scale)
    most = past - 1
    # two boxes have as many offsets as their lengths' sum + 1 less twice the overlap asked for: the most for the
    # longest one and either the longest or the shortest
    offsets = most + 1 + np.maximum(*(length - 2 * views.min_overlap * length for length in (least, most)))
    if views.foreground and body is not None:
        num = body[..., 1] - body[..., 0]
        offsets = offsets + np.maximum(most // 2 - body[..., 0], 0)  # places that share the first start
        offsets = offsets + np.maximum((most + 1) // 2 + body[..., 1] - 1 - shape, 0)  # or the last
    else:
        num = np.maximum(np.maximum(least - shape, shape - most), 0) + 1  # of the length nearest to the scan's
    return np.minimum(offsets / num, 1.0)


def _moved(first: np.ndarray, second: np.ndarray, shape: np.ndarray, views: ViewsConfig) -> np.ndarray:
    """Second boxes, brought so near to the first ones that they overlap enough, all [N, 3, 2]."""
    tried = []
    for shaped in (second, first):
        length = shaped[..., 1] - shaped[..., 0]
        low, high = start_range(shape, length)
        middle = np.clip(first.sum(-1) // 2 - length // 2, low, high - 1)
        begin = np.clip(second[..., 0], low, high - 1)
        part = np.linspace(0, 1, 33)[1:, None]
        start = np.rint(begin[:, None] + part * (middle - begin)[:, None]).astype(np.int64)
        tried.append(np.stack([start, start + length[:, None]], -1))
    tried = np.concatenate(tried, 1)
    enough = overlap_share(first[:, None], tried, OVERLAP_OF) >= views.min_overlap
    assert enough.any(1).all(), "a box of the same size and middle overlaps wholly"
    return tried[np.arange(len(tried)), enough.argmax(1)]


def sample_pair(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    views: ViewsConfig,
    body: tuple[int, ...] | None = None,
    shared_box: bool = False,
) -> tuple[Prior, Prior]:
    """`sample_pairs` of one scan.

    Args:
        rng: random numbers.
        shape: of the scan (D, H, W).
        views, shared_box: as in `sample_pairs`.
        body: the scan's foreground box (d0, d1, h0, h1, w0, w1).
    """
    bounds = None if body is None else np.reshape(body, (1, 3, 2))
    (boxes,), (flips,) = sample_pairs(rng.random((1, PAIR_NUMBERS)), np.array([shape]), views, bounds, shared_box)
    return Prior(boxes[0], flips[0]), Prior(boxes[1], flips[1])


REGION_SCALE = 2  # a region's size as a multiple of the view size


def sample_regions(
    u: np.ndarray, shape: np.ndarray, chunk: np.ndarray, views: CropConfig, body: np.ndarray | None = None
) -> np.ndarray:
    """Draws the parts of scans that several pairs each are cropped from. They are made of whole chunks, so nothing is
    decoded that no pair can show.

    Args:
        u: [N, 3], uniform random numbers.
        shape: of the scans, int [N, 3].
        chunk: of their arrays, int [N, 3].
        views: size, scales and foreground.
        body: the scans' foreground boxes, int [N, 3, 2]; with `views.foreground` a region holds a voxel of them.

    Returns:
        int64 [N, 3, 2], inside the scan: REGION_SCALE times the view size, or more where crops may be as large, in
        whole chunks; a rest of the scan that is smaller than a chunk is taken along.
    """
    least = np.ceil(max(REGION_SCALE, views.crop_scale[1]) * np.asarray(views.size)).astype(np.int64)
    length = -(-least // chunk) * chunk
    room = np.maximum(shape - length, 0)
    if views.foreground and body is not None:
        middle = body[..., 0] + (u * (body[..., 1] - body[..., 0])).astype(np.int64)
        start = np.clip(middle - length // 2, 0, room)
    else:
        start = (u * (room + 1)).astype(np.int64)
    start = np.minimum((start + chunk // 2) // chunk, room // chunk) * chunk
    stop = start + length
    return np.stack([start, np.where(stop + chunk > shape, shape, stop)], -1)


def sample_pairs_in(
    region: np.ndarray,
    u: np.ndarray,
    views: ViewsConfig,
    body: np.ndarray | None = None,
    shared_box: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`sample_pairs` inside regions as if they were the scans; the boxes are in the scan frame.

    Args:
        region: int [N, 3, 2], by `sample_regions`.
        u, views, body, shared_box: as in `sample_pairs`; where a region and the foreground box have nothing in common,
            the whole region is the foreground.
    """
    origin = region[..., :1]
    if body is not None:
        inside = np.clip(body, origin, region[..., 1:])
        held = (inside[..., 0] < inside[..., 1]).all(-1)[:, None, None]
        body = np.where(held, inside, region) - origin
    boxes, flips = sample_pairs(u, region[..., 1] - region[..., 0], views, body, shared_box)
    return boxes + origin[:, None], flips


class Intensity(NamedTuple):
    """Sampled intensity operations of one view; the neutral values mean `not applied`."""

    noise_std: float  # 0: none
    noise_seed: int
    blur_sigma: float  # voxels; 0: none
    gain: float  # 1: none
    gamma: float  # 1: none


INTENSITY_NUMBERS = 9  # uniform numbers that a view's intensity operations take


def sample_intensities(u: np.ndarray, config: IntensityConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws operations 3 to 6 of Sec. 3.2 for many views.

    Args:
        u: [..., INTENSITY_NUMBERS], uniform random numbers.
        config: probabilities and ranges.

    Returns:
        float64 [..., 4] of noise_std, blur_sigma, gain, gamma, and int64 [...] of noise_seed, as in `Intensity`.
    """
    ranges = np.array([config.noise_variance, config.blur_sigma, config.gain, config.gamma])
    drawn = ranges[:, 0] + u[..., 4:8] * (ranges[:, 1] - ranges[:, 0])
    drawn[..., 0] = np.sqrt(drawn[..., 0])
    chosen = u[..., :4] < (config.noise_prob, config.blur_prob, config.gain_prob, config.gamma_prob)
    return np.where(chosen, drawn, (0.0, 0.0, 1.0, 1.0)), (u[..., 8] * 2**53).astype(np.int64)


def sample_intensity(rng: np.random.Generator, config: IntensityConfig) -> Intensity:
    """`sample_intensities` of one view."""
    (std, *others), seed = sample_intensities(rng.random(INTENSITY_NUMBERS), config)
    return Intensity(float(std), int(seed), *map(float, others))


# -- rendering --------------------------------------------------------------------------------------------------------


def normalise(voxels: np.ndarray, window: tuple[float, float], mean: float, std: float) -> np.ndarray:
    """Clips HU to the window, then subtracts the scan's mean and divides by its standard deviation (Sec. 5.1).

    Args:
        voxels: HU, any shape.
        window: HU bounds.
        mean, std: of the scan's clipped voxels, HU; a std below 1 HU (a blank scan) counts as 1, for float16's range.

    Returns:
        float32 of the same shape.
    """
    clipped = np.clip(voxels.astype(np.float32), *window)
    return (clipped - np.float32(mean)) / np.float32(max(std, 1.0))


class Stored(Protocol):
    """An array that boxes are read of, as `data.shard.ArrayReader`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In voxels."""

    def read_boxes(self, boxes: Any, /) -> list[np.ndarray]:
        """The voxels of each of several boxes, int [3, 2], inside the array."""


def read_padded(reader: Stored, box: np.ndarray, fill: int) -> np.ndarray:
    """Reads a box that may reach beyond the array; voxels outside are `fill`.

    Args:
        reader: of the array.
        box: int [3, 2].
        fill: value outside.
    """
    return read_all_padded(reader, [box], fill)[0]


def read_all_padded(reader: Stored, boxes: Sequence[np.ndarray], fill: int) -> list[np.ndarray]:
    """`read_padded` of several boxes in one go: what they share is read once."""
    boxes = [np.asarray(box).tolist() for box in boxes]  # a crop's few numbers are quicker in plain Python
    insides = [
        [[min(max(edge, 0), size) for edge in axis] for axis, size in zip(box, reader.shape, strict=True)]
        for box in boxes
    ]
    found = reader.read_boxes(insides)
    return [_padded(*each, fill) for each in zip(found, insides, boxes, strict=True)]


class Region(NamedTuple):
    """A part of a scan in memory, to be read as the scan is.

    Attributes:
        voxels: of the part.
        start: of the part in the scan.
        shape: of the scan.
    """

    voxels: np.ndarray
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    def read_boxes(self, boxes: Sequence[list[list[int]]]) -> list[np.ndarray]:
        """Voxels of boxes that lie inside the part, int [3, 2] in the scan frame; cuts of `voxels`, not copies."""
        d, h, w = self.start
        return [self.voxels[a - d : b - d, e - h : f - h, p - w : q - w] for (a, b), (e, f), (p, q) in boxes]


def _padded(voxels: np.ndarray, inside: list[list[int]], box: list[list[int]], fill: int) -> np.ndarray:
    if inside == box:
        return voxels
    padded = np.full([stop - start for start, stop in box], fill, voxels.dtype)
    starts = [first - start for (first, _), (start, _) in zip(inside, box, strict=True)]
    padded[tuple(slice(s, s + n) for s, n in zip(starts, voxels.shape, strict=True))] = voxels
    return padded


def resize_and_flip(crop: np.ndarray, size: tuple[int, int, int], flip: np.ndarray, mode: str = "trilinear") -> Tensor:
    """Resizes a crop to the view size in the half-pixel convention, then flips it.

    Half-pixel (align_corners=False) keeps box coordinates linear, which Eq. 6 relies on.

    Args:
        crop: float32 [d, h, w].
        size: P (D, H, W).
        flip: bool [3].
        mode: trilinear, or nearest-exact for labels.

    Returns:
        float32 [D, H, W].
    """
    tensor = torch.from_numpy(np.ascontiguousarray(crop))[None, None]
    align = False if mode == "trilinear" else None
    tensor = F.interpolate(tensor, size=size, mode=mode, align_corners=align)[0, 0]
    return tensor.flip([axis for axis in range(3) if flip[axis]])


def render(
    crop: np.ndarray, size: tuple[int, int, int], flip: np.ndarray, window: tuple[float, float], mean: float, std: float
) -> Tensor:
    """Window, z-score, resize and flip of a crop: `resize_and_flip(normalise(crop))` to 1e-5, in one compiled pass.

    Args:
        crop: int16 [d, h, w], HU.
        size: P (D, H, W).
        flip: bool [3].
        window, mean, std: as in `normalise`.

    Returns:
        float32 [D, H, W].
    """
    compiled = kernels.load() if crop.dtype == np.int16 else None
    if compiled is None:
        return resize_and_flip(normalise(crop, window, mean, std), size, flip)
    tables = [_table(old, new, bool(back)) for old, new, back in zip(crop.shape, size, flip, strict=True)]
    scale = 1 / max(std, 1.0)
    numbers = [np.float32(value) for value in (*window, scale, -mean * scale)]
    view = torch.empty(tuple(size))
    if crop.strides[2] != 2 or min(crop.strides) < 2:
        crop = np.ascontiguousarray(crop)
    (planes, rows, _), (depth, height, width) = (step // 2 for step in crop.strides), crop.shape
    line = as_strided(crop, ((depth - 1) * planes + (height - 1) * rows + width,), (2,))
    compiled.resize(line, planes, rows, height, width, *numbers, *tables, view.numpy())
    return view


def render_each(
    crops: Tensor, box: Tensor, flip: Tensor, size: tuple[int, int, int], window: Sequence[float], scaling: Tensor
) -> Tensor:
    """`render` of a batch of crops of any sizes, on any device: along each axis one product with a matrix per crop.

    Args:
        crops: [N, 1, d, h, w], HU, each in the first corner of its array.
        box: int [N, 3, 2], whose lengths are the crops'.
        flip: [N, 3], not 0 where flipped.
        size: P (D, H, W).
        window: HU bounds.
        scaling: float32 [N, 2], mean and standard deviation in HU.

    Returns:
        float32 [N, 1, D, H, W], as `render`'s to 1e-4.
    """
    views = crops.float().clamp(*window)
    length = box[..., 1] - box[..., 0]
    z, y, x = (
        _matrices(length[:, axis], flip[:, axis], views.shape[2 + axis], size[axis])[:, None] for axis in range(3)
    )
    views = (z @ views.flatten(3)).unflatten(3, views.shape[3:])
    views = y[:, None] @ views @ x[:, None].mT
    mean, std = scaling[:, :, None, None, None, None].unbind(1)
    return (views - mean) / std.clamp_min(1)


def _matrices(length: Tensor, flip: Tensor, num: int, new: int) -> Tensor:
    """`_table` of a batch, float32 [N, new, num]; voxels from `length` on weigh nothing."""
    at = torch.arange(new, device=length.device, dtype=torch.float64) + 0.5
    ratio = (length.float() / new).double()
    at = (ratio[:, None] * at - 0.5).float().clamp_min(0)
    at = torch.where(flip.bool()[:, None], at.flip(1), at)
    at = torch.minimum(at, (length - 1).float()[:, None])
    return (1 - (at[:, :, None] - torch.arange(num, device=length.device)).abs()).clamp_min(0)


@lru_cache(maxsize=1024)
def _table(old: int, new: int, back: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear resize of one axis in the half-pixel convention: (first voxel, second voxel, weight of the second)."""
    ratio = np.float64(np.float32(old) / np.float32(new))  # float32 with one rounding, as torch's fused multiply-add
    at = np.maximum((ratio * (np.arange(new) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(at.astype(np.int64), old - 1)
    weight = np.minimum(at - first.astype(np.float32), np.float32(1))
    parts = first.astype(np.uint64), np.minimum(first + 1, old - 1).astype(np.uint64), weight
    return tuple(np.ascontiguousarray(part[::-1] if back else part) for part in parts)


def apply_intensity(view: Tensor, params: Intensity) -> Tensor:
    """Operations 3 to 6 of Sec. 3.2 on one view, in the paper's order.

    The paper raises voxels to a power after scaling them to [0, 1] and does not say whether they stay there; as the
    source it cites (nnU-Net) they are brought back to the view's range, so that augmented and plain views of one scan
    keep one scale.

    Args:
        view: float32 [D, H, W], z-scored.
        params: what was drawn.
    """
    compiled = kernels.load()
    if compiled:
        return torch.from_numpy(_apply_compiled(compiled, view.contiguous().numpy(), params))
    if params.noise_std > 0:
        view = torch.add(view, noise(torch.tensor([params.noise_seed]), view.shape)[0], alpha=params.noise_std)
    if params.blur_sigma > 0:
        view = blur(view, params.blur_sigma)
    if params.gain != 1:
        low, high = view.aminmax()
        view = (view * params.gain).clamp_(low, high)
    if params.gamma != 1:
        low, high = view.aminmax()
        span = (high - low).clamp_min(1e-6)
        view = ((view - low) / span).clamp(0, 1) ** params.gamma * span + low
    return view


def _apply_compiled(compiled: kernels.Kernels, view: np.ndarray, params: Intensity) -> np.ndarray:
    """`apply_intensity`: the view itself where nothing is to be done, else a new array."""
    if params.noise_std > 0:
        view = view.copy()
        compiled.normal(_noise_state(params.noise_seed), np.float32(params.noise_std), view.reshape(-1))
    if 0 < params.blur_sigma < 7 / 6:  # what rounds to a radius of at most 3
        view, sharp = np.empty_like(view), view
        compiled.blur(sharp, np.array(_taps(params.blur_sigma, 3), np.float32), view)
    elif params.blur_sigma > 0:
        view = blur(torch.from_numpy(view), params.blur_sigma).numpy()
    if params.gain != 1 or params.gamma != 1:
        out = np.empty_like(view)
        numbers = view.min(), view.max(), np.float32(params.gain), np.float32(params.gamma)
        compiled.gain_and_gamma(view.reshape(-1), *numbers, out.reshape(-1))
        return out
    return view


def _taps(sigma: float, radius: int) -> list[float]:
    """A sampled Gaussian from its middle outwards, as long as `radius`; 0 from three sigmas on. With its mirror image
    it sums to 1."""
    own = max(1, round(3 * sigma))
    taps = [math.exp(-0.5 * (at / sigma) ** 2) if at <= own else 0.0 for at in range(radius + 1)]
    return [tap / (2 * sum(taps) - taps[0]) for tap in taps]


def blur(view: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with a sampled kernel, of radius 3 for a sigma of 1, and replicated borders.

    Args:
        view: float32 [D, H, W].
        sigma: in voxels.
    """
    radius = max(1, round(3 * sigma))
    taps = torch.tensor(_taps(sigma, radius))
    taps, out = torch.cat([taps[1:].flip(0), taps]), view[None, None]
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0] * 6
        shape[2 + axis] = len(taps)
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        out = F.conv3d(F.pad(out, pad, mode="replicate"), taps.view(shape))
    return out[0, 0]


def apply_intensities(views: Tensor, intensity: Tensor, noise_seed: Tensor, max_sigma: float) -> Tensor:
    """`apply_intensity` of a whole batch with each view's own parameters, on any device.

    Every operation runs on all views, with neutral parameters where it was not drawn, so that nothing waits for the
    device. Agrees with `apply_intensity` to 1e-4.

    Args:
        views: [N, 1, D, H, W], z-scored.
        intensity: [N, 4] of noise_std, blur_sigma, gain, gamma.
        noise_seed: int64 [N].
        max_sigma: at least the largest blur_sigma.

    Returns:
        float32 [N, 1, D, H, W].
    """
    noise_std, sigma, gain, gamma = intensity.float()[:, :, None, None, None, None].unbind(1)
    out = views.float() + noise_std * noise(noise_seed, views.shape[1:])
    out = _blur_each(out, sigma, max(1, round(3 * max_sigma)))
    low, high = out.amin((1, 2, 3, 4), keepdim=True), out.amax((1, 2, 3, 4), keepdim=True)
    out = (out * gain).clamp(low, high)
    low, high = out.amin((1, 2, 3, 4), keepdim=True), out.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return torch.where(gamma == 1, out, ((out - low) / span).clamp(0, 1) ** gamma * span + low)


def _blur_each(views: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """`blur` with a sigma per view, [N, 1, 1, 1, 1]; 0: none. The kernel is as long as each sigma's own."""
    at = torch.arange(-radius, radius + 1, device=views.device)
    own = torch.floor(3 * sigma + 0.5).clamp_min(1)
    taps = torch.exp(-0.5 * (at / sigma.clamp_min(1e-3)) ** 2) * (at.abs() <= own)
    taps = taps / taps.sum(-1, keepdim=True)  # [N, 1, 1, 1, taps]
    for axis in (2, 3, 4):
        pad, size = [0] * 6, views.shape[axis]
        pad[2 * (4 - axis)] = pad[2 * (4 - axis) + 1] = radius
        padded = F.pad(views, pad, mode="replicate")
        views = sum(taps[..., i, None] * padded.narrow(axis, i, size) for i in range(2 * radius + 1))
    return views


def noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers from seeds, the same on every device to float32's rounding.

    A counter through splitmix64 (Steele et al. 2014), then Box and Muller's transform of two 24-bit halves.

    Args:
        seeds: int64 [N].
        shape: of each view.

    Returns:
        float32 [N, *shape].
    """
    num = math.prod(shape)
    bits = _mix(_mix(seeds)[:, None] + torch.arange(-(-num // 2), device=seeds.device) * _STEP)
    length = ((bits >> 40) & 0xFFFFFF).float().add_(1).div_(2**24).log_().mul_(-2).sqrt_()
    angle = ((bits >> 12) & 0xFFFFFF).float().mul_(2 * math.pi / 2**24)
    drawn = torch.stack([length * torch.cos(angle), length * torch.sin(angle)], 1)
    return drawn.flatten(1)[:, :num].reshape(len(seeds), *shape)


def _noise_state(seed: int) -> np.uint64:
    """`_mix` of one number."""
    state = seed & (2**64 - 1)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return np.uint64(state ^ (state >> 31))


def _mix(state: Tensor) -> Tensor:
    """splitmix64's output function on int64, which torch multiplies modulo 2**64."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & (2**33 - 1))
