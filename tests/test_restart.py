"""Interrupted trainings: what continues is what would have been, whatever was killed, damaged or full."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_loop as loop

from pgl_ray import finetune
from pgl_ray.config import FailedRun
from pgl_ray.data import store, trainings
from pgl_ray.train import checkpoint, follow, health, progress, retry, runs, skipped
from pgl_ray.train.events import Notes, read_events
from pgl_ray.train.metrics import Metrics, read_metrics
from pgl_ray.train.run_files import EVENTS, MANIFEST, STATE
from pgl_ray.train.writer import Writer


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return loop.scans(tmp_path_factory.mktemp("scans") / "store")


@pytest.fixture
def quickly(monkeypatch):
    """Pauses between tries of a hundredth of a second."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.02)


def check_the_same(one: str, other: str) -> None:
    """States and metrics of two runs, bit for bit."""
    states = [loop.state_of(run) for run in (one, other)]
    for state in states:
        state["meta"].pop("config")  # names the run
    assert loop.equal(*states)
    assert loop.rows_of(one) == loop.rows_of(other)


@pytest.mark.slow
def test_batches_that_others_render_ahead_train_the_same(scans, tmp_path):
    """As on a GPU, whose worker is the process that asked."""
    for name, renderers in (("plain", 0), ("ahead", 2)):
        assert loop.train(loop.pretraining(scans, tmp_path / name), renderers=renderers) is None
    check_the_same(tmp_path / "plain", tmp_path / "ahead")


