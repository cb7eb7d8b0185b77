"""python -m pgl_ray.tune tune_spaces/X.yaml index=STORE run=SWEEP [a.b=c ...]: sweeps and grids with Ray Tune.

A trial runs the doors themselves, pretrain.run, probe.run, finetune.run and evaluate.run, and is judged by the
validation Dice: the pre-training loss is not comparable between settings, and a collapsed network minimises it. Where
two trials pre-train alike, one of them does it and both use it. What a trial did lies in its folder, named after its
settings, and nowhere else: Ray Tune chooses, stops and places the trials that are not finished.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("tune")

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pgl_ray import report
from pgl_ray.config import FailedRun, ReportConfig, TuneConfig, build
from pgl_ray.data.durable import write_aside
from pgl_ray.sweep import checks, search, stores, sweeps
from pgl_ray.sweep.points import Point, seedless, title_of
from pgl_ray.sweep.progress_table import table
from pgl_ray.sweep.room import room_for
from pgl_ray.sweep.stages import stage_configs
from pgl_ray.train import launch, nodes

REDRAWS = 5  # at most so often does Optuna go on when it drew known points


@dataclass(frozen=True)
class Result:
    """The sweep's folder and its best trial, with its settings and score, how many trials came to what, and in how many
    of them the best settings lead, with other seeds."""

    folder: str
    best: dict[str, Any]
    score: float
    states: dict[str, int]
    num_alike: int = 1


def run(config: TuneConfig) -> Result:
    """Runs, or continues, the sweep; writes trials.parquet, best.yaml and report.html.

    Raises:
        ValueError: an unknown key, an empty or too large space, a base config that does not load, a figure that trials
            cannot be judged by, resources that the cluster does not have.
        FailedRun: no trial came to a score.
    """
    folder = Path(config.run).absolute()
    trials = checks.check(config)
    stores.check_stores(config, trials)
    sweeps.check_same(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with sweeps.locked(folder):
        sweeps.remember(config, folder, [trial.name for trial in trials])
        return run_trials(config, trials, folder)


def run_trials(config: TuneConfig, trials: list[Point], folder: Path) -> Result:
    """Runs what is not done yet on the cluster; several rounds where trials died with their workers."""
    launch.connect(config.ray)
    room, num = room_for(config, trials), len(trials) or config.num_trials
    done = _ended_trials(config, folder)
    varied = ", ".join([*(["arms"] if config.arms else []), *config.space])
    of_others = 0 if trials else len(done) - len(sweeps.counted(config.model_dump(), done.values()))
    num += of_others  # a space that grew is drawn from num_trials times, whatever is known of it
    print(f"tune: {num} trials over {varied}; {len(done)} done, {room} at a time; {folder}", flush=True)
    if nodes.cluster().grows:
        print(f"  trials wait for nodes: {nodes.cluster().in_words()}", flush=True)
    if of_others:
        counts = f"num_trials={config.num_trials} counts those drawn from this one"
        print(f"  {of_others} of them were drawn from an earlier space: {counts}", flush=True)
    if not trials and len(done) >= num:
        print(f"  nothing is left to run: a higher num_trials than {len(done) - of_others} adds trials", flush=True)
    left = [trial for trial in trials if trial.name not in done]
    if left:
        search.fit(config, folder, left, num, room, list(done.values()))
    for again in range(0 if trials else REDRAWS):  # what Optuna draws a second time is no new trial
        if len(done) < num:
            search.fit(config, folder, [], num, room, list(done.values()), again)
            done = _ended_trials(config, folder)
    return collect(config, folder)


def _ended_trials(config: TuneConfig, folder: Path) -> dict[str, sweeps.Trial]:
    present = sweeps.present(folder, config.model_dump())
    return {trial.name: trial for trial in present if trial.state in sweeps.ENDED}


def collect(config: TuneConfig, folder: Path) -> Result:
    """Writes the table of all trials, and of those of the arms and the space that there are now the best settings and
    the report."""
    trials = sweeps.present(folder, config.model_dump())
    sweeps.write_table(folder)
    done = sweeps.judged(trials)
    if not done:
        failed = next((trial.error for trial in trials if trial.error), "no result")
        raise FailedRun(f"no trial of {len(trials)} came to a score; the first: {failed}")
    best = done[0]
    configs = stage_configs(config, best.values, folder / "trials" / best.name)
    left_out = {"index", "run", "ray"} | ({"init"} if "pretrain" in configs else set())
    sections = {
        stage: stage_config.model_dump(mode="json", exclude=left_out)
        for stage, stage_config in configs.items()
        if stage in ("pretrain", "finetune")
    }
    alike = sum(seedless(trial.values) == seedless(best.values) for trial in done)
    text = f"# Best of {len(trials)} trials by {config.judge}, {best.score:.4f}: {title_of(best.values)}\n"
    text += f"# of the settings that lead in the mean over {alike} trials with other seeds\n" * (alike > 1)
    doors = " and ".join(f"python -m pgl_ray.{stage}" for stage in sections)
    text += f"# {doors} take their own part: best.yaml index=... run=...\n"
    if "pretrain" in sections and "finetune" in sections:
        text += "# fine-tuning starts from the other's run: init=...\n"
    write_aside(folder / "best.yaml", (text + OmegaConf.to_yaml(OmegaConf.create(sections))).encode())
    report.run(build(ReportConfig, {"run": [str(folder)], "title": f"Sweep {folder.name}"}))
    print("\n" + table(sorted(trials, key=lambda trial: -trial.merit)))
    states = dict(Counter(trial.state for trial in trials))
    return Result(str(folder), best.values, best.score, states, alike)


def describe(result: Result) -> str:
    """The closing line."""
    counts = ", ".join(f"{num} {state}" for state, num in result.states.items())
    lead = f", which leads in the mean over {result.num_alike} seeds" if result.num_alike > 1 else ""
    best = f"{result.score:.4f} with {title_of(result.best)}{lead}"
    return f"tune: best score {best}; {counts}; {result.folder}/report.html"
