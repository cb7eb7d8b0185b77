"""A trial of a sweep: its doors one after another inside one of Ray Tune's processes."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch

from pgl_ray import evaluate, finetune, pretrain, probe
from pgl_ray.config import FailedRun, PretrainConfig, Section, TrainConfig, TuneConfig, build
from pgl_ray.data.system import lock_file, num_cores
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import own_name, values_of, whole_space
from pgl_ray.sweep.population import take_over
from pgl_ray.sweep.stages import end_of, judged_from, stage_config, stage_configs
from pgl_ray.train import nodes
from pgl_ray.train.metrics import read_metrics
from pgl_ray.train.quiet import quiet_worker
from pgl_ray.train.records import RunRecord
from pgl_ray.train.run_files import RECORD, write_json

FOLLOW_S = 2.0  # between two looks at a run's metrics


def run(point: dict[str, Any]) -> None:
    """Runs one trial's doors; each returns at once where it is finished, and continues where it was interrupted."""
    from ray import tune

    quiet_worker()
    config = build(TuneConfig, json.loads(point["sweep"]))
    values = values_of(point["trial"])
    folder = Path(config.run) / "trials" / own_name(config, tune.get_context().get_trial_id(), point["trial"])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(str(folder)):
        run_stages(config, values, folder, point["room"])


def run_stages(config: TuneConfig, values: dict[str, Any], folder: Path, room: int) -> None:
    """A trial from where it stands: its state and score are noted in its folder, and Ray Tune hears of them."""
    earlier, name, space = sweeps.read_trial(folder), folder.name, whole_space(config.model_dump())
    if earlier and earlier.state in sweeps.ENDED:  # Optuna drew it a second time
        sweeps.note(folder, drawn_from=space)
        if earlier.score is not None:
            _report(config.judge, earlier.score, end_of(config), name)
        return
    judges = {"judged_from": judged_from(config), "judge": config.judge}
    facts = {} if earlier else {"values": values, "started": time.time(), **judges}
    sweeps.note(folder, state="running", error=None, since=time.time(), drawn_from=space, **facts)
    try:
        score, collapse = _stages(config, values, folder, room)
        sweeps.end(folder, "collapsed" if collapse else "done", collapse, score)
        _report(config.judge, score, end_of(config), name)
    except Exception as error:  # a failed trial does not end the sweep: its error goes to the table
        sweeps.end(folder, "failed", " ".join(str(error).split()) or type(error).__name__)
        _report(config.judge, None, 0, name)  # below every rung; Optuna learns that these settings are bad


def _stages(config: TuneConfig, values: dict[str, Any], folder: Path, room: int) -> tuple[float | None, str | None]:
    """Runs the stages; returns the score, or how the features collapsed."""
    configs = stage_configs(config, values, folder)
    score, tuning, pretraining = None, configs.get("finetune"), configs.get("pretrain")
    figure = config.first_judge if tuning else config.judge  # of the encoder
    if pretraining:
        sweeps.note(folder, stage="pretrain", pretrain=pretraining.run, pretrain_gpus=_gpus(pretraining.train))
        with locked(pretraining.run), _Follower(folder, pretraining.run, figure, 0, last=not tuning) as follower:
            collapse = _pretrain(pretraining)
        if collapse:
            return None, collapse
        score = follower.best
    if "probe" in configs:
        sweeps.note(folder, stage="probe")
        if not (folder / "probe.json").exists():
            trained = pretraining or tuning or stage_config(config, "pretrain", {}, folder)
            _apart(probe.run, configs["probe"], trained.train if trained else TrainConfig(), room)
        if figure in sweeps.FIGURES:
            score = sweeps.probed(folder)[sweeps.FIGURES[figure]]
            sweeps.add_report(folder, 100, score)
            if tuning:
                _report(figure, score, 100, folder.name)
    if tuning:
        sweeps.note(folder, stage="finetune", finetune=tuning.run, finetune_gpus=_gpus(tuning.train))
        tuning = take_over(folder, values, tuning)
        offset = 100 if config.first_judge else 0
        with _Follower(folder, tuning.run, config.judge, offset, last=True, keeps_best=True) as follower:
            finetune.run(tuning)
        score = follower.best
    if score is None:
        raise FailedRun(f"judge={config.judge} is no figure of the metrics of this trial's runs")
    if "evaluate" in configs:
        sweeps.note(folder, stage="evaluate")
        if not Path(tuning.run, "evaluation", "summary.json").exists():
            _apart(evaluate.run, configs["evaluate"], tuning.train, room)
    return score, None


