"""predict: label maps on exactly the input's grid, whatever its orientation and format."""

import contextlib
import gzip
import json
import os
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dicom_files import ct_series, itk_series, save
from torch import nn

from pgl_ray import cli, evaluate, predict
from pgl_ray.config import EvaluateConfig, FailedRun, PredictConfig, build
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import progress
from pgl_ray.train.checkpoint import write_state
from pgl_ray.train.records import CheckpointMeta

WINDOW = (-1000.0, 400.0)
LABELS = {"liver": 300, "spleen": 4}  # class 1 = spleen
VALUES = {"hu_window": list(WINDOW), "labels": LABELS, "task": "multiclass", "patch_size": [8, 16, 24]}
META = CheckpointMeta(encoder={}, **VALUES)
SHAPE = (19, 23, 9)


def volume(seed=0):
    return np.random.default_rng(seed).integers(-1500, 800, SHAPE).astype(np.int16)


def expected(hu):
    """What `Bands` means, voxel by voxel in the file's own order."""
    return np.where(hu >= 200, 300, np.where(hu >= 0, 4, 0))


class Bands(nn.Module):
    """Knows the classes' HU through the statistics of the clipped volume, which a voxel permutation does not change."""

    def __init__(self, hu):
        super().__init__()
        self.head = SimpleNamespace(out_channels=3)
        clipped = np.clip(hu, *WINDOW).astype(np.float64)
        bounds = (np.array([-0.5, 199.5]) - clipped.mean()) / clipped.std()
        self.bounds = nn.Parameter(torch.tensor(bounds, dtype=torch.float32))

    def forward(self, x):
        index = (x > self.bounds.view(1, -1, 1, 1, 1)).sum(1)
        return nn.functional.one_hot(index, 3).movedim(-1, 1).float()


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(predict, "load_segmenter", lambda run, device: (Bands(volume()).eval(), META))


def config(source, output, **values):
    return build(PredictConfig, {"run": "r", "input": str(source), "output": str(output), "viewer": False, **values})


def affine_of(codes, oblique=0.0):
    affine = np.eye(4)
    ornt = nib.orientations.axcodes2ornt(codes)
    for axis, (world, sign) in enumerate(ornt):
        affine[:, axis] = 0
        affine[int(world), axis] = sign * (0.8, 1.1, 3.0)[axis]
    affine[:3, 3] = (-50, 20, 7)
    angle = np.array([[np.cos(oblique), -np.sin(oblique), 0], [np.sin(oblique), np.cos(oblique), 0], [0, 0.05, 1]])
    affine[:3, :3] = angle @ affine[:3, :3] if oblique else affine[:3, :3]
    return affine


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "IRP"])
@pytest.mark.parametrize("oblique", [0.0, 0.3])
def test_nifti_keeps_its_own_grid(tmp_path, known, codes, oblique):
    affine = affine_of(codes, oblique)
    image = nib.Nifti1Image(volume(), affine)
    image.set_qform(affine_of(codes), code=1)
    nib.save(image, tmp_path / "ct.nii.gz")
    result = predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "deep" / "label.nii.gz"))
    label = nib.load(tmp_path / "deep/label.nii.gz")
    assert np.array_equal(np.asarray(label.dataobj), expected(volume())) and label.get_data_dtype() == np.uint16
    assert np.array_equal(label.affine, nib.load(tmp_path / "ct.nii.gz").affine)
    assert label.header["qform_code"] == image.header["qform_code"]
    assert predict.describe(result) == f"predict: 1 label map in {tmp_path / 'deep/label.nii.gz'}"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["label.json", "label.nii.gz"]


