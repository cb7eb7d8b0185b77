"""The health panel: its figures against their definitions, and that it notices collapse and wrong priors."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pgl_ray.config import PretrainConfig, load
from pgl_ray.model.pgl import Output, Pair
from pgl_ray.pretrain import Result, describe
from pgl_ray.prior import view_to_scan
from pgl_ray.train import health, stops
from pgl_ray.train.networks import build_pretraining


def spread(seed=0) -> torch.Tensor:
    return torch.randn(8, 16, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def named(found: dict) -> dict:
    return {f"health/{name}": value for name, value in found.items()}


def test_byol_is_judged_by_its_views_and_the_encoders_map():
    """Two rows of a sound BYOL: 1.5 directions of eight views are no collapse while the encoder's map keeps many."""
    healthy = {"health/encoder_feature_std": 0.9, "health/encoder_effective_rank": 9.0}
    assert health.collapse(healthy | {"health/view_feature_std": 0.8, "health/view_effective_rank": 1.5}) is None
    assert health.collapse(healthy | {"health/view_feature_std": 0.01, "health/view_effective_rank": 5.0})
    assert health.collapse({"health/encoder_feature_std": 0.9, "health/encoder_effective_rank": 1.1})


@pytest.mark.parametrize("cells", [(2, 6, 6), (4, 12, 12)])
def test_all_places_of_a_large_batch_are_looked_at(cells, monkeypatch):
    """Of 128 pairs only some rows are read: they must not be the same few places of every pair."""
    seen = []
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    features = torch.randn(128, 4, *cells, generator=torch.Generator().manual_seed(0))
    found = health.feature_health(features, features)
    rows, places = seen[0][: health.MAX_ROWS], math.prod(cells)
    assert len(set((rows % places).tolist())) > 0.8 * min(places, health.MAX_ROWS)
    assert found["retrieval"] == 1 and found["effective_rank"] > 3.5


def test_figures_equal_their_definitions():
    query, key = spread(0) + 2 * spread(1), spread(1)
    got = health.feature_health(query, key)
    q, k = (t.permute(0, 2, 3, 4, 1).reshape(-1, 16).double().numpy() for t in (query, key))
    q, k = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (q, k))
    assert got["feature_std"] == pytest.approx(k.std(0, ddof=1).mean() * 4, rel=1e-4)
    energy = np.linalg.svd(k - k.mean(0), compute_uv=False) ** 2
    share = energy / energy.sum()
    assert got["effective_rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert got["cosine_aligned"] == pytest.approx((q * k).sum(1).mean(), abs=1e-5)
    found = np.mean([(q[i] @ k.T).argmax() == i for i in range(len(q))])
    assert 0.1 < found < 1 and got["retrieval"] == pytest.approx(found)


def test_spread_is_healthy():
    found = health.feature_health(spread(), spread())
    assert found["feature_std"] > 0.9 and found["effective_rank"] > 12
    assert found["cosine_aligned"] == pytest.approx(1) and found["retrieval"] == 1
    assert abs(found["cosine_shuffled"]) < 0.1
    assert health.collapse(named(found)) is None


def defined_directions(features: torch.Tensor) -> float:
    """feature_std^2 * effective_rank by loops over vectors and channels."""
    vectors = features.permute(0, 2, 3, 4, 1).reshape(-1, features.shape[1]).double().numpy()
    vectors = [vector / math.sqrt(sum(x * x for x in vector)) for vector in vectors]
    num, size = len(vectors), len(vectors[0])
    means = [sum(vector[c] for vector in vectors) / num for c in range(size)]
    covariance = np.zeros((size, size))
    for vector in vectors:
        for i, j in itertools.product(range(size), repeat=2):
            covariance[i, j] += (vector[i] - means[i]) * (vector[j] - means[j]) / (num - 1)
    std = sum(math.sqrt(covariance[c, c]) for c in range(size)) / size * math.sqrt(size)
    share = np.linalg.eigvalsh(covariance).clip(1e-30) / np.trace(covariance)
    return std**2 * math.exp(-sum(x * math.log(x) for x in share))


def test_directions_equal_their_definition():
    compared, maps = spread(0) + 1, spread(1) * torch.arange(16).view(1, -1, 1, 1, 1)
    row = named(health.feature_health(compared, compared))
    row |= {f"health/encoder_{name}": value for name, value in health.feature_health(maps, maps).items()}
    both = [defined_directions(features) for features in (compared, maps)]
    assert both[0] < 9 and both[1] < 12 and health.directions(row) == pytest.approx(math.sqrt(math.prod(both)), 1e-3)
    alone = {key: value for key, value in row.items() if "encoder" in key}
    assert health.directions(alone) == pytest.approx(both[1], rel=1e-3) and health.directions({"step": 1}) is None


@pytest.mark.parametrize("num", [1, 2, 5])
def test_directions_are_counted(num):
    """Vectors along `num` lines, either way, are of `num` directions; all have parts in all channels."""
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(1, 1 + num)])
    vectors = torch.cat([hadamard, -hadamard]).repeat(64, 1)
    features = vectors.T.reshape(1, 16, -1, 1, 1)
    row = named(health.feature_health(features, features))
    assert health.directions(row) == pytest.approx(num, rel=0.01)
    assert (health.collapse(row) is not None) == (num == 1)


