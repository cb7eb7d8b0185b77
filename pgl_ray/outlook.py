"""What the settings of a pre-training come to, worked out before its first step: how often the target turns over, the
sum of the rates, the share of clamped bins, and what to change where these are off. `pretrain` prints it."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pgl_ray.config import OPTIM_DEFAULTS, PretrainConfig
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.store import Index
from pgl_ray.data.stream import Plan
from pgl_ray.model.pgl import Pair, feature_geometry
from pgl_ray.model.places import drawn_bins
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, clamped_bins, clamped_shares, triple
from pgl_ray.train import optim

MIN_TURNOVER = 4.0  # runs of less (200 steps at 0.99: 1) learned little
MIN_REACH = 0.5  # of a weight's norm, that LARS can move it by in a run: with less, layers stay nearly as they were
# The same in a step, at momentum 0.9 for a rate of 10: PGL by place trained well at 7.2, and the recorded
# controls at ten times their rate collapsed.
MAX_STEP = 0.1
HIGH_RATES = {"adamw": 0.02, "sgd": 1.0}  # more is rather one of LARS, as the presets give it
MAX_CLAMPED = 0.2  # of the bins of an axis
SHORT_DECAY = 0.9  # no lower one is recommended: BYOL's lowest that still learns (Grill et al. 2020, Table 5a)
PAPER_TURNOVER, PAPER_RATES = "the paper's: 14", "the paper's: 706"  # 7,060 steps, omega 0.996, LARS at 0.2
EPSILON = 1e-6  # of the sums
NUM_PAIRS = 512  # that clamping is counted on
AT_A_TIME = 32  # pairs


class Outlook(NamedTuple):
    """What can be said beforehand.

    Attributes:
        facts: target_turnover (not of genesis), sum_of_rates, and of pgl clamped_share (D, H, W) of the bins compared.
        lines: the same in words, then what to change.
    """

    facts: dict[str, Any]
    lines: list[str]


def of(
    config: PretrainConfig,
    index: Index,
    plan: Plan,
    renderer: PairRenderer,
    encoder: Encoder | ResEncoder,
    geometry: Geometry,
) -> Outlook:
    """The outlook of a run.

    Args:
        config: of the run.
        index, plan, renderer: its scans, what is drawn of them when, and how.
        encoder, geometry: its encoder, and the frame of the map that is compared.
    """
    facts = {"sum_of_rates": _sum_of_rates(config, plan, plan.num_steps)}
    rates, notes = f"the rates add up to {facts['sum_of_rates']:.1f}", []
    if config.optim.kind == "lars":
        rates += f" ({PAPER_RATES})"
        notes += _rates_off(config, plan, facts["sum_of_rates"])
    elif config.optim.lr > HIGH_RATES[config.optim.kind]:
        lr, kind = config.optim.lr, config.optim.kind
        own = f"its own: {OPTIM_DEFAULTS[kind]['lr']:g}"
        notes.append(f"note: optim.lr={lr:g} is high for {kind} ({own}): if it was meant for lars, take optim.lr=null")
    if config.method == "genesis":
        return Outlook(facts, [f"in {plan.num_steps} steps {rates}", *notes])
    turned = facts["target_turnover"] = optim.turnover(plan.num_steps, config.ema_decay)
    lines = [f"in {plan.num_steps} steps the target turns over {turned:.1f} times ({PAPER_TURNOVER}) and {rates}"]
    if turned < MIN_TURNOVER - EPSILON:
        notes.append(f"note: {_slow_target(config, plan.num_steps, turned)}")
    if config.method == "pgl":
        compared = _Compared(config, encoder, _Views(index, plan, renderer))
        of_maps = compared.of_maps(geometry.view_size, geometry.output_stride)
        shares = _together(of_maps)
        facts["clamped_share"] = list(shares)
        worst = max(of_maps, key=lambda one: max(one.shares))
        of_worst = f" of those compared, {_percent(worst.shares)} on the map of stride {_listed(worst.stride)}"
        lines.append(
            f"clamped bins (D, H, W): {_percent(shares)}{of_worst if len(of_maps) > 1 else ''}, counted on {NUM_PAIRS} "
            "pairs"
        )
        if max(shares) > MAX_CLAMPED:
            notes.append(f"note: {_clamped(compared, shares, encoder, geometry)}")
    return Outlook(facts, lines + notes)


def _sum_of_rates(config: PretrainConfig, plan: Plan, num_steps: int) -> float:
    """Of the run's rate, or of as many steps."""
    warmup = optim.warmup_steps(config.optim, plan.rows_per_epoch, plan.global_batch_size, num_steps)
    return optim.sum_of_rates(config.optim.lr, warmup, num_steps)


