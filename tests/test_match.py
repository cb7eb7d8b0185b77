"""match: places of one CT found in another; the command, the page's own script and nested loops give one answer."""

import csv
import json
import re
import shutil
import subprocess
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from browser import CHROMIUM, Page, faults
from scipy import ndimage

from pgl_ray import cli, match
from pgl_ray.config import MatchConfig, build
from pgl_ray.files import ct
from pgl_ray.judge import search
from pgl_ray.pages import match_page

INIT = "pretrained:openkbp_small"
SPACING = (3.0, 4.0, 4.0)  # D, H, W
SHAPE = (24, 64, 80)
NODE = shutil.which("node")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def body(seed=0, shift=(0, 0, 0)) -> np.ndarray:
    """int16 [D, H, W]: a body in air with blobs of its own, moved by whole voxels."""
    rng = np.random.default_rng(seed)
    d, h, w = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = ((d - 8) / 8) ** 2 + ((h - 24) / 20) ** 2 + ((w - 32) / 28) ** 2 < 1
    blobs = ndimage.gaussian_filter(rng.normal(0, 1, SHAPE), (1.5, 3, 3))
    voxels = np.where(inside, 40 + 250 * blobs / blobs.std(), -1000).clip(-1000, 900).astype(np.int16)
    return np.roll(voxels, shift, (0, 1, 2))


def affine_of(codes: str, origin=(-31.0, 12.5, 7.0)) -> np.ndarray:
    """Voxel index of a file whose axes run towards `codes` -> RAS+ mm, at SPACING."""
    size = {"S": SPACING[0], "I": SPACING[0], "A": SPACING[1], "P": SPACING[1], "R": SPACING[2], "L": SPACING[2]}
    affine = np.eye(4)
    affine[:3, 3] = origin
    for axis, code in enumerate(codes):
        affine[:3, axis] = 0
        affine["RAS".index({"L": "R", "P": "A", "I": "S"}.get(code, code)), axis] = size[code] * (
            1 if code in "RAS" else -1
        )
    return affine


def in_file(stored: np.ndarray, codes: str) -> np.ndarray:
    """[D, H, W] along S, P, L -> the array of a file with axes `codes`."""
    pairs = {"S": (0, 1), "I": (0, -1), "P": (1, 1), "A": (1, -1), "L": (2, 1), "R": (2, -1)}
    array = stored.transpose([pairs[code][0] for code in codes])
    return np.ascontiguousarray(array[tuple(slice(None, None, pairs[code][1]) for code in codes)])


