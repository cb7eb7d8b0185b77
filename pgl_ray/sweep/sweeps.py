"""What a sweep's folder says: its trials, their cost, and the tables of the report. The sweep writes through it, too.

sweep.json is the sweep's config; trials/<name>/trial.json what a trial did and how it ended, reports.jsonl what it was
judged by on the way; pretrain/<hash> are the pre-trainings, each of which several trials may use.
"""

import contextlib
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pgl_ray.config import TuneConfig
from pgl_ray.data.durable import put_in_place, write_aside
from pgl_ray.data.system import lock_file
from pgl_ray.judge.judges import HIGHER_IS_BETTER
from pgl_ray.pages.run_folders import duration_s
from pgl_ray.pages.tables import probe_values
from pgl_ray.sweep.points import Space, covers, of_space, seedless, short, whole_space
from pgl_ray.train.health import verdict
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.records import RunRecord, parse, read_json
from pgl_ray.train.run_files import RECORD, write_json

SWEEP = "sweep.json"
ENDED = ("done", "stopped", "collapsed")  # and not to be run again; "failed" is tried again, "running" was interrupted
COUNTED = ("done", "stopped")  # in the mean of settings: a seed that was stopped for being worse, too
FIGURES = {  # of a probe, that trials may be judged by -> the judge that says it
    "probe/balanced_accuracy": "voxels",
    "probe/decoder_dice": "decoder",
    "probe/matching_mm": "matching",
}
PROBE = next(iter(FIGURES))
WORST_MM = 1e4  # stands for the error of what failed


class Trial(BaseModel):
    """A trial as its folder says: trial.json, and its reports.

    Attributes:
        name, folder: of the trial.
        values: its point of the space, and its arm.
        drawn_from: the space and the arms when it last began; none in earlier versions.
        state: running (or interrupted), done, stopped (by the scheduler), collapsed, failed.
        started, since: when it began first and last, s since 1970.
        took_s: of its starts that have ended.
        stage: the last that began.
        error: of a failed or collapsed one.
        judge: names the judged figure.
        judged_from: percent of the judged stages up to which the first judge reports another figure.
        score: the judged figure; of one that is not done, the best on the way.
        reports: (percent of the judged stages, figure).
        pretrain, finetune: folders of its trainings, as far as they began.
        pretrain_gpus, finetune_gpus: that these take.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    folder: Path
    values: dict[str, Any]
    drawn_from: Space | None = None
    state: str
    started: float = 0.0
    since: float = 0.0
    took_s: float = 0.0
    stage: str = ""
    error: str | None = None
    judge: str | None = None
    judged_from: int = 0
    score: float | None = None
    reports: list[tuple[int, float]] = []
    pretrain: str | None = None
    finetune: str | None = None
    pretrain_gpus: float = 0.0
    finetune_gpus: float = 0.0

    @property
    def title(self) -> str:
        """The settings in short: the arm, and the last part of each key with its value."""
        return settings(self.values)

    @property
    def merit(self) -> float:
        """Its score as something to maximise."""
        return merit(self.judge, self.score)

    @property
    def ending(self) -> str:
        """How it ended, or where it stands."""
        return self.state if self.state in ("done", "failed") else f"{self.state} in {self.stage}"

    def run(self, stage: str) -> Path | None:
        """Folder of its pre-training or fine-tuning, as far as it began."""
        place = {"pretrain": self.pretrain, "finetune": self.finetune}[stage]
        return Path(place) if place else None


def judged(trials: Iterable[Trial]) -> list[Trial]:
    """Those that came to their end with a score: first those of the settings that are best in the mean over their
    seeds, of these the best one first."""
    scored = [trial for trial in trials if trial.score is not None and trial.state in COUNTED]
    done, merits = [trial for trial in scored if trial.state == "done"], defaultdict(list)
    for trial in scored:
        merits[seedless(trial.values)].append(trial.merit)
    return sorted(done, key=lambda trial: (-statistics.fmean(merits[seedless(trial.values)]), -trial.merit))


def num_by_state(trials: Iterable[Trial]) -> dict[str, int]:
    """State -> how many trials are in it, of all states."""
    numbers = Counter(trial.state for trial in trials)
    return {state: numbers[state] for state in (*ENDED, "failed", "running")}


def merit(figure: str | None, value: float | None) -> float:
    """What is to be maximised, whatever the figure: the only place that knows where lower is better.

    Args:
        figure: that trials are judged by.
        value: of a trial; none where it failed, which is as bad as can be.
    """
    lower = figure in FIGURES and not HIGHER_IS_BETTER[FIGURES[figure]]
    if value is None:
        return -WORST_MM if lower else 0.0
    return -value if lower else value


def settings(values: dict[str, Any], sep: str = ", ") -> str:
    """Values of a point in short."""
    parts = [str(values["arm"])] if "arm" in values else []
    return sep.join(parts + [f"{short(key)} {number(value)}" for key, value in values.items() if key != "arm"])


def seeds(values: dict[str, Any], *stages: str) -> str:
    """Of a point's values the seeds of these stages, in short; other stages' seeds change nothing of their results."""
    own = {f"{stage}.seed" for stage in stages}
    return settings({key: value for key, value in values.items() if own & {part.strip() for part in key.split("+")}})


def number(value: Any) -> str:
    """A value of a space as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


