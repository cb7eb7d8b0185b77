"""The figures of a training: written row by row by rank 0, read by reports, sweeps and the driver's progress line."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pgl_ray.data.durable import write_aside
from pgl_ray.train import run_paths
from pgl_ray.train.records import RunRecord
from pgl_ray.train.retry import retried
from pgl_ray.train.run_files import METRICS, RECORD
from pgl_ray.train.track import Tracker

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


def metrics_path(run: str | Path) -> Path:
    """The file of metrics in a run's folder."""
    return Path(run) / METRICS


class Metrics:
    """Rank 0's scalars: one JSON object a line in metrics.jsonl, TensorBoard events, and the tracker's record.

    Rows after `start` are dropped: a run that restarts from a checkpoint writes them again. Rows that storage does not
    take are kept, and written with the next ones.
    """

    def __init__(self, run: str, start: int, tracker: str = "none"):
        self.run, self.start, self.began = run, start, time.monotonic()
        self.tracker = Tracker(tracker, run)
        self.unwritten: list[str] = []
        retried(self._open, f"run={run} cannot be written")

    def _open(self) -> None:
        path = metrics_path(self.run)
        text = "".join(line + "\n" for line in whole_lines(path) if json.loads(line)["step"] <= self.start)
        write_aside(path, text.encode())  # what a worker of before may still write goes to the file that had the name
        self.file, self.size = path.open("r+b", buffering=0), len(text.encode())
        self.events = self._open_events()

    def _open_events(self) -> "SummaryWriter":
        from tensorboardX import SummaryWriter

        return SummaryWriter(logdir=self.run, purge_step=self.start + 1)

    def write(self, step: int, **values: float) -> None:
        """Writes one row; keys are `group/name_unit`."""
        row = {"step": step, "time_s": round(time.monotonic() - self.began, 3)}
        row |= {key: float(value) for key, value in values.items()}
        self.unwritten.append(json.dumps(row) + "\n")
        with contextlib.suppress(OSError):
            self._write_rows()
            if not self.events.file_writer.event_writer._worker.is_alive():  # its thread ended when storage failed
                self.events = self._open_events()
            for key, value in values.items():
                self.events.add_scalar(key, value, step)
        self.tracker.write(step, row)

    def _write_rows(self) -> None:
        rows = "".join(self.unwritten).encode()
        os.ftruncate(self.file.fileno(), self.size)  # part of a row that did not fit
        self.file.seek(self.size)
        if self.file.write(rows) < len(rows):
            raise OSError(errno.ENOSPC, "no space for a row of metrics")
        self.size += len(rows)
        self.unwritten = []

    def close(self) -> None:
        """Writes what storage did not take before, if it does now, and closes all."""
        with contextlib.suppress(OSError):
            if self.unwritten:
                self._write_rows()
            if self.events.file_writer.event_writer._worker.is_alive():
                self.events.close()
        self.file.close()
        self.tracker.close()


def whole_lines(path: Path) -> list[str]:
    """Whole lines of a file that may still be written to."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl; none if it is not there yet. The run may lie in a bucket."""
    return [json.loads(line) for line in whole_lines(metrics_path(run_paths.followed(run)))]


def unfinished(run: str) -> str:
    """Where the training of a run's folder on this machine stands that has steps left, for a note; "" where it ended,
    or there is none."""
    if not Path(run, RECORD).is_file():
        return ""
    record, rows = RunRecord.read(run), read_metrics(run)
    stands = f"stands at step {rows[-1]['step']:,.0f} of {record.num_steps:,}" if rows else ""
    return f"{stands}: it has not been trained to its end" if record.steps_left(rows) else ""
