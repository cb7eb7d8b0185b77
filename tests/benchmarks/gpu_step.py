"""What a GPU makes of a training step: right first, then its time, part by part.

    python tests/benchmarks/gpu_step.py [--batches 32 128 512] [--only checks steps ...] [--out FILE.json]
    python tests/benchmarks/gpu_step.py --device cpu --tiny     # runs to the end in a minute; its figures mean nothing

Needs PyTorch, this package's source on PYTHONPATH, and of its dependencies monai, pytorch_optimizer, pydantic,
pydantic-core, typing-inspection, annotated-types and omegaconf; the stream (--index) needs all that the package needs.
On a machine without a package index they come as wheels. Made here once, in a folder that git ignores:

    echo /.whl/ >> .git/info/exclude
    python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
        monai==1.6.1 pytorch_optimizer==4.1.0 pydantic==2.14.3 pydantic_core==2.50.4 typing-inspection==0.4.5 \
        annotated-types==0.8.0 omegaconf==2.4.0

and on the lent machine, with .whl carried there, in calls that stay below its ten minutes each:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONUNBUFFERED=1 \
        PYTHONPATH=/tmp/site:. && python3 tests/benchmarks/gpu_step.py --only checks profile ways --out $OUT/ways.json
    ... --only segmentation steps --batches 32 128 --out $OUT/steps.json

The JSON is written after every section, so what a time limit cuts off costs that section alone. Keep it here, under
tests/benchmarks/results/.

    checks        a bfloat16 step against float32's, views made on the device against those made on the CPU. Fresh from
                  its initialisation the network amplifies rounding 30,000 times (weights changed by 1e-6 move its
                  gradient by 3 %, bfloat16 turns most of it), so blocks are damped (--damped 1: not), and beside it
                  stands what rounding activations by hand does to the same gradient
    steps         the step and its parts at each batch and both kinds of stage strides; share of the measured peak of a
                  bfloat16 matrix product (not compiled, for compiling takes minutes for each batch; --compile on does)
    ways          whole steps of the paper's PGL and of PGL by place without a wait between them: eager, compiled,
                  compiled with CUDA graphs; whether they train alike, what could not be compiled, what the host
                  spends, launches, and whether a step waits for the device
    segmentation  fine-tuning and inference at the paper's sizes
    profile       the kernels that take longest
    stream        with --index: the bench door, the share of waiting with the real stream

Medians of CUDA events; every timed step has its own random batch.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pgl_ray.config import FinetuneOptimConfig, IntensityConfig, PretrainOptimConfig, ViewsConfig
from pgl_ray.data.batch_views import apply_intensities, render_each
from pgl_ray.data.intensity_ops import INTENSITY_NUMBERS, Intensity, apply_intensity, sample_intensities
from pgl_ray.data.rendering import render
from pgl_ray.data.sampling import PAIR_NUMBERS, largest_crop, sample_pairs
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.inference import time_forward
from pgl_ray.model.losses import local_consistency_loss, segmentation_loss
from pgl_ray.model.pgl import Pair, Pgl, align, feature_geometry
from pgl_ray.model.places import Objective, PlacesPgl
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.prior import interpolation_matrices
from pgl_ray.train import health, optim

PAPER_PAIRS = 904_000  # 1,808 scans, 500 epochs (Sec. 5.1)
WINDOW = (-1024.0, 325.0)
OUTPUT_STRIDE = (8, 16, 16)
PARTS = ("augment", "online forward", "target forward", "align and loss", "backward", "optimizer", "ema")
SECTIONS = ("checks", "profile", "ways", "segmentation", "steps")  # what says most comes first
WAYS = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}
BY_PLACE = [(2, 4, 4), (4, 8, 8), OUTPUT_STRIDE]  # maps of PGL by place, as conf/pretrain_full.yaml has them
LOSSES = ("paper", "by place")
LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")  # in the names of CUDA's calls
SIZES = {"whole": {"views": (16, 96, 96), "patches": ((48, 160, 160), (64, 192, 192)), "scan": (64, 192, 192)}}
SIZES["tiny"] = {"views": (16, 32, 32), "patches": ((16, 32, 32),), "scan": (16, 32, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description="time of a training step on a GPU, and whether it is right")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batches", type=int, nargs="+", help="32 64 128 256 512, of --tiny 4")
    parser.add_argument("--strides", nargs="+", default=["early", "late"], choices=("early", "late"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument(
        "--ways", nargs="+", choices=tuple(WAYS), help="all, on a CPU eager alone: compiling takes minutes"
    )
    parser.add_argument("--compile", default="off", choices=("auto", "on", "off"), help="the networks of `steps`")
    parser.add_argument("--batch", type=int, help="of `ways` and `profile`; 128, or the largest of --batches below it")
    parser.add_argument("--damped", type=float, default=0.1, help="weight of each block's last norm in `checks`")
    parser.add_argument("--tiny", action="store_true", help="a small network and small views")
    parser.add_argument("--index", help="a store: measures the stream on this machine's cores, alone and with the step")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: this machine has no CUDA device; --device cpu --tiny shows that the script runs"
        )
    args.batches = args.batches or ([4] if args.tiny else [32, 64, 128, 256, 512])
    args.batch = args.batch or max((batch for batch in args.batches if batch <= 128), default=min(args.batches))
    torch.set_num_threads(1 if args.tiny else torch.get_num_threads())
    results, began = {"machine": machine(args.device), "steps": [], "ways": []}, time.monotonic()

    def keep(section: str, figures: object, text: str) -> None:
        results[section] = figures
        print(f"-- {section}, {time.monotonic() - began:.0f} s\n{text}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1))

    print("  ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    tflops = peak(args)
    keep("peak_tflops", tflops, f"bfloat16 matrix product: {tflops:.1f} TFLOP/s, the peak that shares refer to")
    if "checks" in args.only:
        figures = checks(args)
        keep("checks", figures, "\n".join(f"  {name:<52} {value:.1e}" for name, value in figures.items()))
    if "profile" in args.only:
        figures = profile(args)
        keep("profile", figures, profile_table(figures))
    ways = args.ways or (WAYS if args.device == "cuda" else ("eager",))
    for way, loss in product(ways, LOSSES) if "ways" in args.only else ():
        eager = [row for row in results["ways"] if row["loss"] == loss][:1]
        figures = or_none(partial(way_row, args, way, loss, eager)) or {"failed": "out of memory"}
        row = {"way": way, "loss": loss, **figures}
        keep("ways", [*results["ways"], row], way_line(row, args.batch))
    if "segmentation" in args.only:
        figures = segmentation(args)
        keep("segmentation", figures, segmentation_table(figures))
    for strides, batch in product(args.strides, args.batches) if "steps" in args.only else ():
        row = {"strides": strides, "batch": batch}
        row |= or_none(partial(step_row, args, strides, batch, tflops)) or {"fits": False}
        keep("steps", [*results["steps"], row], step_line(row))
    if args.index:
        figures = stream(args)
        keep("stream", figures, "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    print(closing(results))


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    return {"date": time.strftime("%Y-%m-%d"), "device": name, **versions}


# -- timing -----------------------------------------------------------------------------------------------------------


class Clock:
    """Times of the parts of a step, by CUDA events or, on a CPU, by the clock; nothing waits before `milliseconds`."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each two marks."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in zip(self.marks, self.marks[1:])]
        return [1000 * (second - first) for first, second in zip(self.marks, self.marks[1:])]


