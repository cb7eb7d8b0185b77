"""The doctor: each fault made up as facts, or made on purpose, gives its line and mend, and no fault none."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import hosts
import numpy as np
import pydantic
import pytest
from terminal import in_terminal, screen

from pgl_ray import cli, doctor
from pgl_ray.checkup import doctor_checks, doctor_facts, doctor_places, doctor_storage
from pgl_ray.checkup.doctor_facts import Gpu, Machine
from pgl_ray.checkup.doctor_places import Sight
from pgl_ray.config import DoctorConfig, FailedRun, PretrainConfig, build
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import read_index, write_index
from pgl_ray.train import runs

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {name: re.search(r"[\d.]+", need)[0] for name, need in doctor_facts.NEEDED.items()}
VERSIONS |= {"obstore": "0.6", "pydicom": "3.0"}
GB = 10**9


def machine(k: int = 1, **changes) -> Machine:
    """A node without faults."""
    facts = {
        "name": f"node {k}",
        "python": "3.11.7",
        "versions": VERSIONS,
        "code": "abc",
        "code_path": "/home/me/pgl_ray",
        "host": f"host{k}",
        "host_address": f"10.0.0.{k}",
        "interfaces": {"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{k}"]},
        "chosen": {},
        "address": f"10.0.0.{k}",
        "shm_bytes": 8 * GB,
        "object_store_bytes": 4 * GB,
        "ray_gpus": 0,
        "disks": {"ray": ("/tmp", 50 * GB, 100 * GB), "cache": ("/root/.cache", 50 * GB, 100 * GB)},
        "skew_error_s": 0.01,
    }
    return Machine(**facts | changes)


def others(**changes) -> list[Machine]:
    """Three nodes of which the second and third have a fault."""
    return [machine(1), *(machine(k, **changes) for k in (2, 3))]


def versions(**changes) -> dict[str, str]:
    """Versions of packages; none: it is not installed."""
    return {name: version for name, version in (VERSIONS | changes).items() if version}


def sights(**changes) -> list[Sight]:
    well = {"mark": "m", "free_bytes": 50 * GB, "total_bytes": 100 * GB}
    return [Sight("this machine", **well), Sight("node 1", **well), Sight("node 2", **well | changes)]


H200 = Gpu("NVIDIA H200", "570.1", 143000.0, 10.0)
GPUS = {"gpus": (H200, H200), "ray_gpus": 2}
NFS = "/data/store"


def index(seen: list[Sight]) -> list:
    return doctor_storage.place("index", NFS, seen)


def run_in_bucket(seen: list[Sight]) -> list:
    return doctor_storage.place("run", "s3://lab/run", seen)


def cloud(machines: list[Machine]) -> list:
    return doctor_checks.extras(machines, in_bucket=True)


def no_cloud(machines: list[Machine]) -> list:
    return doctor_checks.extras(machines, in_bucket=False)


def clocks(machines: list[Machine]) -> list:
    return doctor_checks.clocks(machines, in_bucket=False)


def clocks_of_buckets(machines: list[Machine]) -> list:
    return doctor_checks.clocks(machines, in_bucket=True)


def disks(machines: list[Machine]) -> list:
    return doctor_storage.disks(machines, sights(), in_bucket=False)


def disks_of_buckets(machines: list[Machine]) -> list:
    return doctor_storage.disks(machines, [], in_bucket=True)


def room(runs: list[Sight]) -> list:
    return doctor_storage.disks([machine()], runs, in_bucket=False)


def disk(what: str, free: float) -> dict:
    return {"disks": machine().disks | {what: (f"/{what}", int(free), 100 * GB)}}


WELL = [
    (doctor_checks.answers, others()),
    (doctor_checks.versions, others()),
    (doctor_checks.versions, others(versions=versions(torch="2.8+cu128"))),
    (cloud, others()),
    (no_cloud, [machine(k, versions=versions(obstore=None)) for k in (1, 2)]),
    (doctor_checks.code, others(code_path="/tmp/ray/session/py_modules/pgl_ray")),
    (clocks, others(skew_s=1.5)),
    (clocks, others(skew_s=5.0, skew_error_s=4.0)),
    (doctor_checks.host_names, others()),
    (doctor_checks.host_names, others(host_address="127.0.1.1", chosen={"GLOO_SOCKET_IFNAME": "eth0"})),
    (doctor_checks.interfaces, others()),
    (doctor_checks.interfaces, others(chosen={"NCCL_SOCKET_IFNAME": "eth"})),
    (doctor_checks.interfaces, others(chosen={"NCCL_SOCKET_IFNAME": "=eth0"})),
    (doctor_checks.interfaces, others(chosen={"NCCL_SOCKET_IFNAME": "^lo,docker"})),
    (doctor_checks.interfaces, others(chosen={"GLOO_SOCKET_IFNAME": "eth0"}, interfaces={})),
    (doctor_checks.shared_memory, others()),
    (doctor_checks.shared_memory, others(shm_bytes=None)),
    (doctor_checks.gpus, others()),
    (doctor_checks.gpus, [machine(k, **GPUS) for k in (1, 2)]),
    (index, sights()),
    (run_in_bucket, sights()),
    (doctor_storage.reading, sights(read_mb_s=200.0, latency_s=0.02)),
    (disks, others()),
    (disks, others(**disk("cache", 0.1 * GB))),
]


@pytest.mark.parametrize(("check", "facts"), WELL)
def test_what_is_well_is_one_green_line(check, facts):
    (line,) = check(facts)
    assert line.state == "ok" and line.text and not line.mend


def test_one_machine_gets_no_more_lines_than_it_needs():
    machines = [machine(address="", host_address="127.0.1.1", ray_gpus=None)]
    for check in (doctor_checks.answers, clocks, doctor_checks.host_names, doctor_checks.interfaces):
        assert check(machines) == []
    assert not doctor_storage.reading([Sight("here", mark="m")])


# check, facts, state, a part of the text, a part of the mend
FAULTS = [
    (doctor_checks.answers, others(fault="actor died"), "wrong", "node 2, node 3: actor died", "ray status"),
    (
        doctor_checks.versions,
        others(versions=versions(zarr=None, isal=None)),
        "wrong",
        "node 2, node 3: not installed: 'zarr>=3.1' 'isal>=1.7'",
        "pip install 'zarr>=3.1' 'isal>=1.7'",
    ),
    (
        doctor_checks.versions,
        [machine(k, versions=versions(monai="1.4.2")) for k in (1, 2)],
        "wrong",
        "of another version than needed: 'monai>=1.5'",
        "pip install 'monai>=1.5'",
    ),
    (doctor_checks.versions, others(python="3.12.1"), "wrong", "python 3.12.1 where node 1 has 3.11.7", "same"),
    (doctor_checks.versions, others(python="3.11.9"), "note", "python 3.11.9 where node 1 has 3.11.7", "same"),
    (doctor_checks.versions, others(versions=versions(torch="2.9")), "wrong", "torch 2.9 where node 1 has 2.8", "same"),
    (doctor_checks.versions, others(versions=versions(ray="2.60.1")), "wrong", "ray 2.60.1 where", "same"),
    (
        doctor_checks.versions,
        others(versions=versions(numpy="2.4", scipy="1.15")),
        "note",
        "numpy 2.4 where node 1 has 2.0, scipy 1.15 where node 1 has 1.14",
        "constraints.txt",
    ),
    (cloud, others(versions=versions(obstore=None)), "wrong", "node 2, node 3: no obstore", r"pgl_ray\[cloud\]"),
    (no_cloud, others(versions=versions(pydicom=None)), "note", "without dicom", "everywhere"),
    (no_cloud, others(versions=versions(optuna="4.0")), "note", "with tune besides", "everywhere"),
    (
        doctor_checks.code,
        others(code="def", code_path="/usr/lib/pgl_ray"),
        "wrong",
        "node 2, node 3: other code than here is imported, from /usr/lib/pgl_ray",
        "pip uninstall pgl_ray there",
    ),
    (clocks, [machine(1), machine(2, skew_s=-90.0)], "note", "node 2: its clock is 90.0 s behind", "timedatectl"),
    (clocks_of_buckets, [machine(1), machine(2, skew_s=1000.0)], "wrong", "1000.0 s ahead .* buckets refuse", "chrony"),
    (
        doctor_checks.host_names,
        [machine(1), machine(2, host_address="127.0.1.1")],
        "wrong",
        "node 2: its name host2 leads to 127.0.1.1, where the others cannot reach it",
        "GLOO_SOCKET_IFNAME=eth0 before its `ray start`",
    ),
    (
        doctor_checks.host_names,
        [machine(1, **GPUS), machine(2, host_address="127.0.1.1", **GPUS)],
        "note",
        "127.0.1.1",
        "/etc/hosts",
    ),
    (doctor_checks.host_names, [machine(1), machine(2, host_address="")], "wrong", "leads to no address", "eth0"),
    (doctor_checks.host_names, [machine(1), machine(2, host_address="10.9.9.9")], "wrong", "none of its own", "eth0"),
    (
        doctor_checks.interfaces,
        [machine(1), machine(2, chosen={"NCCL_SOCKET_IFNAME": "ib0"})],
        "wrong",
        "node 2: NCCL_SOCKET_IFNAME=ib0 is none of its interfaces; there are lo, eth0",
        "NCCL_SOCKET_IFNAME=eth0",
    ),
    (
        doctor_checks.interfaces,
        [machine(1), machine(2, chosen={"GLOO_SOCKET_IFNAME": "lo"})],
        "wrong",
        "reaches no other machine",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    (
        doctor_checks.interfaces,
        [machine(address="", chosen={"GLOO_SOCKET_IFNAME": "eth7"})],
        "wrong",
        "GLOO_SOCKET_IFNAME=eth7 is none of its interfaces",
        "before its",
    ),
    (
        doctor_checks.shared_memory,
        others(shm_bytes=64 * 2**20),
        "note",
        "/dev/shm has 67 MB, the object store 4.0 GB",
        "--shm-size",
    ),
    (doctor_checks.shared_memory, others(object_store_bytes=90e6), "note", "90 MB: a batch", "object-store-memory"),
    (doctor_checks.gpus, others(gpu_fault="nvidia-smi: no driver"), "wrong", "does not answer: .* no driver", "reboot"),
    (
        doctor_checks.gpus,
        [machine(k, **GPUS, cuda_fault="driver too old") for k in (1, 2)],
        "wrong",
        "node 1, node 2: torch cannot compute on the GPUs: driver too old",
        "CUDA build of torch",
    ),
    (doctor_checks.gpus, others(gpus=(H200,)), "note", "Ray counts 0 GPUs, the driver 1", "--num-gpus"),
    (
        doctor_checks.gpus,
        others(gpus=(H200, dataclasses.replace(H200, used_mb=40000.0)), ray_gpus=2),
        "note",
        "GPU 1 has 40 GB in use",
        "nvidia-smi",
    ),
    (
        doctor_checks.gpus,
        [machine(1, **GPUS), machine(2, gpus=(dataclasses.replace(H200, driver="535.2"),), ray_gpus=1)],
        "note",
        "drivers differ: 570.1 on node 1; 535.2 on node 2",
        "everywhere",
    ),
    (index, sights(fault="No such file"), "wrong", "node 2: index=/data/store: No such file", "storage that all nodes"),
    (index, sights(mark="other"), "wrong", "node 2: at index=/data/store lies another one", "NFS"),
    (index, sights(read_only="Read-only file system"), "note", "so prepare cannot", "mount options"),
    (index, sights(fault="/data is no folder"), "wrong", "is no folder", "move that file away"),
    (index, sights(fault="[Errno 28] No space left on device"), "wrong", "No space", "free some space"),
    (run_in_bucket, sights(fault="s3://lab/run: no access"), "wrong", "no access", "AWS_ACCESS_KEY_ID"),
    (run_in_bucket, sights(fault="there is no such bucket: make it first"), "wrong", "no such", "make the bucket"),
    (run_in_bucket, sights(fault="object stores need obstore"), "wrong", "obstore", r"pgl_ray\[cloud\]"),
    (run_in_bucket, sights(read_only="no access"), "wrong", "cannot be written: no access", "AWS_REGION"),
    (doctor_storage.reading, sights(read_mb_s=3.0), "note", "node 2: scans are read at 3 MB/s", "faster disk"),
    (doctor_storage.reading, sights(latency_s=0.8), "note", "a small read from the bucket takes 800 ms", "region"),
    (disks, [machine(1), machine(2, **disk("ray", 4 * GB))], "wrong", "node 2: the disk of /ray is 96% full", "free"),
    (disks_of_buckets, [machine(1), machine(2, **disk("cache", 4 * GB))], "note", "4.0 GB free for /cache", "free"),
    (disks_of_buckets, [machine(1), machine(2, **disk("cache", GB))], "wrong", "1.0 GB free for /cache", "free"),
    (room, sights(free_bytes=GB // 2), "wrong", "node 2: 500 MB free for the run", "free some space"),
]


@pytest.mark.parametrize(("check", "facts", "state", "text", "mend"), FAULTS)
def test_a_fault_is_named_with_its_mend(check, facts, state, text, mend):
    (line,) = check(facts)
    assert line.state == state and re.search(text, line.text) and re.search(mend, line.mend), line


@pytest.mark.parametrize(("mib", "offered"), [(64, False), (76, True)])
def test_less_object_store_than_rays_least_is_no_mend(mib, offered):
    (line,) = doctor_checks.shared_memory(others(shm_bytes=mib * 2**20))
    assert ("ray.object_store_mb=N" in line.mend) == offered and "--shm-size" in line.mend


def test_a_fault_of_many_nodes_is_one_line():
    (line,) = doctor_checks.answers([machine(k, fault="died") for k in range(1, 101)])
    assert line.text == "node 1, node 2, node 3 and 97 more: died"


def test_what_is_needed_is_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [re.fullmatch(r"([\w-]+)(?:\[.*\])?(.*)", text).groups() for text in project["dependencies"]]
    assert dict(parts) == doctor_facts.NEEDED
    extras = project["optional-dependencies"].items()
    names = {extra: tuple(re.match(r"[\w-]+", text)[0] for text in all_) for extra, all_ in extras}
    assert {extra: all_ for extra, all_ in names.items() if extra not in ("test", "peers")} == doctor_facts.EXTRAS


@pytest.mark.parametrize("length", [20, 44, 45, 90])
def test_sockets_must_find_room(length):
    """A path of 107 characters is the longest that can be bound."""
    folder = "/" + "f" * (length - 1)
    socket_ = f"{folder}/session_2026-11-29_05-52-53_123456_1234567/sockets/plasma_store"
    lines = doctor_storage.socket_path(folder)
    assert bool(lines) == (len(socket_) > 107)
    if lines:
        shorter = int(re.search(r"(\d+) characters shorter", lines[0].mend)[1])
        assert len(socket_) - shorter == 107


# -- facts ------------------------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_gpus_are_those_that_the_driver_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "nvidia-smi", "echo '0, NVIDIA H200, 570.1, 143771, 4'; echo '1, Odd, 570.1, [N/A], [N/A]'")
    first, second = doctor_facts.gpus_here()[0]
    assert first == {"name": "NVIDIA H200", "driver": "570.1", "total_mb": 143771.0, "used_mb": 4.0}
    assert second["name"] == "Odd" and second["used_mb"] == 0
    program(tmp_path, "nvidia-smi", "echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    assert doctor_facts.gpus_here() == ([], "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch")


def test_torch_is_tried_on_the_gpus(monkeypatch):
    monkeypatch.setattr(doctor_facts, "CUDA_TRIAL", "raise RuntimeError('the driver is too old')")
    assert doctor_facts.fault_of_cuda() == "RuntimeError: the driver is too old"
    monkeypatch.setattr(doctor_facts, "CUDA_TRIAL", "print(2)")
    assert doctor_facts.fault_of_cuda() == ""


def test_the_codes_hash_is_that_of_its_files(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "room/b.py").write_text("2")
    first = doctor_facts.code_hash(tmp_path)
    (tmp_path / "room/b.pyc").write_text("compiled")
    assert doctor_facts.code_hash(tmp_path) == first
    (tmp_path / "room/b.py").write_text("3")
    changed = doctor_facts.code_hash(tmp_path)
    (tmp_path / "room/b.py").rename(tmp_path / "room/c.py")
    assert len({first, changed, doctor_facts.code_hash(tmp_path)}) == 3


def test_a_version_of_ones_own_is_not_refused():
    (line,) = doctor_checks.versions([machine(versions=versions(scipy="my-build"))])
    assert line.state == "ok"


def test_facts_of_this_machine():
    facts = doctor_facts.machine()
    one = doctor.parse_facts("here", json.loads(json.dumps(facts)))
    assert one.python == ".".join(map(str, sys.version_info[:3])) and one.versions["numpy"] == np.__version__
    assert one.host == socket.gethostname() and "127.0.0.1" in {a for all_ in one.interfaces.values() for a in all_}
    assert one.disks["ray"][2] > one.disks["ray"][1] > 0


# -- places -----------------------------------------------------------------------------------------------------------


def make_store(folder) -> str:
    for i in range(3):
        voxels = np.random.default_rng(i).integers(-900, 900, (24, 70, 70)).astype(np.int16)
        write_scan(str(folder), f"s{i}", voxels, np.eye(4), split="train")
    write_index(str(folder), {}, (-1024.0, 325.0))
    return str(folder)


def all_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_run_is_looked_at_and_left_as_it_was(tmp_path, below):
    before = all_below(tmp_path)
    mark = doctor_places.leave_mark(str(tmp_path / below))
    assert Path(mark).parent == tmp_path  # the nearest folder that is there
    facts = doctor_places.look_at_run(mark)
    assert facts["mark"] and "read_only" not in facts and facts["free_bytes"] > 0
    doctor_places.remove_mark(mark)
    assert all_below(tmp_path) == before


@pytest.mark.parametrize("below", ["run", "run/pgl/1"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/run is no folder"):
        doctor_places.leave_mark(str(tmp_path / below))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_mark_that_is_not_there_is_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_places, "SHARED_S", 0.1)
    facts = doctor_places.look_at_run(f"{tmp_path}/.doctor-1")
    assert facts == {"fault": f"does not see what is written to {tmp_path}"}


def test_different_stores_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_places, "LEAST_READ_BYTES", 1)
    first, keys = make_store(tmp_path / "a"), doctor.some_scans(make_store(tmp_path / "b"))
    one = doctor_places.look_at_store(first, keys)
    assert one == doctor_places.look_at_store(str(tmp_path / "b"), keys) | {"read_mb_s": one["read_mb_s"]} | {
        "free_bytes": one["free_bytes"]
    }
    assert one["read_mb_s"] > 0
    write_scan(first, "s9", np.zeros((24, 70, 70), np.int16), np.eye(4))
    write_index(first, {}, (-1024.0, 325.0))
    assert doctor_places.look_at_store(first, keys)["mark"] != one["mark"]


DAMAGE = {
    "index.parquet of .* is damaged": lambda store, keys: (store / "index.parquet").write_bytes(b"PAR1 and no more"),
    "has no index.parquet": lambda store, keys: (store / "index.parquet").unlink(),
    "store.json of .* is damaged": lambda store, keys: (store / "store.json").write_text("{}"),
    "has format 0": lambda store, keys: (store / "store.json").write_text('{"format": 0}'),
    "holds no scan": lambda store, keys: write_index_of_nothing(store),
    "scans/.* is missing": lambda store, keys: (store / keys[0]).unlink(),
}


def write_index_of_nothing(store):
    shutil.rmtree(store / "scans")
    write_index(str(store), {}, (-1024.0, 325.0))


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_store_is_named_with_what_mends_it(tmp_path, fault):
    """As the doors name it: no door can use such a store."""
    keys = doctor.some_scans(make_store(tmp_path / "s"))
    DAMAGE[fault](tmp_path / "s", keys)
    (line,) = index([Sight("this machine", **doctor_places.look_at_store(str(tmp_path / "s"), keys, index=True))])
    assert line.state == "wrong" and re.search(fault, line.text)
    if "missing" in fault:
        assert line.mend == f"python -m pgl_ray.prepare repair store={tmp_path}/s"
        return
    with pytest.raises(ValueError) as said:
        read_index(str(tmp_path / "s"))
    assert line.text.endswith(str(said.value).removesuffix(f": {line.mend}")) and line.mend


@pytest.mark.slow
def test_a_bucket_is_looked_at_and_left_as_it_was(s3, monkeypatch):
    monkeypatch.setattr(doctor_places, "LEAST_READ_BYTES", 1)
    url = make_store(f"{s3}/doctor/store")
    facts = doctor_places.look_at_store(url, doctor.some_scans(url))
    assert facts["read_mb_s"] > 0 and facts["latency_s"] > 0 and "fault" not in facts
    mark = doctor_places.leave_mark(f"{s3}/doctor/run")
    facts = doctor_places.look_at_run(mark)
    assert facts["latency_s"] > 0 and facts["mark"]
    doctor_places.remove_mark(mark)
    from pgl_ray.data.bucket import Bucket

    assert Bucket(f"{s3}/doctor/run").names("") == []
    with pytest.raises(ValueError, match="no such bucket"):
        doctor_places.leave_mark("s3://nowhere/run")


# -- the door ---------------------------------------------------------------------------------------------------------


def config(**values) -> DoctorConfig:
    return build(DoctorConfig, values)


def rows(printed: str) -> dict[str, str]:
    """Check -> state."""
    return dict(re.findall(r"^  (\w[\w ]*?) +(ok|note|wrong)  ", printed, re.M))


def test_a_machine_that_is_well(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "COLORS", None)  # never asked for
    result = doctor.run(config(index=make_store(tmp_path / "s"), run=str(tmp_path / "run")))
    printed = capsys.readouterr().out
    assert result.num_machines == 1
    assert set(rows(printed)) >= {"versions", "extras", "code", "gpus", "index", "run", "disks"}
    assert rows(printed)["index"] == rows(printed)["run"] == rows(printed)["code"] == "ok"
    starts = {len(start) for start in re.findall(r"^  \w[\w ]*? +(?:ok|note|wrong) +", printed, re.M)}
    assert len(starts) == 1 and max(map(len, printed.splitlines())) <= doctor.WIDTH


@pytest.mark.parametrize("names", [["store.json", "scans"], ["notes.txt"], ["a", "b", "c", "d"], [".hidden"]])
def test_a_run_where_other_things_lie_is_wrong(tmp_path, capsys, monkeypatch, names):
    """pretrain refuses it, too."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in names:
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / name).write_text("")
    result = doctor.run(config(run=str(tmp_path / "r")))
    (line,) = [line for line in result.lines if line.check == "run"]
    assert line.state == "wrong" and re.search(r"holds .*, and is no run of pgl_ray", line.text)
    assert f"such as {tmp_path}/r/run1" in line.mend
    with pytest.raises(FailedRun, match="run would stop a run"):
        doctor.describe(result)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(names)
    with pytest.raises(ValueError, match="exists and is not a run of pgl_ray"):
        runs.open_run(build(PretrainConfig, {"index": "s", "run": str(tmp_path / "r")}), "pretrain", {})


