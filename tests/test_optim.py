"""LARS, schedules and the EMA against their formulas; which optimizer a method has."""

import math

import numpy as np
import pytest
import torch

from pgl_ray.config import PretrainConfig, PretrainOptimConfig, load, to_yaml
from pgl_ray.train.optim import build_lars, build_pretraining, describe, ema_decay, polynomial, warmup_cosine


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("given", [{"lr": 0.1}, {"weight_decay": 0.1}])
def test_an_optimizer_of_no_rate_or_decay_is_refused(kind, given):
    with pytest.raises(ValueError, match=r"^optim.lr=.*, optim.weight_decay=.*: expected numbers"):
        build_pretraining(torch.nn.Linear(1, 1), PretrainOptimConfig(kind=kind, **given))


def test_lars_equals_the_formula_and_exempts_vectors():
    config = PretrainOptimConfig(lr=0.2, momentum=0.9, weight_decay=0.01)
    model = torch.nn.Linear(5, 4).double()
    weight, bias = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    lars = build_lars(model, config)
    rng = np.random.default_rng(0)
    buffers = [np.zeros_like(weight), np.zeros_like(bias)]
    for _ in range(3):
        grads = rng.normal(size=weight.shape), rng.normal(size=bias.shape)
        model.weight.grad, model.bias.grad = (torch.from_numpy(g.copy()) for g in grads)
        lars.step()
        decayed = grads[0] + config.weight_decay * weight
        norm = np.linalg.norm(weight)  # You et al. 2017, Eq. 6
        trust = 1e-3 * norm / (np.linalg.norm(grads[0]) + config.weight_decay * norm)
        buffers[0] = config.momentum * buffers[0] + trust * decayed
        buffers[1] = config.momentum * buffers[1] + grads[1]
        weight, bias = weight - config.lr * buffers[0], bias - config.lr * buffers[1]
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, atol=1e-12)
    np.testing.assert_allclose(model.bias.detach().numpy(), bias, atol=1e-12)


# -- which optimizer ---------------------------------------------------------------------------------------------------


def config(*args) -> PretrainConfig:
    return load(PretrainConfig, ["index=s", "run=r", *args])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["method=pgl"], ("lars", 0.2, 1.5e-6)),  # the paper's
        (["method=byol"], ("lars", 0.2, 1.5e-6)),
        (["method=genesis"], ("sgd", 0.1, 0.0)),
        (["optim.lr=1.5"], ("lars", 1.5, 1.5e-6)),
        (["optim.weight_decay=0"], ("lars", 0.2, 0.0)),
        (["optim.lr=1.5", "optim.lr=null", "method=genesis"], ("sgd", 0.1, 0.0)),  # of a file, taken back
        (["method=genesis", "optim.kind=sgd", "optim.lr=0.3"], ("sgd", 0.3, 0.0)),
        (["method=genesis", "optim.kind=lars"], ("lars", 0.2, 1.5e-6)),  # as it was
        (["optim.kind=adamw"], ("adamw", 1e-3, 1e-2)),
        (["method=genesis", "optim.kind=adamw", "optim.weight_decay=0.1"], ("adamw", 1e-3, 0.1)),
    ],
)
def test_a_config_leaves_no_optimizer_open(tmp_path, args, expected):
    found = config(*args)
    assert (found.optim.kind, found.optim.lr, found.optim.weight_decay) == expected
    (tmp_path / "config.yaml").write_text(to_yaml(found))
    assert load(PretrainConfig, [str(tmp_path / "config.yaml")]) == found


def test_a_rate_for_lars_is_not_taken_for_sgd():
    with pytest.raises(ValueError, match=r"optim.lr=1.5 without optim.kind: method=genesis takes sgd.*optim.lr=null"):
        config("optim.lr=1.5", "method=genesis")
    for args in (["method=nonsense"], ["optim.kind=adam"], ["optim=3"], ["optim.lr=-1"], ["method=[pgl]"]):
        with pytest.raises(ValueError, match=args[0].split("=")[0]):
            config(*args)


def test_each_kind_is_built_as_its_authors_have_it():
    model = torch.nn.Linear(5, 4)
    model.bias.requires_grad_(False)
    sgd = build_pretraining(model, config("method=genesis").optim)
    (group,) = sgd.param_groups
    assert type(sgd) is torch.optim.SGD and group["params"] == [model.weight]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 0, False)
    adamw = build_pretraining(model, config("optim.kind=adamw").optim)
    assert type(adamw) is torch.optim.AdamW and adamw.param_groups[0]["lr"] == 1e-3
    lars, same = build_pretraining(model, config().optim), build_lars(model, config().optim)
    assert type(lars) is type(same) and lars.state_dict() == same.state_dict()
    assert describe(config().optim) == "LARS at 0.2" and describe(config("method=genesis").optim) == "SGD at 0.1"


def rates(schedule, optimizer, steps):
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_warmup_and_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    got = rates(warmup_cosine(optimizer, 4, 20), optimizer, 22)
    np.testing.assert_allclose(got[:4], [0.05, 0.1, 0.15, 0.2])
    np.testing.assert_allclose(got[4:20], [0.1 * (1 + math.cos(math.pi * i / 16)) for i in range(16)])
    assert max(got[20:]) < 1e-12  # no restart


def test_polynomial():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    got = rates(polynomial(optimizer, 10), optimizer, 10)
    np.testing.assert_allclose(got, [0.01 * (1 - i / 10) ** 0.9 for i in range(10)])


def test_ema_decay_rises_from_start_to_one():
    assert ema_decay(0, 100, 0.996) == 0.996
    assert ema_decay(100, 100, 0.996) == 1.0
    assert math.isclose(ema_decay(50, 100, 0.996), 0.998)
