"""python -m pgl_ray.tune tune_spaces/X.yaml index=STORE run=SWEEP [a.b=c ...]: sweeps and grids with Ray Tune.

A trial runs the doors themselves, pretrain.run, probe.run, finetune.run and evaluate.run, and is judged by the
validation Dice: the pre-training loss is not comparable between settings, and a collapsed network minimises it. Where
two trials pre-train alike, one of them does it and both use it. What a trial did lies in its folder, named after its
settings, and nowhere else: Ray Tune chooses, stops and places the trials that are not finished.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("tune")

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from pgl_ray import report
from pgl_ray.config import (
    PRETRAINED,
    EvaluateConfig,
    FailedRun,
    FinetuneConfig,
    ReportConfig,
    Section,
    TrainConfig,
    TuneConfig,
    build,
    keys,
)
from pgl_ray.data import stream, trainings
from pgl_ray.data.store import Index, ScanRecord, read_index, write_aside
from pgl_ray.data.system import lock_file
from pgl_ray.judge import voxels
from pgl_ray.judge.judges import check_number
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.trial import PROBE, STAGES, decoded, dotted, end_of, name_of, own_name, stage_config, stage_configs
from pgl_ray.sweep.trial import run as run_trial
from pgl_ray.train import launch, nodes, weights
from pgl_ray.train.checkpoint import write_json

LEARNING_RATE = "finetune.optim.lr"  # that pbt changes
REDRAWS = 5  # at most so often does Optuna go on when it drew known points
LOOK_S, SHOW_S = 2.0, 60.0  # between two looks at the trials' folders, between two tables


@dataclass(frozen=True)
class Result:
    """The sweep's folder and its best trial, with its settings and score, and how many trials came to what."""

    folder: str
    best: dict[str, Any]
    score: float
    states: dict[str, int]


class Trial(NamedTuple):
    """A point of the space.

    Attributes:
        name: of its folder, from its values.
        values: key of the space, or "arm", -> value.
    """

    name: str
    values: dict[str, Any]


