"""The report: what it says of planted numbers, that it stands alone, and that its pictures show the right place."""

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, faults
from scipy import ndimage, stats

from pgl_ray import cli, probe, report
from pgl_ray.config import FinetuneConfig, PretrainConfig, ReportConfig, build, load
from pgl_ray.data import scan_files, store
from pgl_ray.files.resample import resample
from pgl_ray.judge.judges import IN_FULL
from pgl_ray.pages import figures, label_pictures, pair_pictures, plots, probe_tables, run_folders, slices, tables

SHAPE, SPACING, VIEW = (14, 24, 30), (5.0, 2.0, 1.5), (6, 10, 12)
LABELS = {"liver": 1, "left_kidney": 4}
ORGANS = tuple(LABELS)


# -- run folders by hand ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A store of 6 labelled test scans: smooth noise with two blocks as organs."""
    folder = tmp_path_factory.mktemp("data") / "store"
    rng = np.random.default_rng(0)
    for i in range(6):
        volume = (ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5) * 2000).clip(-400, 400).astype(np.int16)
        label = np.zeros(SHAPE, np.uint8)
        label[5:9, 8:14, 6:12], label[6:8, 15:18, 20:24] = 1, 4
        affine = np.diag([*SPACING, 1.0])
        scan_files.write_scan(
            folder, f"s{i}", volume, affine, label=label, labelled=(1, 4), split="test", chunk=(8, 16, 16)
        )
    store.write_index(folder, LABELS, (-1024.0, 325.0))
    return folder


def write_run(folder, door, index, rows, **config):
    """A run folder as train/runs.py writes it."""
    folder.mkdir(parents=True)
    model = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}[door]
    config = build(model, {"index": str(index), "run": str(folder), **config})
    record = {"door": door, "config": json.loads(config.model_dump_json()), "versions": {"pgl_ray": "0.1.0"}}
    record |= {"started": "2026-01-02T03:04:05+0000", "num_parameters": 1_230_000, "num_steps": 20}
    record |= {"store": {"num_scans": 6, "labels": LABELS, "hu_window": [-1024, 325]}}
    if door == "finetune":
        record["scans"] = {"train": ["t0", "t1"], "val": ["t2"]}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pretrain_rows(std=0.7, rank=12.0, aligned=0.8, shuffled=0.2):
    rows = []
    for step, time_s in ((1, 60.0), (10, 90.0), (20, 30.0)):  # the clock fell: the run was continued
        row = {"step": step, "time_s": time_s, "epoch": step / 6, "train/loss": 4.0 / step, "train/lr": 0.1}
        row |= {"train/pairs_per_s": 4.0, "data/wait_s": 0.5, "ema/decay": 0.99}
        health = {"feature_std": std, "effective_rank": rank, "cosine_aligned": aligned, "cosine_shuffled": shuffled}
        health["collapsed"] = float(std**2 * rank < 1)
        row["probe/balanced_accuracy"] = 0.4 + step / 100
        rows.append(row | {f"health/{key}": value for key, value in health.items()})
    return rows


FINETUNE_ROWS = [
    {"step": 10, "time_s": 5.0, "epoch": 1.0, "train/loss": 1.0, "train/lr": 0.01},
    {"step": 20, "time_s": 9.0, "epoch": 2.0, "val/dice": 0.5, "val/dice_liver": 0.5},
]


def score_rows(dice, organs=ORGANS):
    """Rows of metrics.parquet: `dice` per scan, the same for every organ."""
    values = [(f"s{i}", organ, d) for i, d in enumerate(dice) for organ in organs]
    names = ("scan_id", "organ", "dice", "iou", "hd_mm", "hd95_mm")
    return [dict(zip(names, (scan, organ, d, d / 2, 10.0 + d, 5.0 + d))) for scan, organ, d in values]


def evaluate(folder, index, dice, missed=0, organs=ORGANS, predictions=True):
    """An evaluation with planted Dice; the predicted labels are the true ones moved by one voxel."""
    rows = score_rows(dice, organs)
    out = folder / "evaluation"
    (out / "predictions").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), out / "metrics.parquet")
    means = {key: float(np.mean([row[key] for row in rows])) for key in tables.SCORES}
    organ = means | {"num_scans": len(dice), "num_missed": missed, "num_invented": 0}
    summary = means | {"organs": dict.fromkeys(organs, organ), "num_scans": len(dice), "split": "test"}
    (out / "summary.json").write_text(json.dumps(summary | {"index": str(index), "seconds_per_scan": 1.0}))
    if predictions and index.exists():
        opened = store.read_index(index)
        for record in opened.scans[: len(dice)]:
            whole = np.array([(0, size) for size in record.shape])
            label = np.roll(scan_files.open_label(opened.store, record).read(whole), 1, axis=2)
            nib.save(nib.Nifti1Image(label, np.eye(4)), out / "predictions" / f"{record.scan_id}.nii.gz")


JUDGES = ("voxels", "decoder", "matching")
CHANCE = (0.345, 0.123, 45.6)  # what the judges say of random weights


def standing(low_is, values, judge, ahead=None):
    """Where a judge sets planted values, with a planted difference and its interval."""
    number = JUDGES.index(judge)
    low, gain = 0.9 * CHANCE[number], (ahead or {}).get(judge, (0.2, 0.1, 0.3))
    facts = {"low": low, "low_is": low_is, "ahead": gain[0], "ahead_ci95": None if len(gain) == 1 else gain[1:]}
    return facts | {"high": None, "closed": None}


