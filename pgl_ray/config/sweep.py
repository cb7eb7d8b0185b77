"""Knobs of sweeps and grids: tune."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pgl_ray.config.fields import (
    FilePath,
    Positive,
    Section,
    Seed,
    StorePath,
    Verb,
    with_absolute_paths,
    without_null,
)
from pgl_ray.config.training import RayConfig
from pgl_ray.config.trainings import FinetuneConfig, PretrainConfig, ProbeConfig
from pgl_ray.config.uses import EvaluateConfig

STAGES: dict[str, type[Section]] = {  # of a trial, in order
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
}


class SchedulerConfig(Section):
    """Which trials of a sweep are stopped early."""

    kind: Literal["none", "asha", "pbt"] = "none"
    """asha: at each rung the worse trials are stopped (Li et al. 2020); pbt: the worst quarter goes on from one of the
    best, with its learning rate changed (Jaderberg et al. 2017); its trials run all at a time."""
    grace: Annotated[int, Field(ge=1, le=99)] = 25
    """Percent of a judged stage: where the first rung stands, or between two changes of pbt."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """asha keeps about one in so many trials at a rung; the next one stands so many times further."""


class TuneConfig(Section):
    """Trials of pretrain, probe, finetune and evaluate, those stages that have a base: a sweep, or a grid of arms."""

    run: FilePath
    """Folder of the sweep; the same command again continues an interrupted one, one with a larger space adds to it."""
    index: StorePath
    """Store written by prepare, with labels; a stage may take another: base_pretrain.index."""
    base_pretrain: dict[str, Any] | None = None
    """What the trials' pre-training config says beyond the defaults; none: no pre-training."""
    base_probe: dict[str, Any] | None = None
    """The same of a probe of the pre-trained encoder; none: no probe. Its `ends` is false where it is not given: random
    weights are an arm of the sweep (probe.init: random; finetune.init where fine-tuning follows), judged once, in every
    reading, as wrong priors are (pretrain.align.wrong_priors: true); a `control` or `ceiling` that it names is judged
    in every trial. Its `size` is that of base_pretrain.views, for all trials alike."""
    base_finetune: dict[str, Any] | None = {}
    """The same of fine-tuning. With `init` (or where an arm sets finetune.init) there is no pre-training before it. Its
    encoder and the probe's are base_pretrain's, those of random weights, too, unless an arm or the space sets them."""
    base_evaluate: dict[str, Any] | None = None
    """The same of the evaluation of the fine-tuned network; none: no evaluation."""
    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(without_null)] = {}
    """Name -> dotted keys and values that belong together; every arm meets every point of the space. `arms.NAME=null`
    leaves one out."""
    space: Annotated[dict[str, dict[Verb, list[Any]]], BeforeValidator(without_null)] = {}
    """Dotted key (pretrain.ema_decay, finetune.optim.lr) -> one of Ray Tune's verbs and its arguments. `a + b` gives
    two keys one value. On a command line: 'space[finetune.optim.lr].choice=[1,2]'."""
    judge: str = "val/dice"
    """Figure of the last stage that trials are judged by: of the metrics, higher is better; where a probe comes last,
    probe/balanced_accuracy, probe/decoder_dice, or probe/matching_mm, of which lower is better."""
    first_judge: str | None = None
    """Figure of a probe (as above) that the scheduler may stop trials by before fine-tuning; none: pre-training is not
    judged, only a collapse ends it."""
    scheduler: SchedulerConfig = SchedulerConfig()
    search: Literal["random", "optuna"] = "random"
    """How values are drawn: at random, or by Optuna's TPE from what earlier trials gave (extra `tune`)."""
    num_trials: Positive = 1
    """Draws from the space; a grid_search and the arms multiply them."""
    max_trials: Positive = 64
    """Largest number of trials that is accepted."""
    max_concurrent: Positive | None = None
    """Trials at a time; none: as many as the cluster's CPUs and GPUs hold, with those that its autoscaler can add."""
    published: Literal["bcv", "liver", "kits", "spleen"] | None = None
    """Tables of conf/published.yaml that the report sets beside the arms of the same name."""
    seed: Annotated[Seed, Field(lt=2**31)] = 0  # numpy's RandomState and Optuna's take 32 bits, and more is added to it
    """Seed of the draws."""
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _places(cls, values: Any) -> Any:
        """Trials run in folders of their own: a relative path is one of the command's."""
        if not isinstance(values, dict):
            return values
        for stage, door in STAGES.items():
            if isinstance(values.get(f"base_{stage}"), dict):
                values = {**values, f"base_{stage}": with_absolute_paths(door, values[f"base_{stage}"])}
        arms = values.get("arms")
        if isinstance(arms, dict) and all(isinstance(arm, dict) for arm in arms.values() if arm is not None):
            values = {**values, "arms": {name: arm and _arm_places(arm) for name, arm in arms.items()}}
        return values


def _arm_places(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm's dotted keys and values, with paths made absolute."""
    places = {}
    for name, value in arm.items():
        stage, _, key = str(name).partition(".")
        door = STAGES.get(stage)
        places[name] = with_absolute_paths(door, {key: value})[key] if door and key else value
    return places
