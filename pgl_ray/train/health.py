"""Figures that tell whether features mean something: spread, rank, and agreement where the priors say so."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_health(query: Tensor, key: Tensor) -> dict[str, float]:
    """Health of aligned features of one batch.

    Args:
        query: [N, C, ...] predictor output of view 1.
        key: [N, C, ...] target features of view 2 at the same places.

    Returns:
        health/feature_std: mean per-channel standard deviation of the l2-normalised keys over all voxels of the batch,
            times sqrt(C): 1 for directions spread evenly, 0 when all features are one vector (collapse).
        health/effective_rank: exponential of the entropy of the keys' covariance spectrum (Roy and Vetterli 2007); 1
            when collapsed.
        health/cosine_aligned: mean cosine of query and key of one place.
        health/cosine_shuffled: the same with another scan's key, or with another voxel's in a batch of one pair.
    """
    q, k = (F.normalize(t.float().flatten(2), dim=1) for t in (query, key))  # [N, C, voxels]
    rows = k.transpose(1, 2).flatten(0, 1)
    std = rows.std(0).mean() * rows.shape[1] ** 0.5
    spectrum = torch.linalg.svdvals(rows - rows.mean(0)).double() ** 2
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    other = k.roll(1, 0) if len(k) > 1 else k.roll(1, 2)
    return {
        "health/feature_std": std.item(),
        "health/effective_rank": entropy.exp().item(),
        "health/cosine_aligned": (q * k).sum(1).mean().item(),
        "health/cosine_shuffled": (q * other).sum(1).mean().item(),
    }