def median_ms(device: str, work: Callable[[], object], repeats: int, warm: int = 3) -> float:
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        clock = Clock(device)
        clock.mark()
        work()
        clock.mark()
        times += clock.milliseconds()
    return statistics.median(times)


def peak(args) -> float:
    """TFLOP/s of a bfloat16 matrix product of random numbers."""
    size = 8192 if args.device == "cuda" else 256
    a, b = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(args.device, lambda: a @ b, args.repeats) / 1e9


# -- what is trained --------------------------------------------------------------------------------------------------


def build(args, strides: str, loss: str = "paper") -> Pgl | PlacesPgl:
    """The paper's network, or a tiny one, the same every time."""
    small = {"depths": (1, 1, 1, 1), "width": 8} if args.tiny else {}
    encoder, heads = build_encoder(stage_strides=strides, **small), (32, 16) if args.tiny else (4096, 256)
    if loss == "paper":
        net = Pgl(encoder, *heads, *feature_geometry(encoder, sizes(args)["views"], OUTPUT_STRIDE))
    else:
        maps = [feature_geometry(encoder, sizes(args)["views"], stride) for stride in BY_PLACE]
        net = PlacesPgl(encoder, *heads, maps, Objective(displacement=1.0))
        init_kaiming_uniform(net.place, 2)
    init_kaiming_uniform(net.online, 0)
    init_kaiming_uniform(net.predictor, 1)
    net.target.load_state_dict(net.online.state_dict())
    return net.train()


