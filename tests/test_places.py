"""PGL beyond the paper: drawn bins, the contrastive loss and displacements, against nested loops."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_loop
from test_views import mix
from torch import nn

from pgl_ray.config import PretrainConfig, load
from pgl_ray.model.losses import place_contrast_loss
from pgl_ray.model.pgl import Pair, align, feature_geometry, valid_bins
from pgl_ray.model.places import Objective, PlacesPgl, bin_coordinates, drawn_bins, read_at
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import interpolation_matrices, view_to_scan
from pgl_ray.train.networks import build_pretraining

SIZE = (16, 32, 64)
TINY = {"depths": (1, 1, 1, 1), "width": 4}
PLACES = {"align": {"more_strides": [[2, 4, 4]], "output_stride": [4, 8, 8]}}


def pairs(num: int, seed: int = 0, flips: bool = True) -> Pair:
    """Pairs whose boxes overlap, with random views."""
    rng = np.random.default_rng(seed)
    length = np.stack([np.ceil(np.array(SIZE) * rng.uniform(1.1, 1.4, 3)) for _ in range(2 * num)]).astype(int)
    start = rng.integers(0, np.array(SIZE) // 2, (2 * num, 3))
    boxes = torch.from_numpy(np.stack([start, start + length], -1))
    flip = torch.from_numpy(rng.random((2 * num, 3)) < (0.5 if flips else 0))
    views = torch.from_numpy(rng.normal(size=(2 * num, 1, *SIZE))).float()
    return Pair(*views.chunk(2), *boxes.chunk(2), *flip.chunk(2))


def network(**changes) -> PlacesPgl:
    torch.manual_seed(0)
    encoder = Encoder(**TINY)
    maps = [feature_geometry(encoder, SIZE, stride) for stride in ((2, 4, 4), (4, 8, 8))]
    return PlacesPgl(encoder, 16, 8, maps, Objective(**({"num_bins": 20, "displacement": 1.0} | changes)))


def centers(prior: tuple, geometry) -> np.ndarray:
    """Scan coordinates of a view's cells, in loops, [d, h, w, 3]."""
    box, flip = (part.numpy() for part in prior)
    cells = [size // stride for size, stride in zip(SIZE, geometry.output_stride)]
    points = np.empty((*cells, 3))
    for index in itertools.product(*map(range, cells)):
        for axis in range(3):
            at = index[axis] * geometry.output_stride[axis] + geometry.center[axis]
            at = SIZE[axis] - at if flip[axis] else at
            length = box[axis, 1] - box[axis, 0]
            points[index][axis] = box[axis, 0] + at * length / SIZE[axis]
    return points


def ramps(pair: Pair, geometry) -> torch.Tensor:
    """Each cell's features are its own place in the scan, [2N, 3, d, h, w]."""
    points = [centers(prior, geometry) for prior in zip(pair.boxes, pair.flips)]
    return torch.from_numpy(np.stack(points)).movedim(-1, 1)


@pytest.mark.parametrize("level", [0, 1])
def test_both_views_are_read_at_the_same_places(level):
    """Coordinate ramps of flipped, scaled crops: a drawn bin that is not clamped is one place in both views."""
    pair = pairs(8)
    geometry = network().maps[level][1]
    bins, valid = drawn_bins(pair, geometry, 12), valid_bins(pair, geometry).flatten(1)
    first, second = read_at(ramps(pair, geometry), bin_coordinates(pair, geometry, bins))[..., 0, 0].chunk(2)
    good = valid.gather(1, bins)
    assert good.sum() > 20
    gap = (first - second).abs().amax(1)[good]
    assert gap.max() < 1e-3  # the matrices are float32


def test_drawn_bins_are_read_as_the_aligner_reads_them():
    """Against the paper's aligner, which reads every bin of the overlap, gradient included."""
    pair, geometry = pairs(4), network().maps[0][1]
    features = torch.randn(8, 3, 8, 8, 16, dtype=torch.float64, requires_grad=True)
    bins = drawn_bins(pair, geometry, 50)
    matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)
    whole = align(features, matrices).flatten(2).gather(2, bins.repeat(2, 1)[:, None].expand(-1, 3, -1))
    values = read_at(features, bin_coordinates(pair, geometry, bins))[..., 0, 0]
    torch.testing.assert_close(values, whole, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(whole)
    ours, theirs = (torch.autograd.grad((one * weight).sum(), features)[0] for one in (values, whole))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bins_depend_only_on_priors_and_clamped_come_last():
    pair, geometry = pairs(6), network().maps[1][1]
    bins = drawn_bins(pair, geometry, 20)
    assert all(len(set(row)) == 20 for row in bins.tolist())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = Pair(*(part[order] if part is not None else None for part in pair))
    assert torch.equal(drawn_bins(shuffled, geometry, 20), bins[order])
    assert len({tuple(row) for row in bins.tolist()}) == 6
    valid = valid_bins(pair, geometry).flatten(1)
    for row, ok in zip(bins, valid):
        assert ok[row].sum() == min(20, int(ok.sum()))
    everything = drawn_bins(pair, geometry, 10**6)
    assert sorted(everything[0].tolist()) == list(range(valid.shape[1]))


def test_draws_are_by_splitmix64():
    """Oracle: a hash of the boxes' numbers and a sort by random bits, in Python's own integers."""
    pair, geometry, mask, step = pairs(3, seed=1), network().maps[1][1], 2**64 - 1, 0x9E3779B97F4A7C15
    valid, bins = valid_bins(pair, geometry).flatten(1), drawn_bins(pair, geometry, 20)
    for row in range(3):
        state = 0
        for part in [*pair.box_1[row].flatten().tolist(), *pair.box_2[row].flatten().tolist()]:
            state = mix(state + step & mask) ^ part
        keys = [mix(mix(state) + (place + 1) * step & mask) >> 40 for place in range(valid.shape[1])]
        keys = [key - 2**24 * (key >= 2**23) for key in keys]  # the sign of the shifted int64
        order = sorted(range(len(keys)), key=lambda place: (not valid[row, place], -keys[place]))
        assert bins[row].tolist() == order[:20]


def test_drawn_bins_are_uniform_among_those_not_clamped():
    pair, geometry = pairs(400, seed=3), network().maps[1][1]
    valid = valid_bins(pair, geometry).flatten(1)
    drawn = torch.zeros_like(valid).scatter_(1, drawn_bins(pair, geometry, 4), True)
    enough = valid.sum(1) >= 8
    expected = (4 / valid.sum(1, keepdim=True))[enough].expand(-1, valid.shape[1])[valid[enough]]
    hits = drawn[enough][valid[enough]].float()
    assert len(hits) > 3000
    assert abs((hits - expected).mean()) < 1e-6
    first_half = torch.arange(valid.shape[1]).expand_as(valid)[enough][valid[enough]] < valid.shape[1] // 2
    spread = (hits - expected)[first_half].sum() / math.sqrt((expected * (1 - expected))[first_half].sum())
    assert abs(spread) < 4


@pytest.mark.parametrize("negatives", ["pair", "batch"])
def test_contrast_against_loops(negatives):
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    loss, tau = place_contrast_loss(query, key, 0.2, negatives), 0.2
    losses = []
    for n, place in itertools.product(range(3), range(4)):
        among = [(n, p) for p in range(4)] if negatives == "pair" else list(itertools.product(range(3), range(4)))
        q = query[n, :, place] / query[n, :, place].norm()
        similar = {at: float(q @ (key[at[0], :, at[1]] / key[at[0], :, at[1]].norm())) / tau for at in among}
        losses.append(math.log(sum(map(math.exp, similar.values()))) - similar[n, place])
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-9)
    blank = torch.ones(3, 5, 4)
    assert place_contrast_loss(blank, blank, tau, negatives).item() == pytest.approx(math.log(len(among)), rel=1e-5)