def _pretrain(config: PretrainConfig) -> str | None:
    """Pre-trains, unless an earlier trial did or saw the features collapse; returns how they collapsed, or none."""
    collapse = sweeps.collapsed(config.run)
    if collapse:
        return collapse
    try:
        pretrain.run(config)
    except FailedRun:
        collapse = sweeps.collapsed(config.run)
        if not collapse:
            raise
    return collapse


@contextlib.contextmanager
def locked(run: str) -> Iterator[None]:
    """One process at a time in a trial's folder, and one trial in a shared pre-training; the kernel frees the lock of a
    killed one."""
    with lock_file(Path(f"{run}.lock")) as lock:
        if not lock.take():
            lock.take(wait_s=math.inf)
            time.sleep(5)  # the workers of a trial that was killed end a little later than its lock
        yield


def _gpus(train: TrainConfig) -> float:
    return train.num_workers * train.gpus_per_worker if nodes.check_resources(train) else 0.0


def _apart(door: Any, config: Section, train: TrainConfig, room: int) -> Any:
    """Runs a door that needs no Ray Train in a process with a worker's CPU or GPU, and its share of the machine's
    cores when `room` trials run at a time."""
    import ray

    share = train.gpus_per_worker if nodes.check_resources(train) else 0
    options = {"num_cpus": nodes.FEED_CPUS, "num_gpus": share, "max_retries": 0, "scheduling_strategy": "DEFAULT"}
    task = ray.remote(_with_share_of_cores).options(**options)
    try:
        return ray.get(task.remote(door, config, room))
    except ray.exceptions.RayTaskError as error:
        raise FailedRun(str(error.cause)) from error


def _with_share_of_cores(door: Any, config: Section, room: int) -> Any:
    # Ray gives a task of one CPU one thread, and this trial's training is over
    torch.set_num_threads(max(1, num_cores() // room))
    return door(config)


def _report(figure: str, score: float | None, progress: int, name: str) -> None:
    """Tells Ray Tune a figure at a percentage of the judged stages; none: the trial failed."""
    from ray import tune

    # what pbt hands to the trial that is to copy this one
    place = Path(tune.get_context().get_trial_dir(), "source")
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "source.json", {"name": name, "progress": progress})
    figures = {"score": sweeps.merit(figure, score), "progress": progress}
    tune.report(figures, checkpoint=tune.Checkpoint.from_directory(place))


class _Follower:
    """Notes a run's judged figure in the trial's folder while its door runs, and reports it to Ray Tune.

    Of the last training the end is not reported: a scheduler cannot stop what is done.

    Attributes:
        best: the figure of the network that is kept so far, of a training that keeps its best one, else the newest.
        best_dice: val/dice of that network.
    """

    def __init__(self, folder: Path, run: str, figure: str | None, offset: int, last: bool, keeps_best: bool = False):
        self.folder, self.run, self.figure, self.offset = folder, Path(run), figure, offset
        self.last, self.keeps_best = last, keeps_best
        self.best: float | None = None
        self.best_dice = 0.0
        self.step = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        if self.figure:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.figure:
            self.thread.join()

    def _follow(self) -> None:
        finished = False
        while not finished:
            finished = self.done.wait(FOLLOW_S)
            self._look()

    def _look(self) -> None:
        if not (self.run / RECORD).exists():
            return
        num_steps = RunRecord.read(self.run).num_steps
        for row in read_metrics(self.run):
            if row["step"] > self.step and math.isfinite(row.get(self.figure, math.nan)):
                self.step, value = row["step"], row[self.figure]
                # fine-tuning keeps its best network, by the mean over organs whatever the judge; of pre-training the
                # newest encoder counts, not the untrained one
                if not self.keeps_best or not self.best_dice or row["val/dice"] > self.best_dice:
                    self.best, self.best_dice = value, row.get("val/dice", 0.0)
                progress = self.offset + max(1, int(100 * self.step / num_steps))
                sweeps.add_report(self.folder, progress, self.best)
                if not (self.last and self.step >= num_steps):
                    _report(self.figure, self.best, progress, self.folder.name)