def run(config: TuneConfig) -> Result:
    """Runs, or continues, the sweep; writes trials.parquet, best.yaml and report.html.

    Raises:
        ValueError: an unknown key, an empty or too large space, a base config that does not load, a figure that trials
            cannot be judged by, resources that the cluster does not have.
        FailedRun: no trial came to a score.
    """
    folder = Path(config.run).absolute()
    trials = check(config)
    check_stores(config, trials)
    remember(config, folder, keep=False)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remember(config, folder)
        return run_trials(config, trials, folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time runs a sweep; the kernel frees the lock of a killed one."""
    with lock_file(folder / ".lock") as lock:
        if not lock.take():
            raise ValueError(f"run={folder} is being run by another process: wait for it, or end it")
        lock.warn(f"run={folder}")
        yield


def run_trials(config: TuneConfig, trials: list[Trial], folder: Path) -> Result:
    """Runs what is not done yet on the cluster; several rounds where trials died with their workers."""
    launch.connect(config.ray)
    room, num = room_for(config, trials), len(trials) or config.num_trials
    done = _ended_trials(folder)
    what = ", ".join([*(["arms"] if config.arms else []), *config.space])
    print(f"tune: {num} trials over {what}; {len(done)} done, {room} at a time; {folder}", flush=True)
    if nodes.cluster().grows:
        print(f"  trials wait for nodes: {nodes.cluster().in_words()}", flush=True)
    left = [trial for trial in trials if trial.name not in done]
    if left:
        _fit(config, folder, left, num, room, list(done.values()))
    for again in range(0 if trials else REDRAWS):  # what Optuna draws a second time is no new trial
        if len(done) < num:
            _fit(config, folder, [], num, room, list(done.values()), again)
            done = _ended_trials(folder)
    return collect(config, folder)


def _ended_trials(folder: Path) -> dict[str, sweeps.Trial]:
    return {trial.name: trial for trial in sweeps.read_trials(folder) if trial.state in sweeps.ENDED}


# -- the space --------------------------------------------------------------------------------------------------------


def check(config: TuneConfig) -> list[Trial]:
    """All trials, or none where Optuna draws them one after another; refuses what would only fail in a trial.

    Raises:
        ValueError: names the dotted key, the verb, or the number of trials.
    """
    if not config.space and not config.arms:
        raise ValueError("space is empty: give it at least one dotted key, or give arms")
    if config.base_finetune is None and config.base_pretrain is None:
        raise ValueError("base_finetune and base_pretrain are both null: there is nothing to run")
    if config.base_finetune is None and config.base_evaluate is not None:
        raise ValueError("base_evaluate needs base_finetune: what is evaluated is its network")
    _check_judges(config)
    for stage in STAGES:
        with _named(f"base_{stage}"):
            stage_config(config, stage, {}, Path(config.run))
    for key, verbs in config.space.items():
        for name in dotted(key):
            _check_key(config, name, f"space key {key!r}", ("index", "run", "init", "output"))
        if len(verbs) != 1 or not all(verbs.values()):
            raise ValueError(f"space key {key!r} needs one verb with its arguments, got {verbs}")
        if "grid_search" in verbs and config.search == "optuna":
            raise ValueError(f"space key {key!r}: search=optuna draws values, take choice instead of grid_search")
    for arm, values in config.arms.items():
        for name in values:
            _check_key(config, name, f"arms.{arm}: {name!r}", ("index", "run", "output"))
    num = _num_trials(config)
    if num > config.max_trials:
        raise ValueError(f"the space has {num} trials, max_trials={config.max_trials}: shrink it or raise the bound")
    _check_search(config)
    trials = _draw(config)
    for trial in trials:
        with _named(_title(trial.values)):
            configs = stage_configs(config, trial.values, Path(config.run))
            if config.first_judge and "pretrain" not in configs and "probe" not in configs:
                raise ValueError(f"it is not pre-trained: for first_judge={config.first_judge} it needs a base_probe")
            _check_probe(config, configs)
    return [] if config.search == "optuna" else trials  # what Optuna draws is of the same kind


def _check_judges(config: TuneConfig) -> None:
    for name in ("judge", "first_judge"):
        figure = getattr(config, name)
        if figure and figure.startswith("train/"):
            raise ValueError(
                f"{name}={figure} cannot judge trials: a pre-training loss is not comparable between settings "
                "(strides, views, decay), a collapsed network minimises it, and a training loss says nothing of other "
                f"scans; take val/dice of fine-tuning, or {PROBE}"
            )
    if config.base_finetune is not None and not config.judge.startswith("val/dice"):
        raise ValueError(
            f"judge={config.judge} is no figure of fine-tuning, which comes last: take val/dice, or base_finetune=null"
        )
    curve = bool((config.base_pretrain or {}).get("probe", {}).get("every"))
    for name, figure in (("judge", config.judge), ("first_judge", config.first_judge)):
        if figure and (name == "first_judge" or figure in sweeps.FIGURES):
            probed = config.base_probe is not None or (curve and figure == PROBE)
            if figure not in sweeps.FIGURES or not probed:
                others = " or ".join(figure for figure in sweeps.FIGURES if figure != PROBE)
                raise ValueError(
                    f"{name}={figure}: take {PROBE}, with base_pretrain.probe.every=... or a base_probe; or {others}, "
                    "with a base_probe"
                )
    if config.base_finetune is None and config.judge.startswith("val/"):
        raise ValueError(f"judge={config.judge} is a figure of fine-tuning, and base_finetune is null: take {PROBE}")


def _check_probe(config: TuneConfig, configs: dict[str, Section]) -> None:
    """Refuses a trial whose probe does not say what trials are judged by."""
    figure = config.first_judge if "finetune" in configs else config.judge
    judge = sweeps.FIGURES.get(figure)
    if judge and "probe" in configs and judge not in configs["probe"].judges:
        asked = ",".join(configs["probe"].judges)
        raise ValueError(f"{figure} is said by {judge}: add it to base_probe.judges=[{asked}]")


def _check_key(config: TuneConfig, name: str, what: str, fixed: tuple[str, ...]) -> None:
    stage, _, key = name.partition(".")
    known = [known for known, _, _ in keys(STAGES[stage])] if stage in STAGES else []
    if key not in known or key in fixed:
        raise ValueError(f"{what} is not a key of pretrain.*, probe.*, finetune.* or evaluate.*")
    if getattr(config, f"base_{stage}") is None:
        raise ValueError(f"{what} needs base_{stage}")


def _check_search(config: TuneConfig) -> None:
    if config.search == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError("search=optuna needs Optuna: pip install 'pgl_ray[tune]', or search=random") from None
    if config.scheduler.kind == "pbt":
        verb = next(iter(config.space.get(LEARNING_RATE, {})), "")
        if verb not in ("uniform", "loguniform", "choice") or config.search == "optuna" or config.num_trials < 4:
            raise ValueError(
                f"scheduler.kind=pbt changes {LEARNING_RATE} of a population: give that key a uniform, loguniform or "
                "choice, num_trials of at least 4, and search=random"
            )


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _title(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _num_trials(config: TuneConfig) -> int:
    grids = [len(verb["grid_search"]) for verb in config.space.values() if "grid_search" in verb]
    arms = 1 if config.search == "optuna" else max(1, len(config.arms))
    return config.num_trials * arms * math.prod(grids)


def _draw(config: TuneConfig) -> list[Trial]:
    """Every point once; the arms run fastest, so that a sweep that is cut off has the same points of each."""
    import numpy as np

    rng = np.random.RandomState(config.seed)
    grids = {key: verbs["grid_search"] for key, verbs in config.space.items() if "grid_search" in verbs}
    axes = [*grids.values(), list(config.arms)] if config.arms else list(grids.values())
    found = {}
    for _ in range(config.num_trials):
        for point in itertools.product(*axes):
            values = {"arm": point[-1]} if config.arms else {}
            values |= dict(zip(grids, point))
            for key, verbs in config.space.items():
                if key not in grids:
                    drawn = _domain(verbs).sample(random_state=rng)
                    values[key] = decoded(drawn.item() if isinstance(drawn, np.generic) else drawn)
            trial = Trial(name_of(values), values)
            found.setdefault(trial.name, trial)
    return list(found.values())


def _domain(verbs: dict[str, list[Any]]) -> Any:
    """Ray Tune's domain of one key; lists among the choices as text, for Optuna takes none."""
    from ray import tune

    [(verb, args)] = verbs.items()
    if verb == "choice":
        return tune.choice([json.dumps(arg) if isinstance(arg, list) else arg for arg in args])
    with _named(f"{verb}{args}"):
        try:
            return getattr(tune, verb)(*args)
        except TypeError as error:
            raise ValueError(error) from None


def check_stores(config: TuneConfig, trials: list[Trial]) -> None:
    """Refuses trials whose store has not the scans that they name, and an encoder that is not there.

    Raises:
        ValueError: of the first such trial.
    """
    read, notes = functools.cache(read_index), []
    read(config.index)
    for values in [trial.values for trial in trials] or [{}]:
        with _named(_title(values) or "base"):
            configs, tested = stage_configs(config, values, Path(config.run)), []
            _check_shipped(configs, read)
            if "probe" in configs:
                _, tested = voxels.choose_scans(read(configs["probe"].index), configs["probe"])
                check_number(tested, configs["probe"], configs["probe"].judges)
            if "finetune" in configs:
                train_ids, _ = trainings.split_scans(configs["finetune"], read(configs["finetune"].index))
                if config.scheduler.kind == "pbt":
                    _check_checkpoints(config.scheduler.grace, configs["finetune"], train_ids)
            if "evaluate" in configs:
                tested = tested + _evaluated(configs["evaluate"], read(configs["evaluate"].index))
            if "pretrain" in configs:
                pool = read(configs["pretrain"].index)
                plan = trainings.make_plan(configs["pretrain"], pool)
                if "finetune" in configs or "probe" in configs:
                    _check_windows(pool, read((configs.get("finetune") or configs["probe"]).index))
                curve = configs["pretrain"].probe
                if curve.every:
                    tested = tested + voxels.choose_scans(read(curve.index or str(pool.store)), curve)[1]
                notes += _overlap(pool, plan, tested)
    for note in dict.fromkeys(notes):
        print(f"tune: note: {note}", flush=True)


def _evaluated(config: EvaluateConfig, index: Index) -> list[ScanRecord]:
    """The scans to evaluate on.

    Raises:
        ValueError: none.
    """
    found = index.labelled(config.split)[: config.num_scans]
    if not found:
        raise ValueError(f"index={config.index} has no labelled scan in split={config.split!r}")
    return found


def _overlap(pool: Index, plan: stream.Plan, tested: list[ScanRecord]) -> list[str]:
    """What to say of scans that are tested on and pre-trained on, and what would leave them out."""
    hashes, wanted = {scan.content_hash for scan in tested}, set(plan.scan_ids)
    seen = {scan.content_hash for scan in pool.scans if scan.scan_id in wanted} & hashes
    apart = {scan.split for scan in pool.scans} - {scan.split for scan in pool.scans if scan.content_hash in hashes}
    mend = f": base_pretrain.split={' or '.join(sorted(filter(None, apart)))} leaves them out" if any(apart) else ""
    return (
        [f"{len(seen)} of the {len(hashes)} scans to test on are pre-trained on (without labels){mend}"] if seen else []
    )


def _check_windows(pool: Index, labelled: Index) -> None:
    """An encoder sees scans as it saw those that it was trained on."""
    if pool.hu_window != labelled.hu_window:
        raise ValueError(
            f"base_pretrain.index={pool.store} has hu_window={list(pool.hu_window)}, index={labelled.store} "
            f"{list(labelled.hu_window)}: prepare one of them again with the other's hu_window"
        )


def _check_shipped(configs: dict[str, Section], read: Callable[[str], Index]) -> None:
    """Weights that come with pgl_ray are there, and fit encoder and store; those of runs may come into being yet."""
    for config in (configs[stage] for stage in ("probe", "finetune") if stage in configs):
        if config.init.startswith(PRETRAINED):
            encoder, partial = config.encoder and config.encoder.model_dump(), getattr(config, "allow_partial", False)
            weights.read(config.init, encoder, read(config.index).hu_window, partial)


def _check_checkpoints(grace: int, config: FinetuneConfig, train_ids: list[str]) -> None:
    """Population based training copies checkpoints: there must be one by each change."""
    counts = (config.patches_per_scan, config.global_batch_size, config.epochs, config.max_steps)
    num_steps = stream.Plan.make(train_ids, *counts, config.seed).num_steps
    most = max(1, num_steps * grace // 100)
    if config.train.checkpoint_every > most:
        raise ValueError(
            f"scheduler.kind=pbt copies checkpoints: base_finetune.train.checkpoint_every="
            f"{config.train.checkpoint_every} must be at most {most}, scheduler.grace={grace} % of {num_steps} steps"
        )


def remember(config: TuneConfig, folder: Path, keep: bool = True) -> None:
    """Writes sweep.json with `keep`, and checks that a sweep that is there has the same bases; its space may grow."""
    wanted = json.loads(config.model_dump_json())
    path = folder / sweeps.SWEEP
    if path.exists():
        found = json.loads(path.read_text())
        fixed = ["index", "judge", *(f"base_{stage}" for stage in STAGES)]
        changed = [key for key in fixed if found.get(key) != wanted[key]]
        both = set(found["arms"]) & set(wanted["arms"])
        changed += [f"arms.{arm}" for arm in sorted(both) if wanted["arms"][arm] != found["arms"][arm]]
        if changed:
            raise ValueError(
                f"run={config.run} is a sweep with another {', '.join(changed)} (sweep.json there): choose another "
                "run=..."
            )
    elif folder.exists() and any(path.name not in (".lock", "pretrain") for path in folder.iterdir()):
        raise ValueError(f"run={config.run} exists and is no sweep of pgl_ray: choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def room_for(config: TuneConfig, trials: list[Trial]) -> int:
    """How many trials run at a time; of a cluster that grows, where all of its nodes are there.

    Raises:
        ValueError: the cluster is too small for one, or for max_concurrent of them; says what it has.
    """
    here = nodes.cluster()
    cpus, gpus = here.limit("CPU"), here.limit("GPU")
    points = [trial.values for trial in trials] or [{}]
    configs = [one for values in points for one in stage_configs(config, values, Path(config.run)).values()]
    trains, needs, fit = {one.train for one in configs if hasattr(one, "train")} or {TrainConfig()}, [], []
    for train in trains:
        on_gpu, num = nodes.check_resources(train), nodes.least(train)[1]
        needs.append((_cpus(train), train.num_workers * train.gpus_per_worker if on_gpu else 0))
        fit.append(here.room(nodes.needs(train, on_gpu)) // num)  # node by node
    cpus_each, gpus_each = (max(need) for need in zip(*needs))
    room = int(min(cpus / cpus_each, gpus / gpus_each if gpus_each else math.inf, *fit))
    if here.unknown:
        room = max(1, room, config.max_concurrent or 0)
    if config.max_concurrent and config.max_concurrent > room:
        raise ValueError(
            f"max_concurrent={config.max_concurrent} trials of {cpus_each:g} CPUs and {gpus_each:g} GPUs each do not "
            f"fit, {here.in_words()}: at most {room}"
        )
    if config.scheduler.kind == "pbt":
        if room < len(trials):
            needs = f"{len(trials) * cpus_each:g} CPUs and {len(trials) * gpus_each:g} GPUs"
            mend = "raise the autoscaler's maximum" if here.grows else "let them share a machine's cores by a higher "
            mend += "" if here.grows else "ray.num_cpus"
            raise ValueError(
                f"scheduler.kind=pbt runs its {len(trials)} trials together: they need {needs}, {here.in_words()}: "
                f"lower num_trials, or {mend}"
            )
        return len(trials)
    if not here.others and not here.grows:  # a local cluster may count more CPUs than the machine has
        room = min(room, int((os.cpu_count() or 1) / cpus_each)) if not gpus_each else room
    return config.max_concurrent or max(1, room)


def _cpus(train: TrainConfig) -> float:
    return train.num_workers * train.cpus_per_worker + nodes.FEED_CPUS


# -- Ray Tune ---------------------------------------------------------------------------------------------------------


def _fit(
    config: TuneConfig,
    folder: Path,
    left: list[Trial],
    num: int,
    room: int,
    done: list[sweeps.Trial],
    again: int = 0,
) -> None:
    """Runs the trials that are left, or as many of Optuna's as are missing to `num`; `again` counts its rounds.

    Ray Tune's own folder is of no use afterwards: it is made anew at each start.
    """
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other output of Ray Tune prints a box at verbose=0, too
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # as text: Tune would take its verbs for a second space
    space: dict[str, Any] = {"sweep": config.model_dump_json(), "room": room}
    search, samples = None, 1
    if config.search == "optuna":
        search, samples = make_optuna(config, sweeps.read_trials(folder), again), num - len(done)
    else:
        space["trial"] = tune.grid_search([_as_continued(folder, trial) for trial in left])
    shutil.rmtree(folder / "tune", ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": 0.01}),  # it only waits for its workers, which reserve their own
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=samples,
            max_concurrent_trials=room,
            search_alg=search,
            scheduler=make_scheduler(config, done),
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, callbacks=[_callback(config, folder, num, room)]
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of Ray Tune on its own classes
        tuner.fit()


def _as_continued(folder: Path, trial: Trial) -> dict[str, Any]:
    """A trial as Tune sees it; one that pbt has changed goes on as it was."""
    found = sweeps.read_trial(folder / "trials" / trial.name)
    return {"name": trial.name, "values": found.values if found else trial.values}


def make_optuna(config: TuneConfig, begun: list[sweeps.Trial], again: int = 0) -> Any:
    """Optuna's search, which knows what ended trials gave and first draws those again that were interrupted."""
    from ray.tune.search.optuna import OptunaSearch

    space = {key: _domain(verbs) for key, verbs in config.space.items()}
    if config.arms:
        space["arm"] = _domain({"choice": list(config.arms)})
    space = OptunaSearch.convert_search_space({"trial": {"values": space}})
    ended, interrupted = [], []
    for trial in begun:
        point = {key: json.dumps(v) if isinstance(v, list) else v for key, v in trial.values.items()}
        point = {f"trial/values/{key}": value for key, value in point.items()}
        if set(point) == set(space):  # of the space as it is now
            (ended if trial.state in sweeps.ENDED else interrupted).append((point, trial.score))
    seed, first = config.seed + len(begun) + 1000 * again, [point for point, _ in interrupted] or None
    search = OptunaSearch(space=space, metric="score", mode="max", points_to_evaluate=first, seed=seed)
    for point, score in ended:
        search.add_evaluated_point(point, sweeps.merit(config.judge, score))  # a collapsed one has none
    return search


def make_scheduler(config: TuneConfig, done: list[sweeps.Trial]) -> Any:
    """ASHA with the rungs of trials that ended before, PBT, or none. Time is percent of the judged stages."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    chosen, shared = config.scheduler, {"time_attr": "progress", "metric": "score", "mode": "max"}
    if chosen.kind == "asha":
        options = {"grace_period": chosen.grace, "reduction_factor": chosen.reduction, "stop_last_trials": False}
        asha = ASHAScheduler(**shared, **options, max_t=end_of(config) - 1)
        for trial in done:
            stub = SimpleNamespace(trial_id=trial.name)
            asha.on_trial_add(None, stub)
            for progress, score in trial.reports:
                figure = config.first_judge if progress <= trial.record.get("judged_from", 0) else config.judge
                asha.on_trial_result(None, stub, {"progress": progress, "score": sweeps.merit(figure, score)})
        return asha
    if chosen.kind == "pbt":
        mutations = {"trial": {"values": {LEARNING_RATE: _domain(config.space[LEARNING_RATE])}}}
        verbs = config.space[LEARNING_RATE]
        if "choice" in verbs:
            mutations = {"trial": {"values": {LEARNING_RATE: verbs["choice"]}}}
        return PopulationBasedTraining(**shared, perturbation_interval=chosen.grace, hyperparam_mutations=mutations)
    return FIFOScheduler()


def _callback(config: TuneConfig, folder: Path, num: int, room: int) -> Any:
    """Prints the table of `num` trials, `room` at a time, and notes which of them Tune stopped or lost."""
    from ray import tune

    class Table(tune.Callback):
        def __init__(self) -> None:
            self.shown, self.looked, self.before = time.monotonic(), -math.inf, None

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _ended(config, folder, trial, "stopped", None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _ended(config, folder, trial, "failed", "its process died (out of memory?)")

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self.looked < LOOK_S:
                return
            self.looked = time.monotonic()
            found = {trial.name: trial for trial in sweeps.read_trials(folder)}
            states = {trial.name: trial.state for trial in found.values()}
            new = {name for name, state in states.items() if (self.before or {}).get(name) != state}
            due = time.monotonic() - self.shown > SHOW_S
            shown = [t for t in found.values() if (t.name in new and self.before is not None) or t.state == "running"]
            if shown and (new or due):
                print(sweeps.table(shown, head=self.before is None or not any(self.before.values())), flush=True)
                print(sweeps.counts(list(found.values()), num, room), flush=True)
                self.shown = time.monotonic()
            self.before = states

    return Table()


def _ended(config: TuneConfig, folder: Path, trial: Any, state: str, error: str | None) -> None:
    """Notes how one of Ray Tune's trials ended, unless it did so itself."""
    place = folder / "trials" / own_name(config, trial.trial_id, trial.config["trial"])
    if (place / "trial.json").exists():
        sweeps.end(place, state, error)


# -- results ----------------------------------------------------------------------------------------------------------


def collect(config: TuneConfig, folder: Path) -> Result:
    """Writes the table of all trials, the best settings and the report."""
    found = sweeps.read_trials(folder)
    sweeps.write_table(folder)
    scored = [trial for trial in found if trial.score is not None and trial.state == "done"]
    if not scored:
        failed = next((trial.error for trial in found if trial.error), "no result")
        raise FailedRun(f"no trial of {len(found)} came to a score; the first: {failed}")
    best = max(scored, key=lambda trial: trial.merit)
    configs = stage_configs(config, best.values, folder / "trials" / best.name)
    left_out = {"index", "run", "ray"} | ({"init"} if "pretrain" in configs else set())
    sections = {
        stage: stage_config.model_dump(mode="json", exclude=left_out)
        for stage, stage_config in configs.items()
        if stage in ("pretrain", "finetune")
    }
    text = f"# Best of {len(found)} trials by {config.judge}, {best.score:.4f}: {_title(best.values)}\n"
    doors = " and ".join(f"python -m pgl_ray.{stage}" for stage in sections)
    text += f"# {doors} take their own part: best.yaml index=... run=...\n"
    if "pretrain" in sections and "finetune" in sections:
        text += "# fine-tuning starts from the other's run: init=...\n"
    write_aside(folder / "best.yaml", (text + OmegaConf.to_yaml(OmegaConf.create(sections))).encode())
    report.run(build(ReportConfig, {"run": [str(folder)], "title": f"Sweep {folder.name}"}))
    print("\n" + sweeps.table(sorted(found, key=lambda trial: -trial.merit)))
    states = dict(Counter(trial.state for trial in found))
    return Result(str(folder), best.values, best.score, states)


def describe(result: Result) -> str:
    """The closing line."""
    counts = ", ".join(f"{num} {state}" for state, num in result.states.items())
    return f"tune: best score {result.score:.4f} with {_title(result.best)}; {counts}; {result.folder}/report.html"