# -- scans that cannot be read -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(scans, tmp_path) -> Path:
    """The store with one shard of the six cut off."""
    folder = Path(shutil.copytree(scans, tmp_path / "broken"))
    shard = folder / "scans/s2/0/c/0/0/0"
    os.truncate(shard, shard.stat().st_size // 2)
    return folder


def test_a_scan_that_is_cut_off_ends_the_training_by_name(broken, tmp_path):
    with pytest.raises(RuntimeError, match="volume of scan 's2' has no valid chunk index"):
        loop.train(loop.pretraining(broken, tmp_path / "run", train={"num_workers": 2}), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_scan_that_is_cut_off_is_skipped_and_counted(broken, tmp_path, world):
    """Over an interruption, too; the same on any number of workers."""
    changes = {"stream": {"on_error": "skip", "max_skipped_share": 0.5}, "train": {"num_workers": world}}
    config = loop.pretraining(broken, tmp_path / "run", **changes)
    with pytest.raises(loop.Killed):
        loop.train(config, world, until=5)
    assert loop.train(config, world) is None
    plan = trainings.make_plan(config, store.read_index(broken))
    bad = (plan.rows(0, 6)[:, 1] == 2).sum()
    assert bad > 1 and json.loads((tmp_path / "run" / "skipped.json").read_text()) == {"s2": bad}
    rows = read_metrics(config.run)
    assert rows[-1]["data/skipped_share"] == bad / 24 and loop.state_of(config.run)["skipped"] == {2: bad}


def test_too_many_skipped_pairs_end_the_training(broken, tmp_path):
    changes = {"stream": {"on_error": "skip", "max_skipped_share": 0.1}, "train": {"num_workers": 2}}
    why = loop.train(loop.pretraining(broken, tmp_path / "run", **changes), 2)
    assert "were skipped, more than stream.max_skipped_share=0.1" in why and "cannot be read: s2" in why


def blank(rank: int, batch: dict) -> None:
    """Empties a batch's views."""
    for view in (batch["view_1"], batch["view_2"]):
        view.fill(0)


PLACES = {"align": {"flip": False, "output_stride": [4, 8, 8]}, "loss": {"kind": "contrast", "displacement": 1.0}}


@pytest.mark.parametrize("change", [{"method": "genesis", "optim": {"lr": None}}, {"method": "byol"}, PLACES])
def test_blank_views_end_a_run_of_any_method(scans, tmp_path, change):
    """Where a loss keeps features apart they do not collapse, though there is nothing to learn."""
    more = {"health": {"every": 1, "stop_on_collapse": True}, **change}
    why = loop.train(loop.pretraining(scans, tmp_path / "run", **more), seen=blank)
    assert why.startswith("stopped at step 2: nothing to learn from: 100% of the views have one value throughout")
    assert "look at the scans (pgl_ray.inspect)" in why


@pytest.mark.parametrize(("from_step", "said"), [(9, "nothing"), (2, "nothing"), (1, "skipped")])
def test_skipping_leaves_the_collapse_alarm_on(scans, tmp_path, monkeypatch, from_step, said):
    """Of two reasons to end a run the first is said: blank views end it at step 2."""

    def share(self, step: int, run: str | None) -> tuple[float, str | None]:
        return 0.5, "too many were skipped" if step >= from_step else None

    monkeypatch.setattr(skipped.Skipped, "share", share)
    changes = {"health": {"every": 1, "stop_on_collapse": True}, "stream": {"on_error": "skip"}}
    config = loop.pretraining(scans, tmp_path / "run", **changes)
    why = loop.train(config, seen=blank)
    assert said in why and ("stopped at step 2" in why) == (said == "nothing")
    if said == "nothing":
        assert [row["health/collapsed"] for row in loop.rows_of(config.run)] == [1, 1]
        assert checkpoint.committed_step(config.run) == 2


@pytest.mark.slow
def test_too_little_memory_in_fine_tuning_says_what_to_take(scans, tmp_path, monkeypatch):
    """In a step, the first update's momentum included, and in a validation, whose advice is fine-tuning's own."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("train.one_step.segmentation_loss", "train.health.norm"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pgl_ray.{name}", full)
            told = loop.train(loop.finetuning(scans, tmp_path / name))
        assert "out of memory on cpu at step 1 with 4 patches of 16x32x32 at a time; try accumulate=2" in told
    config = loop.finetuning(scans, tmp_path / "val")
    with monkeypatch.context() as patch:
        patch.setattr("pgl_ray.model.inference._segment", full)
        with pytest.raises(
            RuntimeError, match=r"validation: scan s.: the memory of cpu .*: take train.device=cpu, or a new"
        ):
            loop.train(config)


# -- exact resume ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning], ids=["pretrain", "finetune"])
def test_an_interrupted_run_is_bit_for_bit_the_undisturbed_one(scans, tmp_path, make, world):
    """Killed at step 3, one after a checkpoint: parameters, momentum, schedule, buffers, every loss."""
    changes = {"global_batch_size": 2 * world, "train": {"num_workers": world}}
    whole, killed = (make(scans, tmp_path / name, **changes) for name in ("whole", "killed"))
    assert loop.train(whole, world) is None
    with pytest.raises(loop.Killed):
        loop.train(killed, world, until=3)
    assert checkpoint.committed_step(killed.run) == 2
    loop.train(killed, world)
    check_the_same(whole.run, killed.run)
    state = loop.state_of(killed.run)
    assert state["step"] == 6 and state["schedule"]["last_epoch"] == 6 and state["versions"] == checkpoint.versions()
    if make is loop.finetuning:
        best = [checkpoint.read_state(Path(run.run) / "best.pt") for run in (whole, killed)]
        assert best[0]["val_dice"] == best[1]["val_dice"] and loop.equal(best[0]["model"], best[1]["model"])


@pytest.mark.slow
def test_fine_tuning_stops_when_it_overfits(scans, tmp_path, monkeypatch):
    """Three validations without a better Dice; not before the first above 0, and counted over an interruption. The best
    network is that of its step, and the run is over."""
    dice = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.2, 6: 0.1, 7: 0.3, 8: 0.3, 9: 0.1, 10: 0.2, 11: 0.9}

    def validate_from(step: int) -> None:
        steps = iter(range(step, 12))
        monkeypatch.setattr(finetune, "validate", lambda *_: {"val/dice": dice[next(steps)]})

    whole, killed = (
        loop.finetuning(scans, tmp_path / name, max_steps=20, validate_every=1, patience=3, patches_per_scan=1)
        for name in ("whole", "killed")
    )
    validate_from(1)
    assert loop.train(whole) is None
    with pytest.raises(loop.Killed):
        loop.train(killed, until=9)
    assert checkpoint.committed_step(killed.run) == 8
    validate_from(9)
    assert loop.train(killed) is None
    for config in (whole, killed):
        state, best = loop.state_of(config.run), checkpoint.read_state(Path(config.run) / "best.pt")
        assert (state["step"], state["stopped"], state["stale"], state["best"]) == (10, True, 3, 0.3)
        assert (best["step"], best["val_dice"]) == (7, 0.3)
        result = finetune.run(config)  # without Ray: nothing is left to do
        assert result.already_finished and result.steps == 10 and result.val_dice == 0.3
        assert "3 validations without a better val/dice than that of step 7" in finetune.describe(result)
    check_the_same(whole.run, killed.run)


@pytest.mark.slow
def test_a_begun_fine_tuning_needs_no_initial_weights(scans, tmp_path):
    """Interrupted, continued and asked for again without the pre-training's folder: the same to the last bit."""
    pretrained = loop.pretraining(scans, tmp_path / "pre")
    loop.train(pretrained)
    whole, killed = (loop.finetuning(scans, tmp_path / name, init=pretrained.run) for name in ("whole", "killed"))
    assert loop.train(whole) is None
    with pytest.raises(loop.Killed):
        loop.train(killed, until=3)
    shutil.rmtree(pretrained.run)
    assert loop.train(killed) is None
    assert finetune.run(killed).already_finished
    check_the_same(whole.run, killed.run)
    with pytest.raises(ValueError, match="does not exist"):
        finetune.run(loop.finetuning(scans, tmp_path / "new", init=pretrained.run))


@pytest.mark.slow
def test_with_other_workers_no_pair_is_repeated_or_lost(scans, tmp_path):
    """Two workers, killed, then one, killed, then two: the pairs of the steps that count are those of the plan."""
    config = loop.pretraining(scans, tmp_path / "run")

    def seen(rank: int, batch: dict) -> None:
        rows = np.stack([batch[name] for name in ("step", "epoch", "scan", "draw")], 1).tolist()
        with (tmp_path / f"{number}_{rank}.jsonl").open("a") as file:
            file.writelines(json.dumps([number, *row]) + "\n" for row in rows)

    starts = []
    for world, until in ((2, 3), (1, 5), (2, None)):
        number = len(starts)
        starts.append(checkpoint.committed_step(config.run))
        if until is None:
            loop.train(config, world, seen=seen)
        else:
            with pytest.raises(loop.Killed):
                loop.train(config, world, until, seen)
    assert starts == [0, 2, 4]
    rows = [json.loads(line) for path in tmp_path.glob("*_*.jsonl") for line in path.read_text().splitlines()]
    ends = [*starts[1:], 6]  # what a start did beyond the next one's checkpoint does not count
    counted = sorted(tuple(row[1:]) for row in rows if row[1] < ends[row[0]])
    plan = trainings.make_plan(config, store.read_index(config.index))
    columns = plan.columns(0, plan.num_steps)
    assert counted == sorted(zip(*(columns[name].tolist() for name in ("step", "epoch", "scan", "draw")), strict=True))
    assert [row["step"] for row in loop.rows_of(config.run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning])
def test_with_fewer_workers_the_same_batch_goes_through_in_parts(scans, tmp_path, make):
    """One worker of an elastic run of two: per step the loss and, up to rounding, the gradient of two workers."""
    changes = {"train": {"min_workers": 1, "max_workers": 2}, "max_steps": 4}
    if make is loop.pretraining:
        changes["health"] = {"every": 1}
    two, one = (make(scans, tmp_path / name, **changes) for name in ("two", "one"))
    loop.train(two, 2)
    loop.train(one, 1)
    rows = [{row["step"]: row for row in loop.rows_of(run.run) if "train/loss" in row} for run in (two, one)]
    if make is loop.finetuning:  # its Dice is that of a worker's batch, whatever the parts
        assert len(rows[0]) == len(rows[1]) == 4
        return
    for step, row in rows[0].items():
        assert rows[1][step]["train/lr"] == row["train/lr"]
        assert rows[1][step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-3), step
    assert {k for k in rows[0][4] if k.startswith("health/")} == {k for k in rows[1][4] if k.startswith("health/")}


@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning])
def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(scans, tmp_path, make):
    config = make(scans, tmp_path / "run")

    def seen(rank: int, batch: dict) -> None:
        if batch["step"][0] == 4:
            for value in batch.values():
                if value.dtype.kind == "f":
                    value.fill(np.nan)

    said = loop.train(config, seen=seen)
    assert (
        "train/loss is nan" in said
        and f"at step 5: start a new run=... with a lower optim.lr than {config.optim.lr}" in said
    )
    assert checkpoint.committed_step(config.run) == 4 and [row["step"] for row in loop.rows_of(config.run)][-1] == 4
    if make is loop.finetuning:
        best = checkpoint.state_of(config.run)
        assert (
            best["step"] in (2, 4) and f"best.pt keeps the best network so far (val/dice {best['val_dice']:.4f}" in said
        )


