"""The figures of promise.py, one row each, and the tables that are made of them."""

import json
import warnings
from pathlib import Path

import numpy as np

from pgl_ray.judge.judges import HIGHER_IS_BETTER, LEAST_ROOM
from pgl_ray.judge.readings import IN_WORDS, READINGS
from pgl_ray.model.metrics import drawn_medians, percentile_bounds, reach

RANDOM, CEILING, BEST = "random", "all labels", "pgl, by place"
TWIN = f"{BEST}, wrong priors"
CONTROLS = (RANDOM, "wrong priors", TWIN)  # that know no places
JUDGES = ["voxels", "decoder", "matching"]
JUDGE_NAMES = {"voxels": "voxel probe", "decoder": "frozen decoder, Dice", "matching": "point matching, mm"}
NUM_SCANS = (1, 5, 10)
NUM_LABELLED, TUNE_STEPS = 5, 450  # end to end
NUM_DRAWS = 2000  # of seeds and scans, of an interval


# -- rows ------------------------------------------------------------------------------------------------------------


def rows_of(place: Path) -> list[dict]:
    """All figures of a folder of runs, or of a file that `table` wrote."""
    if place.suffix == ".json":
        return json.loads(place.read_text())
    return [*figures(place), *fine_tuned(place), *({"judge": "search", **row} for row in candidates(place))]


def figures(runs: Path) -> list[dict]:
    """A row per arm, seed, number of labelled scans, judge and reading."""
    rows = []
    for path in sorted((runs / "judged").glob("*.json")):
        arm, seed, num_scans = path.stem.rsplit(", ", 2)
        about = {
            "arm": arm,
            "seed": int(seed.removeprefix("seed ")),
            "num_scans": int(num_scans.removesuffix(" scans")),
        }
        for reading, scores in json.loads(path.read_text())["readings"].items():
            for judge, score in scores.items():
                last = score["details"].get("last_map")
                row = {"judge": judge, "reading": reading, "value": round(score["value"], 4)}
                row |= {"last_map": round(last, 4)} if last else {}
                rows.append(about | row | per_scan(judge, score["details"]))
    return rows


def per_scan(judge: str, details: dict) -> dict[str, list]:
    """What a judge says of each test scan: its correct voxels of each class and how many there are; or per organ its
    Dice, none where the organ is not there; or of each pair of scans and organ the numbers of the searched one and of
    the one asked for, and the error."""
    if judge == "voxels":
        return {"hits": details["hits"], "counts": details["counts"]}
    if judge == "matching":
        scans = sorted({row[key] for row in details["rows"] for key in ("scan_id", "source_id")})
        number = {scan: k for k, scan in enumerate(scans)}
        rows = [(number[row["scan_id"]], number[row["source_id"]], row["error_mm"]) for row in details["rows"]]
        return {"scans": scans, "pairs": [[scan, source, round(error, 1)] for scan, source, error in rows]}
    found = {(row["scan_id"], row["organ"]): row["dice"] for row in details["rows"]}
    scans, organs = (sorted({name[i] for name in found}) for i in (0, 1))
    values = [[found.get((scan, organ), float("nan")) for organ in organs] for scan in scans]
    return {"scans": scans, "values": [[None if np.isnan(one) else round(one, 4) for one in row] for row in values]}


def fine_tuned(runs: Path) -> list[dict]:
    """A row per arm and seed that was fine-tuned."""
    rows = []
    for one in (json.loads(path.read_text()) for path in sorted((runs / "tuned").glob("*.json"))):
        about = {key: one[key] for key in ("arm", "seed", "factor", "val_dice")}
        about |= {"judge": "fine-tuned", "num_scans": NUM_LABELLED, "value": one["dice"]}
        rows.append(about | per_scan("fine-tuned", one))
    return rows


def candidates(place: Path) -> list[dict]:
    """A row per candidate of a search: of a folder of runs, or of a file that `table` wrote."""
    if place.suffix == ".json":
        return [row for row in json.loads(place.read_text()) if row["judge"] == "search"]
    rows = []
    for path in sorted((place / "search").glob("*.json")):
        arm, rate, turnover = path.stem.rsplit(", x ", 2)
        judged = json.loads(path.read_text())
        about = {"arm": arm, "rate": float(rate), "turnover": float(turnover)}
        if "failed" in judged:
            rows.append(about | {"failed": judged["failed"]})
        else:
            scores = judged["readings"]["reestimated"]
            rows.append(about | {judge: scores[judge]["value"] for judge in JUDGES})
    return rows


