"""A worker's log: what it says when storage does not take it, on the kernel's own full device and size limit."""

import json
import logging
import resource
import subprocess
import sys
from contextlib import suppress

import pytest

from pgl_ray.train import events, logs


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def as_before():
    """What a worker sets for its process' life."""
    yield
    logging.captureWarnings(False)
    logs.LOG.setLevel(logging.NOTSET)


@pytest.fixture
def full():
    """Files end at a size, as on a full disk, until they may grow again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def ends_at(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size < 0 else size, before[1]))

    yield ends_at
    ends_at(-1)


def test_a_full_device_takes_nothing_and_ends_nothing(tmp_path):
    """The lines fill the room they may wait in, and more."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.jsonl").symlink_to("/dev/full")
    with logs.written(str(tmp_path), 0, 1):
        for step in range(3):
            logs.say("metrics", text="x" * (logs.WAITING_BYTES // 2), step=step)


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with logs.written(str(tmp_path), 0, 1):
        logs.say("metrics", loss=1.0)
        (tmp_path / "logs").unlink()
        logs.say("metrics", loss=2.0)
    first, last = rows(tmp_path / "logs" / "rank_0.jsonl")
    assert (first["loss"], first["lost_lines"]) == (2.0, 2)  # the start and the row before
    assert last["message"] == "end" and "lost_lines" not in last


def test_notes_that_do_not_fit_are_written_when_there_is_room(tmp_path, full, capsys):
    """A write that ends in the middle of a line says so by its length alone; the file can be read at any time."""
    notes, path = events.Notes(tmp_path), tmp_path / "events.jsonl"
    notes.add("first")
    full(path.stat().st_size + 20)
    notes.add("second")
    assert len(path.read_text().splitlines()) == 2 and events.read_events(tmp_path)[0] == []
    full(-1)
    notes.add("third")
    texts = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            texts.append(json.loads(line)["text"])
    assert texts == ["first", "second", "third"]
    code = "import sys; from pgl_ray.train.events import read_events; print(*read_events(sys.argv[1])[0])"
    read = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert read.stdout.split() == ["first", "second", "third"]  # noted by another process than that


def test_lines_wait_for_room_and_lost_ones_are_counted(tmp_path, full, monkeypatch):
    monkeypatch.setattr(logs, "WAITING_BYTES", 1000)
    path = tmp_path / "logs" / "rank_0.jsonl"
    lines = logs.JsonLines(path, "r", 0)

    def say(number: int) -> None:
        facts = {"facts": {"number": number, "text": "x" * 100}}
        lines.handle(logging.makeLogRecord({"msg": "row", "levelname": "INFO", **facts}))

    say(0)
    full(path.stat().st_size + 50)  # part of a line
    for number in range(1, 9):
        say(number)
    full(-1)
    say(9)
    lines.close()
    found = rows(path)
    there = [row["number"] for row in found]
    lost = [row["lost_lines"] for row in found if "lost_lines" in row]
    assert there == sorted(there) and there[:3] == [0, 1, 2] and there[-1] == 9
    assert lost == [10 - len(there)] and lost[0] > 0 and found[-1]["lost_lines"] == lost[0]
