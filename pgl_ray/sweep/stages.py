"""The stages of a trial: its doors in order, each with its config, of the sweep's bases and the trial's values."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pgl_ray.config import STAGES, EncoderConfig, Section, TuneConfig, ViewsConfig, build
from pgl_ray.data.store_settings import read_settings
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import feature_geometry
from pgl_ray.sweep.points import hash_of
from pgl_ray.train.run_files import RECORD

CONTROL = "pretrain.align.wrong_priors"  # also of an init that was trained so: it is judged in its strongest reading


def stage_configs(config: TuneConfig, values: dict[str, Any], folder: Path) -> dict[str, Section]:
    """The doors' configs of one trial, in order: base, then the arm's and the space's values.

    Args:
        config: the sweep's.
        values: the trial's point.
        folder: the trial's; equal pre-trainings of a sweep share a folder next to those of the trials.

    Raises:
        ValueError: a config that the door would refuse.
    """
    overrides = overrides_of(config, values)
    configs = {stage: stage_config(config, stage, overrides, folder) for stage in STAGES}
    tuning, shared = configs["finetune"], configs["pretrain"]
    own = {name.partition(".")[0] for name in overrides if name.split(".")[1:2] == ["encoder"]}
    encoder = shared.encoder if shared else None  # the pre-training's, whatever was swept
    if tuning and ("init" in (config.base_finetune or {}) or "finetune.init" in overrides):
        shared = configs["pretrain"] = None
    if not tuning and "probe.init" in overrides:
        shared = configs["pretrain"] = None
    init = tuning.init if tuning else configs["probe"].init if configs["probe"] else "random"
    if shared:
        strides = [*shared.align.more_strides, shared.align.output_stride] if shared.method == "pgl" else [None]
        for stride in strides:
            _check_geometry(shared.encoder, shared.views.size, stride)
        judges = () if config.base_probe is not None else (config.judge, config.first_judge)
        curve = {"probe"} if not any((judge or "").startswith("probe/") for judge in judges) else set()
        same = shared.model_dump(mode="json", exclude={"run", "ray", "health"} | curve)
        trainings = Path(config.run).absolute() / "pretrain"
        if not shared.health.stop_on_collapse and not _never_stops(trainings / hash_of(same)[:12]):
            same |= {"stop_on_collapse": False}
        init = str(trainings / hash_of(same)[:12])
        configs["pretrain"] = shared.model_copy(update={"run": init})
    more = {"probe": {"output": str(folder / "probe.json")}, "finetune": {}}
    for stage, changes in more.items():
        if configs[stage]:
            # random weights are as large as what they are held against, unless an arm or the space says otherwise
            alike = encoder and (shared or (init == "random" and stage not in own))
            changes |= {"init": init} | ({"encoder": encoder} if alike else {})
            configs[stage] = configs[stage].model_copy(update=changes)
    return {stage: stage_config for stage, stage_config in configs.items() if stage_config}


def _never_stops(run: Path) -> bool:
    """Whether a sweep of an earlier version, which shared pre-trainings across this, has one there that goes on after
    a collapse."""
    try:
        return json.loads((run / RECORD).read_text())["config"]["health"]["stop_on_collapse"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


def overrides_of(config: TuneConfig, values: dict[str, Any]) -> dict[str, Any]:
    """What a point says beyond the bases, its arm's values first: {dotted key: value}."""
    swept = {name: value for key, value in values.items() if key != "arm" for name in dotted(key)}
    return config.arms.get(values.get("arm"), {}) | swept


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
    defaults: dict[str, Any] = {"index": config.index}
    if stage == "probe":
        # a sweep has random weights and wrong priors as arms: each trial's own would judge them again and again; and
        # all trials see the same windows, random weights too
        views = (config.base_pretrain or {}).get("views") or {}
        defaults |= {"ends": False, "size": views.get("size") or ViewsConfig().size}
        defaults |= {"all_readings": bool(overrides.get(CONTROL))}
    values = defaults | OmegaConf.to_container(merged) | places
    if stage == "pretrain":
        more: dict[str, dict[str, Any]] = {"health": {"stop_on_collapse": True}}
        if values["index"] != config.index and not _has_labels(values["index"]):  # a pool
            more["probe"] = {"index": config.index}
        for key, own in more.items():
            if isinstance(values.get(key, {}), dict):  # what else it may be, its own model refuses
                values[key] = own | values.get(key, {})
    return build(STAGES[stage], values)


@functools.cache
def _has_labels(index: str) -> bool:
    """Whether a store has labels; where there is none, `check_stores` says so."""
    try:
        return bool(read_settings(index).labels)
    except (ValueError, OSError):
        return True


@functools.cache
def _check_geometry(encoder: EncoderConfig, view_size: tuple, output_stride: tuple | None) -> None:
    """Refuses an output stride that the encoder has no map of, or that views are no multiple of; none: the last map's,
    which methods other than PGL take."""
    with torch.device("meta"):
        network = build_encoder(**encoder.model_dump())
        feature_geometry(network, view_size, output_stride or network.strides[-1])


def dotted(key: str) -> list[str]:
    """The dotted keys of one key of a space."""
    return [part.strip() for part in key.split("+")]


def judged_from(config: TuneConfig) -> int:
    """Percent of the judged stages up to which the first judge reports another figure."""
    return 100 if config.first_judge and config.base_finetune is not None else 0


def end_of(config: TuneConfig) -> int:
    """Percent at the end of the last judged stage: each has a hundred."""
    return 100 * ((config.base_finetune is not None) + (config.first_judge is not None)) or 100
