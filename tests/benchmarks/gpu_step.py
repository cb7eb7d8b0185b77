"""What a GPU makes of a training step: right first, then its time, part by part.

    python tests/benchmarks/gpu_step.py [--device cuda] [--batches 32 64 128 256 512] [--index STORE] [--out FILE.json]
    python tests/benchmarks/gpu_step.py --device cpu --tiny     # runs to the end in a minute; its figures mean nothing

Needs PyTorch, this package's source on PYTHONPATH, and of its dependencies monai, pytorch_optimizer, pydantic,
pydantic-core, typing-inspection, annotated-types and omegaconf (a CUDA machine without a package index gets them as
wheels); with --index, which measures the real stream, too, all that the package needs.

Checks: a bfloat16 step against float32's, a compiled step against the eager one, views made on the device against those
made on the CPU. Times: the whole step and its parts at each batch and both kinds of stage strides, of the compiled
network where Triton is there; share of the measured peak of a bfloat16 matrix product; fine-tuning and inference at the
paper's sizes. Medians of CUDA events; every timed step has its own random batch.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pgl_ray.config import IntensityConfig, LarsConfig, SgdConfig, ViewsConfig
from pgl_ray.data import views as v
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.losses import local_consistency_loss, segmentation_loss
from pgl_ray.model.pgl import Pair, Pgl, align, feature_geometry
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.prior import interpolation_matrices
from pgl_ray.train import optim

PAPER_PAIRS = 904_000  # 1,808 scans, 500 epochs (Sec. 5.1)
WINDOW = (-1024.0, 325.0)
OUTPUT_STRIDE = (8, 16, 16)
PARTS = ("augment", "online forward", "target forward", "align and loss", "backward", "optimizer", "ema")
SIZES = {"whole": {"views": (16, 96, 96), "patches": ((48, 160, 160), (64, 192, 192)), "scan": (64, 192, 192)}}
SIZES["tiny"] = {"views": (16, 32, 32), "patches": ((16, 32, 32),), "scan": (16, 32, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description="time of a training step on a GPU, and whether it is right")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--strides", nargs="+", default=["early", "late"], choices=("early", "late"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--tiny", action="store_true", help="a small network and small views")
    parser.add_argument("--index", help="a store: measures the stream on this machine's cores, alone and with the step")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: this machine has no CUDA device; --device cpu --tiny shows that the script runs"
        )
    torch.backends.cudnn.benchmark = True  # the sizes never change
    torch.set_num_threads(1 if args.tiny else torch.get_num_threads())
    found = {"machine": machine(args.device)}
    print("  ".join(f"{key} {value}" for key, value in found["machine"].items()), flush=True)
    found["peak_tflops"] = peak(args)
    print(f"bfloat16 matrix product: {found['peak_tflops']:.1f} TFLOP/s, the peak that shares refer to", flush=True)
    found["checks"] = checks(args)
    print(check_table(found["checks"]), flush=True)
    found["steps"] = []
    for strides in args.strides:
        for batch in args.batches:
            try:
                row = step_row(args, strides, batch, found["peak_tflops"])
            except torch.OutOfMemoryError:
                row = {"strides": strides, "batch": batch, "fits": False}
            found["steps"].append(row)
            print(step_line(row), flush=True)
    found["segmentation"] = segmentation(args)
    print(segmentation_table(found["segmentation"]), flush=True)
    if args.index:
        found["stream"] = stream(args)
        print("  ".join(f"{key} {value:.4g}" for key, value in found["stream"].items()), flush=True)
    print(closing(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


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


def build(args, strides: str) -> Pgl:
    """The paper's network, or a tiny one, the same every time."""
    small = {"depths": (1, 1, 1, 1), "width": 8} if args.tiny else {}
    encoder = build_encoder(stage_strides=strides, **small)
    level, geometry = feature_geometry(encoder, sizes(args)["views"], OUTPUT_STRIDE)
    net = Pgl(encoder, *((32, 16) if args.tiny else (4096, 256)), level, geometry)
    init_kaiming_uniform(net.online, 0)
    init_kaiming_uniform(net.predictor, 1)
    net.target.load_state_dict(net.online.state_dict())
    return net.train()


def sizes(args) -> dict:
    return SIZES["tiny" if args.tiny else "whole"]