def test_no_gradient_reaches_the_key_or_the_target():
    net, pair = network(), pairs(4)
    net(pair).loss.backward()
    assert all(p.grad is None for p in net.target.parameters())
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    idle = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    # a bias in front of a difference, or of a BatchNorm in training, has no gradient by construction
    assert len(trained) > 40 and all(name.endswith("bias") for name in idle)


@pytest.mark.parametrize("flips", [False, True])
def test_heads_that_know_the_places_have_no_displacement_left(flips):
    """The head tells each cell's own coordinates, from loops, shifted as it likes per scan: nothing is left."""
    net, pair = network(), pairs(5, flips=flips)
    geometry = net.maps[0][1]
    half = torch.tensor(SIZE).view(1, 3, 1, 1, 1) / 2
    shift = torch.randn(5, 3, 1, 1, 1, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1, 1)
    places = ramps(pair, geometry) / half + shift
    net.place[0] = nn.Identity()
    assert net.displacement_loss(0, places, pair).item() == pytest.approx(0, abs=1e-9)
    assert net.displacement_loss(0, places.flip(2), pair).item() > 0.01
    assert net.displacement_loss(0, 0 * places, pair).item() > 0.01


def test_displacement_is_the_mean_over_cells_of_both_views():
    """With heads that say 0 everywhere it is the mean of smooth L1 over cells drawn from either view: all of them."""
    net, pair = network(num_bins=10**6), pairs(2)
    geometry = net.maps[1][1]
    net.place[1] = nn.Identity()
    features = torch.zeros_like(ramps(pair, geometry))
    places = [centers(prior, geometry).reshape(-1, 3) / (np.array(SIZE) / 2) for prior in zip(pair.boxes, pair.flips)]
    losses = []
    for n in range(2):
        for one, other in itertools.product(places[n], places[n + 2]):
            for gap in np.abs(one - other):
                losses.append(0.5 * gap**2 if gap < 1 else gap - 0.5)
    assert net.displacement_loss(1, features, pair).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_displacements_cells_are_drawn_by_the_views_own_boxes():
    """The whole loss with few cells, against its own parts asked for one by one."""
    net, pair = network(num_bins=5), pairs(3)
    net.eval()
    maps = net.online["encoder"](pair.views)
    parts = [net.displacement_loss(number, maps[level], pair) for number, (level, _) in enumerate(net.maps)]
    whole = net(pair).loss.item()
    net.objective = net.objective._replace(displacement=0.0)
    assert whole - net(pair).loss.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)


