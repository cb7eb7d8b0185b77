"""prepare: which scans and labels of a folder, a table or a recipe become part of a store."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import ct_series, save
from preparing import counts, ct_array, go, label_array, put, records, tree

from pgl_ray import prepare
from pgl_ray.config import LabelsConfig, PrepareConfig, load
from pgl_ray.convert import finish
from pgl_ray.data import scan_files, store
from pgl_ray.files import ct
from pgl_ray.files.layout import read_layout

# -- layouts ----------------------------------------------------------------------------------------------------------


def test_nnunet_folder(tmp_path, serial):
    raw = tmp_path / "Dataset001"
    for place, scan_id in enumerate("ab"):
        put(raw / f"imagesTr/{scan_id}_0000.nii.gz", seed=place)
        put(raw / f"labelsTr/{scan_id}.nii.gz", label_array())
    put(raw / "imagesTs/c_0000.nii.gz", seed=2)
    put(raw / "imagesTs/d_0000.nii.gz", seed=3)
    put(raw / "labelsTs/d.nii.gz", label_array([2]))
    (raw / "imagesTr/._a_0000.nii.gz").write_text("macOS")
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2}}))
    result = go(raw, tmp_path / "s")
    assert counts(result) == (4, 0, 0) and result.num_scans == 4
    index = store.read_index(tmp_path / "s")
    assert index.labels == {"liver": 1, "tumour": 2}
    assert [(r.scan_id, r.split, r.labelled) for r in index.scans] == [
        ("a", "train", (1, 2)),
        ("b", "train", (1, 2)),
        ("imagesTs__c", "test", ()),
        ("imagesTs__d", "test", (1, 2)),
    ]
    assert [r.scan_id for r in index.labelled("test")] == ["imagesTs__d"] and set(index.scans[3].label_voxels) == {2}
    whole = np.array([(0, s) for s in index.scans[1].shape])
    scan = ct.read_scan(raw / "imagesTr/b_0000.nii.gz")
    np.testing.assert_array_equal(scan_files.open_volume(tmp_path / "s", index.scans[1]).read(whole), scan.voxels)
    label = ct.read_label(raw / "labelsTr/b.nii.gz", scan)
    np.testing.assert_array_equal(scan_files.open_label(tmp_path / "s", index.scans[1]).read(whole), label)
    np.testing.assert_array_equal(np.reshape(index.scans[1].affine, (4, 4)), scan.affine)
    assert not (tmp_path / "s/.part").exists() and (tmp_path / "s/failed.jsonl").read_text() == ""


def test_msd_folder_without_channel_suffix(tmp_path, serial):
    for scan_id in ("case_0000", "case_0001"):  # numbers, not nnU-Net's channels
        put(tmp_path / f"Task09/imagesTr/{scan_id}.nii.gz")
        put(tmp_path / f"Task09/labelsTr/{scan_id}.nii.gz", label_array([1]))
    (tmp_path / "Task09/dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "spleen"}}))
    go(tmp_path / "Task09", tmp_path / "s")
    index = store.read_index(tmp_path / "s")
    assert index.labels == {"spleen": 1} and [r.scan_id for r in index.labelled("train")] == ["case_0000", "case_0001"]


def test_flat_folder_of_mha_and_nrrd(tmp_path, serial):
    raw = tmp_path / "raw"
    for place, name in enumerate(["a.mha", "b.nrrd", "deep/c.mhd", "deep/er/d.nhdr", "e.NII.GZ", ".hidden/f.mha"]):
        put(raw / name.replace("NII.GZ", "nii.gz"), seed=place)
    (raw / "e.nii.gz").rename(raw / "e.NII.GZ")
    (raw / "notes.txt").write_text("no volume")
    assert counts(go(raw, tmp_path / "s")) == (5, 0, 0)
    by_id = records(tmp_path / "s")
    assert list(by_id) == ["a", "b", "deep__c", "deep__er__d", "e"] and {r.split for r in by_id.values()} == {""}
    with (raw / "deep/c.raw").open("r+b") as file:  # the data of a detached header count as its source
        file.write(b"\x01\x02")
    assert counts(go(raw, tmp_path / "s")) == (1, 4, 0)
    assert records(tmp_path / "s")["deep__c"].content_hash != by_id["deep__c"].content_hash


def test_a_label_belongs_by_its_path_or_by_its_name(tmp_path, serial):
    raw = tmp_path / "raw"
    for name in ("p1/ct", "p2/ct", "p2/other"):
        put(raw / f"images/{name}.nii.gz")
    put(raw / "labels/p2/ct.nii.gz", label_array([1]))
    put(raw / "labels/other.nii.gz", label_array([1]))
    put(raw / "labels/ct.nii.gz", label_array([1]))  # of which ct?
    assert [fault.source for fault in go(raw, tmp_path / "s").failed] == [str(raw / "labels/ct.nii.gz")]
    by_id = records(tmp_path / "s")
    assert {i: r.label_metadata is not None for i, r in by_id.items()} == {
        "p1__ct": False,
        "p2__ct": True,
        "p2__other": True,
    }


def test_nothing_to_convert_is_wrong_use(tmp_path, serial):
    with pytest.raises(ValueError, match="no such folder"):
        go(tmp_path / "raw", tmp_path / "s")
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match=r"no volume in it \(.nii.gz, .nii, .nrrd"):
        go(tmp_path / "raw", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_dicom_next_to_nifti(tmp_path, serial, capsys):
    raw = tmp_path / "röntgen 1"
    pixels = ct_array(shape=(9, 20, 18))
    pixels[0, 0, :3] = -2000
    files = ct_series(pixels, intercept=0)
    save(files, raw / "images/case 1", "{:03}")
    scout = ct_series(pixels[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save(scout, raw / "images/case 1", "scout{}")
    save(ct_series(pixels[:3], step=(0, 1, 2.5)), raw / "images/tilted")
    put(raw / "images/case 2.nii.gz")
    scan = ct.read_scan(raw / "images/case 1", tuple(f"{k:03}" for k in range(9)))
    label = label_array([1, 2], shape=(18, 20, 9))
    ct.write_label(
        tmp_path / "l.nii.gz", label.transpose(2, 1, 0), raw / "images/case 1", tuple(f"{k:03}" for k in range(9))
    )
    (raw / "labels").mkdir()
    turned = nib.as_closest_canonical(nib.load(tmp_path / "l.nii.gz"))  # the same grid, another orientation
    nib.save(turned, raw / "labels/case 1.nii.gz")
    result = go(raw, tmp_path / "s", labels={"names": {"liver": 1, "spleen": 2}})
    assert counts(result) == (2, 0, 1) and "gantry tilt" in result.failed[0].reason
    by_id = records(tmp_path / "s")
    series, other = by_id
    assert series.startswith("case 1__series2-") and other == "case 2"
    assert by_id[series].label_voxels == {1: 72, 2: 72}
    assert (by_id[series].num_padding, by_id[series].orientation) == (3, "LPS")
    whole = np.array([(0, size) for size in scan.voxels.shape])
    np.testing.assert_array_equal(
        scan_files.open_label(tmp_path / "s", by_id[series]).read(whole), label.transpose(2, 1, 0)
    )
    np.testing.assert_array_equal(
        scan_files.open_volume(tmp_path / "s", by_id[series]).read(whole), np.maximum(pixels, -1024)
    )
    (left,) = [json.loads(line) for line in (tmp_path / "s/left_out.jsonl").read_text().splitlines()]
    assert left["reason"] == "localiser, not a volume"
    prepare.describe(replace(result, failed=()))
    assert "prepare: 1 file not used:\nprepare:   1: localiser, not a volume: " in capsys.readouterr().out

    assert counts(go(raw, tmp_path / "s", labels={"names": {"liver": 1, "spleen": 2}})) == (0, 2, 1)
    (raw / "images/case 1/004").unlink()  # the slice in the middle
    again = go(raw, tmp_path / "s", labels={"names": {"liver": 1, "spleen": 2}})
    assert counts(again) == (0, 1, 2) and "1 slice is missing, between" in again.failed[0].reason


def test_a_series_that_vanished_from_its_folder_is_reported(tmp_path, serial):
    for number in (2, 3):
        save(ct_series(ct_array(number), intercept=0, SeriesNumber=number), tmp_path / "raw/p", f"{number}_{{}}")
    assert go(tmp_path / "raw", tmp_path / "s").vanished == ()
    two, three = records(tmp_path / "s")
    assert two.startswith("p__series2-") and three.startswith("p__series3-")
    for path in (tmp_path / "raw/p").glob("3_*"):
        path.unlink()
    assert go(tmp_path / "raw", tmp_path / "s").vanished == (three,)


def test_a_recipes_licence_and_split_are_stored(tmp_path, serial, capsys):
    for number in range(1, 5):
        put(tmp_path / f"RawData/Training/img/img000{number}.nii.gz", seed=number)
        put(tmp_path / f"RawData/Training/label/label000{number}.nii.gz", label_array([1, 13]))
    recipe = Path(__file__).parents[1] / "data_prep/bcv.yaml"
    args = [str(recipe), f"source={tmp_path}", f"store={tmp_path}/s", "recipe.split_sizes={train: 1, test: 3}"]
    assert counts(prepare.run(load(PrepareConfig, args))) == (4, 0, 0)
    assert "prepare: missing: 4 of 30 scans **/img/img{id}.nii.gz found (0005, 0006, " in capsys.readouterr().out
    by_id = records(tmp_path / "s")
    assert list(by_id) == [f"bcv_000{number}" for number in range(1, 5)]
    assert sorted(record.split for record in by_id.values()) == ["test", "test", "test", "train"]
    assert by_id["bcv_0001"].labelled == tuple(range(1, 14))
    assert "Synapse's terms" in (tmp_path / "s/store.json").read_text()
    put(tmp_path / "RawData/Training/label/label0002.nii.gz", label_array([14]))
    (fault,) = prepare.run(load(PrepareConfig, args)).failed
    assert "label values [14] are not among {'spleen': 1" in fault.reason


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"modality": {"0": "CT"}, "training": [{"image": "./imagesTr/a.nii.gz"}, {"image": "./imagesTr/b.nii.gz"}]},
            "1 of 2 volumes of imagesTr that dataset.json lists: b",
        ),
        ({"channel_names": {"0": "CT"}, "numTraining": 3}, "2 of 3 volumes of imagesTr that dataset.json counts"),
        ({"test": ["./imagesTs/x.nii.gz"]}, "1 of 1 volumes of imagesTs that dataset.json lists: x"),
        ({"training": [{"image": "imagesTr/a.nii.gz"}], "numTest": 0}, ""),
    ],
)
def test_volumes_that_dataset_json_names_are_looked_for(tmp_path, stated, message):
    put(tmp_path / "imagesTr/a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"liver": 1, "ignore": 2}} | stated))
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert message in " ".join(layout.missing) and bool(layout.missing) == bool(message)
    assert layout.names == {"liver": 1}


@pytest.mark.parametrize("name", ["a.nrrd", "a_0000.mha", "a.1.NII.GZ", "M\u00fcller.nii", "Mu\u0308ller.nii.gz"])
@pytest.mark.parametrize("listed", ["./imagesTr/{}", "imagesTr\\{}", "{}"])
def test_volumes_that_are_there_are_not_missing(tmp_path, name, listed):
    put(tmp_path / f"imagesTr/{name.replace('NII.GZ', 'nii.gz')}")
    composed = name.replace("u\u0308", "\u00fc").replace("_0000", "")
    content = {"labels": {"liver": 1}, "training": [{"image": listed.format(composed)}]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_layout(str(tmp_path), LabelsConfig()).missing == []


@pytest.mark.parametrize("channels", [{"0": "MRI"}, {"0": "CT", "1": "PET"}, {"0": "T1"}])
def test_data_sets_that_are_no_ct_are_wrong_use(tmp_path, channels):
    put(tmp_path / "imagesTr/a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}, "channel_names": channels}))
    with pytest.raises(ValueError, match=r"dataset.json: its volumes are .*, expected CT alone"):
        read_layout(str(tmp_path), LabelsConfig())


# -- labels -----------------------------------------------------------------------------------------------------------


def with_table(tmp_path, rows, header=("patient", "split", "labelled_organs")):
    raw = tmp_path / "raw"
    for scan_id in "abc":
        put(raw / f"images/{scan_id}.nii.gz")
        put(raw / f"labels/{scan_id}.nii.gz", label_array([1, 2]))
    with (raw / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return raw, {"names": {"liver": 1, "spleen": 2, "aorta": 3}, "table": "t.csv"}


def test_table_gives_splits_and_labelled_organs(tmp_path, serial):
    raw, labels = with_table(tmp_path, [("a", "train", "liver"), ("b", "test", "spleen aorta"), ("x", "test", "")])
    result = go(raw, tmp_path / "s", labels=labels)
    assert [(f.source[-8:], f.reason) for f in result.failed] == [
        ("c.nii.gz", "has a label map but no row 'c' in t.csv")
    ]
    by_id = records(tmp_path / "s")
    assert {i: (r.split, r.labelled) for i, r in by_id.items()} == {"a": ("train", (1,)), "b": ("test", (2, 3))}

    with_table(tmp_path, [("a", "", ""), ("b", "test", "spleen"), ("c", "train", "liver")])  # it says otherwise now
    assert counts(go(raw, tmp_path / "s", labels=labels)) == (1, 2, 0)
    after = records(tmp_path / "s")
    assert {i: (r.split, r.labelled) for i, r in after.items()} == {
        "a": ("", ()),
        "b": ("test", (2,)),
        "c": ("train", (1,)),
    }


def test_table_without_splits_keeps_the_layouts(tmp_path, serial):
    raw, labels = with_table(tmp_path, [("a", "liver")], header=("id", "labelled_organs"))
    go(raw, tmp_path / "s", labels=labels)
    assert records(tmp_path / "s")["a"].split == "train"


@pytest.mark.parametrize("names", [{"liver": 1, "spleen": 2}, {"a": 1, "b": 2}, {}])
@pytest.mark.parametrize("table", [None, "t.csv"])
def test_a_segment_that_is_not_drawn_is_unlabelled(tmp_path, serial, names, table):
    organs = list(names) or ["label_1", "label_2"]
    for scan_id, drawn in (("a", [1, 2]), ("b", [1]), ("c", [])):
        put(tmp_path / f"raw/images/{scan_id}.nrrd")
        image = sitk.GetImageFromArray(label_array(drawn))
        for key, segment in enumerate(drawn or [1]):
            image.SetMetaData(f"Segment{key}_Name", ("liver", "spleen")[segment - 1])
            image.SetMetaData(f"Segment{key}_LabelValue", str(segment))
        (tmp_path / "raw/labels").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / f"raw/labels/{scan_id}.seg.nrrd"))
    rows = [f"{scan_id},train,{' '.join(organs if names else [])}" for scan_id in "abc"]
    (tmp_path / "raw/t.csv").write_text("\n".join(["scan_id,split,labelled_organs", *rows]))
    labels, right = {"names": names, "table": table}, {"a": (1, 2), "b": (1,), "c": ()}
    if table and not names:
        right = dict.fromkeys(right, ())
    go(tmp_path / "raw", tmp_path / "s", labels=labels)
    assert {one.scan_id: one.labelled for one in records(tmp_path / "s").values()} == right
    store.update_record(tmp_path / "s", replace(records(tmp_path / "s")["b"], labelled=(1, 2)))  # of an older version
    assert counts(go(tmp_path / "raw", tmp_path / "s", labels=labels)) == (0, 3, 0)
    assert {one.scan_id: one.labelled for one in records(tmp_path / "s").values()} == right


@pytest.mark.parametrize(
    "rows, labels, message",
    [
        ([("a", "train", "liver kidney")], {}, "organ 'kidney' is none of"),
        ([], {"table": "none.csv"}, "none.csv is not there"),
        ([], {"names": {"liver": 1, "spleen": 1}}, "two organs have one value"),
    ],
)
def test_bad_table_or_names_are_wrong_use(tmp_path, serial, rows, labels, message):
    raw, good = with_table(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        go(raw, tmp_path / "s", labels=good | labels)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"labels": {"whole": [1, 2]}}', '{"labels": 3}'])
def test_bad_dataset_json_is_wrong_use(tmp_path, serial, content):
    put(tmp_path / "raw/imagesTr/a.nii.gz")
    put(tmp_path / "raw/labelsTr/a.nii.gz", label_array())
    (tmp_path / "raw/dataset.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"dataset.json: (no label map name -> value|cannot be read|regions).*(labels.names=|mend or remove it)",
    ):
        go(tmp_path / "raw", tmp_path / "s")


@pytest.mark.parametrize("stated", ["{}", '{"labels": {"whole": [1, 2]}}', '{"labels": 3}'])
def test_images_alone_need_no_names_in_dataset_json(tmp_path, serial, stated):
    put(tmp_path / "raw/imagesTr/a.nii.gz")
    (tmp_path / "raw/dataset.json").write_text(stated)
    with pytest.raises(ValueError, match=r"no scan has a label: .*, or leave labels.names out$"):
        go(tmp_path / "raw", tmp_path / "s", labels={"names": {"liver": 1}})
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (1, 0, 0)


@pytest.mark.parametrize(
    "folder, reason",
    [("", r"Labels/ct.nii.gz: beside images/, where"), ("p1/", "labels/ct.nii.gz: labels of one of several data sets")],
)
def test_labels_in_another_place_are_named(tmp_path, serial, folder, reason):
    put(tmp_path / f"raw/{folder}images/ct.nii.gz")
    put(tmp_path / f"raw/p2/{folder}images/ct.nii.gz" if folder else tmp_path / "raw/images/b.nii.gz")
    put(tmp_path / f"raw/{folder}{'labels' if folder else 'Labels'}/ct.nii.gz", label_array())
    with pytest.raises(ValueError, match=rf"no scan has a label: .* beside images/ .*; not used: .*/{folder}{reason}"):
        go(tmp_path / "raw", tmp_path / "s", labels={"names": {"liver": 1}})


@pytest.mark.parametrize("ignored", [{"ignore": 3}, {"ignore": [3]}, {"3": "ignore"}, {"whole": [1, 2], "ignore": 3}])
@pytest.mark.parametrize("more", [{}, {"three": 3}])
def test_what_nobody_annotated_is_no_organ(tmp_path, serial, ignored, more):
    put(tmp_path / "raw/imagesTr/a.nii.gz")
    put(tmp_path / "raw/labelsTr/a.nii.gz", label_array([1, 2, 3]))
    put(tmp_path / "raw/imagesTr/b.nii.gz", seed=1)
    put(tmp_path / "raw/labelsTr/b.nii.gz", label_array([1, 2]))
    (tmp_path / "raw/dataset.json").write_text(json.dumps({"labels": {"background": 0, "core": 2} | ignored}))
    result = go(tmp_path / "raw", tmp_path / "s", labels={"names": {"whole_1": 1, "core": 2} | more})
    assert ["marked as not annotated (dataset.json's ignore, 3)" in fault.reason for fault in result.failed] == [True]
    assert list(records(tmp_path / "s")) == ["b"]


@pytest.mark.parametrize("folder", ["images", "imagesTr", "imagesTs"])
@pytest.mark.parametrize("with_label", [True, False])
def test_what_should_be_a_scan_and_is_a_mask_fails(tmp_path, serial, folder, with_label):
    """All zeros as of a failed copy, or a label map in the wrong place: not "taken along" beside the others."""
    wrong = {"good": None, "zero": np.zeros((20, 18, 9), np.int16), "mask": label_array([1]).astype(np.int16)}
    for name, array in wrong.items():
        put(tmp_path / f"raw/{folder}/{name}.nii.gz", array)
        if with_label:
            put(tmp_path / f"raw/{folder.replace('images', 'labels')}/{name}.nii.gz", label_array([1]))
    result = go(tmp_path / "raw", tmp_path / "s")
    assert counts(result) == (1, 0, 2)
    assert sorted(Path(fault.source).name for fault in result.failed) == ["mask.nii.gz", "zero.nii.gz"]


def test_labels_without_names_are_named_by_their_values(tmp_path, serial, monkeypatch):
    for scan_id, values in (("a", [1, 7]), ("b", [3])):
        put(tmp_path / f"one/images/{scan_id}.nii.gz")
        put(tmp_path / f"one/labels/{scan_id}.nii.gz", label_array(values))
    go(tmp_path / "one", tmp_path / "s")
    assert store.read_index(tmp_path / "s").labels == {"label_1": 1, "label_3": 3, "label_7": 7}
    assert {r.labelled for r in records(tmp_path / "s").values()} == {(1, 3, 7)}
    put(tmp_path / "two/images/c.nii.gz", seed=1)
    put(tmp_path / "two/labels/c.nii.gz", label_array([2]))
    assert counts(go(tmp_path / "two", tmp_path / "s")) == (1, 0, 0)
    # another folder's organ is unlabelled in these, not absent
    assert {r.labelled for r in records(tmp_path / "s").values()} == {(1, 3, 7), (2,)}
    before = tree(tmp_path / "s")
    assert counts(go(tmp_path / "one", tmp_path / "s")) == (0, 2, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "finish_store", lambda *_: signal.raise_signal(signal.SIGINT))
        go(tmp_path / "one", tmp_path / "s")
    assert tree(tmp_path / "s") == before  # an interrupted run takes nothing away