def sizes(args) -> dict:
    return SIZES["tiny" if args.tiny else "whole"]


def crops_of(args, num: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch as the stream brings it with stream.on_gpu=all: int16 crops, their priors and intensity parameters."""
    config = ViewsConfig(size=sizes(args)["views"])
    rng = np.random.default_rng(seed)
    shape = np.tile(2 * np.array(config.size), (num, 1))
    box, flip = sample_pairs(rng.random((num, PAIR_NUMBERS)), shape, config)
    intensity, noise_seed = sample_intensities(rng.random((num, 2, INTENSITY_NUMBERS)), IntensityConfig())
    batch = {"scaling": torch.tensor([[-400.0, 350.0]]).repeat(num, 1)}
    for k, view in enumerate(("1", "2")):
        batch["crop_" + view] = torch.from_numpy(rng.integers(-1100, 400, (num, 1, *largest_crop(config)), np.int16))
        batch["box_" + view], batch["flip_" + view] = torch.from_numpy(box[:, k]), torch.from_numpy(flip[:, k])
        batch["intensity_" + view] = torch.from_numpy(intensity[:, k]).float()
        batch["noise_seed_" + view] = torch.from_numpy(noise_seed[:, k])
    return {name: value.to(args.device) for name, value in batch.items()}


def augment(args, batch: dict[str, torch.Tensor]) -> Pair:
    """The views of a batch, made where it lies."""
    made = dict(batch)
    for view in ("1", "2"):
        prior = batch["box_" + view], batch["flip_" + view]
        views = render_each(batch["crop_" + view], *prior, sizes(args)["views"], WINDOW, batch["scaling"])
        params = batch["intensity_" + view], batch["noise_seed_" + view]
        made["view_" + view] = apply_intensities(views, *params, IntensityConfig().blur_sigma[1])
    return Pair.from_batch(made)


def autocast(args) -> torch.autocast:
    """As the doors train there: in bfloat16 on CUDA, in float32 on a CPU, whose bfloat16 gradients are wrong."""
    return on.autocast(torch.device(args.device), "auto")


# -- checks -----------------------------------------------------------------------------------------------------------


def checks(args) -> dict[str, float]:
    """Relative differences, ||a - b|| / ||b||: of losses, of all gradients together, of views."""
    pair = augment(args, crops_of(args, 4, 1))
    exact = loss_and_gradient(args, pair, "float32")
    others = {"float32, rounded by hand,": loss_and_gradient(args, pair, "float32", rounded)}
    if args.device == "cuda":  # a CPU's bfloat16 gradients are wrong
        others["bfloat16"] = loss_and_gradient(args, pair, "bfloat16")
    differences = {}
    for name, rough in others.items():
        for what, ours, theirs in zip(("loss", "gradient"), rough, exact):
            differences[f"{what}, {name} against float32"] = ((ours - theirs).norm() / theirs.norm()).item()
    return differences | {"views, device against CPU": views_apart(args)}


def loss_and_gradient(
    args, pair: Pair, precision: str, change: Callable[[nn.Module], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the paper's network, its blocks damped (see the top), after a change."""
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    net = build(args, "early")
    for path in (net.online, net.target):
        for name, part in path.named_modules():
            if name.endswith("bn3"):
                nn.init.constant_(part.weight, args.damped)
    if change:
        change(net)
    net = on.lay_out(net, torch.device(args.device))
    with on.autocast(torch.device(args.device), precision):
        loss = net(pair).loss
    loss.backward()
    torch.backends.cudnn.allow_tf32 = True
    return loss.detach().double().cpu(), flat_gradient(net)


class Rounded(torch.autograd.Function):
    """To bfloat16 and back, the gradient, too."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.bfloat16().float()


def rounded(net: nn.Module) -> None:
    """What bfloat16 does to activations and their gradients, in float32: rounds them before and after each layer."""
    for part in net.modules():
        if isinstance(part, (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)):
            part.register_forward_pre_hook(lambda part, given: tuple(map(Rounded.apply, given)))
            part.register_forward_hook(lambda part, given, made: Rounded.apply(made))


def views_apart(args) -> float:
    """The largest difference between a view made on the device and the same made on the CPU."""
    batch = crops_of(args, 4, 2)
    made, worst = augment(args, batch), 0.0
    for i, view in product(range(4), ("1", "2")):
        box, flip = (batch[name + view][i].cpu().numpy() for name in ("box_", "flip_"))
        crop = batch["crop_" + view][i, 0].cpu().numpy()[tuple(slice(n) for n in box[:, 1] - box[:, 0])]
        made_here = render(crop, sizes(args)["views"], flip, WINDOW, *batch["scaling"][i].tolist())
        std, *others = batch["intensity_" + view][i].tolist()
        params = Intensity(std, int(batch["noise_seed_" + view][i]), *others)
        made_here = torch.from_numpy(apply_intensity(made_here, params))
        other = getattr(made, "view_" + view)[i, 0].cpu()
        worst = max(worst, ((other - made_here).norm() / made_here.norm()).item())
    return worst


def flat_gradient(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in net.parameters() if p.grad is not None])


# -- pre-training -----------------------------------------------------------------------------------------------------


def step_row(args, strides: str, batch: int, peak_tflops: float) -> dict:
    """Times of one batch size; the parts are those of the same step, the network's own parts compiled one by one."""
    torch._dynamo.reset()
    device = torch.device(args.device)
    forget(args)
    net = on.lay_out(build(args, strides), device)
    flops = count_flops(args, net)
    for part in (net.online["encoder"], net.online["projector"], net.predictor, *net.target.values()):
        on.compiled(part, device, args.compile)
    make = partial(augment, args)
    if is_compiled(args) and args.device == "cuda":  # a CPU makes views by kernels of its own
        make = torch.compile(make, dynamic=False)
    lars = optim.build_lars(net, PretrainOptimConfig(lr=0.2, weight_decay=1.5e-6))
    schedule = optim.warmup_cosine(lars, 10, 10**6)
    batches = [crops_of(args, batch, seed) for seed in range(2)]

    def step(number: int, clock: Clock) -> None:
        clock.mark()
        pair = make(batches[number % 2])
        clock.mark()
        with autocast(args):
            views = pair.views
            projected = net.online["projector"](net.online["encoder"](views)[-1])
            clock.mark()
            with torch.no_grad():
                aimed = net.target["projector"](net.target["encoder"](views)[-1])
            clock.mark()
            matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, net.geometry)
            (query_1, query_2) = net.predictor(align(projected, matrices)).chunk(2)
            (key_1, key_2) = align(aimed, matrices).chunk(2)
            loss = local_consistency_loss(query_1, key_2) + local_consistency_loss(query_2, key_1)
        clock.mark()
        lars.zero_grad(set_to_none=True)
        loss.backward()
        clock.mark()
        lars.step()
        schedule.step()
        clock.mark()
        net.follow(0.996)
        clock.mark()

    rows, repeats = [], 2 if args.tiny else args.repeats
    for number in range(3 + repeats):
        clock = Clock(args.device)
        step(number, clock)
        rows.append(clock.milliseconds())
    parts = [statistics.median(column) for column in zip(*rows[3:])]
    encoder, views = net.online["encoder"], torch.randn(2 * batch, 1, *sizes(args)["views"], device=device)

    def forward_and_backward() -> None:
        with autocast(args):
            out = encoder(views)[-1]
        out.backward(torch.ones_like(out))

    encoder_ms, step_ms = median_ms(args.device, forward_and_backward, repeats), statistics.median(map(sum, rows[3:]))
    return {
        "fits": True,
        "compiled": is_compiled(args),
        "step_ms": step_ms,
        "pairs_per_s": 1000 * batch / step_ms,
        "tflops": flops["step"] * batch / step_ms / 1e9,
        "encoder_ms": encoder_ms,
        "encoder_tflops": flops["encoder"] * batch / encoder_ms / 1e9,
        "encoder_share_of_peak": flops["encoder"] * batch / encoder_ms / 1e9 / peak_tflops,
        "parts_ms": dict(zip(PARTS, parts)),
        "memory_gib": memory_gib(args),
        "hours_of_the_paper": PAPER_PAIRS / (1000 * batch / step_ms) / 3600,
    }


