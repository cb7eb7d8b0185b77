"""The page beside a label map: what it holds lies where the scan lies, and it needs nothing from elsewhere."""

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from browser import CHROMIUM, faults
from matplotlib.image import imread

from pgl_ray.pages import label_pictures, viewer
from pgl_ray.pages.viewer import Organ

AFFINE = np.array([[0.1, 0.0, -1.5, 40], [0.05, 1.2, 0.02, -30], [3.0, 0, 0, 7], [0, 0, 0, 1]])  # d, h, w -> RAS+ mm
TEXTS = {"title": "a <b> & c", "subtitle": "s", "made_by": "m"}


def scan(shape=(9, 22, 31)):
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1024, 1000, shape).astype(np.int16)
    return voxels, rng.choice(np.array([0, 4, 300], np.uint16), shape)


def page_of(voxels, label, names=None):
    organs = viewer.legend(label, names or {"spleen": 4, "liver": 300}, AFFINE, nested=False)
    return viewer.make_page(voxels, label, AFFINE, organs, TEXTS)


def held(page):
    """What the page's script reads: two images and the rest."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    images = [
        nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(data.pop(name)))) for name in ("scan", "labels")
    ]
    return (*images, data)


def same_place(image, index):
    """World coordinates of a voxel (d, h, w) of a page's image, whose axes are W, H, D."""
    return image.affine @ [*index[::-1], 1]


def test_the_page_holds_scan_and_labels_on_the_scans_grid():
    voxels, label = scan()
    page, png = page_of(voxels, label)
    ct, labels, data = held(page)
    np.testing.assert_allclose(np.asarray(ct.dataobj).T, voxels, atol=viewer.GREY_HU / 2 + 1e-3)
    assert np.array_equal(np.asarray(labels.dataobj).T, np.select([label == 4, label == 300], [1, 2]))
    for image in (ct, labels):
        np.testing.assert_allclose(same_place(image, (3, 5, 7)), AFFINE @ [3, 5, 7, 1], atol=1e-4)
    assert data["colormap"]["labels"] == ["", "spleen", "liver"] and data["colormap"]["A"] == [0, 255, 255]
    inside = np.argwhere(label > 0).mean(0)
    np.testing.assert_allclose(data["centre"], (AFFINE @ [*inside, 1])[:3], atol=1e-6)
    picture = imread(io.BytesIO(png), format="png")
    assert picture.ndim == 3 and picture[..., :3].std() > 0.05 and base64.b64encode(png).decode() in page


def test_a_large_scan_is_thinned_where_it_is_finest(monkeypatch):
    monkeypatch.setattr(viewer, "MAX_VOXELS", 2000)
    voxels, label = scan()
    page, _ = page_of(voxels, label)
    ct, labels, _ = held(page)
    assert ct.shape == labels.shape == (16, 11, 9) and "One voxel of 1 x 2 x 2 (D, H, W)" in page  # 6138 -> 1584 voxels
    assert np.array_equal(np.asarray(labels.dataobj).T > 0, label[:, ::2, ::2] > 0)
    np.testing.assert_allclose(same_place(labels, (3, 4, 5)), AFFINE @ [3, 8, 10, 1], atol=1e-4)


def test_the_page_stands_by_itself_and_does_without_webgl():
    page, _ = page_of(*scan(), names={"a</script><b>": 4, "liver": 300})
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<noscript>" in page and 'id="viewer" hidden' in page
    assert page.count("</script>") == 3 and "a &lt;b&gt; &amp; c" in page  # names and titles cannot end a script
    script = (viewer.HERE / "niivue.umd.js").read_bytes()
    licence = (viewer.HERE / "niivue.license.txt").read_text()
    assert hashlib.sha256(script).hexdigest() in licence and "Redistribution and use" in page


@pytest.mark.parametrize("nested, voxels", [(False, [6, 0, 3]), (True, [9, 3, 3])])
def test_legend_counts_millilitres(nested, voxels):
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0] = 1
    label[1, 1, :3] = 5
    names = {"tumour": 5, "cyst": 3, "organ": 1}
    organs = viewer.legend(label, names, np.diag([2.0, 5.0, -10.0, 1.0]), nested)  # a voxel is 0.1 mL
    ordered = [("organ", 1), ("cyst", 3), ("tumour", 5)]
    assert organs == [Organ(*organ, n, pytest.approx(0.1 * n)) for organ, n in zip(ordered, voxels)]


