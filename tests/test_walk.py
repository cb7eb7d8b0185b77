"""The one walk, and every file accounted for: links, odd names, files that are no CT, what lies next to a data set."""

import gzip
import json
import os
import shutil
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import ct_series, new_file, save
from preparing import ct_array, go, put, records
from test_predict import config, known, volume, write  # noqa: F401 (a fixture)

from pgl_ray import predict, prepare
from pgl_ray.config import FailedRun, LabelsConfig
from pgl_ray.data import store
from pgl_ray.files.accounts import grouped
from pgl_ray.files.layout import read_layout
from pgl_ray.files.walk import walk


def layout_of(root, **labels):
    return read_layout(str(root), LabelsConfig(**labels))


def ids(root):
    return [scan.scan_id for scan in layout_of(root).scans]


def said(root):
    """Path below the root -> why it is not used, of what is left out and of what failed."""
    layout = layout_of(root)
    return {os.path.relpath(path, root): reason for path, reason in (*layout.left_out, *layout.faults)}


def series(seed=0, **tags):
    return ct_series(ct_array(seed, (6, 8, 9)), intercept=0, **tags)


def touch(root, *names, content=b"no CT"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


# -- links and names --------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once_and_never_in_circles(tmp_path):
    root = tmp_path / "in"
    touch(tmp_path, "archive/p2/ct.nii", "archive/p3/deep/ct.nii", "in/p1/ct.nii")
    save(series(), tmp_path / "archive/p4", "IM{}")
    for name, target in {
        "p2": "archive/p2",
        "p3": "archive/p3",
        "p4": "archive/p4",
        "a_p1": "in/p1",  # comes first, and must rename nothing
        "again": "archive/p2",
        "p1/round": "in",
        "p3/up": "archive",
    }.items():
        (root / name).symlink_to(tmp_path / target)
    assert [one.split("__series")[0] for one in ids(root)] == ["again__ct", "p1__ct", "p3__deep__ct", "p4"]
    reasons = said(root)
    assert set(reasons) == {"a_p1", "p2", "p1/round", "p3/up"}
    assert "would never end" in reasons["p3/up"] and f"looked at already: {root}/p1" in reasons["a_p1"]


LINKED = {
    "labels": (["images/a", "segs/a"], {"labels": "segs"}, {"a": "labels"}),
    "both": (["ct/a", "segs/a"], {"images": "ct", "labels": "segs"}, {"ct__a": "labels"}),
    "nnU-Net's": (["ct/a_0000", "segs/a"], {"imagesTr": "ct", "labelsTr": "segs"}, {"a": "labelsTr"}),
    "of a part": (["images/a", "work/old/a"], {"labels": "work/old"}, {"a": "labels"}),
    "images alone": (["ct/a"], {"imagesTr": "ct"}, {"ct__a": None}),
    "all there is": (["ct/a"], {"labels": "ct"}, {"ct__a": None}),
    "elsewhere": (["p/a", "q/a"], {"p/labels": "q"}, {"p__a": None, "q__a": None}),
    "a role already": (["imagesTr/a", "labels/a"], {"labelsTr": "labels"}, {"a": None}),
    "of two": (
        ["imagesTr/a", "imagesTs/b", "labelsTr/a"],
        {"labelsTs": "labelsTr"},
        {"a": "labelsTr", "imagesTs__b": None},
    ),
}


@pytest.mark.parametrize("files, links, labels", LINKED.values(), ids=LINKED)
def test_a_links_name_says_what_lies_in_a_folder(tmp_path, files, links, labels):
    touch(tmp_path, *(f"{name}.nii" for name in files))
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    layout = layout_of(tmp_path)
    assert {one.scan_id: one.label and Path(one.label).parent.name for one in layout.scans} == labels
    unused = {} if None not in labels.values() else {Path(path).name: why for path, why in layout.left_out}
    for name, target in links.items() if unused else ():
        name = Path(name).name
        mend = f"which is looked at there and not as {name}: make {name} a folder, with links to the files in it"
        assert unused[name] == f"a link to {tmp_path}/{target}, {mend}"
        assert any(mend in line for line in grouped(layout.left_out))


def test_names_that_are_no_text_cost_their_own_file(tmp_path, serial, capsys):
    put(tmp_path / "raw/good.nii.gz")
    bad = os.fsencode(tmp_path / "raw") + b"/M\xfcller.nii.gz"
    shutil.copy(tmp_path / "raw/good.nii.gz", bad)
    os.mkdir(os.fsencode(tmp_path / "raw") + b"/\xff")
    result = go(tmp_path / "raw", tmp_path / "s")
    assert list(records(tmp_path / "s")) == ["good"]
    assert [fault.reason for fault in result.failed] == ["its name is not UTF-8: rename it, as convmv does"] * 2
    assert "M\\xfcller.nii.gz" in (tmp_path / "s/failed.jsonl").read_text().replace("\\\\", "\\")
    with pytest.raises(FailedRun, match="2 files failed"):
        prepare.describe(result)
    assert "M\\xfcller" in capsys.readouterr().err


def test_a_very_long_path_is_a_scan(tmp_path, serial):
    put(tmp_path / "raw" / ("ü" * 100) / ("b" * 120) / "ct.nii.gz")
    assert go(tmp_path / "raw", tmp_path / "s").failed == ()
    assert len(records(tmp_path / "s")) == 1


def test_a_store_in_the_source_and_what_a_browser_leaves(tmp_path, serial):
    put(tmp_path / "a.nii.gz")
    go(tmp_path, tmp_path / "s")
    for name in ("s/.DS_Store", "s/scans/.DS_Store", "s/scans/Thumbs.db", "s/scans/a/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    assert go(tmp_path, tmp_path / "s").failed == () and list(records(tmp_path / "s")) == ["a"]
    assert (tmp_path / "s/scans/Thumbs.db").exists() and list(store.read_records(tmp_path / "s")) == ["a"]
    verified = prepare.verify(prepare.StoreConfig(store=str(tmp_path / "s")))
    assert not verified.damaged and not verified.index
    assert said(tmp_path) == {}


def test_what_is_hidden_and_what_is_no_file_is_named(tmp_path):
    put(tmp_path / "a.nii.gz")
    touch(tmp_path, ".trash/IM0001", ".b.nii.gz", "p/.c.dcm", "._a.nii.gz", ".DS_Store", "p/.gitignore")
    os.mkfifo(tmp_path / "p/pipe.dcm")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert ids(tmp_path) == ["a"]
        hidden, other = "hidden, for its name begins with a dot", "a socket, a pipe or a device, no file"
        expected = {".trash": hidden, ".b.nii.gz": hidden, "p/.c.dcm": hidden, "p/pipe.dcm": other, "socket": other}
        assert said(tmp_path) == expected


# -- what a file is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implicit, little", [(True, True), (False, True), (False, False)])
def test_dicom_without_preamble_or_suffix(tmp_path, implicit, little):
    files = series()
    if not little:
        for file in files:
            file.PixelData = np.frombuffer(file.PixelData, "<i2").byteswap().tobytes()
    for k, file in enumerate(files):
        del file.file_meta
        file.preamble = None
        pydicom.dcmwrite(tmp_path / f"IM{k}", file, implicit_vr=implicit, little_endian=little)
    touch(tmp_path, "notes", content=b"\x08\x00 no DICOM, though its first bytes look like it")
    (scan,) = layout_of(tmp_path).scans
    assert len(scan.slices) == 6 and said(tmp_path) == {"notes": "no format of CT"}


@pytest.mark.parametrize("modality, num", [(None, 6), ("", 6), ("CT", 6), ("PT", 0), ("MR", 0)])
def test_a_ct_by_its_class_where_the_modality_is_gone(tmp_path, modality, num):
    files = series()
    for file in files:
        if modality is None:
            del file.Modality
        else:
            file.Modality = modality
    save(files, tmp_path / "a")
    put(tmp_path / "b.nii.gz")
    assert sum(len(scan.slices) for scan in layout_of(tmp_path).scans) == num
    assert len(said(tmp_path)) == 6 - num


def test_gzipped_dicom_and_archives_are_named(tmp_path):
    save(series(), tmp_path / "p", "{}")
    for k in range(6):
        content = (tmp_path / f"p/{k}").read_bytes()
        (tmp_path / f"p/{k}").unlink()
        touch(tmp_path, f"p/{k}.dcm.gz", f"q/{k}.gz", content=gzip.compress(content))
    touch(tmp_path, "all.zip", "x.tar", content=b"PK" * 500)
    touch(tmp_path, "y.tar.gz", content=gzip.compress(bytes(999)))
    put(tmp_path / "b.nii.gz")
    reasons = said(tmp_path)
    for folder in "pq":
        (reason,) = (why for path, why in reasons.items() if path.startswith(f"{folder}/") and "unzip" in why)
        assert "6 files are gzipped DICOM: unzip" in reason
    assert all("an archive: unpack it" in reasons[name] for name in ("all.zip", "x.tar", "y.tar.gz"))


def test_header_and_voxels_in_two_files(tmp_path, serial):
    (tmp_path / "raw").mkdir()
    nib.save(nib.Nifti1Pair(ct_array(), np.diag([-1.5, -1.5, 3, 1])), tmp_path / "raw/a.img")
    touch(tmp_path, "raw/alone.img", content=b"x" * 400)
    assert go(tmp_path / "raw", tmp_path / "s").converted == 1
    record = records(tmp_path / "s")["a"]
    size = sum((tmp_path / f"raw/a.{end}").stat().st_size for end in ("hdr", "img"))
    assert record.source.endswith("raw/a.hdr") and record.source_size == size
    assert said(tmp_path / "raw") == {"alone.img": "voxels without their header (.hdr)"}
    with (tmp_path / "raw/a.img").open("r+b") as file:
        file.write(b"\x01\x02")
    assert go(tmp_path / "raw", tmp_path / "s").converted == 1


def test_suffixes_in_capitals(tmp_path):
    put(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "A.NII.GZ")
    save(series(), tmp_path / "p", "{}.DCM")
    assert [one.split("__series")[0] for one in ids(tmp_path)] == ["A", "p"]


INDEX = "1.2.840.10008.1.3.10"


@pytest.mark.parametrize("cut", [None, 5, 7])
def test_an_index_never_makes_the_slices_next_to_it_faulty(tmp_path, cut):
    save(series(), tmp_path, "IM{}")
    save([new_file(INDEX, "", DirectoryRecordSequence=[])], tmp_path, "DICOMDIR")
    save([new_file("1.2.840.10008.5.1.4.38.1", "")], tmp_path, "hanging.dcm")
    for name in ("DICOMDIR", "hanging.dcm") if cut else ():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-cut] if name == "hanging.dcm" else content[: 140 + cut])
    layout = layout_of(tmp_path)
    assert len(layout.scans) == 1 and not layout.faults
    assert set(said(tmp_path)) == {"DICOMDIR", "hanging.dcm"} and "index" in said(tmp_path)["DICOMDIR"]


