"""The losses of both phases: local consistency (Eq. 8) and Dice + cross-entropy (Eq. 11 and 12)."""

from typing import Literal

import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor
from torch.nn import functional as F


def local_consistency_loss(query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared distance of the l2-normalised features, averaged over batch and voxels (Eq. 8).

    Computed in float32 or above whatever autocast is on. No gradient reaches the key: the target path only gives the
    answer.

    Args:
        query: [N, C, ...] predictions of the online path.
        key: [N, C, ...] aligned features of the target path.
        valid: bool [N, ...] of the voxels that count; none = all. A sample weighs the same however many it has; one
            without any is left out, and a batch without any gives 0.

    Returns:
        Scalar in [0, 4]; 0 = same direction, 2 = orthogonal, 4 = opposite.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = F.normalize(query.to(dtype), dim=1), F.normalize(key.detach().to(dtype), dim=1)
    distance = (query - key).square().sum(1).flatten(1)
    if valid is None:
        return distance.mean()
    valid = valid.flatten(1).to(dtype)
    counts = valid.sum(1)
    return ((distance * valid).sum(1) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def place_contrast_loss(query: Tensor, key: Tensor, temperature: float, negatives: Literal["pair", "batch"]) -> Tensor:
    """InfoNCE over places: each query is to name its own place's key among others (van den Oord et al. 2018).

    Computed in float32 or above whatever autocast is on; no gradient reaches the key.

    Args:
        query: [N, C, places] predictions of the online path.
        key: [N, C, places] of the target path, at the same places.
        temperature: that cosines are divided by.
        negatives: pair: the other places of the same pair, which cannot be told apart by the look of their scan;
            batch: those of all pairs given, so of a worker's batch, or of a part of it.

    Returns:
        Scalar; the logarithm of the number of places, or of places times N, where nothing is told apart.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = F.normalize(query.to(dtype), dim=1), F.normalize(key.detach().to(dtype), dim=1)
    with torch.autocast(query.device.type, enabled=False):
        if negatives == "batch":
            query, key = (part.transpose(1, 2).flatten(0, 1).T[None] for part in (query, key))
        similar = query.transpose(1, 2) @ key / temperature
    positives = torch.arange(similar.shape[2], device=query.device).repeat(len(similar))
    return F.cross_entropy(similar.flatten(0, 1), positives)


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    task: Literal["multiclass", "binary"],
    labelled: Tensor | None = None,
    ce_weight: float | None = None,
) -> Tensor:
    """Dice + cross-entropy, the Dice sums taken over the batch (Eq. 11 and 12), for partly labelled scans too.

    multiclass: Eq. 12. Where an organ is unlabelled in a sample, its probability is counted as background's: a voxel
    that is labelled background may well be that organ (marginal loss: Shi et al. 2021, Medical Image Analysis 70,
    101979, "Marginal loss and exclusion loss for partially supervised multi-organ segmentation").
    binary: Eq. 11 for each label value, averaged; channel c-1 answers "class index >= c", for an organ includes its
    tumour. A sample takes no part in a channel that is unlabelled in it.

    Args:
        logits: [N, C, D, H, W]; multiclass: background and organs; binary: one channel per organ.
        target: integer [N, 1, D, H, W], class index, 0 = background.
        task: "multiclass" or "binary".
        labelled: bool [N, number of organs + 1], which classes are annotated in each sample; background's column is
            taken as true. None = all.
        ce_weight: of the cross-entropy relative to the Dice; none = the equations', 1 / C (multiclass) or 1 (binary).

    Returns:
        Scalar. A class without a voxel in the batch counts a Dice loss of 1, as in the equations, without gradient.
    """
    logits = logits.float()
    if task == "binary":
        return _binary_loss(logits, target, labelled, 1.0 if ce_weight is None else ce_weight)
    # what is labelled throughout need not be merged, a fifth of a light decoder's step; a GPU is not asked for that
    if labelled is not None and not (labelled.is_cpu and labelled.all()):
        logits, target = _merge_unlabelled(logits, target, labelled)
    weight = 1 / logits.shape[1] if ce_weight is None else ce_weight
    loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=0, lambda_ce=weight)
    return loss(logits, target)


def _merge_unlabelled(logits: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Counts unlabelled organs as background, sample by sample, in probability and in target."""
    hidden = ~labelled.bool()
    hidden[:, 0] = False
    target = target.masked_fill(hidden.gather(1, target.flatten(1).long()).view_as(target), 0)
    hidden = hidden.view(*hidden.shape, 1, 1, 1)
    lowest = -1e4  # softmax makes it exactly 0, and unlike -inf it survives a product with 0
    background = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(~hidden[:, 1:], lowest)], 1).logsumexp(1)
    return torch.cat([background.unsqueeze(1), logits[:, 1:].masked_fill(hidden[:, 1:], lowest)], 1), target


def _binary_loss(logits: Tensor, target: Tensor, labelled: Tensor | None, ce_weight: float) -> Tensor:
    """Samples are weighed, not picked: how many are labelled is not known before the device is asked."""
    channels = torch.arange(logits.shape[1], device=target.device).view(-1, 1, 1, 1)
    weight = torch.ones_like(logits[:, :, 0, 0, 0]) if labelled is None else labelled[:, 1:].to(logits.dtype)
    mask, answer = weight[..., None, None, None], (target > channels).to(logits.dtype)
    lowest = -1e4  # sigmoid makes it exactly 0
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=0, reduction="none")
    dice = dice(logits.masked_fill(mask == 0, lowest), answer * mask).flatten()
    entropy = F.binary_cross_entropy_with_logits(logits, answer, reduction="none").flatten(2).mean(2)
    num = weight.sum(0)  # samples per channel
    parts = (dice + ce_weight * (entropy * weight).sum(0) / num.clamp_min(1)) * (num > 0)
    return parts.sum() / (num > 0).sum().clamp_min(1)  # 0 with a gradient where nothing is labelled: DDP waits for one
