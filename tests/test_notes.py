"""What prepare says of scans that it converted: structures that were not used, printed, kept and not repeated."""

import json

import numpy as np
import pydicom
import pytest
from dicom_files import ct_series, save, structure_set

from pgl_ray import prepare
from pgl_ray.config import PrepareConfig
from pgl_ray.data import store

SHAPE = (6, 30, 40)
NAMES = {"liver": 1, "spleen": 2, "cord": 3}


pytestmark = pytest.mark.usefixtures("serial")


def square(k, low=3, high=12):
    corners = ((low, low), (high, low), (high, high), (low, high))
    return [(-30 + 0.7 * (x - 0.5), 20 + 0.8 * (y - 0.5), -400 + 2.5 * k) for x, y in corners]


def patient(folder, structures, seed=0, jitter=0.0):
    """A CT and its structure set; `jitter`: how far every second slice is from its place."""
    files = ct_series(np.random.default_rng(seed).integers(0, 1500, SHAPE).astype(np.uint16))
    for k, file in enumerate(files):
        file.ImagePositionPatient = [-30, 20, -400 + 2.5 * k + jitter * (k % 2)]
    save(files, folder / "ct")
    return save([structure_set(structures, files[0].SeriesInstanceUID)], folder / "rs", "rs.dcm") / "rs.dcm"


def run(tmp_path):
    return prepare.run(PrepareConfig(source=str(tmp_path / "in"), store=str(tmp_path / "s"), labels={"names": NAMES}))


def stored_notes(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "s/notes.jsonl").read_text().splitlines()]
    return [(place_of(line["scan_id"]), line["reason"], line["shown"]) for line in lines]


def place_of(scan_id):
    """The folder that a DICOM series' id begins with."""
    return scan_id.rpartition("__series")[0]


def labelled(tmp_path):
    return {place_of(scan.scan_id): scan.labelled for scan in store.read_index(tmp_path / "s").scans}


def test_what_was_not_used_is_said_and_stays_unlabelled(tmp_path, capsys):
    patient(tmp_path / "in/p1", {"Liver": [square(2)], "Spleen": [], "couch": [square(1)]})
    patient(tmp_path / "in/p2", {"Liver": [square(2)], "cord": [("POINT", square(3))]}, seed=1, jitter=0.2)
    rs = patient(tmp_path / "in/p3", {"Liver": [square(2)]}, seed=2)
    rs.write_bytes(rs.read_bytes()[:-200])
    result = run(tmp_path)
    assert result.converted == 3 and [fault.source for fault in result.failed] == [str(rs)]
    expected = [
        ("p1__ct", "structure 'Spleen' (ROI 2): is empty", True),
        ("p1__ct", "not asked for: 'couch'", False),
        ("p2__ct", "distances between slices vary from 2.3 to 2.7 mm and are stored as even ones", True),
        ("p2__ct", "structure 'cord' (ROI 2): 1 contour is POINT, which bounds no area", True),
    ]
    assert stored_notes(tmp_path) == expected and labelled(tmp_path) == {"p1__ct": (1,), "p2__ct": (1,), "p3__ct": ()}
    printed = capsys.readouterr().out
    assert printed.count("prepare: note: ") == 3 and "couch" not in printed

    # nothing is new: nothing is said again, and nothing is forgotten
    assert run(tmp_path).converted == 0
    assert stored_notes(tmp_path) == expected and labelled(tmp_path) == {"p1__ct": (1,), "p2__ct": (1,), "p3__ct": ()}
    assert "prepare: note: " not in capsys.readouterr().out

    # a set that is drawn anew says what holds now
    series = pydicom.dcmread(tmp_path / "in/p1/ct/000.dcm").SeriesInstanceUID
    files = structure_set({"Liver": [square(2)], "Spleen": [square(4)]}, series)
    save([files], tmp_path / "in/p1/rs", "rs.dcm")
    assert run(tmp_path).converted == 1
    assert stored_notes(tmp_path) == expected[2:] and labelled(tmp_path)["p1__ct"] == (1, 2)


def test_a_table_makes_no_structure_of_one_that_was_not_filled(tmp_path):
    patient(tmp_path / "in/p1", {"Liver": [square(2)], "Spleen": [("POINT", square(3))], "cord": [square(4)]})
    (tmp_path / "in/t.csv").write_text("scan,labelled_organs\np1__ct,liver spleen\n")
    config = PrepareConfig(
        source=str(tmp_path / "in"), store=str(tmp_path / "s"), labels={"names": NAMES, "table": "t.csv"}
    )
    for _ in range(2):
        prepare.run(config)
        assert labelled(tmp_path) == {"p1__ct": (1,)}
