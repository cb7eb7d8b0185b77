"""A trial of a sweep: its doors' configs, and the doors one after another inside one of Ray Tune's processes."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import OmegaConf

from pgl_ray import evaluate, finetune, pretrain, probe
from pgl_ray.config import (
    EncoderConfig,
    EvaluateConfig,
    FailedRun,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    Section,
    TrainConfig,
    TuneConfig,
    build,
    to_yaml,
)
from pgl_ray.data.place import put_in_place, write_aside
from pgl_ray.data.system import lock_file
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import feature_geometry
from pgl_ray.sweep import sweeps
from pgl_ray.train import checkpoint, nodes
from pgl_ray.train.checkpoint import write_json
from pgl_ray.train.quiet import quiet_worker
from pgl_ray.train.stops import BEST

STAGES = {"pretrain": PretrainConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "evaluate": EvaluateConfig}
PROBE = next(iter(sweeps.FIGURES))
FOLLOW_S = 2.0  # between two looks at a run's metrics

# -- its point and its configs ----------------------------------------------------------------------------------------


def stage_configs(config: TuneConfig, values: dict[str, Any], folder: Path) -> dict[str, Section]:
    """The doors' configs of one trial, in order: base, then the arm's and the space's values.

    Args:
        config: the sweep's.
        values: the trial's point.
        folder: the trial's; equal pre-trainings of a sweep share a folder beside those of the trials.

    Raises:
        ValueError: a config that the door would refuse.
    """
    overrides = dict(config.arms.get(values.get("arm"), {}))
    overrides |= {name: value for key, value in values.items() if key != "arm" for name in dotted(key)}
    found = {stage: stage_config(config, stage, overrides, folder) for stage in STAGES}
    tuning, shared = found["finetune"], found["pretrain"]
    if tuning and ("init" in (config.base_finetune or {}) or "finetune.init" in overrides):
        shared = found["pretrain"] = None
    if not tuning and "probe.init" in overrides:
        shared = found["pretrain"] = None
    init = tuning.init if tuning else overrides.get("probe.init", "random")
    if shared:
        _check_geometry(shared.method, shared.encoder, shared.views.size, shared.align.output_stride)
        same = shared.model_dump(mode="json", exclude={"run", "ray", "health", "probe"})
        init = str(Path(config.run).absolute() / "pretrain" / _hash(same)[:12])
        found["pretrain"] = shared.model_copy(update={"run": init})
    if found["probe"]:
        found["probe"] = found["probe"].model_copy(update={"init": init, "output": str(folder / "probe.json")})
    if tuning:
        kept = {"encoder": shared.encoder} if shared else {}  # the pre-training's, whatever was swept
        found["finetune"] = tuning.model_copy(update={"init": init} | kept)
    return {stage: stage_config for stage, stage_config in found.items() if stage_config}


def stage_config(config: TuneConfig, stage: str, overrides: dict[str, Any], folder: Path) -> Section | None:
    """One door's config: base, then overrides ({dotted key: value}); none where the stage has no base."""
    base = getattr(config, f"base_{stage}")
    if base is None:
        return None
    merged = OmegaConf.create(base)
    for name, value in overrides.items():
        if name.startswith(f"{stage}."):
            OmegaConf.update(merged, name.partition(".")[2], value)
    places = {
        "run": str(folder / "finetune" if stage == "evaluate" else folder / stage),
        "ray": config.ray.model_dump(),
    }
    places = {key: value for key, value in places.items() if key in STAGES[stage].model_fields}
    # a sweep has random weights and wrong priors as arms: each trial's own would judge them again and again
    own = {"index": config.index} | ({"ends": False} if stage == "probe" else {})
    values = own | OmegaConf.to_container(merged) | places
    if stage == "pretrain":
        values["health"] = {"stop_on_collapse": True} | values.get("health", {})
    return build(STAGES[stage], values)


