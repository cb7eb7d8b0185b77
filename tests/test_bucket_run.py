"""Runs in a bucket: what is there counts, whatever happens to the machines that work on it."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hosts
import pytest
import torch
import train_loop as loop

from pgl_ray import config as c
from pgl_ray import evaluate, export, finetune, probe, report
from pgl_ray.config import FailedRun
from pgl_ray.data.bucket import Bucket
from pgl_ray.train import checkpoint, mirror, retry, run_paths, runs
from pgl_ray.train.events import Notes, read_events
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.writer import Writer

ROOT = str(Path(__file__).parents[1])
TINY = ["encoder.width=8", "encoder.depths=[1,1,1,1]", "heads.hidden=16", "heads.out=8", "views.size=[8,16,32]"]
TINY += ["global_batch_size=4", "health.every=10", "train.num_workers=2", "train.log_every=1"]
TINY += ["train.checkpoint_every=2", "train.threads_per_worker=1"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return loop.scans(tmp_path_factory.mktemp("scans") / "store")


@pytest.fixture
def run(s3, tmp_path, monkeypatch) -> str:
    """URL of a run, and a machine without any copy of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine_1"))
    return f"{s3}/{tmp_path.name}/run"


def lose_the_machine() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


def keys(run: str, start: str = "checkpoint_") -> list[str]:
    return sorted(key for key in Bucket(run).versions() if key.startswith(start))


def check_the_same(one: dict, other: dict) -> None:
    for state in (one, other):
        state["meta"].pop("config")  # names the run
    assert loop.equal(one, other)


def state_in(run: str) -> dict:
    """State of the newest checkpoint that lies in the bucket, read without the code under test."""
    place, name = Bucket(run), max(key.split("/")[0] for key in keys(run) if key.endswith(".json"))
    path = Path(os.environ["XDG_CACHE_HOME"], "state_in.pt")
    path.write_bytes(place.read(f"{name}/state.pt"))
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning], ids=["pretrain", "finetune"])
def test_a_run_whose_machine_is_lost_ends_as_the_undisturbed_one(scans, run, tmp_path, make, monkeypatch):
    whole, killed = (make(scans, place) for place in (tmp_path / "whole", run))
    loop.train(whole)
    with pytest.raises(loop.Killed):
        loop.train(killed, until=3)
    lose_the_machine()
    assert checkpoint.committed_step(run) == 2
    loop.train(killed)
    check_the_same(loop.state_of(whole.run), state_in(run))
    assert loop.rows_of(whole.run) == loop.rows_of(run)
    kept = [f"checkpoint_0000000{step}/{name}" for step in (4, 6) for name in ("checkpoint.json", "state.pt")]
    assert keys(run) == kept and {"run.json", "config.yaml", "metrics.jsonl"} <= set(keys(run, ""))
    assert keys(run, "events.out.tfevents") and not keys(run, ".")
    if make is loop.finetuning:
        best = [checkpoint.state_of(place) for place in (whole.run, run)]
        assert best[0]["val_dice"] == best[1]["val_dice"] and loop.equal(best[0]["model"], best[1]["model"])
        assert finetune.run(killed).val_dice == best[0]["val_dice"]  # finished: at once
        monkeypatch.setattr(evaluate, "FORWARD_SIZE", (8, 32, 32))
        check_readers(run, scans, tmp_path)


def check_readers(run: str, scans: Path, tmp_path: Path) -> None:
    """Evaluation, probe and report of a run in a bucket lie there, too."""
    window = {"index": str(scans), "num_scans": 1}
    done = evaluate.run(c.build(c.EvaluateConfig, {"run": run, "split": "train", **window}))
    assert done.folder == f"{run}/evaluation" and len(keys(run, "evaluation/predictions/")) == 1
    sizes = {"size": [8, 16, 32], "test_split": "train", "num_test_scans": 1, "voxels_per_class": 5}
    probe.run(c.build(c.ProbeConfig, {"init": run, **window, **sizes}))
    other = {"compare": run, "output": str(tmp_path / "again")}
    evaluate.run(c.build(c.EvaluateConfig, {"run": f"{run}/best.pt", "split": "train", **window, **other}))
    lose_the_machine()
    place = Bucket(run)
    facts = {"num_parameters": 1, "scans": {"train": [], "val": []}, "store": {"num_scans": 6}}
    place.write("run.json", [json.dumps(json.loads(place.read("run.json")) | facts).encode()])
    assert report.run(c.build(c.ReportConfig, {"run": run})) == f"{run}/report.html"
    page = place.read("report.html").decode()
    assert run in page and "Predicted and true labels" in page and "is not evaluated" not in page


