"""The aligner against oracles that share no code with it: nested loops, grid_sample and coordinate ramps."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl_ray.model.pgl import align
from pgl_ray.prior import (
    Geometry,
    feature_coordinates,
    interpolation_matrices,
    overlap_box,
    overlap_share,
    scan_to_view,
    view_to_scan,
)

VIEW, STRIDE = (16, 96, 64), (4, 16, 8)  # D != H != W in size, stride and cells (4, 6, 8)
CELLS = tuple(v // s for v, s in zip(VIEW, STRIDE))
CELL_CENTERS = Geometry(VIEW, STRIDE, tuple(s / 2 for s in STRIDE))
FIELD_CENTERS = Geometry(VIEW, STRIDE, (0.5, 0.5, 0.5))


def random_boxes(rng, num):
    """Pairs of overlapping crops of 110-140 % of the view size."""
    boxes = np.empty((2, num, 3, 2), np.int64)
    for i, axis in itertools.product(range(num), range(3)):
        length = rng.integers(math.ceil(1.1 * VIEW[axis]), int(1.4 * VIEW[axis]) + 1, 2)
        start = 100 + rng.integers(0, VIEW[axis] // 2, 2)
        boxes[:, i, axis] = np.stack([start, start + length], -1)
    return boxes


def test_equations_5_and_6_by_hand():
    # axis D: crops [10, 30) and [20, 42); the overlap [20, 30) lies at 10..20 of crop 1, that is, with P / S = 16 / 20
    # at 8..16 of view 1 and at cells 2..4 of stride 4; of crop 2 at 0..10, 16 / 22 * 10 = 7.27, cells 0..1.818.
    box_1 = torch.tensor([[[10, 30], [0, 96], [0, 64]]])
    box_2 = torch.tensor([[[20, 42], [0, 96], [0, 64]]])
    region = overlap_box(box_1, box_2)
    assert region[0, 0].tolist() == [20, 30]
    no_flip = torch.zeros(1, 3, dtype=torch.bool)
    for box, start, stop in ((box_1, 2.0, 4.0), (box_2, 0.0, 10 * 16 / 22 / 4)):
        index = feature_coordinates(box, no_flip, region, CELL_CENTERS)[0][0][0]
        expected = [start + (k + 0.5) / 4 * (stop - start) - 0.5 for k in range(4)]  # cell j's middle is index j
        torch.testing.assert_close(index, torch.tensor(expected).clamp(0, 3), atol=1e-5, rtol=0)


def test_overlap_shares():
    box_1 = np.array([[0, 10], [0, 10], [0, 10]])
    box_2 = np.array([[5, 10], [0, 10], [0, 20]])
    assert overlap_share(box_1, box_2, "smaller") == 0.5
    assert overlap_share(box_1, box_2, "larger") == 0.5
    assert overlap_share(box_1, box_2, "union") == 500 / 1500
    assert overlap_share(box_1, box_2 + 100, "smaller") == 0


def test_frames_are_inverse():
    rng = np.random.default_rng(0)
    point, box = rng.uniform(0, 50, (20, 3)), random_boxes(rng, 20)[0]
    flip = rng.random((20, 3)) < 0.5
    view = scan_to_view(point, box, flip, np.array(VIEW))
    np.testing.assert_allclose(view_to_scan(view, box, flip, np.array(VIEW)), point, atol=1e-9)


def loops_align(features, box, flip, region):
    """RoIAlign with cell centres after undoing the flip, voxel by voxel: the paper's two steps as written."""
    unflipped = features.flip([1 + a for a in range(3) if flip[a]])
    out = torch.zeros_like(features)
    for place in itertools.product(*(range(n) for n in CELLS)):
        weights = []
        for axis, k in enumerate(place):
            size = box[axis, 1] - box[axis, 0]
            r0, r1 = ((region[axis] - box[axis, 0]) * (VIEW[axis] / size) / STRIDE[axis]).tolist()
            x = min(max(r0 + (k + 0.5) * (r1 - r0) / CELLS[axis] - 0.5, 0), CELLS[axis] - 1)
            low = min(int(x), CELLS[axis] - 2)
            weights.append([(low, 1 - (x - low)), (low + 1, x - low)])
        for (d, wd), (h, wh), (w, ww) in itertools.product(*weights):
            out[(slice(None), *place)] += wd * wh * ww * unflipped[:, d, h, w]
    return out