def test_no_organ_predicted():
    voxels, label = scan()
    page, png = page_of(voxels, np.zeros_like(label))
    assert held(page)[2]["centre"] is None and page.count(">not found<") == 2 and len(png) > 1000


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_nothing_sticks_out_in_a_browser(tmp_path):
    page, _ = page_of(*scan(), names={"an_organ_with_a_name_that_goes_on_and_on_" * 3: 4, "liver": 300})
    (tmp_path / "page.html").write_text(page)
    assert faults(tmp_path / "page.html") == []


@pytest.mark.parametrize(
    ("voxels", "notes", "expected"),
    [
        ((9, 40), [], ("2 of 2 organs", "The smallest organ", "small, 9.0 mL")),
        ((0, 40), [], ("1 of 2 organs", "What was not found", "small: outside of the scan, or overlooked")),
        ((0, 0), [], ("0 of 2 organs", "What was not found", "small, large")),
        (
            (9, 40),
            ["its voxels are large."],
            ("2 of 2 organs", "The scan", "1 note on it, first: its voxels are large"),
        ),
    ],
)
def test_the_answers_say_what_to_look_at_first(voxels, notes, expected):
    organs = [Organ(name, k, n, float(n)) for k, (name, n) in enumerate(zip(("small", "large"), voxels), 1)]
    present, first, sure = viewer.answers(organs, notes, float(sum(voxels)))
    assert (present.lines[0].verdict, first.lines[0].verdict) == expected[:2] and expected[2] in first.lines[0].text
    assert sure.lines[0].verdict == "Can't tell" and "pgl_ray.evaluate" in sure.lines[0].text
    assert f"{sum(voxels):.1f} mL in all" in present.lines[0].text or "no voxel has a label" in present.lines[0].text


def test_what_lies_in_another_organ_counts_once(monkeypatch):
    """Of task=binary: the organ includes its tumour."""
    label, affine = np.zeros((4, 5, 6), np.uint8), np.diag([10.0, 10.0, 10.0, 1.0])
    label[:2], label[1] = 1, 2  # 30 mL, and 30 mL of tumour in 60 mL of organ
    given = {}
    monkeypatch.setattr(viewer.pages, "render", lambda name, **texts: given.update(texts) or "")
    for nested, whole in ((True, 60.0), (False, 30.0)):
        organs = viewer.legend(label, {"liver": 1, "tumour": 2}, affine, nested=nested)
        viewer.make_page(np.zeros(label.shape, np.int16), label, affine, organs, {}, [])
        assert [organ.volume_ml for organ in organs] == [whole, 30.0]
        assert "60.0 mL in all" in given["answers"][0].lines[0].text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium that would show the page")
