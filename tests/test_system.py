"""Locks between processes, and that no door needs what only Linux has."""

import contextlib
import errno
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pgl_ray.config import FailedRun
from pgl_ray.data import folder, place, system
from pgl_ray.sweep import sweeps
from pgl_ray.train import runs
from pgl_ray.train.quiet import MEMORY

ROOT = Path(__file__).resolve().parents[1]

# What macOS has not: names of os and signal, modules, Linux's files. Everything else is as it is here.
MACOS = """
import builtins, ctypes, os, signal, sys
LINUX = "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate sendfile pipe2 memfd_create eventfd "
LINUX += "copy_file_range getrandom setresuid splice getxattr setxattr O_DIRECT O_NOATIME O_TMPFILE"
import psutil, ray, torch  # bring what they need on a Mac themselves
for name in LINUX.split():
    if hasattr(os, name):
        delattr(os, name)
ctypes.CDLL = lambda name, *_, **__: (_ for _ in ()).throw(OSError(f"{name}: no such library"))
opened = builtins.open
def no_proc(path, *args, **kwargs):
    if str(path).startswith(("/proc/", "/sys/", "/dev/shm")):
        raise FileNotFoundError(path)
    return opened(path, *args, **kwargs)
builtins.open = no_proc
"""
NO_FCNTL = """
import sys
import psutil, ray, torch
for name in [name for name in sys.modules if name.split(".")[0] in ("filelock", "fcntl")]:
    del sys.modules[name]
sys.modules["fcntl"] = None
"""
ALL_DOORS = """
import importlib, pathlib
for path in sorted(set(pathlib.Path("pgl_ray").rglob("*.py")) - set(pathlib.Path("pgl_ray/examples").rglob("*.py"))):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
print("all loaded")
"""


