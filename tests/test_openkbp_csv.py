"""data_prep/openkbp_from_csv.py against a patient folder made by nested loops, and bad folders."""

import csv
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ray.config import PrepareConfig, load
from pgl_ray.files.layout import read_layout

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data_prep/openkbp_from_csv.py"
VOXEL_MM = (4.0, 3.5, 2.5)  # along the first and the second axis, between slices
CT = {(0, 0, 0): 1.0, (5, 7, 127): 4000.0, (127, 127, 127): 940.5, (64, 3, 9): 1000.0}  # (a, b, c) -> HU + 1000
MASKS = {"Brainstem": [(1, 2, 3), (1, 2, 4)], "Mandible": [(1, 2, 4), (9, 8, 7)], "Larynx": []}


def write_patient(folder, ct=CT):
    folder.mkdir(parents=True)
    (folder / "voxel_dimensions.csv").write_text("".join(f"{length:.18e}\n" for length in VOXEL_MM))
    rows = {a * 128 * 128 + b * 128 + c: value for (a, b, c), value in ct.items()}
    (folder / "ct.csv").write_text(",data\n" + "".join(f"{number},{value}\n" for number, value in sorted(rows.items())))
    for organ, voxels in MASKS.items():
        rows = sorted(a * 128 * 128 + b * 128 + c for a, b, c in voxels)
        (folder / f"{organ}.csv").write_text(",data\n" + "".join(f"{number},\n" for number in rows))
    (folder / "PTV70.csv").write_text(",data\n12,\n")
    (folder / "dose.csv").write_text(",data\n12,3.5\n")
    return folder


def run(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)


def test_a_patient_comes_out_as_nested_loops_say(tmp_path):
    for folder, name in (("train-pats", "pt_1"), ("validation-pats", "pt_201"), ("test-pats", "pt_241")):
        write_patient(tmp_path / "in" / folder / name)
    done = run(tmp_path / "in", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"openkbp: 3 of 3 patients in {tmp_path / 'out'}\n")

    image, label = (nib.load(tmp_path / f"out/{kind}/pt_1.nii.gz") for kind in ("images", "labels"))
    hu, values = np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)
    assert (image.shape, image.get_data_dtype()) == ((128, 128, 128), np.int16)
    expected = np.full((128, 128, 128), -1000)
    for (a, b, c), value in CT.items():  # a towards posterior, b towards left, c towards inferior
        expected[b, a, 127 - c] = round(value) - 1000
    np.testing.assert_array_equal(hu, expected)
    assert sorted(zip(*np.nonzero(values), values[values > 0].tolist())) == sorted(
        [(2, 1, 124, 1), (2, 1, 123, 7), (8, 9, 120, 7)]
    )
    for file in (image, label):
        np.testing.assert_allclose(file.affine, np.diag([-3.5, -4.0, 2.5, 1]))
        assert "".join(nib.aff2axcodes(file.affine)) == "LPS"

    with open(tmp_path / "out/patients.csv", newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    organs = "Brainstem Mandible"  # the larynx' file names no voxel
    assert rows == [
        ("patient", "split", "labelled_organs"),
        ("pt_1", "train", organs),
        ("pt_201", "validation", organs),
        ("pt_241", "test", organs),
    ]


def test_the_recipe_takes_what_comes_out(tmp_path):
    for folder, name in (("train-pats", "pt_1"), ("validation-pats", "pt_201")):
        write_patient(tmp_path / "in" / folder / name)
    assert run(tmp_path / "in", tmp_path / "out").returncode == 0
    config = load(PrepareConfig, [str(ROOT / "data_prep/openkbp.yaml"), f"source={tmp_path / 'out'}", "store=s"])
    layout = read_layout(config.source, config.labels, config.recipe)
    assert [(scan.scan_id, scan.split, scan.labelled) for scan in layout.scans] == [
        ("pt_1", "train", (1, 7)),
        ("pt_201", "validation", (1, 7)),
    ]
    assert not layout.faults and not layout.left_out


@pytest.mark.slow
def test_patients_of_a_single_table(tmp_path):
    for number in (1, 2, 3):
        write_patient(tmp_path / f"in/train-pats/pt_{number}")
    (tmp_path / "t.csv").write_text("patient,split\npt_1,train\npt_3,train\n")
    done = run(tmp_path / "in", tmp_path / "out", tmp_path / "t.csv")
    assert done.returncode == 0
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["pt_1.nii.gz", "pt_3.nii.gz"]
    (tmp_path / "t.csv").write_text("patient,split\npt_1,train\npt_9,train\n")
    done = run(tmp_path / "in", tmp_path / "out", tmp_path / "t.csv")
    assert done.returncode == 1 and "1 patients of" not in done.stderr and "pt_9" in done.stderr


def _change(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "ct.csv").unlink(), "ct.csv"),
        (_change("ct.csv", ",data\n"), "no voxels"),
        (_change("ct.csv", ",data\n1,-5\n"), "no voxels, or values below 0"),
        (_change("ct.csv", ",data\n2097152,5\n"), "voxels 2097152 to 2097152, the grid has 0 to 2097151"),
        (_change("ct.csv", "hello\nyou,there\n"), "no sparse CSV of OpenKBP"),
        (_change("voxel_dimensions.csv", "1\n2\n"), "expected three lengths in mm"),
        (_change("Larynx.csv", ",data\n-3,\n"), "voxels -3 to -3"),
    ],
)
def test_a_bad_patient_is_left_out_by_name(tmp_path, spoil, message):
    write_patient(tmp_path / "in/train-pats/pt_1")
    spoil(write_patient(tmp_path / "in/train-pats/pt_2"))
    done = run(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 1 and "1 of 2 patients" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "left out: pt_2" in done.stderr and message in done.stderr
    assert not (tmp_path / "out/images/pt_2.nii.gz").exists()


@pytest.mark.slow
def test_wrong_use_is_one_line(tmp_path):
    for args in ((), (tmp_path, tmp_path / "out")):
        done = run(*args)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_the_patients_of_the_published_results():
    with (ROOT / "data_prep/openkbp_patients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    splits = [row["split"] for row in rows]
    assert (len(rows), splits.count("train"), splits.count("validation")) == (121, 106, 15)