# -- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time runs a sweep; the kernel frees the lock of a killed one."""
    with lock_file(folder / ".lock") as lock:
        if not lock.take():
            raise ValueError(f"run={folder} is being run by another process: wait for it, or end it")
        lock.warn(f"run={folder}")
        yield


def check_same(config: TuneConfig, folder: Path) -> None:
    """A sweep that is there must have the same bases; its space may grow.

    Raises:
        ValueError: it has others, or something else lies there.
    """
    wanted = json.loads(config.model_dump_json())
    path = folder / SWEEP
    if path.exists():
        earlier = json.loads(path.read_text())
        fixed = ["index", "judge", "first_judge", *(key for key in wanted if key.startswith("base_"))]
        changed = [key for key in fixed if earlier.get(key) != wanted[key]]
        arms = earlier.get("earlier_arms", {}) | earlier["arms"]
        changed += [f"arms.{arm}" for arm, own in sorted(wanted["arms"].items()) if own != arms.get(arm, own)]
        if changed:
            raise ValueError(
                f"run={config.run} is a sweep with another {', '.join(changed)} (sweep.json there): choose another "
                "run=..."
            )
    elif folder.exists() and any(path.name not in (".lock", "pretrain") for path in folder.iterdir()):
        raise ValueError(f"run={config.run} exists and is no sweep of pgl_ray: choose another run=...")