# -- series: copies, scouts, damage -----------------------------------------------------------------------------------


def test_copies_of_slices_and_of_series_are_left_out(tmp_path):
    save(series(), tmp_path / "p/original")
    (first,) = ids(tmp_path)
    shutil.copy(tmp_path / "p/original/004.dcm", tmp_path / "p/original/004 (1).dcm")
    assert ids(tmp_path) == [first] and set(said(tmp_path)) == {"p/original/004 (1).dcm"}
    shutil.copytree(tmp_path / "p/original", tmp_path / "p/zz_backup")
    assert ids(tmp_path) == [first] and len(said(tmp_path)) == 8


def test_a_copy_that_sorts_first_renames_nothing_in_a_store(tmp_path, serial):
    save(series(), tmp_path / "raw/p/original")
    go(tmp_path / "raw", tmp_path / "s")
    before = list(records(tmp_path / "s"))
    shutil.copytree(tmp_path / "raw/p/original", tmp_path / "raw/p/a")
    assert go(tmp_path / "raw", tmp_path / "s").failed == () and list(records(tmp_path / "s")) == before


def test_one_slice_of_another_content_under_one_uid_is_no_copy(tmp_path):
    files = series()
    save([*files, files[3]], tmp_path)
    path = tmp_path / "006.dcm"
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x02")
    (scan,) = layout_of(tmp_path).scans
    assert len(scan.slices) == 7
    with pytest.raises(ValueError, match="lie at one position"):
        scan.read({})