def forget(args) -> None:
    """Gives back what the measurement before has left."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_gib(args) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None


def is_compiled(args) -> bool:
    probe = on.compiled(nn.Identity(), torch.device(args.device), args.compile)
    return probe._compiled_call_impl is not None


def count_flops(args, net: Pgl) -> dict[str, float]:
    """FLOP per pair of the step, and of the online encoder's forward and backward pass."""
    pair, flops = augment(args, crops_of(args, 2, 3)), {}

    def only_encoder() -> None:
        with autocast(args):
            out = net.online["encoder"](pair.views)[-1]
        out.backward(torch.ones_like(out))

    def whole() -> None:
        with autocast(args):
            loss = net(pair).loss
        loss.backward()

    for name, work in (("encoder", only_encoder), ("step", whole)):
        with FlopCounterMode(display=False) as counter:
            work()
        flops[name] = counter.get_total_flops() / 2
    net.zero_grad(set_to_none=True)
    return flops


def step_line(row: dict) -> str:
    head = f"{row['strides']:<6} batch {row['batch']:>4}"
    if not row["fits"]:
        return f"{head}  does not fit into the memory"
    memory = "" if row["memory_gib"] is None else f", {row['memory_gib']:.1f} GiB"
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in row["parts_ms"].items())
    return (
        f"{head}  {row['step_ms']:8.2f} ms, {row['pairs_per_s']:7.1f} pairs/s, {row['tflops']:.1f} TFLOP/s; encoder "
        f"{row['encoder_tflops']:.1f} TFLOP/s ({row['encoder_share_of_peak']:.0%} of the peak){memory}; the paper's "
        f"training {row['hours_of_the_paper']:.2f} h\n         ms: {parts}"
    )


