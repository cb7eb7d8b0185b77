"""Label maps that lie next to CTs, and what is doubtful about a file: what prepare and predict say of them."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from pgl_ray import predict, prepare
from pgl_ray.config import FailedRun, PredictConfig, PrepareConfig, build
from pgl_ray.data import store
from pgl_ray.train.records import CheckpointMeta

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
SHAPE = (20, 18, 9)
META = CheckpointMeta(encoder={}, hu_window=(-1000.0, 400.0), labels={"a": 1, "b": 2}, patch_size=(8, 16, 24))


pytestmark = pytest.mark.usefixtures("serial")


def put(path, array, affine=AFFINE, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)


def hu(seed=0):
    return np.random.default_rng(seed).integers(-1000, 800, SHAPE).astype(np.int16)


def mask():
    label = np.zeros(SHAPE, np.uint8)
    label[3:9, 4:9, 2:6] = 1
    label[12:16, 4:9, 2:6] = 2
    return label


def go(source, target, **values):
    return prepare.run(PrepareConfig(source=str(source), store=str(target), **values))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_label_map_next_to_a_ct_is_left_out(tmp_path, capsys):
    for case in ("p1", "p2"):
        put(tmp_path / f"raw/{case}/{case}_ct.nii.gz", hu())
    put(tmp_path / "raw/p1/p1_seg.nii.gz", mask())
    put(tmp_path / "raw/p2/p2_liver.nii.gz", (mask() == 1).astype(np.float32))
    put(tmp_path / "raw/p3/alone.nii.gz", mask())
    result = go(tmp_path / "raw", tmp_path / "s")
    assert [scan.scan_id for scan in store.read_index(tmp_path / "s").scans] == ["p1__p1_ct", "p2__p2_ct"]
    assert [fault.source.rsplit("/", 1)[1] for fault in result.failed] == ["alone.nii.gz"]
    assert "whole numbers from 0 to 2 in patches: a label map" in result.failed[0].reason
    out = [line for line in lines(tmp_path / "s/left_out.jsonl") if line["source"].endswith("nii.gz")]
    assert [line["source"].rsplit("/", 1)[1] for line in out] == ["p1_seg.nii.gz", "p2_liver.nii.gz"]
    with pytest.raises(FailedRun, match="1 file failed"):
        prepare.describe(result)
    said = capsys.readouterr().out
    assert "prepare: 2 files not used:\n" in said
    for line in out:
        assert f": {line['reason']}: {line['source']}\n" in said


def test_doubts_about_a_file_are_said_and_stored(tmp_path, capsys):
    put(tmp_path / "raw/plain.nii.gz", hu())
    put(tmp_path / "raw/offset.nii.gz", hu() + np.int16(1024))
    put(tmp_path / "raw/no_codes.nii.gz", hu(), None, pixdim=[1, 0.8, 0.8, 2.5, 1, 1, 1, 1])
    assert not go(tmp_path / "raw", tmp_path / "s").failed
    said = capsys.readouterr().out
    assert said.count("prepare: note: ") == 2
    assert "offset.nii.gz: hardly a value is below" in said and "no_codes.nii.gz: its header states no orient" in said
    assert {line["scan_id"] for line in lines(tmp_path / "s/notes.jsonl")} == {"offset", "no_codes"}


def test_a_resampling_that_leaves_one_voxel_fails_by_name(tmp_path):
    put(tmp_path / "raw/flat.nii.gz", hu()[..., :3])
    put(tmp_path / "raw/good.nii.gz", hu())
    result = go(tmp_path / "raw", tmp_path / "s", spacing_mm=(10.0, 2.0, 2.0))
    assert [scan.scan_id for scan in store.read_index(tmp_path / "s").scans] == ["good"]
    assert "spacing_mm=[10.0, 2.0, 2.0] makes shape (1, " in result.failed[0].reason
    with pytest.raises(ValueError, match=r"spacing_mm.0=1000.*less than or equal to 30"):
        build(PrepareConfig, {"source": "a", "store": "b", "spacing_mm": [1000, 1, 1]})


def test_ignored_voxels_are_refused_by_name(tmp_path):
    put(tmp_path / "raw/imagesTr/a_0000.nii.gz", hu())
    put(tmp_path / "raw/labelsTr/a.nii.gz", np.where(mask() == 2, 3, mask()).astype(np.uint8))
    put(tmp_path / "raw/imagesTr/b_0000.nii.gz", hu(1))
    put(tmp_path / "raw/labelsTr/b.nii.gz", mask())
    names = {"background": 0, "x": 1, "y": 2, "ignore": 3}
    (tmp_path / "raw/dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": names}))
    result = go(tmp_path / "raw", tmp_path / "s")
    assert result.converted == 1
    number = int((mask() == 2).sum())
    assert (
        f"a.nii.gz: {number} voxels are marked as not annotated (dataset.json's ignore, 3)" in result.failed[0].reason
    )


# -- predict ----------------------------------------------------------------------------------------------------------


class Nothing(nn.Module):
    """Finds the background everywhere."""

    def __init__(self):
        super().__init__()
        self.head = SimpleNamespace(out_channels=3)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.zeros(len(x), 3, *x.shape[2:]) + torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(predict, "load_segmenter", lambda run, device: (Nothing().eval(), META))


def label_of(source, output):
    return predict.run(build(PredictConfig, {"run": "r", "input": str(source), "output": str(output), "viewer": False}))


def test_predict_says_notes_and_leaves_label_maps_out(tmp_path, network, capsys):
    put(tmp_path / "in/ct.nii.gz", hu())
    put(tmp_path / "in/offset.nii.gz", hu() + np.int16(1024))
    put(tmp_path / "in/seg.nii.gz", mask())
    assert label_of(tmp_path / "in", tmp_path / "out").num_scans == 2
    said = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gz")) == ["ct.nii.gz", "offset.nii.gz"]
    assert "predict: note: offset.nii.gz: hardly a value is below" in said
    assert "predict: 1 file not used:\npredict:   1: whole numbers from 0 to 2 in patches" in said
    (line,) = lines(tmp_path / "out/left_out.jsonl")
    assert line["source"].endswith("in/seg.nii.gz") and said.splitlines()[-1].endswith(f": {line['source']}")
    assert "hardly" in json.loads((tmp_path / "out/offset.json").read_text())["notes"][0]
    with pytest.raises(ValueError, match=r"seg.nii.gz: whole numbers from 0 to 2 in patches"):
        label_of(tmp_path / "in/seg.nii.gz", tmp_path / "seg_label.nii.gz")


def test_a_folder_of_only_label_maps_fails(tmp_path, network):
    for name in "ab":
        put(tmp_path / f"in/{name}.nii.gz", mask())
    with pytest.raises(FailedRun, match=r"2 of 2 files failed: a.nii.gz, b.nii.gz"):
        label_of(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("code, per_mm", [(1, 1e-3), (2, 1), (3, 1e3)])
def test_predict_keeps_units_and_grid(tmp_path, network, code, per_mm):
    put(tmp_path / "ct.nii.gz", hu(), np.diag([per_mm, per_mm, per_mm, 1]) @ AFFINE, xyzt_units=code)
    label_of(tmp_path / "ct.nii.gz", tmp_path / "l.nii.gz")
    given, written = nib.load(tmp_path / "ct.nii.gz"), nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(written.affine, given.affine)
    assert written.shape == given.shape and written.header["xyzt_units"] == code