SCOUTS = {
    "sagittal": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    "other size": {"Rows": 4, "Columns": 4, "PixelData": bytes(32)},
    "frame of its own": {"FrameOfReferenceUID": "1.9", "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
}


@pytest.mark.parametrize("tags", SCOUTS.values(), ids=SCOUTS)
def test_a_scout_in_a_series_is_left_out(tmp_path, tags):
    files = series(series="1.2.3", FrameOfReferenceUID="1.8")
    scout = series(1, series="1.2.3", FrameOfReferenceUID="1.8")[0]
    for tag, value in tags.items():
        setattr(scout, tag, value)
    save([scout, *files], tmp_path)
    (scan,) = layout_of(tmp_path).scans
    np.testing.assert_array_equal(scan.read({}).scan.voxels, ct_array(0, (6, 8, 9)))
    assert set(said(tmp_path)) == {"000.dcm"} and "scout" in said(tmp_path)["000.dcm"]


def test_two_stacks_of_like_size_are_no_scout(tmp_path):
    across = series(1, series="1.2.3", iop=(1, 0, 0, 0, 0, -1))
    save([*series(series="1.2.3"), *across], tmp_path)
    (scan,) = layout_of(tmp_path).scans
    with pytest.raises(ValueError, match="differ in orientation"):
        scan.read({})


CUTS = {"header": 300, "within a tag": 700, "pixels": -40, "empty": 0}


@pytest.mark.parametrize("name", ["{}.dcm", "IM{}"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_cut_last_slice_is_no_shorter_scan(tmp_path, known, cut, name):  # noqa: F811
    raw = volume()
    save(ct_series(raw, intercept=0), tmp_path / "in/cut", name)
    save(ct_series(raw[::-1], intercept=0), tmp_path / "in/whole", name)
    path = tmp_path / "in/cut" / name.format(len(raw) - 1)
    path.write_bytes(path.read_bytes()[:cut])
    (scan,) = layout_of(tmp_path / "in").scans
    assert scan.scan_id.startswith("whole__")
    with pytest.raises(FailedRun, match="2 of 3 files failed"):
        predict.run(config(tmp_path / "in", tmp_path / "out"))
    assert [one.name.split("__")[0] for one in (tmp_path / "out").glob("*.nii.gz")] == ["whole"]
    with pytest.raises(FailedRun, match=r"2 of 2 files failed: cut"):
        predict.run(config(tmp_path / "in/cut", tmp_path / "out2"))


def test_a_damaged_slice_of_another_series_disturbs_none(tmp_path):
    save(series(series="1.2.3"), tmp_path, "a{}")
    save(series(1, series="1.2.4"), tmp_path, "b{}")
    path = tmp_path / "b5"
    path.write_bytes(path.read_bytes()[:-40])
    layout = layout_of(tmp_path)
    assert [scan.slices[0] for scan in layout.scans] == ["a0"] and len(layout.faults) == 2


# -- two formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["nii", "nrrd", "mha"])
def test_one_ct_in_two_formats_is_one_scan(tmp_path, serial, other):
    import SimpleITK as sitk

    for k in (1, 2, 3):
        put(tmp_path / f"raw/p{k}/ct.nii.gz", seed=k)
    image = sitk.ReadImage(str(tmp_path / "raw/p2/ct.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"raw/p2/ct.{other}"))
    if other == "nii":
        nib.save(nib.load(tmp_path / "raw/p2/ct.nii.gz"), tmp_path / "raw/p2/ct.nii")
    assert ids(tmp_path / "raw") == ["p1__ct", "p2__ct", "p3__ct"] and len(said(tmp_path / "raw")) == 1
    put(tmp_path / "raw/p2/ct.nii.gz", seed=9)
    result = go(tmp_path / "raw", tmp_path / "s")
    assert list(records(tmp_path / "s")) == ["p1__ct", "p3__ct"]
    assert "keep one of them" in result.failed[0].reason and len(result.failed) == 1


# -- what lies next to a data set --------------------------------------------------------------------------------------


def test_folders_next_to_a_data_set(tmp_path):
    for part, names in (("Tr", "ab"), ("Va", "c"), ("Ts", "d")):
        touch(tmp_path, *(f"imagesVa/{n}.nii" if part == "Va" else f"images{part}/{n}.nii" for n in names))
        touch(tmp_path, *(f"labels{part}/{n}.nii" for n in names))
    touch(tmp_path, "unlabelled/e.nii", "labelsTr/a.png", "notes.txt", "imagesTr/readme")
    save(series(), tmp_path / "dicom")
    layout = layout_of(tmp_path)
    assert [(scan.scan_id, scan.split, bool(scan.label)) for scan in layout.scans] == [
        ("a", "train", True),
        ("b", "train", True),
        ("imagesTs__d", "test", True),
        ("imagesVa__c", "validation", True),
    ]
    reasons = said(tmp_path)
    outside = "beside imagesTr/ and imagesVa/ and imagesTs/, where the data set lies: prepare its folder by itself"
    assert {path for path, why in reasons.items() if why == outside} == {
        "unlabelled/e.nii",
        *(f"dicom/{k:03}.dcm" for k in range(6)),
    }
    assert reasons["labelsTr/a.png"] == "in labels/, but no label map (NIfTI, NRRD, MHA, DICOM)"
    assert reasons["notes.txt"] == reasons["imagesTr/readme"] == "no format of CT" and len(reasons) == 10


def test_a_viewers_icons_are_no_data_set(tmp_path):
    touch(tmp_path, "images/logo.png", "viewer/images/x.png", content=b"\x89PNG")
    save(series(), tmp_path / "DICOM", "IM{}")
    assert [one.split("__series")[0] for one in ids(tmp_path)] == ["DICOM"] and len(said(tmp_path)) == 2


def test_another_channel_is_no_scan(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii", "imagesTr/a_0001.nii", "labelsTr/a.nii")
    with pytest.raises(ValueError, match=r"a_0000\.nii and a_0001\.nii are channels of one scan"):
        ids(tmp_path)


@pytest.mark.parametrize("labels, folder", [({"names": {"liver": 1}}, False), ({}, True)])
def test_labels_that_are_asked_for_and_nowhere(tmp_path, serial, labels, folder):
    put(tmp_path / "raw/images/a.nii.gz")
    if folder:
        touch(tmp_path, "raw/labels/a.png")
    with pytest.raises(ValueError, match=r"no scan has a label: label maps are looked for in labels/ beside"):
        go(tmp_path / "raw", tmp_path / "s", labels=labels)


def test_the_lines_on_what_is_not_used(tmp_path):
    touch(tmp_path, *(f"{k}.txt" for k in range(5)), "a.zip")
    put(tmp_path / "x.nii.gz")
    lines = grouped(layout_of(tmp_path).left_out)
    assert lines[0] == "6 files not used:" and lines[1].startswith(f"  5: no format of CT: {tmp_path}/0.txt, ")
    assert lines[1].endswith("2.txt, ...") and len(lines) == 3 and grouped([]) == []


def test_folders_without_permission_are_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.nii", "b.nii")
    scan = os.scandir

    def locked(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert said(tmp_path) == {"a": "the folder cannot be looked at: Permission denied"}


def test_below_agrees_with_a_plain_search(tmp_path):
    touch(tmp_path, "a/x", "a-b/x", "a/b/x", "a.b/x", "ab/x", "a/b.c/x", "x", "b/a/x")
    tree = walk(tmp_path)
    for folder in (tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())):
        expected = sorted(str(path) for path in folder.rglob("*") if path.is_file())
        assert tree.below(folder) == expected
    assert tree.below(tmp_path, [tmp_path / "a"]) == [one for one in tree.paths if f"{tmp_path}/a/" not in one]


# -- predict ----------------------------------------------------------------------------------------------------------


def test_predict_takes_what_prepare_takes(tmp_path, known, capsys):  # noqa: F811
    source, out = tmp_path / "in", tmp_path / "in/out"
    write_in(source, "a.nii.gz", "p1/ct.nii.gz")
    save(ct_series(volume(), intercept=0), source / "p2")
    touch(source, "notes.txt")
    assert predict.run(config(source, out)).num_scans == 3
    taken = {path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz")}
    assert taken == {one for one in ids(source) if not one.startswith("out__")}
    assert "1 file not used:" in capsys.readouterr().out
    assert json.loads((out / "left_out.jsonl").read_text())["reason"] == "no format of CT"
    assert predict.run(config(source, out)).num_finished_before == 3  # its own label maps are no CTs
    assert predict.run(config(source, tmp_path / "in/more")).num_scans == 3


def write_in(source, *names):
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write(source / name)


def test_a_single_slice_means_its_series(tmp_path, known):  # noqa: F811
    raw = volume()
    save(ct_series(raw, intercept=0, series="1.2.3"), tmp_path / "p", "a{}")
    save(ct_series(raw[:, ::-1], intercept=0, series="1.2.4"), tmp_path / "p", "b{}")
    predict.run(config(tmp_path / "p/b3", tmp_path / "one.nii.gz"))
    predict.run(config(tmp_path / "p", tmp_path / "all"))
    maps = [np.asarray(nib.load(path).dataobj) for path in sorted((tmp_path / "all").glob("*.nii.gz"))]
    one = np.asarray(nib.load(tmp_path / "one.nii.gz").dataobj)
    assert sum(np.array_equal(one, other) for other in maps) == 1
    save([new_file("1.2.840.10008.5.1.4.1.1.4", "MR")], tmp_path / "p", "mr.dcm")
    with pytest.raises(ValueError, match=r"input=.*mr.dcm: modality MR, not CT"):
        predict.run(config(tmp_path / "p/mr.dcm", tmp_path / "x.nii.gz"))
    path = tmp_path / "p/b0"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"p/b0: not a readable DICOM file"):
        predict.run(config(tmp_path / "p/b3", tmp_path / "y.nii.gz"))


def test_predict_into_one_file_twice(tmp_path, known):  # noqa: F811
    write_in(tmp_path / "in", "a.nii.gz")
    for before in (0, 1):
        result = predict.run(config(tmp_path / "in", tmp_path / "in/label.nii.gz"))
        assert (result.num_scans, result.num_finished_before) == (1, before)
