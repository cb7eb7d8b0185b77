"""prepare a second time: failures, kills, damage and what is kept; most of it without Ray."""

import csv
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import zarr
from dicom_files import ct_series, save, structure_set
from preparing import counts, ct_array, flip, go, label_array, put, records, tree

from pgl_ray import prepare
from pgl_ray.config import FailedRun, LabelsConfig, PrepareConfig, StoreConfig, load
from pgl_ray.convert import finish, one_scan
from pgl_ray.data import scan_files, store
from pgl_ray.data.place import open_place
from pgl_ray.data.shard import encode_shard
from pgl_ray.files import ct
from pgl_ray.files.layout import read_layout
from pgl_ray.files.source import Source

# -- failures and second runs -----------------------------------------------------------------------------------------


def with_faults(raw):
    """Two good scans and one of each fault."""
    put(raw / "images/good.nii.gz")
    put(raw / "images/labelled.nii.gz", seed=1)
    put(raw / "labels/labelled.nii.gz", label_array([1]))
    put(raw / "images/nan.nii.gz", np.full((4, 4, 4), np.nan, np.float32))
    (raw / "images/text.nii.gz").write_text("hello")
    (raw / "images/lost.nii.gz").symlink_to(raw / "nowhere")
    put(raw / "images/grid.nii.gz")
    put(raw / "labels/grid.nii.gz", label_array([1], shape=(20, 18, 8)))
    put(raw / "images/value.nii.gz")
    put(raw / "labels/value.nii.gz", label_array([1, 9]))
    put(raw / "labels/alone.nii.gz", label_array([1]))


REASONS = {
    "images/nan.nii.gz": "64 of 64 voxels are NaN",
    "images/text.nii.gz": "not a readable image",
    "images/lost.nii.gz": "a link to a file that is not there",
    "images/grid.nii.gz": "label shape (8, 18, 20) differs from its CT's (9, 18, 20)",
    "images/value.nii.gz": "label values [9] are not among {'liver': 1}",
    "labels/alone.nii.gz": "label map without a volume of its name",
}