def sampled_align(features, box, flip, region, center):
    """The same through grid_sample, from view coordinates of the bins (last dim of the grid is W, H, D)."""
    grid = np.empty((*CELLS, 3))
    for place in itertools.product(*(range(n) for n in CELLS)):
        point = [region[a, 0] + (k + 0.5) / CELLS[a] * (region[a, 1] - region[a, 0]) for a, k in enumerate(place)]
        view = scan_to_view(np.array(point), box, flip, np.array(VIEW))
        index = (view - center) / STRIDE
        grid[place] = (2 * (index + 0.5) / CELLS - 1)[::-1]
    grid = torch.from_numpy(grid).float()[None]
    return F.grid_sample(features[None], grid, align_corners=False, padding_mode="border")[0]


@pytest.mark.parametrize("flip", itertools.product([False, True], repeat=3))
def test_matrices_equal_loops_and_grid_sample(flip):
    rng = np.random.default_rng(int(np.dot(flip, [4, 2, 1])))
    boxes = random_boxes(rng, 3)
    features = torch.from_numpy(rng.normal(size=(3, 2, *CELLS))).float()
    flips = torch.tensor([flip] * 3)
    box_1, box_2 = torch.from_numpy(boxes[0]), torch.from_numpy(boxes[1])
    region = overlap_box(box_1, box_2)
    for geometry in (CELL_CENTERS, FIELD_CENTERS):
        got = align(features, interpolation_matrices(box_1, flips, region, geometry))
        for i in range(3):
            args = features[i], boxes[0][i], np.array(flip), region[i].numpy()
            torch.testing.assert_close(got[i], sampled_align(*args, np.array(geometry.center)), atol=1e-4, rtol=1e-4)
            if geometry is CELL_CENTERS:
                torch.testing.assert_close(got[i], loops_align(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flips", itertools.product(itertools.product([False, True], repeat=3), repeat=2))
def test_ramps_agree_for_all_64_flip_pairs(flips):
    """Feature maps that hold the scan coordinates of their own receptive-field centres must align to the same places.

    Of a linear ramp linear interpolation makes no error, so both views must agree with the bins' coordinates wherever
    no bin is clamped.
    """
    boxes = random_boxes(np.random.default_rng(7), 4)
    region = overlap_box(*map(torch.from_numpy, boxes))
    for box, flip in zip(boxes, flips, strict=True):
        box, flip = torch.from_numpy(box), torch.tensor([flip] * 4)
        ramps = torch.empty(4, 3, *CELLS, dtype=torch.float64)
        for axis in range(3):
            view = STRIDE[axis] * np.arange(CELLS[axis]) + 0.5
            world = view_to_scan(
                torch.from_numpy(view)[None].expand(4, -1), box[:, axis, None], flip[:, axis, None], VIEW[axis]
            )
            shape = [4, 1, 1, 1]
            shape[1 + axis] = CELLS[axis]
            ramps[:, axis] = world.view(shape)
        got = align(ramps.float(), interpolation_matrices(box, flip, region, FIELD_CENTERS))
        _, clamped = feature_coordinates(box, flip, region, FIELD_CENTERS)
        for axis in range(3):
            bins = (torch.arange(CELLS[axis]) + 0.5) / CELLS[axis]
            expected = region[:, axis, :1] + bins * (region[:, axis, 1:] - region[:, axis, :1])
            mean = got[:, axis].mean([d for d in (1, 2, 3) if d != 1 + axis])
            error = (mean - expected).abs().masked_fill(clamped[axis], 0)
            assert error.max() < 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_matrix_rows_sum_to_one(seed):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 2)
    flip = torch.from_numpy(rng.random((2, 3)) < 0.5)
    box_1, box_2 = map(torch.from_numpy, boxes)
    for matrix, cells in zip(
        interpolation_matrices(box_1, flip, overlap_box(box_1, box_2), FIELD_CENTERS), CELLS, strict=True
    ):
        assert matrix.shape == (2, cells, cells)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, cells), atol=1e-4, rtol=0)
        assert (matrix >= 0).all()
        assert ((matrix > 0).sum(-1) <= 2).all()
