"""What limited the speed of runs, network or data, by their own figures: sentences for the report."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pgl_ray.model.metrics import reach
from pgl_ray.pages import run_folders
from pgl_ray.pages.pages import OPEN, Line, percent, plural
from pgl_ray.pages.run_folders import Run

STARVED, HUNGRY = 0.5, 0.1  # shares of waiting: the data sets the pace; it slows the run
DEAR = 0.05  # share of the time that goes into checkpoints and is worth a word
DATA, PARTLY, NETWORK, EITHER = "The data", "The data, in part", "The network", "Can't tell whether the data"
MENDS = {
    DATA: "more CPU cores for it would help",
    PARTLY: "more CPU cores for it would help up to that share",
    EITHER: "more rows would tell whether it is more than a tenth",
}
DOORS = {"pretrain": ("pairs", "view pairs", "pre-training"), "finetune": ("patches", "patches", "fine-tuning")}


class Wait(NamedTuple):
    """How long a run waited for data after its first row, which holds the start-up.

    Attributes:
        mean: share of the time, over rows.
        half: of its 95 % interval; none for a single row.
        num: rows.
        per_s: view pairs or patches, the median row.
        checkpoints: share of the time that went into these.
    """

    mean: float
    half: float | None
    num: int
    per_s: float
    checkpoints: float

    @property
    def low(self) -> float:
        """Lower end of the interval, at least 0."""
        return max(0.0, self.mean - (self.half or 0.0))

    @property
    def high(self) -> float:
        """Upper end of the interval, at most 1."""
        return min(1.0, self.mean + (self.half or 0.0))

    @property
    def verdict(self) -> str:
        """What set the pace."""
        if self.half is not None and self.low <= HUNGRY <= self.high:
            return EITHER
        return DATA if self.mean > STARVED else PARTLY if self.mean > HUNGRY else NETWORK


def wait_of(run: Run) -> Wait | None:
    """None where no row after a start says it."""
    speed = f"train/{DOORS[run.door][0]}_per_s"
    starts = {k for k, row in enumerate(run.rows) if not k or row["time_s"] < run.rows[k - 1]["time_s"]}
    steady = [row for k, row in enumerate(run.rows) if k not in starts and speed in row]
    steps = {row["step"] for row in steady}
    shares = [share for step, share in run_folders.waits(run) if step in steps]
    if not shares:
        return None
    saving = [row["checkpoint/share"] for row in steady if "checkpoint/share" in row]
    rate = float(np.median([row[speed] for row in steady]))
    return Wait(float(np.mean(shares)), reach(shares), len(shares), rate, saving[-1] if saving else 0.0)


def limits(runs: list[Run]) -> list[Line]:
    """A sentence for the runs of each door that one thing limited."""
    groups: dict[tuple[str, str], list[tuple[Run, Wait | None]]] = {}
    for run in runs:
        wait = wait_of(run)
        groups.setdefault((run.door, wait.verdict if wait else OPEN), []).append((run, wait))
    lines = []
    for (door, verdict), group in groups.items():
        name = group[0][0].name if len(group) == 1 else plural(len(group), DOORS[door][2])
        lines.append(Line(verdict, _words(verdict, group), name if len(runs) > 1 else ""))
    return lines


def _words(verdict: str, group: list[tuple[Run, Wait | None]]) -> str:
    waits = [wait for _, wait in group if wait]
    if not waits:
        return "no row after the first, which holds the start-up, says how long it waited for data"
    share, rate = _span([wait.mean for wait in waits], percent), _span([wait.per_s for wait in waits], _rate)
    bounds = percent(min(wait.low for wait in waits), max(wait.high for wait in waits))
    kind = "interval" if len(waits) == 1 else "intervals within"
    sure = f"95 % {kind} {bounds}, {sum(wait.num for wait in waits)} rows"
    if any(wait.half is None for wait in waits):
        sure = "of one row alone there is no interval"
    text = f"{share} of the time was spent waiting for data ({sure}), at {rate} {DOORS[group[0][0].door][1]} per second"
    dear = max(wait.checkpoints for wait in waits)
    text += f"; checkpoints took {percent(dear)}" if dear > DEAR else ""
    return f"{text}; {MENDS.get(verdict) or _faster(group[0][0])}"


def _span(values: list[float], words: Callable[..., str]) -> str:
    low, high = min(values), max(values)
    return words(low) if words(low) == words(high) else words(low, high)


def _rate(*values: float) -> str:
    return " to ".join(f"{value:.1f}" for value in values)


def _faster(run: Run) -> str:
    """What helps where the network sets the pace."""
    device, torch = run.config["train"]["device"], run.record.versions.get("torch", "")
    if device == "cpu" or torch.endswith("+cpu"):
        return "it ran on CPUs, so a GPU or a smaller encoder would help"
    return "faster or more devices for it would help, more cores for the data would not"
