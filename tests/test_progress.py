"""Progress of a stage: a bar in a terminal, plain lines elsewhere; speed and time left by a clock set by hand."""

import json
import re
import sys
import time

import pytest
from terminal import in_terminal, screen

from pgl_ray.train import follow, progress
from pgl_ray.train.metrics import metrics_path


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_short_stage_says_nothing(clock, capsys):
    with progress.Stage("door:", "scan", 3) as stage:
        for _ in range(3):
            clock.now += 3
            stage.advance()
    assert lines_of(capsys) == []


def test_a_log_gets_a_line_every_ten_seconds_and_the_last(clock, capsys):
    with progress.Stage("door:", "scan", 9) as stage:
        for name in "abcdefghi":
            clock.now += 4
            stage.advance(name)
    assert lines_of(capsys) == [
        "door: 3/9 scans, 4 s per scan, 0:24 left, c",
        "door: 6/9 scans, 4 s per scan, 0:12 left, f",
        "door: 9/9 scans, 4 s per scan, i",
    ]


def test_processes_that_start_say_nothing_about_the_speed(clock, capsys):
    """100 s until the first is done, then one every quarter of a second."""
    with progress.Stage("door:", "scan", 50, starts=True) as stage:
        clock.now += 100
        stage.advance()
        for _ in range(44):
            clock.now += 0.25
            stage.advance()
    assert lines_of(capsys) == [
        "door: 1/50 scans",
        "door: 41/50 scans, 4 scans/s, 0:02 left",
        "door: 45/50 scans, 4 scans/s, 0:01 left",
    ]


def test_steps_that_are_done_again_start_the_speed_anew(clock, capsys):
    with progress.Stage("  step", "", 100, done=20, starts=True) as stage:
        for step, seconds in ((30, 60), (40, 20), (31, 40), (51, 20), (100, 49)):
            clock.now += seconds
            stage.show(step, f"loss {step / 10}")
    assert lines_of(capsys) == [
        "  step 30/100, loss 3.0",
        "  step 40/100, 2:00 left, loss 4.0",
        "  step 31/100, loss 3.1",
        "  step 51/100, 0:49 left, loss 5.1",
        "  step 100/100, loss 10.0",
    ]


def test_what_is_worked_on_counts_when_it_is_done(clock, capsys):
    failed = []
    with progress.Stage("door:", "scan", 3) as stage:
        for name in stage.each("abc", lambda: progress.num_of(failed, "failed")):
            clock.now += 20
            if name == "b":
                failed.append(name)
    said = [line.split(" scans, ")[1] for line in lines_of(capsys)]
    assert said == ["20 s per scan, 0:40 left", "20 s per scan, 0:20 left, 1 failed", "20 s per scan, 1 failed"]


def test_a_stage_that_fails_has_no_last_line(clock, capsys):
    with pytest.raises(KeyError), progress.Stage("door:", "scan", 3) as stage:
        clock.now += 30
        stage.advance()
        stage.advance()
        raise KeyError
    assert lines_of(capsys) == ["door: 1/3 scans, 30 s per scan, 1:00 left"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_seconds_in_words(seconds, text):
    assert progress.clock(seconds) == text


SCRIPT = """
import sys, time
from pgl_ray.train.progress import Stage
with Stage("door:", "scan", 4, starts=STARTS) as stage:
    for name in "abcd":
        time.sleep(0.4)
        print(f"door: note: {name} is small", flush=True)
        print(f"warning {name}", file=sys.stderr)
        stage.advance(name)
print("door: done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("size", [(80, 24), (0, 0)])
def test_a_terminal_has_one_bar_and_whole_lines_above_it(starts, size):
    command = [sys.executable, "-c", SCRIPT.replace("STARTS", str(starts))]
    written = in_terminal(command, 0, *size)
    notes = [line for name in "abcd" for line in (f"door: note: {name} is small", f"warning {name}")]
    assert screen(written) == [*notes, "door: done"]  # the bar is gone
    bars = re.findall(r"door: (\d)/4 scans \|[^|]*\| ([^|\r\x1b]*)", written)
    numbers = [int(number) for number, _ in bars]
    assert numbers == sorted(numbers) and {*numbers} == {0, 1, 2, 3, 4}
    assert any(re.fullmatch(r" *\d\.\d\d(scan/s|s/scan), 00:0\d left, [abcd]", text.rstrip()) for _, text in bars)


@pytest.mark.slow
def test_a_bar_fits_into_a_narrow_terminal():
    command = [sys.executable, "-c", SCRIPT.replace("STARTS", "True").replace("a is small", "a")]
    written = in_terminal(command, 0, 40, 24)
    assert max(len(part.rstrip()) for part in re.split(r"[\r\n]+", written) if "/4 scans |" in part) < 40


@pytest.mark.parametrize(
    "key, name, own_row", [("val/dice", "val Dice", True), ("probe/balanced_accuracy", "probe", False)]
)
def test_the_newest_look_at_a_network_stays_in_its_line(tmp_path, capsys, monkeypatch, key, name, own_row):
    """Validations have rows of their own, a probe has not; rows of the training come after either."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    rows = []
    for step, look in ((10, {key: 0.25}), (20, {key: 0.5}), (30, {})):
        trained = {"step": step, "time_s": 0.0, "train/loss": 1.0}
        rows += [trained, {"step": step, "time_s": 0.0, **look}] if own_row and look else [trained | look]
    with follow.Progress(str(tmp_path), 100, every_s=60):
        time.sleep(0.05)  # a file's time is coarser than the clock
        metrics_path(tmp_path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = lines_of(capsys)[-1]
    assert "step 30/100" in line and f"{name} 0.500" in line
