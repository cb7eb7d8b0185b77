"""The health panel: figures that tell whether features mean something, and what they say in plain words."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl_ray.model.genesis import Genesis
from pgl_ray.model.pgl import Output, Pair, align, valid_bins
from pgl_ray.prior import Geometry, clamped_bins, interpolation_matrices

# Fewer `directions` are a collapse: all features along one line make 1, and n features, half of them either way,
# n / (n - 1). It lies about midway between the recorded trainings (tests/golden/health_controls.json, drawn by
# tests/benchmarks/health_controls.py): the collapsed ones had at most 0.87 in two rows in a row, the sound ones at
# least 1.15.
COLLAPSED = 1.02
BLANK, MANY_BLANK = "data/blank_share", 0.75  # of the views show nothing
FLAT = 1e-3  # the range of a blank view's voxels, z-scored
MIN_ROWS = 8  # fewer vectors have neither spread nor rank
MAX_ROWS = 1024  # that rank and retrieval look at, spread over the batch
FEW, MANY = 4, 8  # health rows whose mean retrieval means something, and that are averaged at most
MAX_ELEMENTS = 2**26  # of one block of the similarity matrix
RISEN = 1.05  # a loss that ends above this multiple of what it was at first has risen


@torch.no_grad()
def panel(model: nn.Module, output: Output, pair: Pair, geometry: Geometry) -> dict[str, float]:
    """All figures of one worker's batch.

    Args:
        model: Pgl, PlacesPgl, Byol or Genesis.
        output: of the batch.
        pair: the batch.
        geometry: of the map that is compared.

    Returns:
        health/...: of the places that PGL's loss compares (`feature_health`).
        health/view_...: of the whole views that BYOL's loss compares.
        health/encoder_...: of the online encoder's map of the plain views, aligned by the priors, for every method.
        align/clamped_share: bins beyond the outermost feature centres, the mean of views and axes.
        align/valid_pairs_share: pairs with a bin that is clamped in neither view.
        data/blank_share: of the views, whose voxels all have one value.
        weight/encoder_norm, weight/heads_norm: l2 norms of all parameters of the online encoder, and of all other
            trained ones.
    """
    matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)
    plain = model.plain_maps(pair.views) if isinstance(model, Genesis) else output.maps
    if plain is None:
        raise ValueError(f"a forward pass of {type(model).__name__} gave no maps")
    maps = align(plain, matrices)
    maps_1, maps_2 = (maps - maps.mean((0, 2, 3, 4), keepdim=True)).chunk(2)  # after a ReLU all cosines are high
    row = {f"health/encoder_{name}": value for name, value in feature_health(maps_1, maps_2).items()}
    if output.query is not None and output.key is not None:
        kind = "" if output.query.shape[2:].numel() > 1 else "view_"
        row |= {f"health/{kind}{name}": value for name, value in feature_health(output.query, output.key).items()}
    clamped = clamped_bins(pair.boxes, pair.flips, pair.regions, geometry)
    row["align/clamped_share"] = torch.stack([axis.float().mean() for axis in clamped]).mean().item()
    row["align/valid_pairs_share"] = valid_bins(pair, geometry).flatten(1).any(1).float().mean().item()
    voxels = pair.views.flatten(1)
    row[BLANK] = (voxels.amax(1) - voxels.amin(1) < FLAT).float().mean().item()
    norms: dict[str, list[Tensor]] = {"encoder": [], "heads": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            norms["encoder" if name.startswith("online.encoder.") else "heads"].append(weight)
    return row | {f"weight/{part}_norm": norm(weights).item() for part, weights in norms.items()}


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """l2 norm of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


@torch.no_grad()
def is_sound(module: nn.Module) -> bool:
    """Whether a module's weights and buffers are finite, and not so large that the sum of their squares is infinite."""
    return bool(norm(t for t in module.state_dict().values() if t.is_floating_point()).isfinite())


