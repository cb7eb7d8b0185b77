"""evaluate: normalisation, class indices, partial labels and what is written, with a network whose answer is known."""

import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from pgl_ray import cli, evaluate
from pgl_ray.config import EvaluateConfig, FailedRun, InferenceConfig, PrepareConfig, build, load
from pgl_ray.data import scan_files, store
from pgl_ray.files.resample import resample
from pgl_ray.judge import scoring
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import checkpoint, progress
from pgl_ray.train.checkpoint import write_state
from pgl_ray.train.metrics import metrics_path
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.run_files import SCANS, write_json

WINDOW = (-1000.0, 400.0)
LABELS = {"spleen": 3, "liver": 7}  # neither contiguous nor from 1
AFFINE = np.array([[0, 0, -1.5, 90], [0, -2, 0, 80], [3, 0, 0, -400], [0, 0, 0, 1.0]])
HU = {0: -600, 3: 100, 7: 250}


def make_scan(seed, shape):
    """Noise around one HU level per label, some of it beyond the window."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:9, 4:9] = 3
    label[4:8, 10:16, 2:14] = 7
    volume = np.vectorize(HU.get)(label) + rng.integers(-60, 60, shape)
    volume[0] = 3000
    volume[-1] = -2000
    return volume.astype(np.int16), label


@pytest.fixture
def folder(tmp_path):
    """A store of three test scans; b's liver is unlabelled, c has neither organ."""
    for name, shape in (("a", (11, 20, 17)), ("b", (13, 21, 30)), ("c", (10, 19, 18))):
        volume, label = make_scan(len(name), shape)
        labelled = (3, 7)
        if name == "b":
            label[label == 7], labelled = 0, (3,)
        if name == "c":
            volume[1:-1], label[:] = HU[0], 0
        scan_files.write_scan(
            tmp_path / "s", name, volume, AFFINE, label=label, labelled=labelled, split="test", hu_window=WINDOW
        )
    volume, _ = make_scan(9, (9, 9, 9))
    scan_files.write_scan(tmp_path / "s", "d", volume, AFFINE, split="", hu_window=WINDOW)
    store.write_index(tmp_path / "s", LABELS, WINDOW)
    return tmp_path


class Levels(nn.Module):
    """Knows the organs' HU, given the scan's statistics: right only if the volume was normalised as it should."""

    def __init__(self, records):
        super().__init__()
        self.weight, self.records = nn.Parameter(torch.zeros(1)), records
        self.head = SimpleNamespace(out_channels=3)

    def forward(self, x):
        air = [(WINDOW[0] - r.mean_hu) / r.std_hu for r in self.records]
        record = self.records[int(np.argmin([abs(a - x.min().item()) for a in air]))]  # windows hold air
        hu = x * record.std_hu + record.mean_hu
        assert hu.min() >= WINDOW[0] - 0.1 and hu.max() <= WINDOW[1] + 0.1
        spleen, liver = (hu > 0) & (hu < 175), (hu >= 175) & (hu < 350)
        return torch.cat([~spleen & ~liver, spleen, liver], 1).float()


class Nested(Levels):
    """The same as the paper's binary task has it: an organ holds those after it, one output each."""

    def __init__(self, records):
        super().__init__(records)
        self.head = SimpleNamespace(out_channels=2)

    def forward(self, x):
        _, spleen, liver = super().forward(x).split(1, 1)
        return 2 * torch.cat([spleen + liver, liver], 1) - 1


def known_run(monkeypatch, folder, labels=LABELS, window=WINDOW, spacing=None, task="multiclass"):
    monkeypatch.setattr(evaluate, "FORWARD_SIZE", (4, 8, 8))
    records = store.read_index(folder / "s").labelled("test")
    values = {"labels": labels, "task": task, "patch_size": (64, 64, 64), "spacing_mm": spacing}
    meta = CheckpointMeta(encoder={}, hu_window=window, **values)
    network = {"multiclass": Levels, "binary": Nested}[task]
    monkeypatch.setattr(evaluate, "load_segmenter", lambda run, device: (network(records).eval(), meta))


