"""What is drawn has the law that the paper states: pairs of crops against plain rejection in nested loops, intensity
operations against their stated distributions."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data.intensity_ops import INTENSITY_NUMBERS, sample_intensities, sample_intensity
from pgl_ray.data.random_numbers import uniforms
from pgl_ray.data.sampling import PAIR_NUMBERS, sample_pairs

NUM = 3000
SCANS = [(150, 512, 512), (24, 130, 200), (14, 300, 90), (300, 128, 128)]
CHANCE = 1e-4  # of a right law being called wrong, per comparison


def one_crop(rng: random.Random, shape, views, body) -> list[tuple[int, int]]:
    """A random crop: its length per axis a whole number in the range, its place uniform among those inside the scan
    (around it, where it is smaller), or its middle uniform in the body and then pushed inside the scan."""
    box = []
    for axis in range(3):
        shortest = math.ceil(views.crop_scale[0] * views.size[axis] - 1e-9)
        length = rng.randint(shortest, math.floor(views.crop_scale[1] * views.size[axis] + 1e-9))
        lowest, highest = min(0, shape[axis] - length), max(0, shape[axis] - length)
        if views.foreground:
            middle = rng.randint(body[axis][0], body[axis][1] - 1)
            start = min(max(middle - length // 2, lowest), highest)
        else:
            start = rng.randint(lowest, highest)
        box.append((start, start + length))
    return box


def share_of(one, two) -> float:
    """Overlap of two boxes as a share of the smaller one's volume."""
    volumes, common = [1, 1], 1
    for (a, b), (c, d) in zip(one, two, strict=True):
        volumes = [volumes[0] * (b - a), volumes[1] * (d - c)]
        common *= max(0, min(b, d) - max(a, c))
    return common / min(volumes)


def plain_rejection(seed: int, shape, views, body, num: int) -> list:
    """Two random crops, both drawn again until they overlap enough."""
    rng, accepted = random.Random(seed), []
    while len(accepted) < num:
        one, two = one_crop(rng, shape, views, body), one_crop(rng, shape, views, body)
        if share_of(one, two) >= views.min_overlap:
            accepted.append((one, two))
    return accepted


def seen_in(pairs) -> dict[str, list[float]]:
    """What is compared of pairs: the overlap, and per axis where, how long and how far apart the boxes are."""
    figures = {"overlap": [share_of(one, two) for one, two in pairs]}
    for axis in range(3):
        for number in (0, 1):
            figures[f"start {number} {axis}"] = [pair[number][axis][0] for pair in pairs]
            figures[f"length {number} {axis}"] = [pair[number][axis][1] - pair[number][axis][0] for pair in pairs]
        figures[f"offset {axis}"] = [two[axis][0] - one[axis][0] for one, two in pairs]
    return figures


