"""Ids of scans: one per place, the same whatever else lies there; and a store that follows its sources."""

import itertools
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dicom_files import ct_series, save
from preparing import ct_array, flip, go, label_array, put, records

from pgl_ray import prepare
from pgl_ray.config import LabelsConfig, StoreConfig
from pgl_ray.files import identity
from pgl_ray.files.layout import read_layout


def ids(root):
    return {scan.scan_id: scan.image for scan in read_layout(str(root), LabelsConfig()).scans}


def touch(root, *names):
    for name in names:
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_no_two_paths_have_one_id():
    letters = "a_="
    names = ["".join(one) for size in (1, 2, 3) for one in itertools.product(letters, repeat=size)]
    paths = [(one,) for one in names] + list(itertools.product(names, repeat=2))
    paths += list(itertools.product(names[:12], repeat=3))
    assert len({identity.scan_id(path) for path in paths}) == len(set(paths))


@pytest.mark.parametrize(
    "parts, scan_id",
    [
        (("pt_201",), "pt_201"),
        (("p1", "ct"), "p1__ct"),
        (("a__b",), "a_=_b"),
        (("a_", "_b"), "a_=__=_b"),
        (("_a_",), "_a_"),
        ((unicodedata.normalize("NFD", "Müller"),), "Müller"),
    ],
)
def test_ids_are_readable(parts, scan_id):
    assert identity.scan_id(parts) == scan_id


def test_long_paths_are_shortened_and_stay_apart():
    long = [("ü" * 100, "b" * 100, str(k)) for k in range(50)]
    short = {identity.scan_id(parts) for parts in long}
    assert len(short) == 50 and max(len(one.encode()) for one in short) <= identity.LONGEST_ID
    marked = identity.scan_id(("a" * 300, "series3-0a2cca"))
    assert identity.series_mark(marked) == "0a2cca" and len(marked) <= identity.LONGEST_ID


GROWING = ["p1/ct", "p2/ct", "deep/er/ct", "a__b", "a/b", "x/b", "ct", "p1/other"]


@pytest.mark.parametrize("root", ["", "images/"])
def test_an_id_stays_when_the_folder_grows(tmp_path, root):
    known = {}
    for name in GROWING:
        touch(tmp_path, root + name)
        now = ids(tmp_path)
        assert known.items() <= now.items() and len(now) == len(known) + 1
        known = now


def test_nnunet_folders_of_training_test_and_validation(tmp_path):
    known = {}
    for folder in ("imagesTs", "imagesTr", "imagesVa"):
        touch(tmp_path, f"{folder}/a_0000", f"{folder}/b_0000")
        now = ids(tmp_path)
        assert known.items() <= now.items() and len(now) == len(known) + 2
        known = now
    assert {"a", "imagesTs__a", "imagesVa__b"} <= known.keys()


def series(seed=0, **tags):
    return ct_series(ct_array(seed, (6, 8, 9)), intercept=0, **tags)


def test_a_series_keeps_its_id_when_others_come(tmp_path):
    save(series(PatientID="1"), tmp_path / "p", "a{}")
    first = set(ids(tmp_path))
    save(series(1, PatientID="1"), tmp_path / "p", "b{}")
    save(series(2, PatientID="2"), tmp_path / "q")
    assert first < set(ids(tmp_path)) and len(ids(tmp_path)) == 3


PATIENTS = {
    "one UID for two patients": ({"PatientID": "1", "series": "1.2.3"}, {"PatientID": "2", "series": "1.2.3"}),
    "names where numbers are blank": ({"PatientName": "A", "series": "1.2.3"}, {"PatientName": "B", "series": "1.2.3"}),
    "frames of reference": (
        {"FrameOfReferenceUID": "1.1", "series": "1.2"},
        {"FrameOfReferenceUID": "1.3", "series": "1.2"},
    ),
    "nothing but folders": ({"SeriesInstanceUID": ""}, {"SeriesInstanceUID": ""}),
    "one UID, no patient": ({"series": "1.2.3"}, {"series": "1.2.3"}),
}


