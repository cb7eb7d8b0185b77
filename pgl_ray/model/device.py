"""How networks compute on a device: precision, memory layout, compilation, recomputation; and batches on it."""

import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:  # MONAI's import would cost every process of a run five seconds
    from pgl_ray.model.resenc import ResEncoder
    from pgl_ray.model.resnet import Encoder

Net = TypeVar("Net", bound=nn.Module)
Moment = float | torch.cuda.Event  # as the host's clock or the device's stream has it
CPU = "cpu"  # the kind of every CPU
COMPILER_LOG = logging.getLogger("torch._dynamo.convert_frame")


def kind(device: torch.device) -> str:
    """What computes: cpu, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else CPU


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context of a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, precision))


def in_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether a precision means bfloat16; `auto` does where the GPU has it, else it is float32."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


def check_training_precision(kind: str, precision: str) -> None:
    """Refuses bfloat16 gradients on a CPU.

    oneDNN, with which PyTorch 2.13 computes there, leaves part of the gradient of a 3x3x3 convolution's weights
    unwritten where the map is two cells deep, as the last ones of the paper's views are: it holds what the memory held.

    Args:
        kind: cpu or cuda.
        precision: as in `train.precision`.

    Raises:
        ValueError: they were asked for.
    """
    if kind == "cpu" and precision == "bfloat16":
        raise ValueError("train.precision=bfloat16 computes wrong gradients on a CPU: use float32, or auto, there")


def lay_out(net: Net, device: torch.device) -> Net:
    """A network on a device; on CUDA with channels last, the layout of the tensor cores' 3D convolutions, of which the
    fastest are found by trying: the sizes never change.

    On a CPU the layout stays as it is, and 1x1x1 convolutions become `Pointwise`. Channels last took 0.5 to 0.7 of a
    narrow encoder's time there, but BatchNorm's sums are off by 2e-4 (torch 2.13, a million values a channel), which
    moves the gradients of a new network by 5 to 15 %.
    """
    if device.type != "cuda":
        for part in net.modules():
            if type(part) is nn.Conv3d and (part.kernel_size, part.padding, part.groups) == ((1, 1, 1), (0, 0, 0), 1):
                part.__class__ = Pointwise
        return net.to(device)
    torch.backends.cudnn.benchmark = True
    return net.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload] # torch's stubs lack it


class Pointwise(nn.Conv3d):
    """A convolution of 1x1x1 that is a product of matrices while a CPU trains it.

    Its backward pass takes 0.1 to 0.9 of the time of oneDNN's there (torch 2.13), its forward pass no longer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv3d`, of [N, C, D, H, W]."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        d, h, w = self.stride
        cells = input[..., ::d, ::h, ::w]
        matrices = self.weight.flatten(1).expand(len(cells), -1, -1), cells.flatten(2)
        out = torch.bmm(*matrices) if self.bias is None else torch.baddbmm(self.bias[:, None], *matrices)
        return out.unflatten(2, cells.shape[2:])


def compiled(model: nn.Module, device: torch.device, mode: str, world: int = 1) -> nn.Module:
    """Compiles a model in place (its keys stay as they are); what cannot be compiled runs as it is.

    Args:
        model: what is called, DDP's wrapper where there is one: gradients are then reduced while others are computed.
        device: where it computes.
        mode: on, off, or auto: on one GPU, where Triton is installed. With several, whose BatchNorm exchanges
            statistics in the middle of a forward pass, it was not measured: `on` tries it.
        world: workers together.
    """
    if mode == "auto":
        mode = "on" if device.type == "cuda" and world == 1 and has_triton() else "off"
    if mode == "on":
        torch._dynamo.config.suppress_errors = True
        if _failures() is None:
            COMPILER_LOG.addFilter(_Failures())
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # PyTorch's default for float32 products stays
        model.compile(dynamic=False)
    return model


