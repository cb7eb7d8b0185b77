"""Optimizers and schedules."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pgl_ray.config import FinetuneOptimConfig, PretrainOptimConfig

TRUST_COEFFICIENT = 1e-3  # of LARS's layer-wise rate (You et al. 2017; BYOL)
DECAY_POWER = 0.9  # of fine-tuning's rate, as nnU-Net has it (Isensee et al. 2021); the paper names no schedule
NAMES = {"lars": "LARS", "sgd": "SGD", "adamw": "AdamW"}


def build_pretraining(model: nn.Module, config: PretrainOptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a method over its trainable parameters.

    Args:
        config: as it stands in a `PretrainConfig`, which leaves neither kind nor rate open.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    match config.kind:
        case "lars":
            return build_lars(model, config)
        case "sgd":
            lr, decay = _rates(config)
            return torch.optim.SGD(parameters, lr, config.momentum, weight_decay=decay)
        case "adamw":
            lr, decay = _rates(config)
            return torch.optim.AdamW(parameters, lr, weight_decay=decay)
    raise ValueError(f"optim.kind={config.kind}: expected the kind that a PretrainConfig resolves to")


def _rates(config: PretrainOptimConfig) -> tuple[float, float]:
    """Learning rate and weight decay.

    Raises:
        ValueError: they are still left to the method.
    """
    if config.lr is None or config.weight_decay is None:
        raise ValueError(f"optim.lr={config.lr}, optim.weight_decay={config.weight_decay}: expected numbers")
    return config.lr, config.weight_decay


def describe(config: PretrainOptimConfig | FinetuneOptimConfig) -> str:
    """An optimizer and its rate, in a few words."""
    return f"{NAMES[config.kind]} at {config.lr:g}"


def build_lars(model: nn.Module, config: PretrainOptimConfig) -> torch.optim.Optimizer:
    """LARS over the trainable parameters; 1-D ones (biases, norms) are exempt from decay and from the layer-wise rate,
    as in BYOL."""
    from pytorch_optimizer import LARS

    lr, decay = _rates(config)
    return LARS(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        momentum=config.momentum,
        weight_decay=decay,
        trust_coefficient=TRUST_COEFFICIENT,
    )


def build_finetuning(model: nn.Module, config: FinetuneOptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the trainable parameters.

    Args:
        model: with an `encoder`, whose parameters are a group of their own, the second one, where
            `config.encoder_lr_factor` is not 1.
    """
    rest, encoder = [p for p in model.parameters() if p.requires_grad], []
    if config.encoder_lr_factor != 1:
        encoder = [p for p in model.get_submodule("encoder").parameters() if p.requires_grad]
        known = set(encoder)
        rest = [p for p in rest if p not in known]
    groups: list[dict[str, Any]] = [{"params": rest}]
    groups += [{"params": encoder, "lr": config.lr * config.encoder_lr_factor}] if encoder else []
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Linear warm-up to the full rate at step `warmup_steps`, then half a cosine to 0 at `num_steps`; per step."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, warmup_steps, num_steps))


def rate_factor(step: int, warmup_steps: int, num_steps: int) -> float:
    """The rate of `warmup_cosine` at a step, as a multiple of the full one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    rest = max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / rest)))


def warmup_steps(config: PretrainOptimConfig, rows_per_epoch: int, global_batch_size: int, num_steps: int) -> int:
    """Length of the warm-up: `config.warmup_epochs`, but at most a tenth of the run."""
    return min(round(config.warmup_epochs * rows_per_epoch / global_batch_size), max(1, num_steps // 10))


def sum_of_rates(lr: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rates of `warmup_cosine` added up over a run: how far it can go, whatever its length. The paper's 7,060
    steps at 0.2 give 706."""
    return lr * sum(rate_factor(step, warmup_steps, num_steps) for step in range(num_steps))


def lars_reach(config: PretrainOptimConfig, rates: float) -> float:
    """How far LARS can move a weight while the rates add up to `rates`, relative to its norm: a step is a rate's
    thousandth of that (TRUST_COEFFICIENT), and momentum adds steps of one direction up."""
    return rates * TRUST_COEFFICIENT / (1 - config.momentum)


def polynomial(optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """The full rate times (1 - step / num_steps) ** DECAY_POWER; per step."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_steps) ** DECAY_POWER)


def ema_decay(step: int, num_steps: int, start: float) -> float:
    """Decay of the target at a step, on BYOL's cosine to 1: 1 - (1 - start) (cos(pi step / num_steps) + 1) / 2.

    Args:
        step: steps done.
        num_steps: of the run.
        start: decay at step 0.
    """
    return 1 - (1 - start) * (math.cos(math.pi * step / num_steps) + 1) / 2


def turnover(num_steps: int, start: float) -> float:
    """How many times a target turns over in a run: the sum over its steps of 1 - `ema_decay`. The paper's 7,060 steps
    from 0.996 on give 14; a target that has not turned over a few times still is the random network it began as."""
    return sum(1 - ema_decay(step, num_steps, start) for step in range(num_steps))


def slowest_decay(num_steps: int, least: float) -> float | None:
    """Largest `ema_decay` at the start, with two digits behind its nines, at which a target turns over `least` times;
    none: the run is too short for any."""
    needed = least / turnover(num_steps, 0.0)  # a turnover is in proportion to 1 - start
    if needed > 1:
        return None
    places = 1 - math.floor(math.log10(needed))
    return round(1 - math.ceil(needed * 10**places - 1e-9) / 10**places, places)


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Brings BatchNorm's running statistics in line: each becomes the mean over all workers, in place; modules in
    evaluation mode (frozen ones) keep theirs. (So does every buffer of floats; others are the same everywhere.)

    The rule where BatchNorm is not synchronised (CPU). In training mode nothing reads them, so training is the same
    with and without; a checkpoint holds the mean. One worker's, or synchronised ones, stay as they are.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    live = [buffer for part in model.modules() if part.training for buffer in part.buffers(recurse=False)]
    buffers = [buffer for buffer in live if buffer.is_floating_point()]
    if buffers:
        together = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.all_reduce(together)
        together /= torch.distributed.get_world_size()
        for buffer, mean in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