@torch.no_grad()
def feature_health(query: Tensor, key: Tensor) -> dict[str, float]:
    """Health of aligned features of one batch.

    Args:
        query: [N, C, ...] features of view 1.
        key: [N, C, ...] features of view 2 at the same places.

    Returns:
        feature_std: mean per-channel standard deviation of the l2-normalised keys over all places of the batch, times
            sqrt(C): 1 for directions spread evenly, 0 when all features are one vector (collapse).
        effective_rank: exponential of the entropy of the keys' covariance spectrum (Roy and Vetterli 2007); 1 when
            collapsed. Of at most MAX_ROWS keys.
        cosine_aligned: mean cosine of query and key of one place.
        cosine_shuffled: the same with another scan's key, or with another place's in a batch of one pair.
        retrieval: share of queries whose most similar key among all places of the batch is their own (retrieval@1;
            strictly most similar, so bins that are clamped to one centre are never found). Of at most MAX_ROWS queries.
        retrieval_chance: the retrieval of features that know their scan and not the place in it: the share of queries
            whose most similar key is of their own pair, over the places of a pair; at least 1 / places of the batch.
        Nothing at all for fewer than MIN_ROWS places, or features that are not finite.
    """
    q, k = (F.normalize(t.float().flatten(2), dim=1) for t in (query, key))  # [N, C, places]
    queries, keys = (t.transpose(1, 2).flatten(0, 1) for t in (q, k))
    if len(keys) < MIN_ROWS or not (queries.isfinite().all() and keys.isfinite().all()):
        return {}
    # drawn, not evenly spaced: a step that shares a factor with the places of a pair would see but a few of them
    asked = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:MAX_ROWS].to(keys.device)
    spread = keys[asked].double()
    spread = spread - spread.mean(0)
    gram = spread @ spread.T if len(spread) < spread.shape[1] else spread.T @ spread
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    other = k.roll(1, 0) if len(k) > 1 else k.roll(1, 2)
    num_places = k[0, 0].numel()
    hits, own_pair = 0, 0
    for part in asked.split(max(1, MAX_ELEMENTS // len(keys))):
        similar = queries[part] @ keys.T
        own_pair += int((similar.argmax(1) // num_places == part // num_places).sum())
        rows = torch.arange(len(part), device=keys.device)
        own = similar[rows, part].clone()
        similar[rows, part] = -2.0
        hits += int((own > similar.amax(1)).sum())  # among equal keys there is nothing to find
    return {
        "feature_std": (keys.std(0).mean() * keys.shape[1] ** 0.5).item(),
        "effective_rank": entropy.exp().item(),
        "cosine_aligned": (q * k).sum(1).mean().item(),
        "cosine_shuffled": (q * other).sum(1).mean().item(),
        "retrieval": hits / len(asked),
        "retrieval_chance": max(own_pair / len(asked) / num_places, 1 / len(keys)),
    }


# -- in words ---------------------------------------------------------------------------------------------------------


def directions(row: dict[str, float]) -> float | None:
    """Over how many directions the features of a row of metrics spread, or none without health figures.

    feature_std^2 * effective_rank: the rank where features spread evenly, 1 where all lie along one line (half of them
    opposite the rest), 0 where all are one vector, whatever rank their rounding errors have. The geometric mean of what
    the loss compares (BYOL: whole views; Models Genesis: nothing) and of the encoder's map: neither is enough alone.
    The rank of compared features falls to 2 and below in sound trainings, since they encode place, and the encoder's
    map collapses long after what is compared, or not at all.
    """
    compared = "health/" if "health/feature_std" in row else "health/view_"
    spreads = [
        row[f"{prefix}feature_std"] ** 2 * row[f"{prefix}effective_rank"]
        for prefix in (compared, "health/encoder_")
        if f"{prefix}feature_std" in row
    ]
    return math.prod(spreads) ** (1 / len(spreads)) if spreads else None


def collapse(row: dict[str, float]) -> str | None:
    """Why the features of a row of metrics count as collapsed, or none; or that there is nothing in the views, of which
    a contrastive loss or a restoring network makes features all the same."""
    if is_blank(row):
        return f"nothing to learn from: {row[BLANK]:.0%} of the views have one value throughout"
    num_directions = directions(row)
    if num_directions is None or num_directions >= COLLAPSED:
        return None
    return f"features collapsed: they spread over {num_directions:.2f} directions, and {COLLAPSED} is the least"


def is_blank(row: dict[str, float]) -> bool:
    """Whether most views of a row of metrics show nothing."""
    return row.get(BLANK, 0.0) >= MANY_BLANK


def verdict(row: dict[str, float]) -> str:
    """What a row of metrics with health figures says, as half a sentence."""
    num_directions = directions(row)
    if num_directions is None:
        return collapse(row) or "too few features in a batch to judge their health"
    prefix = next(f"health/{part}" for part in ("", "encoder_", "view_") if f"health/{part}feature_std" in row)
    std, rank = (row[f"{prefix}{name}"] for name in ("feature_std", "effective_rank"))
    figures = f"feature_std {std:.2f}, effective rank {rank:.1f} at step {row['step']:.0f}"
    reason = collapse(row)
    if reason:
        return f"{reason} ({figures})"
    aligned, shuffled = row[f"{prefix}cosine_aligned"], row[f"{prefix}cosine_shuffled"]
    agreement = "do not yet agree more" if aligned <= shuffled else "agree more"
    return (
        f"not collapsed ({num_directions:.1f} directions: {figures}); aligned places {agreement} than shuffled ones "
        f"(cosine {aligned:.2f} against {shuffled:.2f})"
    )


def newest_verdict(rows: list[dict[str, float]]) -> str:
    """The verdict of the last row that has health figures, and whether the last few of them show that places are found.

    One batch's retrieval is noise (a few hits, and all of air looks alike); a mean of several is not.
    """
    judged = [row for row in rows if "health/collapsed" in row]
    if not judged:
        return "no health figures yet"
    text, last = verdict(judged[-1]), judged[-MANY:]
    if all("health/encoder_retrieval_chance" in row for row in last):
        mean = sum(row["health/encoder_retrieval"] for row in last) / len(last)
        chance = sum(row["health/encoder_retrieval_chance"] for row in last) / len(last)
        text += f"; places are found again in the other view {mean / chance:.1f} times as often as by the scan alone"
        if len(last) >= FEW and mean <= chance:
            text += " (wrong priors look like this, or a training that has hardly begun)"
    return text


def rise(rows: list[dict[str, float]], method: str, kind: str) -> str | None:
    """Why a loss rose after its first steps, or none where it did not.

    Means of FEW rows are compared, since one batch's loss is noise: the last with the lowest of the first third.

    Args:
        rows: of metrics.
        method, kind: `method` and `loss.kind` of the config; only features that agree with a moving target (PGL's
            Eq. 8, BYOL) have this reason.
    """
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    means = [sum(loss for _, loss in losses[i : i + FEW]) / FEW for i in range(len(losses) - FEW + 1)]
    agreement = method == "byol" or (method == "pgl" and kind == "consistency")
    if not agreement or len(losses) < 2 * FEW:
        return None
    lowest = min(means[: math.ceil(len(means) / 3)])
    if means[-1] <= RISEN * lowest:
        return None
    step = losses[means.index(lowest) + FEW // 2][0]
    return (
        f"the loss rose again, from {lowest:.2f} around step {step:.0f} to {means[-1]:.2f}, which by itself is no "
        "fault: at first the target is nearly a random network, whose features have one direction in common that is "
        "easy to predict, and the target moves away from there as its features spread; look at the cosine of aligned "
        "places against that of shuffled ones, and at a voxel probe (probe.every), instead"
    )
