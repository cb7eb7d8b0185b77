"""Ray Tune chooses, stops and places a sweep's trials, and prints their table meanwhile."""

import logging
import math
import os
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pgl_ray.config import TuneConfig
from pgl_ray.sweep import sweeps
from pgl_ray.sweep.points import LEARNING_RATE, Point, domain, own_name
from pgl_ray.sweep.progress_table import counts, table
from pgl_ray.sweep.stages import end_of, judged_from
from pgl_ray.sweep.trial import run as run_trial

LOOK_S, SHOW_S = 2.0, 60.0  # between two looks at the trials' folders, between two tables


def fit(
    config: TuneConfig,
    folder: Path,
    left: list[Point],
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


def _as_continued(folder: Path, trial: Point) -> dict[str, Any]:
    """A trial as Tune sees it; one that pbt has changed goes on as it was."""
    begun = sweeps.read_trial(folder / "trials" / trial.name)
    return {"name": trial.name, "values": begun.values if begun else trial.values}


def make_optuna(config: TuneConfig, begun: list[sweeps.Trial], again: int = 0) -> Any:
    """Optuna's search, which knows what ended trials gave and first draws those again that were interrupted. One
    that was stopped before the judged stage counts as pruned: the first judge's figure is no score."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    class Search(OptunaSearch):
        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            stopped_early = result and 0 < result.get("progress", 0) <= judged_from(config)  # at 0 it failed
            super().on_trial_complete(trial_id, None if stopped_early else result, error)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: domain(verbs) for key, verbs in config.space.items()}
    if config.arms:
        space["arm"] = domain({"choice": list(config.arms)})
    space = OptunaSearch.convert_search_space({"trial": {"values": space}})
    ended, interrupted, outside = [], [], []
    for trial in begun:
        point = {f"trial/values/{key}": value for key, value in sweeps.plain_values(trial).items()}
        if _holds(space, point):
            (ended if trial.state in sweeps.ENDED else interrupted).append((point, trial))
        else:
            outside.append(trial.name)
    if outside and not again:
        print(
            f"tune: note: {len(outside)} earlier trials are not of the space as it is now, and Optuna is not told of "
            f"them: {', '.join(outside)}",
            flush=True,
        )
    seed, first = config.seed + len(begun) + 1000 * again, [point for point, _ in interrupted] or None
    search = Search(space=space, metric="score", mode="max", points_to_evaluate=first, seed=seed)
    for point, trial in ended:
        pruned = trial.state == "stopped" and trial.score is None
        search.add_evaluated_point(point, sweeps.merit(config.judge, trial.score), pruned=pruned)  # collapsed: no score
    return search


def _holds(space: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether a point has a value of each key of Optuna's space, and no other."""
    import optuna

    try:
        optuna.trial.create_trial(params=point, distributions=space, value=0.0)
    except ValueError:
        return False
    return True


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
                figure = config.first_judge if progress <= trial.judged_from else config.judge
                asha.on_trial_result(None, stub, {"progress": progress, "score": sweeps.merit(figure, score)})
        return asha
    if chosen.kind == "pbt":
        mutations = {"trial": {"values": {LEARNING_RATE: domain(config.space[LEARNING_RATE])}}}
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
            self.printed, self.looked, self.before = time.monotonic(), -math.inf, None
            self.began = time.time()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _ended(config, folder, trial, "stopped", None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _ended(config, folder, trial, "failed", "its process died (out of memory?)")

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self.looked < LOOK_S:
                return
            self.looked = time.monotonic()
            known = {trial.name: trial for trial in sweeps.present(folder, config.model_dump())}
            states = {trial.name: trial.state for trial in known.values()}
            new = {name for name, state in states.items() if (self.before or {}).get(name) != state}
            due = time.monotonic() - self.printed > SHOW_S
            listed = [t for t in known.values() if (t.name in new and self.before is not None) or t.state == "running"]
            if listed and (new or due):
                print(table(listed, head=self.before is None or not any(self.before.values())), flush=True)
                print(counts(list(known.values()), num, room, self.began), flush=True)
                self.printed = time.monotonic()
            self.before = states

    return Table()


def _ended(config: TuneConfig, folder: Path, trial: Any, state: str, error: str | None) -> None:
    """Notes how one of Ray Tune's trials ended, unless it did so itself."""
    place = folder / "trials" / own_name(config, trial.trial_id, trial.config["trial"])
    if (place / "trial.json").exists():
        sweeps.end(place, state, error)