def _rates_off(config: PretrainConfig, plan: Plan, rates: float) -> list[str]:
    """That LARS gets nowhere, or too far at once, and which settings would mend it; nothing where neither is so."""
    reach, step = (optim.lars_reach(config.optim, one) for one in (rates, config.optim.lr))
    if step > MAX_STEP + EPSILON:
        most = _two_digits(config.optim.lr * MAX_STEP / step, math.floor)
        return [
            f"note: the rate is high: LARS at {config.optim.lr:g} moves a weight by up to {step:.2g} of its norm a "
            f"step, more than {MAX_STEP}, where features may collapse: take optim.lr={most:g} or less"
        ]
    if reach >= MIN_REACH - EPSILON:
        return []
    lr = _two_digits(config.optim.lr * MIN_REACH / reach, math.ceil)
    mend = f"optim.lr={lr:g} would"
    if optim.lars_reach(config.optim, lr) > MAX_STEP:
        needed = (
            num
            for num in itertools.count(plan.num_steps)
            if optim.lars_reach(config.optim, _sum_of_rates(config, plan, num)) * MAX_STEP / step >= MIN_REACH
        )
        most = _two_digits(config.optim.lr * MAX_STEP / step, math.floor)
        mend = f"max_steps={next(needed)} with optim.lr={most:g} would"
    return [
        f"note: the rates are low: LARS moves a weight by at most {reach:.2g} of its norm in {plan.num_steps} steps, "
        f"and should be able to by {MIN_REACH:g}: {mend}"
    ]


def _two_digits(value: float, rounded: Callable[[float], int]) -> float:
    """A number of two digits, rounded up or down."""
    places = 1 - math.floor(math.log10(value))
    return rounded(round(value * 10**places, 6)) / 10**places


def _slow_target(config: PretrainConfig, num_steps: int, turned: float) -> str:
    """That the target follows too slowly, and which setting would mend it."""
    decay = optim.slowest_decay(num_steps, MIN_TURNOVER)
    mend = f"ema_decay={decay}"
    if decay is None or decay < SHORT_DECAY:
        decay, longer = min(config.ema_decay, SHORT_DECAY), itertools.count(num_steps)
        num_steps = next(num for num in longer if optim.turnover(num, decay) >= MIN_TURNOVER - EPSILON)
        mend = f"max_steps={num_steps} with ema_decay={decay}"
    return (
        f"the target follows too slowly: it turns over {turned:.1f} times, fewer than {MIN_TURNOVER:.0f}; {mend} would "
        f"turn it over {optim.turnover(num_steps, decay):.1f} times"
    )