@pytest.mark.parametrize(
    "features",
    [
        F.normalize(torch.ones(8, 16, 2, 3, 4), dim=1) + 1e-4 * spread(),  # one vector everywhere
        torch.zeros(8, 16, 2, 3, 4),
        spread()[:, :1] * torch.ones(1, 16, 1, 1, 1),  # two opposite vectors
    ],
)
def test_collapse_is_noticed(features):
    found = health.feature_health(features, features)
    assert health.collapse(named(found)).startswith("features collapsed: ")
    assert health.verdict({"step": 7} | named(found)).startswith("features collapsed: ")


def test_equal_features_are_never_retrieved():
    one = torch.ones(8, 16, 2, 3, 4)
    assert health.feature_health(one, one)["retrieval"] == 0


def test_few_vectors_have_no_health():
    assert health.feature_health(spread()[:2, :, :1, :1, :1], spread()[:2, :, :1, :1, :1]) == {}
    assert health.collapse({}) is None
    for value in (math.nan, math.inf):
        broken = torch.full((8, 16, 2, 3, 4), value)
        assert health.feature_health(broken, broken) == {}
    assert "too few" in health.verdict({"step": 1, "health/collapsed": 0.0})


def knowing(pair: Pair, model) -> torch.Tensor:
    """Maps of an ideal encoder: features that are a function of the scan and the place alone."""
    rng = np.random.default_rng(0)
    waves, geometry = rng.normal(size=(24, 3)) / 8, model.geometry
    maps = np.empty((2 * len(pair.view_1), 24, 2, 3, 2))
    for i, (box, flip) in enumerate(zip(pair.boxes.numpy(), pair.flips.numpy(), strict=True)):
        for place in itertools.product(range(2), range(3), range(2)):
            seen = np.array(geometry.output_stride) * place + 0.5
            at = view_to_scan(seen, box, flip, np.array(geometry.view_size))
            maps[(i, slice(None), *place)] = np.cos(waves @ at + np.arange(24) * (1 + i % len(pair.view_1)))
    return torch.from_numpy(maps).float()


def test_a_pass_without_maps_has_no_panel():
    model, geometry = build_pretraining(load(PretrainConfig, ["index=a", "run=b", "encoder.width=8", "method=byol"]))
    pair = Pair(*torch.zeros(2, 1, 1, 16, 96, 96), *torch.tensor([[[[0, 9]] * 3]] * 2), *torch.zeros(2, 1, 3).bool())
    with pytest.raises(ValueError, match="pass of Byol gave no maps"):
        health.panel(model, Output(torch.tensor(0.0)), pair, geometry)


