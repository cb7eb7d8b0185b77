"""How networks compute: the same results whatever the layout, with recomputation, compiled or not."""

import copy
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from pgl_ray.config import PretrainConfig, build
from pgl_ray.model import device as on
from pgl_ray.model import inference
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import Pair
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.train import health, networks

CPU = torch.device("cpu")


def encoder(kind):
    net = build_encoder(kind, (1, 2, 1, 1), 4)
    init_kaiming_uniform(net, 0)
    return net.double().train()


def results(net, steps=2):
    """Gradients and running statistics after some batches."""
    for seed in range(steps):
        x = torch.randn(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        net(x)[-1].square().sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None], [b for b in net.buffers() if b.is_floating_point()]


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("kind, level", [("resnet", 2), ("resnet", 4), ("resenc", 3)])
def test_recomputed_stages_give_the_same_gradients_and_norms(kind, level, momentum, monkeypatch):
    plain, recomputed = encoder(kind), encoder(kind)
    for net in (plain, recomputed):
        net.stop_at(level)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm3d):
                part.momentum = momentum
    on.recompute(recomputed)
    calls, forward = [], nn.Conv3d.forward
    monkeypatch.setattr(nn.Conv3d, "forward", lambda self, x: calls.append(1) or forward(self, x))
    (grads, stats), num = results(plain), len(calls)
    again_grads, again_stats = results(recomputed)
    assert len(calls) - num > 1.8 * num  # they really are computed twice, the stem but once
    for ours, theirs in zip([*again_grads, *again_stats], [*grads, *stats], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * theirs.abs().max().item())
    assert recomputed.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [{}, {"stride": 2}, {"stride": (1, 2, 3), "bias": False}])
