"""What the settings of a pre-training come to, worked out before its first step: how often the target turns over, the
sum of the rates, the share of clamped bins, and what to change where these are off. `pretrain` prints it."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pgl_ray.config import AlignConfig, PretrainConfig
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.store import Index
from pgl_ray.data.stream import Plan
from pgl_ray.model.pgl import feature_geometry
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, clamped_shares
from pgl_ray.train import optim

MIN_TURNOVER = 4.0  # runs of less (200 steps at 0.99: 1) learned little
MAX_CLAMPED = 0.2  # of the bins of an axis
SHORT_DECAY = 0.9  # no lower one is recommended: BYOL's lowest that still learns (Grill et al. 2020, Table 5a)
PAPER = "the paper's: 14 and 706"  # 7,060 steps, omega 0.996, rate 0.2
EPSILON = 1e-6  # of the sums
NUM_PAIRS = 512  # that clamping is counted on


class Outlook(NamedTuple):
    """What can be said beforehand.

    Attributes:
        facts: target_turnover (not of genesis), sum_of_rates, and of pgl clamped_share (D, H, W).
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
    warmup = optim.warmup_steps(config.optim, plan.rows_per_epoch, plan.global_batch_size, plan.num_steps)
    facts = {"sum_of_rates": optim.sum_of_rates(config.optim.lr, warmup, plan.num_steps)}
    rates, notes = f"the rates add up to {facts['sum_of_rates']:.1f}", []
    if config.method == "genesis":
        return Outlook(facts, [f"in {plan.num_steps} steps {rates}"])
    turned = facts["target_turnover"] = optim.turnover(plan.num_steps, config.ema_decay)
    lines = [f"in {plan.num_steps} steps the target turns over {turned:.1f} times and {rates} ({PAPER})"]
    if turned < MIN_TURNOVER - EPSILON:
        notes.append(f"note: {_slow_target(config, plan.num_steps, turned)}")
    if config.method == "pgl":
        views = _Views(index, plan, renderer)
        shares = clamped_shares(*views.draw(geometry.view_size), geometry)
        facts["clamped_share"] = list(shares)
        lines.append(f"clamped bins (D, H, W): {_percent(shares)}, counted on {NUM_PAIRS} pairs")
        if max(shares) > MAX_CLAMPED:
            notes.append(f"note: {_clamped(views, shares, encoder, geometry, config.align)}")
    return Outlook(facts, lines + notes)


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


def _clamped(
    views: _Views,
    shares: tuple[float, float, float],
    encoder: Encoder | ResEncoder,
    geometry: Geometry,
    align: AlignConfig,
) -> str:
    """That many bins are clamped, and which settings would mend it: larger views, or a finer map."""
    size, mends = geometry.view_size, []
    finer = [stride for stride in sorted(set(encoder.strides), reverse=True) if stride < geometry.output_stride]
    for stride in (geometry.output_stride, *finer):
        if stride in align.more_strides or any(p % s for p, s in zip(size, stride, strict=True)):
            continue
        map_geometry = feature_geometry(encoder, size, stride, align.centers)[1]
        enough, clamped = _large_enough(views, map_geometry, np.lcm.reduce([stride, *align.more_strides]))
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
    views: _Views, geometry: Geometry, whole: np.ndarray
) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
    """The smallest views that clamp few bins in this geometry, none where the scans are too small, and the shares.
    Their sizes are multiples of `whole` [3], the strides of all maps that are compared."""
    size = geometry.view_size
    shares = clamped_shares(*views.draw(size), geometry)
    while max(shares) > MAX_CLAMPED:
        grown = []
        for length, step, share in zip(size, whole.tolist(), shares, strict=True):
            cells = length // step  # they clamp about a share in proportion to 1 / cells
            grown.append(step * (cells if share <= MAX_CLAMPED else max(cells + 1, int(cells * share / MAX_CLAMPED))))
        size = tuple(grown)
        if not views.fit(size):
            return None, shares
        shares = clamped_shares(*views.draw(size), geometry._replace(view_size=size))
    return size, shares


def _listed(value: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, value))}]"


def _percent(shares: tuple[float, ...]) -> str:
    return f"{', '.join(f'{share:.0%}'.removesuffix('%') for share in shares)} %"