# -- whole steps ------------------------------------------------------------------------------------------------------


def whole_steps(args, way: str, loss: str = "paper") -> tuple[Pgl | PlacesPgl, Callable[[], torch.Tensor]]:
    """The network, and a pre-training step as the door makes it, which gives the loss."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.suppress_errors = False  # a way that does not work is to be seen
    forget(args)
    net = on.lay_out(build(args, "early", loss), torch.device(args.device))
    if WAYS[way] is not None:
        net.compile(dynamic=False, **WAYS[way])
    lars = optim.build_lars(net, PretrainOptimConfig(lr=0.2, weight_decay=1.5e-6))
    schedule = optim.warmup_cosine(lars, 10, 10**6)
    batches, number = [crops_of(args, args.batch, seed) for seed in range(2)], 0

    def step() -> torch.Tensor:
        nonlocal number
        torch.compiler.cudagraph_mark_step_begin()
        pair = augment(args, batches[number % 2])
        number += 1
        lars.zero_grad(set_to_none=True)
        with autocast(args):
            loss = net(pair).loss
        loss.backward()
        health.norm(p.grad for p in net.parameters() if p.grad is not None)
        lars.step()
        schedule.step()
        net.follow(0.996)
        return loss.detach()

    return net, step


def way_row(args, way: str, loss: str, eager: list[dict]) -> dict:
    """Steps that follow one another without a wait.

    Args:
        args: of the command line.
        way: one of `WAYS`.
        loss: one of `LOSSES`.
        eager: the row of the eager steps, to compare with; none: this is it.
    """
    try:
        net, step = whole_steps(args, way, loss)
        trained = {"first_loss": step().item(), "update_norm": flat_gradient(net).norm().item()}  # LARS leaves it there
        for _ in range(4):
            trained["last_loss"] = step().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler: any
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    repeats = 2 if args.tiny else args.repeats
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    host_ms = 1000 * (time.perf_counter() - began) / repeats
    settle(args)
    step_ms = 1000 * (time.perf_counter() - began) / repeats
    row = {
        "batch": args.batch,
        "uncompiled": on.uncompiled(),
        "step_ms": step_ms,
        "pairs_per_s": 1000 * args.batch / step_ms,
    }
    row |= {"host_ms": host_ms, "memory_gib": memory_gib(args), **trained}
    row |= {"launches": None, "waits": None, "hours_of_the_paper": PAPER_PAIRS / row["pairs_per_s"] / 3600}
    if args.device == "cuda":
        events = traced(args, step)
        row["launches"] = sum(event.count for event in events if any(name in event.key for name in LAUNCHES))
        row["waits"] = waits(step)
    if eager and "failed" not in eager[0]:
        row |= {f"{name} against eager": abs(value / eager[0][name] - 1) for name, value in trained.items()}
    return row


def settle(args) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def waits(step: Callable[[], torch.Tensor]) -> str | None:
    """The first operation of a step that makes the host wait for the device; none: there is none."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def way_line(row: dict, batch: int) -> str:
    head = f"{row['way']:<9} {row['loss']:<9} batch {batch:>4}"
    if "failed" in row:
        return f"{head}  {row['failed']}"
    memory = "" if row["memory_gib"] is None else f", {row['memory_gib']:.1f} GiB"
    launches = "" if row["launches"] is None else f", {row['launches']} launches, waits: {row['waits'] or 'never'}"
    against = "; ".join(f"{name} {value:.1e}" for name, value in row.items() if name.endswith("against eager"))
    return (
        f"{head}  {row['step_ms']:8.2f} ms ({row['host_ms']:.2f} of the host), {row['pairs_per_s']:7.1f} pairs/s; as "
        f"many as the paper's in {row['hours_of_the_paper']:.2f} h{memory}{launches}"
        + (f"\n         {against}" if against else "")
        + (f"\n         {row['uncompiled']}" if row["uncompiled"] else "")
    )