@pytest.mark.slow
@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning])
def test_weights_that_blow_up_on_one_worker_end_the_run_on_both(scans, tmp_path, make):
    config = make(scans, tmp_path / "run")

    def seen(rank: int, batch: dict) -> None:
        if rank == 1 and batch["step"][0] == 3:
            health.is_sound = lambda module: False  # in this worker's process alone

    said = loop.train(config, 2, seen=seen)
    what = "the weights have blown up by step 4: start a new run=... with a lower optim.lr than"
    assert said.startswith(f"{what} {config.optim.lr}")
    assert checkpoint.committed_step(config.run) == 2


def test_weights_that_blow_up_at_once_leave_nothing(scans, tmp_path):
    """Though loss and gradient before the update were finite."""
    config = loop.finetuning(scans, tmp_path / "run", optim={"lr": 1e30}, train={"checkpoint_every": 1})
    assert re.match(
        r"the weights have blown up by step 1: .*lower optim.lr than 1e\+30; nothing was kept", loop.train(config)
    )
    assert not checkpoint.committed_step(config.run) and not list(Path(config.run).glob("**/*.pt"))


@pytest.mark.slow
def test_a_worker_that_stands_still_is_named(scans, tmp_path):
    """Rank 1 waits for a batch that does not come: rank 0 says so before its collective ends, and rank 1 its stack."""
    config = loop.pretraining(scans, tmp_path / "run", train={"num_workers": 2, "timeout_s": 5})

    def seen(rank: int, batch: dict) -> None:
        if rank == 1 and batch["step"][0] == 2:
            time.sleep(8)

    with pytest.raises(
        RuntimeError, match=r"rank 1 \(process \d+ on .*\) stands still at step 2, waiting for its batch"
    ):
        loop.train(config, 2, seen=seen)
    (line,) = [line for line in Path(config.run, EVENTS).read_text().splitlines() if "rank 0 has" in line]
    assert "stands still at step 2" in line and "train.timeout_s" in line
    stacks = [Path(config.run, "logs", f"rank_{rank}.stack").read_text() for rank in range(2)]
    assert all(text.startswith("Timeout (") for text in stacks)
    assert "in seen" in stacks[1] and "in seen" not in stacks[0]


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_named(scans, tmp_path):
    config = loop.pretraining(scans, tmp_path / "run", train={"num_workers": 2, "timeout_s": 5})

    def seen(rank: int, batch: dict) -> None:
        if rank == 1 and batch["step"][0] == 2:
            subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(RuntimeError, match=r"rank 1 \(process \d+ on .*\) does not answer, last heard of at step \d"):
        loop.train(config, 2, seen=seen)


