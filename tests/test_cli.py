"""The command line: texts and refusals come without torch, help says what the models say, every door is found."""

import contextlib
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from pgl_ray import cli, knobs
from pgl_ray import config as c
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import write_index

HEAVY = ("torch", "monai", "matplotlib", "ray", "zarr", "numba", "nibabel")
# Runs `python -m MODULE` with each list of arguments, every module in a fork of a process that has the command line
# alone; each one's last line: codes, and what was imported.
LIGHT = """
import json, os, runpy, sys
from pgl_ray import cli
def run(module, calls):
    codes = []
    for arguments in calls:
        sys.argv = [module, *arguments]
        try:
            codes.append(runpy.run_module(module, run_name="__main__") and 0)
        except SystemExit as stop:
            codes.append(stop.code)
    print(json.dumps([codes, [name for name in HEAVY if name in sys.modules]]), flush=True)
for module, calls in JOBS.items():
    if not os.fork():
        for stream, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{FOLDER}/{module}.{end}", os.O_CREAT | os.O_WRONLY), stream)
        run(module, calls)
        os._exit(0)
    os.wait()
"""
REQUIRED = {"index": "s", "run": "r", "source": "s", "store": "s", "input": "i", "output": "o"}
REQUIRED |= {"init": "w", "a": "a", "b": "b"}
ONE_OF = {c.EmbedConfig: ["input=i"]}  # of several keys one must be given
NOWHERE = "/no/such/store"
MODULES = sorted({door.split()[0] for door in cli.DOORS})


def started(folder: Path, jobs: dict[str, list[list[str]]]) -> dict[str, tuple[list[int], list[str], str, list[str]]]:
    """Per module: codes of its calls, heavy modules that were imported, output, and lines of errors."""
    code = f"JOBS, HEAVY, FOLDER = {jobs!r}, {HEAVY!r}, {str(folder)!r}\n{LIGHT}"
    subprocess.run([sys.executable, "-c", code], check=True)
    doors = {}
    for module in jobs:
        *out, last = (folder / f"{module}.out").read_text().splitlines()
        doors[module] = (*json.loads(last), "\n".join(out), (folder / f"{module}.err").read_text().splitlines())
    return doors


def minimal(model: type[c.Section]) -> list[str]:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return [*(f"{name}={REQUIRED[name]}" for name in required), *ONE_OF.get(model, [])]


# -- light -------------------------------------------------------------------------------------------------------------


def wrong_uses(module: str) -> list[tuple[list[str], str]]:
    """A wrong key, and a store that is missing, and what is said of them."""
    uses = []
    for door in (door for door in cli.DOORS if door.split()[0] == module):
        verb, needed = door.split()[1:], minimal(cli.DOORS[door].model)
        said = f"pgl_ray.{door}: unknown key 'no_such_key'; known here: "
        uses.append(([*verb, *needed, "no_such_key=1"], said))
        for key in cli.DOORS[door].stores:
            others = [arg for arg in needed if arg.split("=")[0] != key]
            said = f"pgl_ray.{door}: '{NOWHERE}' is not a store (no store.json): make one with"
            uses.append(([*verb, *others, f"{key}={NOWHERE}"], said))
    return uses


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of help of both kinds and wrong use of every module, and of the package's own name."""
    jobs = {
        f"pgl_ray.{module}": [["--help"], ["--help-all"], *(use for use, _ in wrong_uses(module))] for module in MODULES
    }
    return started(tmp_path_factory.mktemp("answers"), jobs | {"pgl_ray": [[]]})


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_texts_and_refusals_take_nothing_heavy(module, answers):
    """Help of both kinds, a wrong key, and a store that is missing."""
    codes, heavy, out, errors = answers[f"pgl_ray.{module}"]
    said = [text for _, text in wrong_uses(module)]
    assert heavy == [] and codes == [0, 0] + [2] * len(said)
    assert out.startswith(f"python -m pgl_ray.{module} [file.yaml ...]")
    assert len(errors) == len(said) and all(map(str.startswith, errors, said)), errors