def config(folder, **values):
    (folder / "r").mkdir(exist_ok=True)
    if not (folder / "r/best.pt").exists():
        (folder / "r/best.pt").write_bytes(b"what known_run stands for")
    return build(EvaluateConfig, {"run": str(folder / "r"), "index": str(folder / "s"), **values})


def test_results_are_of_the_network_that_was_loaded(folder, monkeypatch):
    """Which a training beside it replaces while it is read."""
    known_run(monkeypatch, folder)
    load, loads = evaluate.load_segmenter, []

    def replaced(run, device):
        loads.append(Path(run, "best.pt").read_bytes())
        if len(loads) == 1:
            Path(run, "best.pt").write_bytes(b"a better one")
        return load(run, device)

    asked = config(folder)
    monkeypatch.setattr(evaluate, "load_segmenter", replaced)
    evaluate.run(asked)
    identity = json.loads((folder / "r/evaluation" / SCANS).read_text().splitlines()[0])
    assert loads[1:] == [b"a better one"] and identity["checkpoint"] == hashlib.sha256(loads[-1]).hexdigest()


def test_a_half_trained_network_is_named(folder, monkeypatch, capsys):
    known_run(monkeypatch, folder)
    asked = config(folder)
    write_json(folder / "r/run.json", {"door": "finetune", "config": {}, "num_steps": 1000})
    metrics_path(folder / "r").write_text('{"step": 40, "val/dice": 0.2}\n')
    evaluate.run(asked)
    note = f"{folder}/r stands at step 40 of 1,000: it has not been trained to its end"
    assert f"evaluate: note: {note}" in capsys.readouterr().out
    metrics_path(folder / "r").write_text('{"step": 1000, "val/dice": 0.2}\n')
    assert note not in evaluate.run(asked).summary["notes"]


def test_a_network_that_knows_scores_one(folder, monkeypatch, capsys):
    known_run(monkeypatch, folder)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    result = evaluate.run(config(folder))
    rows = {(r["scan_id"], r["organ"]): r for r in pq.read_table(folder / "r/evaluation/metrics.parquet").to_pylist()}
    assert sorted(rows) == [("a", "liver"), ("a", "spleen"), ("b", "spleen"), ("c", "liver"), ("c", "spleen")]
    for key, row in rows.items():
        if key[0] == "c":  # in neither mask
            assert all(math.isnan(row[name]) for name in ("dice", "iou", "hd_mm", "hd95_mm"))
        else:
            assert (row["dice"], row["iou"], row["hd_mm"], row["hd95_mm"]) == (1, 1, 0, 0)
    summary = json.loads((folder / "r/evaluation/summary.json").read_text())
    assert summary == result.summary
    assert (summary["dice"], summary["hd_mm"], summary["num_scans"], summary["split"]) == (1, 0, 3, "test")
    assert summary["organs"]["liver"]["num_scans"] == 1 and summary["organs"]["spleen"]["num_scans"] == 2
    printed = capsys.readouterr().out
    assert (
        "evaluate: 3/3 scans, " in printed
        and ", c: dice " in printed
        and "spleen" in printed
        and "mean of organs" in printed
    )
    assert "mean dice 1.0000 on 3 scans" in evaluate.describe(result)