@pytest.mark.parametrize("names", [[], ["run.json", "best.pt"], ["sweep.json", "trials"], [".lock"]])
def test_a_run_that_can_go_on_is_well(tmp_path, names):
    (tmp_path / "r").mkdir()
    for name in names:
        (tmp_path / "r" / name).write_text("")
    assert doctor_places.taken_by(str(tmp_path / "r")) == "" == doctor_places.taken_by(str(tmp_path / "new/r"))


def test_a_machine_without_the_packages_says_so(tmp_path):
    """Only what reads the command line is there, in an environment of its own."""
    needed = ("pydantic", "pydantic_core", "omegaconf", "yaml", "antlr4", "packaging", "typing_extensions.py")
    needed += ("annotated_types", "typing_inspection", "tqdm")
    site = Path(pydantic.__file__).parents[1]
    for name in needed:
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    command = [sys.executable, "-S", "-m", "pgl_ray.doctor", f"run={tmp_path}/run"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "versions, run would stop a run" in done.stderr, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "this machine: not installed: 'torch>=2.8' 'ray>=2.60,<2.61'" in said
    assert "No module named 'filelock' mend: install what is missing there" in said


def test_nodes_have_names_and_folders_of_their_own():
    nodes = [{"NodeManagerAddress": f"10.0.0.{k}"} for k in (1, 2, 1, 11)]
    assert doctor.names_of(nodes) == ["10.0.0.1 (1)", "10.0.0.2", "10.0.0.1 (2)", "10.0.0.11"]
    path = "/scratch/ray/session_2026-11-29_05-52-53_123456_77/sockets/plasma_store"
    assert doctor.tmp_dir_of({"ObjectStoreSocketName": path}) == "/scratch/ray"
    assert doctor.tmp_dir_of({"ObjectStoreSocketName": ""}) is doctor.tmp_dir_of({}) is None


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "ray.address=127.0.0.1:1: Connection refused"),
        ("no.such.host.invalid:6379", "ray.address=no.such.host.invalid:6379: "),
        ("127.0.0.1:many", "its port is no number"),
    ],
)
def test_a_cluster_that_is_not_there(capsys, address, text):
    with pytest.raises(SystemExit) as error:
        cli.call("doctor", [f"ray.address={address}"])
    said = capsys.readouterr()
    assert error.value.code == 1 and "pgl_ray.doctor: cluster would stop a run" in said.err and text in said.out
    assert "mend: start it (ray start --head)" in said.out and rows(said.out)["versions"]