# -- what is in the bucket counts --------------------------------------------------------------------------------------


def start(run: str, steps: tuple[int, ...] = (2, 4), changes: dict | None = None) -> None:
    """A run with checkpoints, written as the door's processes write them."""
    config = c.build(c.PretrainConfig, {"index": "/s", "run": run} | (changes or {}))
    assert runs.open_run(config, "pretrain", {"plan": "p", "num_steps": 9}) == run
    with runs.locked(run), runs.joined(run, 0) as (folder, push):
        writer = Writer(folder, 2, push=push)
        for step in steps:
            writer.save({"step": step, "weights": torch.full((50_000,), float(step))}, step, {})
            while writer.waiting:
                time.sleep(0.001)
        writer.close()
        assert writer.fault is None


def test_a_checkpoint_counts_from_its_manifest_on(run, monkeypatch):
    """Files first, the manifest last, then those go that are not kept; killed in between, nothing is lost."""
    start(run)
    written, write = [], Bucket.write

    def noted(place, key, parts):
        if not key.startswith("."):
            written.append(key)
        if written[-1:] == ["checkpoint_00000008/checkpoint.json"]:
            raise SystemExit  # the machine dies between the two
        write(place, key, parts)

    with pytest.raises(SystemExit), runs.locked(run), runs.joined(run, 0) as (folder, push):
        Path(folder, "metrics.jsonl").write_text('{"step": 6}\n')
        monkeypatch.setattr(Bucket, "write", noted)
        for step in (6, 8):
            checkpoint.write_checkpoint(Path(folder), step, {"step": step}, {})
            push()
    monkeypatch.setattr(Bucket, "write", write)
    names = ["metrics.jsonl", *(f"checkpoint_0000000{step}/{file}" for step in (6, 8) for file in FILES)]
    assert written[: len(names)] == names
    assert checkpoint.committed_step(run) == 6 and "checkpoint_00000008/state.pt" in keys(run)
    with runs.locked(run) as (_, _, found):  # here it is whole, but other machines cannot see that
        assert found[1] == 6
    assert keys(run) == [f"checkpoint_0000000{step}/{file}" for step in (2, 4, 6) for file in sorted(FILES)]


FILES = ("state.pt", "checkpoint.json")