@pytest.mark.parametrize("tags", PATIENTS.values(), ids=PATIENTS)
@pytest.mark.parametrize("further", [0, 15])  # at the same places, or where the other ends
def test_two_patients_are_never_one_volume(tmp_path, tags, further):
    for seed, one in enumerate(tags):
        save(series(seed, origin=(0, 0, further * seed), **one), tmp_path / "ab"[seed])
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert len(layout.scans) == 2
    for seed, scan in enumerate(layout.scans):
        assert Path(scan.image).name == "ab"[seed]
        np.testing.assert_array_equal(scan.read({}).scan.voxels, ct_array(seed, (6, 8, 9)))


def test_a_frame_of_reference_per_slice_says_nothing(tmp_path):
    files = series(0, PatientID="1", series="1.2.3")
    for k, file in enumerate(files):
        file.FrameOfReferenceUID = f"1.7.{k}"
    save(files, tmp_path)
    assert [len(scan.slices) for scan in read_layout(str(tmp_path), LabelsConfig()).scans] == [6]


def test_two_patients_in_one_folder(tmp_path):
    save(series(0, PatientID="1", series="1.2.3"), tmp_path, "a{}")
    save(series(1, PatientID="2", series="1.2.3"), tmp_path, "b{}")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [len(scan.slices) for scan in layout.scans] == [6, 6]
    assert all("another patient's" in text for scan in layout.scans for _, text in scan.notes)


# -- stores -----------------------------------------------------------------------------------------------------------


def renamed_ids(monkeypatch):
    """Ids as an older version gave them: names only."""
    monkeypatch.setattr(identity, "scan_id", lambda parts: parts[-1])


def test_a_scan_whose_id_changes_is_renamed(tmp_path, serial, monkeypatch, capsys):
    put(tmp_path / "raw/p1/ct.nii.gz")
    with monkeypatch.context() as patch:
        renamed_ids(patch)
        go(tmp_path / "raw", tmp_path / "s")
    assert list(records(tmp_path / "s")) == ["ct"]
    put(tmp_path / "raw/p3/ct.nii.gz", seed=1)
    put(tmp_path / "raw/ct.nii.gz", seed=2)  # takes the old one's name
    assert go(tmp_path / "raw", tmp_path / "s").failed == ()
    assert "prepare: renamed: ct -> p1__ct" in capsys.readouterr().out
    by_id = records(tmp_path / "s")
    assert list(by_id) == ["ct", "p1__ct", "p3__ct"] == sorted(os.listdir(tmp_path / "s/scans"))
    assert {Path(one.source).relative_to(tmp_path / "raw").as_posix() for one in by_id.values()} == {
        "ct.nii.gz",
        "p1/ct.nii.gz",
        "p3/ct.nii.gz",
    }
    assert "renamed" not in capsys.readouterr().out


def test_a_series_of_an_older_store_is_renamed(tmp_path, serial, monkeypatch, capsys):
    save(series(SeriesNumber=3), tmp_path / "raw/p")
    with monkeypatch.context() as patch:
        patch.setattr(identity, "series_part", lambda *_: "old")
        go(tmp_path / "raw", tmp_path / "s")
    assert list(records(tmp_path / "s")) == ["p__old"]
    go(tmp_path / "raw", tmp_path / "s")
    (scan_id,) = records(tmp_path / "s")
    assert f"renamed: p__old -> {scan_id}" in capsys.readouterr().out


FOLDERS_OF_ONE_MARK = {
    "one UID": ({"series": "1.2.3"}, ["p", "p/smooth"]),
    "no UID": ({"SeriesInstanceUID": ""}, ["", "b", "c"]),
}