def test_predictions_are_label_values_on_the_stored_grid(folder, monkeypatch):
    known_run(monkeypatch, folder)
    evaluate.run(config(folder, output=str(folder / "out")))
    assert sorted(p.name for p in (folder / "out/predictions").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    image = nib.load(folder / "out/predictions/a.nii.gz")
    _, label = make_scan(1, (11, 20, 17))
    assert np.array_equal(np.asarray(image.dataobj), label) and image.get_data_dtype() == np.uint8
    assert np.allclose(image.affine, AFFINE)
    predicted = np.asarray(nib.load(folder / "out/predictions/b.nii.gz").dataobj)
    assert 7 in predicted  # predicted, though nobody could score it


def test_a_resampled_scan_is_scored_on_its_own_grid(tmp_path, monkeypatch):
    """The oracle brings the network's answer back with SimpleITK."""
    volume, label = make_scan(1, (11, 20, 17))
    spacing = (4.0, 1.6, 2.2)
    voxels, coarse, affine = resample(volume, label, AFFINE, spacing)
    own = {"source_label": label, "source_affine": AFFINE, "labelled": (3, 7), "split": "test", "hu_window": WINDOW}
    scan_files.write_scan(tmp_path / "s", "a", voxels, affine, label=coarse, **own)
    store.write_index(tmp_path / "s", LABELS, WINDOW, spacing_mm=spacing)
    known_run(monkeypatch, tmp_path, spacing=list(spacing))
    evaluate.run(config(tmp_path))

    def itk(array, matrix):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(np.linalg.norm(matrix[:3, :3], axis=0)[::-1].tolist())
        signs = np.sign(matrix[:3, 2::-1].sum(0))
        assert (matrix[:3, 2::-1] == np.diag(np.diag(matrix[:3, 2::-1]))).all()  # axes W, H, D are x, y, z
        image.SetDirection(np.diag(signs).ravel().tolist())
        image.SetOrigin(matrix[:3, 3].tolist())
        return image

    model, meta = evaluate.load_segmenter("", "cpu")
    windows = meta.task, meta.patch_size
    index = store.read_index(tmp_path / "s")
    ((_, stored, *_),) = scoring.score_scans(model, *windows, index, list(index.scans), InferenceConfig())
    assert stored.shape == voxels.shape
    values = np.array([0, 3, 7], np.uint8)[stored]
    frame = sitk.Transform(), sitk.sitkNearestNeighbor, 0
    true = sitk.GetArrayFromImage(sitk.Resample(itk(values, affine), itk(label, AFFINE), *frame))
    image = nib.load(tmp_path / "r/evaluation/predictions/a.nii.gz")
    predicted = np.asarray(image.dataobj)
    assert np.allclose(image.affine, AFFINE) and predicted.shape == label.shape
    assert np.array_equal(predicted[1:-1, 1:-1, 1:-1], true[1:-1, 1:-1, 1:-1])  # SimpleITK ends at the outer middles
    rows = {row["organ"]: row for row in pq.read_table(tmp_path / "r/evaluation/metrics.parquet").to_pylist()}
    for organ, value in LABELS.items():
        ours, theirs = predicted == value, label == value
        assert 0.5 < rows[organ]["dice"] < 1 and rows[organ]["target_voxels"] == theirs.sum()
        assert rows[organ]["dice"] == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))


def test_a_scan_that_got_a_grid_of_its_own_is_evaluated_again(folder, monkeypatch, capsys):
    known_run(monkeypatch, folder)
    evaluate.run(config(folder))
    volume, label = make_scan(1, (11, 20, 17))
    own = {"source_label": label, "source_affine": AFFINE, "labelled": (3, 7), "split": "test", "hu_window": WINDOW}
    scan_files.write_scan(folder / "s", "a", volume, AFFINE, label=label, **own)
    store.write_index(folder / "s", LABELS, WINDOW)
    capsys.readouterr()
    evaluate.run(config(folder))
    assert "3 scans of split='test' on cpu, 2 of them known already" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["spacing_mm", "hu_window"])
@pytest.mark.parametrize("run_has_it", [True, False])
def test_a_store_prepared_otherwise_is_refused(folder, monkeypatch, key, run_has_it):
    """And what is said to be typed is what prepare takes."""
    values = {"spacing_mm": [(3.0, 2.0, 1.5), None], "hu_window": [(-500.0, 500.0), WINDOW]}[key]
    trained, stored = values if run_has_it else values[::-1]
    known_run(monkeypatch, folder, **({"spacing": trained} if key == "spacing_mm" else {"window": trained}))
    window, spacing = (WINDOW, stored) if key == "spacing_mm" else (stored, None)
    store.write_index(folder / "s", LABELS, window, spacing_mm=spacing)
    lists = [re.escape(str(one and list(one))) for one in (trained, stored)]
    said = rf"was trained with {key} {lists[0]}, index=.* has {lists[1]}: prepare .* another store=\.\.\. with '.*'$"
    with pytest.raises(ValueError, match=said) as caught:
        evaluate.run(config(folder))
    assert getattr(load(PrepareConfig, ["source=a", "store=b", str(caught.value).split("'")[-2]]), key) == trained