def judged(init, values=CHANCE, judges=JUDGES, ceiling=False, ahead=None):
    """A probe's result as its door writes it, of planted values and of shares of them; `ahead` the differences."""

    def scores(planted, share=1.0, only=judges):
        details = (
            {"recall": {"background": 0.6, "liver": 0.25}, "last_map": 0.111},
            {"organs": {"liver": {"dice": 0.3}}},
        )
        details = dict(zip(JUDGES, (*details, {"organs": {"liver": 19}, "deformed_mm": 7.7})))
        details["decoder"]["hd95_mm"] = None
        details["voxels"] |= {"scans": ["a", "b"], "classes": ["background", "liver"], "counts": [[100, 90], [100, 0]]}
        for judge in ("decoder", "matching"):
            details[judge]["rows"] = [{"scan_id": scan, "organ": "liver"} for scan in ("a", "b")]
        return {
            judge: {"value": value * share, "ci95": [value * 0.9, value * 1.1], "details": details[judge]}
            for judge, value in zip(JUDGES, planted)
            if judge in only
        }

    low = "random, BatchNorm off"
    facts = {"init": str(init), "num_train_scans": 5, "num_test_scans": 4, "seconds": 1.0, "notes": ["few scans"]}
    facts["size"] = [16, 48, 32]
    chance = {"reestimated": scores(CHANCE), "off": scores(CHANCE, 0.9)}
    trained = {"reestimated": scores(values), "trained": scores(values, 0.8, ["voxels"])}
    facts["readings"] = chance if init == "random" else trained
    facts["controls"] = {"random, BatchNorm re-estimated": chance["reestimated"], low: chance["off"]}
    facts["ceiling"] = scores(values, 1.3) if ceiling else {}
    facts["standing"] = {judge: standing(low, values, judge, ahead) for judge in judges}
    facts["sentences"] = [f"{judge}: ahead of everything" for judge in judges]
    facts |= {"balanced_accuracy": None, "recall": None, "body_box_mm": None, "pictures": ["probe_pgl.matching.png"]}
    return facts | ({"body_box_mm": 33.3} if "matching" in judges else {})


def finetuned(folder, index, dice, **options):
    write_run(folder, "finetune", index, FINETUNE_ROWS, init=options.pop("init", "random"))
    evaluate(folder, index, dice, **options)
    return folder


def crop_resize_flip(volume, box, flip):
    """A view by hand: scan voxels pooled 2 x 2 x 2, then flipped."""
    crop = volume[tuple(slice(start, stop) for start, stop in box)].astype(np.float64)
    for axis in range(3):
        crop = (
            np.take(crop, range(0, crop.shape[axis], 2), axis) + np.take(crop, range(1, crop.shape[axis], 2), axis)
        ) / 2
    return np.flip(crop, [axis for axis in range(3) if flip[axis]])


BOXES = (np.array([[0, 12], [2, 22], [2, 26]]), np.array([[2, 14], [4, 24], [6, 30]]))
FLIPS = (np.array([True, False, True]), np.array([False, True, True]))
BLOCK = np.array([[6, 10], [10, 14], [10, 16]])  # off the overlap's middle, yet on it; whole view voxels
OVERLAP = np.array([[2, 12], [4, 22], [6, 26]])


def write_views(folder, index, scan_ids=("s0", "s1", "s2")):
    opened = store.read_index(index)
    arrays = {f"view_{k}": [] for k in (1, 2)}
    for scan_id in scan_ids:
        record = next(scan for scan in opened.scans if scan.scan_id == scan_id)
        volume = scan_files.open_volume(opened.store, record).read(np.array([(0, size) for size in SHAPE]))
        scaled = (np.clip(volume, -1024, 325) - record.mean_hu) / record.std_hu
        for k in (1, 2):
            arrays[f"view_{k}"].append(crop_resize_flip(scaled, BOXES[k - 1], FLIPS[k - 1])[None].astype(np.float16))
    num = len(scan_ids)
    arrays |= {f"box_{k}": np.stack([BOXES[k - 1]] * num).astype(np.int32) for k in (1, 2)}
    arrays |= {f"flip_{k}": np.stack([FLIPS[k - 1]] * num).astype(np.uint8) for k in (1, 2)}
    np.savez_compressed(folder / "views.npz", **{k: np.asarray(v) for k, v in arrays.items()}, scan_id=list(scan_ids))


