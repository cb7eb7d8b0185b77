"""Crop boxes and flips, drawn and recorded before anything is done (paper, Sec. 3.2)."""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from pgl_ray.config import AlignConfig, CropConfig, ViewsConfig
from pgl_ray.prior import Prior, overlap_share

OVERLAP_OF: Literal["smaller"] = "smaller"  # box: the paper asks for 10 % and does not say of what
TRIES, FURTHER_TRIES = 16, 512


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
        further = np.stack([np.random.default_rng(seed).random((FURTHER_TRIES, 4, 3)) for seed in seeds])
        around = None if body is None else body[some]
        boxes[some], held[some] = _tried(further, shape[some], views, around)
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