def test_a_store_that_was_moved_is_named_where_it_is(folder, monkeypatch):
    known_run(monkeypatch, folder)
    evaluate.run(config(folder))
    (folder / "s").rename(folder / "t")
    assert evaluate.run(config(folder, index=str(folder / "t"))).summary["index"] == str(folder / "t")


def test_an_empty_list_of_scans_is_begun_anew(folder, monkeypatch):
    known_run(monkeypatch, folder)
    (folder / "r/evaluation").mkdir(parents=True)
    (folder / "r/evaluation/scans.jsonl").write_text("")
    assert evaluate.run(config(folder)).summary["num_scans"] == 3


def test_fewer_scans_and_no_predictions(folder, monkeypatch):
    known_run(monkeypatch, folder)
    result = evaluate.run(config(folder, num_scans=1, save_predictions=False))
    assert result.summary["num_scans"] == 1
    assert sorted(p.name for p in (folder / "r/evaluation").iterdir()) == [
        "metrics.parquet",
        "scans.jsonl",
        "summary.json",
    ]


def test_scoring_without_distances_for_validation(folder, monkeypatch):
    known_run(monkeypatch, folder)
    model, meta = evaluate.load_segmenter("", "cpu")
    windows = meta.task, meta.patch_size
    index = store.read_index(folder / "s")
    records = index.labelled("test")
    scored = list(scoring.score_scans(model, *windows, index, records, InferenceConfig(), distances=False))
    assert [s.record.scan_id for s in scored] == ["a", "b", "c"]
    assert scored[0].rows[0]["dice"] == 1 and math.isnan(scored[0].rows[0]["hd_mm"])


