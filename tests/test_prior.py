"""The aligner against oracles that share no code with it: nested loops, grid_sample and coordinate ramps."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl_ray import prior
from pgl_ray.model.pgl import Pair, align, valid_bins
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


@pytest.mark.slow
def test_equations_5_and_6_by_hand():
    # axis D: crops [10, 30) and [20, 42); the overlap [20, 30) lies at 10..20 of crop 1, that is, with P / S = 16 / 20
    # at 8..16 of view 1 and at cells 2..4 of stride 4; of crop 2 at 0..10, 16 / 22 * 10 = 7.27, cells 0..1.818.
    box_1 = torch.tensor([[[10, 30], [0, 96], [0, 64]]])
    box_2 = torch.tensor([[[20, 42], [0, 96], [0, 64]]])
    region = overlap_box(box_1, box_2)
    assert region[0, 0].tolist() == [20, 30]
    no_flip = torch.zeros(1, 3, dtype=torch.bool)
    for box, start, stop in ((box_1, 2.0, 4.0), (box_2, 0.0, 10 * 16 / 22 / 4)):
        index = feature_coordinates(box, no_flip, region, CELL_CENTERS)[0][0]
        expected = [start + (k + 0.5) / 4 * (stop - start) - 0.5 for k in range(4)]  # cell j's middle is index j
        torch.testing.assert_close(index, torch.tensor(expected), atol=1e-5, rtol=0)


def test_overlap_shares():
    box_1 = np.array([[0, 10], [0, 10], [0, 10]])
    box_2 = np.array([[5, 10], [0, 10], [0, 20]])
    assert overlap_share(box_1, box_2, "smaller") == 0.5
    assert overlap_share(box_1, box_2, "union") == 500 / 1500
    assert overlap_share(box_1, box_2 + 100, "smaller") == 0


def test_frames_are_inverse():
    rng = np.random.default_rng(0)
    point, box = rng.uniform(0, 50, (20, 3)), random_boxes(rng, 20)[0]
    flip = rng.random((20, 3)) < 0.5
    view = scan_to_view(point, box, flip, np.array(VIEW))
    np.testing.assert_allclose(view_to_scan(view, box, flip, np.array(VIEW)), point, atol=1e-9)


def loops_align(features, box, flip, region, center):
    """RoIAlign after undoing the flip, point by point: the paper's two steps as written.

    A bin's middle is read by trilinear interpolation of the eight cells around it.
    """
    unflipped = np.flip(features, [1 + a for a in range(3) if flip[a]])
    # the flip turns cell j into n - 1 - j and moves its centre to the other side of the cell
    first = [VIEW[a] - STRIDE[a] * (CELLS[a] - 1) - center[a] if flip[a] else center[a] for a in range(3)]
    out = np.zeros_like(features)
    for place in itertools.product(*(range(n) for n in CELLS)):
        around = []
        for a in range(3):
            zoom = VIEW[a] / (box[a, 1] - box[a, 0])
            start, stop = ((region[a] - box[a, 0]) * zoom).tolist()
            view = start + (place[a] + 0.5) * (stop - start) / CELLS[a]
            x = min(max((view - first[a]) / STRIDE[a], 0), CELLS[a] - 1)
            low = min(int(x), CELLS[a] - 2)
            around.append([(low, 1 - (x - low)), (low + 1, x - low)])
        for (d, wd), (h, wh), (w, ww) in itertools.product(*around):
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
    grid = torch.from_numpy(grid)[None]
    return F.grid_sample(torch.from_numpy(features)[None], grid, align_corners=False, padding_mode="border")[0].numpy()


@pytest.mark.parametrize("flip", itertools.product([False, True], repeat=3))
def test_matrices_equal_loops_and_grid_sample(flip):
    rng = np.random.default_rng(int(np.dot(flip, [4, 2, 1])))
    boxes = random_boxes(rng, 3)
    features = rng.normal(size=(3, 2, *CELLS))
    flips = torch.tensor([flip] * 3)
    box_1, box_2 = torch.from_numpy(boxes[0]), torch.from_numpy(boxes[1])
    region = overlap_box(box_1, box_2)
    for geometry in (CELL_CENTERS, FIELD_CENTERS):
        got = align(torch.from_numpy(features), interpolation_matrices(box_1, flips, region, geometry)).numpy()
        for i in range(3):
            args = features[i], boxes[0][i], np.array(flip), region[i].numpy(), np.array(geometry.center)
            np.testing.assert_allclose(got[i], sampled_align(*args), atol=1e-4)
            np.testing.assert_allclose(got[i], loops_align(*args), atol=1e-4)


def test_valid_bins_lie_inside_the_outermost_centres_of_both():
    rng = np.random.default_rng(3)
    boxes = torch.from_numpy(random_boxes(rng, 4))
    flips = torch.from_numpy(rng.random((2, 4, 3)) < 0.5)
    pair = Pair(torch.zeros(4, 1, 1, 1, 1), torch.zeros(4, 1, 1, 1, 1), *boxes, *flips)
    for geometry in (CELL_CENTERS, FIELD_CENTERS):
        got = valid_bins(pair, geometry)
        assert got.shape == (4, *CELLS) and 0 < got.float().mean() < 1
        region = overlap_box(*boxes)
        for i, *place in itertools.product(range(4), *(range(n) for n in CELLS)):
            inside = True
            for view, a in itertools.product(range(2), range(3)):
                start, stop = region[i, a].tolist()
                point = start + (place[a] + 0.5) / CELLS[a] * (stop - start)
                first, last = (geometry.center[a] + STRIDE[a] * j for j in (0, CELLS[a] - 1))
                low, high = boxes[view, i, a].tolist()
                seen = (point - low) * VIEW[a] / (high - low)
                seen = VIEW[a] - seen if flips[view, i, a] else seen
                inside &= first <= seen <= last
            assert got[(i, *place)] == inside


def check_ramps(flips) -> None:
    """Feature maps that hold the scan coordinates of their own cells' centres must align to the same places.

    Of a linear ramp linear interpolation makes no error, so what is read of either view must be the bins' own scan
    coordinates wherever these lie between the outermost cells' ones.
    """
    boxes = random_boxes(np.random.default_rng(7), 4)
    region = overlap_box(*boxes)
    for box, flip in zip(boxes, flips, strict=True):
        ramps = np.empty((4, 3, *CELLS))
        for i, a, j in itertools.product(range(4), range(3), range(max(CELLS))):
            if j < CELLS[a]:
                view = STRIDE[a] * j + 0.5  # an odd kernel with symmetric padding looks at voxel s * j, centre + 0.5
                view = VIEW[a] - view if flip[a] else view
                place = [slice(None)] * 3
                place[a] = j
                ramps[(i, a, *place)] = box[i, a, 0] + view * (box[i, a, 1] - box[i, a, 0]) / VIEW[a]
        given_box, given_flip, given_region = torch.from_numpy(box), torch.tensor([flip] * 4), torch.from_numpy(region)
        matrices = prior.interpolation_matrices(given_box, given_flip, given_region, FIELD_CENTERS)
        got = align(torch.from_numpy(ramps), matrices).numpy()
        clamped = prior.clamped_bins(given_box, given_flip, given_region, FIELD_CENTERS)
        for i, a in itertools.product(range(4), range(3)):
            start, stop = region[i, a]
            expected = start + (np.arange(CELLS[a]) + 0.5) / CELLS[a] * (stop - start)
            inside = (ramps[i, a].min() <= expected) & (expected <= ramps[i, a].max())
            assert inside.sum() >= 2
            assert (~clamped[a][i].numpy() == inside).all()
            along = np.moveaxis(got[i, a], a, 0)[inside]
            error = np.abs(along - expected[inside][:, None, None]).max()
            assert error < 1e-3, f"axis {a}: {error} voxels off"


FLIP_PAIRS = list(itertools.product(itertools.product([False, True], repeat=3), repeat=2))


@pytest.mark.parametrize("flips", FLIP_PAIRS)
def test_ramps_agree_for_all_64_flip_pairs(flips):
    check_ramps(flips)


MISTAKES = {
    "wrong axis order": ("start, stop = region[:, axis,", "start, stop = region[:, 2 - axis,"),
    "boxes of wrong axis order": ("box[:, axis, 0].float()[:, None]", "box[:, 2 - axis, 0].float()[:, None]"),
    "forgotten P / S": ("* (size / length)", "* 1.0"),
    "S of the wrong axis": ("box[:, axis, 1] - box[:, axis, 0]", "box[:, 2 - axis, 1] - box[:, 2 - axis, 0]"),
    "align_corners in the bins": ("+ 0.5) / num", ") / (num - 1)"),
    "align_corners in the map": ("(view - center) / stride", "(view / size * (num - 1))"),
    "missing flip": ("torch.where(flip[:, axis, None], size - view, view)", "view"),
    "flip by whole voxels": ("size - view", "size - 1 - view"),
    "flip of the wrong axis": ("flip[:, axis, None]", "flip[:, 2 - axis, None]"),
    "cells' corners for centres": ("(view - center)", "(view - 0)"),
    "middles of the cells": ("(view - center)", "(view - stride / 2)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_ramps_notice(mistake, monkeypatch):
    """The aligner with one mistake put in must fail the ramps: what peers got wrong cannot come in unseen."""
    source, (right, wrong) = inspect.getsource(prior.feature_coordinates), MISTAKES[mistake]
    assert right in source, "the line is written otherwise now: mutate that"
    namespace = dict(vars(prior))
    exec(source.replace(right, wrong), namespace)
    monkeypatch.setattr(prior, "feature_coordinates", namespace["feature_coordinates"])
    caught = 0
    for flips in FLIP_PAIRS[1::9]:
        try:
            check_ramps(flips)
        except AssertionError:
            caught += 1
    assert caught > 0


def test_ramps_notice_swapped_contractions():
    """An aligner that contracts H and W in the wrong order fails too: by its shapes."""
    box_1, box_2 = (torch.from_numpy(b) for b in random_boxes(np.random.default_rng(0), 1))
    matrices = interpolation_matrices(
        box_1, torch.zeros(1, 3, dtype=torch.bool), overlap_box(box_1, box_2), CELL_CENTERS
    )
    with pytest.raises(RuntimeError):
        align(torch.zeros(1, 1, *CELLS), (matrices[0], matrices[2], matrices[1]))


@pytest.mark.slow
def test_align_is_differentiable_and_float32_under_autocast():
    rng = np.random.default_rng(1)
    box_1, box_2 = (torch.from_numpy(b) for b in random_boxes(rng, 2))
    matrices = interpolation_matrices(
        box_1, torch.ones(2, 3, dtype=torch.bool), overlap_box(box_1, box_2), FIELD_CENTERS
    )
    small = tuple(matrix[:, :2, :3].double() for matrix in matrices)
    features = torch.from_numpy(rng.normal(size=(2, 2, 3, 3, 3))).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: align(f, small), (features,))
    half = torch.from_numpy(rng.normal(size=(2, 2, *CELLS))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = align(half, matrices)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, align(half.float(), matrices), rtol=0, atol=0)


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