class _Views:
    """The first pairs of a run, with views of any size."""

    def __init__(self, index: Index, plan: Plan, renderer: PairRenderer):
        self.index, self.renderer = index, renderer
        rows = plan.columns(0, -(-NUM_PAIRS // plan.global_batch_size))
        self.rows = {name: column[:NUM_PAIRS] for name, column in rows.items()}
        self.shape = np.median(index.numbers("shape", plan.scan_ids), axis=0)

    def draw(self, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes [N, 2, 3, 2] and flips [N, 2, 3]."""
        views = self.renderer.views.model_copy(update={"size": tuple(size)})
        drawn = replace(self.renderer, views=views).draw(self.rows, self.index)
        return torch.from_numpy(drawn.box), torch.from_numpy(drawn.flip)

    def fit(self, size: tuple[int, ...]) -> bool:
        """Whether, along the axes where such views are larger than the run's, their smallest crop lies inside half of
        the scans or more."""
        crop = np.multiply(size, self.renderer.views.crop_scale[0])
        return bool(((crop <= self.shape) | np.equal(size, self.renderer.views.size)).all())


class _OfMap(NamedTuple):
    """Clamped bins of a map: its output stride, how many bins of a pair are compared there, and the share of these that
    is clamped (D, H, W), the mean of views."""

    stride: tuple[int, int, int]
    num_bins: int
    shares: tuple[float, float, float]


class _Compared:
    """The bins that a run compares, for views of any size and any output stride."""

    def __init__(self, config: PretrainConfig, encoder: Encoder | ResEncoder, views: _Views):
        self.config, self.encoder, self.views = config, encoder, views

    def of_maps(self, size: tuple[int, ...], stride: tuple[int, ...]) -> list[_OfMap]:
        """Of each map; of PGL by place, which draws those not clamped first, of the bins drawn."""
        align, (boxes, flips) = self.config.align, self.views.draw(size)
        maps = []
        for one in [*align.more_strides, stride]:
            geometry = feature_geometry(self.encoder, triple(size), triple(one), align.centers)[1]
            if self.config.beyond_paper:
                maps.append(self._drawn(boxes, flips, geometry))
            else:
                num = int(np.prod(np.array(size) // one))
                maps.append(_OfMap(triple(one), num, clamped_shares(boxes, flips, geometry)))
        return maps

    def _drawn(self, boxes: torch.Tensor, flips: torch.Tensor, geometry: Geometry) -> _OfMap:
        clamped = []  # [2N, bins, 3] of a few pairs at a time: a fine map has tens of thousands of bins
        for box, flip in zip(boxes.split(AT_A_TIME), flips.split(AT_A_TIME)):
            nothing = torch.empty(len(box), 0)
            pair = Pair(nothing, nothing, box[:, 0], box[:, 1], flip[:, 0], flip[:, 1])
            bins = drawn_bins(pair, geometry, self.config.loss.num_bins)
            axes = clamped_bins(pair.boxes, pair.flips, pair.regions, geometry)
            places = torch.unravel_index(bins.repeat(2, 1), [axis.shape[1] for axis in axes])
            clamped.append(torch.stack([axis.gather(1, at) for axis, at in zip(axes, places)], -1))
        shares = torch.cat(clamped).float().mean((0, 1))
        return _OfMap(geometry.output_stride, clamped[0].shape[1], triple(shares.tolist()))


def _together(of_maps: list[_OfMap]) -> tuple[float, float, float]:
    """The share of all bins that are compared."""
    total = sum(one.num_bins for one in of_maps)
    return triple(sum(one.num_bins * one.shares[axis] for one in of_maps) / total for axis in range(3))


def _clamped(
    compared: _Compared, shares: tuple[float, float, float], encoder: Encoder | ResEncoder, geometry: Geometry
) -> str:
    """That many bins are clamped, and which settings would mend it: larger views, or a finer map."""
    size, mends, align = geometry.view_size, [], compared.config.align
    finer = [stride for stride in sorted(set(encoder.strides), reverse=True) if stride < geometry.output_stride]
    for stride in (geometry.output_stride, *finer):
        if stride in align.more_strides or any(p % s for p, s in zip(size, stride, strict=True)):
            continue
        enough, clamped = _large_enough(compared, size, stride)
        if enough:
            keys = [f"views.size={_listed(enough)}"] if enough != size else []
            keys += [f"align.output_stride={_listed(stride)}"] if stride in finer else []
            mends.append(f"{' with '.join(keys)} would clamp {_percent(clamped)}")
        if mends and stride in finer:
            break  # a finer one still leaves more of the encoder out
    return (
        f"{_percent(shares)} of the bins lie beyond the outermost feature centres, where neighbours read the same "
        f"feature, more than {MAX_CLAMPED * 100:.0f} % on an axis: "
        + (", or ".join(mends) or "take larger views.size or a finer align.output_stride")
    )


def _large_enough(
    compared: _Compared, size: tuple[int, int, int], stride: tuple[int, int, int]
) -> tuple[tuple[int, int, int] | None, tuple[float, float, float]]:
    """The smallest views that clamp few bins at this output stride, none where the scans are too small, and the
    shares. Their sizes are multiples of the strides of all maps that are compared."""
    whole = np.lcm.reduce([stride, *compared.config.align.more_strides])
    shares = _together(compared.of_maps(size, stride))
    while max(shares) > MAX_CLAMPED:
        grown = []
        for length, step, share in zip(size, whole.tolist(), shares, strict=True):
            cells = length // step  # they clamp about a share in proportion to 1 / cells
            grown.append(step * (cells if share <= MAX_CLAMPED else max(cells + 1, int(cells * share / MAX_CLAMPED))))
        size = triple(grown)
        if not compared.views.fit(size):
            return None, shares
        shares = _together(compared.of_maps(size, stride))
    return size, shares


def _listed(value: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, value))}]"


def _percent(shares: tuple[float, ...]) -> str:
    return f"{', '.join(f'{share:.0%}'.removesuffix('%') for share in shares)} %"