@functools.cache
def _check_geometry(method: str, encoder: EncoderConfig, view_size: tuple, output_stride: tuple) -> None:
    """Refuses an output stride that the encoder has no map of."""
    if method == "pgl":
        with torch.device("meta"):
            feature_geometry(build_encoder(**encoder.model_dump()), view_size, output_stride)


def dotted(key: str) -> list[str]:
    """The dotted keys of one key of a space."""
    return [part.strip() for part in key.split("+")]


def decoded(value: Any) -> Any:
    """A value that Ray Tune drew; lists travel as text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def values_of(trial: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial as Ray Tune has it, the arm first."""
    values = {key: decoded(value) for key, value in trial["values"].items()}
    return ({"arm": values.pop("arm")} if "arm" in values else {}) | values


def name_of(values: dict[str, Any]) -> str:
    """A trial's name, from its values."""
    return _hash(values)[:8]


def own_name(config: TuneConfig, trial_id: str, point: dict[str, Any]) -> str:
    """The name of one of Ray Tune's trials. It stays that of the first start: pbt gives a trial another one's config
    whole, with its name."""
    path = Path(config.run) / "tune" / f"{trial_id}.name"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(point.get("name") or name_of(values_of(point)))
    return path.read_text()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def end_of(config: TuneConfig) -> int:
    """Percent at the end of the last judged stage: each has a hundred."""
    return 100 * ((config.base_finetune is not None) + (config.first_judge is not None)) or 100


# -- its stages --------------------------------------------------------------------------------------------------------


def run(point: dict[str, Any]) -> None:
    """Runs one trial's doors; each returns at once where it is finished, and continues where it was interrupted."""
    from ray import tune

    quiet_worker()
    config = build(TuneConfig, json.loads(point["sweep"]))
    values = values_of(point["trial"])
    folder = Path(config.run) / "trials" / own_name(config, tune.get_context().get_trial_id(), point["trial"])
    folder.mkdir(parents=True, exist_ok=True)
    with alone(str(folder)):
        run_stages(config, values, folder, point["room"])


def run_stages(config: TuneConfig, values: dict[str, Any], folder: Path, room: int) -> None:
    """A trial from where it stands: its state and score are noted in its folder, and Ray Tune hears of them."""
    earlier, name = sweeps.read_trial(folder), folder.name
    if earlier and earlier.state in sweeps.ENDED:  # Optuna drew it a second time
        if earlier.score is not None:
            _report(config.judge, earlier.score, end_of(config), name)
        return
    first = 100 if config.first_judge and config.base_finetune is not None else 0
    facts = {} if earlier else {"values": values, "started": time.time(), "judged_from": first, "judge": config.judge}
    sweeps.note(folder, state="running", error=None, since=time.time(), **facts)
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
        with alone(pretraining.run), _Follower(folder, pretraining.run, figure, 0) as follower:
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
            _report(figure, score, 100, folder.name, folder)
    if tuning:
        sweeps.note(folder, stage="finetune", finetune=tuning.run, finetune_gpus=_gpus(tuning.train))
        tuning = take_over(folder, values, tuning)
        offset = 100 if config.first_judge else 0
        with _Follower(folder, tuning.run, config.judge, offset, last=True) as follower:
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
    found = sweeps.collapsed(config.run)
    if found:
        return found
    try:
        pretrain.run(config)
    except FailedRun:
        found = sweeps.collapsed(config.run)
        if not found:
            raise
    return found


@contextlib.contextmanager
def alone(run: str) -> Iterator[None]:
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
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // room))
    return door(config)


def _report(figure: str, score: float | None, progress: int, name: str, folder: Path | None = None) -> None:
    """Tells Ray Tune, and the trial's folder, a figure at a percentage of the judged stages; none: the trial failed."""
    from ray import tune

    if folder:
        sweeps.add_report(folder, progress, score)
    # what pbt hands to the trial that is to copy this one
    place = Path(tune.get_context().get_trial_dir(), "source")
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "source.json", {"name": name, "progress": progress})
    said = {"score": sweeps.merit(figure, score), "progress": progress}
    tune.report(said, checkpoint=tune.Checkpoint.from_directory(place))