@pytest.mark.parametrize("name", ["openkbp/images/pt_10.nii.gz", "body/images/ts_example_ct.nii.gz"])
def test_real_ct(tmp_path, monkeypatch, real_data, name):
    image = nib.load(real_data / name)
    hu = np.asarray(image.dataobj)
    meta = META.model_copy(update={"patch_size": (64, 96, 96)})
    monkeypatch.setattr(predict, "load_segmenter", lambda run, device: (Bands(hu).eval(), meta))
    predict.run(config(real_data / name, tmp_path / "l.nii.gz", inference={"overlap": 0.1, "batch_size": 2}))
    label = nib.load(tmp_path / "l.nii.gz")
    assert np.array_equal(np.asarray(label.dataobj), expected(hu))
    assert np.array_equal(label.affine, image.affine)
    assert nib.aff2axcodes(label.affine) == nib.aff2axcodes(image.affine)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itk_formats(tmp_path, known, suffix):
    image = sitk.GetImageFromArray(volume().transpose(2, 1, 0))
    image.SetSpacing((0.8, 1.1, 3.0))
    image.SetOrigin((5, 6, 7))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, tmp_path / f"ct{suffix}")
    predict.run(config(tmp_path / f"ct{suffix}", tmp_path / "label.nii.gz"))
    label = sitk.ReadImage(tmp_path / "label.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(label).transpose(2, 1, 0), expected(volume()))
    for ours, theirs in ((label.GetSpacing(), image.GetSpacing()), (label.GetOrigin(), image.GetOrigin())):
        assert np.allclose(ours, theirs, atol=1e-5)
    assert np.allclose(label.GetDirection(), image.GetDirection(), atol=1e-5)


def write(path, hu=None):
    nib.save(nib.Nifti1Image(volume() if hu is None else hu, affine_of("LPS")), path)


def test_dicom_series(tmp_path, known):
    """Two series in one folder, and the first alone; the label maps lie where ITK sees the series."""
    raw = volume()
    first = ct_series(raw, intercept=0, iop=(0, 1, 0, 0, 0, -1))
    second = ct_series(raw[:, ::-1], intercept=0, SeriesNumber=7)
    save([*first, *second], tmp_path / "in/p")
    result = predict.run(config(tmp_path / "in", tmp_path / "out"))
    assert result.num_scans == 2
    two, seven = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert two.startswith("p__series2-") and seven.startswith("p__series7-")
    back = sitk.ReadImage(str(tmp_path / "out" / two))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), expected(raw))
    series = itk_series(save(first, tmp_path / "one"))
    for ours, theirs in zip(
        back.TransformIndexToPhysicalPoint((2, 3, 4)), series.TransformIndexToPhysicalPoint((2, 3, 4))
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    predict.run(config(tmp_path / "one", tmp_path / "one.nii.gz"))
    assert (tmp_path / "one.nii.gz").is_file()


def test_a_folder_goes_on_over_bad_files(tmp_path, known, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write(source / "a.nii.gz")
    write(source / "c.nii")
    (source / "b.nii.gz").write_text("no image")
    whole = gzip.compress(nib.Nifti1Image(volume(), np.eye(4)).to_bytes())
    (source / "d.nii.gz").write_bytes(whole[: len(whole) // 2])
    (source / "notes.txt").write_text("skipped")
    with pytest.raises(FailedRun, match=r"2 of 4 files failed: b.nii.gz, d.nii.gz"):
        predict.run(config(source, out))
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    assert np.array_equal(np.asarray(nib.load(out / "c.nii.gz").dataobj), expected(volume()))
    printed = capsys.readouterr().out
    assert re.search(r"^predict: 4/4 scans, .*, d.nii.gz, 2 left out$", printed, re.M)
    block = printed.split("predict: 2 left out:\n")[1].splitlines()  # all of it at the end
    assert [line.split(": ")[1] for line in block[:2]] == [f"  {source}/b.nii.gz", f"  {source}/d.nii.gz"]
    assert block[2:] == ["predict: 1 file not used:", f"predict:   1: no format of CT: {source}/notes.txt"]


@pytest.mark.parametrize(
    "source, output, message",
    [
        ("none.nii.gz", "x.nii.gz", "none.nii.gz does not exist"),
        ("in/a.nii.gz", "out", r"must be a file that ends in .nii.gz"),
        ("in/a.nii.gz", "in/a.nii.gz", "would replace the CT"),
        ("in", "in", "output=.*in is the input's folder"),
        ("in", "in/a.nii.gz", "would replace the CT"),
        ("two", "out.nii.gz", "is one file, and input=.*two holds 2 CTs: name a folder"),
        ("empty", "out", r"input=.*empty: no volume in it \(.nii.gz"),
        ("bad.nii.gz", "x.nii.gz", "bad.nii.gz: not a readable image"),
    ],
)
def test_wrong_use_is_one_clear_line(tmp_path, known, source, output, message):
    for name in ("in", "empty", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "two/a.nii.gz")
    write(tmp_path / "two/b.nii.gz")
    write(tmp_path / "in/a.nii.gz")
    (tmp_path / "bad.nii.gz").write_text("no image")
    before = (tmp_path / "in/a.nii.gz").read_bytes()
    with pytest.raises(ValueError, match=message):
        predict.run(config(tmp_path / source, tmp_path / output))
    assert (tmp_path / "in/a.nii.gz").read_bytes() == before
    assert not (tmp_path / "x.nii.gz").exists()


def test_from_the_command_line_with_a_real_run(tmp_path, monkeypatch, capsys):
    """Random weights from best.pt, a constant CT, one organ; exit codes 0 and 2."""
    settings = {"depths": [1, 1, 1, 1], "width": 4, "stage_strides": "late"}
    meta = {**VALUES, "door": "finetune", "encoder": settings, "num_outputs": 1, "task": "binary"}
    meta["labels"] = {"lung": 2}
    (tmp_path / "r").mkdir()
    model = Segmenter(Encoder(**settings), 1)
    write_state(tmp_path / "r/best.pt", {"model": model.state_dict(), "meta": meta})
    write(tmp_path / "ct.nii.gz", np.full(SHAPE, -1024, np.int16))
    args = [f"run={tmp_path}/r", f"input={tmp_path}/ct.nii.gz", f"output={tmp_path}/l.nii.gz"]
    cli.call("predict", [*args, "inference.device=cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == f"predict: 1 label map in {tmp_path}/l.nii.gz"
    assert set(np.unique(np.asarray(nib.load(tmp_path / "l.nii.gz").dataobj))) <= {0, 2}
    with pytest.raises(SystemExit) as error:
        cli.call("predict", [args[0], f"input={tmp_path}/none.mha", args[2]])
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


# -- finished scans, notes, the page ----------------------------------------------------------------------------------


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_finished_is_not_done_again(tmp_path, known, monkeypatch, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b", "c"):
        write(source / f"{name}.nii.gz")
    assert predict.run(config(source, out)).num_finished_before == 0
    before = times(out)
    assert set(before) == {f"{name}.{end}" for name in "abc" for end in ("nii.gz", "json")}
    result = predict.run(config(source, out))
    assert result.num_finished_before == 3 and times(out) == before
    assert "3 of them done before" in capsys.readouterr().out
    write(source / "b.nii.gz", volume(1))  # another scan of that name
    (out / "c.nii.gz").unlink()
    result = predict.run(config(source, out))
    changed = {name for name, time in times(out).items() if before[name] != time}
    assert result.num_finished_before == 1 and changed == {"b.nii.gz", "b.json", "c.nii.gz", "c.json"}
    assert predict.run(config(source, out, inference={"overlap": 0.2})).num_finished_before == 0  # other settings
    assert predict.run(config(source, out, inference={"overlap": 0.2, "batch_size": 2})).num_finished_before == 3
    other = lambda run, device: (Bands(volume(7)).eval(), META)  # noqa: E731 (another network)
    monkeypatch.setattr(predict, "load_segmenter", other)
    assert predict.run(config(source, out, inference={"overlap": 0.2})).num_finished_before == 0


def network(monkeypatch, seed):
    monkeypatch.setattr(predict, "load_segmenter", lambda run, device: (Bands(volume(seed)).eval(), META))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["without pages", "killed at the page", "killed at the facts"])
@pytest.mark.slow
def test_no_network_s_map_beside_another_s_page(tmp_path, monkeypatch, how):
    """A's whole output, B's in between, then either again: what lies there is always one network's."""
    write(tmp_path / "ct.nii.gz")
    asked = config(tmp_path / "ct.nii.gz", tmp_path / "o/label.nii.gz", viewer=True)
    whole = {}
    for name, seed in (("B", 7), ("A", 0)):
        network(monkeypatch, seed)
        predict.run(asked)
        whole[name] = contents(tmp_path / "o")
    network(monkeypatch, 7)
    if how == "without pages":
        predict.run(asked.model_copy(update={"viewer": False}))
    else:
        stopped = {"killed at the page": (predict.viewer, "make_page"), "killed at the facts": (predict, "write_aside")}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*stopped[how], lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            predict.run(asked)
    assert not (tmp_path / "o/label.html").exists() and not (tmp_path / "o/label.png").exists()
    between = contents(tmp_path / "o")
    for name, seed in (("A", 0), ("B", 7)):
        for path in (tmp_path / "o").iterdir():
            path.unlink()
        for path, content in between.items():
            (tmp_path / "o" / path).write_bytes(content)
        network(monkeypatch, seed)
        predict.run(asked)
        assert contents(tmp_path / "o") == whole[name]


@pytest.mark.parametrize("facts", [None, "{}", "[]", "no json"])
def test_label_maps_of_others_are_not_replaced(tmp_path, known, facts):
    """As nnU-Net has them: imagesTs/case_0000.nii.gz is segmented as case, whose drawn label map lies in labelsTs."""
    (tmp_path / "imagesTs").mkdir()
    (tmp_path / "labelsTs").mkdir()
    for name in ("case1", "case2"):
        write(tmp_path / f"imagesTs/{name}_0000.nii.gz")
    drawn = tmp_path / "labelsTs/case2.nii.gz"
    drawn.write_bytes(b"drawn by hand")
    if facts:
        drawn.with_name("case2.json").write_text(facts)
    with pytest.raises(
        ValueError, match=r"labelsTs/case2.nii.gz is there, and predict has not written it: choose .*delete"
    ):
        predict.run(config(tmp_path / "imagesTs", tmp_path / "labelsTs"))
    assert drawn.read_bytes() == b"drawn by hand" and not (tmp_path / "labelsTs/case1.nii.gz").exists()


@pytest.mark.parametrize("change", ["another network", "pages are asked for", "the facts are an earlier version's"])
def test_corrected_label_maps_are_not_replaced(tmp_path, monkeypatch, change):
    """Of a folder of two; as predict wrote it, it is replaced as ever."""
    network(monkeypatch, 0)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.nii.gz")
    asked = config(tmp_path / "in", tmp_path / "out")
    predict.run(asked)
    written = (tmp_path / "out/b.nii.gz").read_bytes()
    (tmp_path / "out/b.nii.gz").write_bytes(b"corrected by hand")
    assert predict.run(asked).num_finished_before == 2  # neither network nor CT changed: nothing is to be done
    if change == "another network":
        network(monkeypatch, 7)
    elif change == "pages are asked for":
        asked = asked.model_copy(update={"viewer": True})
    else:
        network(monkeypatch, 7)
        facts = tmp_path / "out/b.json"
        facts.write_text(json.dumps({k: v for k, v in json.loads(facts.read_text()).items() if k != "label_sha256"}))
        assert predict.run(asked).num_finished_before == 0
        return
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out/b.nii.gz was changed since predict wrote it.*: move it away, or choose"):
        predict.run(asked)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/b.nii.gz").write_bytes(written)
    assert predict.run(asked).num_finished_before == 0


@pytest.mark.parametrize("end", [".json", ".html", ".png"])
@pytest.mark.parametrize("viewer", [False, True])
def test_files_of_others_beside_a_new_map_are_not_replaced(tmp_path, known, end, viewer):
    """A converter's sidecar, a screenshot, a page of somebody else's."""
    write(tmp_path / "ct1.nii")
    other = tmp_path / f"ct1{end}"
    other.write_text('{"Modality": "CT"}')
    with pytest.raises(ValueError, match=rf"ct1{end} is there and would be replaced.*: choose another output, or"):
        predict.run(config(tmp_path / "ct1.nii", tmp_path / "ct1.nii.gz", viewer=viewer))
    assert other.read_text() == '{"Modality": "CT"}' and len(list(tmp_path.iterdir())) == 2


def test_another_patient_s_file_of_that_name_and_time(tmp_path, known):
    """As archives with one time for all files have them: only what is in them differs."""
    other = np.roll(volume(), 1)  # of the same HU, which `known` goes by
    for name, hu in (("p1", volume()), ("p2", other)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "ct.nii", hu)
        os.utime(tmp_path / name / "ct.nii", (1e9, 1e9))
    predict.run(config(tmp_path / "p1/ct.nii", tmp_path / "q.nii.gz"))
    predict.run(config(tmp_path / "p2/ct.nii", tmp_path / "q.nii.gz"))
    assert np.array_equal(np.asarray(nib.load(tmp_path / "q.nii.gz").dataobj), expected(other))
    (tmp_path / "p2").rename(tmp_path / "moved")  # the same file is not done again
    assert predict.run(config(tmp_path / "moved/ct.nii", tmp_path / "q.nii.gz")).num_finished_before == 1


def test_page_and_facts_of_the_label_map(tmp_path, known):
    write(tmp_path / "ct.nii.gz")
    predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "o/label.nii.gz", viewer=True))
    assert {p.name for p in (tmp_path / "o").iterdir()} == {f"label.{end}" for end in ("nii.gz", "json", "html", "png")}
    facts = json.loads((tmp_path / "o/label.json").read_text())
    voxel_ml = 0.8 * 1.1 * 3 / 1000
    for organ, value in (("spleen", 4), ("liver", 300)):
        count = int((expected(volume()) == value).sum())
        said = next(item for item in facts["organs"] if item["name"] == organ)
        assert said["voxels"] == count and said["volume_ml"] == pytest.approx(count * voxel_ml, abs=1e-3)
    assert "liver" in (tmp_path / "o/label.html").read_text()
    assert predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "o/label.nii.gz", viewer=True)).num_finished_before
    (tmp_path / "o/label.png").unlink()
    assert not predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "o/label.nii.gz", viewer=True)).num_finished_before