@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("binary", 2)])
def test_a_real_segmenter_end_to_end(folder, task, outputs):
    """Random weights: the scores must be those of the written label maps, by hand."""
    torch.manual_seed(0)
    settings = {"depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    model = Segmenter(Encoder(**settings), outputs)
    model.head.bias.data = torch.tensor({"multiclass": [0.0, 0, 0], "binary": [100.0, 0]}[task])
    meta = {"door": "finetune", "encoder": settings, "hu_window": list(WINDOW), "labels": LABELS, "task": task}
    meta |= {"patch_size": [12, 24, 24], "num_outputs": outputs}
    (folder / "r").mkdir()
    write_state(folder / "r/best.pt", {"model": model.state_dict(), "meta": meta, "step": 1, "val_dice": 0.0})
    summary = evaluate.run(config(folder, inference={"batch_size": 4, "device": "cpu"})).summary
    assert summary["forward_ms"] > 0 and summary["device"] == "cpu"
    index = store.read_index(folder / "s")
    values = np.unique(nib.load(folder / "r/evaluation/predictions/a.nii.gz").dataobj).tolist()
    assert values in {"multiclass": ([0, 3], [0, 7], [0, 3, 7]), "binary": ([3, 7],)}[task]  # softmax, or sigmoids
    for row in pq.read_table(folder / "r/evaluation/metrics.parquet").to_pylist():
        record = next(r for r in index.scans if r.scan_id == row["scan_id"])
        predicted = np.asarray(nib.load(folder / f"r/evaluation/predictions/{row['scan_id']}.nii.gz").dataobj)
        wanted = scan_files.open_label(folder / "s", record).read([(0, n) for n in record.shape])
        value = LABELS[row["organ"]]
        if task == "binary":
            a, b = predicted >= value, wanted >= value
        else:
            a, b = predicted == value, wanted == value
        if (a | b).any():
            assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        else:
            assert math.isnan(row["dice"])


def test_what_was_evaluated_is_not_evaluated_again(folder, monkeypatch):
    """Interrupted after a scan, continued, repeated, another network, fewer scans; no prediction of another is left."""
    known_run(monkeypatch, folder)
    segmented, segment = [], scoring.segment

    def counted(model, volume, *args, **options):
        segmented.append(volume.shape)
        if len(segmented) == 2:
            raise KeyboardInterrupt
        return segment(model, volume, *args, **options)

    monkeypatch.setattr(scoring, "segment", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config(folder))
    out = folder / "r/evaluation"
    with (out / "scans.jsonl").open("a") as file:
        file.write('{"scan_id": "b", "ro')  # killed while writing
    first = evaluate.run(config(folder)).summary
    assert segmented == [(11, 20, 17), (13, 21, 30), (13, 21, 30), (10, 19, 18)]
    assert evaluate.run(config(folder)).summary == first and len(segmented) == 4
    assert evaluate.run(config(folder, seed=5)).summary["seed"] == 5  # other draws for the intervals, no network
    assert evaluate.run(config(folder)).summary == first and len(segmented) == 4
    assert pq.read_table(out / "metrics.parquet").num_rows == 5

    evaluate.run(config(folder, num_scans=1))
    assert pq.read_table(out / "metrics.parquet").num_rows == 2 and len(segmented) == 4
    assert sorted(p.name for p in (out / "predictions").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert (
        evaluate.run(config(folder)).summary["num_scans"] == 3 and len(segmented) == 4
    )  # what was finished has stayed
    assert evaluate.run(config(folder, save_predictions=False)).summary["num_scans"] == 3 and len(segmented) == 4
    (out / "predictions/b.nii.gz").unlink()
    evaluate.run(config(folder))
    assert segmented[4:] == [(13, 21, 30)] and (out / "predictions/b.nii.gz").exists()
    (folder / "r/best.pt").write_bytes(b"another network")
    monkeypatch.setattr(evaluate, "_write_prediction", lambda *_: None)
    evaluate.run(config(folder))
    assert len(segmented) == 8 and not list((out / "predictions").iterdir())
    evaluate.run(config(folder, inference={"overlap": 0.25}))
    assert len(segmented) == 11
    assert not [p for p in out.rglob("*") if ".part" in p.name]


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"summary.json": b'{"mean": 0.9}'},  # nnU-Net's, and scripts'
        {"summary.json": b"[]"},
        {"summary.json": b"not JSON"},
        {"scans.jsonl": b'{"scan": "a"}\n'},
        {"scans.jsonl": b'["a"]\n', "metrics.parquet": b"PAR1"},
    ],
)
def test_predictions_of_something_else_stay(folder, monkeypatch, beside):
    known_run(monkeypatch, folder)
    files = {"predictions/x.nii.gz": b"x", "predictions/a.nii.gz": b"a", **beside}
    (folder / "mine/predictions").mkdir(parents=True)
    for name, content in files.items():
        (folder / "mine" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^output=.*mine holds .*, which is not of an evaluation: choose another out"):
        evaluate.run(config(folder, output=str(folder / "mine")))
    assert {name: (folder / "mine" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("name", ["summary.json", "metrics.parquet", "scans.jsonl"])
def test_a_file_of_an_evaluations_name_is_not_replaced(folder, monkeypatch, name):
    known_run(monkeypatch, folder)
    (folder / "mine").mkdir()
    (folder / "mine" / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"mine holds {name}, which is not of an evaluation"):
        evaluate.run(config(folder, output=str(folder / "mine")))
    assert (folder / "mine" / name).read_bytes() == b"mine"


def test_what_was_laid_beside_an_evaluation_stays(folder, monkeypatch):
    known_run(monkeypatch, folder)
    evaluate.run(config(folder))
    out = folder / "r/evaluation"
    for name in ("predictions/by_hand.nii.gz", "compare_readers.json"):
        (out / name).write_bytes(b"{}")
    (folder / "r/best.pt").write_bytes(b"another network")
    evaluate.run(config(folder))
    assert (out / "predictions/by_hand.nii.gz").exists() and (out / "compare_readers.json").exists()
    (out / "scans.jsonl").unlink()  # as of versions before it
    (out / "predictions/c.nii.gz").write_bytes(b"an earlier one's")
    evaluate.run(config(folder, save_predictions=False, num_scans=1))
    assert sorted(path.name for path in (out / "predictions").iterdir()) == ["by_hand.nii.gz"]


def test_too_little_memory_names_the_scan_and_what_to_change(folder, monkeypatch):
    known_run(monkeypatch, folder)

    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Levels, "forward", full)
    with pytest.raises(FailedRun, match=r"scan a: the memory of cpu does not hold .* take inference.batch_size=4"):
        evaluate.run(config(folder, inference={"batch_size": 8}))


def test_memory_that_numpy_lacks_is_one_line_too(folder, monkeypatch):
    """Its error carries a shape and a type instead of a text."""
    known_run(monkeypatch, folder)

    def full(*_, **__):
        raise np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(np.float32))

    monkeypatch.setattr(scoring, "segment", full)
    with pytest.raises(FailedRun, match="Unable to allocate"):
        evaluate.run(config(folder))


def test_two_runs_are_compared_on_the_same_scans(folder, monkeypatch, capsys):
    known_run(monkeypatch, folder)
    other = folder / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="other is no fine-tuning run and holds no evaluation"):
        evaluate.run(config(folder, compare=str(other)))
    evaluate.run(config(folder))
    rows = pq.read_table(folder / "r/evaluation/metrics.parquet").to_pylist()
    for row in rows:
        row["dice"] = {"a": 0.5, "b": 0.75}.get(row["scan_id"], math.nan)
    pq.write_table(pa.Table.from_pylist(rows), other / "metrics.parquet")
    evaluate.run(config(folder, compare=str(other)))
    compared = json.loads((folder / f"r/evaluation/compare_{folder.name}_other.json").read_text())
    assert compared["organs"]["spleen"]["dice"]["difference"] == pytest.approx((0.5 + 0.25) / 2)
    assert compared["dice"]["num_scans"] == 2 and compared["dice"]["p"] == 0.5
    printed = capsys.readouterr().out
    assert "r minus other" in printed and "with 2 scans it is at least 0.5" in printed
    assert "left out" not in printed  # c has neither organ in either run
    rows[0] |= {"dice": math.nan, "hd95_mm": math.nan}  # a's first organ is scored in one of them alone
    rows[1] |= {"hd95_mm": math.nan}
    pq.write_table(pa.Table.from_pylist(rows), other / "metrics.parquet")
    evaluate.run(config(folder, compare=str(other)))
    said = "left out, for one of the two has no score: dice 1, hd95_mm 2 (pairs of scan and organ)"
    assert said in capsys.readouterr().out
    pq.write_table(pa.Table.from_pylist(rows[:1]), other / "metrics.parquet")
    with pytest.raises(ValueError, match="evaluated on 1 scans, 0 of which are not among the 3"):
        evaluate.run(config(folder, compare=str(other)))


