"""PGL, BYOL and Models Genesis in one step function: closed forms, gradients, ablations, several workers."""

import itertools
import math
import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from pgl_ray.config import PretrainConfig, load
from pgl_ray.model import device as on
from pgl_ray.model.losses import local_consistency_loss
from pgl_ray.model.pgl import Pair, feature_geometry, valid_bins
from pgl_ray.model.resnet import Encoder
from pgl_ray.train import optim, ranks
from pgl_ray.train.networks import build_pretraining
from pgl_ray.train.one_step import forward_and_back, train_step

SMALL = ["index=a", "run=b", "encoder.width=8", "encoder.depths=[1,1,1,1]", "heads.hidden=16", "heads.out=12"]
SMALL += ["views.size=[16,48,32]"]


def pair(seed=0, num=4) -> Pair:
    rng = torch.Generator().manual_seed(seed)
    views = [torch.randn(num, 1, 16, 48, 32, generator=rng) for _ in range(4)]
    start = torch.randint(0, 6, (2, num, 3), generator=rng)
    boxes = torch.stack([start, start + torch.tensor([20, 60, 40])], -1)
    flips = torch.rand(2, num, 3, generator=rng) < 0.5
    return Pair(*views[:2], *boxes, *flips, *views[2:])


def model_of(*args):
    return build_pretraining(load(PretrainConfig, [*SMALL, *args]))


def perceptron(x, head):
    """Linear, BatchNorm by its formula, ReLU, linear, from a head's tensors."""
    first, norm, _, last = head
    x = x @ first.weight.flatten(1).T
    x = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + norm.eps) * norm.weight + norm.bias
    return x.clamp_min(0) @ last.weight.flatten(1).T + last.bias


def test_byol_equals_its_closed_form():
    """Grill et al. 2020, Eq. 2: 2 - 2 <q, z> / (|q| |z|), both directions summed, on globally pooled features."""
    model, _ = model_of("method=byol")
    batch = pair()
    out = model(batch)
    views = torch.cat([batch.view_1, batch.view_2])
    vectors = []
    for path in (model.online, model.target):
        maps = path["encoder"](views)[-1]
        vectors.append(perceptron(maps.flatten(2).mean(2), path["projector"]))
    query, key = perceptron(vectors[0], model.predictor), vectors[1]
    expected = 0.0
    for i, j in [(i, i + 4) for i in range(4)] + [(i + 4, i) for i in range(4)]:
        cosine = (query[i] @ key[j]) / (query[i].norm() * key[j].norm())
        expected += (2 - 2 * cosine) / 4
    torch.testing.assert_close(out.loss, expected, atol=1e-4, rtol=1e-4)
    out.loss.backward()
    assert all(p.grad is None for p in model.target.parameters())


