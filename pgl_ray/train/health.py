"""The health panel: figures that tell whether features mean something, and what they say in plain words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl_ray.model.pgl import Output, Pair, align
from pgl_ray.prior import Geometry, clamped_bins, interpolation_matrices

COLLAPSED_STD, COLLAPSED_RANK = 0.1, 2.0  # below either, features of different places are nearly one vector
MIN_ROWS = 8  # fewer vectors have neither spread nor rank
FEW = 8  # health rows whose mean retrieval means something
MAX_ROWS = 1024  # that rank and retrieval look at, evenly spaced in the batch


@torch.no_grad()
def panel(model: nn.Module, output: Output, pair: Pair, geometry: Geometry) -> dict[str, float]:
    """All figures of one worker's batch.

    Args:
        model: Pgl, Byol or Genesis, for its weight norms.
        output: of the batch.
        pair: the batch.
        geometry: of the map that is compared.

    Returns:
        health/...: of what the loss compares, where it compares features (`feature_health`).
        health/encoder_...: the same of the online encoder's map, aligned by the priors whatever the method.
        health/collapsed: 1 or 0, judged on the former, and for Models Genesis on the latter; averaged over workers,
            the share of them that say so.
        align/clamped_share: bins beyond the outermost feature centres, the mean of views and axes.
        weight/encoder_norm, weight/heads_norm: l2 norms of all parameters of the online encoder, and of all other
            trained ones.
    """
    matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)
    maps = align(output.maps, matrices)
    maps_1, maps_2 = (maps - maps.mean((0, 2, 3, 4), keepdim=True)).chunk(2)  # after a ReLU all cosines are high
    encoder = feature_health(maps_1, maps_2)
    compared = feature_health(output.query, output.key) if output.query is not None else {}
    clamped = clamped_bins(pair.boxes, pair.flips, pair.regions, geometry)
    row = {f"health/{name}": value for name, value in compared.items()}
    row |= {f"health/encoder_{name}": value for name, value in encoder.items()}
    row["health/collapsed"] = float(has_collapsed(compared or encoder))
    row["align/clamped_share"] = torch.stack([axis.float().mean() for axis in clamped]).mean().item()
    norms = {"encoder": [], "heads": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            norms["encoder" if name.startswith("online.encoder.") else "heads"].append(weight)
    return row | {f"weight/{part}_norm": norm(weights).item() for part, weights in norms.items()}


def norm(tensors) -> Tensor:
    """l2 norm of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


@torch.no_grad()
def feature_health(query: Tensor, key: Tensor) -> dict[str, float]:
    """Health of aligned features of one batch.

    Args:
        query: [N, C, ...] features of view 1.
        key: [N, C, ...] features of view 2 at the same places.

    Returns:
        feature_std: mean per-channel standard deviation of the l2-normalised keys over all voxels of the batch, times
            sqrt(C): 1 for directions spread evenly, 0 when all features are one vector (collapse).
        effective_rank: exponential of the entropy of the keys' covariance spectrum (Roy and Vetterli 2007); 1 when
            collapsed. Of at most MAX_ROWS keys, evenly spaced.
        cosine_aligned: mean cosine of query and key of one place.
        cosine_shuffled: the same with another scan's key, or with another voxel's in a batch of one pair.
        retrieval: share of queries whose most similar key among all voxels of the batch is their own (retrieval@1;
            strictly most similar). Of at most MAX_ROWS queries, evenly spaced.
        retrieval_chance: the retrieval of features that know their scan and not the place in it: the share of queries
            whose most similar key is of their own pair, over the voxels of a pair; at least 1 / voxels of the batch.
        Nothing at all for fewer than MIN_ROWS voxels.
    """
    q, k = (F.normalize(t.float().flatten(2), dim=1) for t in (query, key))  # [N, C, places]
    queries, keys = (t.transpose(1, 2).flatten(0, 1) for t in (q, k))
    if len(keys) < MIN_ROWS:
        return {}
    spread = keys[:: -(-len(keys) // MAX_ROWS)].double()
    spread = spread - spread.mean(0)
    gram = spread @ spread.T if len(spread) < spread.shape[1] else spread.T @ spread
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    other = k.roll(1, 0) if len(k) > 1 else k.roll(1, 2)
    asked = torch.arange(0, len(keys), -(-len(keys) // MAX_ROWS), device=keys.device)
    similar, num_places = queries[asked] @ keys.T, k[0, 0].numel()
    own_pair = (similar.argmax(1) // num_places == asked // num_places).float().mean().item()
    # strictly above all others: among equal keys there is nothing to find
    own = similar[torch.arange(len(asked), device=keys.device), asked].clone()
    similar[torch.arange(len(asked), device=keys.device), asked] = -2.0
    return {
        "feature_std": (keys.std(0).mean() * keys.shape[1] ** 0.5).item(),
        "effective_rank": entropy.exp().item(),
        "cosine_aligned": (q * k).sum(1).mean().item(),
        "cosine_shuffled": (q * other).sum(1).mean().item(),
        "retrieval": (own > similar.amax(1)).float().mean().item(),
        "retrieval_chance": max(own_pair / num_places, 1 / len(keys)),
    }


def has_collapsed(figures: dict[str, float]) -> bool:
    """Whether features of different places are nearly one vector; never of a batch too small to say."""
    if not figures:
        return False
    return figures["feature_std"] < COLLAPSED_STD or figures["effective_rank"] < COLLAPSED_RANK


def verdict(row: dict[str, float]) -> str:
    """What a row of metrics with health figures says, as half a sentence."""
    prefix = "health/" if "health/feature_std" in row else "health/encoder_"
    std, rank = row.get(f"{prefix}feature_std"), row.get(f"{prefix}effective_rank")
    if std is None:
        return "too few features in a batch to judge their health"
    figures = f"feature_std {std:.2f}, effective rank {rank:.1f} at step {row['step']:.0f}"
    if std < COLLAPSED_STD:
        return f"features collapsed: feature_std is below {COLLAPSED_STD} ({figures})"
    if rank < COLLAPSED_RANK:
        return f"features collapsed: the effective rank is below {COLLAPSED_RANK:.0f} ({figures})"
    aligned, shuffled = row[f"{prefix}cosine_aligned"], row[f"{prefix}cosine_shuffled"]
    told = "do not yet agree more" if aligned <= shuffled else "agree more"
    return (
        f"not collapsed ({figures}); aligned places {told} than shuffled ones "
        f"(cosine {aligned:.2f} against {shuffled:.2f})"
    )


def newest_verdict(rows: list[dict[str, float]]) -> str:
    """The verdict of the last row that has health figures, and whether the last FEW of them show that places are found.

    One batch's retrieval is noise (a few hits, and all of air looks alike); a mean of several is not.
    """
    judged = [row for row in rows if "health/collapsed" in row]
    if not judged:
        return "no health figures yet"
    text, last = verdict(judged[-1]), judged[-FEW:]
    if all("health/encoder_retrieval_chance" in row for row in last):
        found = sum(row["health/encoder_retrieval"] for row in last) / len(last)
        chance = sum(row["health/encoder_retrieval_chance"] for row in last) / len(last)
        text += f"; places are found again in the other view {found / chance:.1f} times as often as by the scan alone"
        if len(last) == FEW and found < 2 * chance:
            text += " (wrong priors look like this, or a training that has hardly begun)"
    return text