def check_faults(result, raw, target, capsys):
    assert counts(result) == (2, 0, len(REASONS)) and list(records(target)) == ["good", "labelled"]
    written = [json.loads(line) for line in (target / "failed.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in written] == [tuple(fault) for fault in result.failed]
    assert {row["source"] for row in written} == {str(raw / name) for name in REASONS}
    assert list(result.failed) == sorted(result.failed)
    for row in written:
        assert REASONS[str(Path(row["source"]).relative_to(raw))] in row["reason"]
    with pytest.raises(FailedRun, match=r"6 files failed .*failed.jsonl.* 2 converted, 0 already there"):
        prepare.describe(result)
    assert capsys.readouterr().err.count("failed: ") == len(REASONS)


def test_bad_scans_are_written_down_and_tried_again(tmp_path, serial, capsys):
    raw, labels = tmp_path / "raw", {"names": {"liver": 1}}
    with_faults(raw)
    check_faults(go(raw, tmp_path / "s", labels=labels), raw, tmp_path / "s", capsys)
    put(raw / "images/nan.nii.gz")  # mended
    assert counts(go(raw, tmp_path / "s", labels=labels)) == (1, 2, 5)
    for name in REASONS:
        (raw / name).unlink()
    (raw / "labels/grid.nii.gz").unlink()
    (raw / "labels/value.nii.gz").unlink()
    result = go(raw, tmp_path / "s", labels=labels)
    assert counts(result) == (0, 2, 0) and result.num_scans == 3  # a scan whose file is gone stays
    assert "0 converted, 2 already there, 3 scans in" in prepare.describe(result)
    assert (tmp_path / "s/failed.jsonl").read_text() == ""


def test_a_second_run_changes_nothing_and_only_hashes_a_touch(tmp_path, serial):
    put(tmp_path / "raw/a.nii.gz")
    put(tmp_path / "raw/b.nii.gz", seed=1)
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (2, 0, 0)
    before, inode = tree(tmp_path / "s"), (tmp_path / "s/scans/a/0/c/0/0/0").stat().st_ino
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (0, 2, 0)
    assert tree(tmp_path / "s") == before

    os.utime(tmp_path / "raw/a.nii.gz")
    earlier = records(tmp_path / "s")["a"]
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (0, 2, 0)
    assert (tmp_path / "s/scans/a/0/c/0/0/0").stat().st_ino == inode
    later = records(tmp_path / "s")["a"]
    assert later == replace(earlier, source_mtime_ns=later.source_mtime_ns) != earlier

    put(tmp_path / "raw/a.nii.gz", seed=2)
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (1, 1, 0)
    voxels = ct.read_scan(tmp_path / "raw/a.nii.gz").voxels
    reader = scan_files.open_volume(tmp_path / "s", records(tmp_path / "s")["a"])
    np.testing.assert_array_equal(reader.read(np.array([(0, s) for s in voxels.shape])), voxels)


def test_a_label_that_comes_later_is_taken(tmp_path, serial):
    put(tmp_path / "raw/images/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    assert records(tmp_path / "s")["a"].split == ""
    put(tmp_path / "raw/labels/a.nii.gz", label_array([1]))
    assert counts(go(tmp_path / "raw", tmp_path / "s", labels={"names": {"liver": 1}})) == (1, 0, 0)
    index = store.read_index(tmp_path / "s")
    assert index.labels == {"liver": 1} and index.labelled("train")[0].labelled == (1,)


NAMES = {"liver": 1, "spleen": 2}


def labelled_folder(raw, table="scan_id,split,labelled_organs\na,train,liver\nb,test,liver\n"):
    """Two scans with label maps of two organs, and a table of theirs."""
    for k, name in enumerate("ab"):
        put(raw / f"images/{name}.nii.gz", seed=k)
        put(raw / f"labels/{name}.nii.gz", label_array([1, 2]))
    (raw / "t.csv").write_text(table)


def test_a_table_is_given_again(tmp_path, serial):
    raw, target, named = tmp_path / "raw", tmp_path / "s", {"names": NAMES, "table": "t.csv"}
    labelled_folder(raw)
    go(raw, target, labels=named)
    before = tree(target)
    with pytest.raises(ValueError, match=r"was prepared from source=.*/raw with labels.table=t.csv: give it again or"):
        go(raw, target, labels={"names": NAMES})
    assert tree(target) == before and counts(go(raw, target, labels=named)) == (0, 2, 0)
    labelled_folder(tmp_path / "other")  # of another folder it asks for none
    go(tmp_path / "other", target)


@pytest.mark.parametrize("more", [{}, {"name": "x"}])
def test_a_recipe_is_given_again(tmp_path, serial, more):
    raw, target = tmp_path / "raw", tmp_path / "s"
    labelled_folder(raw)
    part = {"images": "images/{id}.nii.gz", "labels": "labels/{id}.nii.gz"}
    go(raw, target, labels={"names": NAMES}, recipe={"parts": [part], "split_sizes": {"train": 1, "test": 1}} | more)
    before = tree(target)
    with pytest.raises(ValueError, match=r"with recipe.parts of the recipe (x|without a name): give it again"):
        go(raw, target)
    with pytest.raises(ValueError, match=r"with recipe.split_sizes=\{'train': 1, 'test': 1\}: give it again"):
        go(raw, target, recipe={"parts": [part]} | more)
    assert tree(target) == before
    go(raw, target, recipe={"name": "other", "parts": [part | {"ids": ["b"]}]})  # which says what is its own


def test_another_split_of_stored_scans_is_said(tmp_path, serial, capsys):
    raw, target, named = tmp_path / "raw", tmp_path / "s", {"names": NAMES, "table": "t.csv"}
    labelled_folder(raw)
    go(raw, target, labels=named)
    assert "changed: " not in capsys.readouterr().out
    (raw / "t.csv").write_text("scan_id,split,labelled_organs\na,train,liver spleen\nb,train,liver spleen\n")
    go(raw, target, labels=named)
    said = capsys.readouterr().out
    assert "prepare: changed: split test -> train of 1 stored scan: b\n" in said
    assert "prepare: changed: labelled [1] -> [1, 2] of 2 stored scans: a, b\n" in said


def test_a_label_map_that_is_gone_costs_no_label(tmp_path, serial, capsys):
    raw, target = tmp_path / "raw", tmp_path / "s"
    labelled_folder(raw)
    go(raw, target)
    before = tree(target / "scans")
    (raw / "labels").rename(tmp_path / "elsewhere")
    result = go(raw, target)
    assert counts(result) == (0, 2, 0) and result.unlabelled == ("a", "b") and tree(target / "scans") == before
    assert [record.split for record in records(target).values()] == ["train", "train"]
    prepare.describe(result)
    assert "2 scans whose label map is gone stay with it, in their split: a, b\n" in capsys.readouterr().out
    shutil.rmtree(target / "scans/a")  # as it says
    assert counts(go(raw, target)) == (1, 1, 0) and records(target)["a"].label_metadata is None
    (tmp_path / "elsewhere").rename(raw / "labels")
    result = go(raw, target)
    assert counts(result) == (1, 1, 0) and not result.unlabelled and records(target)["a"].label_metadata


TAKEN = "prepare: labels.names is not given: those of the store are taken, "


def test_structures_keep_the_names_that_the_store_has(tmp_path, serial, capsys):
    files = ct_series(np.full((6, 12, 14), 1024, np.uint16), origin=(0, 0, 0), spacing=(1, 1))
    save(files, tmp_path / "raw/ct")
    boxes = [[(2, 3, z), (8, 3, z), (8, 9, z), (2, 9, z)] for z in (2.5, 5, 7.5)]
    save([structure_set({"Liver": boxes, "Couch": boxes}, files[0].SeriesInstanceUID)], tmp_path / "raw/rs")
    go(tmp_path / "raw", tmp_path / "s", labels={"names": {"Liver": 1}})
    before = tree(tmp_path / "s/scans")
    assert TAKEN not in capsys.readouterr().out
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (0, 1, 0)
    assert tree(tmp_path / "s/scans") == before and TAKEN + "{'Liver': 1}" in capsys.readouterr().out
    (tmp_path / "raw").rename(tmp_path / "moved")
    assert counts(go(tmp_path / "moved", tmp_path / "s")) == (0, 1, 0)
    (record,) = records(tmp_path / "s").values()
    assert record.labelled == (1,) and record.label_voxels.keys() == {1}


@pytest.mark.parametrize("named", ["", "store", "folder", "both"])
def test_names_taken_from_the_store_are_said(tmp_path, serial, capsys, named):
    """Of the first folder's labels, and by the second's own dataset.json."""
    for k, folder in enumerate("ab"):
        put(tmp_path / f"{folder}/images/{folder}.nii", seed=k)
        put(tmp_path / f"{folder}/labels/{folder}.nii", label_array([1, 2]))
    names = {"liver": 1, "tumour": 2}
    go(tmp_path / "a", tmp_path / "s", labels={"names": names} if named in ("store", "both") else {})
    if named in ("folder", "both"):
        (tmp_path / "b/dataset.json").write_text(json.dumps({"labels": names}))
    if named == "folder":  # the store's are called by their values
        with pytest.raises(ValueError, match="use another"):
            go(tmp_path / "b", tmp_path / "s")
    else:
        assert counts(go(tmp_path / "b", tmp_path / "s")) == (1, 0, 0)
    assert (f"{TAKEN}{names}" in capsys.readouterr().out) == (named == "store")
    put(tmp_path / "c/c.nii", seed=5)
    go(tmp_path / "c", tmp_path / "s")  # without labels there is nothing to name
    assert TAKEN not in capsys.readouterr().out


def test_names_of_the_store_lose_no_scan(tmp_path, serial):
    """A pool whose structure sets contradict each other, by two readers: nobody asked for its labels."""
    series = {}
    for number, folder in enumerate(("a", "b")):
        files = ct_series(
            np.full((6, 12, 14), 1024, np.uint16), origin=(0, 0, 0), spacing=(1, 1), SeriesNumber=number + 1
        )
        save(files, tmp_path / folder / "ct")
        series[folder] = files[0].SeriesInstanceUID
        for reader in range(1 + number):
            boxes = [[(2 + reader, 3, z), (8, 3, z), (8, 9, z), (2, 9, z)] for z in (2.5, 5, 7.5)]
            save([structure_set({"Liver": boxes}, files[0].SeriesInstanceUID)], tmp_path / f"{folder}/rs{reader}")
    go(tmp_path / "a", tmp_path / "s", labels={"names": {"Liver": 1}})
    asked = go(tmp_path / "b", tmp_path / "asked", labels={"names": {"Liver": 1}})
    assert counts(asked) == (0, 0, 1)  # it must be one of them
    unasked = go(tmp_path / "b", tmp_path / "s")
    assert (
        counts(unasked) == (1, 0, 0) and ["used for no label" in one.reason for one in unasked.left_out] == [True] * 2
    )
    assert sorted(record.labelled for record in records(tmp_path / "s").values()) == [(), (1,)]
    second = [[(4, 3, z), (8, 3, z), (8, 9, z), (4, 9, z)] for z in (2.5, 5, 7.5)]
    save([structure_set({"Liver": second}, series["a"])], tmp_path / "a/second")
    again = go(tmp_path / "a", tmp_path / "s")
    assert counts(again) == (0, 1, 0) and len(again.unlabelled) == 1  # a stored label stays
    assert counts(go(tmp_path / "b", tmp_path / "s")) == (0, 1, 0)
    assert sorted(record.labelled for record in records(tmp_path / "s").values()) == [(), (1,)]


def exchange(one, other):
    """Two files change places as `mv` does it: each keeps its bytes and its time."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("seconds", [0, 60])  # between the files' times: of one archive they may agree
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_labels_that_change_places_are_read_anew(tmp_path, serial, suffix, seconds):
    raw, values = tmp_path / "raw", {"a": [1], "b": [0, 1]}
    for k, (name, inside) in enumerate(values.items()):
        put(raw / f"images/{name}{suffix}", seed=k)
        put(raw / f"labels/{name}{suffix}", label_array(inside))
        os.utime(raw / f"labels/{name}{suffix}", (1e9 + seconds * k,) * 2)
    assert counts(go(raw, tmp_path / "s")) == (2, 0, 0)
    before = {name: record.label_boxes for name, record in records(tmp_path / "s").items()}
    assert before["a"] != before["b"] and counts(go(raw, tmp_path / "s")) == (0, 2, 0)
    exchange(*(raw / f"labels/{name}{suffix}" for name in values))
    assert counts(go(raw, tmp_path / "s")) == (2, 0, 0)
    after = {name: record.label_boxes for name, record in records(tmp_path / "s").items()}
    assert after == {"a": before["b"], "b": before["a"]}
    (raw / f"labels/a{suffix}").chmod(0o600)  # a new time of change, and the same bytes
    assert counts(go(raw, tmp_path / "s")) == (0, 2, 0)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_scans_that_change_places_are_read_anew(tmp_path, serial, suffix):
    """Files of one size and one time, as an archive leaves them."""
    raw = tmp_path / "raw"
    for k, name in enumerate("ab"):
        put(raw / f"{name}{suffix}", seed=k)
        os.utime(raw / f"{name}{suffix}", (1e9, 1e9))
    assert counts(go(raw, tmp_path / "s")) == (2, 0, 0)
    before = {name: record.content_hash for name, record in records(tmp_path / "s").items()}
    exchange(raw / f"a{suffix}", raw / f"b{suffix}")
    assert counts(go(raw, tmp_path / "s")) == (2, 0, 0)
    after = {name: record.content_hash for name, record in records(tmp_path / "s").items()}
    assert after == {"a": before["b"], "b": before["a"]}


def test_slices_that_change_places_are_the_same_scan(tmp_path, serial):
    """Headers that are known by path are read anew, too: each slice stays at its position."""
    raw, pixels = tmp_path / "raw", np.random.default_rng(0).integers(0, 2000, (6, 12, 14)).astype(np.uint16)
    save(ct_series(pixels, origin=(0, 0, 0), spacing=(1, 1)), raw / "ct")
    files = sorted(path for path in (raw / "ct").iterdir())
    for file in files:
        os.utime(file, (1e9, 1e9))
    go(raw, tmp_path / "s")
    (before,) = records(tmp_path / "s").values()
    exchange(files[1], files[4])
    go(raw, tmp_path / "s")
    go(raw, tmp_path / "other")
    (after,), (anew,) = records(tmp_path / "s").values(), records(tmp_path / "other").values()
    assert after.content_hash == anew.content_hash == before.content_hash


MASKS = {"images": "{id}/ct.nii.gz", "labels": "{id}/segmentations/{organ}.nii.gz"}


def test_masks_that_change_places_are_read_anew(tmp_path, serial):
    folder, names = tmp_path / "raw/p/segmentations", {"left": 1, "middle": 2, "right": 3}
    options = {"labels": {"names": names}, "recipe": {"name": "x", "parts": [MASKS]}}
    put(tmp_path / "raw/p/ct.nii.gz")
    boxes = {"left": label_array([1]), "right": label_array([0, 1])}
    for organ, box in boxes.items():
        put(folder / f"{organ}.nii.gz", box)
    go(tmp_path / "raw", tmp_path / "s", **options)

    def voxels():
        (record,) = records(tmp_path / "s").values()
        return record.label_boxes

    before = voxels()
    exchange(folder / "left.nii.gz", folder / "right.nii.gz")
    assert counts(go(tmp_path / "raw", tmp_path / "s", **options)) == (1, 0, 0)
    assert voxels() == {1: before[3], 3: before[1]}
    (folder / "left.nii.gz").rename(folder / "middle.nii.gz")  # the files' order stays
    assert counts(go(tmp_path / "raw", tmp_path / "s", **options)) == (1, 0, 0)
    assert voxels() == {2: before[3], 3: before[1]}


def test_masks_of_an_earlier_version_in_a_moved_folder(tmp_path, serial):
    """Its hashes were of the files alone: converted once more, not refused."""
    options = {"labels": {"names": {"left": 1}}, "recipe": {"name": "x", "parts": [MASKS]}}
    put(tmp_path / "raw/p/ct.nii.gz")
    put(tmp_path / "raw/p/segmentations/left.nii.gz", label_array([1]))
    go(tmp_path / "raw", tmp_path / "s", **options)
    (record,) = records(tmp_path / "s").values()
    files = [tmp_path / "raw/p/ct.nii.gz", tmp_path / "raw/p/segmentations/left.nii.gz"]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    earlier = replace(record, source_hash=hashlib.sha256("".join(digests).encode()).hexdigest())
    store.update_record(tmp_path / "s", earlier)
    (tmp_path / "raw").rename(tmp_path / "moved")
    assert counts(go(tmp_path / "moved", tmp_path / "s", **options)) == (1, 0, 0)
    assert counts(go(tmp_path / "moved", tmp_path / "s", **options)) == (0, 1, 0)
    assert next(iter(records(tmp_path / "s").values())).source == str(tmp_path / "moved/p/ct.nii.gz")


def test_adding_a_folder(tmp_path, serial):
    put(tmp_path / "one/images/a.nii.gz")
    put(tmp_path / "one/labels/a.nii.gz", label_array([1]))
    put(tmp_path / "two/images/b.nii.gz", seed=1)
    names = {"names": {"liver": 1}}
    go(tmp_path / "one", tmp_path / "s", labels=names)
    assert go(tmp_path / "two", tmp_path / "s").num_scans == 2  # without labels there is nothing to name
    assert {i: r.split for i, r in records(tmp_path / "s").items()} == {"a": "train", "b": ""}
    before = tree(tmp_path / "s")
    with pytest.raises(ValueError, match=r"'spleen': 1.*'liver': 1.*use another"):
        go(tmp_path / "two", tmp_path / "s", labels={"names": {"spleen": 1}})
    with pytest.raises(ValueError, match=r"hu_window=\(-100.0, 100.0\): store .* has \(-1024.0, 325.0\)"):
        go(tmp_path / "two", tmp_path / "s", hu_window=(-100, 100))
    assert tree(tmp_path / "s") == before

    put(tmp_path / "three/a.nii.gz", seed=5)
    result = go(tmp_path / "three", tmp_path / "s")
    assert counts(result) == (0, 0, 1) and "the store has another 'a', from" in result.failed[0].reason
    (tmp_path / "one").rename(tmp_path / "moved")
    assert counts(go(tmp_path / "moved", tmp_path / "s")) == (0, 1, 0)
    assert records(tmp_path / "s")["a"].source == str(tmp_path / "moved/images/a.nii.gz")


def test_repair_leaves_the_others_labels_alone(tmp_path, serial):
    """Of segmentations whose organs are each drawn or not, in a store without names."""
    for k, values in enumerate(([1], [2])):
        put(tmp_path / f"raw/images/c{k}.nii.gz", seed=k)
        label = sitk.GetImageFromArray(label_array(values).transpose(2, 1, 0))
        label.CopyInformation(sitk.ReadImage(str(tmp_path / f"raw/images/c{k}.nii.gz")))
        for number, value in enumerate(values):
            label.SetMetaData(f"Segment{number}_ID", f"organ {value}")
            label.SetMetaData(f"Segment{number}_LabelValue", str(value))
        (tmp_path / "raw/labels").mkdir(exist_ok=True)
        sitk.WriteImage(label, str(tmp_path / f"raw/labels/c{k}.seg.nrrd"))
    go(tmp_path / "raw", tmp_path / "s")
    labelled = {name: record.labelled for name, record in records(tmp_path / "s").items()}
    assert labelled == {"c0": (1,), "c1": (2,)}
    put(tmp_path / "two/d.nii.gz", seed=7)
    go(tmp_path / "two", tmp_path / "s")
    flip(tmp_path / "s/scans/c0/0/c/0/0/0", 700)
    _, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    after = {name: record.labelled for name, record in records(tmp_path / "s").items()}
    assert not left and after == {**labelled, "d": ()}


def test_the_store_does_not_depend_on_the_order(tmp_path, serial):
    for place, scan_id in enumerate("abc"):
        put(tmp_path / f"raw/images/{scan_id}.nii.gz", seed=place)
        put(tmp_path / f"raw/labels/{scan_id}.nii.gz", label_array([place + 1]))
    go(tmp_path / "raw", tmp_path / "one")
    serial.append("backwards")
    go(tmp_path / "raw", tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(tmp_path, serial, monkeypatch):
    for place, scan_id in enumerate("abc"):
        put(tmp_path / f"raw/{scan_id}.nii.gz", seed=place)
    real = encode_shard

    def full(array, chunk, compression):
        if len(list((tmp_path / "s/scans").glob("*"))) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(array, chunk, compression)

    with monkeypatch.context() as patch:
        patch.setattr(scan_files, "encode_shard", full)
        with pytest.raises(FailedRun, match=r"disk full at .*/s: free some space, then the same"):
            go(tmp_path / "raw", tmp_path / "s")
    assert list(store.read_records(tmp_path / "s")) == ["a"]
    assert not (tmp_path / "s/.part").exists()
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (2, 1, 0)


def test_a_scan_that_kills_its_worker_is_given_up(tmp_path):
    put(tmp_path / "raw/a.nii.gz")
    task = (Source("a", str(tmp_path / "raw/a.nii.gz"), None, ""), None)
    with store.open_place(tmp_path / "s").locked() as token:
        for start in "123":  # Ray has started it three times
            store.open_place(tmp_path / "s").write(f".part/tries/0/{start}", [])
        row = one_scan.convert({"task": 0, "item": pickle.dumps(task)}, str(tmp_path / "s"), token, {}, {})
    assert row["status"] == "failed" and "its worker died 3 times" in row["reason"]


def test_unforeseen_errors_cost_only_their_scan(tmp_path, serial, monkeypatch):
    put(tmp_path / "raw/a.nii.gz")
    put(tmp_path / "raw/b.nii.gz")
    real = ct.read_scan
    monkeypatch.setattr(ct, "read_scan", lambda path, slices: real(path) if "b.nii" in path else [][0])
    result = go(tmp_path / "raw", tmp_path / "s")
    assert counts(result) == (1, 0, 1) and result.failed[0].reason == "IndexError: list index out of range"


# -- verify and repair ------------------------------------------------------------------------------------------------


def two_folders(tmp_path, target="s"):
    """A store from two folders, each under its own config."""
    for scan_id, seed in (("a", 0), ("b", 1)):
        put(tmp_path / f"one/images/{scan_id}.nii.gz", seed=seed)
        put(tmp_path / f"one/labels/{scan_id}.nii.gz", label_array([1]))
    put(tmp_path / "two/c d ü.nii.gz", seed=2)
    go(tmp_path / "one", tmp_path / target, labels={"names": {"liver": 1}})
    go(tmp_path / "two", tmp_path / target)
    return tmp_path / target


def checked(target):
    return prepare.verify(StoreConfig(store=str(target)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, damage",
    [
        ("scans/a/0/c/0/0/0", lambda path: flip(path, 700)),
        ("scans/c d ü/0/c/0/0/0", lambda path: path.write_bytes(path.read_bytes()[:900])),
        ("scans/b/labels/organs/0/c/0/0/0", lambda path: flip(path, 99)),
        ("scans/a/zarr.json", lambda path: flip(path, 1234)),
        ("scans/b/zarr.json", lambda path: path.unlink()),
        ("scans/b", shutil.rmtree),
        ("scans/b/labels/organs/0/c/0/0/0", lambda path: path.unlink()),
        ("index.parquet", lambda path: flip(path, 2000)),
        ("index.parquet", lambda path: path.unlink()),
        ("chunks.parquet", lambda path: flip(path, 100)),
        ("chunks.parquet", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    ],
)
def test_just_what_is_damaged_is_converted_again(tmp_path, serial, capsys, file, damage):
    target = two_folders(tmp_path)
    whole = tree(target)
    assert "3 scans in" in prepare.describe_verified(checked(target))
    damage(target / file)
    verified, scan_id = checked(target), file.split("/")[1] if "/" in file else None
    assert list(verified.damaged) == ([scan_id] if scan_id else []) and (scan_id or verified.index)
    with pytest.raises(FailedRun, match=r"[01] of 3 scans are damaged.*prepare repair store="):
        prepare.describe_verified(verified)
    assert (f"damaged: scan '{scan_id}'" if scan_id else f"{file} ") in capsys.readouterr().err
    inodes = {name: (target / f"scans/{name}/zarr.json").stat().st_ino for name in {"a", "b", "c d ü"} - {scan_id}}
    verified, left = prepare.repair(StoreConfig(store=str(target)))
    assert not left and tree(target) == whole
    assert inodes == {name: (target / f"scans/{name}/zarr.json").stat().st_ino for name in inodes}
    assert not checked(target).damaged and not checked(target).index
    assert prepare.describe_repaired((verified, left)).startswith("prepare repair: ")


def test_a_damaged_scan_whose_file_is_gone_is_named(tmp_path, serial, capsys):
    target = two_folders(tmp_path)
    flip(target / "scans/c d ü/0/c/0/0/0", 700)
    flip(target / "scans/a/0/c/0/0/0", 700)
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(FailedRun, match="1 of 2 damaged scans could not be converted again"):
        prepare.describe_repaired(prepare.repair(StoreConfig(store=str(target))))
    err = capsys.readouterr().err
    assert "not mended: scan 'c d ü'" in err and "no such folder" in err
    assert list(checked(target).damaged) == ["c d ü"]  # it stays, the other is whole


def test_a_run_that_did_not_end_is_no_damage(tmp_path, serial):
    target = two_folders(tmp_path)
    put(tmp_path / "two/e.nii.gz", seed=9)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish_store", lambda *_: signal.raise_signal(signal.SIGINT))
        go(tmp_path / "two", target)
    verified = checked(target)
    assert not verified.damaged and "prepare did not come to its end" in verified.index
    assert counts(go(tmp_path / "two", target)) == (0, 2, 0) and not checked(target).index


@pytest.mark.parametrize("end", ["killed", "full"])
def test_a_store_with_half_of_the_changes_is_not_read(tmp_path, serial, end):
    """Its index speaks of the voxels before; what is only added leaves it valid."""
    target = two_folders(tmp_path)
    put(tmp_path / "two/e.nii.gz", seed=9)

    def broken_off():
        with pytest.raises((KeyboardInterrupt, FailedRun)), pytest.MonkeyPatch.context() as patch:
            if end == "killed":
                patch.setattr(finish, "finish_store", lambda *_: signal.raise_signal(signal.SIGINT))
            else:
                full = OSError(errno.ENOSPC, "No space left on device")
                patch.setattr(finish, "finish_store", lambda *_: (_ for _ in ()).throw(full))
            go(tmp_path / "two", target)

    broken_off()
    before = records(target)
    put(tmp_path / "two/e.nii.gz", ct_array(8, (20, 18, 7)))
    assert counts(go(tmp_path / "two", target)) == (1, 1, 0)
    put(tmp_path / "two/e.nii.gz", ct_array(8, (20, 18, 5)))
    broken_off()
    with pytest.raises(ValueError, match=r"has no index.parquet: run prepare to its end"):
        store.read_index(target)
    assert "prepare did not come to its end" in checked(target).index
    assert counts(go(tmp_path / "two", target)) == (0, 2, 0)
    after = records(target)
    assert after["e"].shape[0] == 5 and {name: after[name] for name in before} == before
    assert not checked(target).index


def test_a_scan_that_cannot_be_replaced_costs_no_index(tmp_path, serial, monkeypatch):
    """New scans come first, and the disk is full before the changed one is written."""
    target = two_folders(tmp_path)
    before, order = records(target), []
    put(tmp_path / "two/c d ü.nii.gz", seed=8)
    put(tmp_path / "two/e.nii.gz", seed=9)
    encode = scan_files.encode_shard

    def full_at_the_second(*args):
        order.append(args)
        if len(order) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(*args)

    with monkeypatch.context() as patch, pytest.raises(FailedRun, match="disk full"):
        patch.setattr(scan_files, "encode_shard", full_at_the_second)
        go(tmp_path / "two", target)
    assert len(order) == 2 and records(target) == before and (target / "scans/e/zarr.json").exists()
    assert counts(go(tmp_path / "two", target)) == (1, 1, 0)
    assert set(records(target)) == {*before, "e"}


def test_label_maps_of_a_killed_run_are_named(tmp_path, serial, capsys):
    """In a store without names whose next run is another folder's; a table's blank cell leaves the same."""
    for folder, values in (("one", [1, 3]), ("two", [2])):
        put(tmp_path / f"{folder}/images/{folder}.nii.gz", seed=len(values))
        put(tmp_path / f"{folder}/labels/{folder}.nii.gz", label_array(values))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish_store", lambda *_: signal.raise_signal(signal.SIGINT))
        go(tmp_path / "one", tmp_path / "s")
    go(tmp_path / "two", tmp_path / "s")
    assert {name: record.labelled for name, record in records(tmp_path / "s").items()} == {"one": (), "two": (2,)}
    assert "prepare: label maps of 1 scan count for no organ (one): where their prepare" in capsys.readouterr().out
    go(tmp_path / "one", tmp_path / "s")
    assert {name: record.labelled for name, record in records(tmp_path / "s").items()} == {"one": (1, 3), "two": (2,)}
    assert "count for no organ" not in capsys.readouterr().out


def test_a_scan_that_prepare_finds_damaged_is_not_dropped(tmp_path, serial):
    target = two_folders(tmp_path)
    flip(target / "scans/a/zarr.json", 1500)
    failed = go(tmp_path / "two", target).failed
    assert [fault.source for fault in failed] == [f"{target}/scans/a"] and "prepare repair" in failed[0].reason
    assert (target / "scans/a/0/c/0/0/0").exists()
    assert counts(go(tmp_path / "one", target, labels={"names": {"liver": 1}})) == (1, 1, 0)


def test_what_vanished_is_named_and_stays(tmp_path, serial, capsys):
    target = two_folders(tmp_path)
    (tmp_path / "one/images/a.nii.gz").unlink()
    (tmp_path / "one/labels/a.nii.gz").unlink()
    result = go(tmp_path / "one", target, labels={"names": {"liver": 1}})
    assert result.vanished == ("a",) and result.num_scans == 3 and counts(result) == (0, 1, 0)
    prepare.describe(result)
    assert "1 scan stays in the store while its files are gone: a" in capsys.readouterr().out


def test_the_store_says_how_it_was_made(tmp_path, serial):
    target = two_folders(tmp_path)
    said = json.loads((target / "store.json").read_text())
    assert [Path(one["source"]).name for one in said["preparations"]] == ["one", "two"]
    assert said["preparations"][0]["labels"]["names"] == {"liver": 1} and said["encoding"] == "int16"
    assert said["versions"]["zarr"] == zarr.__version__ and said["versions"]["numpy"] == np.__version__
    go(tmp_path / "one", target, recipe={"licence": "CC BY 4.0"}, labels={"names": {"liver": 1}})
    said = json.loads((target / "store.json").read_text())
    assert [one["recipe"]["licence"] for one in said["preparations"]] == ["CC BY 4.0", ""]


def test_a_folder_prepared_in_two_ways_is_said_twice(tmp_path, serial):
    put(tmp_path / "raw/one/a.nii.gz")
    put(tmp_path / "raw/two/b.nii.gz", seed=1)
    named = [{"name": name, "licence": name, "parts": [{"images": f"{name}/{{id}}.nii.gz"}]} for name in ("one", "two")]
    for recipe in (*named, named[0] | {"licence": "CC BY 4.0"}):
        go(tmp_path / "raw", tmp_path / "s", recipe=recipe)
    said = json.loads((tmp_path / "s/store.json").read_text())["preparations"]
    assert [(one["recipe"]["name"], one["recipe"]["licence"]) for one in said] == [("two", "two"), ("one", "CC BY 4.0")]


def test_repair_goes_by_the_newest_preparation(tmp_path, serial):
    """The whole folder without labels, then by a recipe with them; and what has lost its label map is not converted."""
    for name in "ab":
        put(tmp_path / f"raw/img/{name}.nii.gz", seed=ord(name))
        put(tmp_path / f"raw/seg/{name}.nii.gz", label_array([1]))
    go(tmp_path / "raw/img", tmp_path / "s")
    parts = [{"images": "img/{id}.nii.gz", "labels": "seg/{id}.nii.gz"}]
    recipe = {"name": "x", "parts": parts, "split_sizes": {"train": 1, "test": 1}}
    go(tmp_path / "raw", tmp_path / "s", labels={"names": {"liver": 1}}, recipe=recipe)
    before = tree(tmp_path / "s/scans")

    def damage():
        for name in "ab":
            (tmp_path / f"s/scans/{name}/0/c/0/0/0").write_bytes(b"damage")

    damage()
    verified, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    assert len(verified.damaged) == 2 and not left and tree(tmp_path / "s/scans") == before
    (tmp_path / "raw/seg/a.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    damage()
    left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))[1]
    assert left.keys() == {"a"} and "its label map is gone: put it back" in left["a"]
    assert all(record.label_metadata and record.split for record in records(tmp_path / "s").values())
    (tmp_path / "elsewhere.nii.gz").rename(tmp_path / "raw/seg/a.nii.gz")
    assert not prepare.repair(StoreConfig(store=str(tmp_path / "s")))[1]
    voxels = [name for name in before if "/c/" in name]  # zarr.json has the time of the file's last rename
    assert all(tree(tmp_path / "s/scans")[name] == before[name] for name in voxels)


def test_series_of_a_folder_are_preparations_of_their_own(tmp_path, serial):
    for number, name in enumerate(("thin", "thick")):
        files = ct_series(ct_array(number, (6, 12, 14)), intercept=0, SeriesDescription=name, SeriesNumber=number)
        save(files, tmp_path / "raw" / name)
        go(tmp_path / "raw", tmp_path / "s", series=[name])
    said = json.loads((tmp_path / "s/store.json").read_text())["preparations"]
    assert [one["series"] for one in said] == [["thin"], ["thick"]]
    for record in records(tmp_path / "s").values():
        (tmp_path / "s/scans" / record.scan_id / "0/c/0/0/0").write_bytes(b"damage")
    verified, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))  # each as it was prepared
    assert len(verified.damaged) == 2 and not left


@pytest.mark.parametrize("key, value", [("encoding", "uint8"), ("spacing_mm", (3.0, 1.5, 1.5))])
def test_a_store_has_one_encoding_and_one_spacing(tmp_path, serial, key, value):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    with pytest.raises(ValueError, match=f"{key}=.*store .* has .*: use that or another store"):
        go(tmp_path / "raw", tmp_path / "s", **{key: value})
    assert counts(go(tmp_path / "raw", tmp_path / "t", **{key: value})) == (1, 0, 0)
    before = tree(tmp_path / "t")
    assert counts(go(tmp_path / "raw", tmp_path / "t", **{key: value})) == (0, 1, 0) and tree(tmp_path / "t") == before
    flip(tmp_path / "t/scans/a/0/c/0/0/0", 40)
    prepare.repair(StoreConfig(store=str(tmp_path / "t")))
    assert tree(tmp_path / "t") == before


def test_resampled_scans_have_the_spacing_asked_for(tmp_path, serial):
    put(tmp_path / "raw/images/a.nii.gz")
    put(tmp_path / "raw/labels/a.nii.gz", label_array([1, 2]))
    go(tmp_path / "raw", tmp_path / "s", spacing_mm=(6, 3, 3))
    record = records(tmp_path / "s")["a"]
    assert record.spacing_mm == (6, 3, 3) and record.shape == (4, 9, 10)
    assert set(record.label_voxels) == {1, 2}
    own = scan_files.open_source_label(tmp_path / "s", record)
    values = own.read(np.array([(0, size) for size in own.shape]))
    again = nib.Nifti1Image(values, np.array(record.source_affine).reshape(4, 4))
    same = nib.as_closest_canonical(again), nib.as_closest_canonical(nib.load(tmp_path / "raw/labels/a.nii.gz"))
    assert np.array_equal(*(image.dataobj for image in same)) and np.allclose(*(image.affine for image in same))

    whole = tree(tmp_path / "s")
    flip(tmp_path / "s/scans/a/source_label/c/0/0/0", 40)
    assert list(checked(tmp_path / "s").damaged) == ["a"]
    prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    assert tree(tmp_path / "s") == whole


def test_a_disk_that_fills_at_the_index_is_one_clear_line(tmp_path, serial, monkeypatch):
    put(tmp_path / "raw/a.nii.gz")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(FailedRun, match=r"disk full at .*/s: free some space"):
        patch.setattr(store, "table_of", full)
        go(tmp_path / "raw", tmp_path / "s")
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (0, 1, 0)


def test_two_runs_at_once(tmp_path, serial, monkeypatch):
    put(tmp_path / "raw/a.nii.gz")
    monkeypatch.setattr("pgl_ray.data.folder.STRAGGLERS_S", 0.1)
    with (
        open_place(tmp_path / "s").locked(),
        pytest.raises(FailedRun, match="another prepare is writing into it"),
    ):
        go(tmp_path / "raw", tmp_path / "s")


# -- the command line and Ray -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wrong_use_is_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "pgl_ray.prepare", f"source={tmp_path}/none", f"store={tmp_path}/s"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"pgl_ray.prepare: source={tmp_path}/none: no such folder\n"


@pytest.mark.cluster
def test_ray_gives_the_same_store(tmp_path, serial, monkeypatch, ray_cluster, capfd):
    raw, labels = tmp_path / "raw", {"names": {"liver": 1}}
    with_faults(raw)
    go(raw, tmp_path / "one", labels=labels)
    monkeypatch.undo()
    check_faults(go(raw, tmp_path / "two", labels=labels), raw, tmp_path / "two", capfd)
    ours, theirs = tree(tmp_path / "two"), tree(tmp_path / "one")
    assert ours == theirs
    assert counts(go(raw, tmp_path / "two", labels=labels)) == (0, 2, len(REASONS))


@pytest.mark.cluster
def test_a_killed_run_is_continued(tmp_path):
    for place in range(24):
        put(tmp_path / f"raw/scan_{place:02}.nii.gz", ct_array(place, (192, 192, 100)))
    command = [sys.executable, "-m", "pgl_ray.prepare", f"source={tmp_path}/raw", f"store={tmp_path}/s"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    until = time.monotonic() + 240
    while len(done := store.read_records(tmp_path / "s")) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(3)  # Ray's processes follow their driver
    done = store.read_records(tmp_path / "s")
    assert 3 <= len(done) < 24
    shards = {scan_id: (tmp_path / f"s/scans/{scan_id}/0/c/0/0/0").stat().st_ino for scan_id in done}
    second = subprocess.run([*command], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert f"{24 - len(done)} converted, {len(done)} already there, 24 scans in" in second.stdout
    for scan_id, inode in shards.items():
        assert (tmp_path / f"s/scans/{scan_id}/0/c/0/0/0").stat().st_ino == inode
    assert len(store.read_index(tmp_path / "s").scans) == 24 and not (tmp_path / "s/.part").exists()


@pytest.mark.cluster
def test_real_scans(tmp_path, real_data, ray_cluster):
    head, body = tmp_path / "openkbp", tmp_path / "body"
    for target, scan_ids in ((head, ["pt_2", "pt_3", "pt_200"]), (body, ["ts_example_ct", "lung1", "CRLM-CT-1004"])):
        for scan_id in scan_ids:
            for kind in ("images", "labels"):
                file = real_data / target.name / kind / f"{scan_id}.nii.gz"
                (target / kind).mkdir(parents=True, exist_ok=True)
                if file.exists():
                    shutil.copy(file, target / kind)
    shutil.copy(real_data / "openkbp/patients.csv", head)
    recipe = Path(__file__).parents[1] / "data_prep/openkbp.yaml"
    config = load(PrepareConfig, [str(recipe), f"source={head}", f"store={tmp_path}/s"])
    assert counts(prepare.run(config)) == (3, 0, 0)
    index = store.read_index(tmp_path / "s")
    table = {row["patient"]: row for row in csv.DictReader((head / "patients.csv").open())}
    for record in index.scans:
        row = table[record.scan_id]
        assert record.split == row["split"]
        assert {index.labels[organ] for organ in row["labelled_organs"].split()} == set(record.labelled)
        assert set(record.label_voxels) <= set(record.labelled)
        source = nib.load(head / f"labels/{record.scan_id}.nii.gz")
        values, sizes = np.unique(np.asanyarray(source.dataobj), return_counts=True)
        assert record.label_voxels == {int(v): int(n) for v, n in zip(values, sizes) if v}

    assert counts(go(body, tmp_path / "b")) == (3, 0, 0)
    assert {r.scan_id: r.split for r in store.read_index(tmp_path / "b").scans} == dict.fromkeys(
        ["CRLM-CT-1004", "lung1", "ts_example_ct"], "train"
    )


def test_a_folder_of_data_sets_gives_volumes_not_labels(tmp_path):
    for path in ("a/images/x", "a/labels/x", "b/imagesTr/x_0000", "b/labelsTr/x", "c/deep/images/y", "loose"):
        file = tmp_path / f"{path}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [scan.scan_id for scan in layout.scans] == ["a__images__x", "b__imagesTr__x", "c__deep__images__y", "loose"]
    assert all(scan.label is None for scan in layout.scans) and not layout.faults
    assert [fault.source.split("/")[-3:] for fault in layout.left_out] == [
        ["a", "labels", "x.nii.gz"],
        ["b", "labelsTr", "x.nii.gz"],
    ]
