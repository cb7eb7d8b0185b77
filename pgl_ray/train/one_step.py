"""One training step on a worker's batch, in parts where it is asked for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.pgl import Output, Pair
from pgl_ray.model.segmenter import LightSegmenter, Segmenter
from pgl_ray.train import health
from pgl_ray.train.networks import Net


class Step(NamedTuple):
    """What one training step did; nothing of it waits for the device. The output is that of `pair`, the last part."""

    pair: Pair
    output: Output
    grad_norm: Tensor
    lr: float


def train_step(
    model: nn.Module,
    net: Net,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    pair: Pair,
    decay: float,
    autocast: torch.autocast,
    parts: int = 1,
) -> Step:
    """One step: loss, gradient, update, and the target after it.

    Args:
        model: what is called: `net`, or its DDP wrapper.
        net: Pgl, Byol or Genesis.
        optimizer, schedule: of `net`.
        pair: this worker's batch.
        decay: of the target.
        autocast: of the forward pass.
        parts: that the batch goes through in, one after the other, at most one for each pair; BatchNorm and the
            figures see a part at a time.
    """
    optimizer.zero_grad(set_to_none=True)
    pair, output = forward_and_back(model, net, pair, parts, autocast)
    grad_norm = health.norm(p.grad for p in net.parameters() if p.grad is not None)
    lr = float(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
    net.follow(decay)
    return Step(pair, output, grad_norm, lr)


def forward_and_back(
    model: nn.Module, net: nn.Module, pair: Pair, parts: int, autocast: torch.autocast
) -> tuple[Pair, Output]:
    """Adds the gradient of a worker's batch to its parameters; the last part and its output, with the batch's loss.

    A model that is a DDP wrapper adds up over the workers at the last part, while that is still under way.
    """
    num, loss = len(pair.view_1), torch.zeros((), device=pair.view_1.device)
    parts = min(parts, num)
    columns = [[None] * parts if value is None else value.tensor_split(parts) for value in pair]
    for number, part in enumerate(map(Pair._make, zip(*columns)), 1):
        with _no_sync(model, net, number, parts):
            with autocast:
                output = model(part)
            (output.loss * (len(part.view_1) / num)).backward()
        loss += output.loss.detach() * (len(part.view_1) / num)
    return part, output._replace(loss=loss)


def train_mode(model: Segmenter | LightSegmenter, freeze: bool) -> None:
    """Training mode, but for a frozen encoder: its BatchNorm neither uses nor collects statistics of the batch."""
    model.train()
    if freeze:
        model.encoder.eval()


def backward(
    model: torch.nn.Module,
    net: Segmenter | LightSegmenter,
    batch: dict[str, torch.Tensor],
    task: Literal["multiclass", "binary"],
    parts: int,
    autocast: torch.autocast,
    ce_weight: float | None = None,
) -> torch.Tensor:
    """Adds the gradient of a worker's batch to its parameters; the loss, without gradient.

    In parts, the gradient is still that of the whole batch's loss. It is no mean over parts, for Dice's sums run over
    the batch: a first pass without gradient gives all logits, the loss is differentiated there, and a second pass
    carries each part's share on through the network.

    Args:
        model: what is called: `net`, or its DDP wrapper, which adds up over the workers at the last part.
        net: the network.
        batch: of a PatchRenderer.
        task: of the loss.
        parts: that the batch goes through in, at most one for each patch.
        autocast: of the forward passes.
        ce_weight: of the loss.
    """
    target, labelled = batch["target"].long(), batch["labelled"].bool()
    parts = min(parts, len(target))
    if parts == 1:
        with autocast:
            loss = segmentation_loss(model(batch["patch"].float()), target, task, labelled, ce_weight)
        loss.backward()
        return loss.detach()
    patches = batch["patch"].tensor_split(parts)
    norms = [part for part in net.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics take each part in once, in the second pass
    with torch.no_grad(), autocast:
        logits = torch.cat([net(patch.float()).float() for patch in patches])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    logits.requires_grad_()
    loss = segmentation_loss(logits, target, task, labelled, ce_weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    for number, (patch, share) in enumerate(zip(patches, gradient.tensor_split(parts), strict=True), 1):
        with _no_sync(model, net, number, parts):
            with autocast:
                output = model(patch.float())
            output.backward(share.to(output.dtype))
    return loss.detach()


def _no_sync(model: nn.Module, net: nn.Module, number: int, parts: int) -> AbstractContextManager:
    """Where a DDP wrapper adds nothing up over the workers: at every part but the last."""
    return cast(Any, model).no_sync() if model is not net and number < parts else nullcontext()
