"""What the processes of a run note for the user: lines in events.jsonl, that the driver shows and reports repeat."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from pgl_ray.train import run_paths
from pgl_ray.train.run_files import EVENTS


class Notes:
    """What one thread has to say of a run; the driver shows it.

    Args:
        run: the run's folder on this machine.
    """

    def __init__(self, run: str | Path):
        self.run, self._unwritten = run, list[str]()

    def add(self, text: str) -> None:
        """Adds a line that the user should read to the run's events. What cannot be written is written with the next
        one."""
        print(f"  {text}", flush=True)  # on the driver's console, or in a worker's log
        line = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "text": text}
        self._unwritten.append(json.dumps(line) + "\n")
        with contextlib.suppress(OSError):
            path = run_paths.events_file(self.run)
            path.parent.mkdir(exist_ok=True)
            lines = "".join(self._unwritten).encode()
            with path.open("ab", buffering=0) as file:
                if file.write(lines) == len(lines):
                    self._unwritten.clear()
                else:  # the disk is full: from a new line on, again
                    self._unwritten[0] = "\n" + self._unwritten[0].lstrip("\n")


def read_events(run: str | Path, start: dict[str, int] | None = None) -> tuple[list[str], dict[str, int]]:
    """Texts noted by other processes, from a byte of each file of events on, and the bytes that follow."""
    ends, events = dict(start or {}), list[dict[str, Any]]()
    for path in (Path(run, EVENTS), *sorted(Path(run).glob("events/*.jsonl"))):
        try:
            with path.open("rb") as file:
                file.seek(ends.get(path.name, 0))
                data = file.read()
        except FileNotFoundError:
            continue
        whole = data[: data.rfind(b"\n") + 1]
        ends[path.name] = ends.get(path.name, 0) + len(whole)
        events += filter(None, map(_event, whole.splitlines()))
    here = socket.gethostname(), os.getpid()
    events.sort(key=lambda event: event["time"])
    return [event["text"] for event in events if (event["host"], event["pid"]) != here], ends


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line says; nothing where it was not written to its end."""
    try:
        return json.loads(line)
    except ValueError:
        return None