def traced(args, step: Callable[[], torch.Tensor]) -> list:
    """The profiler's sums of one step, by name."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (args.device == "cuda")
    settle(args)
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        settle(args)
    return list(profiler.key_averages())


def profile(args) -> dict:
    """The kernels of one eager step (on a CPU: operations) that take longest, and the time of all of them."""
    _, step = whole_steps(args, "eager")
    for _ in range(4):
        step()
    settle(args)
    began = time.perf_counter()
    step()
    settle(args)
    wall_ms, events = 1000 * (time.perf_counter() - began), traced(args, step)
    if args.device == "cuda":
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
        times = [(e.self_device_time_total / 1000, e.count, e.key) for e in kernels]
    else:
        times = [(e.self_cpu_time_total / 1000, e.count, e.key) for e in events]
    times.sort(reverse=True)
    top = [{"ms": ms, "count": count, "name": name} for ms, count, name in times[:20]]
    return {"batch": args.batch, "wall_ms": wall_ms, "kernels_ms": sum(ms for ms, *_ in times), "top": top}


def profile_table(profile: dict) -> str:
    head = f"batch {profile['batch']}: {profile['wall_ms']:.1f} ms, {profile['kernels_ms']:.1f} of them in kernels"
    lines = [f"  {row['ms']:8.2f} ms {row['count']:>5} x  {row['name'][:100]}" for row in profile["top"]]
    return "\n".join([head, *lines])


# -- fine-tuning and inference ----------------------------------------------------------------------------------------


def segmentation(args) -> dict[str, float | None]:
    """Milliseconds: a fine-tuning step of 8 patches, and one volume through the network, by patch size."""
    device, times_ms = torch.device(args.device), {}
    small = {"depths": (1, 1, 1, 1), "width": 8} if args.tiny else {}
    batch, classes, repeats = (2, 3, 2) if args.tiny else (8, 14, args.repeats)
    for size in sizes(args)["patches"]:
        torch._dynamo.reset()
        net = on.lay_out(Segmenter(build_encoder(**small), classes), device).train()
        model = on.compiled(net, device, args.compile)
        sgd = optim.build_finetuning(net, FinetuneOptimConfig())
        patches = torch.randn(batch, 1, *size, device=device)
        target = torch.randint(0, classes, (batch, 1, *size), device=device)

        def step(model=model, sgd=sgd, patches=patches, target=target) -> None:
            sgd.zero_grad(set_to_none=True)
            with autocast(args):
                loss = segmentation_loss(model(patches), target, "multiclass")
            loss.backward()
            sgd.step()

        times_ms[f"fine-tuning step, {batch} x {'x'.join(map(str, size))}"] = or_none(
            lambda step=step: median_ms(args.device, step, repeats)
        )
    size = sizes(args)["scan"]
    for precision in ("float32", "bfloat16"):  # as the doors infer; a GPU's float32 convolutions are TF32
        net = on.lay_out(Segmenter(build_encoder(**small), classes), device).eval()
        times_ms[f"inference, {'x'.join(map(str, size))}, {precision}"] = time_forward(net, size, repeats, precision)
    return times_ms


def or_none(measure: Callable[[], Any]) -> Any:
    """None where the memory is too small for it."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None


