"""Priors obey their bounds; views are what their priors say."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.networks.layers import GaussianFilter
from scipy import stats

from pgl_ray.config import AlignConfig, IntensityConfig, ViewsConfig
from pgl_ray.data import sampling
from pgl_ray.data.batch_views import apply_intensities, noise, resize_and_flip
from pgl_ray.data.intensity_ops import Intensity, apply_intensity, blur, sample_intensity
from pgl_ray.data.random_numbers import generator, uniforms
from pgl_ray.data.regions import sample_regions
from pgl_ray.data.rendering import normalise, read_padded, render, resize_labels, to_half
from pgl_ray.data.sampling import PAIR_NUMBERS, sample_pair, sample_pairs
from pgl_ray.prior import Prior, scan_to_view

SHAPES = st.tuples(st.integers(5, 80), st.integers(40, 300), st.integers(40, 300))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), SHAPES, st.floats(0.01, 0.3))
def test_pairs_keep_sizes_bounds_and_overlap(seed, shape, bound):
    views = ViewsConfig(size=(16, 96, 48), min_overlap=bound)
    pair = sample_pair(np.random.default_rng(seed), shape, views)
    volumes = []
    for prior in pair:
        length = prior.box[:, 1] - prior.box[:, 0]
        volumes.append(length.prod())
        assert (length >= np.array([17.6, 105.6, 52.8])).all()
        assert (length <= np.array([22.4, 134.4, 67.2])).all()
        for (start, stop), n in zip(prior.box, shape, strict=True):
            inside = start >= 0 and stop <= n
            covering = start <= 0 and stop >= n
            assert inside or covering
    common = 1
    for (a, b), (c, d) in zip(pair[0].box, pair[1].box, strict=True):
        common *= max(0, min(b, d) - max(a, c))
    assert common >= bound * min(volumes)


def test_fallback_guarantees_overlap():
    """In a huge scan random pairs nearly never overlap by 40 %: only the fallback can do it."""
    views = ViewsConfig(size=(8, 8, 8), min_overlap=0.4)
    for seed in range(20):
        first, second = sample_pair(np.random.default_rng(seed), (500, 500, 500), views)
        lengths = np.minimum(first.box[:, 1], second.box[:, 1]) - np.maximum(first.box[:, 0], second.box[:, 0])
        smaller = min((prior.box[:, 1] - prior.box[:, 0]).prod() for prior in (first, second))
        assert (lengths > 0).all() and lengths.prod() >= 0.4 * smaller


def test_foreground_keeps_the_middle_in_the_body():
    views, body = ViewsConfig(size=(8, 16, 24), foreground=True), (30, 50, 60, 90, 100, 140)
    for seed in range(50):
        for prior in sample_pair(np.random.default_rng(seed), (100, 200, 300), views, body):
            middle = (prior.box[:, 0] + prior.box[:, 1]) // 2
            assert all(a <= m < b for m, (a, b) in zip(middle, np.reshape(body, (3, 2)), strict=True))
    off = ViewsConfig(size=(8, 16, 24))
    a, b = (sample_pair(np.random.default_rng(1), (100, 200, 300), off, body_) for body_ in (None, body))
    np.testing.assert_array_equal(a[0].box, b[0].box)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_ablations(seed, flip, crop):
    """w/o F: no flips. w/o CS: one crop of exactly the view size for both views. Else as ever."""
    views, rng = ViewsConfig(size=(8, 16, 24)), np.random.default_rng(seed)
    ablated = sampling.ablated(views, AlignConfig(flip=flip, crop=crop))
    first, second = sample_pair(rng, (60, 90, 120), ablated, shared_box=not crop)
    assert flip or not (first.flip.any() or second.flip.any())
    assert crop == (not np.array_equal(first.box, second.box))
    lengths = np.array([prior.box[:, 1] - prior.box[:, 0] for prior in (first, second)])
    assert crop or (lengths == (8, 16, 24)).all()
    assert not crop or (lengths > (8, 16, 24)).all()
    if flip and crop:
        assert ablated == views


def test_without_cs_the_flips_of_both_views_differ():
    views = sampling.ablated(ViewsConfig(size=(8, 16, 24)), AlignConfig(crop=False))
    pairs = [sample_pair(np.random.default_rng(i), (60, 90, 120), views, shared_box=True) for i in range(40)]
    np.testing.assert_allclose(np.mean([a.flip != b.flip for a, b in pairs]), 0.5, atol=0.15)


@pytest.mark.parametrize("bound", [0.9, 1.0])
def test_any_overlap_is_reached(bound):
    """Where even concentric boxes of the drawn sizes overlap too little, the second takes the first one's size."""
    views = ViewsConfig(size=(16, 96, 96), crop_scale=(0.5, 2.0), min_overlap=bound)
    for seed in range(30):
        first, second = sample_pair(np.random.default_rng(seed), (20, 300, 100), views)
        lengths = np.minimum(first.box[:, 1], second.box[:, 1]) - np.maximum(first.box[:, 0], second.box[:, 0])
        volumes = [(prior.box[:, 1] - prior.box[:, 0]).prod() for prior in (first, second)]
        common = lengths.clip(0).prod()
        assert common >= bound * min(volumes)


