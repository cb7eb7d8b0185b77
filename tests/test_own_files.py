"""What pgl_ray has not written stays as it is, wherever it lies."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from preparing import counts, go, put, records, tree

from pgl_ray import prepare
from pgl_ray.config import LabelsConfig, StoreConfig
from pgl_ray.convert.leftovers import remove_renamed
from pgl_ray.convert.todo import Todo
from pgl_ray.data import own_files, scan_files, store
from pgl_ray.data.owner import part_folder
from pgl_ray.data.place import open_place
from pgl_ray.files.layout import read_layout
from pgl_ray.judge import vectors

# -- where a store would be made --------------------------------------------------------------------------------------


def a_folder_of_cts(top):
    put(top / "scans/patient1/ct.nii.gz")
    put(top / "scans/patient2/ct.nii.gz", seed=1)


def a_zarr_group(top):
    (top / "scans/patient1").mkdir(parents=True)
    (top / "scans/patient1/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')


def a_file_scans(top):
    top.mkdir()
    (top / "scans").write_text("a list of scans")


def another_index(top):
    top.mkdir()
    (top / "index.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize("other", [a_folder_of_cts, a_zarr_group, a_file_scans, another_index])
@pytest.mark.parametrize("source", ["raw", "top/scans", "top"])
def test_no_store_is_made_where_other_things_lie(tmp_path, serial, other, source):
    other(tmp_path / "top")
    put(tmp_path / "raw/a.nii.gz")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"source=.*give another store|store=.*top is no store and holds") as error:
        go(tmp_path / source, tmp_path / "top")
    assert "\n" not in str(error.value) and tree(tmp_path) == before


@pytest.mark.parametrize("below", ["", "scans", "scans/a"])
def test_a_store_is_no_source_of_its_own(tmp_path, serial, below):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    before = tree(tmp_path / "s")
    for source in ("s", "link"):
        with pytest.raises(ValueError, match=r"source=.*(is the store's own folder|lies in the scans/ of store=)"):
            go(tmp_path / source / below, tmp_path / "s")
    assert tree(tmp_path / "s") == before


@pytest.mark.parametrize("other", ["Thumbs.db", ".DS_Store"])
def test_what_a_file_browser_leaves_is_in_nobodys_way(tmp_path, serial, other):
    put(tmp_path / "raw/a.nii.gz")
    fill(tmp_path / "s/scans", {other: b""})
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (1, 0, 0)


def test_a_deleted_store_json_is_written_again(tmp_path, serial):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    (tmp_path / "s/store.json").unlink()  # as is said where it is damaged
    assert counts(go(tmp_path / "raw", tmp_path / "s")) == (0, 1, 0)


@pytest.mark.slow
def test_a_bucket_with_other_things_is_left_alone(tmp_path, s3, serial):
    put(tmp_path / "raw/a.nii.gz")
    url = f"{s3}/{tmp_path.name}/data"
    open_place(url).write("scans/patient1/ct.nii.gz", [b"a CT"])
    with pytest.raises(ValueError, match=r"is no store and holds scans/patient1, which pgl_ray has not written"):
        go(tmp_path / "raw", url)
    assert open_place(url).names("") == ["scans"]


# -- in a store -------------------------------------------------------------------------------------------------------

HALF = {"0/c/0/0/0": b"half"}
OTHERS = [
    {"ct.nii.gz": b"a CT"},
    {"0": b"a slice of DICOM"},
    {"0/c/0/0/0": b"half", "0/c/0/0/1": b"another's chunk"},
    {"0/c/0/0/0": b"half", "labels/organs/report.txt": b"mine"},
    {"zarr.json": b'{"zarr_format": 3, "node_type": "group", "attributes": {}}', "0/c/0/0/0": b"mine"},
]


def fill(folder, files):
    for key, content in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)


@pytest.mark.parametrize("name", ["other", "b"])  # b: as a scan of the source
@pytest.mark.parametrize("files", OTHERS)
def test_other_things_in_a_store_stay(tmp_path, serial, name, files):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    fill(tmp_path / "s/scans" / name, files)
    put(tmp_path / "raw/b.nii.gz", seed=1)
    result = go(tmp_path / "raw", tmp_path / "s")
    assert {key: (tmp_path / "s/scans" / name / key).read_bytes() for key in files} == files
    assert all("pgl_ray has not written" in fault.reason for fault in result.failed)
    assert sorted(fault.source for fault in result.failed)[-1] == f"{tmp_path}/s/scans/{name}"
    assert ("b" in records(tmp_path / "s")) == (name != "b")
    shutil.rmtree(tmp_path / "s/scans" / name)  # as it says
    assert go(tmp_path / "raw", tmp_path / "s").failed == () and sorted(records(tmp_path / "s")) == ["a", "b"]


@pytest.mark.parametrize("added", ["report.txt", "labels/organs/0/c/0/0/1"])
def test_a_file_added_to_a_scan_outlives_it(tmp_path, serial, added):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    fill(tmp_path / "s/scans/a", {added: b"mine"})
    put(tmp_path / "raw/a.nii.gz", seed=1)
    [fault] = go(tmp_path / "raw", tmp_path / "s").failed
    assert f"scans/a/{added} is there, and pgl_ray has not written it: move it elsewhere" in fault.reason
    place, known = open_place(tmp_path / "s"), store.read_records(tmp_path / "s")
    source = read_layout(str(tmp_path / "raw"), LabelsConfig()).scans[0]
    renamed = Todo([], [replace(source, scan_id="new")], {"new": ["a"]}, [])
    [fault] = remove_renamed(place, renamed, known)
    assert "so it stays" in fault.reason and list(known) == ["a"]
    assert (tmp_path / "s/scans/a" / added).read_bytes() == b"mine"
    (tmp_path / "s/scans/a" / added).unlink()
    assert remove_renamed(place, renamed, known) == [] and not (tmp_path / "s/scans/a").exists()


@pytest.mark.parametrize("files", [HALF, {**HALF, "labels/organs/0/c/0/0/0": b"", "0/zarr.json": b"{}"}])
def test_what_a_killed_run_has_left_of_a_scan_is_removed(tmp_path, serial, files):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    fill(tmp_path / "s/scans/left", files)
    assert go(tmp_path / "raw", tmp_path / "s").failed == () and not (tmp_path / "s/scans/left").exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"attributes": {"pgl_ray": {}}}'])
def test_a_damaged_scan_is_still_converted_again(tmp_path, serial, content):
    put(tmp_path / "raw/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    (tmp_path / "s/scans/a/zarr.json").write_bytes(content)
    verified, left = prepare.repair(StoreConfig(store=str(tmp_path / "s")))
    assert list(verified.damaged) == ["a"] and not left and list(records(tmp_path / "s")) == ["a"]


@pytest.mark.parametrize("name", ["thesis.docx", "run.txt", "0" * 31])
def test_another_folder_of_that_name_is_not_emptied(tmp_path, name):
    fill(tmp_path / ".part", {name: b"mine"})
    with pytest.raises(ValueError, match=f"/.part/{name} is there, and pgl_ray has not written it"):
        part_folder(open_place(tmp_path)).__enter__()
    assert (tmp_path / ".part" / name).read_bytes() == b"mine"
    (tmp_path / ".part" / name).rename(tmp_path / name)
    fill(tmp_path / ".part", {"run": b"x", "tries/1/a": b"", f"{'a' * 32}.old/0/c/0/0/0": b""})
    with part_folder(open_place(tmp_path)):
        assert [path.name for path in (tmp_path / ".part").iterdir()] == ["run"]


def test_every_file_of_a_scan_is_known_as_ones_own(tmp_path):
    volume, label = np.zeros((9, 9, 9), np.int16), np.ones((9, 9, 9), np.uint8)
    scan_files.write_scan(tmp_path, "a", volume, np.eye(4), label=label, source_label=label, source_affine=np.eye(4))
    written = {path.relative_to(tmp_path / "scans/a").as_posix() for path in (tmp_path / "scans/a").rglob("*")}
    assert written == own_files.FOLDERS | own_files.FILES - {"zarr.json.part"}
    assert json.loads((tmp_path / "scans/a/zarr.json").read_bytes())["attributes"]["pgl_ray"]


@pytest.mark.parametrize("name", ["cohort.parquet", "part-0001.parquet", "2024-11.parquet"])
def test_tables_beside_the_parts_of_an_embedding_stay(tmp_path, name):
    fill(tmp_path / "parts", {name: b"mine"})
    vectors.write_part(tmp_path, [{"scan_id": "a", "vector": [1.0]}], {})
    assert list(vectors.read_earlier(tmp_path, {})[0]) == ["a"] and not vectors.read_earlier(tmp_path, {})[1]
    vectors.write_table(tmp_path, [{"scan_id": "a", "vector": [1.0]}], {}, {"a"})
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [name]