class _Follower:
    """Reports a run's judged figure to Ray Tune while its door runs; `best` is the best so far of the last stage, the
    newest of an earlier one.

    Of the last stage the end is not reported: a scheduler cannot stop what is done.
    """

    def __init__(self, folder: Path, run: str, figure: str | None, offset: int, last: bool = False):
        self.folder, self.run, self.figure, self.offset, self.last = folder, Path(run), figure, offset, last
        self.best: float | None = None
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
        if not (self.run / "run.json").exists():
            return
        num_steps = json.loads((self.run / "run.json").read_text())["num_steps"]
        for row in checkpoint.read_metrics(self.run):
            if row["step"] > self.step and math.isfinite(row.get(self.figure, math.nan)):
                self.step, value = row["step"], row[self.figure]
                # fine-tuning keeps its best network; of pre-training the newest encoder counts, not the untrained one
                known = [self.best] if self.last and self.best is not None else []
                self.best = max(value, *known, key=functools.partial(sweeps.merit, self.figure)) if known else value
                if not (self.last and self.step >= num_steps):
                    progress = self.offset + max(1, int(100 * self.step / num_steps))
                    _report(self.figure, self.best, progress, self.folder.name, self.folder)


# -- population based training ----------------------------------------------------------------------------------------


def take_over(folder: Path, values: dict[str, Any], config: FinetuneConfig) -> FinetuneConfig:
    """Where pbt changed this trial, its fine-tuning becomes a copy of another one's, with its own learning rate.

    Returns:
        How to fine-tune: with the rate that it had, where there was nothing to copy yet.
    """
    from ray import tune

    found = tune.get_checkpoint()
    if not found:
        return config
    with found.as_directory() as place:
        told = {**json.loads(Path(place, "source.json").read_text()), "lr": config.optim.lr}
    noted = folder / "taken_over.json"
    if told["name"] == folder.name or (noted.exists() and json.loads(noted.read_text()) == told):
        return config
    if fork(folder.parent / told["name"] / "finetune", Path(config.run), config):
        sweeps.note(folder, values=values)
        write_json(noted, told)
        return config
    record = Path(config.run) / "run.json"
    if not record.exists():
        return config
    rate = json.loads(record.read_text())["config"]["optim"]["lr"]
    return config.model_copy(update={"optim": config.optim.model_copy(update={"lr": rate})})


def fork(source: Path, target: Path, config: FinetuneConfig) -> bool:
    """Puts a copy of a run, as of its newest checkpoint, in the target's place, with another learning rate.

    Returns:
        False where the source has no checkpoint yet; the target stays as it is.
    """
    found = checkpoint.committed(source)
    if not found:
        return False
    try:
        state = checkpoint.read_state(found[0] / checkpoint.STATE)
    except ValueError:  # a newer one took its place just now
        found = checkpoint.committed(source)
        state = checkpoint.read_state(found[0] / checkpoint.STATE)
    place, step = found
    aside = target.with_name(target.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rows = [json.dumps(row) + "\n" for row in checkpoint.read_metrics(source) if row["step"] <= step]
    checkpoint.metrics_path(aside).write_text("".join(rows))
    shutil.copy(source / BEST, aside / BEST)
    record = json.loads((source / "run.json").read_text())
    old = record["config"]["optim"]["lr"]
    record["config"] = json.loads(config.model_dump_json())
    write_json(aside / "run.json", record)
    write_aside(aside / "config.yaml", to_yaml(config).encode())
    factor = config.optim.lr / old
    for key in ("base_lrs", "_last_lr"):
        state["schedule"][key] = [lr * factor for lr in state["schedule"][key]]
    for group in state["optimizer"]["param_groups"]:
        group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    checkpoint.write_checkpoint(aside, step, state, {"taken_from": str(place)})
    shutil.rmtree(target, ignore_errors=True)
    put_in_place(aside, target)
    return True
