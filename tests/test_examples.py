"""The examples: cells that a notebook takes, run one after the other at a tiny size, leaving the pictures they name."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import ray
import SimpleITK as sitk
import torch
from test_nnunet import WINDOW, exported

from pgl_ray import api, export
from pgl_ray.config import ExportConfig
from pgl_ray.data import scan_files, store
from pgl_ray.files.ct import read_scan
from pgl_ray.model.encoder import build_encoder
from pgl_ray.phantom.phantom import ORGANS, make_phantom
from pgl_ray.train import launch

FOLDER = Path(__file__).resolve().parents[1] / "pgl_ray" / "examples"
EXAMPLES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
KEYS_SHOWN = ("orientation", "normalisation", "median_spacing_mm")  # of a file of weights, by nnunet_dataset
MARKER = re.compile(r"^# %%( \[markdown\])?$", re.M)


def cells(path: Path) -> list[tuple[str, str]]:
    """Kind and text of a percent script's cells, as editors and jupytext split it."""
    _, *parts = MARKER.split(path.read_text())
    return [("markdown" if kind else "code", text) for kind, text in zip(parts[::2], parts[1::2])]


def run(name: str) -> dict:
    """Runs the code cells as a notebook does, and gives what they define."""
    names = {"__name__": "__main__"}
    for number, (kind, text) in enumerate(cells(EXAMPLES[name])):
        if kind == "code":
            exec(compile(text, f"{name}, cell {number}", "exec"), names)
    return names


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where an example writes, at a tiny size, and nothing of it elsewhere."""
    monkeypatch.setenv("PGL_RAY_TINY", "1")
    monkeypatch.setenv("PGL_RAY_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    threads, backend = torch.get_num_threads(), matplotlib.get_backend()
    torch.set_num_threads(1)
    plt.switch_backend("agg")
    yield tmp_path / "out"
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> str:
    """A store of three phantoms, one of them of split test, made without Ray."""
    folder = tmp_path_factory.mktemp("phantoms")
    affine = np.array([[0, 0, -3.5, 0], [0, -3.5, 0, 0], [6.0, 0, 0, 0], [0, 0, 0, 1]])
    for number, split in enumerate(("train", "train", "test")):
        one = make_phantom(number, (40, 96, 96), (6.0, 3.5, 3.5))
        known = {"label": one.label, "labelled": tuple(ORGANS.values())}
        scan_files.write_scan(folder, f"phantom_{number}", one.volume, affine, split=split, **known)
    store.write_index(folder, dict(ORGANS), (-1024.0, 325.0))
    return str(folder)


def check_picture(path: Path) -> None:
    """A picture with something in it."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def check_page(path: Path) -> None:
    text = path.read_text()
    assert "<html" in text[:1000] and ('src="data:image/' in text or "<svg" in text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_notebook(name):
    """It begins with a title; text is in comments alone; every code cell stands for itself as Python."""
    assert EXAMPLES[name].read_text().startswith("# %% [markdown]\n# # ")
    blocks = cells(EXAMPLES[name])
    for kind, text in blocks:
        if kind == "markdown":
            assert all(line.startswith("#") for line in text.strip().splitlines()), text
        else:
            compile(text, name, "exec")
    assert sum(kind == "markdown" for kind, _ in blocks) >= 3 <= sum(kind == "code" for kind, _ in blocks)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_reads_of_the_environment(name):
    blocks = cells(EXAMPLES[name])
    text, code = ("\n".join(text for one, text in blocks if one == kind) for kind in ("markdown", "code"))
    read = set(re.findall(r'"(PGL_RAY_[A-Z]+)"', code))
    assert read == set(re.findall(r"`(PGL_RAY_[A-Z]+)(?:=1)?`", text))


class OnGpu(torch.Tensor):
    """A tensor that NumPy, and so Matplotlib, cannot read before it is brought to the CPU."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.slow
def test_what_the_encoder_sees(out, monkeypatch):
    dense = api.dense_features

    def far(*args):
        return [replace(one, values=one.values.as_subclass(OnGpu)) for one in dense(*args)]

    monkeypatch.setattr(api, "dense_features", far)
    names = run("what_it_sees")
    first, second = names["scans"]
    assert len(names["matches"]) == 4
    for one in names["matches"]:
        voxel = np.linalg.inv(second.affine) @ [*one.matched_mm, 1]
        assert (voxel[:3] > -0.51).all() and (voxel[:3] < np.array(second.voxels.shape) - 0.49).all()
        # two bodies of one kind, in nearly the same place
        assert np.linalg.norm(one.matched_mm - one.asked_mm) < 80
    assert not np.array_equal(first.voxels, second.voxels)
    for name in ("colours", "places"):
        check_picture(out / f"{name}.png")
    for key, path in zip("AB", names["paths"]):  # one's own, in a folder that is new
        monkeypatch.setenv(f"PGL_RAY_{key}", path)
    monkeypatch.setenv("PGL_RAY_OUT", str(out / "new"))
    run("what_it_sees")
    check_picture(out / "new" / "places.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nvImageCodec:UserWarning")  # MONAI asks for every reader that there may be
@pytest.mark.filterwarnings("ignore:unlike the scans:UserWarning")  # phantoms for weights of heads and necks
@pytest.mark.parametrize("size", ["shipped", "paper"])
def test_monai_takes_the_weights_and_trains(tmp_path_factory, out, monkeypatch, size):
    if size == "paper":
        encoder, file = build_encoder(), tmp_path_factory.mktemp("given") / "encoder.safetensors"
        meta = {"door": "pretrain", "method": "pgl", "encoder": encoder.settings, "level": 4}
        meta |= {"hu_window": [-1024.0, 325.0], "config": json.dumps({"views": {"size": [8, 32, 32]}})}
        weights = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
        torch.save({"model": weights, "meta": meta}, file.with_name("run.pt"))
        export.run(ExportConfig(run=str(file.with_name("run.pt")), output=str(file)))
        monkeypatch.setenv("PGL_RAY_FILE", str(file))
    names = run("monai_training")
    # zero keys missing and none too many: MONAI's own network has exactly those of the file
    assert str(names["loaded"]) == "<All keys matched successfully>"
    assert names["weights"].keys() == names["encoder"].state_dict().keys()
    num = sum(one.numel() for one in names["encoder"].parameters())
    assert num == (46_155_072 if size == "paper" else 264_104)
    assert len(names["losses"]) == 2 and np.isfinite(names["losses"]).all()
    check_picture(out / "monai.png")
    # what MONAI makes of a scan is what the loader of pgl_ray makes of it
    network, expected = export.load(names["FILE"])
    scan = read_scan(str(names["cases"]("Ts")[0]["image"]))
    ours, theirs = expected.prepare(scan.voxels, scan.affine), names["case"]["image"]
    np.testing.assert_allclose(theirs, ours[0], atol=1e-3)
    # and its strides are those of pre-training
    maps = [stage[0].conv2.stride for stage in names["stages"]]
    assert maps == [stage[0].conv2.stride for stage in (network.layer1, network.layer2, network.layer3, network.layer4)]


def test_the_training_script_has_40_lines():
    (text,) = (text for _, text in cells(EXAMPLES["monai_training"]) if "optimizer.step()" in text)
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_nnunet_sees_scans_as_in_pre_training(tmp_path_factory, out, monkeypatch, capsys, codes):
    """SimpleITK's array, standardised as its ZScoreNormalization does, beside what a store's scan would be."""
    home = tmp_path_factory.mktemp("given")
    file, _ = exported(home, [1, 1, 1], 2)
    cts, rng = home / "cts", np.random.default_rng(0)
    affine = np.diag([-0.8, -0.9, 3.0, 1])
    for folder in ("imagesTr", "labelsTr"):
        (cts / folder).mkdir(parents=True)
    own = nib.Nifti1Image(rng.integers(-2000, 2000, (30, 26, 12)).astype(np.int16), affine)
    to = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    nib.save(own.as_reoriented(to), cts / "imagesTr/a_0000.nii.gz")
    label = nib.Nifti1Image((np.asarray(own.dataobj) > 0).astype(np.uint8), affine)
    nib.save(label.as_reoriented(to), cts / "labelsTr/a.nii.gz")
    (cts / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}))
    monkeypatch.setenv("PGL_RAY_FILE", str(file))
    monkeypatch.setenv("PGL_RAY_CTS", str(cts))
    run("nnunet_dataset")
    said = capsys.readouterr().out
    assert f"nnUNetv2_preprocess_like_nnssl -d 7 -n pgl -pc {file} -am like_pretrained" in said
    image = sitk.ReadImage(out / "Dataset007_PGL/imagesTr/a_0000.nii.gz")
    seen = sitk.GetArrayFromImage(image).astype(np.float32)
    seen = (seen - seen.mean()) / max(seen.std(), 1e-8)
    scan = read_scan(str(cts / "imagesTr/a_0000.nii.gz"))
    clipped = np.clip(scan.voxels.astype(np.float64), *WINDOW)
    np.testing.assert_allclose(seen, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing()[::-1], scan.spacing_mm, rtol=1e-6)
    stored = sitk.GetArrayFromImage(sitk.ReadImage(out / "Dataset007_PGL/labelsTr/a.nii.gz"))
    assert np.array_equal(stored, scan.voxels > 0)
    assert json.loads((out / "Dataset007_PGL/dataset.json").read_text())["numTraining"] == 1
    check_picture(out / "values.png")


def given_cts(folder: Path, names: str, organ: str) -> str:
    """CTs of noise in nnU-Net's folders, with one organ."""
    for name in names:
        for part, file in (("imagesTr", f"{name}_0000"), ("labelsTr", name)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(ord(name)).integers(0, 2, (12, 12, 12)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / part / f"{file}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, organ: 1}, "file_ending": ".nii.gz"}))
    return str(folder)


def test_nnunet_never_gets_cases_of_two_sources(tmp_path_factory, out, monkeypatch):
    """The same source again may grow; what another left there is neither kept beside it nor touched."""
    home = tmp_path_factory.mktemp("given")
    torch.save({"metadata": {"hu_window": "[-1024.0, 325.0]"} | dict.fromkeys(KEYS_SHOWN, "")}, home / "e.pth")
    monkeypatch.setenv("PGL_RAY_FILE", str(home / "e.pth"))
    target = out / "Dataset007_PGL"
    for names in ("a", "ab"):
        monkeypatch.setenv("PGL_RAY_CTS", given_cts(home / "first", names, "liver"))
        run("nnunet_dataset")
        assert {path.name for path in (target / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in names}
        assert json.loads((target / "dataset.json").read_text())["numTraining"] == len(names)
    left = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    monkeypatch.setenv("PGL_RAY_CTS", given_cts(home / "second", "bc", "spleen"))
    with pytest.raises(SystemExit, match=r"holds 2 files of other scans .*: choose another PGL_RAY_OUT, or delete"):
        run("nnunet_dataset")
    assert left == {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_a_file_for_nnunet_is_asked_for(out):
    with pytest.raises(SystemExit, match=r"PGL_RAY_FILE=encoder\.pth is needed"):
        run("nnunet_dataset")
    out.mkdir()


@pytest.mark.cluster
def test_from_your_own_folder_to_an_encoder(ray_cluster, out):
    names = run("own_folder")
    assert names["trained"].steps == 3 and len(names["store"].scans) == 3
    for name in ("views", "loss"):
        check_picture(out / f"{name}.png")
    check_page(out / "store/inspect.html")
    check_page(out / "run/report.html")


@pytest.mark.cluster
def test_organs_from_few_labels(ray_cluster, out):
    names = run("few_labels")
    assert list(names["runs"]) == ["pretrained"] and names["evaluated"].summary["num_scans"] == 1
    check_picture(out / "organs.png")
    check_page(out / "report.html")
    check_page(out / "pretrained.html")


@pytest.mark.soak  # tests/test_pipeline.py runs another one
def test_a_sweep(ray_cluster, phantoms, out, monkeypatch):
    monkeypatch.setenv("PGL_RAY_STORE", phantoms)
    names = run("sweep")
    assert [(row["pretrain.optim.lr"], row["state"]) for row in names["rows"]] == [(1.5, "done")]
    assert names["rows"][0]["score"] == pytest.approx(names["swept"].score) and 0 < names["swept"].score < 1
    assert names["swept"].best == {"pretrain.optim.lr": 1.5}
    check_picture(out / "scores.png")
    said = rf"Best: [^<]*1\.5, probe/balanced_accuracy {names['swept'].score:.4f}"
    assert re.search(said, (out / "sweep/report.html").read_text())


@pytest.mark.parametrize("given", [{}, {"PGL_RAY_OUT": "mine/out"}, {"PGL_RAY_STORE": "/data/store"}])
def test_a_jobs_copy_is_no_place_for_what_it_trains(tmp_path, monkeypatch, given):
    """A job's working directory is removed with all that lies there: nothing is begun in it."""
    job = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    for name in ("PGL_RAY_OUT", "PGL_RAY_STORE", "PGL_RAY_TINY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "connect", lambda config: None)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ValueError, match="copy that is removed: give an absolute path"):
        run("cluster")
    assert list(job.iterdir()) == []


def test_a_jobs_command_brings_its_settings():
    """A job's environment is the head's, so what is set for it stands behind `--`, with absolute paths."""
    sent = [
        (name, shlex.split(command))
        for name, path in EXAMPLES.items()
        for command in re.findall(r"`ray job submit ([^`]*)`", path.read_text().replace("\n# ", " "))
    ]
    assert {name for name, _ in sent} == {"cluster"}
    for name, words in sent:
        behind = words[words.index("--") + 1 :]
        start = behind.index("python")
        settings = dict(word.split("=") for word in behind[1:start])
        assert behind[0] == "env" and behind[start:] == ["python", "-m", f"pgl_ray.examples.{name}"]
        assert set(settings) == {"PGL_RAY_STORE", "PGL_RAY_OUT"}
        assert all(Path(value).is_absolute() for value in settings.values())


@pytest.mark.soak
def test_on_a_cluster(ray_cluster, phantoms, out, monkeypatch, capsys):
    monkeypatch.setenv("PGL_RAY_STORE", phantoms)
    names = run("cluster")
    assert names["workers"] == 1 and names["trained"].steps == 4
    assert "4 CPUs, 0 GPUs, alive: True" in capsys.readouterr().out
    check_picture(out / "rate.png")