@pytest.mark.parametrize("size", [(2, 5, 3, 4, 6), (1, 5, 1, 1, 1)])
def test_a_cpu_computes_the_same_pointwise_convolutions(change, size, training):
    """The oracle computes cell by cell, and its gradients are numerical."""
    conv = nn.Conv3d(5, 3, 1, **change).double()
    laid = on.lay_out(copy.deepcopy(conv), CPU).train(training)
    assert type(laid) is on.Pointwise and laid.state_dict().keys() == conv.state_dict().keys()
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    d, h, w = conv.stride
    expected = torch.zeros(size[0], 3, *(-(-n // by) for n, by in zip(size[2:], conv.stride)), dtype=torch.float64)
    for n, i, j, k in itertools.product(*(range(n) for n in (size[0], *expected.shape[2:]))):
        expected[n, :, i, j, k] = conv.weight[:, :, 0, 0, 0] @ x[n, :, i * d, j * h, k * w]
        expected[n, :, i, j, k] += 0 if conv.bias is None else conv.bias
    torch.testing.assert_close(laid(x), expected)
    assert torch.autograd.gradcheck(
        lambda x, *weights: torch.func.functional_call(laid, dict(zip(conv.state_dict(), weights)), x),
        (x, *laid.parameters()),
    )


def test_only_pointwise_convolutions_become_products():
    """And no other device's, nor a program's that is exported: there it stays a convolution."""
    others = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 1, groups=2), nn.Conv3d(4, 4, 1, padding=1)
    net = on.lay_out(nn.Sequential(*others, nn.Conv3d(4, 2, 1)), CPU).eval()
    assert [type(part) for part in net] == [nn.Conv3d] * 3 + [on.Pointwise]
    program = torch.export.export(net, (torch.zeros(1, 4, 8, 8, 8),))
    assert sum("conv3d" in str(node.target) for node in program.graph.nodes) == 4


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    x, plain = torch.randn(1, 1, 4, 4, 4), copy.deepcopy(net)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: setattr(self, "_compiled_call_impl", failing(self)))

    def failing(module):
        return torch.compile(module._call_impl, backend=broken)

    with torch._dynamo.config.patch(suppress_errors=False):
        assert on.compiled(net, CPU, "off")._compiled_call_impl is None
        assert on.compiled(net, CPU, "auto")._compiled_call_impl is None  # a CPU gains nothing
        assert on.compiled(net, CPU, "on") is net and net._compiled_call_impl is not None
        torch.testing.assert_close(net(x), plain(x))
    assert net.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.reset()


def test_what_was_not_compiled_is_counted():
    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    def interrupted(x):
        torch._dynamo.graph_break()
        return x + 1

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert on.uncompiled() is None
    with torch._dynamo.config.patch(suppress_errors=True):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert on.uncompiled() is None
        torch.compile(interrupted, backend="eager")(torch.ones(2))
        assert re.search(r"0 of \d functions could not be compiled .* 1 graph breaks, the", on.uncompiled())
        torch.compile(lambda x: x + 2, backend=broken)(torch.ones(2))
        assert re.search(r"1 of \d functions could not be compiled and run as they are", on.uncompiled())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


BROKEN = {
    "backend": """
import torch._inductor.compile_fx as compiler

def fails(graph, inputs, **kwargs):
    raise ValueError("too large for int32")

compiler.compile_fx = fails
""",
    "tracing": """
from torch._dynamo.symbolic_convert import InstructionTranslator as Translator

def fails(*args):
    raise ValueError("too large for int32")

Translator.RETURN_VALUE = fails
Translator.dispatch_table[__import__("dis").opmap["RETURN_VALUE"]] = fails
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("verbose", [False, True])
def test_a_compiler_that_fails_is_one_line_and_no_stack_dump(broken, verbose):
    """In a process of its own: PyTorch's log is of a process. Its own switch gives the traceback back."""
    code = f"""
import torch
from pgl_ray.model import device as on
{BROKEN[broken]}
class Net(torch.nn.Module):
    def forward(self, x):
        return x + 1

net = on.compiled(Net(), torch.device("cpu"), "on")
assert net(torch.ones(1)) == 2
print(on.uncompiled())
"""
    own = os.environ | {"TORCHDYNAMO_VERBOSE": str(int(verbose))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert done.returncode == 0 and ("Traceback" in done.stderr) == verbose
    assert verbose or not done.stderr
    reason = "" if verbose else r" \(.*ValueError.* too large for int32\)"
    assert re.search(rf"[12] functions could not be compiled and run as they are{reason}, 0 graph", done.stdout)


PLACES = {"align": {"flip": False, "more_strides": [[2, 4, 4], [4, 8, 8]]}}
PLACES |= {"loss": {"kind": "contrast", "displacement": 1.0}}


METHODS = pytest.mark.parametrize("changes", [{}, PLACES, {"method": "byol"}], ids=["pgl", "by place", "byol"])


def method_and_pair(changes: dict) -> tuple[nn.Module, Pair]:
    """A small network of a method, and what it learns from."""
    small = {"encoder": {"width": 4, "depths": [1, 1, 1, 1]}, "heads": {"hidden": 8, "out": 4}}
    config = build(PretrainConfig, {"index": "i", "run": "r", "views": {"size": [16, 32, 32]}, **small, **changes})
    net, _ = networks.build_pretraining(config)
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 4, (4, 3, 1), generator=generator)
    boxes = torch.cat([start, start + torch.tensor([16, 32, 32])[:, None]], -1).int()
    views = torch.randn(4, 1, 16, 32, 32, generator=generator)
    return net.train(), Pair(*views.chunk(2), *boxes.chunk(2), *torch.zeros(4, 3, dtype=torch.bool).chunk(2))


@pytest.mark.slow
@METHODS
def test_methods_are_traced_as_a_whole(changes):
    """By torch.compile without its compiler, backward, too: as on a GPU no function is left out."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, pair = method_and_pair(changes)
    torch.compile(net, backend="aot_eager")(pair).loss.backward()
    assert on.uncompiled() is None
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@METHODS
def test_methods_are_compiled_as_a_whole_on_cuda(changes):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, pair = method_and_pair(changes)
    there = Pair(*(part if part is None else part.cuda() for part in pair))
    plain, fast = (
        copy.deepcopy(net).cuda(),
        on.compiled(on.lay_out(net, torch.device("cuda")), torch.device("cuda"), "on"),
    )
    expected, got = plain(there).loss, fast(there).loss
    expected.backward()
    got.backward()
    assert on.uncompiled() is None and abs(got - expected) < 2e-3 * abs(expected)
    norms = [health.norm(p.grad for p in one.parameters() if p.grad is not None) for one in (plain, fast)]
    assert abs(norms[1] - norms[0]) < 0.1 * norms[0]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("world, mode, expected", [(1, "auto", True), (2, "auto", False), (2, "on", True)])
def test_several_gpus_compile_only_where_asked(monkeypatch, world, mode, expected):
    monkeypatch.setattr(on, "has_triton", lambda: True)
    net = on.compiled(nn.Identity(), torch.device("cuda"), mode, world)
    assert (net._compiled_call_impl is not None) == expected


def test_free_memory_counts_what_the_allocator_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    for allocated, expected in ((0, "cuda"), (700, "cpu"), (0, "cuda")):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, held=allocated: held)
        assert inference.where_sums_fit(torch.device("cuda"), (1, 5, 5)).type == expected  # 200 bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_channels_last_and_compiled_on_cuda():
    device, x = torch.device("cuda"), torch.randn(2, 1, 16, 64, 64, device="cuda")
    plain = build_encoder(depths=(1, 1, 1, 1), width=8).to(device).eval()
    fast = on.compiled(on.lay_out(copy.deepcopy(plain), device), device, "auto")
    assert fast.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        expected, got = plain(x)[-1], fast(x)[-1]
    assert (got - expected).norm() < 2e-3 * expected.norm()