@pytest.mark.parametrize(
    "theirs, said", [({"tta": True}, "tta=True"), ({"inference": {"overlap": 0.1}}, "overlap=0.1")]
)
def test_what_is_compared_was_made_alike(folder, monkeypatch, theirs, said):
    """Else flips, overlap or further training would pass for a difference of the networks."""
    known_run(monkeypatch, folder)
    other = folder / "other"
    other.mkdir()
    (other / "best.pt").write_bytes(b"theirs")
    evaluate.run(config(folder, run=str(other), **theirs))
    with pytest.raises(
        ValueError, match=f"compare=.*other was evaluated with {said}, here .*: evaluate both with one .*{said[:3]}"
    ):
        evaluate.run(config(folder, compare=str(other)))
    evaluate.run(config(folder, compare=str(other), **theirs))
    evaluate.run(config(folder, run=str(other)))
    evaluate.run(config(folder, compare=str(other)))
    (other / "best.pt").write_bytes(b"trained on")
    with pytest.raises(ValueError, match=r"other has been trained on since its evaluation: python -m pgl_ray.evaluate"):
        evaluate.run(config(folder, compare=str(other)))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "does not exist: give the folder of a fine-tuning run, or of an evaluation"),
        ({}, "is no fine-tuning run and holds no evaluation: give one of the two"),
        ({"notes.txt": "x"}, "is no fine-tuning run and holds no evaluation: give one of the two"),
        (
            {"run.json": '{"door": "pretrain"}'},
            "is a pretrain run, of which there is no evaluation: give a fine-tuning",
        ),
        ({"run.json": '{"door": "finetune"}'}, "is not evaluated: python -m pgl_ray.evaluate run="),
        ({"best.pt": "x"}, "is not evaluated: python -m pgl_ray.evaluate run="),
    ],
)
def test_what_cannot_be_compared_with_is_named(folder, monkeypatch, files, said):
    known_run(monkeypatch, folder)
    for name, content in (files or {}).items():
        (folder / "other").mkdir(exist_ok=True)
        (folder / "other" / name).write_text(content)
    if files == {}:
        (folder / "other").mkdir()
    with pytest.raises(ValueError, match=f"^compare={folder}/other {said}"):
        evaluate.run(config(folder, compare=str(folder / "other")))
    assert not (folder / "r/evaluation").exists()