def test_wrong_priors_show_in_the_panel():
    args = ["index=a", "run=b", "encoder.width=8", "encoder.depths=[1,1,1,1]", "views.size=[16,48,32]"]
    model, geometry = build_pretraining(load(PretrainConfig, [*args, "heads.hidden=8", "heads.out=8"]))
    rng = torch.Generator().manual_seed(0)
    start = torch.randint(0, 18, (2, 6, 3), generator=rng)
    boxes = torch.stack([start, start + torch.tensor([20, 60, 40])], -1)
    flips = torch.rand(2, 6, 3, generator=rng) < 0.5
    views = torch.zeros(2, 6, 1, 2, 2, 2)
    views[0, :, 0, 1, 1, 1] = 0.5  # the second view of each pair shows nothing
    views[1, :2, 0, 0, 1, 0] = -0.5  # but of two of them
    pair = Pair(*views, *boxes, *flips)
    output = Output(torch.tensor(0.0), knowing(pair, model))
    right, wrong = (health.panel(model, output, p, geometry) for p in (pair, pair.with_wrong_priors()))
    assert right["health/encoder_cosine_aligned"] > wrong["health/encoder_cosine_aligned"] + 0.15
    assert all(1 / 72 <= row["health/encoder_retrieval_chance"] <= 1 / 12 for row in (right, wrong))
    judged = [row | {"health/collapsed": 0.0} for row in (right, wrong)]
    said = [health.newest_verdict([{"step": i} | row for i in range(4)]) for row in judged]
    assert "wrong priors look like this" in said[1] and "wrong priors" not in said[0]
    assert right["health/encoder_retrieval"] > 2 * wrong["health/encoder_retrieval"]
    norms = [p.norm().item() ** 2 for p in model.online["encoder"].parameters()]
    assert right["weight/encoder_norm"] == pytest.approx(math.sqrt(sum(norms)), rel=1e-4)
    assert 0 < right["align/clamped_share"] < 1 and 0 < right["align/valid_pairs_share"] <= 1
    assert right["data/blank_share"] == pytest.approx(4 / 12) and health.collapse(right) is None
    blank = right | {"data/blank_share": 0.75}
    said = "nothing to learn from: 75% of the views have one value throughout"
    assert health.collapse(blank) == health.verdict({"step": 1, "data/blank_share": 0.75}) == said
    assert health.verdict({"step": 1} | blank).startswith(said)
    why = stops.collapsed(blank, 7, "lower the rate")
    assert "pgl_ray.inspect" in why and "lower the rate" not in why


# -- recorded trainings -----------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "health_controls.json").read_text())
CONTROLS = GOLDEN["controls"]


def recorded(name: str) -> list[dict[str, float]]:
    """The metrics rows of one recorded training."""
    rows = [dict(zip(GOLDEN["columns"], values, strict=True)) for values in CONTROLS[name]["rows"]]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("name", CONTROLS)
def test_recorded_trainings_are_judged_right(name):
    """The rule of the worker: two rows in a row end a run. What collapses is to be ended within 100 steps."""
    alarms = [(row["step"], health.collapse(row) is not None) for row in recorded(name)]
    ended = [step for (_, before), (step, now) in itertools.pairwise(alarms) if before and now]
    assert bool(ended) == CONTROLS[name]["collapsed"], ended
    assert not ended or ended[0] <= 100


def test_no_recorded_figure_alone_tells_collapse():
    """What makes the recordings a test: sound trainings with narrow compared features, collapsed ones with spread ones,
    and collapsed ones whose encoder still has its directions."""
    rows = {
        kind: [row for name in CONTROLS if CONTROLS[name]["collapsed"] == kind for row in recorded(name)[4:]]
        for kind in (True, False)
    }
    figures = (
        "health/feature_std",
        "health/effective_rank",
        "health/encoder_feature_std",
        "health/encoder_effective_rank",
    )
    for figure in figures:
        assert min(row[figure] for row in rows[False] if figure in row) < max(
            row[figure] for row in rows[True] if figure in row
        )
    ranks = [row["health/effective_rank"] for row in rows[False] if "health/effective_rank" in row]
    assert min(ranks) < 1.9  # what once ended a sound training


