"""The import law of the house, checked on the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pgl_ray"
ROOMS = {  # and what of ours each may import besides itself; doors may import every room
    "checkup": {"data"},
    "convert": {"config", "data", "files", "train"},
    "data": {"config", "prior", "splitmix"},
    "files": {"config", "data"},
    "judge": {"config", "data", "files", "model", "prior"},
    "model": {"prior", "splitmix"},
    "pages": {"config", "data", "files", "judge", "model", "outlook", "prior", "shipped", "sweep", "train"},
    "phantom": {"data"},
    "sweep": {"config", "data", "judge", "model", "pages", "train"},
    "train": {"config", "data", "model", "prior", "ray_internals"},
}
SINGLE = {  # files that are no door, and what they may import
    "api": {"data", "files", "judge", "model", "prior", "train"},
    "cli": {"config", "data", "knobs", "shipped"},
    "config": set(),
    "knobs": {"config"},
    "paths": set(),  # which all may import
    "encoders": {"config", "data", "model", "train"},
    "outlook": {"config", "data", "model", "prior", "train"},
    "prior": set(),
    "ray_internals": set(),
    "shipped": set(),
    "splitmix": set(),
    "__main__": {"cli"},
}
DOORS = {p.stem for p in PACKAGE.glob("*.py")} - SINGLE.keys() - {"__init__"}
DOOR_TO_DOOR = {("tune", "report")}
DOOR_TO_DOOR |= {("sweep", stage) for stage in ("pretrain", "probe", "finetune", "evaluate")}  # a trial runs them
USERS = {"demo", "examples"}  # they call doors and rooms as a user does, and nothing of ours imports them
RAY_ALLOWED = {"ray_internals.py", "convert/parallel.py", "data/stream.py"}
RAY_ALLOWED |= {f"sweep/{name}.py" for name in ("points", "population", "search", "trial")}
RAY_ALLOWED |= {f"train/{name}.py" for name in ("autoscaler", "launch", "nodes", "session")}
ONE_BY_ONE = {"data/stream.py": {"ray_internals"}}  # beyond its room's
RUNS_AS_STORES = {"data.bucket", "data.durable", "data.system"}  # of the data's room: runs are kept as stores are


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
    known = (
        {**SINGLE, **ROOMS}.get(room, {*ROOMS, *SINGLE} - {"__main__", "knobs"})
        | {"paths"}
        | ONE_BY_ONE.get(name, set())
    )
    for full in imports(PACKAGE / name):
        if full.split(".")[0] == "ray":
            assert name in RAY_ALLOWED or room in DOORS | USERS, f"{name} imports {full}"
        if not full.startswith("pgl_ray.") or full.split(".")[1] == room:
            continue
        target = full.split(".")[1]
        assert target not in USERS and (
            room != "train" or target != "data" or full[8:].rpartition(".")[0] in (RUNS_AS_STORES)
        ), f"{name} imports {full}"
        door = target in DOORS and (room in USERS or (room, target) in DOOR_TO_DOOR)
        assert target in known or door, f"{name} imports {full}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    """What does not fit on a few screens is more than one thing."""
    text = (PACKAGE / name).read_text()
    assert len(text.splitlines()) <= 350
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert [one.name for one in functions if one.end_lineno - one.lineno >= 60] == []


INSIDE = re.compile(r"\bray(\.\w+)*\.(_\w+|v2)\b")


@pytest.mark.slow
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


WRITES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
CACHED_BY_PROCESSES = {  # lists, sets and dicts that a cache holds, and why nothing that lasts could have them
    "data/render_cache.py: _arrays",  # a rendering task is called anew for each batch: its process alone lasts
    "data/wire.py: _last_warning",  # the same, and whoever reads: not every thread says that a store fails
}


def written_names(tree: ast.Module) -> set[str]:
    """Names of a module's top level, or of another module of ours, whose values its functions change, or bind anew."""
    top = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]
    names = {n.id for node in top for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("pgl_ray")]
    names |= {alias.asname or alias.name for node in ours for alias in node.names}
    written = set()
    for node in [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)]:
        if isinstance(node, ast.Global):
            written |= set(node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            written.add(ast.unparse(node.func.value).split(".")[0].split("[")[0])
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            written.add(ast.unparse(node.value).split(".")[0].split("[")[0])
    return (written & names) | {n for node in ast.walk(tree) if isinstance(node, ast.Global) for n in node.names}


def cached_containers(tree: ast.Module) -> set[str]:
    """Functions whose cache holds what can be changed."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    cached = [f for f in functions if any("cache" in ast.unparse(one) for one in f.decorator_list)]
    return {f.name for f in cached if re.match(r"(list|dict|set)\b", ast.unparse(f.returns) if f.returns else "list")}


@pytest.mark.parametrize("name", FILES)
def test_no_module_keeps_what_changes(name):
    """What changes belongs to an object, which is passed to whoever needs it: a run, a session, a thread."""
    tree = ast.parse((PACKAGE / name).read_text())
    assert written_names(tree) == set()
    assert {f"{name}: {one}" for one in cached_containers(tree)} <= CACHED_BY_PROCESSES
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    if not name.startswith("examples/"):  # scripts
        loose = ast.List | ast.Set | ast.ListComp | ast.SetComp
        assert not [ast.unparse(value) for value in values if isinstance(value, loose)], "a tuple or frozenset"


@pytest.mark.parametrize(
    "text",
    [
        "A = {}\ndef f(): A['b'] = 1",
        "a = []\ndef f(): a.append(1)",
        "A: dict = dict()\nclass B:\n    def f(self): A.setdefault('b', []).append(1)",
        "a = None\ndef f():\n    global a\n    a = 1",
        "def f():\n    global a\n    a = 1",
        "A, B = {}, 1\nf = lambda: A['b'].update(c=1)",
        "A = {}\ndef f(): del A['b']",
        "A = {}\ndef f(): A['b'] += 1",
        "A = object()\ndef f(): A.b = 1",
        "class A: b = []\ndef f(): A.b.append(1)",
        "def f(): f.num = 1",
        "from pgl_ray.train import runs\ndef f(): runs.A['b'] = 1",
    ],
)
def test_what_changes_in_a_module_is_noticed(text):
    assert written_names(ast.parse(text))


def test_what_a_cache_holds_is_noticed():
    text = (
        "@lru_cache(maxsize=1)\ndef f() -> list[int]: ...\n@cache\ndef g() -> int: ...\n@functools.cache\ndef h(): ..."
    )
    assert cached_containers(ast.parse(text)) == {"f", "h"}


def test_init_files_are_empty():
    """But config's, which names what its files hold: it is read as one."""
    front = PACKAGE / "config/__init__.py"
    assert all(not p.read_text() for p in PACKAGE.glob("*/__init__.py") if p != front)
    about, *names = ast.parse(front.read_text()).body
    assert isinstance(about, ast.Expr) and all(isinstance(node, ast.ImportFrom) for node in names)


@pytest.mark.slow
def test_processes_that_feed_or_control_a_run_need_no_networks():
    """Eight or more per run import these; MONAI alone would cost each of them five seconds of CPU time."""
    feeding = [f"pgl_ray.data.{name}" for name in ("stream", "trainings", "pair_renderer", "patch_renderer")]
    for names, heavy in (
        (feeding, "'torch', 'monai', 'matplotlib'"),
        (["pgl_ray.train.launch"], "'monai', 'matplotlib'"),
    ):
        text = f"import sys, {', '.join(names)}; print(sys.modules.keys() & {{{heavy}}})"
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
        )
        assert done.stdout == "set()\n"


