"""LARS, schedules and the EMA against their formulas."""

import math

import numpy as np
import torch

from pgl_ray.config import PretrainOptimConfig
from pgl_ray.train.optim import build_lars, ema_decay, polynomial, warmup_cosine


def test_lars_equals_the_formula_and_exempts_vectors():
    config = PretrainOptimConfig(lr=0.2, momentum=0.9, weight_decay=0.01, trust_coefficient=1e-3)
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
        trust = config.trust_coefficient * norm / (np.linalg.norm(grads[0]) + config.weight_decay * norm)
        buffers[0] = config.momentum * buffers[0] + trust * decayed
        buffers[1] = config.momentum * buffers[1] + grads[1]
        weight, bias = weight - config.lr * buffers[0], bias - config.lr * buffers[1]
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, atol=1e-12)
    np.testing.assert_allclose(model.bias.detach().numpy(), bias, atol=1e-12)


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
    got = rates(polynomial(optimizer, 10, 0.9), optimizer, 10)
    np.testing.assert_allclose(got, [0.01 * (1 - i / 10) ** 0.9 for i in range(10)])


def test_ema_decay_rises_from_start_to_one():
    assert ema_decay(0, 100, 0.996) == 0.996
    assert ema_decay(100, 100, 0.996) == 1.0
    assert math.isclose(ema_decay(50, 100, 0.996), 0.998)