@pytest.mark.parametrize("loss", ["nothing", "cut off", "all cut off", "gone"])
@pytest.mark.parametrize("tags, folders", FOLDERS_OF_ONE_MARK.values(), ids=FOLDERS_OF_ONE_MARK)
def test_series_of_one_mark_stay_apart(tmp_path, serial, capsys, tags, folders, loss):
    for seed, folder in enumerate(folders):
        save(series(seed, **tags), tmp_path / "raw" / folder)
    go(tmp_path / "raw", tmp_path / "s")
    before = records(tmp_path / "s")
    assert len(before) == len(folders)
    for folder in folders:
        files = [path for path in (tmp_path / "raw" / folder).iterdir() if path.is_file()]
        contents = [path.read_bytes() for path in files]
        for path in files[: {"nothing": 0, "cut off": 1}.get(loss)]:
            path.unlink() if loss == "gone" else path.write_bytes(path.read_bytes()[:-40])
        assert go(tmp_path / "raw", tmp_path / "s").converted == 0
        assert records(tmp_path / "s").keys() == before.keys()
        for path, content in zip(files, contents):
            path.write_bytes(content)
    assert "renamed: " not in capsys.readouterr().out


def test_a_series_follows_its_slices(tmp_path, serial):
    files, raw = series(0, series="1.2.3", PatientID="1"), tmp_path / "raw/p"
    save(files[:3], raw / "a")
    for change in (None, lambda: save(files[3:], raw / "b"), lambda: shutil.rmtree(raw / "a")):
        if change:
            change()
        assert go(tmp_path / "raw", tmp_path / "s").converted == 1
        (record,) = records(tmp_path / "s").values()
        assert record.source == os.path.commonpath([path.parent for path in raw.rglob("*.dcm")])


def test_the_same_voxels_in_two_splits_are_said(tmp_path, serial, capsys):
    put(tmp_path / "raw/imagesTr/a.nii.gz")
    put(tmp_path / "raw/imagesTs/b.nrrd.nii.gz")
    put(tmp_path / "raw/imagesTs/c.nii.gz", seed=1)
    go(tmp_path / "raw", tmp_path / "s")
    said = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert said == ["prepare: note: the same voxels, in two splits: a (train), imagesTs__b.nrrd (test)"]


def test_another_source_of_the_same_id(tmp_path, serial, capsys):
    put(tmp_path / "one/imagesTr/a.nii.gz")
    put(tmp_path / "two/a.nii.gz", seed=1)
    put(tmp_path / "three/a.nii.gz")
    go(tmp_path / "one", tmp_path / "s")
    before = records(tmp_path / "s")
    (fault,) = go(tmp_path / "two", tmp_path / "s").failed
    assert f"the store has another 'a', from {tmp_path}/one/imagesTr/a.nii.gz: rename it" in fault.reason
    assert go(tmp_path / "three", tmp_path / "s").failed == () and records(tmp_path / "s") == before
    assert f"holds the same as scan 'a', which the store has from {tmp_path}/one" in capsys.readouterr().out


def test_repair_takes_a_scan_from_its_own_source(tmp_path, serial):
    put(tmp_path / "one/a.nii.gz")
    put(tmp_path / "two/b.nii.gz", seed=1)
    go(tmp_path / "one", tmp_path / "s")
    go(tmp_path / "two", tmp_path / "s")
    put(tmp_path / "two/a.nii.gz", seed=2)  # of the same id, and not what the store has
    whole = records(tmp_path / "s")["a"].content_hash
    flip(tmp_path / "s/scans/a/0/c/0/0/0", 700)
    verified, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    assert not left and records(tmp_path / "s")["a"].content_hash == whole
    flip(tmp_path / "s/scans/a/0/c/0/0/0", 700)
    shutil.rmtree(tmp_path / "one")
    verified, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    assert f"{tmp_path}/one/a.nii.gz, which it was made from, cannot be used: " in left["a"]
    assert list(verified.damaged) == ["a"]


def test_composed_and_decomposed_names_are_one(tmp_path, serial):
    put(tmp_path / "raw/images" / unicodedata.normalize("NFD", "Müller.nii.gz"))
    put(tmp_path / "raw/labels" / unicodedata.normalize("NFC", "Müller.nii.gz"), label_array([1]))
    (scan,) = read_layout(str(tmp_path / "raw"), LabelsConfig()).scans
    assert scan.scan_id == unicodedata.normalize("NFC", "Müller") and scan.label