class _Failures(logging.Filter):
    """Keeps the compiler's tracebacks, one for each function that it could not compile, off the console, unless
    PyTorch was asked for them (TORCHDYNAMO_VERBOSE=1).

    Attributes:
        reason: the last line of the newest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is printed."""
        text = record.getMessage()
        if torch._dynamo.config.verbose or not text.startswith("WON'T CONVERT"):
            return True
        error = re.split("\nfrom user code:|\nSet TORCHDYNAMO_VERBOSE", text)[0]  # what follows says where, and advises
        self.reason = error.strip().splitlines()[-1]
        return False


def _failures() -> _Failures | None:
    return next((one for one in COMPILER_LOG.filters if isinstance(one, _Failures)), None)


def uncompiled() -> str | None:
    """What of this process's compiled functions runs as it is, in a line; none: all was compiled, or nothing was asked
    for. Known after the first step."""
    counters = torch._dynamo.utils.counters
    frames, breaks = counters["frames"], counters["graph_break"]
    failed = frames["total"] - frames["ok"]
    if not failed and not breaks:
        return None
    reasons = "; ".join(" ".join(reason.split())[:120] for reason, _ in breaks.most_common(2))
    commonest = f", the commonest: {reasons}" if reasons else ""
    known = _failures()
    newest = f" ({known.reason[:160]})" if failed and known and known.reason else ""
    return (
        f"torch.compile: {failed} of {frames['total']} functions could not be compiled and run as they are{newest}, "
        f"{sum(breaks.values())} graph breaks{commonest}"
    )


def recompute(encoder: "Encoder | ResEncoder") -> None:
    """Makes an encoder keep only its stages' outputs for the backward pass and compute the rest again: about a third
    more time, and a fraction of the memory.

    A stage's BatchNorms then see every batch twice: their momentum is set so that their running statistics come out as
    if it were once.
    """
    for stage in encoder.running_stages():
        for part in stage.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = part.momentum and 1 - math.sqrt(1 - part.momentum)  # none: a mean of all batches
        stage.forward = _Recomputed(stage.forward)  # type: ignore[method-assign] # so the weights keep their names


class _Recomputed:
    """A forward function whose intermediate results are not kept where gradients are wanted."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return checkpoint(self.forward, x, use_reentrant=False, preserve_rng_state=False)


class Batches:
    """A stream's batches on the device that computes, in their order; its errors and its end come where they came.

    On a GPU each is copied by a stream of its own while the device still works on the batch before. The host is never
    more than a step ahead of the device, so a few batches are there at a time and no more.
    """

    def __init__(self, source: Iterable[dict[str, Tensor]], device: torch.device, stay: Set[str] = frozenset()):
        """
        Args:
            source: batches on the host, pinned where the device is a GPU.
            device: where they go.
            stay: columns that are left on the host, where they are read without waiting for the device.
        """
        self.source, self.device, self.stay = source, device, stay
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waits: list[tuple[Moment, Moment]] = []  # asked for, there: as the device sees it

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        asked = self._now()
        for batch in self.source:
            if self.copies is not None:
                batch = self._copied(batch, self.copies)
            self.waits.append((asked, self._now()))
            yield batch
            asked = self._now()

    def waited_s(self) -> float:
        """Seconds since the last call in which nothing was left to compute and a batch was waited for.

        On a GPU between two events of its own: a host that waits for a batch while the device is busy costs nothing.
        """
        waits, self.waits = self.waits, []
        _wait_for(waits[-1:])
        return sum(_seconds(*wait) for wait in waits)

    def _now(self) -> Moment:
        if self.copies is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _copied(self, batch: dict[str, Tensor], copies: torch.cuda.Stream) -> dict[str, Tensor]:
        _wait_for(self.waits[-1:])  # the step before the last is done
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(copies):
            moved = {
                name: column if name in self.stay else column.to(self.device, non_blocking=True)
                for name, column in batch.items()
            }
        compute.wait_stream(copies)
        for name in moved.keys() - self.stay:
            moved[name].record_stream(compute)  # its memory is not reused before it is computed with
        return moved


def _wait_for(waits: list[tuple[Moment, Moment]]) -> None:
    """Until the device has come to where these ended."""
    for _, end in waits:
        if isinstance(end, torch.cuda.Event):
            end.synchronize()


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    raise TypeError("one moment is the host's, the other the device's")