def best_of(place: Path, arm: str) -> tuple[float, float]:
    """Factors of the rate and of 1 - decay with the best Dice so far."""
    tried = [row for row in candidates(place) if row["arm"] == arm and "failed" not in row]
    if not tried:
        raise SystemExit(f"{place}: no search of {arm!r}; run promise.py search first")
    best = max(tried, key=lambda row: row["decoder"])
    return best["rate"], best["turnover"]


# -- what they say ------------------------------------------------------------------------------------------------


def strongest(rows: list[dict], arms: tuple[str, ...], judge: str, num_scans: int) -> tuple[str, str] | None:
    """Which of these arms is the strongest in which reading; none where none was judged."""
    best, sign = None, -1 if judge == "matching" else 1
    for arm, reading in ((arm, reading) for arm in arms for reading in READINGS):
        values = [row["value"] for row in chosen(rows, arm, reading, judge, num_scans)]
        if values and (best is None or sign * np.mean(values) > best[0]):
            best = sign * np.mean(values), arm, reading
    return best and best[1:]


def chosen(rows: list[dict], arm: str, reading: str, judge: str, num_scans: int) -> list[dict]:
    """Rows of one cell, by seed."""
    keys = {"arm": arm, "reading": reading, "judge": judge, "num_scans": num_scans}
    of_keys = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    return sorted(of_keys, key=lambda row: row["seed"])


def difference(ours: list[dict], theirs: list[dict]) -> tuple[float, list[float], int, int] | None:
    """Mean difference of the values over the seeds that both have, its 95 % interval, in how many seeds it is above 0,
    and how many there are."""
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
    if not pairs:
        return None
    values = np.array([a["value"] - b["value"] for a, b in pairs])
    one, other = mean_draws(*zip(*pairs, strict=True))
    return float(values.mean()), interval(one - other, values), int((values > 0).sum()), len(pairs)


def interval(drawn: np.ndarray, by_seed: np.ndarray) -> list[float]:
    """95 % interval of a mean: the bootstrap's over seeds and scans or, where that is wider, Student's over the seeds,
    of which the bootstrap of so few knows too little (with 5 it would call noise a finding 15 % of the time).

    Args:
        drawn: the mean in draws of seeds and scans.
        by_seed: its values.
    """
    low, high = percentile_bounds(drawn)
    half, mean = reach(by_seed), float(by_seed.mean())
    return [low, high] if half is None else [min(low, mean - half), max(high, mean + half)]


def share_of_room(ours: list[dict], base: list[dict], top: list[dict]) -> tuple[float, list[float] | None] | None:
    """Share of the way from the control to the upper end, and its 95 % interval where there are two seeds or more; none
    where one of them has fewer seeds, or where the upper end is hardly better than the control."""
    same = [(a, b, c) for a in ours for b in base for c in top if a["seed"] == b["seed"] == c["seed"]]
    if not same or len(same) < len(ours):
        return None
    judge, (a, b, c) = ours[0]["judge"], np.mean([[row["value"] for row in rows] for rows in same], 0)
    if (c - b) * (1 if HIGHER_IS_BETTER[judge] else -1) < LEAST_ROOM[judge]:
        return None
    drawn_a, drawn_b, drawn_c = mean_draws(*zip(*same, strict=True))
    by_seed = np.array([(ours["value"] - low["value"]) / (c - b) for ours, low, _ in same])
    bounds = interval((drawn_a - drawn_b) / (drawn_c - drawn_b), by_seed) if len(same) > 1 else None
    return float((a - b) / (c - b)), bounds


def mean_draws(*arms: tuple[dict, ...]) -> list[np.ndarray]:
    """The mean over seeds of each arm's value in draws of seeds and test scans, the same for all arms; [draws] each.

    What is kept of a value is rounded, and of earlier matchings only each searched scan's medians: draws are moved by
    what all scans once differ in from the value.
    """
    rng, num_seeds, first = np.random.default_rng(0), len(arms[0]), arms[0][0]
    num_scans = len(next(first[key] for key in ("hits", "values", "scans") if key in first))
    scans = rng.integers(num_scans, size=(NUM_DRAWS, num_scans))
    seeds = rng.integers(num_seeds, size=(NUM_DRAWS, num_seeds))
    all_once = np.arange(num_scans)[None]
    moved = (
        np.stack([of_draws(row, scans) + row["value"] - of_draws(row, all_once) for row in rows], 1) for rows in arms
    )
    return [np.take_along_axis(one, seeds, 1).mean(1) for one in moved]


