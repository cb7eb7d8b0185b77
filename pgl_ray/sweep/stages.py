"""The stages of a trial: its doors in order, each with its config, of the sweep's bases and the trial's values."""

import functools
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pgl_ray.config import (
    EncoderConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    Section,
    TuneConfig,
    ViewsConfig,
    build,
)
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import feature_geometry
from pgl_ray.sweep.points import hash_of

STAGES = {"pretrain": PretrainConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "evaluate": EvaluateConfig}


def stage_configs(config: TuneConfig, values: dict[str, Any], folder: Path) -> dict[str, Section]:
    """The doors' configs of one trial, in order: base, then the arm's and the space's values.

    Args:
        config: the sweep's.
        values: the trial's point.
        folder: the trial's; equal pre-trainings of a sweep share a folder next to those of the trials.

    Raises:
        ValueError: a config that the door would refuse.
    """
    overrides = dict(config.arms.get(values.get("arm"), {}))
    overrides |= {name: value for key, value in values.items() if key != "arm" for name in dotted(key)}
    configs = {stage: stage_config(config, stage, overrides, folder) for stage in STAGES}
    tuning, shared = configs["finetune"], configs["pretrain"]
    if tuning and ("init" in (config.base_finetune or {}) or "finetune.init" in overrides):
        shared = configs["pretrain"] = None
    if not tuning and "probe.init" in overrides:
        shared = configs["pretrain"] = None
    init = tuning.init if tuning else overrides.get("probe.init", "random")
    if shared:
        _check_geometry(shared.method, shared.encoder, shared.views.size, shared.align.output_stride)
        same = shared.model_dump(mode="json", exclude={"run", "ray", "health", "probe"})
        init = str(Path(config.run).absolute() / "pretrain" / hash_of(same)[:12])
        configs["pretrain"] = shared.model_copy(update={"run": init})
    if configs["probe"]:
        configs["probe"] = configs["probe"].model_copy(update={"init": init, "output": str(folder / "probe.json")})
    if tuning:
        changes = {"encoder": shared.encoder} if shared else {}  # the pre-training's, whatever was swept
        configs["finetune"] = tuning.model_copy(update={"init": init} | changes)
    return {stage: stage_config for stage, stage_config in configs.items() if stage_config}


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
        defaults |= {"all_readings": bool(overrides.get("pretrain.align.wrong_priors"))}  # a control, in its strongest
    values = defaults | OmegaConf.to_container(merged) | places
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


def end_of(config: TuneConfig) -> int:
    """Percent at the end of the last judged stage: each has a hundred."""
    return 100 * ((config.base_finetune is not None) + (config.first_judge is not None)) or 100