@pytest.mark.slow
def test_genesis_restores_views_with_the_segmentation_network():
    model, _ = model_of("method=genesis")
    batch = pair()
    out = model(batch)
    restored = model.online(torch.cat([batch.deformed_1, batch.deformed_2]))
    views = torch.cat([batch.view_1, batch.view_2])
    assert restored.shape == views.shape
    torch.testing.assert_close(out.loss, ((restored - views) ** 2).mean())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    maps = model.plain_maps(views)  # for the health panel: as in training, and without a trace
    torch.testing.assert_close(maps, model_of("method=byol")[0](batch).maps, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("missing", ["deformed_1", "deformed_2"])
def test_genesis_needs_both_deformed_views(missing):
    model, _ = model_of("method=genesis")
    with pytest.raises(ValueError, match="the batch has no deformed_1 and deformed_2"):
        model(pair()._replace(**{missing: None}))


def test_methods_start_from_one_encoder():
    weights = []
    for method in ("pgl", "byol", "genesis"):
        encoder = model_of(f"method={method}")[0].get_submodule("online.encoder")
        weights.append(torch.cat([p.flatten() for p in encoder.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.slow
@pytest.mark.parametrize("args", [["optim.lr=4"], ["optim.kind=adamw", "optim.lr=null"]])
@pytest.mark.parametrize("method", ["pgl", "byol", "genesis"])
def test_a_few_steps_lower_the_loss_of_one_batch(method, args):
    own = ["optim.lr=null"] if method == "genesis" and "optim.lr=4" in args else args
    config = load(PretrainConfig, [*SMALL, f"method={method}", *own])
    net, _ = build_pretraining(config)
    optimizer = optim.build_pretraining(net.train(), config.optim)
    schedule, autocast = optim.warmup_cosine(optimizer, 1, 1000), on.autocast(torch.device("cpu"), "float32")
    steps = [train_step(net, net, optimizer, schedule, pair(), 0.99, autocast) for _ in range(12)]
    assert steps[-1].output.loss < 0.9 * steps[0].output.loss
    grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert steps[-1].grad_norm > 0 and torch.isfinite(grads).all()


@pytest.mark.parametrize("num, parts", [(1, 2), (2, 5)])
def test_more_parts_than_pairs_are_as_many_as_pairs(num, parts):
    """InstanceNorm refuses an empty part."""
    args = ["encoder.kind=resenc", "encoder.depths=[1,1,1,1,1]", "encoder.width=4", "align.output_stride=[4,8,8]"]
    results = []
    for count in (num, parts):
        net = model_of(*args)[0].train()
        autocast = on.autocast(torch.device("cpu"), "float32")
        _, output = forward_and_back(net, net, pair(num=num), count, autocast)
        results.append([output.loss, *(p.grad for p in net.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


# -- PGL's own choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strides", "stride", "channels", "cells"),
    [
        ("early", (8, 16, 16), 256, (2, 3, 2)),
        ("early", (4, 8, 8), 64, (4, 6, 4)),
        ("late", (8, 16, 16), 256, (2, 3, 2)),
        ("late", (4, 8, 8), 128, (4, 6, 4)),
        ("late", (1, 2, 2), 32, (16, 24, 16)),
    ],
)
def test_output_strides(strides, stride, channels, cells):
    args = f"encoder.stage_strides={strides}", f"align.output_stride=[{','.join(map(str, stride))}]"
    model, geometry = model_of(*args)
    out = model(pair(num=2))
    assert out.maps.shape == (4, channels, *cells) and out.query.shape == (2, 12, *cells)
    assert geometry.output_stride == stride and geometry.center == (0.5, 0.5, 0.5)
    out.loss.backward()
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad  # DDP fails on a parameter that waits for a gradient
    whole = Encoder(depths=(1, 1, 1, 1), width=8, stage_strides=strides)
    whole.load_state_dict(model.online["encoder"].state_dict())
    level = next(i for i in reversed(range(5)) if whole.strides[i] == stride)
    views = torch.cat([pair(num=2).view_1, pair(num=2).view_2])
    torch.testing.assert_close(whole(views)[level], out.maps, atol=1e-4, rtol=1e-4)


def test_impossible_stride_names_the_possible_ones():
    with pytest.raises(ValueError, match=r"align.output_stride=\[8, 8, 8\].*\[1, 2, 2\], \[2, 4, 4\], \[4, 8, 8\]"):
        feature_geometry(Encoder(width=8, depths=(1, 1, 1, 1)), (16, 96, 96), (8, 8, 8))


def test_mask_counts_only_the_valid_bins():
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 5, 2, 3, 4, generator=rng) for _ in range(2))
    valid = torch.rand(3, 2, 3, 4, generator=rng) < 0.5
    valid[2] = False
    expected = 0.0
    for i in range(2):
        squares = []
        for place in itertools.product(range(2), range(3), range(4)):
            if valid[(i, *place)]:
                q, k = query[(i, slice(None), *place)], key[(i, slice(None), *place)]
                squares.append(((q / q.norm() - k / k.norm()) ** 2).sum())
        expected += sum(squares) / len(squares) / 2  # the third sample has none and is left out
    torch.testing.assert_close(local_consistency_loss(query, key, valid), expected)
    everywhere = torch.ones(3, 2, 3, 4, dtype=torch.bool)
    torch.testing.assert_close(local_consistency_loss(query, key, everywhere), local_consistency_loss(query, key))


def test_masking_changes_only_what_is_clamped():
    batch = pair(num=3)
    plain, _ = model_of("align.output_stride=[4,8,8]")
    masked, geometry = model_of("align.output_stride=[4,8,8]", "align.mask_clamped=true")
    one, two = plain(batch), masked(batch)
    torch.testing.assert_close(one.query, two.query)
    assert one.loss != two.loss
    # the second direction swaps the views: it is the first one of the swapped pair, whose bins are the same
    other = masked(Pair(batch.view_2, batch.view_1, batch.box_2, batch.box_1, batch.flip_2, batch.flip_1))
    valid = valid_bins(batch, geometry)
    expected = 0.0
    for out in (two, other):
        distance = (F.normalize(out.query, dim=1) - F.normalize(out.key, dim=1)).square().sum(1)
        parts = [distance[i][valid[i]].mean() for i in range(3) if valid[i].any()]
        expected += sum(parts) / len(parts)
    assert 0 < valid.float().mean() < 1
    torch.testing.assert_close(two.loss.detach(), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"align.mask_clamped leaves no bin: views.size=\(8, 64, 64\)"):
        load(PretrainConfig, ["index=a", "run=b", "views.size=[8,64,64]", "align.mask_clamped=true"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6))
def test_loss_range_and_symmetry(seed, num, channels):
    rng = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(num, channels, 2, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    loss = local_consistency_loss(query, key)
    assert 0 <= loss <= 4
    torch.testing.assert_close(loss, local_consistency_loss(key, query))
    torch.testing.assert_close(loss, local_consistency_loss(7 * query, 0.1 * key))
    assert local_consistency_loss(query, query) < 1e-12
    torch.testing.assert_close(local_consistency_loss(query, -query).item(), 4.0)


def test_loss_gradient():
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 2, 1, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q: local_consistency_loss(q, key), (query.requires_grad_(),))
    key.requires_grad_()
    local_consistency_loss(query, key).backward()
    assert key.grad is None


def test_wrong_priors_are_the_neighbours():
    batch = pair()
    wrong = batch.with_wrong_priors()
    assert torch.equal(wrong.view_1, batch.view_1)
    for name in ("box_1", "box_2", "flip_1", "flip_2"):
        np.testing.assert_array_equal(getattr(wrong, name)[1:], getattr(batch, name)[:-1])
    with pytest.raises(ValueError, match="wrong_priors shows nothing"):
        load(PretrainConfig, [*SMALL, "align.wrong_priors=true", "align.flip=false", "align.crop=false"])
    with pytest.raises(ValueError, match=r"align.wrong_priors.*global_batch_size=4"):
        load(PretrainConfig, [*SMALL, "align.wrong_priors=true", "global_batch_size=4", "train.num_workers=4"])


# -- two workers ------------------------------------------------------------------------------------------------------

STEPS = 3


def part_of(batch: Pair, rank: int, world: int) -> Pair:
    return Pair(*(each.chunk(world)[rank] for each in batch))


def trained(rank: int, world: int, frozen_norms: bool) -> dict:
    """The end of a few steps on one worker: its weights, buffers before and after they are averaged, rates."""
    config = load(PretrainConfig, [*SMALL, "optim.lr=4"])
    net, _ = build_pretraining(config)
    net.train()
    if frozen_norms:
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.eval()
    model = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    lars = optim.build_pretraining(net, config.optim)
    schedule, autocast = optim.warmup_cosine(lars, 2, 10), on.autocast(torch.device("cpu"), "float32")
    done = []
    for step in range(STEPS):
        batch, decay = part_of(pair(step, num=8), rank, world), optim.ema_decay(step, STEPS, 0.9)
        done.append(train_step(model, net, lars, schedule, batch, decay, autocast))
    own = {name: value.clone() for name, value in net.named_buffers()}
    optim.average_buffers(net)
    losses = [ranks.mean_over_workers({"loss": step.output.loss.item()})["loss"] for step in done]
    norms = [step.grad_norm.item() for step in done]
    return {"state": net.state_dict(), "own": own, "losses": losses, "norms": norms, "lr": [s.lr for s in done]}


def two_workers(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for frozen in (False, True):
        torch.save(trained(rank, 2, frozen), f"{folder}/{frozen}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_stay_identical_and_equal_one(tmp_path):
    """Parameters, EMA, buffers and rates are the same on all ranks; and with BatchNorm aside, two workers make the
    steps that one worker makes with the whole batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before the fork: OpenMP's threads do not survive it
    start_processes(two_workers, (str(tmp_path),), nprocs=2, start_method="fork")
    torch.set_num_threads(threads)
    ends = {(frozen, rank): torch.load(tmp_path / f"{frozen}_{rank}.pt") for frozen in (False, True) for rank in (0, 1)}
    for frozen in (False, True):
        first, second = ends[frozen, 0], ends[frozen, 1]
        assert first["lr"] == second["lr"] and first["losses"] == second["losses"]
        for name, value in first["state"].items():
            assert torch.equal(value, second["state"][name]), name
    first, second = ends[False, 0], ends[False, 1]
    name = "target.encoder.bn1.running_mean"
    assert not torch.equal(first["own"][name], second["own"][name])
    torch.testing.assert_close(first["state"][name], (first["own"][name] + second["own"][name]) / 2)
    assert first["state"]["online.encoder.bn1.num_batches_tracked"] == STEPS

    single = trained(0, 1, frozen_norms=True)
    np.testing.assert_allclose(ends[True, 0]["losses"], single["losses"], rtol=1e-4)
    np.testing.assert_allclose(ends[True, 0]["norms"], single["norms"], rtol=1e-3)
    for name, value in single["state"].items():
        torch.testing.assert_close(ends[True, 0]["state"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    start, moved = model_of()[0].state_dict()["online.encoder.conv1.weight"], single["state"]
    assert (moved["online.encoder.conv1.weight"] - start).norm() > 1e-3 * start.norm()
    assert math.isfinite(single["losses"][-1])