@pytest.fixture(scope="module")
def page(scans, tmp_path_factory):
    """A page of one pre-training and two evaluated runs, clearly apart."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "pgl", "pretrain", scans, pretrain_rows(), global_batch_size=8)
    write_views(folder / "pgl", scans)
    finetuned(folder / "tuned_pgl", scans, [0.81, 0.80, 0.83, 0.79, 0.82, 0.84], init=str(folder / "pgl"))
    finetuned(folder / "tuned_random", scans, [0.70, 0.71, 0.72, 0.68, 0.69, 0.73])
    for name, init, values in (
        ("pgl", folder / "pgl", (0.512, 0.321, 23.4)),
        ("random", "random", CHANCE),
        ("other", "/no/run", (0.9, 0.9, 0.9)),
    ):
        (folder / f"probe_{name}.json").write_text(json.dumps(judged(init, values)))
    (folder / "probe_pgl.matching.png").write_bytes(b"a picture")
    (folder / "probe_notes.json").write_text("[]")
    runs = [folder / name for name in ("pgl", "tuned_pgl", "tuned_random")]
    return write_page(*runs, title="A <title>", notes=["First note.", "Bold <b>claim</b>."])


def write_page(*folders, **config):
    """Its HTML."""
    return Path(report.run(ReportConfig(run=[str(folder) for folder in folders], **config))).read_text()


class Reader(HTMLParser):
    """Text outside of style, and every address that a browser would load."""

    def __init__(self, html):
        super().__init__()
        self.words, self.links, self.tags, self.quiet = [], [], [], False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.quiet = tag == "style"
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_endtag(self, tag):
        self.quiet = False

    def handle_data(self, data):
        self.words += [] if self.quiet else [data]


def table_rows(html, head_says, head=0):
    """First cell -> texts of the others, of the table whose `head`-th row has a cell of that text."""
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        rows = [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        ]
        rows = [[" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in row] for row in rows]
        if any(head_says in row for row in rows[: head + 1]):
            return {row[0]: row[1:] for row in rows[head:]}
    raise AssertionError(f"no table with {head_says}")


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_page_needs_no_other_file(page):
    read = Reader(page)
    assert len(read.links) > 15 and all(link.startswith("data:image/") for link in read.links)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert not re.search(r"url\(|@import|https?://", page)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_nothing_sticks_out_in_a_browser(page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    assert faults(tmp_path / "page.html") == []


def test_page_answers_first(page):
    """The four questions stand before any table, with the verdicts of the planted figures."""
    text = Reader(page[: page.index("<table>")]).text
    for words in (
        "Did pre-training learn places? Yes: organ centroids are found",
        "Is it better than random weights? pgl Yes: pgl is ahead of random weights",
        "fine-tuned from pgl Yes: Dice 0.815 against 0.705 from random weights, +0.110",
        "What limited speed?",
        "What to do next? Repeat:",
    ):
        assert words in text


def test_page_says_the_planted_numbers(page):
    text = Reader(page).text
    error = np.std([0.81, 0.80, 0.83, 0.79, 0.82, 0.84], ddof=1) / 6**0.5
    assert f"0.815 ± {error:.3f}" in text and "<b>0.815</b>" in page
    assert "0.705" in text and "<b>0.705</b>" not in page
    assert "Balanced accuracy of a linear classifier" in text  # the probe's curve
    assert "<b>10.7</b>" in page and "<b>10.8</b>" not in page  # the lower HD is the better one
    assert "0.512" in text and "0.345" in text and "0.900" not in text  # a stranger's probe is left out
    assert "1.23 M" in text and "2.0 min" in text  # 90 s before, 30 s after the run was continued
    assert "init " in text and "A <title>" in text and "Bold <b>claim</b>." in text
    assert "<b>claim" not in page


def test_page_has_every_section(page):
    text = Reader(page).text
    for heading in (
        "Runs",
        "Results",
        "What the frozen encoder knows",
        "Pre-training",
        "A pair of views",
        "Fine-tuning",
        "What was run",
    ):
        assert heading in text
    assert text.count("A pair of views") == report.NUM_PAIRS
    assert "Predicted and true labels" in text and text.count(", axial slice") == report.NUM_OVERLAYS
    assert (
        "pgl: not collapsed (5.9 directions: feature_std 0.70, effective rank 12.0 at step 20); aligned places" in text
    )
    assert "left out" not in text and "not evaluated" not in text


@pytest.mark.slow
def test_encoders_of_one_name_are_told_apart(scans, tmp_path):
    """Two runs whose folders are called alike, and one that was judged twice: each has its own row and column."""
    for folder, values in (("contrast", (0.9, 0.5, 20.0)), ("paper", (0.6, 0.4, 30.0))):
        one = write_run(tmp_path / folder / "pretrain", "pretrain", scans, pretrain_rows())
        (one / "probe.json").write_text(json.dumps(judged(one, values)))
    again = judged(one, (0.7, 0.4, 30.0), ["voxels"])
    (one / "probe_8.json").write_text(json.dumps(again))
    page = write_page(tmp_path / "contrast/pretrain", tmp_path / "paper/pretrain")
    rows = table_rows(page, "balanced accuracy")
    assert rows["contrast/pretrain, BatchNorm re-estimated"][0].startswith("0.900")
    assert rows["paper/pretrain, probe, BatchNorm re-estimated"][0].startswith("0.600")
    assert rows["paper/pretrain, probe_8, BatchNorm re-estimated"][0].startswith("0.700")
    columns = table_rows(page, "recall of voxels", head=1)["class"]
    assert {"contrast/pretrain", "paper/pretrain, probe", "paper/pretrain, probe_8"} <= set(columns)


@pytest.mark.parametrize("folder", ["random", "control"])
def test_an_encoder_called_as_a_control_has_its_own_row(folder):
    """In the report's table and in the printed one: its figures beside the control's, not in their place."""
    init = f"/runs/{folder}"
    result = judged(init, (0.95, 0.5, 20.0))
    result["controls"]["control, BatchNorm re-estimated"] = judged("random")["controls"]["random, BatchNorm off"]
    probes = [(Path("a/probe.json"), result), (Path("b/probe.json"), judged("random"))]
    alone = probe_tables.names_of(probes[:1])
    assert alone == [f"runs/{folder}"] and "random" in probe_tables.names_of(probes)
    rows = {row["name"]: row["cells"][0]["value"] for row in probe_tables.table(probes[:1])["rows"]}
    assert rows[f"{alone[0]}, BatchNorm re-estimated"] == 0.95 and rows[f"{folder}, BatchNorm re-estimated"] < 0.95
    printed = probe.table(probe.ProbeResult(**result, steps=None)).splitlines()
    for name in (alone[0], "random", "control"):
        assert [line.startswith(f"{name}, BatchNorm re-estimated ") for line in printed].count(True) == 1
    assert any(line.startswith(f"{alone[0]}, BatchNorm re-estimated") and "0.950" in line for line in printed)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("other", ["scan", "organ"])
def test_encoders_judged_on_other_scans_have_no_best(judge, other):
    """Of one judge alone, whose column then has none; controls are of the same scans as what they are held against."""
    values = {"a": (0.9, 0.5, 20.0), "b": (0.6, 0.4, 30.0)}
    probes = [(Path(f"{name}.json"), judged(f"/{name}", planted)) for name, planted in values.items()]
    table = probe_tables.table(probes)
    assert [any(row["cells"][k]["best"] for row in table["rows"]) for k in (0, 2, 4)] == [True] * 3
    assert not any("called best" in line for line in table["sentences"])
    _, result = probes[1]
    for scores in (*result["readings"].values(), *result["controls"].values()):
        if judge == "voxels":
            more = {"scans": ["a", "c"]} if other == "scan" else {"counts": [[100, 90], [100, 80]]}
            scores[judge]["details"] |= more
        elif judge in scores:
            more = {"scan_id": "c", "organ": "liver"} if other == "scan" else {"scan_id": "a", "organ": "spleen"}
            scores[judge]["details"]["rows"].append(more)
    table = probe_tables.table(probes)
    best = [any(row["cells"][k]["best"] for row in table["rows"]) for k in (0, 2, 4)]
    assert best == [one != judge for one in JUDGES]
    said = [line for line in table["sentences"] if "called best" in line]
    assert len(said) == 1 and said[0].endswith(f"none is called best: {IN_FULL[judge]}.")


def test_page_says_what_the_judges_say(page):
    """Readings, controls, intervals and the standing sentences; pictures beside the result, once each."""
    read, rows = Reader(page), table_rows(page, "balanced accuracy")
    assert rows["pgl, BatchNorm re-estimated"][:6] == [
        "0.512 0.461 to 0.563",
        "0.111",
        "0.321 0.289 to 0.353",
        "–",
        "23.4 21.1 to 25.7",
        "7.7",
    ]
    assert rows["pgl, BatchNorm as trained"][:6] == ["0.410 0.461 to 0.563", "0.111", "–", "–", "–", "–"]
    assert [cell.split(" ")[0] for cell in rows["random, BatchNorm off"][:5:2]] == ["0.310", "0.111", "41.0"]
    assert rows["random, BatchNorm re-estimated"][6:] == ["16x48x32", "5 / 4"]
    assert page.count("random, BatchNorm re-estimated") == 1
    assert "<b>0.512</b>" in page and "<b>23.4</b>" in page  # the lowest matching error is the best
    for judge in ("voxels", "decoder", "matching"):
        assert f"pgl, {judge}: ahead of everything." in read.text
    assert "pgl, random: few scans." in read.text and "33.3 mm" in read.text
    assert sum(link == "data:image/png;base64,YSBwaWN0dXJl" for link in read.links) == 2  # pgl's and random's


def test_organs_are_listed_with_the_strongest_controls(page):
    rows = table_rows(page, "recall of voxels", head=1)
    assert rows["class"] == ["pgl", "random, BatchNorm off", "random"] * 3
    assert rows["liver"] == ["0.25", "0.25", "0.25", "0.30", "0.30", "0.30", "19", "19", "19"]
    assert rows["background"] == ["0.60"] * 3 + ["–"] * 6


def test_a_ceiling_and_a_judge_that_was_not_asked(scans, tmp_path):
    one = write_run(tmp_path / "pgl", "pretrain", scans, [])
    (one / "probe.json").write_text(json.dumps(judged(one, (0.5, 0.3, 20.0), ["matching"], ceiling=True)))
    old = {"balanced_accuracy": 0.987, "recall": {"liver": 0.987}, "init": "random", "num_test_scans": 4}
    (one / "old_probe.json").write_text(json.dumps(old))
    html = write_page(one)
    assert "old_probe.json is of an earlier version and left out" in html and "0.987" not in html
    rows = table_rows(html, "matching, mm")
    assert rows["trained with all labels"][:2] == ["26.0 18.0 to 22.0", "7.7"]
    assert rows["pgl, BatchNorm re-estimated"][:2] == ["20.0 18.0 to 22.0", "7.7"]
    assert rows["pgl, BatchNorm as trained"][:2] == ["–", "–"]


def test_what_is_missing_is_said(scans, tmp_path):
    one = write_run(tmp_path / "pgl", "pretrain", tmp_path / "moved", [])
    two = write_run(tmp_path / "tuned", "finetune", scans, FINETUNE_ROWS)
    three = finetuned(tmp_path / "no_store", tmp_path / "moved", [0.5, 0.6])
    text = Reader(write_page(one, two, three)).text
    assert "pgl: pictures left out" in text and "is not a store" in text
    assert "pgl has no metrics yet" in text and "pgl: no health figures yet" in text
    assert f"tuned is not evaluated: python -m pgl_ray.evaluate run={two}" in text
    assert "overlays: pictures left out" in text
    assert "A pair of views" not in text and "Predicted and true labels" not in text and "0.550" in text


@pytest.mark.slow
def test_figures_of_an_earlier_network_are_not_shown(scans, tmp_path):
    """Evaluated, then trained on: the page says so instead of showing what the earlier network scored."""
    run = finetuned(tmp_path / "tuned", scans, [0.5, 0.6])
    (run / "best.pt").write_bytes(b"as evaluated")
    for made, shown in (
        ({"checkpoint": hashlib.sha256(b"as evaluated").hexdigest(), "tta": False}, True),
        ({"checkpoint": hashlib.sha256(b"earlier").hexdigest(), "tta": False}, False),
        ({}, True),
    ):
        (run / "evaluation" / "scans.jsonl").write_text(json.dumps(made) + "\n" if made else "")
        text = Reader(write_page(run)).text
        assert ("0.550" in text) == shown
        said = f"tuned has been trained on since it was evaluated: python -m pgl_ray.evaluate run={run}"
        assert (said in text) == (not shown)
    (run / "evaluation" / "scans.jsonl").write_text('{"checkpoint": "of another machine"}\n')
    (run / "best.pt").unlink()  # as of a run in a bucket: nothing to go by here
    assert "0.550" in Reader(write_page(run)).text


@pytest.mark.slow
def test_damaged_pictures_are_left_out(scans, tmp_path):
    one = write_run(tmp_path / "pgl", "pretrain", scans, pretrain_rows())
    write_views(one, scans)
    (one / "views.npz").write_bytes((one / "views.npz").read_bytes()[:500])
    two = finetuned(tmp_path / "tuned", scans, [0.5, 0.6])
    (two / "evaluation" / "predictions" / "s0.nii.gz").write_bytes(b"no image")
    text = Reader(write_page(one, two)).text
    assert text.count("pictures left out") == 2


def test_output_goes_where_asked(scans, tmp_path):
    one = write_run(tmp_path / "pgl", "pretrain", scans, [])
    assert report.run(load(ReportConfig, [f"run={one}"])) == str(one / "report.html")
    asked = tmp_path / "new" / "page.html"
    assert report.run(load(ReportConfig, [f"run=[{one}]", f"output={asked}"])) == str(asked) and asked.is_file()
    assert [p.name for p in asked.parent.iterdir()] == ["page.html"]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_ends_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.call("report", [f"run={tmp_path}"])
    assert caught.value.code == 2
    assert f"run={tmp_path} is no run" in capsys.readouterr().err


def test_faults_are_named(tmp_path, scans):
    one = write_run(tmp_path / "a", "pretrain", scans, [])
    with pytest.raises(ValueError, match="twice"):
        run_folders.read_runs([str(one), f"{one}/"])
    (one / "run.json").write_text('{"door": "tune"}')
    with pytest.raises(ValueError, match="a run of tune"):
        run_folders.read_runs([str(one)])
    (one / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run_folders.read_runs([str(one)])
    with pytest.raises(ValueError, match="run="):
        load(ReportConfig, ["run=[]"])


# -- tables -----------------------------------------------------------------------------------------------------------


def compare(tmp_path, index, *planted, **options):
    folders = [finetuned(tmp_path / f"run{i}", index, dice, **options) for i, dice in enumerate(planted)]
    return tables.comparison(run_folders.read_runs([str(folder) for folder in folders]))


def test_difference_within_the_noise_is_called_so(tmp_path, scans):
    first, second = [0.80, 0.70, 0.60, 0.75, 0.65], [0.78, 0.73, 0.57, 0.76, 0.64]
    (sentence,) = compare(tmp_path, scans, first, second)["sentences"]
    assert sentence.startswith("run0 against run1: +0.004 Dice, within the noise of 5 scans")


def test_difference_beyond_the_noise_is_called_so(tmp_path, scans):
    """The scans differ far more than the runs do: only the pairing shows the difference."""
    second, gain = np.array([0.80, 0.50, 0.20, 0.95, 0.35]), np.array([0.02, 0.025, 0.015, 0.02, 0.022])
    (sentence,) = compare(tmp_path, scans, second, second + gain)["sentences"]
    assert sentence.startswith("run1 against run0: +0.020 Dice, more than the noise of 5 scans")
    assert "within" not in sentence


@pytest.mark.parametrize(("num", "near"), [(5, 0.4), (12, 0.15), (400, 0.05)])
def test_interval_of_a_difference_is_about_students(num, near):
    rng = np.random.default_rng(num)
    first, second = rng.random(num), rng.random(num)
    gap = tables.paired_difference(score_rows(first), score_rows(second)[::-1])
    wanted = stats.ttest_rel(first, second).confidence_interval(0.95)
    half = (wanted.high - wanted.low) / 2
    assert gap.low == pytest.approx(wanted.low, abs=near * half)
    assert gap.high == pytest.approx(wanted.high, abs=near * half) and gap.num_scans == num


def test_only_common_scans_and_organs_are_paired():
    first, second = score_rows([0.5, 0.6, 0.7]), score_rows([0.4, 0.6, 0.9, 0.1])
    next(row for row in first if row["scan_id"] == "s2" and row["organ"] == "liver")["dice"] = float("nan")
    gap = tables.paired_difference(first, second)
    assert gap.num_scans == 3 and gap.mean == pytest.approx(((0.1 + 0.0 - 0.2) / 3 + (0.1 + 0.0) / 2) / 2)
    assert tables.paired_difference(first[:2], second) is None


def test_nothing_is_best_where_runs_are_not_comparable(tmp_path, scans):
    table = compare(tmp_path / "a", scans, [0.5, 0.6], [0.5, 0.6, 0.9])
    assert not any(cell["best"] for row in table["rows"] for cell in row["cells"])
    assert "different scans" in table["sentences"][0]
    table = compare(tmp_path / "b", scans, [0.5, 0.6], [0.4, 0.5], missed=1)
    best = [[cell["best"] for cell in row["cells"][:4]] for row in table["rows"]]
    assert best == [[True, True, False, False], [False] * 4] and table["rows"][0]["unscored"] == 2


def test_nothing_is_best_where_the_labels_differ(tmp_path, scans):
    """Of the same scans and organs; one was corrected between the evaluations, or another task has it larger."""
    planted = [0.5, 0.6], [0.4, 0.5]
    folders = [finetuned(tmp_path / f"run{i}", scans, dice) for i, dice in enumerate(planted)]
    for size in (900, 901):
        for folder, dice, sizes in zip(folders, planted, ([900] * 4, [900, 900, size, 900])):
            rows = [row | {"target_voxels": num} for row, num in zip(score_rows(dice), sizes)]
            pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation" / "metrics.parquet")
        table = tables.comparison(run_folders.read_runs([str(folder) for folder in folders]))
        assert any(cell["best"] for row in table["rows"] for cell in row["cells"]) == (size == 900)
        if size == 900:
            assert table["sentences"][0].startswith("run0 against run1: +0.100 Dice")
    first, second = table["sentences"]
    assert "different scans, organs or labels" in first
    assert second.startswith("run0 and run1 were scored on different labels of liver in scan s1: no statement")


def test_a_lead_from_other_scans_is_turned_round(tmp_path, scans):
    """run0 has the higher mean thanks to scans that run1 was not scored on."""
    _, sentence = compare(tmp_path, scans, [0.5, 0.51, 0.99, 0.98], [0.6, 0.61])["sentences"]
    assert sentence.startswith("run0 against run1: -0.100 Dice, more than the noise of 2 scans")


def test_different_stores_are_called_out(tmp_path, scans):
    folders = [finetuned(tmp_path / f"run{i}", index, [0.5, 0.6]) for i, index in enumerate((scans, tmp_path / "x"))]
    lines = tables.comparison(run_folders.read_runs([str(folder) for folder in folders]))["sentences"]
    assert "different stores" in lines[0] and "+0.000 Dice, within the noise" in lines[1]


def test_scores_on_training_scans_are_called_out(tmp_path, scans):
    folder = finetuned(tmp_path / "run", scans, [0.5, 0.6])
    record = json.loads((folder / "run.json").read_text())
    record["scans"]["train"] = ["s1", "x"]
    (folder / "run.json").write_text(json.dumps(record))
    table = tables.comparison(run_folders.read_runs([str(folder)]))
    assert table["sentences"] == ["run was trained on 1 of the scans that it is scored on."]


def test_an_evaluation_without_any_score_is_reported(tmp_path, scans):
    folder = finetuned(tmp_path / "run", scans, [float("nan")] * 2, predictions=False)
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    none = dict.fromkeys(tables.SCORES)
    summary |= none | {"organs": {name: of_organ | none for name, of_organ in summary["organs"].items()}}
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    assert "–" in write_page(folder)


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (
            {"std": 0.03},
            "features collapsed: they spread over 0.01 directions, and 1.02 is the least (feature_std",
        ),
        ({"rank": 1.2}, "features collapsed: they spread over 0.59 directions, and 1.02 is the least"),
        (
            {"aligned": 0.4, "shuffled": 0.5},
            "not collapsed (5.9 directions: feature_std 0.70, effective rank 12.0 at step 20); aligned places do not "
            "yet agree more",
        ),
    ],
)
def test_verdict(health, words, tmp_path, scans):
    folder = write_run(tmp_path / "run", "pretrain", scans, pretrain_rows(**health))
    assert tables.verdict(run_folders.read_runs([str(folder)])[0]).startswith(f"run: {words}")


def test_a_loss_that_rose_is_explained_below_its_curve(scans, tmp_path):
    def rows(first: float, last: float) -> list[dict]:
        losses = [4.0, *np.linspace(first, last, 15)]
        return [{"step": 5 * i or 1, "time_s": 1.0 + i, "train/loss": loss} for i, loss in enumerate(losses)]

    rose = write_run(tmp_path / "rose", "pretrain", scans, rows(1.1, 1.9))
    fell = write_run(tmp_path / "fell", "pretrain", scans, rows(1.9, 1.1))
    text = Reader(write_page(rose, fell)).text
    assert "rose: the loss rose again, from 1.19 around step 15 to 1.81, which by itself is no fault" in text
    assert "fell: the loss" not in text and "the loss rose" not in Reader(write_page(fell)).text


def test_names_and_differing_settings(tmp_path, scans):
    one = write_run(tmp_path / "a" / "run", "pretrain", scans, [], align={"centers": "cell"}, seed=3)
    two = write_run(tmp_path / "b" / "run", "pretrain", scans, [], seed=4)
    runs = run_folders.read_runs([str(one), str(two)])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert run_folders.differing_settings(runs) == [
        ("seed", ["3", "4"]),
        ("align.centers", ["cell", "receptive_field"]),
    ]


# -- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", list(product((False, True), repeat=3)))
def test_region_in_view_holds_just_the_regions_voxels(flip):
    """Voxel by voxel: undo the flip, go back to the scan, look whether that place is in the region."""
    box, region, size = np.array([[3, 11], [-2, 12], [5, 23]]), np.array([[5, 8], [-1, 10], [9, 23]]), (6, 10, 12)
    inner = slices.region_in_view(region, box, np.array(flip), np.array(size))
    assert (inner[:, 0] < inner[:, 1]).all()
    for axis in range(3):
        for i in range(size[axis]):
            unflipped = size[axis] - 1 - i if flip[axis] else i
            place = box[axis, 0] + (unflipped + 0.5) * (box[axis, 1] - box[axis, 0]) / size[axis]
            inside = region[axis, 0] < place < region[axis, 1]
            assert (inner[axis, 0] < i + 0.5 < inner[axis, 1]) == inside


@pytest.mark.parametrize("flip", list(product((False, True), repeat=3)))
def test_cut_region_agrees_with_map_coordinates(flip):
    rng = np.random.default_rng(1)
    view = rng.standard_normal((6, 10, 12)).astype(np.float32)
    box, region = np.array([[3, 11], [-2, 12], [5, 23]]), np.array([[5, 8], [-1, 10], [9, 23]])
    lines = []
    for axis, size in enumerate(view.shape):
        bins = region[axis, 0] + (np.arange(size) + 0.5) / size * (region[axis, 1] - region[axis, 0])
        lines.append((bins - box[axis, 0]) / (box[axis, 1] - box[axis, 0]) * size - 0.5)
    unflipped = np.flip(view, [axis for axis in range(3) if flip[axis]])
    wanted = ndimage.map_coordinates(unflipped, np.meshgrid(*lines, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(pair_pictures.cut_region(view, box, np.array(flip), region), wanted, atol=1e-5)


def planted_pair(flips):
    """A scan with one bright block inside the overlap, and its views made by hand."""
    volume = np.full(SHAPE, -100, np.int16)
    volume[tuple(slice(start, stop) for start, stop in BLOCK)] = 300
    views = tuple(crop_resize_flip(volume, box, flip).astype(np.float32) for box, flip in zip(BOXES, flips))
    flips = tuple(np.array(flip) for flip in flips)
    return pair_pictures.ViewPair(views, BOXES, flips, volume, np.array(SPACING), 0.0, 1.0, region=views[0])


def rectangles(ax):
    """[(left, right), (low, high)] of the axes' rectangles."""
    boxes = [patch.get_bbox() for patch in ax.patches]
    return [((box.x0, box.x1), (box.y0, box.y1)) for box in boxes]