def of_draws(row: dict, scans: np.ndarray) -> np.ndarray:
    """A judge's value in draws of the test scans, [draws]: balanced accuracy, the mean over organs of the mean Dice, or
    the median over pairs of scans and organs, each scan drawn in both of its parts (of older files over searched scans
    and organs, which alone are drawn: intervals narrower than they should be).

    Args:
        row: of `figures` or `fine_tuned`.
        scans: numbers of the scans drawn, int [draws, scans].
    """
    if row["judge"] == "voxels":
        hits, counts = (np.array(row[key])[scans].sum(1) for key in ("hits", "counts"))
        return np.nanmean(np.where(counts > 0, hits / np.maximum(counts, 1), np.nan), 1)
    if "pairs" in row:
        named = [{"scan_id": scan, "source_id": source, "error_mm": error} for scan, source, error in row["pairs"]]
        times = (scans[..., None] == np.arange(len(row["scans"]))).sum(1)
        return drawn_medians(named, range(len(row["scans"])), times)
    values = np.array(row["values"], float)[scans]  # [draws, scans, organs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an organ that no scan of a draw has
        return np.nanmedian(values, (1, 2)) if row["judge"] == "matching" else np.nanmean(np.nanmean(values, 1), 1)


# -- Markdown ----------------------------------------------------------------------------------------------------


def tables(rows: list[dict], order: list[str]) -> str:
    """Markdown: per number of labelled scans a row per arm, each in its strongest reading, then what was fine-tuned end
    to end, then a search's candidates.

    Args:
        rows: of `rows_of`.
        order: the arms that are pre-trained.
    """
    text = []
    for num_scans in NUM_SCANS:
        here = [row for row in rows if row["judge"] in JUDGES and row["num_scans"] == num_scans]
        judges = [judge for judge in JUDGES if any(row["judge"] == judge for row in here)]
        if not judges:
            continue
        arms = [arm for arm in (RANDOM, *order, CEILING) if any(row["arm"] == arm for row in here)]
        lows = {judge: strongest(here, CONTROLS, judge, num_scans) for judge in judges}
        named = [f"of the {JUDGE_NAMES[judge].split(',')[0]} {named_arm(*low)}" for judge, low in lows.items() if low]
        controls = f"strongest control {'; '.join(named)}" if named else "no control"
        text.append(f"\n{num_scans} labelled scan{'s' * (num_scans > 1)}; {controls}\n")
        text += table_head("arm (seeds)", judges)
        for arm in arms:
            best = {judge: strongest(here, (arm,), judge, num_scans) for judge in judges}
            of_judges = {judge: chosen(here, *one, judge, num_scans) for judge, one in best.items() if one}
            num_seeds = max((len(cells) for cells in of_judges.values()), default=0)
            cells = [
                cell(here, of_judges[judge], lows[judge]) + mark(best[judge]) if judge in of_judges else "-"
                for judge in judges
            ]
            text.append(f"| {arm} ({num_seeds}) | {' | '.join(cells)} |")
        text += against_others(here, [arm for arm in arms if arm in order and arm != BEST], judges, num_scans)
    text += end_to_end([row for row in rows if row["judge"] == "fine-tuned"])
    return "\n".join([*text, *search_table([row for row in rows if row["judge"] == "search"])])