def test_cells_lie_where_view_to_scan_puts_them():
    pair, geometry = pairs(2), network().maps[0][1]
    at = torch.tensor([3 * s + c for s, c in zip(geometry.output_stride, geometry.center)], dtype=torch.float64)
    point = view_to_scan(at, pair.boxes[0], pair.flips[0], torch.tensor(SIZE))
    assert point.numpy() == pytest.approx(centers((pair.boxes[0], pair.flips[0]), geometry)[3, 3, 3])


@pytest.mark.parametrize("num_bins", [20, 10**6])
def test_consistency_on_more_maps_is_eq_8_on_drawn_bins(num_bins):
    net, pair = network(kind="consistency", displacement=0.0, num_bins=num_bins), pairs(3)
    net.eval()
    losses = []
    for number, (level, geometry) in enumerate(net.maps):
        at = bin_coordinates(pair, geometry, drawn_bins(pair, geometry, num_bins))
        query = read_at(net.online["encoder"](pair.views)[level], at)
        key = net.target["projector"][number](query)
        query = net.predictor[number](net.online["projector"][number](query))
        (q_1, q_2), (k_1, k_2) = (F.normalize(part[..., 0, 0], dim=1).chunk(2) for part in (query, key))
        losses.append(((q_1 - k_2).square().sum(1).mean() + (q_2 - k_1).square().sum(1).mean()) / 2)
    assert net(pair).loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_by_place_is_the_undisturbed_one(tmp_path):
    where = train_loop.scans(tmp_path / "store")
    more = {**PLACES, "loss": {"kind": "contrast", "displacement": 1.0, "num_bins": 8}}
    train_loop.train(train_loop.pretraining(where, tmp_path / "whole", **more))
    cut = train_loop.pretraining(where, tmp_path / "cut", **more)
    with pytest.raises(train_loop.Killed):
        train_loop.train(cut, until=4)
    train_loop.train(cut)
    assert train_loop.equal(
        train_loop.state_of(tmp_path / "whole")["model"], train_loop.state_of(tmp_path / "cut")["model"]
    )
    assert train_loop.rows_of(tmp_path / "whole") == train_loop.rows_of(tmp_path / "cut")
    assert any("health/retrieval" in row for row in train_loop.rows_of(tmp_path / "whole"))


def test_what_does_not_fit_together_is_said(tmp_path):
    for changes, text in (
        ({"method": "byol", "loss": {"kind": "contrast"}, "optim": {"lr": None}}, "of method=pgl, not byol"),
        ({"method": "byol", "align": {"wrong_priors": True}, "loss": {}, "optim": {"lr": None}}, "byol aligns nothing"),
        ({"method": "genesis", "align": {"mask_clamped": True}, "loss": {}, "optim": {"lr": None}}, "genesis aligns n"),
        ({"loss": {"kind": "contrast"}, "align": {"mask_clamped": True}}, "align.mask_clamped"),
        ({"loss": {"temperature": 0}}, "loss.temperature"),
    ):
        with pytest.raises(ValueError, match=text):
            train_loop.pretraining(tmp_path, tmp_path / "run", **changes)
    config = train_loop.pretraining(tmp_path, tmp_path / "run", align={"more_strides": [[3, 3, 3]]})
    with pytest.raises(ValueError, match="maps of output stride"):
        build_pretraining(config)


@pytest.mark.parametrize(
    ("args", "mend"),
    [
        (["loss.num_bins=1"], "loss.num_bins=2"),
        (["loss.num_bins=1", "loss.negatives=batch", "global_batch_size=1"], "global_batch_size=2"),
        (["views.size=[8,16,16]"], "align.output_stride=[4,8,8]"),
        (
            ["views.size=[8,16,16]", "align.output_stride=[4,8,8]", "align.more_strides=[[8,16,16]]"],
            "views.size=[8,16,32]",
        ),
        (["align.more_strides=[[4,8,8],[8,16,16]]"], "align.more_strides=[[4,8,8]]"),
        (["align.more_strides=[[4,8,8],[4,8,8]]", "loss.kind=consistency"], "align.more_strides=[[4,8,8]]"),
    ],
)
def test_what_has_no_other_place_to_tell_apart_is_refused(args, mend):
    """Its loss is 0 whatever the features are. A map that is named twice is compared once."""
    given = ["index=s", "run=r", "loss.kind=contrast", *args]
    with pytest.raises(
        ValueError, match=r"no other place to tell one from|a map is compared once: take align"
    ) as caught:
        load(PretrainConfig, given)
    assert "\n" not in str(caught.value)
    load(PretrainConfig, [*given, mend])