def test_boxes_are_drawn_where_they_lie_in_the_scan():
    pair = planted_pair(FLIPS)
    figure = pair_pictures.pair_in_scan(pair)
    for ax, row in zip(figure.axes, (1, 0)):
        assert rectangles(ax) == [(tuple(box[2]), tuple(box[row])) for box in (*BOXES, OVERLAP)]
        assert ax.get_aspect() == pytest.approx(SPACING[row] / SPACING[2])
    axial, coronal = figure.axes
    assert axial.yaxis_inverted() and not coronal.yaxis_inverted()  # H downwards; D, and so the head, upwards
    np.testing.assert_array_equal(axial.images[0].get_array(), pair.volume[7])  # the overlap's middle
    np.testing.assert_array_equal(coronal.images[0].get_array(), pair.volume[:, 13])


@pytest.mark.parametrize("draw", [pair_pictures.pair_in_scan, pair_pictures.pair_as_seen])
def test_slices_of_a_pair_have_one_scale(draw):
    """Views of different size and both planes, in pixels per mm of the drawn axes."""
    boxes = BOXES[0], np.array([[2, 14], [4, 24], [-4, 30]])
    pair = planted_pair(FLIPS)
    pair = pair._replace(boxes=boxes, views=(pair.views[0], pair.views[0]))
    figure = draw(pair)
    figures.to_bytes(figure, "png")
    scales = []
    for k, ax in enumerate(figure.axes):
        box, row, unit_mm = ax.get_window_extent(), (1, 0)[k % 2], np.array(SPACING)
        if draw is pair_pictures.pair_as_seen:
            crop = boxes[k // 2]
            unit_mm = (crop[:, 1] - crop[:, 0]) * SPACING / pair.views[0].shape
        scales.append(box.width / (np.ptp(ax.get_xlim()) * unit_mm[2]))
        scales.append(box.height / (np.ptp(ax.get_ylim()) * unit_mm[row]))
    np.testing.assert_allclose(scales, scales[0], rtol=0.03)


@pytest.mark.parametrize("flips", [(f, g) for f in product((False, True), repeat=3) for g in [(True, False, True)]])
def test_a_block_has_one_place_in_the_overlap_of_both_views(flips):
    """The block's middle as a share of the overlap's drawn rectangle, mirrored where the letters are."""
    figure = pair_pictures.pair_as_seen(planted_pair(flips))
    for ax, (flip, row) in zip(figure.axes, product(flips, (1, 0))):
        image = np.asarray(ax.images[0].get_array())
        assert image.max() > 250  # the slice goes through the block
        _, overlap = rectangles(ax)
        left, right, bottom, top = ax.images[0].get_extent()
        assert left < right and (bottom > top) == (row == 1) == ax.yaxis_inverted()  # so row 0 lies at coordinate 0
        for axis, (low, high), edge in ((2, overlap[0], 1), (row, overlap[1], 0)):
            profile = np.flatnonzero((image > 250).any(axis=1 - edge))
            middle = (profile[0] + profile[-1] + 1) / 2
            share = (BLOCK[axis].mean() - OVERLAP[axis, 0]) / (OVERLAP[axis, 1] - OVERLAP[axis, 0])
            drawn = (middle - low) / (high - low)
            assert drawn == pytest.approx(1 - share if flip[axis] else share, abs=1e-6)


@pytest.mark.parametrize(
    ("flip", "axial", "coronal"),
    [
        ((0, 0, 0), "RLAP", "RLSI"),
        ((0, 0, 1), "LRAP", "LRSI"),
        ((0, 1, 0), "RLPA", "RLSI"),
        ((1, 0, 0), "RLAP", "RLIS"),
    ],
)
def test_letters_follow_the_flips(flip, axial, coronal):
    """Left, right, top, bottom; the stored axes run along S, P, L, and the coronal rows upwards."""
    figure = pair_pictures.pair_as_seen(planted_pair((flip, flip)))
    for ax, letters in zip(figure.axes, (axial, coronal, axial, coronal)):
        assert "".join(text.get_text() for text in ax.texts) == letters
        places = [text.xy for text in ax.texts]
        assert places == [(0, 0.5), (1, 0.5), (0.5, 1), (0.5, 0)]


def test_aligned_views_correlate_and_raw_ones_do_not(scans, tmp_path):
    """From views.npz on: the cut regions show what the scan shows there."""
    write_views(tmp_path, scans)
    index = store.read_index(scans)
    for i in range(3):
        pair = report.view_pair(dict(np.load(tmp_path / "views.npz")), i, index, index.scans[i])
        cut = [pair_pictures.cut_region(*one, pair.overlap) for one in zip(pair.views, pair.boxes, pair.flips)]
        for first, second in ((*cut,), (cut[0], pair.region), (cut[1], pair.region)):
            r = pair_pictures.correlation(first, second)
            assert r > 0.95 and r == pytest.approx(np.corrcoef(first.ravel(), second.ravel())[0, 1], abs=1e-4)
        assert abs(pair_pictures.correlation(*pair.views)) < 0.6


# -- overlays ---------------------------------------------------------------------------------------------------------


def test_overlay_shows_the_slice_with_most_organs_and_its_errors(scans, tmp_path):
    runs = run_folders.read_runs([str(finetuned(tmp_path / "run", scans, [0.5] * 6))])
    index = store.read_index(scans)
    layers, place = report.overlay_of(index, index.scans[0], runs)
    assert place in (f"axial slice {d} of {SHAPE[0]}" for d in (6, 7))  # both organs are there
    h0, h1, w0, w1 = index.scans[0].foreground_box[2:]
    true = np.zeros(SHAPE[1:], np.uint8)
    true[8:14, 6:12], true[15:18, 20:24] = 1, 4
    np.testing.assert_array_equal(layers.true, true[h0:h1, w0:w1])
    ((title, predicted, wrong),) = layers.predictions
    moved = np.roll(true, 1, axis=1)
    np.testing.assert_array_equal(predicted, moved[h0:h1, w0:w1])
    np.testing.assert_array_equal(wrong, (moved != true)[h0:h1, w0:w1])
    assert title == "run: Dice 0.500"
    colors = label_pictures.overlay(layers, index.label_values).axes[1].images[1].get_array()
    np.testing.assert_allclose(colors[layers.true == 4][0, :3], matplotlib.colors.to_rgb(label_pictures.organ_color(2)))


def test_overlays_are_of_the_scans_that_are_scored(scans, tmp_path):
    """Predictions of an evaluation on another split, as on the training scans, stay in the folder."""
    (run,) = run_folders.read_runs([str(finetuned(tmp_path / "run", scans, [0.5] * 6))])
    run = replace(run, scores=[row for row in run.scores if row["scan_id"] in ("s1", "s4")])
    assert [text.partition(",")[0] for _, text in report.overlays([run])["scans"]] == ["Scan s1", "Scan s4"]


@pytest.mark.slow
def test_a_curve_of_only_zeros_is_drawn():
    for y, scale in (([0.0, 0.0], "linear"), ([0.0, 0.5], "log")):
        figure = plots.curves([plots.Series([1, 3], y, "#000000", False)], "retrieval@1", (None, 1.2), log=True)
        assert figure.axes[0].get_yscale() == scale and figures.to_svg(figure)


def test_an_overlay_of_a_resampled_scan_is_on_the_scored_grid(tmp_path):
    """What lies there are the scan's own labels, and the CT is seen where it is."""
    label, affine = np.zeros((12, 24, 32), np.uint8), np.diag([3.0, 1, 1, 1])
    label[5:9, 8:14, 6:12] = 1
    volume = np.where(label, 300, -100).astype(np.int16)
    voxels, coarse, moved = resample(volume, label, affine, (2.9, 1.5, 1.5))
    assert len(voxels) == len(volume)
    own = {"source_label": label, "source_affine": affine, "labelled": (1,), "split": "test"}
    scan_files.write_scan(tmp_path / "s", "s0", voxels, moved, label=coarse, **own)
    index = store.write_index(tmp_path / "s", {"organ": 1}, (-1024.0, 325.0), spacing_mm=(2.9, 1.5, 1.5))
    (tmp_path / "run/evaluation/predictions").mkdir(parents=True)
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "run/evaluation/predictions/s0.nii.gz")
    run = SimpleNamespace(path=tmp_path / "run", name="run", scores=score_rows([1.0], ["organ"]))
    layers, place = report.overlay_of(index, index.scans[0], [run])
    position = int(place.split()[2])
    assert place.endswith(" of 12") and 5 <= position < 9
    np.testing.assert_array_equal(layers.true, label[position])
    ((_, predicted, wrong),) = layers.predictions
    np.testing.assert_array_equal(predicted, label[position])
    assert not wrong.any() and layers.unit_mm.tolist() == [3, 1, 1]
    seen = ndimage.center_of_mass(layers.image > 100)
    np.testing.assert_allclose(seen, ndimage.center_of_mass(label[position]), atol=0.6)


def test_organs_that_a_scan_does_not_annotate_are_no_errors(scans, tmp_path):
    runs = run_folders.read_runs([str(finetuned(tmp_path / "run", scans, [0.5] * 6))])
    index = store.read_index(scans)
    record = replace(index.scans[0], labelled=(1,))
    layers, _ = report.overlay_of(index, record, runs)
    ((_, predicted, wrong),) = layers.predictions
    invented = [(predicted == value) & (layers.true == 0) for value in (1, 4)]
    assert wrong[invented[0]].all() and invented[1].any() and not wrong[invented[1]].any()
