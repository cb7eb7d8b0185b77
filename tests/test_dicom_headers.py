"""Headers of DICOM files: those in the cache agree with pydicom, are read once, and anew where a file has changed."""

import os
import pickle

import numpy as np
import pydicom
import pytest
from dicom_files import ct_series, save
from preparing import ct_array, go, put, records

from pgl_ray import prepare
from pgl_ray.convert import one_scan
from pgl_ray.files import dicom, header_cache
from pgl_ray.files.header_cache import HeaderCache
from pgl_ray.files.source import Source
from pgl_ray.files.walk import walk


def series(seed=0, **tags):
    return ct_series(ct_array(seed, (6, 8, 9)), intercept=0, **tags)


def files_of(root):
    return list(walk(root).files.items())


def test_headers_agree_with_pydicom(tmp_path):
    tags = {"PatientID": "Q 7", "StudyInstanceUID": "1.4", "FrameOfReferenceUID": "1.5", "SeriesDescription": "thin"}
    save(series(**tags), tmp_path)
    for path, header in HeaderCache().headers(files_of(tmp_path)).items():
        file = pydicom.dcmread(path)
        assert (header.kind, header.series, header.instance) == ("slice", file.SeriesInstanceUID, file.SOPInstanceUID)
        assert (header.study, header.frame, header.description) == ("1.4", "1.5", "thin")
        assert [float(one) for one in header.position.split("\\")] == list(file.ImagePositionPatient)
        assert header.size == f"{file.Rows} x {file.Columns}" and header.place == str(file.InstanceNumber)
        assert "Q 7" not in "".join(header)


def test_a_patients_name_is_not_stored(tmp_path):
    save(series(PatientID="MRN123456", PatientName="Doe^Jane", PatientBirthDate="19700101"), tmp_path)
    cache = HeaderCache()
    cache.headers(files_of(tmp_path))
    text = pickle.dumps(list(HeaderCache(cache.packed())._known.items()))
    assert all(word not in text for word in (b"MRN123456", b"Doe", b"Jane", b"19700101"))


def test_headers_are_read_once(tmp_path, monkeypatch):
    save(series(), tmp_path, "{}")
    (tmp_path / "text").write_text("no DICOM")
    cache = HeaderCache()
    first = cache.headers(files_of(tmp_path))
    assert cache.changed
    read = []
    real = header_cache.read_header
    monkeypatch.setattr(header_cache, "read_header", lambda path: read.append(path) or real(path))
    again = HeaderCache(cache.packed())
    assert again.headers(files_of(tmp_path)) == first and not read and not again.changed
    assert again.packed() == cache.packed()
    os.utime(tmp_path / "3", ns=(1, 1))
    (tmp_path / "4").write_bytes((tmp_path / "4").read_bytes()[:-5])
    (tmp_path / "9").write_bytes((tmp_path / "0").read_bytes())
    headers = again.headers(files_of(tmp_path))
    assert sorted(os.path.basename(path) for path in read) == ["3", "4", "9"] and again.changed
    assert headers[str(tmp_path / "4")].kind == "damaged"


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_damage_to_the_cache_costs_only_time(tmp_path, content):
    save(series(), tmp_path)
    cache = HeaderCache()
    cache.headers(files_of(tmp_path))
    content = cache.packed()[:-30] if content is None else content
    assert len(dicom.find(tmp_path, cache=HeaderCache(content)).series) == 1


def test_what_cannot_be_opened_is_asked_again(tmp_path, monkeypatch):
    save(series(), tmp_path)
    cache = HeaderCache()
    with monkeypatch.context() as patch:

        def locked(*_):
            raise PermissionError(13, "Permission denied")

        patch.setattr("builtins.open", locked)
        assert {one.kind for one in cache.headers(files_of(tmp_path)).values()} == {"unopened"}
    assert {one.kind for one in cache.headers(files_of(tmp_path)).values()} == {"slice"}


def test_many_files_are_read_by_several_processes(tmp_path, monkeypatch):
    for k in range(4):
        save(series(k), tmp_path / f"p{k}")
    one = HeaderCache().headers(files_of(tmp_path))
    monkeypatch.setattr(header_cache, "FEW", 0)
    monkeypatch.setattr(header_cache, "AT_ONCE", 5)
    assert HeaderCache().headers(files_of(tmp_path)) == one and len(one) == 24


def test_a_store_keeps_the_headers(tmp_path, serial, monkeypatch):
    save(series(), tmp_path / "raw/p")
    put(tmp_path / "other/a.nii.gz")
    go(tmp_path / "raw", tmp_path / "s")
    assert (tmp_path / "s" / prepare.HEADERS).is_file()
    monkeypatch.setattr(header_cache, "read_header", lambda path: pytest.fail(f"{path} is read again"))
    assert go(tmp_path / "raw", tmp_path / "s").skipped == 1
    go(tmp_path / "other", tmp_path / "t")
    assert not (tmp_path / "t" / prepare.HEADERS).exists()


def test_records_are_read_once_per_run(tmp_path, serial, monkeypatch):
    for k in range(3):
        put(tmp_path / f"raw/{k}.nii.gz", seed=k)
    calls = []
    real = prepare.store.read_records
    monkeypatch.setattr(prepare.store, "read_records", lambda folder: calls.append(folder) or real(folder))
    for _ in range(2):
        go(tmp_path / "raw", tmp_path / "s")
    assert len(calls) == 2 and list(records(tmp_path / "s")) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["nii", "mha", "dicom"])
def test_memory_counts_the_voxels_that_come_out(tmp_path, kind):
    if kind == "dicom":
        save(series(), tmp_path / "a")
        source = Source("a", str(tmp_path / "a"), None, "", slices=tuple(f"{k:03}.dcm" for k in range(6)))
        num, size = 6 * 8 * 9, (2.5, 0.8, 0.7)
    else:
        import nibabel as nib
        import SimpleITK as sitk

        if kind == "nii":
            nib.save(nib.Nifti1Image(np.zeros((10, 11, 12), np.int16), np.diag([-1, -2, 5, 1])), tmp_path / "a.nii")
        else:
            image = sitk.GetImageFromArray(np.zeros((12, 11, 10), np.int16))
            image.SetSpacing((1, 2, 5))
            sitk.WriteImage(image, str(tmp_path / "a.mha"))
        source, num, size = Source("a", str(tmp_path / f"a.{kind}"), None, ""), 1320, (5, 2, 1)
    plain = one_scan.peak_bytes(source, None)
    assert plain == 8 * num
    assert one_scan.peak_bytes(source, (1.0, 1.0, 1.0)) == pytest.approx(plain + 10 * num * np.prod(size), abs=2)