def segmentation_table(times_ms: dict[str, float | None]) -> str:
    texts = {name: "does not fit" if ms is None else f"{ms:.2f} ms" for name, ms in times_ms.items()}
    return "\n".join(f"{name:<44} {text}" for name, text in texts.items())


# -- the stream -------------------------------------------------------------------------------------------------------


def stream(args) -> dict[str, float]:
    """The bench door on a store: pairs per second of the stream, of the step, of both, and the share of waiting."""
    from pgl_ray import bench
    from pgl_ray.config import BenchConfig, build

    small = (
        {"views": {"size": sizes(args)["views"]}, "encoder": {"width": 8, "depths": [1, 1, 1, 1]}} if args.tiny else {}
    )
    settings = {"index": args.index, "global_batch_size": max(args.batches), "train": {"device": args.device}, **small}
    settings |= {"pairs_per_scan": 8, "epochs": 1000, "stream": {"pairs_per_region": 8, "on_gpu": "all"}}
    result = bench.run(build(BenchConfig, settings))
    names = ("data_pairs_per_s", "step_pairs_per_s", "both_pairs_per_s", "wait_share")
    return {name: getattr(result, name) for name in names}


def closing(results: dict) -> str:
    done = [row for row in results["steps"] + results["ways"] if "pairs_per_s" in row]
    done = [row for row in done if row.get("loss", "paper") == "paper"]
    if not done:
        return "no step was timed"
    best = max(done, key=lambda row: row["pairs_per_s"])
    text = f"best: {best['pairs_per_s']:.0f} pairs/s at batch {best['batch']}, {best.get('strides', 'early')} strides"
    text += (
        f", {best.get('way', 'compiled' if best.get('compiled') else 'eager')}: the paper's {PAPER_PAIRS:,} pairs in "
    )
    text += f"{60 * best['hours_of_the_paper']:.1f} minutes"
    if timed := [row for row in done if "parts_ms" in row]:
        row = max(timed, key=lambda row: row["pairs_per_s"])
        heads = sum(row["parts_ms"][name] for name in ("align and loss", "optimizer", "ema")) / row["step_ms"]
        text += f"; alignment, loss, optimizer and EMA take {heads:.0%} of a step"
    return text


if __name__ == "__main__":
    main()
