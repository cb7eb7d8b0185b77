"""inspect: what it says of scans that are wrong on purpose, and that the page holds it all."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, faults
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from pgl_ray import inspect
from pgl_ray.config import InspectConfig
from pgl_ray.data import scan_files, store
from pgl_ray.pages import store_answers
from pgl_ray.pages.label_pictures import organ_color

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
        scan_files.write_scan(folder, name, body(place), AFFINE, split="train")
    for place, (name, (change, _)) in enumerate(WRONG.items(), 10):
        scan_files.write_scan(folder, name, np.ascontiguousarray(change(body(place)), np.int16), AFFINE)
    scan_files.write_scan(folder, "twin", body(0), AFFINE, label=np.zeros(SHAPE, np.uint8), labelled=(1,))
    store.write_index(folder, {"liver": 1}, (-1024.0, 325.0), preparations=({"source": "/a/b"},))
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_figure(odd, name):
    index = store.read_index(odd)
    record = next(record for record in index.scans if record.scan_id == name)
    assert any(WRONG[name][1] in note for note in inspect.warnings(record)), inspect.warnings(record)


def test_good_scans_do_not_stand_out_and_twins_do(odd):
    index = store.read_index(odd)
    for record in index.scans:
        if record.scan_id.startswith("good"):
            assert not inspect.warnings(record)
    assert inspect.duplicates(index) == {"good 1": ["twin"], "twin": ["good 1"]}
    twin = next(record for record in index.scans if record.scan_id == "twin")
    assert inspect.warnings(twin) == ["its label map is empty"]


@pytest.mark.slow
def test_the_page_is_whole_and_needs_no_other_file(odd, tmp_path):
    path = inspect.run(InspectConfig(store=str(odd), output=str(tmp_path / "new/page.html"), num_pictures=9))
    text = Path(path).read_text("utf-8")
    assert text.count("data:image/png") == 17 and text.count("<tr id=") == 11
    assert not re.search(r"(src|href)=.http", text) and "<store>" not in text and "&lt;store&gt;" in text
    assert "11 (8 without split, 3 train), 1 with labels" in text and "9 of 11 scans" in text and "/a/b" in text
    assert "ms per pair and core" in text and "the same voxels as good 1" in text
    assert not CHROMIUM or faults(Path(path)) == []


@pytest.mark.parametrize(
    ("notes", "unused", "verdicts", "words"),
    [
        ({}, [], ("Yes", "Yes", "Data at most", "Take more scans"), "none of 11 scans stands out"),
        (
            {"good 1": ["3 slices"]},
            [],
            ("Look first", "Yes", "Data at most", "Look"),
            "1 of 11 scans (9.1 %) stands out",
        ),
        (
            {"good 1": ["3 slices"], "twin": ["5 slices"]},
            [],
            ("Look first", "Yes", "Data at most", "Look"),
            "“… slices”",
        ),
        ({}, ["failed", "left out"], ("Yes", "No", "Data at most", "Mend what failed"), "1 failed, 1 left out"),
        ({}, ["left out"], ("Yes", "No", "Data at most", "Take more scans"), "1 left out by the last prepare"),
    ],
)
def test_the_answers_of_a_store(odd, notes, unused, verdicts, words):
    index = store.read_index(str(odd))
    answers = store_answers.of_store(index, notes, unused, "an epoch takes 3 s")
    assert tuple(one.lines[0].verdict for one in answers) == verdicts
    assert (
        words in " ".join(one.lines[0].text for one in answers)
        and "1 of 11 scans has labels" in answers[1].lines[0].text
    )
    assert store_answers.of_store(index, {}, [], "not measured: damaged")[2].lines[0].verdict == "Can't tell"


def test_a_damaged_scan_leaves_the_rest_of_the_page(odd, tmp_path):
    shard = odd / "scans/good_2/0/c/0/0/0"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-9])
        text = Path(inspect.run(InspectConfig(store=str(odd), output=str(tmp_path / "page.html")))).read_text("utf-8")
    finally:
        shard.write_bytes(content)
    assert text.count("data:image/png") == 19 and "cut off or damaged" in text


def test_the_store_of_real_scans(real_data, tmp_path):
    """Scans that are as they should be do not stand out; those that are cropped to the body do."""
    from pgl_ray.files import ct

    for name in ("openkbp/images/pt_2", "body/images/LIDC-IDRI-0001", "sts/STS_001"):
        path = next(real_data.glob(f"**/{name.split('/')[-1]}.nii.gz"))
        scan = ct.read_scan(path)
        scan_files.write_scan(tmp_path, name.split("/")[-1], scan.voxels, scan.affine)
    index = store.write_index(tmp_path, {}, (-1024.0, 325.0))
    notes = {record.scan_id: inspect.warnings(record) for record in index.scans}
    assert not notes["pt_2"] and not notes["LIDC-IDRI-0001"] and "cuts the body" in notes["STS_001"][0]


def test_sheared_grids_and_what_was_said_of_a_scan_stand_out(tmp_path):
    turn = np.deg2rad(14)
    sheared = AFFINE.copy()
    sheared[:3, 0] = 3 * np.array([1, np.tan(turn), 0])
    for name, affine in (("tilted", sheared), ("straight", AFFINE)):
        scan_files.write_scan(tmp_path, name, body(), affine)
    store.write_index(tmp_path, {}, (-1024.0, 325.0))
    notes = [
        {"scan_id": name, "source": "a", "reason": f"told {on_page}", "shown": on_page}
        for name, on_page in (("straight", True), ("tilted", False), ("gone", True))
    ]
    (tmp_path / "notes.jsonl").write_text("[]\n{}\n" + "".join(json.dumps(line) + "\n" for line in notes))
    warnings = {record.scan_id: inspect.warnings(record) for record in store.read_index(tmp_path).scans}
    (warning,) = warnings["tilted"]
    assert warning.startswith("its grid is sheared by 14 degrees (gantry tilt?)") and not warnings["straight"]
    page = Path(inspect.run(InspectConfig(store=str(tmp_path)))).read_text()
    assert "told True" in page and "told False" not in page and "sheared by 14 degrees" in page


# -- pictures, files, axes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((150, 512, 512), (2, 0.8, 0.8), ["axial", "coronal"]),
        ((5, 90, 80), (3, 1, 1), ["axial"]),
        ((5, 90, 80), (60, 1, 1), ["axial"]),  # tall, but of five lines
        ((200, 300, 12), (1, 1, 4), ["sagittal"]),
        ((200, 7, 300), (1, 5, 1), ["coronal"]),
        ((3, 3, 3), (1, 1, 1), ["axial"]),
        ((900, 256, 256), (2, 2, 2), ["axial", "coronal"]),
        ((900, 60, 400), (2, 2, 2), ["coronal"]),
        ((900, 160, 400), (2, 2, 2), ["coronal", "sagittal"]),
    ],
)
def test_the_pictured_planes_are_those_with_something_to_see(shape, spacing, expected):
    assert [name for name, _ in inspect.planes(shape, spacing)] == expected


def picture_of(source: str) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(source.split(",", 1)[1])), format="png")[..., :3]


def test_labels_are_outlined_where_they_lie(tmp_path):
    """Two organs; the outline's rows and columns are those of the organ, head and front up."""
    label = np.zeros(SHAPE, np.uint8)
    label[8:20, 30:60, 20:50] = 7
    label[2:5, 10:20, 60:70] = 3
    scan_files.write_scan(tmp_path, "a", body(), AFFINE, label=label, labelled=(3, 7))
    index = store.write_index(tmp_path, {"spleen": 3, "liver": 7}, (-1024.0, 325.0))
    axial, coronal = inspect.picture_of(index, index.scans[0], [])["slices"]
    middle = (14, 45, 35)
    for slice_, plane in ((axial, label[middle[0]]), (coronal, label[::-1, middle[1]])):
        picture = picture_of(slice_["src"])
        assert picture.shape[:2] == plane.shape
        colored = np.ptp(picture, axis=2) > 0.05
        inner = np.zeros_like(colored)
        rows, columns = np.nonzero(plane == 7)
        inner[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        inner[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()] = False
        np.testing.assert_array_equal(colored, inner)
        np.testing.assert_allclose(picture[inner], [to_rgb(organ_color(2))] * inner.sum(), atol=0.01)


def test_files_that_are_not_used_are_named(odd, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(odd, path)
    (path / "failed.jsonl").write_text('{"source": "/in/<b>.nii.gz", "reason": "not a NIfTI"}\n')
    (path / "left_out.jsonl").write_text('{"source": "/in/scout", "reason": "a localiser"}\n' * 600)
    (path / "notes.jsonl").write_text('{"scan_id": "good_2", "source": "x", "reason": "uneven steps"}\n{"scan_')
    text = Path(inspect.run(InspectConfig(store=str(path), output=str(tmp_path / "page.html")))).read_text("utf-8")
    assert "1 failed, 600 left out" in text and "uneven" not in text  # of a file that is cut off nothing is used
    assert "/in/&lt;b&gt;.nii.gz" in text and "not a NIfTI" in text and text.count("a localiser") == 499
    assert "the first 500 of them" in text


def test_what_prepare_said_of_a_scan_stands_with_it(odd, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(odd, path)
    lines = [
        {"scan_id": "good_2", "source": "x", "reason": "uneven steps", "shown": True},
        {"scan_id": "good_2", "source": "x", "reason": "a structure that nobody asked for", "shown": False},
    ]
    (path / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Path(inspect.run(InspectConfig(store=str(path), output=str(tmp_path / "page.html")))).read_text("utf-8")
    assert "uneven steps" in text and "nobody asked for" not in text
    assert "Files that are not in the store" not in text


@pytest.mark.parametrize(("tilt", "said"), [(0.0, None), (0.02, None), (12.0, "12 degrees"), (-25.0, "25 degrees")])
def test_a_sheared_scan_is_flagged(tilt, said, tmp_path):
    """Slices shifted along H as a gantry tilt leaves them; an oblique scan is no sheared one."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (20, -10, 35), degrees=True).as_matrix()
    sheared = np.array([[3.0, 0, 0, 0], [-3 * math.tan(math.radians(tilt)), 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for name, affine in (("straight", sheared), ("oblique", turn @ sheared)):
        scan_files.write_scan(tmp_path, name, body(), affine)
    for record in store.write_index(tmp_path, {}, (-1024.0, 325.0)).scans:
        notes = [note for note in inspect.warnings(record) if "sheared" in note]
        assert len(notes) == (said is not None) and (said is None or said in notes[0])


def test_every_bound_is_said_in_words(odd, tmp_path):
    config = InspectConfig(store=str(odd), output=str(tmp_path / "page.html"), num_pictures=0)
    text = Path(inspect.run(config)).read_text("utf-8")
    assert "less than 0.5% of its voxels are below -128 HU" in text and "fewer than 10 slices" in text
    assert "least_" not in text.lower() and "most_" not in text and "LEAST" not in text