def crops_of(args, num: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch as the stream brings it with resize_on=gpu: int16 crops, their priors and intensity parameters."""
    config = ViewsConfig(size=sizes(args)["views"])
    rng = np.random.default_rng(seed)
    shape = np.tile(2 * np.array(config.size), (num, 1))
    box, flip = v.sample_pairs(rng.random((num, v.PAIR_NUMBERS)), shape, config)
    intensity, noise_seed = v.sample_intensities(rng.random((num, 2, v.INTENSITY_NUMBERS)), IntensityConfig())
    batch = {"scaling": torch.tensor([[-400.0, 350.0]]).repeat(num, 1)}
    for k, view in enumerate(("1", "2")):
        batch["crop_" + view] = torch.from_numpy(
            rng.integers(-1100, 400, (num, 1, *v.largest_crop(config))).astype(np.int16)
        )
        batch["box_" + view], batch["flip_" + view] = torch.from_numpy(box[:, k]), torch.from_numpy(flip[:, k])
        batch["intensity_" + view] = torch.from_numpy(intensity[:, k]).float()
        batch["noise_seed_" + view] = torch.from_numpy(noise_seed[:, k])
    return {name: value.to(args.device) for name, value in batch.items()}


def augment(args, batch: dict[str, torch.Tensor]) -> Pair:
    """The views of a batch, made where it lies."""
    made = dict(batch)
    for view in ("1", "2"):
        prior = batch["box_" + view], batch["flip_" + view]
        views = v.render_each(batch["crop_" + view], *prior, sizes(args)["views"], WINDOW, batch["scaling"])
        params = batch["intensity_" + view], batch["noise_seed_" + view]
        made["view_" + view] = v.apply_intensities(views, *params, IntensityConfig().blur_sigma[1])
    return Pair.from_batch(made)


def autocast(args, precision: str = "bfloat16") -> torch.autocast:
    return on.autocast(torch.device(args.device), precision)


# -- checks -----------------------------------------------------------------------------------------------------------


def checks(args) -> dict[str, float]:
    """Relative differences, ||a - b|| / ||b||: of losses, of all gradients together, of views."""
    pair = augment(args, crops_of(args, 4, 1))
    found, gradients = {}, {}
    for name, precision, mode in (
        ("float32", "float32", "off"),
        ("bfloat16", "bfloat16", "off"),
        ("compiled bfloat16", "bfloat16", args.compile),
    ):
        torch._dynamo.reset()
        net = on.lay_out(build(args, "early"), torch.device(args.device))
        model = on.compiled(net, torch.device(args.device), mode)
        with autocast(args, precision):
            loss = model(pair).loss
        loss.backward()
        flat = torch.cat([p.grad.flatten().double().cpu() for p in net.parameters() if p.grad is not None])
        gradients[name] = loss.item(), flat
    for name, base in (("bfloat16", "float32"), ("compiled bfloat16", "bfloat16")):
        (loss, grad), (base_loss, base_grad) = gradients[name], gradients[base]
        found[f"loss, {name} against {base}"] = abs(loss - base_loss) / abs(base_loss)
        found[f"gradient, {name} against {base}"] = ((grad - base_grad).norm() / base_grad.norm()).item()
    batch = crops_of(args, 4, 2)
    made, worst = augment(args, batch), 0.0
    for i in range(4):
        for view in ("1", "2"):
            box, flip = (batch[name + view][i].cpu().numpy() for name in ("box_", "flip_"))
            crop = batch["crop_" + view][i, 0].cpu().numpy()[tuple(slice(n) for n in box[:, 1] - box[:, 0])]
            shown = v.render(crop, sizes(args)["views"], flip, WINDOW, *batch["scaling"][i].tolist())
            std, *others = batch["intensity_" + view][i].tolist()
            shown = v.apply_intensity(shown, v.Intensity(std, int(batch["noise_seed_" + view][i]), *others))
            other = getattr(made, "view_" + view)[i, 0].cpu()
            worst = max(worst, ((other - shown).norm() / shown.norm()).item())
    return found | {"views, device against CPU": worst}


def check_table(found: dict[str, float]) -> str:
    return "\n".join(f"  {name:<52} {value:.1e}" for name, value in found.items())


# -- pre-training -----------------------------------------------------------------------------------------------------


def step_row(args, strides: str, batch: int, peak_tflops: float) -> dict:
    """Times of one batch size; the parts are those of the same step, the network's own parts compiled one by one."""
    torch._dynamo.reset()
    device = torch.device(args.device)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    net = on.lay_out(build(args, strides), device)
    flops = count_flops(args, net)
    for part in (net.online["encoder"], net.online["projector"], net.predictor, *net.target.values()):
        on.compiled(part, device, args.compile)
    make = partial(augment, args)
    if is_compiled(args) and args.device == "cuda":  # a CPU makes views by kernels of its own
        make = torch.compile(make, dynamic=False)
    lars = optim.build_lars(net, LarsConfig())
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
        "strides": strides,
        "batch": batch,
        "fits": True,
        "compiled": is_compiled(args),
        "step_ms": step_ms,
        "pairs_per_s": 1000 * batch / step_ms,
        "tflops": flops["step"] * batch / step_ms / 1e9,
        "encoder_ms": encoder_ms,
        "encoder_tflops": flops["encoder"] * batch / encoder_ms / 1e9,
        "encoder_share_of_peak": flops["encoder"] * batch / encoder_ms / 1e9 / peak_tflops,
        "parts_ms": dict(zip(PARTS, parts)),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        "hours_of_the_paper": PAPER_PAIRS / (1000 * batch / step_ms) / 3600,
    }


