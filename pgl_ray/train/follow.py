"""What the driver shows of a run while its workers train: step, newest figures and events, from the run's own files."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pgl_ray.paths import is_url
from pgl_ray.train import checkpoint, run_paths
from pgl_ray.train.events import read_events
from pgl_ray.train.metrics import metrics_path, read_metrics
from pgl_ray.train.progress import Stage

LOOK_S = 1.0, 5.0  # between two looks at a run's metrics: for a bar, of a run in a folder; and otherwise


class Progress:
    """Shows a run's newest metrics while it trains, and its events, from the run's own files.

    Args:
        run: its folder, or its URL.
        num_steps: of the run.
        missing: says which nodes it waits for, or none.
        every_s: between two looks at them; none: as LOOK_S says.
    """

    def __init__(
        self,
        run: str,
        num_steps: int,
        missing: Callable[[], str | None] = lambda: None,
        every_s: float | None = None,
    ):
        self.run, self.missing = run, missing
        self.start = checkpoint.committed_step(run)
        self.events = read_events(run_paths.followed(run))[1]
        self.began = time.time()
        self.stage = Stage("  step", "", num_steps, self.start, starts=True)
        self.every_s = every_s or LOOK_S[self.stage.bar is None or is_url(run)]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _follow(self) -> None:
        with self.stage as stage:
            finished, last_step = False, None
            lacking: str | None = None
            while not finished:
                finished = self.done.wait(self.every_s)
                before = lacking
                with contextlib.suppress(Exception):  # the cluster does not answer: Ray Train says so
                    lacking = None if finished else self.missing()
                if lacking and not before:  # once for each time that nodes are lost
                    print(lacking, flush=True)
                try:
                    folder = run_paths.followed(self.run)
                    events, self.events = read_events(folder, self.events)
                    rows = [row for row in self._new_rows(folder) if "train/loss" in row or "val/dice" in row]
                except (OSError, ValueError):  # storage fails; the worker that writes says so
                    continue
                for text in events:
                    print(f"  {text}", flush=True)
                steps = [row for row in rows if "train/loss" in row]
                if steps and steps[-1]["step"] != last_step:
                    last_step = steps[-1]["step"]
                    stage.show(last_step, _figures(steps[-1], rows))

    def _new_rows(self, folder: Path) -> list[dict]:
        """Rows of this start; a continuing worker first drops what an interrupted one wrote after its checkpoint."""
        path = metrics_path(folder)
        if not path.exists() or path.stat().st_mtime < self.began:
            return []
        return [row for row in read_metrics(folder) if row["step"] > self.start]


def _figures(row: dict, rows: list[dict]) -> str:
    """The newest row of a training in words, and what its newest looks at the network gave."""
    parts = [f"loss {row['train/loss']:.4f}"]
    parts += [f"{row[key]:.1f} {key.rsplit('/', 1)[1][:-6]}/s" for key in row if key.endswith("_per_s")]
    parts += [f"waiting for data {row[key]:.0%}" for key in row if key == "data/wait_share"]
    parts += [f"{row[key]:.2%} of the pairs skipped" for key in row if key == "data/skipped_share" and row[key]]
    for key, name in (("val/dice", "val Dice"), ("probe/balanced_accuracy", "probe")):
        looks = [row[key] for row in rows if key in row]
        parts += [f"{name} {score:.3f}" for score in looks[-1:]]
    judged = [row["health/collapsed"] for row in rows if "health/collapsed" in row]
    parts += ["features COLLAPSED" for share in judged[-1:] if share >= 0.5]
    return ", ".join(parts)
