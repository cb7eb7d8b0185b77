"""The terms that were screened beside PGL by place's contrast, against nested loops."""

import math

import numpy as np
import promise_variants as variants
import pytest
import torch
from torch import nn


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(3, 6, 5), torch.randn(3, 6, 5)  # pairs, channels, bins


def units(part) -> np.ndarray:
    """[pairs, bins, channels] of length 1."""
    part = part.numpy().transpose(0, 2, 1)
    return part / np.linalg.norm(part, axis=2, keepdims=True)


def test_koleo_is_the_log_of_the_nearest_distance(vectors):
    logs = []
    for pair in units(vectors[0]):
        for k, one in enumerate(pair):
            logs.append(math.log(min(np.linalg.norm(one - other) for j, other in enumerate(pair) if j != k)))
    assert variants.koleo(*vectors).item() == pytest.approx(-0.1 * np.mean(logs), rel=1e-4)


def test_variance_is_of_all_drawn_bins(vectors):
    rows = units(vectors[0]).reshape(-1, 6) * math.sqrt(6)
    spread = np.mean([max(0, 1 - math.sqrt(np.var(rows[:, c], ddof=1) + 1e-4)) for c in range(6)])
    off = sum(np.cov(rows[:, a], rows[:, b])[0, 1] ** 2 for a in range(6) for b in range(6) if a != b) / 6
    assert variants.variance(*vectors).item() == pytest.approx(spread + 0.04 * off, rel=1e-4)


def test_pairs_are_told_apart_by_their_means(vectors):
    mine, theirs = (part.mean(2).numpy() for part in vectors)
    losses = []
    for k, one in enumerate(mine):
        cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in theirs]
        losses.append(-cosines[k] / 0.1 + math.log(sum(math.exp(cosine / 0.1) for cosine in cosines)))
    assert variants.between_pairs(*vectors).item() == pytest.approx(0.25 * np.mean(losses), rel=1e-4)


def test_masks_hide_whole_blocks_in_training_alone():
    net = nn.Sequential(nn.Identity())
    variants.with_masks(net)
    views = torch.ones(20, 1, 8, 16, 16)
    blocks = net(views).unfold(2, 2, 2).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    assert (blocks.amin(5) == blocks.amax(5)).all() and 0.15 < (blocks.amax(5) == 0).float().mean() < 0.35
    assert torch.equal(net.eval()(views), views)


def test_no_batch_norm_is_left():
    net = nn.Sequential(nn.BatchNorm3d(3), nn.Sequential(nn.Conv3d(3, 64, 1), nn.BatchNorm3d(64)))
    variants.with_group_norm(net)
    norms = [part for part in net.modules() if isinstance(part, (nn.BatchNorm3d, nn.GroupNorm))]
    assert [(type(norm), norm.num_groups) for norm in norms] == [(nn.GroupNorm, 1), (nn.GroupNorm, 8)]