def remember(config: TuneConfig, folder: Path, drawn: Iterable[str] = ()) -> None:
    """Writes sweep.json, after `check_same`, with the names of the trials that are `drawn`; arms that are left out now
    stay known as `earlier_arms`."""
    check_same(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(folder / SWEEP) if (folder / SWEEP).exists() else {"arms": {}}
    arms = earlier.get("earlier_arms", {}) | earlier["arms"]
    write_json(folder / SWEEP, json.loads(config.model_dump_json()) | {"earlier_arms": arms, "drawn": [*drawn]})


def note(folder: Path, **facts: Any) -> None:
    """Adds to a trial's trial.json."""
    path = folder / "trial.json"
    write_json(path, (read_json(path) if path.exists() else {}) | facts)


def end(folder: Path, state: str, error: str | None, score: float | None = None) -> None:
    """Notes how a trial ended, and how long it ran. The first to say so is right: while the process of a stopped trial
    ends, the trial may fail."""
    trial = read_trial(folder)
    if trial and trial.state == "running":
        note(folder, state=state, error=error, score=score, took_s=trial.took_s + time.time() - trial.since)


def add_report(folder: Path, progress: int, score: float) -> None:
    """Adds to a trial's reports.jsonl; what a continued trial reports again replaces what stood there."""
    path = folder / "reports.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    earlier = [line for line in lines if json.loads(line)[0] < progress]
    write_aside(path, "".join([*earlier, json.dumps([progress, score]) + "\n"]).encode())


# -- reading ----------------------------------------------------------------------------------------------------------


def read_trial(folder: Path) -> Trial | None:
    """A trial; none before it began."""
    path = folder / "trial.json"
    if not path.exists():
        return None
    lines = (folder / "reports.jsonl").read_text().splitlines() if (folder / "reports.jsonl").exists() else []
    place = {"name": folder.name, "folder": folder, "reports": [json.loads(line) for line in lines]}
    trial = parse(Trial, read_json(path) | place, f"{path} is")
    judged = [value for progress, value in trial.reports if progress > trial.judged_from]
    if trial.score is None and judged and trial.state != "collapsed":
        return trial.model_copy(update={"score": judged[-1]})  # what the first judge said is another figure
    return trial


def read_trials(folder: Path) -> list[Trial]:
    """Trials of a sweep that began, in the order in which they did, those of earlier spaces, too."""
    return sorted(filter(None, map(read_trial, (folder / "trials").glob("*"))), key=lambda trial: trial.started)


def present(folder: Path, config: dict[str, Any]) -> list[Trial]:
    """Those of the arms and the space that a config, such as sweep.json, has now."""
    return [trial for trial in read_trials(folder) if of_space(config, trial.values)]


def left_out(folder: Path, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """All others: the arms that are left out, and the titles of the trials that the space leaves out of other arms."""
    others = [trial for trial in read_trials(folder) if not of_space(config, trial.values)]
    arms = {trial.values.get("arm") for trial in others} - {None, *config["arms"]}
    return sorted(arms), sorted(trial.title for trial in others if trial.values.get("arm") not in arms)


def counted(config: dict[str, Any], trials: Iterable[Trial]) -> list[Trial]:
    """Trials of Optuna's that ended and are of its num_trials: a space that grew is to be drawn from as often anew."""
    ended, space = (trial for trial in trials if trial.state in ENDED), whole_space(config)
    return [trial for trial in ended if trial.drawn_from is None or covers(trial.drawn_from, space)]


def tried_again(config: dict[str, Any], trials: Iterable[Trial]) -> list[Trial]:
    """Those that failed or were interrupted and that the same command goes on with; it may draw others by now."""
    trials = list(trials)
    waiting = [trial for trial in trials if trial.state not in ENDED]
    if config["search"] == "optuna":
        return waiting if len(counted(config, trials)) < config["num_trials"] else []
    drawn = config.get("drawn")  # earlier versions did not note them
    return [trial for trial in waiting if not drawn or trial.name in drawn]


def collapsed(run: str) -> str | None:
    """Why a pre-training was stopped as collapsed, or none."""
    judged = [row for row in read_metrics(run) if "health/collapsed" in row]
    last = [row["health/collapsed"] >= 0.5 for row in judged[-2:]]
    if not Path(run, RECORD).exists() or len(last) < 2 or not all(last):
        return None
    record = RunRecord.read(run)
    if judged[-1]["step"] >= record.num_steps or not record.config["health"]["stop_on_collapse"]:
        return None
    return f"pre-training stopped at step {judged[-1]['step']:.0f}: {verdict(judged[-1])}"


def cost(trial: Trial) -> dict[str, float]:
    """View pairs and patches trained on, seconds and GPU-hours of a trial's trainings; a shared pre-training counts in
    full in each trial that used it."""
    spent = {"pairs": 0, "patches": 0, "pretrain_s": 0.0, "finetune_s": 0.0}
    gpu_s = {"pretrain_gpu_s": 0.0, "finetune_gpu_s": 0.0}
    stages = ("pretrain", "pairs", trial.pretrain_gpus), ("finetune", "patches", trial.finetune_gpus)
    for stage, unit, gpus in stages:
        run = trial.run(stage)
        rows = read_metrics(run) if run else []
        if rows:
            batch = RunRecord.read(run).config["global_batch_size"]
            spent |= {unit: int(rows[-1]["step"]) * batch, f"{stage}_s": duration_s(rows)}
            gpu_s[f"{stage}_gpu_s"] = duration_s(rows) * gpus
    return spent | gpu_s | {"gpu_hours": sum(gpu_s.values()) / 3600}


def evaluation(trial: Trial) -> dict[str, Any]:
    """The evaluation's means over organs; none without one."""
    run = trial.run("finetune")
    path = run / "evaluation" / "summary.json" if run else None
    summary = read_json(path) if path and path.exists() else {}
    return {key: summary[key] for key in ("dice", "iou", "hd_mm", "hd95_mm") if summary.get(key) is not None}


def probed(folder: Path) -> dict[str, float]:
    """What the judges of a trial's probe say of the reading that counts; {} without one."""
    path = folder / "probe.json"
    return probe_values(read_json(path)) if path.exists() else {}


def write_table(folder: Path) -> None:
    """trials.parquet: one row per trial, with a column per key of the space."""
    rows = []
    for trial in read_trials(folder):
        row = {"trial": trial.name, "state": trial.state, "stage": trial.stage, "score": trial.score}
        scores = probed(trial.folder)
        row |= {"probe": scores.get("voxels"), "test_dice": evaluation(trial).get("dice"), **cost(trial)}
        others = {figure.split("/")[1]: judge for figure, judge in FIGURES.items() if judge != "voxels"}
        row |= {name: scores[judge] for name, judge in others.items() if judge in scores}
        row |= {"pretrain": trial.pretrain, "finetune": trial.finetune}
        rows.append(row | {"error": trial.error, **plain_values(trial), "values": json.dumps(trial.values)})
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    path = folder / "trials.parquet"
    aside = path.with_name(f"{path.name}.part{os.getpid()}")
    pq.write_table(pa.table({key: _column(values) for key, values in columns.items()}), aside)
    put_in_place(aside, path)


def plain_values(trial: Trial) -> dict[str, Any]:
    """A trial's point, lists as texts."""
    return {key: json.dumps(v) if isinstance(v, list) else v for key, v in trial.values.items()}


def _column(values: list[Any]) -> pa.Array:
    """Values of one column; texts where kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        values = [None if value is None else json.dumps(value) for value in values]
    elif kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    return pa.array(values)