def test_storage_that_never_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LOOK_S", 0.2)
    monkeypatch.setattr(doctor, "leave_mark", lambda run: time.sleep(30))
    result = doctor.run(config(run=str(tmp_path)))
    with pytest.raises(FailedRun, match=r"^run would stop a run"):
        doctor.describe(result._replace(lines=[line for line in result.lines if line.check == "run"]))
    assert "no answer within 0 s (a network file system that hangs" in capsys.readouterr().out


def test_what_cannot_be_written_is_wrong(capsys):
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    assert "run" in {line.check for line in doctor.run(config(run="/proc/run")).lines if line.state == "wrong"}
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.slow
def test_a_terminal_has_colours_and_a_pipe_none(tmp_path):
    command = [sys.executable, "-m", "pgl_ray.doctor", "ray.address=127.0.0.1:1"]
    written = in_terminal(command, code=1)
    assert "\x1b[31mwrong\x1b[0m" in written and "\x1b[32mok   \x1b[0m" in written
    piped = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert piped.returncode == 1 and "\x1b" not in piped.stdout + piped.stderr
    plain = re.sub(r"\x1b\[\d+m", "", written)
    assert plain.split("\r\n")[:3] == piped.stdout.splitlines()[:3] and screen(plain)


# -- a cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture
def network():
    """Two hosts."""
    try:
        made = hosts.Network(2)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.close()