@pytest.mark.parametrize("webgl", [True, False])
def test_a_browser_shows_the_organ_where_it_lies(tmp_path, webgl):
    """Without a network; the axial slice by niivue, and in the pictures where there is no WebGL."""
    voxels = np.full((24, 64, 64), -1000, np.int16)
    label = np.zeros_like(voxels, np.uint16)
    voxels[:, 6:58, 10:54], label[6:18, 12:30, 16:26] = 40, 4  # body and organ, axes D, H, W
    affine = np.array([[0, 0, -2.0, 60], [0, -2, 0, 60], [5, 0, 0, 0], [0, 0, 0, 1]])  # seen as radiologists do
    organs = viewer.legend(label, {"spleen": 4}, affine, nested=False)
    page, _ = viewer.make_page(voxels, label, affine, organs, TEXTS)
    (tmp_path / "page.html").write_text(page)
    graphics = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"] if webgl else ["--disable-3d-apis"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "--window-size=900,1000"]
    command = [BROWSER, "--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path}/browser", *graphics, *offline]
    command += ["--virtual-time-budget=20000", f"--screenshot={tmp_path}/page.png", f"file://{tmp_path}/page.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = imread(tmp_path / "page.png")[..., :3]
    orange = (pixels[..., 0] - pixels[..., 2] > 0.2) & (pixels[..., 0] < 0.8)  # the legend's is brighter
    grey = (np.ptp(pixels, axis=2) < 0.02) & (abs(pixels[..., 0] - 0.48) < 0.05) | orange
    panel = np.zeros_like(grey)
    panel[: 680 if webgl else None, : 305 if webgl else 186] = True  # the leftmost is axial
    if not webgl:
        panel[: np.flatnonzero((orange & panel).any(1))[0] - 40] = False  # above the slices with labels
    spans = []
    for axis in (1, 0):
        inside = (grey & panel).sum(axis) > 60  # more than letters
        organ = (orange & panel).sum(axis) > 20
        first, last = np.flatnonzero(inside)[[0, -1]]
        spans.append((np.flatnonzero(organ)[[0, -1]] - first) / (last - first))
    np.testing.assert_allclose(spans, [[6 / 52, 24 / 52], [6 / 44, 16 / 44]], atol=0.04)


def test_notes_and_their_signs_are_on_the_page():
    voxels, label = scan()
    organs = viewer.legend(label, {"spleen": 4, "liver": 300}, AFFINE, nested=False)
    page, _ = viewer.make_page(voxels, label, AFFINE, organs, TEXTS, ["its voxels are <3 mm", "a second one"])
    assert "<li>its voxels are &lt;3 mm</li>" in page and "<li>a second one</li>" in page
    assert "<li>" not in viewer.make_page(voxels, label, AFFINE, organs, TEXTS)[0].split("<script>")[0]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium that would show the page")
def test_a_browser_says_where_the_cross_stands(tmp_path):
    """Organ, mm and HU of the labels' middle, as the affine has it."""
    voxels = np.full((24, 64, 64), -1000, np.int16)
    label = np.zeros_like(voxels, np.uint16)
    voxels[6:19, 12:31, 16:27], label[6:19, 12:31, 16:27] = 64, 300
    affine = np.array([[0, 0, -2.0, 60], [0, -2, 0, 60], [5, 0, 0, 100], [0, 0, 0, 1]])
    organs = viewer.legend(label, {"spleen": 4, "liver": 300}, affine, nested=False)
    (tmp_path / "page.html").write_text(viewer.make_page(voxels, label, affine, organs, TEXTS)[0])
    command = [BROWSER, "--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path}/browser", "--dump-dom"]
    command += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], check=True, capture_output=True, timeout=120)
    said = re.search(r'id="place"[^>]*>([^<]*)<', done.stdout.decode())[1]
    assert said == "liver, x 18, y 18, z 160 mm, 64 HU"  # voxel (12, 21, 21): 60 - 2 * 21, 60 - 2 * 21, 100 + 5 * 12


def test_a_montage_has_one_scale_and_a_bounded_size():
    """mm per inch are the same in all ten panels, and no scan makes the picture tall."""
    for shape, spacing in [((24, 64, 64), (5, 2, 2)), ((600, 128, 128), (3, 4, 4)), ((6, 512, 512), (5, 0.7, 0.7))]:
        numbers = np.zeros(shape, np.uint8)
        numbers[shape[0] // 3, 10:40, 10:40] = 1
        figure = label_pictures.montage(np.zeros(shape, np.int16), numbers, np.array(spacing), ["liver"])
        size, scales = figure.get_size_inches(), []
        for ax in figure.axes:
            rows, columns = ax.images[0].get_array().shape[:2]
            box = ax.get_position()
            across = {(shape[k], shape[m]): (spacing[k], spacing[m]) for k, m in ((1, 2), (0, 2), (0, 1))}
            unit = across[rows, columns]
            scales += [box.height * size[1] / (rows * unit[0]), box.width * size[0] / (columns * unit[1])]
        assert len(figure.axes) == 10 and np.ptp(scales) < 1e-6 * max(scales)
        assert size[0] == 10 and size[1] < 8


def test_numbers_of_small_organs_are_not_piled_up():
    """Forty organs in a corner: what has no room is left out, large ones first."""
    numbers = np.zeros((20, 100, 100), np.uint8)
    numbers[:, 50:90, 50:90] = 1
    for k in range(40):
        numbers[:, 10 + k % 8 * 4 : 14 + k % 8 * 4, 10 + k // 8 * 4 : 14 + k // 8 * 4] = k + 2
    figure = label_pictures.montage(np.zeros_like(numbers, np.int16), numbers, np.array([5.0, 3, 3]), ["a"] * 41)
    axial = figure.axes[1]
    texts = [text for text in axial.texts if text.get_text().isdigit()]
    places = np.array([text.get_position() for text in texts])
    far = np.abs(places[:, None] - places[None]).max(2) + 1000 * np.eye(len(places))
    inch = axial.get_position().width * figure.get_size_inches()[0] / 100
    assert "1" in {text.get_text() for text in texts} and 4 < len(texts) < 41 and far.min() * inch >= 0.12