def test_a_ct_unlike_the_training_scans_is_noted(tmp_path, monkeypatch, capsys):
    data = {"spacing_mm": [[3, 0.5, 0.5], [3, 1, 1], [5, 2, 2]], "resampled_mm": None}
    data |= {"mean_hu": [-400, -300], "std_hu": [400, 500]}
    meta = META.model_copy(update={"data": data})
    monkeypatch.setattr(predict, "load_segmenter", lambda run, device: (Bands(volume()).eval(), meta))
    write(tmp_path / "a.nii.gz", np.full(SHAPE, 1000, np.int16))
    predict.run(config(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"))
    assert "note: a.nii.gz: the mean of its voxels" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["file/x.nii.gz", "/proc/nothing/x.nii.gz"])
def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, known, monkeypatch, output):
    monkeypatch.setattr(predict, "predict_one", lambda *args: pytest.fail("work before the check"))
    write(tmp_path / "ct.nii.gz")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="cannot be written: "):
        predict.run(config(tmp_path / "ct.nii.gz", tmp_path / output))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), "the CPU's own"])
def test_too_little_memory_names_what_to_change(tmp_path, known, monkeypatch, error):
    def full(self, x):
        if isinstance(error, Exception):
            raise error
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Bands, "forward", full)
    write(tmp_path / "ct.nii.gz")
    for batch_size, mend in ((4, "inference.batch_size=2"), (1, "a machine with more memory")):
        with pytest.raises(FailedRun, match=rf"ct.nii.gz: .*\(9, 23, 19\) voxels and .*={batch_size} windows.*{mend}"):
            predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "x.nii.gz", inference={"batch_size": batch_size}))


