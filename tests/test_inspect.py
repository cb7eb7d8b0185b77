"""inspect: what it says of scans that are wrong on purpose, and that the page holds it all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pgl_ray import inspect
from pgl_ray.config import InspectConfig
from pgl_ray.data import store

AFFINE = np.diag([3.0, 1.0, 1.0, 1.0])
SHAPE = (24, 90, 80)


def body(seed=0, shape=SHAPE, centre=(0.5, 0.5)):
    """A cylinder of soft tissue with some fat, lung and bone in air."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]] / np.array(shape[1:])[:, None, None]
    radius = np.hypot(y - centre[0], x - centre[1])
    plane = np.select([radius < 0.05, radius < 0.15, radius < 0.3, radius < 0.35], [700, -800, 50, -100], -1000)
    return (plane + rng.integers(-20, 21, shape)).astype(np.int16)


WRONG = {
    "raw": (lambda v: v + 1024, "not like HU: 0.0% of the voxels are air"),
    "normalised": (lambda v: (v.clip(-1000, 1000) + 1000) // 8, "are air, lung or fat"),
    "loud": (lambda v: v * 8 + 3000, "are above 1600 HU"),
    "hollow": (lambda v: np.where(abs(v) < 150, -700, v), "are soft tissue"),
    "constant": (lambda v: np.full_like(v, -1000), "nearly constant: 100.0%"),
    "cut": (lambda v: v[:, 30:60, 30:50], "field of view cuts the body: it covers"),
    "flat": (lambda v: v[:5], "5 slices"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd <store>")
    for place, name in enumerate(("good 1", "good_2", "good_ü")):
        store.write_scan(folder, name, body(place), AFFINE, split="train")
    for place, (name, (change, _)) in enumerate(WRONG.items(), 10):
        store.write_scan(folder, name, np.ascontiguousarray(change(body(place)), np.int16), AFFINE)
    store.write_scan(folder, "twin", body(0), AFFINE, label=np.zeros(SHAPE, np.uint8), labelled=(1,))
    store.write_index(folder, {"liver": 1}, (-1024.0, 325.0), preparations=({"source": "/a/b"},))
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_figure(odd, name):
    index = store.read_index(odd)
    record = next(record for record in index.scans if record.scan_id == name)
    assert any(WRONG[name][1] in note for note in inspect.warnings(record)), inspect.warnings(record)


def test_good_scans_do_not_stand_out_and_twins_are_found(odd):
    index = store.read_index(odd)
    for record in index.scans:
        if record.scan_id.startswith("good"):
            assert not inspect.warnings(record)
    assert inspect.duplicates(index) == {"good 1": ["twin"], "twin": ["good 1"]}
    twin = next(record for record in index.scans if record.scan_id == "twin")
    assert inspect.warnings(twin) == ["its label map is empty"]


def test_the_page_is_whole_and_stands_alone(odd, tmp_path):
    path = inspect.run(InspectConfig(store=str(odd), output=str(tmp_path / "new/page.html"), num_pictures=9))
    text = Path(path).read_text("utf-8")
    assert text.count("data:image/png") == 18 and text.count("<tr id=") == 11
    assert not re.search(r"(src|href)=.http", text) and "<store>" not in text and "&lt;store&gt;" in text
    assert "11 (8 without split, 3 train), 1 with labels" in text and "9 of 11 scans" in text and "/a/b" in text
    assert "ms per pair and core" in text and "the same voxels as good 1" in text


def test_a_damaged_scan_leaves_the_rest_of_the_page(odd, tmp_path):
    shard = odd / "scans/good_2/0/c/0/0/0"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-9])
        text = Path(inspect.run(InspectConfig(store=str(odd), output=str(tmp_path / "page.html")))).read_text("utf-8")
    finally:
        shard.write_bytes(content)
    assert text.count("data:image/png") == 20 and "cut off or damaged" in text


def test_the_store_of_real_scans(real_data, tmp_path):
    """Scans that are as they should be do not stand out; those that are cropped to the body do."""
    from pgl_ray.data import ct

    for name in ("openkbp/images/pt_2", "body/images/LIDC-IDRI-0001", "sts/STS_001"):
        found = next(real_data.glob(f"**/{name.split('/')[-1]}.nii.gz"))
        scan = ct.read_scan(found)
        store.write_scan(tmp_path, name.split("/")[-1], scan.voxels, scan.affine)
    index = store.write_index(tmp_path, {}, (-1024.0, 325.0))
    notes = {record.scan_id: inspect.warnings(record) for record in index.scans}
    assert not notes["pt_2"] and not notes["LIDC-IDRI-0001"] and "cuts the body" in notes["STS_001"][0]


def test_sheared_grids_and_what_was_said_of_a_scan_stand_out(tmp_path):
    turn = np.deg2rad(14)
    sheared = AFFINE.copy()
    sheared[:3, 0] = 3 * np.array([1, np.tan(turn), 0])
    for name, affine in (("tilted", sheared), ("straight", AFFINE)):
        store.write_scan(tmp_path, name, body(), affine)
    store.write_index(tmp_path, {}, (-1024.0, 325.0))
    told = [
        {"scan_id": name, "source": "a", "reason": f"told {shown}", "shown": shown}
        for name, shown in (("straight", True), ("tilted", False), ("gone", True))
    ]
    (tmp_path / "notes.jsonl").write_text("[]\n{}\n" + "".join(json.dumps(line) + "\n" for line in told))
    found = {record.scan_id: inspect.warnings(record) for record in store.read_index(tmp_path).scans}
    (warning,) = found["tilted"]
    assert warning.startswith("its grid is sheared by 14 degrees (gantry tilt?)") and not found["straight"]
    page = Path(inspect.run(InspectConfig(store=str(tmp_path)))).read_text()
    assert "told True" in page and "told False" not in page and "sheared by 14 degrees" in page