def save(path, stored, codes="LPS", **options):
    nib.save(nib.Nifti1Image(in_file(stored, codes), affine_of(codes, **options)), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A, the same body moved by one coarse cell in a file of other axes, and labels of A."""
    folder = tmp_path_factory.mktemp("cts")
    save(folder / "a.nii.gz", body(), "RAS")
    save(folder / "b.nii.gz", body(shift=(8, 16, 16)), "LPI", origin=(5.0, -3.0, 100.0))
    save(folder / "other.nii.gz", body(1))
    label = np.zeros(SHAPE, np.uint8)
    label[6:9, 20:25, 30:36], label[10:12, 28:30, 40:44] = 3, 7
    save(folder / "label.nii.gz", label, "RAS")
    save(folder / "empty.nii.gz", label * 0, "RAS")
    small = nib.Nifti1Image(in_file(label, "RAS")[:-1], affine_of("RAS"))
    nib.save(small, folder / "small_label.nii.gz")
    return folder


def config(files, output, **values):
    given = {"init": INIT, "a": str(files / "a.nii.gz"), "b": str(files / "b.nii.gz"), "output": str(output)}
    return build(MatchConfig, given | {"size": (8, 32, 32)} | values)


def rows_of(output) -> list[dict]:
    with (output / "matches.csv").open() as file:
        return list(csv.DictReader(file))


def place(row, scan) -> np.ndarray:
    return np.array([float(row[f"{scan}_{axis}_mm"]) for axis in "xyz"])


# -- the search against nested loops ----------------------------------------------------------------------------------


def random_codes(rng, shape, strides, centers) -> search.Codes:
    maps = [
        rng.integers(-127, 128, (5, *(-(-n // s) for n, s in zip(shape, stride)))).astype(np.int8) for stride in strides
    ]
    return search.Codes(maps, strides, centers, shape, (2.5, 3.0, 4.0), np.eye(4))


def read_by_scipy(codes, voxel) -> list[np.ndarray]:
    features = []
    for one, stride, center in zip(codes.maps, codes.strides, codes.centers):
        at = [[(v + 0.5 - c) / s] for v, s, c in zip(voxel, stride, center)]
        parts = [ndimage.map_coordinates(part.astype(float), at, order=1, mode="nearest")[0] for part in one]
        features.append(np.array(parts))
    return features


def cosine(first, second) -> float:
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second)]))


@pytest.mark.parametrize("centers", [[(0.5,) * 3, (0.5,) * 3], [(0.5,) * 3, (0.75, 1.25, 0.5)]])
def test_the_search_equals_nested_loops(centers):
    rng = np.random.default_rng(3)
    strides, shape = [(1, 2, 2), (4, 4, 8)], (13, 22, 27)
    ours, theirs = random_codes(rng, (9, 12, 14), strides, centers), random_codes(rng, shape, strides, centers)
    step = (3, 4, 2)
    grid = product(*(range(by // 2, n, by) for by, n in zip(step, shape)))
    voxels = np.array([voxel for voxel in grid if rng.random() < 0.7])
    among = search.Candidates(voxels, step, theirs.lengths(voxels).astype(np.float32))
    for voxel in ((0, 0, 0), (8, 11, 13), (4, 5, 6)):
        hit = search.search(ours, np.array(voxel), theirs, among, 20.0)
        asked = read_by_scipy(ours, voxel)
        values = np.array([cosine(asked, read_by_scipy(theirs, v)) for v in voxels])
        np.testing.assert_allclose(hit.similarities, values, atol=1e-6)
        best = voxels[values.argmax()]
        near = []
        for at in product(*(range(shape[axis]) for axis in range(3))):
            fine = [max(1, by // 3) for by in step]
            steps = [(at[axis] - best[axis]) / fine[axis] for axis in range(3)]
            whole = all(k == int(k) for k in steps)
            if whole and all(abs(at[axis] - best[axis]) < step[axis] for axis in range(3)):
                near.append((cosine(asked, read_by_scipy(theirs, at)), at))
        value, at = max(near, key=lambda one: one[0])
        assert tuple(hit.voxel) == at and abs(hit.similarity - value) < 1e-9
        peaks = []
        for k, one in enumerate(voxels):
            neighbours = (np.abs(voxels - one) <= step).all(1)
            away = np.linalg.norm((one - best) * theirs.spacing_mm)
            if values[k] >= values[neighbours].max() and away > 20:
                peaks.append((values[k], tuple(one)))
        value, at = max(peaks)
        assert tuple(hit.other_voxel) == at and abs(hit.other_similarity - value) < 1e-6


def test_no_runner_up_where_nothing_lies_far_away():
    rng = np.random.default_rng(0)
    codes = random_codes(rng, (4, 4, 4), [(1, 2, 2)], [(0.5,) * 3])
    voxels = np.argwhere(np.ones((4, 4, 4), bool))
    among = search.Candidates(voxels, (1, 1, 1), codes.lengths(voxels).astype(np.float32))
    hit = search.search(codes, np.array([1, 2, 3]), codes, among, 1000.0)
    assert hit.other_voxel is None and hit.other_similarity is None and abs(hit.similarity - 1) < 1e-9


def test_a_similarity_map_repeats_each_cell():
    voxels, step, shape = np.array([[1, 0, 2], [4, 1, 7]]), (3, 1, 5), (7, 2, 9)
    among = search.Candidates(voxels, step, np.ones((1, 2), np.float32))
    similarities = search.similarity_map(among, np.array([0.25, 0.5]), shape)
    for voxel in product(*map(range, shape)):
        cell = tuple(min(v // by, n) for v, by, n in zip(voxel, step, (1, 1, 1)))
        assert similarities[voxel] == {(0, 0, 0): 0.25, (1, 1, 1): 0.5}.get(cell, 0)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_moved_body_is_matched_where_it_moved_to(tmp_path, files, capsys):
    voxels = np.array([[8, 24, 32], [6, 20, 40], [10, 30, 24], [5, 28, 30]])
    stored_a = np.array([[0, 0, -4.0, 0], [0, -4.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])  # d, h, w -> mm, directions
    stored_b = stored_a.copy()
    stored_a[:3, 3] = affine_of("RAS")[:3, 3] + [4.0 * (SHAPE[2] - 1), 4.0 * (SHAPE[1] - 1), 0]
    stored_b[:3, 3] = affine_of("LPI", (5.0, -3.0, 100.0))[:3, 3] - [0, 0, 3.0 * (SHAPE[0] - 1)]
    lines = ["name,x,y,z"]
    for number, voxel in enumerate(voxels):
        lines.append(f"p{number}," + ",".join(f"{v:.3f}" for v in (stored_a @ [*voxel, 1])[:3]))
    (tmp_path / "points.csv").write_text("\n".join(lines))
    result = match.run(config(files, tmp_path / "o", landmarks=str(tmp_path / "points.csv"), similarity_maps=2))
    for row, voxel in zip(rows_of(tmp_path / "o"), voxels):
        np.testing.assert_allclose(place(row, "a"), (stored_a @ [*voxel, 1])[:3], atol=0.01)
        right = (stored_b @ [*(voxel + np.array([8, 16, 16])), 1])[:3]
        assert np.linalg.norm(place(row, "b") - right) < 15, (row, right)  # its surroundings are not the same
        assert float(row["similarity"]) > 0.7
        if row["runner_up_similarity"]:
            away = np.linalg.norm([float(row[f"runner_up_{axis}_mm"]) for axis in "xyz"] - place(row, "b"))
            assert away > 30 and float(row["runner_up_similarity"]) < float(row["similarity"])
    said = match.describe(result)
    assert "p3" in said and said.splitlines()[-1].startswith(f"match: 4 places in {tmp_path / 'o'}, BatchNorm as trai")
    assert sorted(p.name for p in (tmp_path / "o").glob("*.nii.gz")) == [
        "similarity_01_p0.nii.gz",
        "similarity_02_p1.nii.gz",
    ]


def test_similarity_lies_on_bs_own_grid_and_is_highest_there(tmp_path, files):
    match.run(config(files, tmp_path, labels=str(files / "label.nii.gz"), names={"liver": 7}, page_mb=0))
    (row,) = rows_of(tmp_path)
    assert row["name"] == "liver" and not (tmp_path / "match.html").exists()
    similarity, like = nib.load(tmp_path / "similarity_01_liver.nii.gz"), nib.load(files / "b.nii.gz")
    assert similarity.shape == like.shape and np.array_equal(similarity.affine, like.affine)
    values = np.asarray(similarity.dataobj)
    index = np.linalg.inv(like.affine) @ [*place(row, "b"), 1]
    there = values[tuple(np.rint(index[:3]).astype(int))]
    assert there > values.max() - 0.15 and values.max() <= 1 and np.count_nonzero(values == 0) > values.size / 2


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "IRP"])
def test_a_voxel_is_one_of_the_files_own_axes(tmp_path, codes):
    save(tmp_path / "a.nii.gz", body(), codes)
    image = nib.load(tmp_path / "a.nii.gz")
    scan = ct.read_scan(tmp_path / "a.nii.gz")
    for voxel in ((0, 0, 0), (5, 9, 13), tuple(n - 1 for n in image.shape)):
        stored = match.stored_voxel(voxel, scan.orientation, scan.voxels.shape)
        np.testing.assert_allclose((scan.affine @ [*stored, 1])[:3], (image.affine @ [*voxel, 1])[:3], atol=1e-4)
        assert scan.voxels[tuple(stored)] == np.asarray(image.dataobj)[voxel]


def test_labels_are_asked_for_at_their_centroids(files, tmp_path):
    asked = match.places(config(files, tmp_path, labels=str(files / "label.nii.gz")), ct.read_scan(files / "a.nii.gz"))
    image = nib.load(files / "label.nii.gz")
    for one, value in zip(asked, (3, 7), strict=True):
        middle = np.argwhere(np.asarray(image.dataobj) == value).mean(0)
        assert one.name == f"label_{value}"
        np.testing.assert_allclose(one.place_mm, (image.affine @ [*middle, 1])[:3], atol=1e-4)


@pytest.mark.slow
def test_other_spacing_is_said_and_resampled_on_request(tmp_path, files, capsys):
    fine = ndimage.zoom(body(), (2, 3, 3), order=0)[:, :, :]
    affine = affine_of("LPS") @ np.diag([1 / 3, 1 / 3, 1 / 2, 1])
    nib.save(nib.Nifti1Image(in_file(fine, "LPS"), affine), tmp_path / "fine.nii.gz")
    middle = (affine @ [96, 72, 16, 1])[:3].tolist()
    given = {"a": str(tmp_path / "fine.nii.gz"), "b": str(tmp_path / "fine.nii.gz"), "point": middle}
    match.run(config(files, tmp_path / "own", **given, maps=["layer4"], similarity_maps=0, size=(16, 96, 96)))
    said = capsys.readouterr().out
    assert "its voxels are 1.5 x 1.33 x 1.33 mm" in said and "spacing=weights resamples it" in said
    assert "the same scan" in said
    match.run(config(files, tmp_path / "weights", **given, spacing="weights"))
    assert "its voxels are" not in capsys.readouterr().out
    (row,) = rows_of(tmp_path / "weights")
    assert np.abs(place(row, "a") - middle).max() < 2.6 and np.abs(place(row, "b") - place(row, "a")).max() < 4.6
    assert nib.load(tmp_path / "weights/similarity_01_point.nii.gz").shape == fine.shape[::-1]


@pytest.mark.parametrize("voxel", [(0, 0, 0), (79, 63, 23)])
def test_a_corner_is_inside_of_a_resampled_scan(tmp_path, files, voxel):
    match.run(config(files, tmp_path, voxel=voxel, spacing="weights", maps=["layer4"], similarity_maps=0, page_mb=0))
    (row,) = rows_of(tmp_path)
    asked = (nib.load(files / "a.nii.gz").affine @ [*voxel, 1])[:3]
    assert np.abs(place(row, "a") - asked).max() < 4.5


def test_a_place_in_the_air_is_named(tmp_path, files, capsys):
    scan = ct.read_scan(files / "a.nii.gz")
    voxels = np.argwhere(np.ones(SHAPE, bool))[::37]
    away = search.away_from_body(scan, voxels)
    mm = ndimage.distance_transform_edt(scan.voxels <= -500, sampling=scan.spacing_mm)[tuple(voxels.T)]
    assert away[mm > 30].all() and not away[mm == 0].any() and away.any() and not away.all()
    given = {"maps": ["layer4"], "similarity_maps": 0, "page_mb": 0}
    match.run(config(files, tmp_path, voxel=(0, 0, 23), **given))
    assert "note: outside of A's body, while B is searched inside of its own: voxel" in capsys.readouterr().out
    match.run(config(files, tmp_path, voxel=(47, 39, 8), **given))
    assert "outside of A's body" not in capsys.readouterr().out


@pytest.mark.parametrize("hu", [0, -1000])
def test_a_place_of_a_thin_scan_is_found(tmp_path, files, capsys, hu):
    """A is not searched: a slice is enough, which may be air throughout."""
    save(tmp_path / "a.nii.gz", body()[12:13] if not hu else np.full((1, *SHAPE[1:]), hu, np.int16))
    for voxel, is_away in (((40, 32, 0), False), ((0, 0, 0), not hu)):
        given = {"a": str(tmp_path / "a.nii.gz"), "maps": ["layer4"], "similarity_maps": 0}
        match.run(config(files, tmp_path / "out", voxel=voxel, **given))
        assert len(rows_of(tmp_path / "out")) == 1 and (tmp_path / "out" / "match.html").exists()
        assert ("note: outside of A's body" in capsys.readouterr().out) == is_away


@pytest.mark.slow
def test_results_in_a_scans_folder_are_no_scan_of_it(tmp_path, files):
    """Typed twice; the folder itself is refused, for what lies in it is looked at."""
    patient = tmp_path / "patient"
    patient.mkdir()
    shutil.copy(files / "a.nii.gz", patient)
    for _ in range(2):
        match.run(config(files, patient / "matched", a=str(patient), point=[-20, 20, 20], page_mb=0))
    assert list((patient / "matched").glob("similarity_*.nii.gz"))
    with pytest.raises(ValueError, match=f"output={patient} is a's folder"):
        match.run(config(files, patient, a=str(patient), point=[-20, 20, 20]))


def test_a_second_call_leaves_nothing_of_the_first(tmp_path, files):
    match.run(config(files, tmp_path, labels=str(files / "label.nii.gz")))
    assert len(list(tmp_path.glob("similarity_*"))) == 2 and (tmp_path / "match.html").exists()
    (tmp_path / "similarity_mine.nii.gz").write_bytes(b"mine")
    match.run(config(files, tmp_path, voxel=(40, 40, 8), page_mb=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "match.json",
        "matches.csv",
        "similarity_01_voxel.nii.gz",
        "similarity_mine.nii.gz",
    ]


WRONG = [
    ([], "no place is asked for: give point="),
    (["point=[1000,0,0]"], "point: the place [1000, 0, 0] mm (RAS+) lies outside of scan A, which spans x -33 to 287"),
    (
        ["voxel=[80,0,0]"],
        "lies outside of scan A, whose axes i, j, k run from 0 to 79, 0 to 63, 0 to 23",
    ),
    (["voxel=[0,-1,0]"], "lies outside"),
    (["voxel=[0,0,0]", "b={files}/nowhere.nii.gz"], "b={files}/nowhere.nii.gz does not exist"),
    (["voxel=[0,0,0]", "b={tmp}/none"], "b={tmp}/none: no volume in it"),
    (["voxel=[0,0,0]", "a={files}"], "a={files} holds "),
    (["voxel=[0,0,0]", "a={tmp}/notes.txt"], "not a supported format"),
    (
        ["voxel=[0,0,0]", "maps=[layer9]"],
        "maps=layer9: init=pretrained:openkbp_small has no 'layer9'; it has stem",
    ),
    (
        ["voxel=[0,0,0]", "page_mb=0.7"],
        "MB, page_mb=0.7: take maps=[layer2,layer3,layer4] (0.6 MB), or page_mb=1",
    ),
    (["voxel=[0,0,0]", "page_mb=0.01"], "or page_mb=0 for no page"),
    (["voxel=[0,0,0]", "init=random"], "init=random has learnt nothing"),
    (["voxel=[0,0,0]", "init={tmp}/none"], "none"),
    (
        ["voxel=[0,0,0]", "init={tmp}/plain.pth"],
        "so it is not known what HU it expects: give hu_window=",
    ),
    (["voxel=[0,0,0]", "hu_window=[-500,500]"], "was trained with [-1024.0, 325.0]: leave it out"),
    (["voxel=[0,0,0]", "hu_window=[5,1]"], "hu_window: lower bound 5.0 is above upper bound 1.0"),
    (["landmarks={tmp}/notes.txt"], "expected a first line name,x,y,z"),
    (["landmarks={tmp}/bad.csv"], "line 3: x, y, z must be three numbers in mm"),
    (["landmarks={tmp}/far.csv"], "far: the place [1, 2, 9000] mm (RAS+) lies outside of scan A"),
    (["landmarks={tmp}/gone.csv"], "cannot be read"),
    (["labels={files}/empty.nii.gz"], "holds no label"),
    (["labels={files}/small_label.nii.gz"], "label shape"),
    (["labels={files}/label.nii.gz", "names.liver=5"], "names: liver=5 is not in"),
    (["voxel=[0,0,0]", "index={tmp}"], "is not a store"),
    (["point=[1,2]"], "point=[1, 2]: expected three numbers, [x,y,z] in mm"),
    (["voxel=7"], "voxel=7: expected three numbers, [i,j,k]"),
    (["voxel=[0,0,0]", "b={tmp}/thin.nii.gz"], "thin.nii.gz: a scan of (1, 64, 80) voxels (D, H, W) is too thin"),
    (["apart_mm=-1"], "apart_mm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("args", "message"), WRONG, ids=[f"{k}-{m[:24]}" for k, (_, m) in enumerate(WRONG)])
def test_wrong_use_is_one_line(tmp_path, files, capsys, args, message):
    from pgl_ray.model.resnet import Encoder

    (tmp_path / "none").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of use\n")
    (tmp_path / "bad.csv").write_text("name,x,y,z\na,-20,20,20\nb,1,x,3\n")
    (tmp_path / "far.csv").write_text("name,x,y,z\nfar,1,2,9000\n")
    nib.save(nib.Nifti1Image(in_file(body()[:1], "LPS"), affine_of("LPS")), tmp_path / "thin.nii.gz")
    if any("plain" in arg for arg in args):
        torch.save(Encoder().state_dict(), tmp_path / "plain.pth")
    names = {"files": files, "tmp": tmp_path}
    given = {"init": INIT, "a": f"{files}/a.nii.gz", "b": f"{files}/b.nii.gz", "output": f"{tmp_path}/o"}
    given |= dict(arg.format(**names).split("=", 1) for arg in args)
    with pytest.raises(SystemExit) as stop:
        cli.call("match", [f"{key}={value}" for key, value in given.items()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    assert message.format(**names) in err and err.startswith("pgl_ray.match: ")
    assert not (tmp_path / "o/matches.csv").exists()


@pytest.mark.slow
def test_a_weights_file_without_metadata_needs_the_window(tmp_path, files):
    from pgl_ray.model.resnet import Encoder

    torch.manual_seed(0)
    torch.save(Encoder().state_dict(), tmp_path / "plain.pth")
    given = {"init": str(tmp_path / "plain.pth"), "hu_window": (-1000, 400), "maps": ["layer4"]}
    match.run(config(files, tmp_path / "o", voxel=(40, 40, 8), similarity_maps=0, **given))
    assert len(rows_of(tmp_path / "o")) == 1


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("page")
    given = config(files, output, labels=str(files / "label.nii.gz"), b=str(files / "other.nii.gz"), similarity_maps=0)
    match.run(given)
    return output / "match.html"


def held(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', text) and "http" not in text
    assert text.count("<figure") == 2 and "data:image/png;base64," in text and "<noscript>" in text
    assert page.stat().st_size < 25e6
    rows = rows_of(page.parent)
    assert all(row["name"] in text for row in rows) and f"{float(rows[0]['b_x_mm']):.1f}" in text


@pytest.mark.parametrize("most", [300, 1000, 5000, 10**6])
@pytest.mark.parametrize("shape", [(13, 20, 20), (14, 21, 19), (15, 17, 23)])
def test_no_slice_beyond_those_shown(monkeypatch, shape, most):
    """Whatever the step: a body that fills the scan ends with the last voxel that is shown."""
    monkeypatch.setattr(match_page, "MAX_VOXELS", most)
    scan = ct.Scan(np.zeros(shape, np.int16), np.diag([4.0, 4.0, 3.0, 1]), (3.0, 4.0, 4.0), "SPL", 0.0, 0)
    maps = [np.zeros((1, 2, 2, 2), np.int8)]
    codes = search.Codes(maps, [(8, 8, 8)], [(4.0, 4.0, 4.0)], shape, scan.spacing_mm, scan.affine)
    shown = match_page.side(scan, codes)["shown"]
    assert [high for _, high in shown["box"]] == list(shown["shape"])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_nothing_sticks_out_in_a_browser(page):
    assert faults(page) == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
@pytest.mark.parametrize("width", [1300, 400])
def test_all_slices_of_a_page_have_one_scale(page, width):
    """Pixels per mm of the six slices, by what the page says of the scans."""
    data, planes = held(page), {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}
    with Page(page.as_uri(), width) as browser:
        browser.wait("document.body && document.body.dataset.page === 'ready'")
        for side in "ab":
            own, greys = data[side]["spacing"], data[side]["shown"]
            mm = [(high - low) * by * size for (low, high), by, size in zip(greys["box"], greys["step"], own)]
            for name, axes in planes.items():
                canvas = f"document.querySelector('#slices-{side} [data-plane={name}]').getBoundingClientRect()"
                height, wide = browser.value(f"(r => [r.height, r.width])({canvas})")
                scale = browser.scale = getattr(browser, "scale", wide / mm[axes[1]])
                assert wide / mm[axes[1]] == pytest.approx(scale, rel=0.02)
                assert height / mm[axes[0]] == pytest.approx(scale, rel=0.04)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_the_page_opens_and_answers_at_once(page):
    with Page(page.as_uri()) as browser:
        browser.wait("document.body && document.body.dataset.page === 'ready'")
        assert float(browser.value("document.body.dataset.readyMs")) < 2000
        took = [float(browser.value("document.body.dataset.answerMs"))]
        x, y, wide, tall = browser.value(
            "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#slices-a canvas').getBoundingClientRect())"
        )
        for share in (0.3, 0.45, 0.6):
            before = browser.value("document.body.dataset.asked")
            browser.click(x + share * wide, y + 0.5 * tall)
            browser.wait(f"document.body.dataset.asked !== '{before}'")
            took.append(float(browser.value("document.body.dataset.answerMs")))
    assert min(took[1:]) < 100, took


@pytest.mark.parametrize(
    ("leads", "verdict", "words"),
    [
        ((0.2, 0.3, 0.1), "Yes", "3 of 3 places have no other"),
        ((0.2, 0.01, 0.3), "In part", "p1 (0.010)"),
        ((0.02, 0.01), "No", "p1 (0.010), p0 (0.020)"),
        ((0.2,), "Yes", "0.20 in the mean"),
        ((None,), "Yes", "1 of 1 place has no other"),
    ],
)
def test_answers_say_which_places_have_a_rival(leads, verdict, words):
    rows = [
        match.Row(f"p{k}", np.zeros(3), np.zeros(3), 0.9, None, None if lead is None else 0.9 - lead)
        for k, lead in enumerate(leads)
    ]
    apart, first, sure = match_page.answers(rows)
    assert apart.lines[0].verdict == verdict and sure.lines[0].verdict == "Can't tell"
    assert words in apart.lines[0].text + first.lines[0].text
    assert ("95 % interval" in apart.lines[0].text) == (len(leads) > 1)


@pytest.mark.parametrize(
    ("leads", "verdict", "words"),
    [
        ((0.01, 0.31), "In part", "p (0.010): look"),
        ((0.31, 0.01), "In part", "p (0.010): look"),
        ((0.03, 0.01), "No", "p (0.010), p (0.030): look"),
    ],
)
def test_places_of_one_name_are_answered_each(leads, verdict, words):
    """Whichever of them comes last in the file."""
    rows = [match.Row("p", np.zeros(3), np.zeros(3), 0.9, None, 0.9 - lead) for lead in leads]
    apart, first, _ = match_page.answers(rows)
    assert apart.lines[0].verdict == verdict and words in first.lines[0].text
    assert f"{np.mean(leads):.2f} in the mean" in apart.lines[0].text and "over 2 places" in apart.lines[0].text


@pytest.mark.skipif(not NODE, reason="no node: the page's script cannot be run")
def test_the_pages_script_gives_the_commands_answer(page, files, tmp_path):
    text, data = page.read_text(), held(page)
    script = re.search(r'<script id="search">(.*?)</script>', text, re.S)[1]
    a, b = (ct.read_scan(files / f"{name}.nii.gz") for name in ("a", "other"))
    encoder = match.api.load_encoder(INIT, size=(8, 32, 32))
    codes = search.encode(encoder, [a, b])
    among = search.candidates(b, codes[1])
    rng = np.random.default_rng(0)
    voxels = [[0, 0, 0], [n - 1 for n in SHAPE], *(rng.integers(SHAPE).tolist() for _ in range(30))]
    (tmp_path / "data.json").write_text(json.dumps({"data": data, "voxels": voxels}))
    run = f"""{script}
    const {{ data, voxels }} = JSON.parse(require("fs").readFileSync({json.dumps(str(tmp_path / "data.json"))}));
    const search = new Search(data);
    console.log(JSON.stringify(voxels.map((v) => ({{ ...search.find(v), values: [...search.find(v).values] }}))));"""
    (tmp_path / "run.js").write_text(run)
    answers = json.loads(subprocess.run([NODE, tmp_path / "run.js"], capture_output=True, check=True, text=True).stdout)
    for voxel, answer in zip(voxels, answers):
        hit = search.search(codes[0], np.array(voxel), codes[1], among, 40.0)
        assert answer["voxel"] == hit.voxel.tolist() and answer["similarity"] == hit.similarity
        assert answer["values"] == pytest.approx(hit.similarities.tolist(), abs=1e-14)
        other = None if hit.other_voxel is None else hit.other_voxel.tolist()
        assert answer["other"] == other
        assert answer["otherSimilarity"] == pytest.approx(hit.other_similarity, abs=1e-14)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_a_click_in_a_browser_gives_the_commands_answer(page, files, tmp_path):
    def asked_and_hit(browser) -> tuple[list[int], list[int], float]:
        texts = browser.value("[document.body.dataset.asked, document.body.dataset.found]")
        similarity = float(browser.value("document.body.dataset.similarity"))
        return *([int(part) for part in text.split(",")] for text in texts), similarity

    def command(voxel, output) -> dict:
        """The answer for a stored voxel of A, whose file's axes run towards R, A, S."""
        own = [SHAPE[2] - 1 - voxel[2], SHAPE[1] - 1 - voxel[1], voxel[0]]
        match.run(config(files, output, voxel=own, b=str(files / "other.nii.gz"), similarity_maps=0, page_mb=0))
        return rows_of(output)[0]

    with Page(page.as_uri()) as browser:
        browser.wait("document.body && document.body.dataset.page")
        assert browser.value("document.body.dataset.page") == "ready"
        rect = "document.querySelector('#slices-a canvas').getBoundingClientRect()"
        box = browser.value(f"(r => [r.x, r.y, r.width, r.height])({rect})")
        before = asked_and_hit(browser)
        browser.click(box[0] + 0.6 * box[2], box[1] + 0.4 * box[3])
        browser.wait(f"document.body.dataset.asked !== '{','.join(map(str, before[0]))}'")
        clicked = asked_and_hit(browser)
        answer = browser.value("document.getElementById('answer').textContent")
        browser.press("ArrowRight")
        browser.wait(f"document.body.dataset.asked !== '{','.join(map(str, clicked[0]))}'")
        moved = asked_and_hit(browser)
        assert moved[0] == [clicked[0][0], clicked[0][1], clicked[0][2] + 1]
        browser.tap(box[0] + 0.5 * box[2], box[1] + 0.5 * box[3])
        browser.wait(f"document.body.dataset.asked !== '{','.join(map(str, moved[0]))}'")
        tapped = asked_and_hit(browser)
    inverse = np.linalg.inv(ct.read_scan(files / "other.nii.gz").affine)
    for number, (asked, hit, similarity) in enumerate((before, clicked, moved, tapped)):
        row = command(asked, tmp_path / str(number))
        index = inverse @ [*place(row, "b"), 1]
        np.testing.assert_allclose(index[:3], hit, atol=0.01)
        assert f"{similarity:.4f}" == row["similarity"]
        if number == 1:
            assert ", ".join(f"{v:.1f}" for v in place(row, "b")) in answer
