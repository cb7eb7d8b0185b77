"""A wheel holds all that the doors need: built, installed away from the checkout, and used there."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import train_loop as loop

import pgl_ray
from pgl_ray import shipped

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "pgl_ray", *shipped.FOLDERS]


def files_of(folder: Path) -> set[str]:
    """Paths below a folder of all that is no code."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in files if path.suffix != ".py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", "77", reason="building the wheel needs setuptools>=77")
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(copy), *options], check=True, env=clean())
    return next(out.glob("pgl_ray-*.whl"))


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory) -> Path:
    """A fresh virtual environment with the wheel; the packages that it depends on are this one's."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "-q", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", f"--python={python}", "install", *options, str(wheel)]
    subprocess.run(install, check=True, env=clean())
    (site,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file takes no .pth files of that folder along: this checkout stays out
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def call(home: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([home / "bin" / args[0], *args[1:]], cwd=cwd, env=clean(), capture_output=True, text=True)


def test_every_room_is_packed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pgl_ray").rglob("__init__.py")}
    assert set(setup["packages"]) == rooms | {f"pgl_ray.{name}" for name in shipped.FOLDERS}


def test_the_image_is_built_from_all_that_is_packed():
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (ROOT / "conf/cluster/Dockerfile").read_text(), re.M)
    assert set(SOURCES) <= {name for names in copied for name in names.split()}


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = files_of(ROOT / "pgl_ray")
    wanted |= {f"pgl_ray/{name}" for folder in shipped.FOLDERS for name in files_of(ROOT / folder)}
    assert wanted <= held, sorted(wanted - held)
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "pgl_ray").rglob("*.py")}
    code |= {
        f"pgl_ray/{path.relative_to(ROOT)}" for folder in shipped.FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in held if name.endswith(".py")} == code


def test_the_wheel_says_its_version_and_what_it_needs(wheel):
    """What the shipped weights are read by comes without an extra."""
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert said["Version"] == pgl_ray.__version__ and wheel.name.startswith(f"pgl_ray-{pgl_ray.__version__}-")
    needed = {re.match(r"[\w.-]+", line)[0] for line in said.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "ray", "monai", "zarr", "safetensors"} <= needed and "pydicom" not in needed
    assert "Programming Language :: Python :: 3.13" in said.get_all("Classifier")


@pytest.mark.slow
def test_the_package_away_from_the_checkout_is_the_wheels(home, tmp_path):
    code = "import pgl_ray, sys; print(pgl_ray.__file__); from pgl_ray import shipped; "
    code += "print(shipped.path_of('conf/published.yaml'), shipped.path_of('conf/nothing.yaml'))"
    out = call(home, tmp_path, "python", "-c", code).stdout.split()
    assert Path(out[0]).is_relative_to(home) and Path(out[1]).is_relative_to(home) and out[2] == "None"


@pytest.mark.slow
def test_its_command_lists_doors_and_shows_help(home, tmp_path):
    assert "prepare verify" in call(home, tmp_path, "pgl-ray").stdout
    done = call(home, tmp_path, "pgl-ray", "prepare", "--help")
    assert done.returncode == 0 and done.stdout.startswith("python -m pgl_ray.prepare ")


@pytest.mark.slow
def test_its_recipes_resolve_by_their_names(home, tmp_path):
    done = call(home, tmp_path, "pgl-ray", "prepare", "data_prep/bcv.yaml", "source=nowhere", "store=s")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr, done.stderr


@pytest.mark.slow
def test_its_examples_run(home, tmp_path):
    done = call(home, tmp_path, "python", "-m", "pgl_ray.examples.what_it_sees")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "examples" / "what_it_sees"
    assert {path.name for path in made.glob("*.png")} == {"colours.png", "places.png"}


def test_a_file_here_comes_before_the_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("conf/pretrain.yaml") == str(ROOT / "conf" / "pretrain.yaml")
    assert shipped.find("tune_spaces/nothing.yaml") == "tune_spaces/nothing.yaml"
    assert shipped.find("pretrain.yaml") == "pretrain.yaml" and shipped.find("epochs=3") == "epochs=3"
    assert shipped.find("conf/../pyproject.toml").endswith("pyproject.toml")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "pretrain.yaml").write_text("epochs: 3\n")
    assert shipped.find("conf/pretrain.yaml") == "conf/pretrain.yaml"


@pytest.mark.slow
def test_it_writes_a_report(home, tmp_path):
    config = loop.pretraining(loop.scans(tmp_path / "store"), tmp_path / "run")
    assert loop.train(config) is None
    record = Path(config.run) / "run.json"
    drivers = {"num_parameters": 1, "store": {"num_scans": 6, "labels": {"organ": 1}, "hu_window": [-1024, 325]}}
    record.write_text(json.dumps(json.loads(record.read_text()) | drivers))
    done = call(home, tmp_path, "pgl-ray", "report", f"run={config.run}")
    assert done.returncode == 0, done.stderr
    assert "<svg" in (page := (tmp_path / "run/report.html").read_text()) or "data:image/png" in page


@pytest.mark.cluster
def test_it_prepares_a_store(home, tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (40, 44, 20)).astype(np.int16)
    (tmp_path / "ct").mkdir()
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "ct/a.nii.gz")
    done = call(home, tmp_path, "pgl-ray", "prepare", "source=ct", "store=store")
    assert done.returncode == 0, done.stderr
    done = call(home, tmp_path, "pgl-ray", "inspect", "store=store")
    assert done.returncode == 0 and (tmp_path / "store/inspect.html").is_file(), done.stderr