def test_every_door_that_reads_a_store_says_so():
    """Fields that hold a store's place are those of the type; prepare makes its own."""
    for door, known in cli.DOORS.items():
        keys = tuple(name for name in known.model.model_fields if name in ("index", "store"))
        assert known.stores == (() if door == "prepare" else keys), door


# -- the list of doors -------------------------------------------------------------------------------------------------


def test_the_package_lists_its_doors(answers):
    codes, heavy, out, _ = answers["pgl_ray"]
    assert (codes, heavy) == ([0], [])
    for door, known in cli.DOORS.items():
        assert re.search(rf"^  {door} +\S", out, re.M)
        assert " ".join(known.model.__doc__.split()) in " ".join(out.split())


def test_a_door_is_called_by_the_packages_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pgl-ray", "export", "run=nowhere"])
    with pytest.raises(SystemExit) as stop:
        cli.console()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("pgl_ray.export: output=... is required")
    monkeypatch.setattr(sys, "argv", ["pgl-ray", "prepare", "verify", "--help"])
    cli.console()
    assert capsys.readouterr().out.startswith("python -m pgl_ray.prepare verify ")


@pytest.mark.parametrize("word", ["pretrian", "index=here", "conf/pretrain.yaml", "verify"])
def test_what_is_no_door_is_refused(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pgl-ray", word])
    with pytest.raises(SystemExit) as stop:
        cli.console()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and repr(word) in err and "pretrain" in err and err.count("\n") == 1


def test_debug_adds_the_traceback(capsys):
    for args, expected in ((["nonsense"], False), (["--debug", "nonsense"], True)):
        with pytest.raises(SystemExit):
            cli.call("report", args)
        assert ("Traceback" in capsys.readouterr().err) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_a_door_is_imported_without_looks_for_garbage(fails, monkeypatch, capsys):
    seen = []

    def imported(name):
        seen.append((name, gc.isenabled()))
        if fails:
            raise ImportError("no torch")
        return SimpleNamespace(run=lambda config: seen.append(gc.isenabled()), describe=lambda result: "done")

    monkeypatch.setattr(cli.importlib, "import_module", imported)
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        cli.call("report", ["run=r"])
    assert seen == [("pgl_ray.report", False), True][: 1 if fails else 2] and gc.isenabled()


# -- help --------------------------------------------------------------------------------------------------------------


def keys_in(text: str) -> list[str]:
    return re.findall(r"^  (\S+) = ", text, re.M)


@pytest.mark.parametrize("door", cli.DOORS)
def test_help_shows_at_most_ten_keys_and_names_the_rest(door):
    text, every = cli.helped(door), [key for key, *_ in c.keys(cli.DOORS[door].model)]
    listed = keys_in(text)
    assert 0 < len(listed) <= 10 and set(listed) <= set(every)
    required = {name for name, field in cli.DOORS[door].model.model_fields.items() if field.is_required()}
    assert required <= set(listed)
    assert (f"--help-all shows all {len(every)} keys" in text) == (len(listed) < len(every))
    assert all(len(line) <= 150 for line in text.splitlines())


@pytest.mark.parametrize("door", cli.DOORS)
def test_help_all_shows_every_key_once_by_section(door):
    text = cli.helped(door, everything=True)
    assert sorted(keys_in(text)) == sorted(key for key, *_ in c.keys(cli.DOORS[door].model))
    section = ""
    for line in text.splitlines()[3:]:
        section = heading[1] if (heading := re.match(r"([\w.]+): ", line)) else section
        if key := keys_in(line):
            assert key[0].rpartition(".")[0] == section


KNOBS = [(door, knob) for door in cli.DOORS for _, _, rows in knobs.sections(cli.DOORS[door].model) for knob in rows]


@pytest.mark.parametrize("door", cli.DOORS)
def test_help_says_the_bounds_that_models_hold(door):
    """What lies just beyond a bound that help names is refused by the key's name; what is no choice, too."""
    model = cli.DOORS[door].model
    for knob in (knob for name, knob in KNOBS if name == door):
        bounded = re.fullmatch(r"(whole number|number) (>=|>) (\S+)(?: <=? \S+)?( \| null)?", knob.values)
        if bounded:
            low = float(bounded[3]) - (0 if bounded[2] == ">" else 1)
            wrong = f"{low:g}"
        elif knob.values == "true | false" or re.fullmatch(r"[\w-]+( \| [\w-]+)+", knob.values):
            wrong = "no_such_choice"
        else:
            continue
        if "no_such" in wrong and "text" in knob.values:
            continue
        with pytest.raises(ValueError, match=re.escape(knob.key)):
            c.load(model, [*minimal(model), f"{knob.key}={wrong}"])


@pytest.mark.parametrize("door", cli.DOORS)
def test_defaults_of_help_are_accepted_as_typed(door):
    model = cli.DOORS[door].model
    plain, chosen = c.load(model, minimal(model)), [arg.split("=")[0] for arg in ONE_OF.get(model, [])]
    for knob in (knob for name, knob in KNOBS if name == door and knob.key not in chosen):
        top = knob.key.split(".")[0]
        optional = getattr(plain, top, None) is None and "." in knob.key  # a section that may be left out
        if knob.default not in ("required", "{}", "[]", "") and not optional:
            assert c.load(model, [*minimal(model), f"{knob.key}={knob.default}"]) == plain, knob


def test_values_in_words():
    words = {knob.key: knob.values for door, knob in KNOBS if door == "pretrain"}
    assert words["method"] == "pgl | byol | genesis" and words["align.flip"] == "true | false"
    assert words["ema_decay"] == "number >= 0 <= 1" and words["max_steps"] == "whole number >= 1 | null"
    assert words["views.size"] == "[3 of whole number >= 1]" and words["views.min_overlap"] == "number > 0 <= 1"
    assert words["align.more_strides"] == "[any number of [3 of whole number >= 1]]"
    assert words["optim.lr"] == "number > 0 | null" and words["split"] == "text | null"
    words = {knob.key: knob.values for door, knob in KNOBS if door == "prepare"}
    assert words["hu_window"] == "[2 of number]" and words["labels.names"] == "text -> whole number >= 1 <= 65535"
    assert words["recipe.parts"] == "[any number of {images, labels, ids, num_scans, split}]"


@pytest.mark.parametrize("args", [["pgl_ray"], ["pgl_ray.pretrain", "--help-all"]])
def test_a_reader_that_leaves_early_costs_nothing(args):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m {' '.join(args)} | true"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("door", "given"),
    [
        ("probe", ["index=s", "init=random"]),
        ("inspect", ["store=s"]),
        ("report", ["run=[r]"]),
        ("export", ["run=r"]),
        ("evaluate", ["run=r", "index=s"]),
        ("embed", ["init=pretrained:openkbp_small", "input=i"]),
        ("check_align", []),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, capsys, monkeypatch, door, given):
    """Not after an hour; a file where a folder is meant, and the other way round."""
    monkeypatch.chdir(tmp_path)
    label, volume = np.ones((4, 8, 8), np.uint8), np.zeros((4, 8, 8), np.int16)
    write_scan(tmp_path / "s", "a", volume, np.eye(4), label=label, labelled=(1,), split="train")
    write_index(tmp_path / "s", {"organ": 1}, (-1024.0, 325.0))
    (tmp_path / "i").mkdir()
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "i/a.nii.gz")
    (tmp_path / "a_folder.pt2").mkdir()
    (tmp_path / "a_file").write_text("")
    to_folder = door in ("evaluate", "embed", "check_align")
    for output in ("a_file", "a_file/deeper") if to_folder else ("a_folder.pt2", "a_file/deeper.pt2"):
        with pytest.raises(SystemExit) as stop:
            cli.call(door, [*given, f"output={output}"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"pgl_ray.{door}: output=") and said.count("\n") == 1, said
        assert "name a file" in said or "cannot be written" in said
