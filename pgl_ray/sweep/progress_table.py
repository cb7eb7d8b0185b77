"""What a sweep prints while it runs: a line for each trial, and one about all of them."""

import itertools
import math
import time

from pgl_ray.sweep.sweeps import ENDED, Trial, num_by_state
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.progress import clock
from pgl_ray.train.records import RunRecord


def table(trials: list[Trial], head: bool = True) -> str:
    """Trial, settings, stage, best figure and time left of its stage, a line each, under a head."""
    lines = [f"{'trial':<10}{'stage':<20}{'best':>9}{'left':>9}  settings"] if head else []
    for trial in trials:
        stage, left = _where(trial)
        score = "-" if trial.score is None else f"{trial.score:.4f}"
        lines.append(f"{trial.name:<10}{stage:<20}{score:>9}{left:>9}  {trial.title}")
        lines += [f"{'':<10}{trial.error[:200]}"] if trial.error else []
    return "\n".join(lines)


def counts(trials: list[Trial], num: int, room: int, began: float) -> str:
    """A line about the whole sweep: how the trials of `num` ended, and how long the rest takes, `room` at a time.

    Args:
        began: when this process did, s since 1970: what was interrupted earlier does not run before it is continued.
    """
    ended = {state: num for state, num in num_by_state(trials).items() if state != "running"}
    text = ", ".join(f"{count} {state}" for state, count in ended.items() if count) or "0 done"
    took = [trial.took_s for trial in trials if trial.state in ENDED]
    rest = num - sum(ended.values())
    now = sum(time.time() - trial.since for trial in trials if trial.state == "running" and trial.since >= began)
    if took and rest > 0:
        text += f"; about {clock(max(0.0, rest * sum(took) / len(took) - now) / room)} left"
    return f"  {text}, of {num}"


def _where(trial: Trial) -> tuple[str, str]:
    """Stage and step, and the time left in this stage."""
    if trial.state != "running":
        return trial.ending, ""
    run = trial.run(trial.stage) if trial.stage in ("pretrain", "finetune") else None
    rows = read_metrics(run) if run else []
    if not rows:
        return trial.stage, ""
    num_steps, step = RunRecord.read(run).num_steps, rows[-1]["step"]
    restarts = [before["step"] for before, row in itertools.pairwise(rows) if row["time_s"] < before["time_s"]]
    steps = step - (restarts[-1] if restarts else 0)  # that the newest clock has timed
    left = (num_steps - step) * rows[-1]["time_s"] / steps if steps else math.nan
    return f"{trial.stage} {step:.0f}/{num_steps}", clock(left) if math.isfinite(left) else ""