def python(code: str, *args: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def without(hidden: str) -> list[str]:
    """What is said where locks were taken, and then all doors loaded, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        return python(hidden + USE + ALL_DOORS, folder).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [MACOS, NO_FCNTL])
def test_every_module_loads_without_what_linux_has(hidden):
    assert without(hidden)[-1] == "all loaded"


def test_cores_are_counted_without_affinity(monkeypatch):
    if hasattr(os, "sched_getaffinity"):
        assert system.num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert system.num_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.num_cores() == 1


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("200000 100000\n", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000\n", 6), ("", 6), (None, 6)],
)
def test_cores_are_no_more_than_a_containers_quota(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(system, "CPU_MAX", str(tmp_path / "cpu.max"))
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert system.num_cores() == cores


def test_all_cores_of_the_machine_are_nobodys_to_take():
    """A job may use some of them: whoever needs their number asks num_cores."""
    package = Path(system.__file__).parents[1]
    asking = {path.name for path in package.rglob("*.py") if "cpu_count" in path.read_text()}
    assert asking == {"system.py"}


USE = """
import os, sys, pathlib
from pgl_ray.phantom import phantom
from pgl_ray.data import store, system
from pgl_ray.data.place import open_place
from pgl_ray.train import runs
folder = pathlib.Path(sys.argv[1])
assert system.num_cores() >= 1
system.keep_freed_memory(2**27)
with open_place(folder / "store").locked() as token, open_place(folder / "store").joined(token):
    open_place(folder / "store").write("a", [b"b"])
(folder / "run").mkdir()
with runs.locked(str(folder / "run")):
    pass
print("locked")
"""


@pytest.mark.parametrize("hidden", [MACOS, NO_FCNTL])
@pytest.mark.slow
def test_stores_and_runs_are_locked_without_it(hidden):
    assert "locked" in without(hidden)


THREAD = """
import resource, sys, threading
import torch
from pgl_ray.data import system

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def train():
    system.keep_freed_memory(2**31 - 1)
    for step in range(12):
        if step == 2:
            began = faults()
        maps = [torch.ones(2**power) for power in (23, 21, 23, 20, 23, 22, 23)]
        del maps
    print((faults() - began) // 10)

threads = [threading.Thread(target=train)]
threads[0].start()
threads[0].join()
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_training_thread_keeps_its_memory():
    """As Ray Train trains in one: some of the maps are as large as half an arena of its own can be."""

    def per_step(**changes: str) -> int:
        env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"} | changes
        return int(subprocess.run([sys.executable, "-c", THREAD], env=env, text=True, capture_output=True).stdout)

    assert per_step() > 1000, "glibc changed: is GLIBC_TUNABLES still needed?"
    assert per_step(**MEMORY) < 100


# -- locks ------------------------------------------------------------------------------------------------------------

COUNT = """
import math, pathlib, sys, time
from pgl_ray.data.system import lock_file
path, times = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for _ in range(times):
    with lock_file(path.with_suffix(".lock")) as lock:
        assert lock.take(wait_s=math.inf)
        number = int(path.read_text())
        time.sleep(0.002)
        path.write_text(str(number + 1))
"""


@pytest.mark.parametrize("hidden", ["", NO_FCNTL.replace("import psutil, ray, torch\n", "")])
def test_many_waiters_get_the_lock_one_at_a_time(hidden, tmp_path):
    """Each reads a number, waits, and writes the next one: what two hold at once is lost."""
    path, times = tmp_path / "number", 5
    path.write_text("0")
    waiters = [
        subprocess.Popen([sys.executable, "-c", hidden + COUNT, str(path), str(times)], cwd=ROOT) for _ in "12345678"
    ]
    assert [one.wait(120) for one in waiters] == [0] * 8
    assert path.read_text() == str(8 * times)


HOLD = """
import pathlib, sys, time
from pgl_ray.data.system import lock_file
with lock_file(pathlib.Path(sys.argv[1])) as lock:
    print(lock.take(shared=sys.argv[2] == "shared"), flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def other_process(path: Path, kind: str):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(("theirs", "mine"), [("shared", True), ("shared", False), ("alone", True), ("alone", False)])
def test_shared_locks_keep_exclusive_ones_out(theirs, mine, tmp_path):
    path, got = tmp_path / "a.lock", theirs == "shared" and mine
    with other_process(path, theirs) as holder:
        with system.lock_file(path) as lock:
            assert lock.take(shared=mine) == got
            began = time.monotonic()
            assert lock.take(shared=mine, wait_s=0.3) == got and (got or time.monotonic() - began >= 0.3)
        holder.kill()
        holder.wait()
        with system.lock_file(path) as lock:
            assert lock.take(), "the lock of a killed process is free"
    assert path.exists()


def test_one_holder_changes_the_kind_of_its_lock(tmp_path):
    with system.lock_file(tmp_path / "deep" / "a.lock") as one, system.lock_file(tmp_path / "deep" / "a.lock") as two:
        assert one.take() and not two.take(shared=True)
        assert one.take(shared=True) and two.take(shared=True) and not one.take()


def test_lock_files_are_open_for_reading_and_writing(tmp_path):
    """On NFS, whose locks are byte ranges, a shared one asks for the first and an exclusive one for the second."""
    import fcntl

    with system.lock_file(tmp_path / "a.lock") as lock:
        assert fcntl.fcntl(lock.file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        (tmp_path / "a.lock").write_text("who")
        for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):  # as an NFS client translates flock
            fcntl.lockf(lock.file, kind | fcntl.LOCK_NB)
    with system.lock_file(tmp_path / "a.lock") as lock:
        lock.file.seek(0)
        assert lock.take() and lock.file.read() == "who", "an asker leaves what the holder wrote"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_storage_without_locks_grants_every_wish_and_says_so(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(system.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, "no locks here")))
    with place.open_place(tmp_path / "store").locked() as token, place.open_place(tmp_path / "store").joined(token):
        pass
    (tmp_path / "run").mkdir()
    with runs.locked(str(tmp_path / "run")), sweeps.locked(tmp_path / "sweep"):
        pass
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].strip() for line in told] == [
        f"no lock on store={tmp_path / 'store'}",
        f"no lock on run={tmp_path / 'run'}",
        f"no lock on run={tmp_path / 'sweep'}",
    ]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_busy_lock_is_no_missing_one(number, tmp_path, monkeypatch):
    monkeypatch.setattr(system.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, "busy")))
    monkeypatch.setattr(folder, "STRAGGLERS_S", 0)
    with pytest.raises(FailedRun, match="another prepare"), place.open_place(tmp_path / "store").locked():
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("process 7 on node_3")
    with (
        pytest.raises(ValueError, match="is being trained by process 7 on node_3"),
        runs.locked(str(tmp_path / "run")),
    ):
        pass


SECOND = """
import sys
from pgl_ray.train import runs
try:
    runs.locked(sys.argv[1]).__enter__()
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_second_process_is_told_who_trains(tmp_path):
    (tmp_path / "run").mkdir()
    with runs.locked(str(tmp_path / "run")):
        told = python(SECOND, str(tmp_path / "run"))
    assert f"is being trained by process {os.getpid()} on" in told
