"""Scores against nested loops and MONAI on small masks with anisotropic voxels."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from scipy import ndimage, stats

from pgl_ray.model.metrics import (
    bounds_of,
    compare,
    drawn_medians,
    for_few,
    intervals,
    mask_metrics,
    organ_metrics,
    paired_difference,
    percentile_bounds,
    scan_draws,
    summarise,
)

SPACING = (3.0, 0.7, 1.3)
AXES = np.diag(SPACING)  # mm


def blobs(seed, shape=(7, 11, 13), keep=0.6):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    return smooth > np.quantile(smooth, keep)


def surface(mask):
    """Centres of voxels with a six-neighbour outside, by loops, in mm."""
    points = []
    for index in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                neighbour = index.copy()
                neighbour[axis] += step
                inside = (neighbour >= 0).all() and (neighbour < mask.shape).all()
                if not inside or not mask[tuple(neighbour)]:
                    points.append(tuple(index * np.array(SPACING)))
    return np.array(sorted(set(points)))


def brute_force(a, b):
    a, b = surface(a), surface(b)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = distance.min(1), distance.min(0)
    return max(there.max(), back.max()), max(np.percentile(there, 95), np.percentile(back, 95))


@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed):
    a, b = blobs(seed), blobs(seed + 100, keep=0.5)
    scores = mask_metrics(a, b, AXES)
    hd, hd95 = brute_force(a, b)
    both, either = (a & b).sum(), (a | b).sum()
    assert scores["dice"] == pytest.approx(2 * both / (a.sum() + b.sum()))
    assert scores["iou"] == pytest.approx(both / either)
    assert scores["hd_mm"] == pytest.approx(hd, rel=1e-9)
    assert scores["hd95_mm"] == pytest.approx(hd95, rel=1e-9)
    assert (scores["predicted_voxels"], scores["target_voxels"]) == (a.sum(), b.sum())
    as_monai = [torch.from_numpy(m[None, None].astype(np.float32)) for m in (a, b)]
    assert scores["dice"] == pytest.approx(compute_dice(*as_monai).item())
    assert scores["iou"] == pytest.approx(compute_iou(*as_monai).item())
    options = {"include_background": True, "spacing": list(SPACING)}
    assert scores["hd_mm"] == pytest.approx(compute_hausdorff_distance(*as_monai, **options).item(), rel=1e-5)
    hd95 = compute_hausdorff_distance(*as_monai, percentile=95, **options).item()
    assert scores["hd95_mm"] == pytest.approx(hd95, rel=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_is_measured_in_mm_along_its_axis(axis):
    a = np.zeros((12, 14, 16), bool)
    a[3:6, 4:8, 5:10] = True
    b = np.roll(a, 2, axis)
    scores = mask_metrics(a, b, AXES)
    assert scores["hd_mm"] == pytest.approx(2 * SPACING[axis], rel=1e-5)
    assert mask_metrics(a, a, AXES) | {"dice": 1, "iou": 1, "hd_mm": 0, "hd95_mm": 0} == mask_metrics(a, a, AXES)


def test_place_in_the_scan_and_its_border_change_nothing():
    a, b = blobs(1), blobs(2)
    wide = [np.pad(m, ((2, 5), (9, 0), (0, 3))) for m in (a, b)]
    assert mask_metrics(*wide, AXES) == pytest.approx(mask_metrics(a, b, AXES))


def test_empty_masks():
    a, empty = blobs(0), np.zeros((7, 11, 13), bool)
    nothing = mask_metrics(empty, empty, AXES)
    assert all(math.isnan(nothing[name]) for name in ("dice", "iou", "hd_mm", "hd95_mm"))
    for pair in ((a, empty), (empty, a)):
        scores = mask_metrics(*pair, AXES)
        assert scores["dice"] == scores["iou"] == 0
        assert math.isnan(scores["hd_mm"]) and math.isnan(scores["hd95_mm"])
    assert math.isnan(mask_metrics(a, a, AXES, distances=False)["hd_mm"])


def test_task_binary_counts_the_tumour_as_organ():
    target = np.zeros((6, 7, 8), np.uint8)
    target[1:5, 1:6, 1:7] = 1
    target[2:4, 2:4, 2:4] = 2
    only_organ = np.minimum(target, 1)
    organs = {"liver": 1, "tumour": 2}
    nested = organ_metrics(only_organ, target, organs, AXES, "binary")
    assert nested["liver"]["dice"] == 1 and nested["tumour"]["dice"] == 0
    apart = organ_metrics(only_organ, target, organs, AXES, "multiclass")
    assert apart["liver"]["dice"] == pytest.approx(2 * 112 / (120 + 112))
    assert list(organ_metrics(only_organ, target, {"tumour": 2}, AXES, "binary")) == ["tumour"]


def row(organ, dice, hd=math.nan, predicted=1, wanted=1):
    scores = {"dice": dice, "iou": dice / 2, "hd_mm": hd, "hd95_mm": hd}
    return {"scan_id": "s", "organ": organ, **scores, "predicted_voxels": predicted, "target_voxels": wanted}


def test_summary_averages_over_scans_then_over_organs():
    rows = [
        row("a", 0.5, 10.0),
        row("a", 0.7, 20.0),
        row("a", 0.0, predicted=0),  # missed
        row("b", 0.9, 2.0),
        row("b", math.nan, predicted=0, wanted=0),  # in neither: not counted
        row("b", 0.0, wanted=0),  # invented
        row("c", math.nan, predicted=0, wanted=0),
    ]
    summary = summarise(rows)
    a, b, c = (summary["organs"][name] for name in "abc")
    assert a["dice"] == pytest.approx(0.4) and a["hd_mm"] == pytest.approx(15)
    assert (a["num_scans"], a["num_missed"], a["num_invented"]) == (3, 1, 0)
    assert b["dice"] == pytest.approx(0.45) and b["hd_mm"] == pytest.approx(2)
    assert (b["num_scans"], b["num_missed"], b["num_invented"]) == (2, 0, 1)
    assert c["dice"] is None and c["num_scans"] == 0
    assert summary["dice"] == pytest.approx((0.4 + 0.45) / 2) and summary["hd_mm"] == pytest.approx((15 + 2) / 2)
    assert summarise([])["dice"] is None


def rows_of(table):
    """A Dice table [scans, organs] as rows; NaN where an organ is in neither mask, None where it is not labelled."""
    rows = []
    for number, scores in enumerate(table):
        named = zip("ab", scores)
        rows += [row(organ, dice) | {"scan_id": f"s{number}"} for organ, dice in named if dice is not None]
    return rows


def test_intervals_against_scipy_and_a_walk_through_the_draws():
    rng = np.random.default_rng(0)
    table = rng.uniform(0.3, 0.9, (12, 2))
    bounds = intervals(rows_of(table))
    for k, organ in enumerate("ab"):
        theirs = stats.bootstrap((table[:, k],), np.mean, method="percentile", n_resamples=5000, rng=1)
        wanted = for_few(list(theirs.confidence_interval), table[:, k].mean(), 12)
        assert bounds["organs"][organ]["dice"] == pytest.approx(wanted, abs=0.02)
    wide = bounds["organs"]["a"]["dice"]
    assert wide[0] < table[:, 0].mean() < wide[1] and bounds["organs"]["a"]["hd_mm"] is None
    # organs of a scan are drawn together, and an organ that is not among the drawn ones does not count
    holes = [[0.2, 0.9], [0.4, None], [0.6, None]]
    means = []
    for draw in np.random.default_rng(5).integers(0, 3, (4000, 3)):
        parts = [[holes[i][k] for i in draw if holes[i][k] is not None] for k in (0, 1)]
        means.append(np.mean([np.mean(part) for part in parts if part]))
    bounds = intervals(rows_of(holes))
    wanted = for_few(list(np.percentile(means, (2.5, 97.5))), (0.4 + 0.9) / 2, 3)
    assert bounds["dice"] == pytest.approx(np.clip(wanted, 0, 1), abs=0.05)
    assert bounds["organs"]["b"]["dice"] is None  # one scan tells nothing of its scatter
    assert intervals(rows_of(holes), seed=0) == bounds and intervals(rows_of(holes[:1]))["dice"] is None
    assert intervals([])["dice"] is None


def test_distances_in_a_sheared_scan_are_those_of_its_affine():
    """A tilted gantry: a step along D goes down, too; by hand."""
    axes = np.array([[3.0, 0, 0], [0.8, 0.7, 0], [0, 0, 1.3]])
    a, b = np.zeros((2, 6, 8, 8), bool)
    a[0, 1, 1] = b[4, 5, 3] = True
    there = np.array([4 * 3.0, 4 * 0.8 + 4 * 0.7, 2 * 1.3])
    assert mask_metrics(a, b, axes)["hd_mm"] == pytest.approx(np.sqrt((there**2).sum()))


def test_a_difference_its_interval_and_its_test_are_of_one_thing():
    """Where a rare organ decides: +0.1 for the one in all scans, -0.5 for the one in a single scan."""
    rng = np.random.default_rng(2)
    theirs = np.column_stack([rng.uniform(0.4, 0.6, 10), np.full(10, math.nan)])
    theirs[3, 1] = 0.9
    ours = theirs + np.array([0.1, -0.5])
    compared = compare(rows_of(ours), rows_of(theirs))["dice"]
    means = [summarise(rows_of(table))["dice"] for table in (ours, theirs)]
    by_scan = np.nansum((ours - theirs) / [10, 1], 1) * 10 / 2  # a tenth of one organ's mean, the whole of the other's
    assert compared["difference"] == pytest.approx(means[0] - means[1]) == pytest.approx(by_scan.mean()) == -0.2
    assert compared["p"] == pytest.approx(stats.wilcoxon(by_scan).pvalue) and compared["num_scans"] == 10
    assert (
        compared["ci95"][0] - 1e-9 < compared["difference"] < 0.1 < compared["ci95"][1]
    )  # a third of draws lack that scan
    mean, bounds, num = paired_difference(rows_of(ours), rows_of(theirs))
    assert (mean, bounds, num) == (compared["difference"], compared["ci95"], 10)


@pytest.mark.parametrize("both", [1, 2, 5, 10])
def test_which_organs_a_scan_has_is_no_noise(both):
    """Every pair is 0.05 better; how many scans have the second organ says nothing of that."""
    rng = np.random.default_rng(both)
    theirs = rng.uniform(0.3, 0.9, (10, 2))
    theirs[both:, 1] = math.nan
    said = paired_difference(rows_of(theirs + 0.05), rows_of(theirs))
    assert said == (pytest.approx(0.05), pytest.approx([0.05, 0.05]), 10)


@pytest.mark.parametrize("num", [2, 3, 5, 10])
def test_noise_of_few_scans_is_seldom_a_difference(num):
    """Runs that differ by chance: one time in twenty by the interval, not in five."""
    rng, wrong = np.random.default_rng(num), 0
    for _ in range(150):
        theirs = rng.uniform(0.3, 0.7, (num, 2))
        _, (low, high), _ = paired_difference(rows_of(theirs + rng.normal(0, 0.05, (num, 2))), rows_of(theirs))
        wrong += not low <= 0 <= high
    assert wrong <= 0.09 * 150


def test_a_paired_comparison_is_scipys():
    rng = np.random.default_rng(1)
    theirs = rng.uniform(0.3, 0.8, (9, 2))
    ours = theirs + rng.normal(0.05, 0.05, theirs.shape)
    compared = compare(rows_of(ours), rows_of(theirs))
    by_scan = (ours - theirs).mean(1)
    assert compared["dice"]["difference"] == pytest.approx(by_scan.mean())
    assert compared["dice"]["p"] == pytest.approx(stats.wilcoxon(by_scan).pvalue)
    bounds = stats.bootstrap((by_scan,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    assert compared["dice"]["ci95"] == pytest.approx(for_few(list(bounds), by_scan.mean(), 9), abs=0.01)
    for k, organ in enumerate("ab"):
        mine = compared["organs"][organ]["dice"]
        assert mine["p"] == pytest.approx(stats.wilcoxon(ours[:, k], theirs[:, k]).pvalue)
        assert mine["difference"] == pytest.approx((ours - theirs)[:, k].mean()) and mine["num_scans"] == 9
    back = compare(rows_of(theirs), rows_of(ours))["dice"]
    assert back["difference"] == pytest.approx(-compared["dice"]["difference"]) and back["p"] == compared["dice"]["p"]

    ours[0, 1] = math.nan  # in neither mask there, invented here
    compared = compare(rows_of(ours), rows_of(theirs))
    assert (compared["dice"]["num_scans"], compared["dice"]["num_left_out"]) == (9, 1)
    assert compared["organs"]["b"]["dice"]["num_scans"] == 8
    same = compare(rows_of(theirs), rows_of(theirs))["dice"]
    assert (same["difference"], same["ci95"], same["p"]) == (0, [0, 0], 1)
    single = compare(rows_of(theirs[:1]), rows_of(theirs[:1] / 2))["dice"]
    assert single["p"] is single["ci95"] is None and single["difference"] > 0


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize("num", [2, 3, 7])
def test_a_drawn_median_is_that_of_the_rows_repeated(num, missing):
    """As often as both of a row's scans were drawn; a nested loop repeats them."""
    rng = np.random.default_rng(num)
    scans = [f"s{k}" for k in range(num)]
    rows = [
        {"scan_id": scan, "source_id": source, "organ": organ, "error_mm": rng.uniform(0, 50)}
        for scan in scans
        for source in scans
        for organ in "ab"
        if source != scan and rng.random() >= missing
    ]
    draws = rng.multinomial(num, np.full(num, 1 / num), 50)
    for times, median in zip(draws, drawn_medians(rows, scans, draws), strict=True):
        often, repeated = dict(zip(scans, times)), []
        for one in rows:
            repeated += [one["error_mm"]] * (often[one["scan_id"]] * often[one["source_id"]])
        assert median == pytest.approx(np.median(repeated)) if repeated else np.isnan(median)
    earlier = [{"scan_id": one["scan_id"], "error_mm": one["error_mm"]} for one in rows]
    for times, median in zip(draws, drawn_medians(earlier, scans, draws), strict=True):
        repeated = np.repeat([one["error_mm"] for one in rows], [times[scans.index(one["scan_id"])] for one in rows])
        assert median == pytest.approx(np.median(repeated)) if len(repeated) else np.isnan(median)
    common = scans[:-1]  # of scans that are left out nothing counts, in either part
    inside = [one for one in rows if {one["scan_id"], one["source_id"]} <= set(common)]
    once = drawn_medians(rows, common, np.ones((1, num - 1), int))
    assert once == pytest.approx(np.median([one["error_mm"] for one in inside])) if inside else np.isnan(once)


