"""What would only fail in a trial, refused before the first one begins: see stores.py for what lies in the stores."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pgl_ray.config import STAGES, Section, TuneConfig, keys
from pgl_ray.sweep.points import LEARNING_RATE, Point, draw, named, num_trials_of, title_of
from pgl_ray.sweep.stages import CONTROL, dotted, overrides_of, stage_config, stage_configs
from pgl_ray.sweep.sweeps import FIGURES, PROBE


def check(config: TuneConfig) -> list[Point]:
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
    bases = {}
    for stage in STAGES:
        with named(f"base_{stage}"):
            bases[stage] = stage_config(config, stage, {}, Path(config.run))
    _check_judges(config, bases["pretrain"])
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
    _check_twice(config)
    num = num_trials_of(config)
    if num > config.max_trials:
        raise ValueError(f"the space has {num} trials, max_trials={config.max_trials}: shrink it or raise the bound")
    _check_search(config)
    trials = draw(config)
    pretrained = {trial.values.get("arm") for trial in trials if "pretrain" in _checked(config, trial)}
    _check_pretraining(config, pretrained)
    return [] if config.search == "optuna" else trials  # what Optuna draws is of the same kind


def _checked(config: TuneConfig, trial: Point) -> dict[str, Section]:
    """The configs of a trial's stages, which go together."""
    with named(title_of(trial.values)):
        configs = stage_configs(config, trial.values, Path(config.run))
        if config.first_judge and "pretrain" not in configs and "probe" not in configs:
            raise ValueError(f"it is not pre-trained: for first_judge={config.first_judge} it needs a base_probe")
        _check_init(config, trial.values, configs)
        _check_encoder(config, trial.values, configs)
        _check_probe(config, configs)
        if "evaluate" in configs and configs["evaluate"].tta and configs["finetune"].patch.flip_prob == 0:
            raise ValueError("evaluate.tta=true averages over flips: it needs finetune.patch.flip_prob above 0")
    return configs


def _check_judges(config: TuneConfig, pretraining: Section | None) -> None:
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
    curve = bool(pretraining and pretraining.probe.every)
    for name, figure in (("judge", config.judge), ("first_judge", config.first_judge)):
        if figure and (name == "first_judge" or figure in FIGURES):
            probed = config.base_probe is not None or (curve and figure == PROBE)
            if figure not in FIGURES or not probed:
                others = " or ".join(figure for figure in FIGURES if figure != PROBE)
                raise ValueError(
                    f"{name}={figure}: take {PROBE}, with base_pretrain.probe.every=... or a base_probe; or {others}, "
                    "with a base_probe"
                )
    if config.base_finetune is None and config.judge.startswith("val/"):
        raise ValueError(f"judge={config.judge} is a figure of fine-tuning, and base_finetune is null: take {PROBE}")


def _check_init(config: TuneConfig, values: dict[str, Any], configs: dict[str, Section]) -> None:
    """Refuses a trial whose probe would judge another encoder than it is given."""
    given = config.arms.get(values.get("arm"), {}).get("probe.init", (config.base_probe or {}).get("init"))
    if "probe" not in configs or given in (None, configs["probe"].init):
        return
    if "finetune" not in configs:
        raise ValueError(f"base_probe.init={given}: the probe judges the pre-training: give an arm probe.init instead")
    start = "the pre-training" if "pretrain" in configs else configs["probe"].init
    raise ValueError(
        f"probe.init={given}: the probe judges what fine-tuning starts from, here {start}: give finetune.init the same "
        "value, or leave probe.init out"
    )


def _check_encoder(config: TuneConfig, values: dict[str, Any], configs: dict[str, Section]) -> None:
    """Refuses a trial whose later stages would have another encoder than its pre-training, whose weights they take."""
    if "pretrain" not in configs:
        return
    known = configs["pretrain"].encoder.model_dump(mode="json")
    for name, value in overrides_of(config, values).items():
        stage, _, key = name.partition(".encoder.")
        if stage != "pretrain" and key and value != known[key]:
            raise ValueError(
                f"{name}={value}: its encoder is that of the pre-training, whose {key} is {known[key]}: give "
                f"pretrain.encoder.{key} instead"
            )


def _check_pretraining(config: TuneConfig, pretrained: set[Any]) -> None:
    """Refuses what would only change a pre-training where none is done. Encoders of random weights are as large as the
    pre-training's would be.

    Args:
        pretrained: the arms that are pre-trained, of a sweep without arms None.
    """
    given, key_of = (config.base_finetune or {}).get("init"), "finetune.init"
    if config.base_finetune is None:
        key_of = "probe.init"
    inits = {arm: values.get(key_of, given) for arm, values in config.arms.items()} or {None: given}

    def idle(names: Iterable[str], init: Any) -> bool:
        used = ["pretrain.encoder."] * (init == "random") + [CONTROL] * (config.base_probe is not None)
        return all(name.startswith("pretrain.") and not name.startswith(tuple(used)) for name in names)

    for key in config.space if not pretrained else ():
        if all(idle(dotted(key), init) for init in inits.values()):
            raise ValueError(
                f"space key {key!r} changes nothing, no trial is pre-trained, as each is given an init: leave out one "
                "of them"
            )
    for arm in config.arms.keys() - pretrained:
        for name in config.arms[arm]:
            if idle([name], inits[arm]):
                raise ValueError(
                    f"arms.{arm}: {name!r} changes nothing, it is not pre-trained, as its init is {inits[arm]}: leave "
                    "out one of them"
                )


def _check_probe(config: TuneConfig, configs: dict[str, Section]) -> None:
    """Refuses a trial whose probe does not say what trials are judged by."""
    figure = config.first_judge if "finetune" in configs else config.judge
    judge = FIGURES.get(figure)
    if judge and "probe" in configs and judge not in configs["probe"].judges:
        asked = ",".join(configs["probe"].judges)
        raise ValueError(f"{figure} is said by {judge}: add it to base_probe.judges=[{asked}]")


def _check_key(config: TuneConfig, name: str, subject: str, fixed: tuple[str, ...]) -> None:
    stage, _, key = name.partition(".")
    known = [known for known, _, _ in keys(STAGES[stage])] if stage in STAGES else []
    if key not in known or key in fixed or key.startswith("ray."):  # the sweep's own
        raise ValueError(f"{subject} is not a key of pretrain.*, probe.*, finetune.* or evaluate.*")
    if getattr(config, f"base_{stage}") is None:
        raise ValueError(f"{subject} needs base_{stage}")


def _check_twice(config: TuneConfig) -> None:
    """Refuses a key that is set in two ways, of which a trial would have only the later one."""
    setters: dict[str, str] = {}
    mend = "of which a trial would have one: leave it to one of them"
    for key in config.space:
        for name in dotted(key):
            if setters.setdefault(name, key) != key:
                raise ValueError(f"space keys {setters[name]!r} and {key!r} both set {name}, {mend}")
    for arm, values in config.arms.items():
        for name in values:
            if name in setters:
                raise ValueError(f"arms.{arm} and space key {setters[name]!r} both set {name}, {mend}")


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