@pytest.mark.cluster
def test_a_node_with_faults(network):
    """The second host has another monai, names an interface that it has not, and sees an empty disk where the first
    has the run; the hosts' name leads to an address of neither."""
    with tempfile.TemporaryDirectory(prefix="pgl", ignore_cleanup_errors=True) as temp:
        folder = Path(temp)
        (folder / "shared").mkdir()
        store = make_store(folder / "store")
        fake = folder / "packages" / "monai-1.5.0.dist-info"
        fake.mkdir(parents=True)
        (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: monai\nVersion: 1.5.0\n")
        env = hosts.environment() | {"PYTHONPATH": str(ROOT)}
        faulty = env | {"GLOO_SOCKET_IFNAME": "ib0", "PYTHONPATH": f"{fake.parent}"}
        own_disk = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {folder}/shared && exec "$0" "$@"')
        head = f"{hosts.address(1)}:6379"
        nodes = []

        def start(k: int, env: dict, inside: tuple, *arguments: str) -> None:
            own = [f"--node-ip-address={hosts.address(k)}", f"--temp-dir={folder}/{k}", "--num-cpus=1"]
            nodes.append(hosts.Node(folder / f"log_{k}", [*own, *arguments], env, (*network.inside(k), *inside)))
            until = time.monotonic() + 60
            while "--block" not in nodes[-1].log.read_text():
                assert time.monotonic() < until, nodes[-1].log.read_text()
                time.sleep(0.1)

        try:
            start(1, env, (), "--head", "--port=6379", "--include-dashboard=false")
            start(2, faulty, own_disk, f"--address={head}")
            command = [sys.executable, "-m", "pgl_ray.doctor", f"ray.address={head}", f"index={store}"]
            command = [*network.inside(1), *command, f"run={folder}/shared/run"]
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=90)
            assert time.monotonic() - began < 60
        finally:
            for node in nodes:
                node.kill()
        print(done.stdout + done.stderr)  # shown where the test fails
        states = rows(done.stdout)
        wrong = {check for check, state in states.items() if state == "wrong"}
        assert done.returncode == 1 and wrong >= {"interfaces", "host names", "run"}, done.stdout + done.stderr
        assert {states[check] for check in ("cluster", "answers", "code", "clocks", "index")} == {"ok"}
        said = " ".join(done.stdout.split())
        assert re.search(rf"free for Ray in {folder}/[12],", said)
        first, second = hosts.address(1), hosts.address(2)
        assert f"{second}: monai 1.5.0 where this machine has" in said and states["versions"] == "note"
        assert f"{second}: GLOO_SOCKET_IFNAME=ib0 is none of its interfaces; there are eth0, lo" in said
        assert f"{second}: run={folder}/shared/run: does not see what is written to {folder}/shared" in said
        assert f"{first}: its name {socket.gethostname()} leads to" in said
        assert not list((folder / "shared").iterdir())