def is_compiled(args) -> bool:
    probe = on.compiled(nn.Identity(), torch.device(args.device), args.compile)
    return probe._compiled_call_impl is not None


def count_flops(args, net: Pgl) -> dict[str, float]:
    """FLOP per pair of the step, and of the online encoder's forward and backward pass."""
    pair, found = augment(args, crops_of(args, 2, 3)), {}

    def encoder_alone() -> None:
        with autocast(args):
            out = net.online["encoder"](pair.views)[-1]
        out.backward(torch.ones_like(out))

    def whole() -> None:
        with autocast(args):
            loss = net(pair).loss
        loss.backward()

    for name, work in (("encoder", encoder_alone), ("step", whole)):
        with FlopCounterMode(display=False) as counter:
            work()
        found[name] = counter.get_total_flops() / 2
    net.zero_grad(set_to_none=True)
    return found


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


# -- fine-tuning and inference ----------------------------------------------------------------------------------------


def segmentation(args) -> dict[str, float | None]:
    """Milliseconds: a fine-tuning step of 8 patches, and one volume through the network, by patch size."""
    device, found = torch.device(args.device), {}
    small = {"depths": (1, 1, 1, 1), "width": 8} if args.tiny else {}
    batch, classes, repeats = (2, 3, 2) if args.tiny else (8, 14, args.repeats)
    for size in sizes(args)["patches"]:
        torch._dynamo.reset()
        net = on.lay_out(Segmenter(build_encoder(**small), classes), device).train()
        model = on.compiled(net, device, args.compile)
        sgd = optim.build_sgd(net, SgdConfig())
        patches = torch.randn(batch, 1, *size, device=device)
        target = torch.randint(0, classes, (batch, 1, *size), device=device)

        def step(model=model, sgd=sgd, patches=patches, target=target) -> None:
            sgd.zero_grad(set_to_none=True)
            with autocast(args):
                loss = segmentation_loss(model(patches), target, "multiclass")
            loss.backward()
            sgd.step()

        found[f"fine-tuning step, {batch} x {'x'.join(map(str, size))}"] = or_none(
            lambda step=step: median_ms(args.device, step, repeats)
        )
    size = sizes(args)["scan"]
    for precision in ("float32", "bfloat16"):
        torch._dynamo.reset()
        net = on.lay_out(Segmenter(build_encoder(**small), classes), device).eval()
        model, volume = on.compiled(net, device, args.compile), torch.randn(1, 1, *size, device=device)

        def infer(model=model, volume=volume, precision=precision) -> None:
            with torch.inference_mode(), autocast(args, precision):
                model(volume)

        found[f"inference, {'x'.join(map(str, size))}, {precision}"] = median_ms(args.device, infer, repeats)
    return found


def or_none(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None


def segmentation_table(found: dict[str, float | None]) -> str:
    texts = {name: "does not fit" if ms is None else f"{ms:.2f} ms" for name, ms in found.items()}
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
    settings |= {"pairs_per_scan": 8, "epochs": 1000, "stream": {"pairs_per_region": 8, "resize_on": "gpu"}}
    result = bench.run(build(BenchConfig, settings))
    names = ("data_pairs_per_s", "step_pairs_per_s", "both_pairs_per_s", "wait_share")
    return {name: getattr(result, name) for name in names}


def closing(found: dict) -> str:
    done = [row for row in found["steps"] if row["fits"]]
    if not done:
        return "no batch fits into the memory: give smaller --batches"
    best = max(done, key=lambda row: row["pairs_per_s"])
    heads = sum(best["parts_ms"][name] for name in ("align and loss", "optimizer", "ema")) / best["step_ms"]
    return (
        f"best: {best['pairs_per_s']:.0f} pairs/s at batch {best['batch']} with {best['strides']} strides: the paper's "
        f"{PAPER_PAIRS:,} pairs in {60 * best['hours_of_the_paper']:.1f} minutes; alignment, loss, optimizer and EMA "
        f"take {heads:.0%} of the step"
    )


if __name__ == "__main__":
    main()
