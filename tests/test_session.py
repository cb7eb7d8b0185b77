"""A training loop's session: what is due when, whose reason to stop stands, what a checkpoint holds."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch

from pgl_ray.config import FailedRun, TrainConfig
from pgl_ray.model import device as on
from pgl_ray.train import checkpoint
from pgl_ray.train import session as training
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.quiet import WATCH
from pgl_ray.train.session import Place, Session

CPU = torch.device("cpu")
SETTINGS = TrainConfig(checkpoint_every=4, log_every=3, threads_per_worker=1)


def session(folder, num_steps=10, start=0) -> Session:
    """One worker, whose batches are numbers."""
    folder.mkdir(exist_ok=True)
    plan = SimpleNamespace(num_steps=num_steps, global_batch_size=2, identity={"id": 1}, epoch_at=lambda step: step / 5)

    def feed(size, stay):
        return on.Batches(({"x": torch.full((size,), step)} for step in range(start, num_steps)), CPU, stay)

    return Session(str(folder), plan, SETTINGS, Place(0, 1, CPU, feed, lambda net: net))


def parts() -> tuple:
    """A network, its optimizer and its schedule."""
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_what_is_due_after_each_step(tmp_path):
    one, due = session(tmp_path), []
    one.resume(*parts())
    one.begin()
    for _ in one.batches(set()):
        one.advance()
        due.append((one.step, one.due(3), one.due(0), one.keeps()))
    assert [step for step, logs, _, _ in due if logs] == [1, 3, 6, 9, 10]  # the first, every third, the last
    assert [step for step, _, _, keeps in due if keeps] == [4, 8, 10]
    assert not any(never for _, _, never, _ in due)
    assert one.is_last and one.end() is None


@pytest.mark.parametrize(("step_s", "gap"), [(0.01, 9), (0.5, 4), (1.5, 1), (7.0, 1)])
def test_notices_are_looked_at_every_two_seconds(monkeypatch, step_s, gap):
    """Of steps, at the same ones on all workers, however fast their clocks go; and a checkpoint comes at once."""
    import ray.train

    monkeypatch.setenv(WATCH, "1")
    mine, both, given = threading.local(), threading.Barrier(2, timeout=20), {}

    def of_all_workers(value):
        mine.looks.append(mine.step)
        given[mine.rank] = value
        both.wait()
        values = [given[0], given[1]]
        both.wait()
        return values

    def info():
        return SimpleNamespace(preempted_ranks=[1]) if mine.rank and mine.step >= 40 else None

    monkeypatch.setattr(ray.train, "get_preemption_info", info)
    monkeypatch.setattr(training, "of_all_workers", of_all_workers)
    clock = SimpleNamespace(monotonic=lambda: mine.step * step_s * (1 + 9 * mine.rank))
    monkeypatch.setattr(training, "time", clock)

    def work(rank):
        mine.rank, mine.looks, notice = rank, [], training.Notice()
        due = []
        for mine.step in range(1, 61):
            if notice.wants_checkpoint(mine.step, 9):
                due.append(mine.step)
        return mine.looks, due

    with ThreadPoolExecutor(2) as pool:
        (looks, due), other = pool.map(work, (0, 1))
    assert (looks, due) == other
    before = [step for step in looks if step < 40]
    assert before[:2] == [1, 2] and {b - a for a, b in pairwise(before[1:])} == {gap}
    assert looks[len(before) + 1 :] == list(range(looks[len(before)] + 1, 61))  # at each, for the time that is left
    assert 40 <= due[0] < 40 + gap
    wait = -(-5 // step_s)
    assert all(b - a == wait for a, b in pairwise(due))


REASONS = {
    "loss": "not finite",
    "weights": "blown up",
    "disk": "disk full",
    "collapse": "collapsed",
    "scans": "skipped",
}


@pytest.mark.parametrize(("first", "second"), permutations(REASONS, 2))
def test_of_two_reasons_the_first_stands(tmp_path, first, second):
    one = session(tmp_path)
    one.resume(*parts())
    one.begin()
    seen = 0
    for _ in one.batches(set()):
        one.advance()
        seen += 1
        assert not one.stops(None) and one.reason is None
        if one.step == 2:
            assert one.stops(first) and not one.stops(second)
    assert seen == 2 and one.end() == first


def test_a_stream_that_ends_early_is_no_end(tmp_path):
    one = session(tmp_path, start=4)  # six batches for ten steps
    one.resume(*parts())
    one.begin()
    for _ in one.batches(set()):
        one.advance()
    with pytest.raises(FailedRun, match="the stream ended at step 6 of 10"):
        one.end()


def test_a_checkpoint_brings_everything_back_and_is_let_go(tmp_path):
    one, (net, optimizer, schedule) = session(tmp_path), parts()
    one.resume(net, optimizer, schedule)
    model = one.begin()
    for _ in one.batches(set()):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
        one.advance()
        if one.keeps():
            one.save({"own": one.step}, {"train/loss": 0.5})
    one.end()
    assert checkpoint.committed_step(str(tmp_path)) == 10
    again, (other, optimizer_2, schedule_2) = session(tmp_path), parts()
    assert again.step == 10 and again.state["own"] == 10 and again.state["plan"] == {"id": 1}
    again.resume(other, optimizer_2, schedule_2)
    assert torch.equal(other.weight, net.weight) and schedule_2.get_last_lr() == schedule.get_last_lr()
    assert not any(isinstance(value, dict) and "weight" in value for value in again.state.values())  # no tensors stay


def test_a_kind_of_device_that_was_lost_may_come_back(tmp_path, monkeypatch):
    """An elastic run goes on on some of the kinds that it began on, then on all of them; a new one is refused."""
    kinds = []
    monkeypatch.setattr(
        training, "of_all_workers", lambda value: [[one] for one in kinds] if value == [on.kind(CPU)] else [value]
    )

    def reason(*devices):
        kinds[:] = devices
        start = checkpoint.committed_step(str(tmp_path)) or 0
        one = session(tmp_path, num_steps=100, start=start)
        one.resume(*parts())
        if one.reason:
            return one.reason
        one.begin()
        for _ in one.batches(set()):
            one.advance()
            if one.keeps():
                one.save({}, {})
            if one.step == start + 8:
                break
        one.writer.close()
        return None

    assert [reason("A10G", "L4"), reason("L4"), reason("A10G", "L4")] == [None] * 3
    assert "was trained on A10G and L4, and would go on on H200" in reason("H200")


@pytest.mark.slow
def test_the_start_is_no_waiting_for_data(tmp_path):
    """The first batch comes after the processes that make it have started; later ones are waited for."""
    one = session(tmp_path, num_steps=6)

    def slowly(size, stay):
        def made():
            for step in range(6):
                time.sleep(0.5 if step == 0 else 0.05)
                yield {"x": torch.full((size,), step)}

        return on.Batches(made(), CPU, stay)

    one.place = one.place._replace(feed=slowly)
    one.resume(*parts())
    one.begin()
    for _ in one.batches(set()):
        time.sleep(0.05)
        one.advance()
        if one.due(3):
            one.log({"train/loss": 1.0}, unit="pairs")
    one.end()
    rows = read_metrics(str(tmp_path))
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert rows[0]["data/wait_share"] < 0.2 and rows[0]["train/pairs_per_s"] > 5  # of 2 in 0.05 s
    for row in rows[1:]:
        assert 0.05 < row["data/wait_share"] < 0.9 and row["data/wait_s"] > 0.045


def test_a_pause_is_no_part_of_the_speed(tmp_path, monkeypatch):
    one, now = session(tmp_path), [0.0]
    one.resume(*parts())
    one.begin()
    for _ in one.batches(set()):
        one.advance()
        if one.step == 2:
            with monkeypatch.context() as fixed:
                fixed.setattr("pgl_ray.train.session.time.monotonic", lambda: now[0])
                one.since = -2.0
                with one.paused():
                    now[0] += 100.0
                one.log({"train/loss": 1.0}, unit="pairs")
    one.end()
    row = read_metrics(str(tmp_path))[0]
    assert row["train/pairs_per_s"] == pytest.approx(2.0)  # 2 steps of 2 pairs in 2 of 102 seconds