@pytest.mark.parametrize("differs", ["task", "labels"])
def test_scores_on_different_labels_are_not_compared(folder, monkeypatch, differs):
    """Of a task in which an organ holds others, or corrected since; evaluated again alike, both are compared."""
    known_run(monkeypatch, folder)
    other = folder / "other"
    other.mkdir()
    (other / "best.pt").write_bytes(b"theirs")
    evaluate.run(config(folder, run=str(other)))
    if differs == "labels":
        volume, label = make_scan(1, (11, 20, 17))
        label[5, 3:9, 4:9] = 0
        own = {"label": label, "labelled": (3, 7), "split": "test", "hu_window": WINDOW}
        scan_files.write_scan(folder / "s", "a", volume, AFFINE, **own)
        store.write_index(folder / "s", LABELS, WINDOW)
    known_run(monkeypatch, folder, task="binary" if differs == "task" else "multiclass")
    said = r"^compare=.*other was scored on other labels of spleen in scan a \(.*\): evaluate both again, alike$"
    with pytest.raises(ValueError, match=said):
        evaluate.run(config(folder, compare=str(other)))
    out = folder / "r/evaluation"
    assert (out / "summary.json").exists() and not list(out.glob("compare_*"))
    (other / "best.pt").write_bytes(b"theirs, of the same task")
    evaluate.run(config(folder, run=str(other)))
    evaluate.run(config(folder, compare=str(other)))
    assert len(list(out.glob("compare_*"))) == 1


@pytest.mark.parametrize(
    "values, known, message",
    [
        ({"split": "val"}, {}, r"no labelled scan in split='val'.*\['test'\]"),
        ({}, {"labels": {"spleen": 3}}, r"trained with labels \{'spleen': 3\}.*'liver': 7"),
        ({}, {"window": (-1024, 325)}, r"trained with hu_window \[-1024.0, 325.0\].*\[-1000.0, 400.0\]"),
        ({"index": "nowhere"}, {}, "nowhere"),
    ],
)
def test_wrong_use_is_one_clear_line(folder, monkeypatch, values, known, message):
    known_run(monkeypatch, folder, **known)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.run(config(folder, **values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["best.pt", "checkpoint_00000002"])
def test_one_checkpoint_is_no_place_for_results(folder, monkeypatch, name):
    """A later checkpoint removes an earlier one's folder with all that lies in it."""
    known_run(monkeypatch, folder)
    run = config(folder).run
    checkpoint.write_checkpoint(Path(run), 2, {}, {})
    given = config(folder, run=f"{run}/{name}")
    with pytest.raises(ValueError, match=rf"run=.*{name} is one checkpoint: give output=FOLDER"):
        evaluate.run(given)
    evaluate.run(given.model_copy(update={"output": str(folder / "out")}))
    assert (folder / "out" / "summary.json").exists() and not (Path(run) / "evaluation").exists()


def test_an_index_without_labels(folder, monkeypatch):
    known_run(monkeypatch, folder)
    volume, _ = make_scan(0, (9, 9, 9))
    scan_files.write_scan(folder / "bare", "x", volume, AFFINE, split="test", hu_window=WINDOW)
    store.write_index(folder / "bare", {}, WINDOW)
    with pytest.raises(ValueError, match="holds no labels: prepare it"):
        evaluate.run(config(folder, index=str(folder / "bare")))


def test_command_line_exit_code(folder, capsys):
    with pytest.raises(SystemExit) as error:
        cli.call("evaluate", [f"run={folder / 'none'}", f"index={folder / 's'}", "inference.device=cpu"])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "none" in lines[0]