@pytest.mark.parametrize("kind", ["bit", "missing", "manifest"])
def test_a_damaged_checkpoint_in_a_bucket_gives_way_to_the_last(run, kind, capsys):
    """Also on the machine that wrote it, whose copy is whole."""
    start(run)
    place, key = Bucket(run), "checkpoint_00000004/state.pt"
    if kind == "bit":
        data = bytearray(place.read(key))
        data[len(data) // 2] ^= 1
        place.write(key, [bytes(data)])
    elif kind == "missing":
        place.remove(key)
    else:
        place.write("checkpoint_00000004/checkpoint.json", [b"{"])
    with runs.locked(run) as (_, _, found):
        assert found[1] == 2 and checkpoint.read_state(found[0] / "state.pt")["step"] == 2
    assert "checkpoint_00000004 is damaged" in capsys.readouterr().out
    assert keys(run) == [f"checkpoint_00000002/{file}" for file in sorted(FILES)]
    assert read_events(run_paths.followed(run), {})[1]  # what was noted is there for others


def test_damage_of_this_machines_copy_does_no_harm(run):
    start(run)
    (path,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("checkpoint_00000004/state.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with runs.locked(run) as (_, _, found):
        assert found[1] == 4 and checkpoint.read_state(found[0] / "state.pt")["step"] == 4


def test_a_run_that_was_removed_leaves_nothing_on_the_machine(run):
    start(run, (2, 4, 6))
    place = Bucket(run)
    for name in place.names(""):
        place.remove(name)
    start(run, (1,), {"seed": 1})
    with runs.locked(run) as (_, _, found):
        assert found[1] == 1


def test_a_run_goes_on_by_its_own_config_only(run):
    start(run)
    with pytest.raises(ValueError, match=rf"run={run} was started with another seed \(0 there, 1 here\)"):
        start(run, (), {"seed": 1})
    Bucket(f"{run}_2").write("notes.txt", [b"mine"])
    with pytest.raises(ValueError, match=f"run={run}_2 exists and is not a run of pgl_ray"):
        start(f"{run}_2")
    with pytest.raises(ValueError, match="s3://nothing-here/run: there is no such bucket"):
        start("s3://nothing-here/run")


def test_a_run_moves_between_a_bucket_and_a_folder(run, tmp_path):
    start(run)
    for key in keys(run, ""):
        path = tmp_path / "run" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Bucket(run).read(key))
    config = c.build(c.PretrainConfig, {"index": "/s", "run": str(tmp_path / "run")})
    with runs.locked(runs.open_run(config, "pretrain", {"plan": "p"})) as (_, _, found):
        assert found == (tmp_path / "run/checkpoint_00000004", 4)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            key = path.relative_to(tmp_path / "run").as_posix()
            Bucket(f"{run}_2").write(key, [path.read_bytes() or b"\n"])
    start(f"{run}_2", (6,))
    assert checkpoint.committed_step(f"{run}_2") == 6


def test_one_driver_at_a_time(run, monkeypatch):
    monkeypatch.setattr("pgl_ray.data.bucket.HEARTBEAT_S", 0.2)
    start(run)
    with runs.locked(run):
        refusal = rf"run={run} is being trained by process {os.getpid()} on .*: wait for it, or end it"
        with pytest.raises(ValueError, match=refusal), runs.locked(run):
            pass
        with pytest.raises(FailedRun, match="taken over"), runs.joined(run, 0) as (folder, push):
            runs.recover(run)  # its workers start anew: this one is cut off from the others, not from the bucket
            writer = Writer(folder, 2, push=push)
            writer.save({"step": 6}, 6, {})
            writer.close()
            assert f"another start of its workers has taken over run={run}" in writer.fault
    assert checkpoint.committed_step(run) == 4
    with pytest.raises(FailedRun, match=f"no process has run={run} any more"), runs.joined(run, 0):
        pass


@pytest.mark.slow
def test_a_driver_that_lost_its_lock_does_no_harm(run, monkeypatch):
    """It was cut off for so long that another one took over; then it comes back."""
    monkeypatch.setattr("pgl_ray.data.bucket.HEARTBEAT_S", 0.2)
    start(run)
    with runs.locked(run) as held:
        place = Bucket(run)
        place.write(".part/run", [b"another"])
        place.write(".part/start", [b"another's workers"])
        place.write(".lock", [b"process 1 on another"])
        time.sleep(0.6)
        assert place.read(".lock") == b"process 1 on another"
        with pytest.raises(FailedRun, match="is over"):
            runs.recover(run, held.token)
        assert place.read(".part/start") == b"another's workers"
    assert {".lock", ".part/run", ".part/start"} <= set(keys(run, ""))


def test_a_run_of_an_earlier_version_loses_nothing(run):
    start(run)
    before = keys(run)
    for key in before:
        if key.endswith("checkpoint.json"):
            Bucket(run).remove(key)
    Bucket(run).write("checkpoint_manager_snapshot.json", [b"{}"])
    with pytest.raises(ValueError, match=r"of an earlier version, .* take a new run"), runs.locked(run):
        pass
    assert keys(run, "checkpoint_0") == [key for key in before if key.endswith("state.pt")]


def test_a_faulty_transfer_costs_no_checkpoint(run, monkeypatch):
    start(run)
    lose_the_machine()
    copy_to, faults = Bucket.copy_to, []

    def faulty(place, key, path):
        copy_to(place, key, path)
        if key.endswith("state.pt") and not faults:
            faults.append(key)
            flip_a_bit(path)

    monkeypatch.setattr(Bucket, "copy_to", faulty)
    with runs.locked(run) as (_, _, found):
        assert faults and found[1] == 4


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_cut_index_in_the_cache_is_made_anew(run):
    start(run)
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        if path.name in ("work.json", "read.json"):
            path.write_text("")
    with runs.locked(run) as (_, _, found):
        assert found[1] == 4


def test_a_log_that_another_machine_continued_is_not_overwritten(run):
    start(run)
    log = run_paths.mirror(run).folder / "logs" / "rank_0.jsonl"
    with runs.locked(run):
        log.parent.mkdir(exist_ok=True)
        log.write_text("a1\na2\na3\n")  # the last two never got there
        Bucket(run).write("logs/rank_0.jsonl", [b"a1\nb1\n"])
        with runs.joined(run, 0):
            pass
    assert Bucket(run).read("logs/rank_0.jsonl") == b"a1\nb1\n"


def test_a_copy_is_called_by_its_url(run, tmp_path):
    """Also in a process that has not made it; a folder that only looks like one has its own name."""
    start(run)
    code = "import sys; from pgl_ray.train.run_paths import origin; print(*map(origin, sys.argv[1:]))"
    copies = [str(run_paths.followed(run)), str(run_paths.mirror(run).folder)]
    own = [str(tmp_path), str(tmp_path / "work"), str(tmp_path / "work" / "run"), "run", "work/run"]
    done = subprocess.run([sys.executable, "-c", code, *copies, *own], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [run, run, *own]


def test_results_of_another_machine_are_gone_on_with(run):
    start(run)
    with run_paths.results(run, "evaluation") as folder:
        folder.mkdir()
        for name in ("scans.jsonl", "compare_x.json"):
            (folder / name).write_text("1")
    lose_the_machine()
    with run_paths.results(run, "evaluation") as folder:
        assert (folder / "scans.jsonl").read_text() == "1"
    assert keys(run, "evaluation/") == ["evaluation/compare_x.json", "evaluation/scans.jsonl"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def in_bucket(run: str) -> dict[str, str]:
    return {key.removeprefix("evaluation/"): Bucket(run).read(key).decode() for key in keys(run, "evaluation/")}


def evaluate_some(folder: Path, name: str) -> None:
    """As an evaluation does: a log grows, a file of its own is added, one of before may go."""
    folder.mkdir(exist_ok=True)
    (folder / "again.txt").unlink(missing_ok=True)
    with (folder / "scans.jsonl").open("a") as file:
        file.write(f"{name}\n")
    (folder / name).write_text(name)


@pytest.mark.parametrize("turns", ["121", "1221", "12131", "111"])
def test_results_of_machines_in_turn_are_those_of_one(run, tmp_path, monkeypatch, turns):
    for number, machine in enumerate(turns):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine_{machine}"))
        name = "again.txt" if number == 1 else f"{number}.txt"  # the next turn removes it
        evaluate_some(tmp_path / "one", name)
        with run_paths.results(run, "evaluation") as folder:
            evaluate_some(folder, name)
        assert in_bucket(run) == contents(tmp_path / "one")


@pytest.mark.parametrize("since", ["nothing", "own results", "results of another machine"])
def test_interrupted_results_go_on_unless_others_are_newer(run, tmp_path, monkeypatch, since):
    def interrupted():
        with run_paths.results(run, "evaluation") as folder:
            evaluate_some(folder, "half.txt")
            raise KeyboardInterrupt

    if since == "own results":
        with run_paths.results(run, "evaluation") as folder:
            evaluate_some(folder, "a.txt")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    if since == "results of another machine":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine_2"))
        with run_paths.results(run, "evaluation") as folder:
            evaluate_some(folder, "b.txt")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine_1"))
    expected = {"nothing": {"half.txt"}, "own results": {"a.txt", "half.txt"}}.get(since, {"b.txt"})
    with run_paths.results(run, "evaluation") as folder:
        assert contents(folder).keys() == expected | {"scans.jsonl"}
    assert in_bucket(run).keys() == expected | {"scans.jsonl"}


@pytest.mark.parametrize("calls", range(4))
def test_a_kill_while_results_are_written_costs_none(run, monkeypatch, calls):
    """After so many objects: all names of before are still there, and this machine goes on with what it has."""
    with run_paths.results(run, "evaluation") as folder:
        for name in ("again.txt", "scans.jsonl"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("before\n")
    before, left = in_bucket(run), [calls]

    def until_killed(call):
        def killed(place, key, *parts):
            if key.startswith("evaluation"):
                if not left[0]:
                    raise SystemExit
                left[0] -= 1
            call(place, key, *parts)

        return killed

    with monkeypatch.context() as patched:
        for name in ("write", "remove"):
            patched.setattr(Bucket, name, until_killed(getattr(Bucket, name)))
        with contextlib.suppress(SystemExit), run_paths.results(run, "evaluation") as folder:
            evaluate_some(folder, "new.txt")
    after = {"scans.jsonl": "before\nnew.txt\n", "new.txt": "new.txt"}
    assert in_bucket(run).keys() >= before.keys() or in_bucket(run) == after
    with run_paths.results(run, "evaluation") as folder:
        assert contents(folder) == after
    assert in_bucket(run) == after


def test_a_refused_key_is_not_tried_for_minutes(run, monkeypatch):
    start(run)
    with runs.locked(run):
        monkeypatch.setattr(Bucket, "ask", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no access")))
        began = time.monotonic()
        with pytest.raises(FailedRun, match="no access"), runs.joined(run, 0):
            pass
        assert time.monotonic() - began < 5
        monkeypatch.undo()


def test_a_start_that_failed_between_two_objects_starts_again(run, monkeypatch):
    config = c.build(c.PretrainConfig, {"index": "/s", "run": run})
    write = Bucket.write

    def failing(place, key, parts):
        if key == "config.yaml":
            raise OSError("the bucket fails")
        write(place, key, parts)

    monkeypatch.setattr(Bucket, "write", failing)
    with pytest.raises(OSError, match="the bucket fails"):
        runs.open_run(config, "pretrain", {"plan": "p"})
    monkeypatch.setattr(Bucket, "write", write)
    assert runs.open_run(config, "pretrain", {"plan": "p"}) == run


def test_a_driver_killed_before_its_first_object_is_no_run(run):
    """It has taken the lock, and no more."""
    for key in (".lock", ".part/run"):
        Bucket(run).write(key, [b"process 1 on gone, 0123"])
    config = c.build(c.PretrainConfig, {"index": "/s", "run": run})
    mirror = run_paths.mirror(run)
    assert not mirror.match()
    Bucket(run).remove(".lock")  # or its silence is waited for
    assert runs.open_run(config, "pretrain", {"plan": "p"}) == run


def test_an_evaluation_in_a_bucket_is_not_held_against_a_copy(run):
    """This machine's best.pt may be of before; what lies in the bucket belongs together."""
    Bucket(run).write("best.pt", [b"first"])
    assert run_paths.network(run).is_dir()
    Bucket(run).write("best.pt", [b"second"])
    made = {"checkpoint": hashlib.sha256(b"second").hexdigest()}
    Bucket(run).write("evaluation/scans.jsonl", [json.dumps(made).encode() + b"\n"])
    copy = run_paths.fetch_for_report(run)
    assert (copy / "evaluation/scans.jsonl").is_file() and not checkpoint.outdated(copy)


def test_a_bucket_that_fails_for_a_while_holds_nothing_up(run, monkeypatch, capsys):
    """As storage of any kind; what was noted meanwhile is in the bucket afterwards."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.02)
    start(run)
    failing, ask = threading.Event(), Bucket.ask

    def fragile(place, *args, **options):
        if failing.is_set():
            raise OSError(f"{place.url}: connection refused")
        return ask(place, *args, **options)

    monkeypatch.setattr(Bucket, "ask", fragile)
    with runs.locked(run), runs.joined(run, 0) as (folder, push):
        failing.set()
        writer = Writer(folder, 2, push=push)
        for step in (6, 8, 10):
            writer.save({"step": step}, step, {})
            time.sleep(0.05)
        until = time.monotonic() + 10
        while (parts := list(Path(folder).glob("*.part"))) and time.monotonic() < until:  # the last one on its way
            time.sleep(0.01)
        assert writer.fault is None and not parts
        failing.clear()
        writer.close()
        assert writer.fault is None and checkpoint.committed_step(run) == 10
    lines = capsys.readouterr().out.splitlines()
    assert "connection refused): trying again, training goes on" in lines[0] and "is written after" in lines[-1]
    events = b"".join(Bucket(run).read(key) for key in keys(run, "events/")).decode()
    assert events.count("cannot be written") == events.count("is written after") == 1
    failing.set()
    monkeypatch.setattr(retry, "RETRY_S", 0.05)
    with pytest.raises(FailedRun, match=f"run={run} cannot be read: {run}: connection refused"):
        runs.recover(run)


def test_logs_and_events_of_all_processes_come_together(run, monkeypatch):
    """Each process brings its own; a killed worker's last lines, on its machine alone, go there with the next ones."""
    monkeypatch.setattr(mirror, "PUSH_S", 0.05)
    start(run)
    place = Bucket(run)
    with runs.locked(run):
        with runs.joined(run, 1) as (folder, _):
            log = Path(folder, "logs/rank_1.jsonl")
            log.write_text("one\n")
            log.with_name("rank_0.jsonl").write_text("not mine\n")
            Path(folder, "metrics.jsonl").write_text("not mine\n")
            until = time.monotonic() + 60
            while not keys(run, "logs/"):
                assert time.monotonic() < until
                time.sleep(0.01)
        log.write_text("one\ntwo\n")
        with runs.joined(run, 1), log.open("a") as file:
            file.write("three\n")
            Notes(folder).add("mine")
        assert place.read("logs/rank_1.jsonl") == b"one\ntwo\nthree\n"
        assert keys(run, "logs/") == ["logs/rank_1.jsonl"] and not keys(run, "metrics")
    (own,) = keys(run, "events/")
    theirs = json.loads(place.read(own)) | {"pid": 0, "text": "theirs"}
    place.write("events/other.jsonl", [json.dumps(theirs).encode() + b"\n"])
    assert json.loads(place.read(own))["text"] == "mine"
    texts, ends = read_events(run_paths.followed(run))
    assert texts == ["theirs"] and read_events(run_paths.followed(run), ends)[0] == []


# -- the real thing ----------------------------------------------------------------------------------------------------

DOOR = """
import sys
from pgl_ray.data import bucket
bucket.SILENCE_S = 8  # a killed driver's lock
from pgl_ray import cli
cli.main("pretrain")
"""


@pytest.mark.cluster
@pytest.mark.soak
def test_a_killed_driver_and_a_lost_machine(scans, run, tmp_path):
    """SIGKILL of the driver, on the next machine the same command; two workers, with logs of their own."""
    command = [sys.executable, "-c", DOOR, f"index={scans}", f"run={run}", "max_steps=40", *TINY]
    environment = os.environ | {"PYTHONPATH": ROOT}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    while checkpoint.committed_step(run) < 4:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    environment["XDG_CACHE_HOME"] = str(tmp_path / "machine_2")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "is locked by process" in lines[0] and lines[-1].endswith(f"; run in {run}")
    assert 4 <= int(lines[1].split("steps ")[1].split()[0]) < 40
    assert any(line.startswith("  step 40/40, loss ") for line in lines), lines
    lose_the_machine()
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 41))
    for rank in (0, 1):
        rows = [json.loads(line) for line in Bucket(run).read(f"logs/rank_{rank}.jsonl").splitlines()]
        assert rows[0]["message"] == "start" and rows[-1]["message"] == "end"
        assert [row["message"] for row in rows].count("start") == 2
    page = report.run(c.build(c.ReportConfig, {"run": run, "output": str(tmp_path / "page.html")}))
    assert run in Path(page).read_text("utf-8")
    exported = export.run(c.build(c.ExportConfig, {"run": run, "output": str(tmp_path / "encoder.safetensors")}))
    assert Path(exported.output).stat().st_size > 10_000


@pytest.mark.cluster
@pytest.mark.soak
def test_nodes_that_share_nothing_but_the_bucket(scans, run, tmp_path):
    """A node is killed, with its disk, and another one comes: two workers on two nodes, the driver on a third."""
    with tempfile.TemporaryDirectory(prefix="pgl") as folder:
        environment = hosts.environment()
        nodes = hosts.Nodes(Path(folder), environment, num_nodes=2, num_cpus=2)
        try:
            options = ["max_steps=120", f"ray.address={nodes.address}", "train.cpus_per_worker=1.5"]
            command = [sys.executable, "-m", "pgl_ray.pretrain", f"index={scans}", f"run={run}", *TINY, *options]
            with (tmp_path / "log").open("w") as log:
                driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            while checkpoint.committed_step(run) < 4:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            killed_at, began = checkpoint.committed_step(run), time.monotonic()
            nodes.kill_one()
            shutil.rmtree(f"{folder}/cache_1", ignore_errors=True)
            nodes.add()
            assert driver.wait() == 0, (tmp_path / "log").read_text()
            print((tmp_path / "log").read_text(), f"killed at {killed_at}, {time.monotonic() - began:.0f} s to the end")
            worked = [path.parts[-5] for path in Path(folder).glob("cache_*/pgl_ray/runs/*/work")]
            assert {"cache_2", "cache_3"} <= set(worked)
        finally:
            nodes.close()
    assert killed_at < 100
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 121))
    for rank in (0, 1):
        rows = [json.loads(line) for line in Bucket(run).read(f"logs/rank_{rank}.jsonl").splitlines()]
        assert [row["message"] for row in rows].count("start") >= 2 and rows[-1]["message"] == "end"