def test_draws_differ_by_seed_epoch_scan_and_draw():
    draws = {tuple(generator(*key).random(2)) for key in [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0)]}
    draws |= {tuple(generator(*key).random(2)) for key in [(0, 0, "b", 0), (0, 0, "a", 1)]}
    assert len(draws) == 5
    assert generator(0, 0, "a", 0).random() == generator(0, 0, "a", 0).random()


def mix(z: int) -> int:
    """splitmix64's output function in Python's own integers."""
    mask = 2**64 - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def test_random_numbers_are_splitmix64s():
    step, mask, seed, epoch, draw = 0x9E3779B97F4A7C15, 2**64 - 1, 7, 3, 11
    for of in (0, 1):
        state = seed ^ mix(of + 1)
        for part in (int.from_bytes(hashlib.sha256(b"scan").digest()[:8], "little"), epoch, draw):
            state = mix(state + step & mask) ^ part
        start = mix(state + step & mask)
        expected = [(mix(start + (i + 1) * step & mask) >> 11) / 2**53 for i in range(5)]
        np.testing.assert_array_equal(uniforms(seed, np.array([epoch]), ["scan"], np.array([draw]), 5, of)[0], expected)


def test_random_numbers_of_many_draws():
    """Uniform, without correlation between neighbours, and of their (seed, epoch, scan, draw, kind) alone."""
    epochs, ids, draws = np.repeat([0, 1], 200), [f"scan_{i % 20}" for i in range(400)], np.arange(400) // 20 % 10
    u = uniforms(7, epochs, ids, draws, 100)
    assert u.shape == (400, 100) and u.dtype == np.float64 and (u >= 0).all() and (u < 1).all()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert len(np.unique(u[:, 0])) == 400
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[200:], u[:200]), (u[20:], u[:-20])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    np.testing.assert_array_equal(uniforms(7, epochs[[250]], [ids[250]], draws[[250]], 40)[0], u[250, :40])
    for others in ((8, epochs, ids, draws, 100), (7, epochs, ids, draws, 100, 1)):
        assert abs(np.corrcoef(uniforms(*others).ravel(), u.ravel())[0, 1]) < 0.03