def check_law(shape, views, seed=0, num=NUM):
    body = [(n // 20, n - n // 6) for n in shape]
    ids = [f"scan_{i % 7}" for i in range(num)]
    u = uniforms(seed, np.arange(num) // 50, ids, np.arange(num), PAIR_NUMBERS)
    many = np.tile(shape, (num, 1)), views, np.tile(body, (num, 1, 1))
    boxes, flips = sample_pairs(u, *many)
    got = seen_in(boxes.tolist())
    expected = seen_in(plain_rejection(seed, shape, views, body, num))
    for name in got:
        assert stats.ks_2samp(got[name], expected[name]).pvalue > CHANCE, name
    return boxes, flips


@pytest.mark.slow
@pytest.mark.parametrize("shape", SCANS)
def test_pairs_have_the_law_of_plain_rejection(shape):
    boxes, flips = check_law(shape, ViewsConfig(size=(16, 96, 96)))
    patterns = np.bincount(flips.reshape(-1, 6) @ (1 << np.arange(6)), minlength=64)  # all 64 are as likely
    assert stats.chisquare(patterns).pvalue > CHANCE
    overlap = [share_of(*pair) for pair in boxes.tolist()]
    for flip in flips.reshape(-1, 6).T:
        assert stats.pearsonr(flip, overlap).pvalue > CHANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((90, 200, 260), {"foreground": True}),
        ((20, 60, 150), {"foreground": True, "crop_scale": (0.6, 1.8)}),
        ((100, 160, 130), {"min_overlap": 0.25}),
        ((60, 160, 130), {"crop_scale": (0.7, 1.6)}),
        ((30, 120, 90), {"min_overlap": 0.6, "flip_prob": 0.0}),
        ((100, 300, 300), {"crop_scale": (1.0, 1.0)}),
    ],
)
def test_the_law_holds_for_every_setting(shape, settings):
    check_law(shape, ViewsConfig(**{"size": (10, 40, 24), **settings}), seed=1, num=1500)


def test_the_share_of_small_overlaps_is_that_of_true_pairs():
    """In a usual CT 23 % of true pairs overlap by less than 15 %; pairs that are slid together have half of them."""
    u = np.random.default_rng(0).random((8000, PAIR_NUMBERS))
    boxes, _ = sample_pairs(u, np.tile((150, 512, 512), (len(u), 1)), ViewsConfig(size=(16, 96, 96)))
    small = sum(share_of(*pair) < 0.15 for pair in boxes.tolist())
    assert stats.binomtest(small, len(u), 0.233).pvalue > CHANCE


def test_pairs_depend_only_on_their_own_numbers():
    """Also those that take further tries; any company, any order."""
    views, shape = ViewsConfig(size=(8, 24, 16), min_overlap=0.5, crop_scale=(0.5, 2)), (100, 300, 200)
    u = np.random.default_rng(0).random((300, PAIR_NUMBERS))
    boxes, flips = sample_pairs(u, np.tile(shape, (300, 1)), views)
    for at in (range(299, -1, -1), range(0, 300, 7)):
        again = sample_pairs(u[list(at)], np.tile(shape, (len(at), 1)), views)
        np.testing.assert_array_equal(again[0], boxes[list(at)])
        np.testing.assert_array_equal(again[1], flips[list(at)])


# -- intensities ------------------------------------------------------------------------------------------------------


STATED = {"noise_variance": (0.0, 0.1), "blur_sigma": (0.5, 1.0), "gain": (0.75, 1.25), "gamma": (0.7, 1.5)}
PROBABILITIES, NEUTRAL = (0.1, 0.2, 0.5, 0.5), (0, 0, 1, 1)


def drawn_intensities(config, num=20000):
    u = uniforms(3, np.arange(num), ["a"] * num, np.zeros(num, int), INTENSITY_NUMBERS)
    drawn, seeds = sample_intensities(u, config)
    assert len(set(seeds.tolist())) == num
    drawn[:, 0] **= 2  # the paper's range is one of variances
    return drawn


@pytest.mark.parametrize("ranges", [STATED, {"noise_variance": (0.2, 0.9), "blur_sigma": (1, 4), "gamma": (0.1, 3)}])
def test_intensity_parameters_have_the_stated_law(ranges):
    """Uniform variance (not standard deviation), sigma, factor and exponent; each where it was chosen."""
    drawn = drawn_intensities(IntensityConfig(**(ranges if ranges is not STATED else {})))
    for column, (name, default) in enumerate(STATED.items()):
        low, high = ranges.get(name, default)
        used = drawn[drawn[:, column] != NEUTRAL[column], column]
        assert stats.binomtest(len(used), len(drawn), PROBABILITIES[column]).pvalue > CHANCE, name
        assert stats.kstest(used, "uniform", (low, high - low)).pvalue > CHANCE, name


def test_intensity_operations_are_chosen_independently():
    drawn = drawn_intensities(IntensityConfig())
    chosen = drawn != NEUTRAL
    for one, two in itertools.combinations(range(4), 2):
        table = [[(chosen[chosen[:, one] == a, two] == b).sum() for b in (0, 1)] for a in (0, 1)]
        assert stats.chi2_contingency(table).pvalue > CHANCE
        both = chosen[:, one] & chosen[:, two]
        assert stats.spearmanr(drawn[both, one], drawn[both, two]).pvalue > CHANCE


def test_one_view_draws_as_many_do():
    rng, num = np.random.default_rng(5), 4000
    each = [sample_intensity(rng, IntensityConfig()) for _ in range(num)]
    variances = [one.noise_std**2 for one in each if one.noise_std]
    assert stats.kstest(variances, "uniform", (0, 0.1)).pvalue > CHANCE
    gains = [one.gain for one in each if one.gain != 1]
    assert stats.kstest(gains, "uniform", (0.75, 0.5)).pvalue > CHANCE