def test_facts_of_a_node_need_only_the_standard_library():
    """The doctor asks nodes on which anything may be missing."""
    text = "import sys; before = {*sys.modules}; import pgl_ray.checkup.doctor_facts, pgl_ray.checkup.doctor_places; "
    text += "names = {name.partition('.')[0] for name in sys.modules.keys() - before}; "
    text += "print(names - {'pgl_ray'} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", text], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# words that say how a value came here, not what it is
VAGUE = {"found", "told", "shown", "kept", "beside", "alone", "shelf"}


def test_names_say_what_a_value_is():
    vague = set()
    for file in FILES:
        names = {Path(file).stem}
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            fields = (getattr(node, field, None) for field in ("id", "arg", "attr", "name", "asname"))
            names |= {name for name in fields if isinstance(name, str) and not name.endswith("FoundError")}
        parts = {name: re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name) for name in names}
        vague |= {f"{file}: {name}" for name in names if VAGUE & {part.lower() for part in parts[name]}}
    assert not vague


# -- tests ------------------------------------------------------------------------------------------------------------


def functions(path: Path) -> list[str]:
    return [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


@pytest.mark.slow
def test_names_of_tests_have_at_most_60_characters():
    long = [name for path in TESTS for name in functions(path) if name.startswith("test_") and len(name) > 60]
    assert not long


@pytest.mark.slow
def test_tests_call_no_private_function():
    """They hold what the package promises; what a test replaces by its name, as text, is no call."""
    private = {name for file in FILES for name in functions(PACKAGE / file) if re.match(r"_[a-z]", name)}
    called = set()
    for path in TESTS:
        named = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        named |= {full.rpartition(".")[2] for full in imports(path) if full.startswith("pgl_ray.")}
        called |= {f"{path.name}: {name}" for name in private & named - set(functions(path))}
    assert called <= {"test_ray_internals.py: _count_possible_workers"}  # Ray's name for what we put in its place


def test_the_top_level_holds_nothing_else():
    """What an example or a trial left behind is not to be committed."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top_level = {path.split("/")[0] for path in listed if path and not path.startswith(".")}
    folders = {"pgl_ray", "conf", "data_prep", "tune_spaces", "tests"}
    assert top_level == folders | {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