@pytest.mark.slow
def test_no_step_draws_from_a_global_generator(scans, tmp_path):
    """So that there is no random state to keep: all that is random comes from (seed, epoch, scan, draw)."""

    def seen(rank: int, batch: dict) -> None:
        now = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
        with (tmp_path / "states").open("a") as file:
            file.write(f"{hash(repr(now))}\n")

    loop.train(loop.pretraining(scans, tmp_path / "a", stream={"on_gpu": "intensity"}), seen=seen)
    assert len(set((tmp_path / "states").read_text().splitlines())) == 1
    (tmp_path / "states").unlink()
    loop.train(loop.finetuning(scans, tmp_path / "b"), seen=seen)
    assert len(set((tmp_path / "states").read_text().splitlines())) == 1


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit": lambda place: flip(place / STATE, 0.5),
    "cut": lambda place: os.truncate(place / STATE, 1000),
    "missing": lambda place: (place / STATE).unlink(),
    "manifest": lambda place: (place / MANIFEST).write_text("{"),
}


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """A finished run."""
    config = loop.pretraining(scans, tmp_path_factory.mktemp("trained") / "run")
    loop.train(config)
    return config


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(trained, tmp_path, capsys, kind):
    config = trained.model_copy(update={"run": str(tmp_path / "run")})
    shutil.copytree(trained.run, config.run)
    DAMAGES[kind](Path(config.run, "checkpoint_00000006"))
    if kind == "bit":
        loop.train(config)  # does the last two steps again
        check_the_same(trained.run, config.run)
    else:
        with runs.locked(config.run) as (_, _, found):
            assert found == (Path(config.run, "checkpoint_00000004"), 4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert "checkpoint checkpoint_00000006 is damaged" in line and "continuing from checkpoint_00000004" in line
    assert Path(config.run, "checkpoint_00000006.damaged").is_dir()
    with Path(config.run, EVENTS).open() as file:
        assert line.strip() == json.loads(file.readline())["text"]


def test_where_all_checkpoints_are_damaged_nothing_starts_anew(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    for place, _ in checkpoint.checkpoints(run):
        flip(place / STATE, 0.3)
    with pytest.raises(FailedRun, match="all 2 checkpoints are damaged"), runs.locked(str(run)):
        pass
    assert len(checkpoint.checkpoints(run)) == 2  # as they were


@pytest.mark.parametrize("manifest", [None, "{}", "[]", '{"step": 4}'])
def test_a_checkpoint_that_nothing_vouches_for_is_damaged(trained, tmp_path, manifest):
    """Also one of a version that wrote no sha256: nothing starts anew beside it."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    for place, _ in checkpoint.checkpoints(run):
        (place / MANIFEST).unlink()
        if manifest:
            (place / MANIFEST).write_text(manifest)
    why = f"{MANIFEST} (is missing|holds no sha256)"
    with pytest.raises(FailedRun, match=rf"all 2 checkpoints are damaged \({why}\): take a new"), runs.locked(str(run)):
        pass
    assert len(checkpoint.named(run)) == 2  # as they were


def endless(run: str) -> None:
    writer = Writer(run, 2)
    for step in range(1, 10**6):
        writer.save({"step": step, "weights": torch.full((5000,), float(step))}, step, {})
        while writer.waiting and not writer.fault:
            time.sleep(0.0005)


def test_killed_while_a_step_is_written_again_costs_nothing(tmp_path, monkeypatch):
    """A run that continued from an earlier checkpoint writes the same step anew: the old one counts until then."""
    checkpoint.write_checkpoint(tmp_path, 5, {"weights": torch.zeros(3)}, {})

    own = checkpoint.put_in_place

    def killed(aside, place):
        if place.suffix == "" and place.name.startswith("checkpoint_"):
            raise KeyboardInterrupt
        own(aside, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "put_in_place", killed)
        checkpoint.write_checkpoint(tmp_path, 5, {"weights": torch.ones(3)}, {})
    assert runs.recover(tmp_path) == (tmp_path / "checkpoint_00000005", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000005"]
    (tmp_path / "checkpoint_00000005").rename(tmp_path / "checkpoint_00000005.old")
    (tmp_path / "checkpoint_00000005.old" / STATE).write_bytes(b"half removed")
    assert runs.recover(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(6):
        child = multiprocessing.get_context("fork").Process(target=endless, args=(str(tmp_path),))
        child.start()
        while checkpoint.committed_step(tmp_path) <= last:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        for place, step in checkpoint.checkpoints(tmp_path):
            assert checkpoint.damage_of(place) is None
            assert (checkpoint.read_state(place / STATE)["weights"] == step).all()
        with runs.locked(str(tmp_path)) as (_, _, found):
            assert found == checkpoint.committed(tmp_path)
        assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.old"))
        shutil.rmtree(found[0])
        last = 0


# -- storage -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path, monkeypatch):
    """Training changes the tensors while the thread still writes; tensors that are one stay one."""
    gate, write = threading.Event(), checkpoint.write_state
    monkeypatch.setattr(checkpoint, "write_state", lambda *args: gate.wait() and write(*args))
    weight = torch.zeros(1000)
    writer = Writer(str(tmp_path), 1)
    writer.save({"one": weight, "other": weight, "list": [weight[:3], 1.5]}, 7, {"loss": 1.0})
    weight += 1
    gate.set()
    writer.close()
    state = loop.state_of(tmp_path)
    assert (state["one"] == 0).all() and (state["list"][0] == 0).all() and state["list"][1] == 1.5
    assert state["one"].data_ptr() == state["other"].data_ptr()
    facts = json.loads((tmp_path / "checkpoint_00000007" / MANIFEST).read_text())
    assert facts["step"] == 7 and facts["metrics"] == {"loss": 1.0} and facts["write_s"] >= 0
    assert writer.figures()["checkpoint/write_s"] > 0 and writer.fault is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    writer = Writer(str(tmp_path), 2, best="probe")
    for step, score in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None)):
        writer.save({"step": step}, step, {} if score is None else {"probe": score})
        while writer.waiting:
            time.sleep(0.001)
    writer.close()
    assert [step for _, step in checkpoint.checkpoints(tmp_path)] == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"checkpoint_0000000{step}" for step in (2, 4, 5)
    ]


def test_storage_that_fails_for_a_while_holds_nothing_up(tmp_path, monkeypatch, quickly, capsys):
    """Training goes on, the newest state takes the place of the one that waits, and the user is told twice."""
    failing, write = threading.Event(), checkpoint.write_state

    def fragile(path, state):
        if failing.is_set():
            raise OSError(errno.EIO, "Input/output error", str(path))
        return write(path, state)

    monkeypatch.setattr(checkpoint, "write_state", fragile)
    failing.set()
    writer = Writer(str(tmp_path), 2)
    for step in (2, 4, 6):
        writer.save({"step": step}, step, {})
        time.sleep(0.05)
    assert writer.fault is None and not checkpoint.checkpoints(tmp_path)
    failing.clear()
    writer.close()
    assert writer.fault is None and checkpoint.committed_step(tmp_path) == 6
    lines = capsys.readouterr().out.splitlines()
    assert "cannot be written ([Errno 5]" in lines[0] and "training goes on" in lines[0]
    assert "checkpoint 6 is written after" in lines[-1] and len(lines) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "RETRY_S", 0.05)
        failing.set()
        writer = Writer(str(tmp_path), 2)
        writer.save({"step": 8}, 8, {})
        writer.close()
    assert "fails since" in writer.fault and checkpoint.committed_step(tmp_path) == 6


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tiny_disk):
    writer = Writer(str(tiny_disk), 2)
    writer.save({"weights": torch.zeros(100_000)}, 2, {})
    while writer.waiting:
        time.sleep(0.001)
    metrics = Metrics(str(tiny_disk), 2)
    metrics.write(2, loss=1.0)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 300_000))
    writer.save({"weights": torch.zeros(100_000)}, 4, {})
    writer.close()
    assert writer.fault.startswith(f"the disk of {tiny_disk} is full: ") and "needs 400,000: make room" in writer.fault
    assert not list(tiny_disk.glob("*.part"))
    assert checkpoint.committed_step(tiny_disk) == 2 and checkpoint.damage_of(tiny_disk / "checkpoint_00000002") is None

    # rows of metrics wait for room, too
    with pytest.raises(OSError), ballast.open("ab") as file:
        file.write(bytes(10**7))
    for step in range(3, 200):
        metrics.write(step, loss=float(step))
    ballast.unlink()
    metrics.write(200, loss=0.0)
    metrics.close()
    assert [row["step"] for row in read_metrics(tiny_disk)] == list(range(2, 201))
    with runs.locked(str(tiny_disk)) as (_, _, found):
        assert found[1] == 2


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line(scans, tiny_disk):
    """On two workers: both stop, and rank 0 says why."""
    config = loop.pretraining(scans, tiny_disk / "run", train={"num_workers": 2}, max_steps=4)
    with pytest.raises(loop.Killed):
        loop.train(config, 2, until=3)
    assert checkpoint.committed_step(config.run) == 2
    (tiny_disk / "ballast").write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 300_000))
    assert "is full" in loop.train(config, 2)
    (tiny_disk / "ballast").unlink()
    assert loop.train(config, 2) is None and checkpoint.committed_step(config.run) == 4


# -- one driver --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_driver_is_refused_a_killed_one_has_no_lock(tmp_path):
    code = "import sys, time; from pgl_ray.train import runs\n"
    code += f"with runs.locked({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        refusal = f"is being trained by process {first.pid} on .*: wait for it, or end it"
        with pytest.raises(ValueError, match=refusal), runs.locked(str(tmp_path)):
            pass
        first.kill()
        first.wait()
        with runs.locked(str(tmp_path)) as (_, _, found):
            assert found is None


def test_what_workers_note_reaches_the_console_once(tmp_path, capsys):
    """Of other processes: what this one notes, it has printed already."""
    Notes(tmp_path).add("mine")
    code = f"from pgl_ray.train.events import Notes; Notes({str(tmp_path)!r}).add('theirs')"
    with follow.Progress(str(tmp_path), 10, every_s=0.01):
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert capsys.readouterr().out.splitlines() == ["  mine", "  theirs"]
    assert read_events(tmp_path)[0] == ["theirs"]


def test_a_runs_progress_goes_by_its_metrics(tmp_path, monkeypatch, capsys):
    """Rows of the checkpoint's steps and before are none of this start's; the last line comes whatever the pause."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    shown = follow.Progress(str(tmp_path), 40, every_s=0.01)
    shown.start = 10
    with shown:
        metrics = Metrics(str(tmp_path), 0)
        metrics.write(10, **{"train/loss": 9.0})
        rates = {"train/pairs_per_s": 12.34, "data/wait_share": 0.031}
        metrics.write(20, **{"train/loss": 0.5, "health/collapsed": 0.0}, **rates)
        while "step 20/40" not in (said := capsys.readouterr().out):
            time.sleep(0.01)
        metrics.write(40, **{"train/loss": 0.25, "health/collapsed": 1.0, "data/skipped_share": 0.01}, **rates)
        metrics.close()
    assert said.splitlines()[-1] == "  step 20/40, loss 0.5000, 12.3 pairs/s, waiting for data 3%"
    figures = "12.3 pairs/s, waiting for data 3%, 1.00% of the pairs skipped, features COLLAPSED"
    assert capsys.readouterr().out.splitlines()[-1] == f"  step 40/40, loss 0.2500, {figures}"


def test_storage_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with runs.locked(str(tmp_path)):
        assert "No locks available): take care not to start it twice" in capsys.readouterr().out