def against_others(rows: list[dict], arms: list[str], judges: list[str], num_scans: int) -> list[str]:
    """Lines of a table: what PGL by place is better than each other pre-training by, each in its strongest reading, and
    in how many seeds."""
    lines = []
    best = {judge: strongest(rows, (BEST,), judge, num_scans) for judge in judges}
    for arm in arms:
        cells = []
        for judge in judges:
            other = strongest(rows, (arm,), judge, num_scans)
            ours, theirs = (chosen(rows, *one, judge, num_scans) if one else [] for one in (best[judge], other))
            better = gain(difference(ours, theirs), judge)
            cells.append(better + mark(other) if better else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return ["", *table_head(f"{BEST}, better than", judges), *lines] if lines else []


def table_head(first: str, judges: list[str]) -> list[str]:
    """The first two lines of a table with a column per judge."""
    return [f"| {first} | {' | '.join(JUDGE_NAMES[judge] for judge in judges)} |", "|---" * (len(judges) + 1) + "|"]


def cell(rows: list[dict], ours: list[dict], low: tuple[str, str] | None) -> str:
    """Mean over seeds; what that is better than the strongest control by, with the interval; in how many seeds it is
    ahead; the share of the room up to the encoder with all labels, with its interval."""
    if not ours:
        return "-"
    judge, num_scans = ours[0]["judge"], ours[0]["num_scans"]
    high = strongest(rows, (CEILING,), judge, num_scans)
    base, top = (chosen(rows, *one, judge, num_scans) if one else [] for one in (low, high))
    mean = float(np.mean([row["value"] for row in ours]))
    text = f"{mean:.{1 if judge == 'matching' else 3}f}"
    better = gain(difference(ours, base), judge) if ours != base else ""
    if not better:
        return text
    text += f": {better}"
    room = share_of_room(ours, base, top) if ours != top else None
    if not room or room[0] <= 0:
        return text
    bounds = f" [{room[1][0]:.0%}, {room[1][1]:.0%}]" if room[1] else ""
    return f"{text}, {room[0]:.0%}{bounds}"


def gain(gap: tuple[float, list[float], int, int] | None, judge: str) -> str:
    """A difference as tables have it: more is better, whatever the judge; nothing where there is none."""
    if not gap:
        return ""
    mean, bounds, above, num_seeds = gap
    sign, digits = (-1, 1) if judge == "matching" else (1, 3)
    low, high = sorted(sign * bound for bound in bounds)
    ahead = above if sign > 0 else num_seeds - above
    return f"{sign * mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {ahead} of {num_seeds}"


def mark(one: tuple[str, str]) -> str:
    """What stands behind a figure of another reading than the one that counts."""
    return "" if one[1] == READINGS[0] else f" ({one[1]})"


def named_arm(arm: str, reading: str) -> str:
    """An arm as tables call it."""
    return arm if reading == "reestimated" else f"{arm}, {IN_WORDS[reading]}"


def end_to_end(rows: list[dict]) -> list[str]:
    """Lines of the table of fine-tuning."""
    base, lines = [row for row in rows if row["arm"] == RANDOM], []
    if base:
        lines += [
            f"\nend to end, {NUM_LABELLED} labelled scans, {TUNE_STEPS} steps, the encoder's rate chosen per arm\n"
        ]
        lines += ["| arm | Dice, by seed | rate x | mean | better than random by, 95 % |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys([RANDOM, *(row["arm"] for row in rows)]) if base else ():
        cells = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        gain = difference(cells, base) if arm != RANDOM else None
        text = f"{gain[0]:+.3f} [{gain[1][0]:+.3f}, {gain[1][1]:+.3f}]" if gain else "-"
        values, factors = (" ".join(f"{row[key]:.3g}" for row in cells) for key in ("value", "factor"))
        lines.append(f"| {arm} | {values} | {factors} | {np.mean([row['value'] for row in cells]):.3f} | {text} |")
    return lines


def search_table(rows: list[dict]) -> list[str]:
    """Lines of the table of a search; the choice of each arm is bold."""
    if not rows:
        return []
    lines = ["\n| arm | rate x | 1 - decay x | probe | decoder, Dice | matching, mm |", "|---|---|---|---|---|---|"]
    for row in rows:
        of_arm = [other for other in rows if other["arm"] == row["arm"] and "failed" not in other]
        best = max(of_arm, key=lambda other: other["decoder"], default=None)
        cells = [f"{row['rate']:g}", f"{row['turnover']:g}"]
        if "failed" in row:
            cells += ["blew up", "-", "-"]
        else:
            cells += [f"{row[judge]:.{1 if judge == 'matching' else 3}f}" for judge in JUDGES]
        mark = "**" if row is best else ""
        lines.append(f"| {mark}{row['arm']}{mark} | {' | '.join(cells)} |")
    return lines
