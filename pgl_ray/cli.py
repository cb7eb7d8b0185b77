"""Every door's command line: `python -m pgl_ray.DOOR`, `pgl-ray DOOR`, and `python -m pgl_ray`, which lists them.

A door's module takes torch, MONAI and matplotlib along, seconds of CPU time that a text or a refusal need not wait for:
it is imported last, when the config is whole and the stores that it names are there.
"""

import gc
import importlib
import itertools
import os
import sys
import textwrap
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pgl_ray import config as c
from pgl_ray import knobs, shipped
from pgl_ray.paths import is_url

WRONG_USE = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Door(NamedTuple):
    """What the command line knows of a door.

    Attributes:
        model: its config; the docstring is the clause that the list of doors shows.
        first: keys that users turn first, between spaces, those of --help; empty: all.
        run, closing: functions of its module: config -> result, and result -> closing lines.
        stores: keys that name a store which must be there.
    """

    model: type[c.Section]
    first: str = ""
    run: str = "run"
    closing: str = "describe"
    stores: tuple[str, ...] = ("index",)


DOORS = {
    "prepare": Door(
        c.PrepareConfig,
        "source store labels.names labels.table series hu_window spacing_mm encoding compression ray.address",
        stores=(),
    ),
    "prepare verify": Door(c.StoreConfig, "", "verify", "describe_verified", ("store",)),
    "prepare repair": Door(c.StoreConfig, "", "repair", "describe_repaired", ("store",)),
    "inspect": Door(c.InspectConfig, stores=("store",)),
    "pretrain": Door(
        c.PretrainConfig,
        "index run method epochs max_steps global_batch_size views.size encoder.kind optim.lr train.num_workers",
    ),
    "finetune": Door(
        c.FinetuneConfig,
        "index run init num_scans epochs max_steps global_batch_size patch.size optim.lr train.num_workers",
    ),
    "evaluate": Door(
        c.EvaluateConfig, "run index split num_scans output save_predictions tta compare inference.device"
    ),
    "predict": Door(c.PredictConfig, stores=()),
    "probe": Door(c.ProbeConfig, "init index judges size split num_scans test_split num_test_scans control output"),
    "embed": Door(c.EmbedConfig, "init index input output maps dense spacing workers pictures ray.address"),
    "match": Door(
        c.MatchConfig,
        "init a b point voxel labels landmarks output index spacing",
    ),
    "tune": Door(
        c.TuneConfig,
        "run index arms space base_pretrain base_finetune judge scheduler.kind search num_trials",
    ),
    "bench": Door(
        c.BenchConfig,
        "index method global_batch_size views.size stream.pairs_per_region stream.on_gpu "
        "train.device train.num_workers bench_s",
    ),
    "check_align": Door(
        c.CheckAlignConfig,
        "index run output num_pairs views.size views.crop_scale align.output_stride align.centers "
        "encoder.stage_strides seed",
    ),
    "export": Door(c.ExportConfig, stores=()),
    "report": Door(c.ReportConfig, stores=()),
    "doctor": Door(c.DoctorConfig, "ray.address index run"),
    "demo": Door(
        c.DemoConfig,
        "out seed num_unlabelled num_labelled num_test pretrain_steps finetune_steps ray.num_cpus",
        stores=(),
    ),
}


def main(door: str) -> None:
    """`python -m pgl_ray.DOOR ...`: calls the door with this process's arguments, and ends the process."""
    call(door, sys.argv[1:])
    sys.exit(0)


def console() -> None:
    """`pgl-ray DOOR ...` and `python -m pgl_ray DOOR ...`; without a door the list of them."""
    door, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if door in ("-h", "--help"):
        _say(listed())
    elif door in DOORS:
        call(door, args)
    else:
        print(f"pgl_ray: {door!r} is no door; there are: {', '.join(DOORS)}", file=sys.stderr)
        sys.exit(2)