@pytest.mark.parametrize("own", ["one effect per scan", "one per part"])
def test_intervals_of_matching_hold_the_truth(own):
    """Errors that go with both scans of a pair: drawn in one part alone, too many intervals would miss the median."""
    rng, num, held, held_by_one = np.random.default_rng(0), 12, 0, 0
    draws = scan_draws(num, 0)[:200]
    for _ in range(100):
        searched = rng.normal(0, 5, num)
        source = searched if own == "one effect per scan" else rng.normal(0, 5, num)
        rows = [
            {"scan_id": i, "source_id": j, "error_mm": 30 + searched[i] + source[j] + rng.normal()}
            for i in range(num)
            for j in range(num)
            if i != j
        ]
        value = float(np.median([one["error_mm"] for one in rows]))
        low, high = bounds_of(drawn_medians(rows, range(num), draws), value, num)
        held += low <= 30 <= high
        searched_alone = [{"scan_id": one["scan_id"], "error_mm": one["error_mm"]} for one in rows]
        low, high = bounds_of(drawn_medians(searched_alone, range(num), draws), value, num)
        held_by_one += low <= 30 <= high
    assert held_by_one < 88 < 90 <= held


@pytest.mark.parametrize("num", [2, 5, 12])
def test_bounds_of_few_values_are_as_wide_as_student_s(num):
    """Noise of no mean, often: one time in twenty, where the bootstrap alone would far more often."""
    rng, wrong, plain = np.random.default_rng(num), 0, 0
    for _ in range(400):
        values = rng.normal(size=num)
        drawn = values[rng.integers(num, size=(400, num))].mean(1)
        bounds = percentile_bounds(drawn)
        low, high = for_few(bounds, float(values.mean()), num)
        wrong, plain = wrong + (not low <= 0 <= high), plain + (not bounds[0] <= 0 <= bounds[1])
    assert wrong <= 0.09 * 400 and plain > wrong