def test_pairs_of_many_scans_are_those_of_each():
    """Drawn together or one by one; scans of all sizes, some pairs of which must be moved together."""
    rng = np.random.default_rng(0)
    shape = np.array([(20, 60, 70), (500, 600, 500), (10, 30, 30), (90, 300, 90)] * 5)
    body = np.stack([shape // 4, shape // 2], -1)
    u, views = rng.random((20, PAIR_NUMBERS)), ViewsConfig(size=(16, 48, 48), foreground=True)
    boxes, flips = sample_pairs(u, shape, views, body)
    assert boxes.shape == (20, 2, 3, 2) and flips.shape == (20, 2, 3)
    for i in range(20):
        (box,), (flip,) = sample_pairs(u[i : i + 1], shape[i : i + 1], views, body[i : i + 1])
        np.testing.assert_array_equal(box, boxes[i])
        np.testing.assert_array_equal(flip, flips[i])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.tuples(*[st.integers(1, 90)] * 3), st.booleans(), st.integers(0, 2**31))
def test_regions_are_whole_chunks_and_reach_every_voxel(shape, chunk, foreground, seed):
    views, rng = ViewsConfig(size=(8, 24, 16), foreground=foreground), np.random.default_rng(seed)
    body = np.array([[n // 3, max(n // 3 + 1, n // 2)] for n in shape])
    u = np.concatenate([rng.random((300, 3)), np.zeros((1, 3)), np.full((1, 3), 1 - 1e-9)])
    many = np.tile(shape, (len(u), 1))
    regions = sample_regions(u, many, np.tile(chunk, (len(u), 1)), views, np.tile(body, (len(u), 1, 1)))
    start, stop = regions[..., 0], regions[..., 1]
    assert (start >= 0).all() and (stop <= shape).all() and (start % chunk == 0).all()
    assert ((stop % chunk == 0) | (stop == shape)).all()
    assert (stop - start >= np.minimum((16, 48, 32), shape)).all()
    assert (stop - start < np.ceil(np.array([16, 48, 32]) / chunk) * chunk + chunk).all()
    if foreground:
        assert ((stop > body[:, 0]) & (start < body[:, 1])).all()
    else:
        assert (start.min(0) == 0).all() and (stop.max(0) == shape).all()


def test_resize_keeps_world_coordinates():
    """A linear ramp, cropped, resized and flipped, still tells where each view voxel came from."""
    size, box = (16, 24, 20), np.array([[3, 25], [5, 36], [2, 29]])
    for flip in ([False, True, False], [True, True, True], [False, False, False]):
        prior = Prior(box, np.array(flip))
        for axis in range(3):
            shape = [1, 1, 1]
            shape[axis] = -1
            ramp = (np.arange(box[axis, 0], box[axis, 1]) + 0.5).reshape(shape)  # edge coordinate of voxel centres
            crop = np.broadcast_to(ramp, box[:, 1] - box[:, 0]).astype(np.float32)
            view = resize_and_flip(crop, size, prior.flip).numpy()
            line = np.moveaxis(view, axis, 0)[:, 0, 0]
            middle = np.zeros((size[axis], 3))
            middle[:, axis] = line
            back = scan_to_view(middle, box, prior.flip, np.array(size))[:, axis]
            np.testing.assert_allclose(back[1:-1], (np.arange(size[axis]) + 0.5)[1:-1], atol=1e-3)


class Array:
    """Stands for a store's reader."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def read_boxes(self, boxes):
        return [self.values[tuple(slice(a, b) for a, b in box)] for box in boxes]


def test_small_scans_are_padded_with_air():
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(np.int16)
    got = read_padded(Array(values), np.array([[-1, 4], [1, 3], [2, 6]]), -1024)
    expected = np.full((5, 2, 4), -1024)
    expected[1:3, :, :2] = values[:, 1:3, 2:]
    np.testing.assert_array_equal(got, expected)


LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), LENGTHS, LENGTHS, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_compiled_render_equals_torch(seed, shape, size, flip):
    """Any shape, up and down, air and metal; every flip."""
    rng = np.random.default_rng(seed)
    crop = rng.choice([-32768, -1024, 32767, *rng.integers(-1200, 600, 20)], shape).astype(np.int16)
    window, mean, std = (-1024.0, 325.5), rng.uniform(-800, 200), rng.uniform(200, 500)
    expected = resize_and_flip(normalise(crop, window, mean, std), size, np.array(flip))
    got = render(crop, size, np.array(flip), window, mean, std)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_crops_of_any_layout_are_rendered():
    """Cuts of a larger array, and other types than a store's."""
    scaling = (-1024.0, 325.0), -200.0, 300.0
    region = np.random.default_rng(0).integers(-1000, 400, (20, 40, 44)).astype(np.int16)
    cut, flip = region[3:15, 5:33, 2:40], np.array([True, False, True])
    expected = resize_and_flip(normalise(cut, *scaling), (8, 24, 24), flip)
    for crop in (cut, np.asfortranarray(cut), cut.astype(np.float32), cut.astype(np.int32), cut.astype(np.float64)):
        np.testing.assert_allclose(render(crop, (8, 24, 24), flip, *scaling), expected, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), LENGTHS, LENGTHS, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_labels_are_those_of_the_nearest_voxels(seed, shape, size, flip):
    labels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    expected = F.interpolate(torch.from_numpy(labels)[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    expected = expected.flip([axis for axis in range(3) if flip[axis]])
    np.testing.assert_array_equal(resize_labels(labels, size, np.array(flip)), expected)


def test_halves_are_numpys():
    """Every float16, what lies between, the least and the largest, and random bits."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    between = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    single = np.concatenate([halves, between, np.nextafter(between, np.float32(0)), bits[~np.isnan(bits)]])
    out = np.empty((2, len(single) // 2), np.float16)
    single = single[: out.size].reshape(out.shape)
    to_half(single, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.view(np.uint16), single.astype(np.float16).view(np.uint16))


def blurred(view: np.ndarray, sigma: float) -> np.ndarray:
    """By one convolution with the whole kernel, borders replicated."""
    at = torch.arange(-max(1, round(3 * sigma)), max(1, round(3 * sigma)) + 1).double()
    taps = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = taps[:, None, None] * taps[:, None] * taps
    pad = [len(at) // 2] * 6
    padded = F.pad(torch.from_numpy(view).double()[None, None], pad, mode="replicate")
    return F.conv3d(padded, (kernel / kernel.sum())[None, None])[0, 0].numpy()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), LENGTHS, st.floats(0.05, 1.0))
@example(1, (9, 12, 10), 1.2)
@example(2, (3, 20, 8), 2.5)
def test_compiled_noise_and_blur_equal_torch(seed, shape, sigma):
    """Also on views smaller than the blur's kernel; the noise comes from its seed on both routes."""
    view = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    before, params = view.copy(), Intensity(0.2, seed, 0.0, 1.0, 1.0)
    noisy = view + np.float32(0.2) * noise(torch.tensor([seed]), shape)[0].numpy()
    np.testing.assert_allclose(apply_intensity(view, params), noisy, atol=1e-5)
    both = apply_intensity(view, params._replace(blur_sigma=sigma))
    np.testing.assert_allclose(both, blurred(noisy, sigma), atol=1e-5)
    np.testing.assert_array_equal(view, before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), LENGTHS, st.sampled_from([0.0, 0.75, 1.0, 1.25, 2.0]), st.just(0) | st.floats(0.01, 4))
def test_compiled_gain_and_gamma_equal_numpy(seed, shape, gain, gamma):
    """In double precision, views of one value and whole numbers (many voxels at the ends of the range) included."""
    rng = np.random.default_rng(seed)
    view = rng.normal(0, rng.choice([0, 1e-3, 1, 3]), shape).astype(np.float32)
    view = view.round() if seed % 2 else view
    got = apply_intensity(view, Intensity(0.0, 0, 0.0, gain, gamma))
    expected = (view * np.float32(gain)).clip(view.min(), view.max()).astype(np.float64)
    low, span = expected.min(), max(np.ptp(expected), 1e-6)
    if gamma != 1:
        expected = ((expected - low) / span).clip(0, 1) ** gamma * span + low
    np.testing.assert_allclose(got, expected, atol=1e-6 + 2e-6 * np.ptp(view), rtol=0)  # what the kernel promises


def test_normalise():
    got = normalise(np.array([-3000, -1024, 0, 325, 3000], np.int16), (-1024, 325), -100.0, 50.0)
    np.testing.assert_allclose(got, [(x + 100) / 50 for x in (-1024, -1024, 0, 325, 325)], rtol=1e-6)


def test_blur_equals_monai():
    view = torch.randn(12, 20, 16, generator=torch.Generator().manual_seed(0))
    expected = GaussianFilter(3, 0.8, truncated=3.0, approx="sampled")(view[None, None])[0, 0]
    inner = (slice(3, -3),) * 3  # MONAI pads with zeros, we replicate the border
    np.testing.assert_allclose(blur(view.numpy(), 0.8)[inner], expected[inner], atol=2e-3, rtol=0)


def test_intensity_operations():
    view = np.random.default_rng(1).normal(size=(8, 12, 10)).astype(np.float32)
    plain = Intensity(0.0, 0, 0.0, 1.0, 1.0)
    assert apply_intensity(view, plain) is view
    noisy = apply_intensity(view, plain._replace(noise_std=0.3, noise_seed=5))
    assert abs((noisy - view).std() - 0.3) < 0.02
    gained = apply_intensity(view, plain._replace(gain=1.2))
    np.testing.assert_allclose(gained, (view * 1.2).clip(view.min(), view.max()), rtol=1e-6)
    unit = (view - view.min()) / np.ptp(view)
    gamma = apply_intensity(view, plain._replace(gamma=1.4))
    np.testing.assert_allclose(gamma, unit**1.4 * np.ptp(view) + view.min(), atol=1e-5, rtol=1e-5)


def test_intensity_probabilities():
    rng = np.random.default_rng(0)
    drawn = [sample_intensity(rng, IntensityConfig()) for _ in range(4000)]
    shares = np.mean([[p.noise_std > 0, p.blur_sigma > 0, p.gain != 1, p.gamma != 1] for p in drawn], 0)
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.5, 0.5], atol=0.03)
    variances = [p.noise_std**2 for p in drawn if p.noise_std]
    assert min(variances) >= 0 and max(variances) <= 0.1


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_batch_is_augmented_as_its_views_are(data):
    """Any mix of drawn and neutral parameters, bounds included."""
    size = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    count = data.draw(st.integers(1, 4))

    def either(low, high, neutral):
        return st.one_of(st.just(neutral), st.floats(low, high, width=32))

    drawn = [
        Intensity(
            data.draw(either(0.0, 0.3125, 0.0)),
            data.draw(st.integers(0, 2**62 - 1)),
            data.draw(either(0.25, 1.0, 0.0)),
            data.draw(either(0.75, 1.25, 1.0)),
            data.draw(either(0.6875, 1.5, 1.0)),
        )
        for _ in range(count)
    ]
    views = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(0))
    intensity = torch.tensor([(p.noise_std, p.blur_sigma, p.gain, p.gamma) for p in drawn])
    got = apply_intensities(views, intensity, torch.tensor([p.noise_seed for p in drawn]), 1.0)
    for one, view, params in zip(got, views, drawn, strict=True):
        np.testing.assert_allclose(one[0], apply_intensity(view[0].numpy(), params), atol=1e-4, rtol=1e-4)


def test_noise_is_normal_and_only_of_its_seed():
    seeds = torch.tensor([0, 1, 2**62 - 1])
    drawn = noise(seeds, (16, 48, 48))
    assert drawn.dtype == torch.float32 and drawn.shape == (3, 16, 48, 48)
    assert torch.equal(drawn[1], noise(seeds[1:2], (16, 48, 48))[0])
    flat = drawn.flatten(1).double().numpy()
    for row in flat:
        assert stats.kstest(row, "norm").pvalue > 1e-3
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.02 and abs(np.corrcoef(row[::2], row[1::2])[0, 1]) < 0.02
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.02
    # splitmix64 in Python's own integers
    state, mask = int(seeds[2]), 2**64 - 1
    bits = mix(mix(state) + 5 * 0x9E3779B97F4A7C15 & mask)
    length = np.sqrt(-2 * np.log(((bits >> 40) + 1) / 2**24))
    expected = length * np.cos((bits >> 12 & 0xFFFFFF) * 2 * np.pi / 2**24)
    first_half = drawn[2].flatten()[: drawn[2].numel() // 2]
    np.testing.assert_allclose(first_half[5], expected, atol=1e-5)
