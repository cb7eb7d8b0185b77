"""What a release says of itself is said alike everywhere: version, licence, Pythons, and that CI runs what we run."""

import re
import tomllib
from pathlib import Path

import yaml

import pgl_ray

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / name).read_text())


def test_every_file_says_the_same_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pgl_ray.__version__)
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert read("CITATION.cff")["version"] == pgl_ray.__version__
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / ".github/CHANGELOG.md").read_text(), re.M)
    assert newest[1] == pgl_ray.__version__ and newest[2] == str(read("CITATION.cff")["date-released"])


def test_the_citation_is_whole():
    """The fields that CFF 1.2.0 asks for, and the paper's authors."""
    cited = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["license"] == PROJECT["license"]
    (paper,) = cited["references"]
    assert [one["family-names"] for one in paper["authors"]] == ["Xie", "Zhang", "Liao", "Xia", "Shen"]


def test_supported_pythons_are_those_that_ci_tries():
    said = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    job = read("workflows/ci.yml")["jobs"]["test"]
    assert said == job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={said[0]},<3.{int(said[-1].split('.')[1]) + 1}"
    for name in ("README.md", "constraints.txt"):
        assert re.search(
            rf"Python {re.escape(said[0])} to {re.escape(said[-1])}|Python 3\.11-3\.13", (ROOT / name).read_text()
        )
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_extras_that_readmes_name_are_there():
    extras = PROJECT["optional-dependencies"].keys()
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"), ROOT / "Makefile", ROOT / "conf/cluster/Dockerfile"]
    pages += [*ROOT.glob("pgl_ray/**/*.py")]
    named = {
        name
        for page in pages
        if ".venv" not in page.parts
        for group in re.findall(r"(?:\.|pgl_ray)\[([a-z,]+)\]'", page.read_text())
        for name in group.split(",")
    }
    assert {"dicom", "test"} <= named <= extras