# -- a loss that rises ------------------------------------------------------------------------------------------------


def losses(values) -> list[dict[str, float]]:
    return [{"step": 5 * i or 1, "train/loss": float(value)} for i, value in enumerate(values)]


RISING = [4.0, 1.5, 1.2, 1.1, 1.15, 1.15, 1.3, 1.5, 1.6, 1.7, 1.75, 1.8, 1.85, 1.9, 1.9, 1.9]


def test_a_loss_that_rises_above_its_first_rows_is_explained():
    said = health.rise(losses(RISING), "pgl", "consistency")
    assert said.startswith("the loss rose again, from 1.15 around step 20 to 1.89, which by itself is no fault")
    assert health.rise(losses(RISING), "byol", "consistency") == said
    for method, kind in (("pgl", "contrast"), ("genesis", "consistency")):  # neither agrees with a moving target
        assert health.rise(losses(RISING), method, kind) is None
    assert (
        health.rise(losses(RISING[:7]), "pgl", "consistency") is None and health.rise([], "pgl", "consistency") is None
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_loss_that_falls_has_not_risen(seed):
    noise = np.random.default_rng(seed).uniform(0.7, 1.3, 40)
    assert health.rise(losses(np.geomspace(3, 0.3, 40) * noise), "pgl", "consistency") is None


def test_the_closing_lines_say_why_a_loss_rose():
    result = Result("runs/a", 75, 1.9, "not collapsed", False, None, health.rise(losses(RISING), "pgl", "consistency"))
    first, why, last = describe(result).splitlines()
    assert first == "  health: not collapsed"
    assert why.startswith("  note: the loss rose again, from 1.15 around step 20 to 1.89, which by itself is no fault")
    assert "cosine of aligned places" in why and "probe.every" in why
    assert last == "pretrain: done after 75 steps, loss 1.9000; run in runs/a"
    falls = health.rise(losses(np.geomspace(4, 0.5, 16)), "pgl", "consistency")
    assert "note" not in describe(Result("runs/a", 75, 0.5, "not collapsed", False, None, falls))


def test_the_bound_lies_midway_between_the_recordings():
    """As a ratio: as far above the widest collapse that lasts two rows as below the narrowest sound pair of rows."""
    widest = {}
    for name in CONTROLS:
        spreads = [found for row in recorded(name) if (found := health.directions(row)) is not None]
        widest[name] = min(max(pair) for pair in itertools.pairwise(spreads))
    collapsed = max(spread for name, spread in widest.items() if CONTROLS[name]["collapsed"])
    sound = min(spread for name, spread in widest.items() if not CONTROLS[name]["collapsed"])
    assert collapsed < health.COLLAPSED < sound
    assert pytest.approx(1.02 * math.sqrt(collapsed * sound), rel=0.02) == health.COLLAPSED


# -- weights ----------------------------------------------------------------------------------------------------------


def test_what_an_update_blew_up_is_not_sound():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert health.is_sound(module)
    for tensor in (module[0].weight.data, module[1].running_var):
        for value in (math.nan, math.inf, 1e30):  # whose square is infinite
            kept = tensor.clone()
            tensor.view(-1)[1] = value
            assert not health.is_sound(module)
            tensor.copy_(kept)
    assert health.is_sound(module)


def test_directions_against_numpy():
    row = {"health/feature_std": 0.5, "health/effective_rank": 8.0, "health/encoder_feature_std": 0.9}
    row |= {"health/encoder_effective_rank": 10.0}
    assert health.directions(row) == pytest.approx(np.sqrt(0.25 * 8 * 0.81 * 10))
    assert health.directions({}) is None and health.collapse({}) is None
    assert health.directions({key: row[key] for key in list(row)[2:]}) == pytest.approx(8.1)
