"""The examples: cells that a notebook takes, run one after the other at a tiny size, leaving the pictures they name."""

import re
from pathlib import Path

import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "pgl_ray" / "examples"
EXAMPLES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
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


def check_picture(path: Path) -> None:
    """A picture with something in it."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def check_page(path: Path) -> None:
    text = path.read_text()
    assert "<html" in text[:1000] and ("data:image/png" in text or "<svg" in text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_notebook(name):
    """It begins with a title; text is in comments alone; every code cell stands for itself as Python."""
    assert EXAMPLES[name].read_text().startswith("# %% [markdown]\n# # ")
    found = cells(EXAMPLES[name])
    for kind, text in found:
        if kind == "markdown":
            assert all(line.startswith("#") for line in text.strip().splitlines()), text
        else:
            compile(text, name, "exec")
    assert sum(kind == "markdown" for kind, _ in found) >= 3 <= sum(kind == "code" for kind, _ in found)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_reads_of_the_environment(name):
    found = cells(EXAMPLES[name])
    text, code = ("\n".join(text for one, text in found if one == kind) for kind in ("markdown", "code"))
    read = set(re.findall(r'"(PGL_RAY_[A-Z]+)"', code))
    assert read == set(re.findall(r"`(PGL_RAY_[A-Z]+)(?:=1)?`", text))


def test_what_the_encoder_sees(out):
    names = run("what_it_sees")
    first, second = names["scans"]
    assert len(names["matches"]) == 4
    for one in names["matches"]:
        voxel = np.linalg.inv(second.affine) @ [*one.found_mm, 1]
        assert (voxel[:3] > -0.51).all() and (voxel[:3] < np.array(second.voxels.shape) - 0.49).all()
        # two bodies of one kind, in nearly the same place
        assert np.linalg.norm(one.found_mm - one.asked_mm) < 80
    assert not np.array_equal(first.voxels, second.voxels)
    for name in ("colours", "places"):
        check_picture(out / f"{name}.png")


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


@pytest.mark.cluster
def test_a_sweep(ray_cluster, out):
    names = run("sweep")
    assert [row["pretrain.optim.lr"] for row in names["rows"]] == [0.5, 1.5]
    assert max(row["score"] for row in names["rows"]) == pytest.approx(names["swept"].score)
    check_picture(out / "scores.png")
    check_page(out / "sweep/report.html")


@pytest.mark.cluster
def test_on_a_cluster(ray_cluster, out, capsys):
    names = run("cluster")
    assert names["workers"] == 1 and names["trained"].steps == 4
    assert "4 CPUs, 0 GPUs, alive: True" in capsys.readouterr().out
    check_picture(out / "rate.png")
