"""python -m pgl_ray.tune tune_spaces/X.yaml index=STORE run=SWEEP [a.b=c ...]: sweeps with Ray Tune.

A trial runs the doors themselves, pretrain.run and then finetune.run, and is judged by the validation Dice: the
pre-training loss is not comparable between settings, and a collapsed network minimises it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pgl_ray import finetune, pretrain
from pgl_ray.config import FailedRun, FinetuneConfig, PretrainConfig, Section, TuneConfig, build, command, keys
from pgl_ray.data.store import read_index
from pgl_ray.train import launch
from pgl_ray.train.checkpoint import write_json
from pgl_ray.train.quiet import quiet_worker

METRIC = "val_dice"
STAGES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


@dataclass(frozen=True)
class Result:
    """The sweep's table and its best trial."""

    folder: str
    best: dict[str, Any]
    dice: float
    num_trials: int
    failed: list[str]


def run(config: TuneConfig) -> Result:
    """Runs, or continues, the sweep; writes trials.parquet and best_pretrain.yaml / best_finetune.yaml.

    Raises:
        ValueError: an unknown key, an empty or too large space, a base config that does not load.
        FailedRun: every trial failed.
    """
    folder = Path(config.run).absolute()
    check(config)
    finetune.split_scans(_stage_configs(_plain(config), {}, folder)["finetune"], read_index(config.index))
    _remember(config, folder)
    launch.connect(config.ray)
    from ray import tune

    trainable = tune.with_resources(_trial, {"cpu": 0.01})  # the trial itself only waits for its Ray Train workers
    kept = folder / "tune"
    if tune.Tuner.can_restore(str(kept)):
        tuner = tune.Tuner.restore(str(kept), trainable=trainable, resume_errored=True, param_space=_space(config))
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=_space(config),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=config.num_trials,
                max_concurrent_trials=config.max_concurrent,
                search_alg=tune.search.BasicVariantGenerator(random_state=config.seed),
            ),
            run_config=tune.RunConfig(name=kept.name, storage_path=str(folder), verbose=0),
        )
    print(f"tune: {_num_trials(config)} trials over {', '.join(config.space)}; {folder}", flush=True)
    return _collect(config, folder, tuner.fit())


# -- the space --------------------------------------------------------------------------------------------------------


def check(config: TuneConfig) -> None:
    """Refuses what would only fail in the first trial.

    Raises:
        ValueError: names the dotted key, the verb, or the number of trials.
    """
    if not config.space:
        raise ValueError("space is empty: give it at least one dotted key")
    for key, verbs in config.space.items():
        stage, _, dotted = key.partition(".")
        known = [name for name, _, _ in keys(STAGES[stage])] if stage in STAGES else []
        if dotted not in known or dotted in ("index", "run", "init"):
            raise ValueError(f"space key {key!r} is not a key of pretrain.* or finetune.*")
        if stage == "pretrain" and config.base_pretrain is None:
            raise ValueError(f"space key {key!r} needs base_pretrain")
        if len(verbs) != 1 or not all(verbs.values()):
            raise ValueError(f"space key {key!r} needs one verb with its arguments, got {verbs}")
    trials = _num_trials(config)
    if trials > config.max_trials:
        raise ValueError(f"the space has {trials} trials, max_trials={config.max_trials}: shrink it or raise the bound")
    _stage_configs(_plain(config), {}, Path(config.run))


def _remember(config: TuneConfig, folder: Path) -> None:
    """Writes sweep.json, or checks that a sweep that is there has the same settings."""
    wanted = {key: value for key, value in _plain(config).items() if key not in ("ray", "max_concurrent")}
    path = folder / "sweep.json"
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"run={config.run} is a sweep with other settings (sweep.json there): choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _num_trials(config: TuneConfig) -> int:
    grids = [len(verb["grid_search"]) for verb in config.space.values() if "grid_search" in verb]
    return config.num_trials * math.prod(grids)


def _space(config: TuneConfig) -> dict[str, Any]:
    """Ray Tune's search space: a flat dict of dotted overrides beside the sweep's own config."""
    from ray import tune

    space = {}
    for key, verbs in config.space.items():
        [(verb, args)] = verbs.items()
        takes_list = verb in ("choice", "grid_search")
        space[key] = getattr(tune, verb)(args) if takes_list else getattr(tune, verb)(*args)
    # as text: Tune would take the verbs inside the config itself for a second search space
    return {"overrides": space, "sweep": config.model_dump_json()}


def _plain(config: TuneConfig) -> dict[str, Any]:
    return json.loads(config.model_dump_json())


def _stage_configs(sweep: dict[str, Any], overrides: dict[str, Any], folder: Path) -> dict[str, Section]:
    """The doors' configs of one trial: base, then the trial's dotted overrides."""
    configs = {}
    for stage, model in STAGES.items():
        base = sweep[f"base_{stage}"]
        if base is None:
            continue
        own = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(stage)}
        merged = OmegaConf.create(base)
        for key, value in own.items():
            OmegaConf.update(merged, key, value)
        values = OmegaConf.to_container(merged) | {"index": sweep["index"], "run": str(folder / stage)}
        if stage == "finetune" and "pretrain" in configs:
            values["init"] = configs["pretrain"].run
        configs[stage] = build(model, values)
    return configs


# -- a trial ----------------------------------------------------------------------------------------------------------


def _trial(trial: dict[str, Any]) -> None:
    """Runs one trial's doors; its run folders are named after the trial, so a restored trial continues them."""
    from ray import tune

    quiet_worker()
    sweep = json.loads(trial["sweep"])
    folder = Path(sweep["run"]) / "trials" / tune.get_context().get_trial_id()
    configs = _stage_configs(sweep, trial["overrides"], folder)
    if "pretrain" in configs:
        pretrain.run(configs["pretrain"])
    tune.report({METRIC: finetune.run(configs["finetune"]).val_dice})


# -- results ----------------------------------------------------------------------------------------------------------


def _collect(config: TuneConfig, folder: Path, results) -> Result:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for result in results:
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        metrics = result.metrics or {}
        row = {"trial": Path(result.path).name, METRIC: metrics.get(METRIC), "seconds": metrics.get("time_total_s")}
        rows.append(row | {"error": error, "overrides": json.dumps(result.config["overrides"])})
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    failed = [f"{row['trial']}: {row['error']}" for row in rows if row["error"]]
    good = [row for row in rows if row[METRIC] is not None]
    if not good:
        raise FailedRun(f"every trial failed; the first: {failed[0] if failed else 'no result'}")
    best = max(good, key=lambda row: row[METRIC])
    overrides = json.loads(best["overrides"])
    for stage, stage_config in _stage_configs(_plain(config), overrides, folder / "best").items():
        values = stage_config.model_dump(mode="json", exclude={"index", "run", "init"})
        (folder / f"best_{stage}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    write_json(folder / "best.json", {METRIC: best[METRIC], "overrides": overrides})
    return Result(str(folder), overrides, best[METRIC], len(rows), failed)


def describe(result: Result) -> str:
    """The closing line."""
    settings = ", ".join(f"{key}={value}" for key, value in result.best.items())
    failed = f", {len(result.failed)} failed" if result.failed else ""
    return (
        f"tune: best {METRIC} {result.dice:.4f} with {settings} of {result.num_trials} trials{failed}; {result.folder}"
    )


def main() -> None:
    command("tune", TuneConfig, run, describe)


if __name__ == "__main__":
    main()