@pytest.mark.parametrize("door", [predict, evaluate])
def test_flips_of_a_network_trained_without_are_refused(tmp_path, monkeypatch, door):
    """It has never seen a mirrored body: seven of the eight passes would outvote the one that means something."""
    write(tmp_path / "ct.nii.gz")
    write_scan(tmp_path / "s", "a", volume(), np.eye(4), label=np.full(SHAPE, 4, np.uint8), labelled=(4,), split="test")
    write_index(tmp_path / "s", LABELS, WINDOW)
    for flip_prob, allowed in ((0, False), (0.0, False), (0.5, True), (None, True)):
        trained = json.dumps({"patch": {} if flip_prob is None else {"flip_prob": flip_prob}})
        meta = META.model_copy(update={"config": trained})
        monkeypatch.setattr(door, "load_segmenter", lambda run, device, meta=meta: (Bands(volume()).eval(), meta))
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r/best.pt").write_bytes(b"what Bands stands for")
        refused = pytest.raises(ValueError, match=r"trained without them .*leave tta out")
        with contextlib.nullcontext() if allowed else refused:
            if door is predict:
                predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "l.nii.gz", tta=True))
            else:
                given = {"run": str(tmp_path / "r"), "index": str(tmp_path / "s"), "tta": True}
                evaluate.run(build(EvaluateConfig, given))


def test_test_time_augmentation_is_another_label_map(tmp_path, known, monkeypatch, capsys):
    calls, forward = [], Bands.forward
    monkeypatch.setattr(Bands, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    write(tmp_path / "ct.nii.gz")
    predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "x.nii.gz"))
    once = len(calls)
    predict.run(config(tmp_path / "ct.nii.gz", tmp_path / "x.nii.gz", tta=True))
    assert len(calls) == 9 * once and "done before" not in capsys.readouterr().out
    assert np.array_equal(np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj), expected(volume()))
