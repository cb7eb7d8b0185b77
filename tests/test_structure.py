"""The import law of the house, checked on the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pgl_ray"
ROOMS = {"data", "judge", "model", "train"}
SHARED = {"config", "prior", "ray_internals"}
DOORS = {p.stem for p in PACKAGE.glob("*.py")} - SHARED - {"__init__"}
USERS = {*DOORS, "examples"}  # examples are code of users: they call doors and rooms, and nothing of ours imports them
RAY_ALLOWED = {"ray_internals.py", "data/stream.py"}
RAY_ALLOWED |= {f"train/{name}.py" for name in ("launch", "nodes", "session", "checkpoint")}
DOOR_TO_DOOR = {
    *(("trial", stage) for stage in ("pretrain", "probe", "finetune", "evaluate")),
    *(("tune", other) for other in ("trial", "pretrain", "probe", "finetune", "report", "sweeps")),
    ("trial", "sweeps"),
    ("finetune", "evaluate"),
    ("bench", "pretrain"),
    ("check_align", "pictures"),
}
DOOR_TO_DOOR |= {("predict", "viewer"), ("viewer", "pictures")}  # the page beside a label map, no door itself
DOOR_TO_DOOR |= {("inspect", "pictures"), ("inspect", "store_table")}  # its figures, no door itself
DOOR_TO_DOOR |= {("pretrain", "outlook")}  # what it says before its first step, no door itself
DOOR_TO_DOOR |= {("report", "tables"), ("report", "pictures")}  # the report's halves, no doors themselves
DOOR_TO_DOOR |= {("report", "probe_tables"), ("probe_tables", "tables")}
DOOR_TO_DOOR |= {("report", "curves"), *(("curves", other) for other in ("tables", "pictures", "outlook"))}
# the answers at a page's top: no doors, either
DOOR_TO_DOOR |= {("report", "answers"), *(("answers", other) for other in ("arms", "next_steps", "speeds", "tables"))}
DOOR_TO_DOOR |= {("next_steps", other) for other in ("arms", "outlook", "speeds", "tables")}
DOOR_TO_DOOR |= {
    ("sweep_report", "sweep_answers"),
    *(("sweep_answers", other) for other in ("arms", "speeds", "sweeps")),
}
DOOR_TO_DOOR |= {("sweep_answers", "tables"), ("speeds", "tables"), ("inspect", "store_answers")}
DOOR_TO_DOOR |= {(page, "pages") for page in DOORS if page != "pages"}  # templates
DOOR_TO_DOOR |= {("probe", "feature_pictures"), ("feature_pictures", "pictures"), ("probe", "pictures")}
DOOR_TO_DOOR |= {("report", "sweep_report"), ("sweeps", "tables")}
DOOR_TO_DOOR |= {("sweep_report", other) for other in ("arms", "sweeps", "tables", "pictures")}
DOOR_TO_DOOR |= {("arms", other) for other in ("sweeps", "tables")}  # what a sweep's arms differ by, no door itself
# embed and match are made of what Python users call; their pages, no doors themselves
DOOR_TO_DOOR |= {("embed", "api"), ("embed", "embed_page"), ("match", "api"), ("match", "match_page")}
DOOR_TO_DOOR |= {("embed_page", "feature_pictures"), ("embed_page", "pictures")}
# the doctor's facts and verdicts, no doors themselves
DOOR_TO_DOOR |= {("doctor", f"doctor_{part}") for part in ("facts", "places", "checks", "storage")}
DOOR_TO_DOOR |= {("doctor_storage", f"doctor_{part}") for part in ("facts", "places", "checks")}
DOOR_TO_DOOR |= {
    ("doctor_checks", "doctor_facts"),
    *((f"doctor_{part}", "doctor_places") for part in ("checks", "facts")),
}
DOOR_TO_DOOR |= {("cli", "knobs"), *((door, "cli") for door in DOORS)}  # every door's command line
DOOR_TO_DOOR |= {("cli", "shipped"), ("sweep_report", "shipped")}  # files beside the code, no door itself
PLACES = {f"pgl_ray.data.place.{name}" for name in ("Bucket", "put_in_place", "write_aside")}  # runs are kept as stores
PLACES |= {"pgl_ray.data.system.lock_file"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


TESTS = sorted(Path(__file__).parent.rglob("*.py"))
FILES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_import_law(name):
    room = name.split("/")[0] if "/" in name else name.removesuffix(".py")
    for full in imports(PACKAGE / name):
        if full.split(".")[0] == "ray":
            assert name in RAY_ALLOWED or room in USERS, f"{name} imports {full}"
        if not full.startswith("pgl_ray."):
            continue
        target = full.split(".")[1]
        assert target != "examples", f"{name} imports {full}"
        if target in SHARED:
            assert room not in SHARED, f"{name} imports {full}"
            assert target == "prior" or room != "model", f"{name} imports {full}"
            assert target != "ray_internals" or name == "data/stream.py" or room == "train", f"{name} imports {full}"
        elif target in ROOMS:
            # train/weights rebuilds networks, so the training room may use the model's; data and model never meet but
            # where encoders are judged on scans
            between = ("train", "model"), ("judge", "data"), ("judge", "model")
            allowed = room == target or room in USERS or (room, target) in between or full in PLACES
            assert allowed, f"{name} imports {full}"
        elif target in DOORS:
            assert room in ("demo", "examples") or (room, target) in DOOR_TO_DOOR, f"{name} imports {full}"


INSIDE = re.compile(r"\bray(\.\w+)*\.(_\w+|v2)\b")


def test_names_inside_ray_are_in_one_file():
    """Imports, attributes and texts with an underscore name of Ray's, or one of its second Train, whose public names
    are ray.train's."""
    for name in set(FILES) - {"ray_internals.py"}:
        tree = ast.parse((PACKAGE / name).read_text())
        names = imports(PACKAGE / name) | {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not [text for text in names if INSIDE.search(text)], name
    shipped = {p.name for p in PACKAGE.rglob("*.y*ml") if INSIDE.search(p.read_text())}
    assert shipped == {"quiet_data_log.yaml"}  # ray_internals.DATA_LOG


def test_init_files_are_empty():
    assert all(not p.read_text() for p in PACKAGE.glob("*/__init__.py"))


def test_processes_that_feed_or_control_a_run_need_no_networks():
    """Eight or more per run import these two; MONAI alone would cost each of them five seconds of CPU time."""
    text = "import sys, pgl_ray.data.stream, pgl_ray.train.launch; print(sys.modules.keys() & {'monai', 'matplotlib'})"
    done = subprocess.run([sys.executable, "-c", text], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- tests ------------------------------------------------------------------------------------------------------------


def functions(path: Path) -> list[str]:
    return [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


def test_names_of_tests_have_at_most_60_characters():
    long = [name for path in TESTS for name in functions(path) if name.startswith("test_") and len(name) > 60]
    assert not long


def test_tests_call_no_private_function():
    """They hold what the package promises; what a test replaces by its name, as text, is no call."""
    private = {name for file in FILES for name in functions(PACKAGE / file) if re.match(r"_[a-z]", name)}
    called = set()
    for path in TESTS:
        named = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        named |= {full.rpartition(".")[2] for full in imports(path) if full.startswith("pgl_ray.")}
        called |= {f"{path.name}: {name}" for name in private & named - set(functions(path))}
    assert called <= {"test_ray_internals.py: _count_possible_workers"}  # Ray's name for what we put in its place
