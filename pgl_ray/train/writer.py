"""Checkpoints written by a thread of rank 0 while training goes on."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pgl_ray.data.durable import DISK_FULL
from pgl_ray.train import checkpoint, retry, run_paths
from pgl_ray.train.events import Notes

NUM_NEWEST = 2  # newest checkpoints: where one is damaged, the one before is there


class _Job(NamedTuple):
    """A state that is to be written: as checkpoint of a step, or, without a step, to a file."""

    state: dict[str, Any]
    step: int | None
    metrics: dict[str, float]


class Writer:
    """Rank 0's checkpoints: copied in memory when they are due, written by a thread while training goes on.

    Storage that fails is tried again for RETRY_S; a newer state then takes the place of the one that waits. A full disk
    is not tried again. What is wrong stands in `fault`; the checkpoints before stay as they are.

    Args:
        run: folder of the run.
        keep: newest checkpoints that are kept.
        best: of the checkpoints' metrics: the one with the highest is kept, too.
        facts: of this start, that every checkpoint.json notes.
        push: brings what was written to where the run lies; none: it lies there.
    """

    def __init__(
        self,
        run: str,
        keep: int = NUM_NEWEST,
        best: str | None = None,
        facts: dict[str, Any] | None = None,
        push: Callable[[], None] | None = None,
    ) -> None:
        self.run, self.keep, self.best, self.facts, self.push = Path(run), keep, best, facts or {}, push
        self.waiting: dict[str, _Job] = {}  # by name; files come before checkpoints, which rely on them
        self.written: _Job | None = None  # to the disk; it may wait for the bucket
        self.fault: str | None = None
        self.notes = Notes(run)
        self.copy_s = self.copied_s = self.write_s = 0.0
        self.began, self.closing = time.monotonic(), False
        self.turn = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self.thread.start()

    def save(self, state: dict[str, Any], step: int, metrics: dict[str, float]) -> None:
        """Takes a checkpoint: tensors and plain values, which may be changed at once."""
        self._take("~checkpoint", _Job(state, step, metrics))

    def save_file(self, name: str, state: dict[str, Any]) -> None:
        """Takes a state for a file in the run's folder, written before any checkpoint that is taken later."""
        self._take(name, _Job(state, None, {}))

    def _take(self, name: str, job: _Job) -> None:
        began = time.monotonic()
        job = job._replace(state=_copied(job.state, {}))
        self.copy_s = time.monotonic() - began
        self.copied_s += self.copy_s
        with self.turn:
            self.waiting[name] = job
            self.turn.notify_all()

    def figures(self) -> dict[str, float]:
        """Metrics: seconds that training waited for the newest copy, its share of the time since this start for all of
        them, and seconds that the thread took to write the newest checkpoint while training went on."""
        share = self.copied_s / max(1e-9, time.monotonic() - self.began)
        return {"checkpoint/copy_s": self.copy_s, "checkpoint/write_s": self.write_s, "checkpoint/share": share}

    def close(self) -> None:
        """Waits until all is written, or cannot be; see `fault`."""
        with self.turn:
            self.closing = True
            self.turn.notify_all()
        self.thread.join()

    def _work(self) -> None:
        failing_since: float | None = None
        pause, tries = retry.FIRST_PAUSE_S, 0
        while True:
            with self.turn:
                self.turn.wait_for(lambda: self.waiting or self.closing)
                if not self.waiting:
                    return
                name = min(self.waiting)
                job = self.waiting[name]
            try:
                self._write(name, job)
            except OSError as error:
                failing_since, tries = failing_since or time.monotonic(), tries + 1
                self.fault = self._hopeless(job, error, time.monotonic() - failing_since)
                if self.fault:
                    return
                if tries == 1:
                    self.notes.add(f"{_what(job, name)} cannot be written ({error}): trying again, training goes on")
                with self.turn:
                    self.turn.wait_for(partial(self._is_newer, name, job), pause)
                pause = min(2 * pause, retry.LONGEST_PAUSE_S)
                continue
            except Exception as error:  # whatever it is, the run must not go on without checkpoints
                self.fault = f"{_what(job, name)} cannot be written: {type(error).__name__}: {error}"
                return
            if failing_since:
                seconds = time.monotonic() - failing_since
                self.notes.add(f"{_what(job, name)} is written after {tries + 1} tries, {seconds:.0f} s")
            failing_since, pause, tries = None, retry.FIRST_PAUSE_S, 0
            with self.turn:
                if self.waiting[name] is job:
                    del self.waiting[name]

    def _is_newer(self, name: str, job: _Job) -> bool:
        return self.waiting[name] is not job

    def _hopeless(self, job: _Job, error: OSError, seconds: float) -> str | None:
        """Why it is not tried again, or none."""
        if error.errno in DISK_FULL:
            shutil.rmtree(checkpoint.folder_of(self.run, job.step or 0).with_suffix(".part"), ignore_errors=True)
            free, needed = shutil.disk_usage(self.run).free, num_bytes(job.state)
            return (
                f"the disk of {self.run} is full: {free:,} bytes are free, a checkpoint needs {needed:,}: make room "
                "and type the same command, which continues from the checkpoint before"
            )
        if seconds > retry.RETRY_S:
            return f"the storage of {run_paths.origin(self.run)} fails since {seconds:.0f} s: {error}"
        return None

    def _write(self, name: str, job: _Job) -> None:
        began = time.monotonic()
        if self.written is not job:
            if job.step is None:
                checkpoint.write_state(self.run / name, job.state)
            else:
                checkpoint.write_checkpoint(self.run, job.step, job.state, {**self.facts, "metrics": job.metrics})
            self.written = job
        if self.push:
            self.push()
        self.written = None
        if job.step is not None:
            self._drop()
            self.write_s = time.monotonic() - began

    def _drop(self) -> None:
        """Removes the checkpoints that are not to be kept; what cannot be removed now is removed with the next."""
        checkpoints = checkpoint.checkpoints(self.run)
        staying = {step for _, step in checkpoints[-self.keep :]}
        if self.best:
            scores = {step: checkpoint.figures_of(place).get(self.best) for place, step in checkpoints}
            scored = {step: score for step, score in scores.items() if score is not None}
            staying |= {max(scored, key=lambda step: scored[step])} if scored else set()
        for place, step in checkpoints:
            if step not in staying:
                with contextlib.suppress(OSError):
                    shutil.rmtree(checkpoint.set_aside(place, ".old"))
        if self.push:
            with contextlib.suppress(OSError):
                self.push()


def _what(job: _Job, name: str) -> str:
    return f"checkpoint {job.step}" if job.step is not None else name


def _copied(value: Any, seen: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """A copy in memory of tensors, dicts and lists; tensors that are one stay one."""
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
        if key not in seen or not value.numel():
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: _copied(part, seen) for key, part in value.items()}
    return [_copied(part, seen) for part in value] if isinstance(value, list) else value


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(num_bytes(part) for part in parts)
