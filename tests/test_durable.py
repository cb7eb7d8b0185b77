"""What is put in place is on the disk before it has its name, and its name after: a loss of power leaves no half."""

import ast
import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import train_loop as loop

from pgl_ray.data import durable, scan_files, store
from pgl_ray.data.durable import write_aside
from pgl_ray.data.folder import Folder
from pgl_ray.train import checkpoint, runs
from pgl_ray.train.run_files import write_json


class Disk:
    """Notes what reaches the disk and what is renamed, in turn: ("sync", path) and ("name", path under which)."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[tuple[str, Path]] = []
        self.below: dict[Path, set[Path]] = {}  # name -> what was renamed with it, as it was called before
        own = {"fsync": os.fsync, "replace": os.replace, "rename": os.rename}

        def fsync(handle: int) -> None:
            own["fsync"](handle)
            self.events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))

        def renaming(how: str):
            def rename(old, new, **options) -> None:
                old, new = Path(old), Path(new)
                parts = {old, *old.rglob("*")} if old.is_dir() else {old}
                own[how](old, new, **options)
                self.below[new] = parts
                self.events.append(("name", new))

            return rename

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", renaming("replace"))
        patch.setattr(os, "rename", renaming("rename"))

    def check(self, path: Path) -> None:
        """The last renaming to `path`: all of it was synced before, and the folder that holds the name after."""
        at = max(i for i, event in enumerate(self.events) if event == ("name", path))
        before = {known for kind, known in self.events[:at] if kind == "sync"}
        assert self.below[path] <= before, self.below[path] - before
        assert ("sync", path.parent) in self.events[at:]


@pytest.fixture
def disk(monkeypatch) -> Disk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to name open files by")
    return Disk(monkeypatch)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_lay_there(tmp_path, monkeypatch, call):
    record = scan_files.write_scan(tmp_path, "a", np.full((4, 9, 9), 40, np.int16), np.eye(4))

    def full(*_, **__):
        raise OSError(errno.EDQUOT, "quota")

    place = Folder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="quota"), place.replaced("scans/a") as part:
        part.write("zarr.json", [b"new"])
        patch.setattr(os, call, full)
    scan_files.check_scan(tmp_path, "a")
    assert store.read_records(tmp_path) == {"a": record} and not list(tmp_path.glob(".part/*"))


def test_files(disk, tmp_path):
    write_aside(tmp_path / "a", b"1")
    write_json(tmp_path / "b.json", {"k": 1})
    checkpoint.write_state(tmp_path / "c.pt", {"x": torch.zeros(3)})
    Folder(tmp_path).write("deep/d", [b"2", b"3"])
    for name in ("a", "b.json", "c.pt", "deep/d"):
        disk.check(tmp_path / name)
    assert (tmp_path / "deep/d").read_bytes() == b"23" and not list(tmp_path.glob("**/*.part*"))


def test_scans_and_the_index(disk, tmp_path):
    volume = np.zeros((20, 70, 70), np.int16)
    for _ in range(2):  # the second takes the first one's place
        scan_files.write_scan(tmp_path, "a", volume, np.eye(4), label=(volume > 0).astype(np.uint8), labelled=(1,))
        disk.check(tmp_path / "scans/a")
        assert any(path.name == "0" for path in disk.below[tmp_path / "scans/a"])  # shards lie deep
    store.write_index(tmp_path, {"organ": 1}, (-1024.0, 325.0))
    for name in ("store.json", "index.parquet"):
        disk.check(tmp_path / name)


def test_checkpoints(disk, tmp_path):
    for step in (3, 3, 6):  # step 3 again, after a restart from an earlier one
        checkpoint.write_checkpoint(tmp_path, step, {"step": step, "x": torch.ones(2)}, {})
        disk.check(tmp_path / f"checkpoint_{step:08d}")
    assert checkpoint.committed_step(str(tmp_path)) == 6


def test_a_run_is_opened_whole(disk, tmp_path):
    config = loop.pretraining(tmp_path / "store", tmp_path / "run")
    runs.open_run(config, "pretrain", {"plan": "p", "num_steps": 6})
    for name in ("run.json", "config.yaml"):
        disk.check(tmp_path / "run" / name)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_cannot_be_synced_is_let_pass(monkeypatch, tmp_path, kind, number):
    """By a file system that knows no such thing, and only folders: a disk that fails is an error."""
    own = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == (kind == "folder"):
            raise OSError(number, "refused")
        own(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if kind == "folder" and number != errno.EIO:
        write_aside(tmp_path / "a", b"1")
        assert (tmp_path / "a").read_bytes() == b"1"
        return
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="refused"):
        write_aside(tmp_path / "a", b"new")
    assert kind == "folder" or (tmp_path / "a").read_bytes() == b"old"


def renamings(path: Path) -> list[str]:
    """Calls of Path.replace, Path.rename and their like in os and shutil; a text's replace takes two arguments."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    calls = [n for n in calls if isinstance(n.func, ast.Attribute) and not n.keywords]
    moving = {"rename": 1, "replace": 1, "move": 2, "renames": 2}
    return [ast.unparse(n) for n in calls if moving.get(n.func.attr) == len(n.args) and n.args]


def test_one_function_gives_names():
    """The other renamings put away what is to be thrown away, or concern a bucket's copies, which are compared with it
    when they are read."""
    package = Path(durable.__file__).parents[1]
    calls_of = {str(path.relative_to(package)): renamings(path) for path in package.rglob("*.py")}
    calls_of.pop("train/mirror.py")
    assert {name: calls for name, calls in calls_of.items() if calls} == {
        "data/durable.py": ["aside.replace(path)"],
        "data/folder.py": ["target.rename(old)", "old.rename(target)"],
        "train/checkpoint.py": ["place.rename(aside)"],
    }