def call(door: str, args: list[str]) -> None:
    """Parses, runs the door, prints its closing lines.

    Exit code, where it is not 0: 1, the run failed; 2, wrong use (ValueError, missing file). Faults are one line on
    stderr; `--debug` adds the traceback.
    """
    if args and f"{door} {args[0]}" in DOORS:
        door, args = f"{door} {args[0]}", args[1:]
    model, _, run, closing, stores = DOORS[door]
    if {"-h", "--help", "--help-all"} & set(args):
        _say(helped(door, everything="--help-all" in args))
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads spin for minutes where the cores are busy
    try:
        config = c.load(model, [shipped.find(arg) for arg in args if arg != "--debug"])
        _refuse_missing(config, stores)
        module = _imported(f"pgl_ray.{door.split()[0]}")
        _say(getattr(module, closing)(getattr(module, run)(config)))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:  # the edge of the program: every fault becomes one line and an exit code
        if "--debug" in args:
            traceback.print_exc()
        wrong_use = isinstance(error, WRONG_USE) and not isinstance(error, c.FailedRun)
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"pgl_ray.{door}: {text}", file=sys.stderr, flush=True)
        sys.exit(2 if wrong_use else 1)


def _imported(name: str) -> ModuleType:
    """A module; none of what it makes is garbage, and looking for some took a second of the five of torch and Ray."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()


def _say(text: str) -> None:
    """Prints; whoever reads along may have gone, as `head` has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def _refuse_missing(config: Any, stores: tuple[str, ...]) -> None:
    """Refuses a folder that is no store; one in a bucket is left to the door, which asks for it once."""
    for place in filter(None, (getattr(config, key) for key in stores)):
        if not is_url(place) and not Path(place, "store.json").is_file():
            from pgl_ray.data import store_settings

            store_settings.read_settings(place)  # says it


def listed() -> str:
    """The doors, a clause each."""
    usage = "pgl-ray DOOR [file.yaml ...] [key=value ...], or python -m pgl_ray.DOOR ...; a door's keys: DOOR --help"
    clauses = [_wrapped(model.__doc__, " " * 18, f"  {door:16}") for door, (model, *_) in DOORS.items()]
    return "\n".join([usage, "", *itertools.chain(*clauses)])


def helped(door: str, everything: bool = False) -> str:
    """A door's text of help: the keys that users turn first, or all of them by section."""
    model, first, *_ = DOORS[door]
    lines = [f"python -m pgl_ray.{door} [file.yaml ...] [key=value ...] [--debug]", "", *_wrapped(model.__doc__)]
    sections = knobs.sections(model)
    rows = {knob.key: knob for _, _, knobs_of in sections for knob in knobs_of}
    listed = {} if everything else {key: rows[key] for key in first.split() or rows}
    lines += ["", *(line for knob in listed.values() for line in _lines(knob))]
    if everything:
        for name, about, knobs_of in sections:
            lines += ["", *_wrapped(f"{name}: {about}")] if name else []
            lines += [line for knob in knobs_of for line in _lines(knob)]
    elif len(listed) < len(rows):
        rest = dict.fromkeys(key.rpartition(".")[0] or key for key in rows if key not in listed)
        lines += ["", *_wrapped(f"--help-all shows all {len(rows)} keys: {', '.join(rest)}")]
    return "\n".join(lines)


def _lines(knob: knobs.Knob) -> list[str]:
    return [f"  {knob.key} = {knob.default}   ({knob.values})", *_wrapped(knob.about, "      ")]


def _wrapped(text: str, indent: str = "", first: str | None = None) -> list[str]:
    """Lines of at most 110 characters that begin with `indent`; the first one with `first`, where that is given."""
    ways = {"initial_indent": indent if first is None else first, "subsequent_indent": indent}
    return textwrap.wrap(" ".join(text.split()), 110, **ways, break_long_words=False, break_on_hyphens=False)
