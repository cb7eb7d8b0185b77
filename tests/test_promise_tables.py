"""Tables and intervals of tests/benchmarks/promise.py: what the README says of methods rests on them."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import promise  # noqa: E402
import promise_tables as tables  # noqa: E402

FIGURES = ROOT / "tests" / "benchmarks" / "results" / "promise_openkbp.json"


def row(seed: int, values: list, arm: str = "ours", judge: str = "decoder", reading: str = "reestimated") -> dict:
    """What a judge said of one encoder: a value per scan (and organ)."""
    values = [one if isinstance(one, list) else [one] for one in values]
    there = [one for scan in values for one in scan if one is not None]
    mean = float(np.median(there) if judge == "matching" else np.mean(there))
    about = {"arm": arm, "seed": seed, "num_scans": 5, "judge": judge, "reading": reading}
    return about | {"value": mean, "values": values}


def test_readmes_say_what_the_figures_do():
    """Each gain with its interval, each row of an arm, and the front page's means, as the command prints them."""
    longer = FIGURES.with_name("promise_openkbp_80000_pairs.json")
    printed = "".join(tables.tables(tables.rows_of(file), list(promise.ARMS)) for file in (FIGURES, longer))
    text = (ROOT / "tune_spaces" / "README.md").read_text()
    gains = re.findall(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", text)
    rows = re.findall(r"^\| [a-z, ']+ \(\d\) \|.*$", text, re.MULTILINE)
    assert len(gains) > 40 and len(rows) >= 8
    assert [one for one in [*gains, *rows] if one not in printed] == []

    front = re.findall(r"^\| (.+), (\d) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    means = {re.sub(r":[^|(]*(?=[|(])", " ", one) for one in rows}  # without gains, intervals and shares
    names = {"random weights": "random", "BYOL": "byol", "Models Genesis": "genesis"}
    seen = set()
    for name, num_seeds, cells in front:
        name = name.replace("**", "").replace(" (control)", "")
        name = names.get(name, name.replace("PGL by", "pgl, by").replace("PGL", "pgl"))
        name = "all labels" if name.startswith("trained with") else name
        seen.add(f"| {name} ({num_seeds}) | {cells.replace('**', '')} |")
    assert means <= seen


def test_search_s_choice_is_read_from_its_file():
    """Rate and 1 - decay of the candidate with the highest Dice, found by a loop over the file."""
    rows = [one for one in json.loads(FIGURES.read_text()) if one["judge"] == "search"]
    for arm in {one["arm"] for one in rows}:
        dice = -1.0
        for one in rows:
            if one["arm"] == arm and one.get("decoder", -1) > dice:
                dice, expected = one["decoder"], (one["rate"], one["turnover"])
        assert tables.best_of(FIGURES, arm) == expected
    with pytest.raises(SystemExit, match="no search of 'nobody'"):
        tables.best_of(FIGURES, "nobody")


def test_interval_of_one_seed_is_scipy_s_over_scans():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(15), rng.random(15)
    mean, bounds, above, num = tables.difference([row(0, list(ours))], [row(0, list(theirs))])
    expected = stats.bootstrap((ours - theirs,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    assert mean == pytest.approx((ours - theirs).mean())
    np.testing.assert_allclose(bounds, expected, atol=0.02)
    assert (above, num) == (int(mean > 0), 1)


def test_interval_of_few_seeds_is_at_least_student_s():
    """Scans all alike, so that seeds alone differ: a bootstrap of five values would be narrower."""
    by_seed = [0.1, 0.3, 0.0, 0.5, 0.2]
    ours = [row(seed, [0.5 + value] * 4) for seed, value in enumerate(by_seed)]
    theirs = [row(seed, [0.5] * 4) for seed in range(5)]
    mean, bounds, above, num = tables.difference(ours, theirs)
    expected = stats.t.interval(0.95, 4, np.mean(by_seed), stats.sem(by_seed))
    assert (round(mean, 9), above, num) == (0.22, 4, 5) and bounds == pytest.approx(expected)
    top = [row(seed, [0.9] * 4) for seed in range(5)]
    assert tables.share_of_room(ours, theirs, top)[1] == pytest.approx([bound / 0.4 for bound in expected])
    assert tables.share_of_room(ours[:1], theirs[:1], top[:1]) == (pytest.approx(0.25), None)


def test_noise_is_called_a_finding_one_time_in_twenty():
    """Five seeds of nothing but noise, often."""
    rng, num, wrong = np.random.default_rng(3), 300, 0
    for _ in range(num):
        ours = [row(seed, [float(value)] * 3) for seed, value in enumerate(rng.normal(size=5))]
        low, high = tables.difference(ours, [row(seed, [0.0] * 3) for seed in range(5)])[1]
        wrong += not low <= 0 <= high
    assert 0.02 < wrong / num < 0.09


def test_seeds_without_a_partner_do_not_count():
    ours, theirs = [row(0, [0.4] * 3), row(7, [0.9] * 3)], [row(0, [0.3] * 3), row(1, [0.0] * 3)]
    mean, _, _, num = tables.difference(ours, theirs)
    assert (round(mean, 6), num) == (0.1, 1)
    assert tables.difference([row(7, [1.0])], [row(0, [1.0])]) is None


def test_organ_that_no_scan_of_a_draw_has_is_left_out():
    one = row(0, [[0.2, None], [0.4, 0.8]])
    draws = tables.of_draws(one, np.array([[0, 0], [0, 1], [1, 1]]))
    np.testing.assert_allclose(draws, [0.2, (0.3 + 0.8) / 2, (0.4 + 0.8) / 2])


def test_share_of_the_room():
    base, top = [row(0, [0.2] * 3), row(1, [0.2] * 3)], [row(0, [0.6] * 3), row(1, [0.6] * 3)]
    ours = [row(0, [0.5] * 3), row(1, [0.5] * 3)]
    share, bounds = tables.share_of_room(ours, base, top)
    assert share == pytest.approx(0.75) and bounds == pytest.approx([0.75, 0.75])
    assert tables.share_of_room(ours[:1], base, top)[1] is None, "one seed has no interval"
    assert tables.share_of_room(ours, base[:1], top) is None, "not the same seeds"
    assert tables.share_of_room(ours, base, base) is None, "no room"


def test_fewer_mm_are_better():
    """A control of 30 mm, ours of 20, all labels of 10: 10 mm better, half of the room."""
    rows = [
        row(seed, [mm] * 3, arm, "matching")
        for arm, mm in (("random", 30), ("wrong priors", 40), (tables.BEST, 20), ("all labels", 10))
        for seed in (0, 1)
    ]
    text = tables.tables(rows, ["wrong priors", tables.BEST])
    assert "strongest control of the point matching random" in text
    assert "| pgl, by place (2) | 20.0: +10.0 [+10.0, +10.0], 2 of 2, 50% [50%, 50%] |" in text
    assert "| wrong priors | +20.0 [+20.0, +20.0], 2 of 2 |" in text


def test_arms_without_a_control_have_their_values_alone():
    rows = [row(0, [20] * 3, tables.BEST, "matching")]
    text = tables.tables(rows, [tables.BEST])
    assert "no control" in text and "| pgl, by place (1) | 20.0 |" in text


def test_each_arm_stands_in_its_strongest_reading():
    rows = [row(0, [0.1], "random"), row(0, [0.2], "random", reading="off"), row(0, [0.4], tables.BEST)]
    text = tables.tables(rows, [tables.BEST])
    assert "| random (1) | 0.200 (off) |" in text
    assert "| pgl, by place (1) | 0.400: +0.200" in text
