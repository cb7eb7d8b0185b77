"""What PGL by place might gain from what other methods have: one change at a time, screened by the three judges.

python tests/benchmarks/promise_variants.py STORE RUNS VARIANT[,VARIANT...] [SEEDS=0]

Each is trained as `promise.py train steps=300 scans=5` trains PGL by place, with the rate and decay of
`results/promise_openkbp.json`, and judged with three decoders and BatchNorm re-estimated; `base` is PGL by place
itself. Typed again, it goes on. What does not win with three seeds or more is not built into pgl_ray.

koleo: features of a pair spread out, by the log distance of each to its nearest (weight 0.1).
variance: each channel of the drawn bins keeps a standard deviation of 1, channels uncorrelated (weights 1 and 0.04).
global: the means over a view's bins name the pair among those of the batch (weight 0.25).
masked: the online path's views lack a quarter of 4 x 4 x 4 blocks.
groupnorm: instead of BatchNorm, in both paths.
batch: the contrast's negatives are those of the batch.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

import promise  # noqa: E402
import train_loop  # noqa: E402
from promise_tables import BEST, JUDGES, NUM_LABELLED  # noqa: E402

from pgl_ray import pretrain  # noqa: E402
from pgl_ray.config import ProbeConfig, build  # noqa: E402
from pgl_ray.data.store import read_index  # noqa: E402
from pgl_ray.judge.judges import Judges  # noqa: E402
from pgl_ray.model.places import PlacesPgl  # noqa: E402
from pgl_ray.train import checkpoint, networks  # noqa: E402

SEARCHED = Path(__file__).parent / "results" / "promise_openkbp.json"
STEPS, DECODERS = 300, 3
BLOCKS, HIDDEN = 4, 0.25  # per axis; share of them


# -- terms beside the contrast, of aligned queries and keys [N, C, bins] --------------------------------------------


def koleo(query: Tensor, _: Tensor) -> Tensor:
    """-0.1 times the mean log distance of each unit vector to the nearest of its pair (Sablayrolles et al. 2019)."""
    unit = F.normalize(query.float(), dim=1).transpose(1, 2)  # [N, bins, C]
    cosine = unit @ unit.transpose(1, 2) - 2 * torch.eye(unit.shape[1])
    return -0.1 * (2 - 2 * cosine.amax(2)).clamp_min(1e-8).sqrt().log().mean()


def variance(query: Tensor, _: Tensor) -> Tensor:
    """VICReg's variance and covariance (Bardes et al. 2022) of unit vectors, scaled to a mean square of 1 a channel."""
    num_channels = query.shape[1]
    rows = (F.normalize(query.float(), dim=1) * num_channels**0.5).transpose(1, 2).flatten(0, 1)  # [N * bins, C]
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / (len(rows) - 1)
    off = (covariance.square().sum() - covariance.diagonal().square().sum()) / num_channels
    return F.relu(1 - (rows.var(0) + 1e-4).sqrt()).mean() + 0.04 * off


def between_pairs(query: Tensor, key: Tensor) -> Tensor:
    """A quarter of the contrast of the views' means, each pair against the batch's others."""
    mine, theirs = (F.normalize(part.float().mean(2), dim=1) for part in (query, key.detach()))
    return 0.25 * F.cross_entropy(mine @ theirs.T / 0.1, torch.arange(len(mine)))


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"koleo": koleo, "variance": variance, "global": between_pairs}


# -- changes of the network -------------------------------------------------------------------------------------------


def with_masks(encoder: nn.Module) -> None:
    """In training the encoder sees views without a quarter of their blocks, drawn by what the views hold."""

    def hide(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not module.training:
            return None
        (views,) = args
        seed = int(views[:, :, 0, 0, 0].double().sum().abs().mul(1e6).item()) % 2**31
        drawn = torch.rand(len(views), 1, *[BLOCKS] * 3, generator=torch.Generator().manual_seed(seed))
        return (views * F.interpolate((drawn > HIDDEN).float(), size=views.shape[2:], mode="nearest"),)

    encoder.register_forward_pre_hook(hide)


def with_group_norm(module: nn.Module) -> None:
    """Every BatchNorm becomes a GroupNorm of up to eight groups of four channels or more."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.BatchNorm3d):
            groups = max(1, min(8, part.num_features // 4))
            setattr(module, name, nn.GroupNorm(groups, part.num_features))
        else:
            with_group_norm(part)


NETWORKS: dict[str, Callable[[PlacesPgl], None]] = {
    "masked": lambda net: with_masks(net.online["encoder"]),
    "groupnorm": lambda net: with_group_norm(nn.ModuleList([net.online["encoder"], net.target["encoder"]])),
}
VARIANTS = ("base", *TERMS, *NETWORKS, "batch")


def screened(store: str, runs: Path, variant: str, seed: int) -> dict[str, float]:
    """What the judges say of one training, which is done where it is not."""
    run, output = runs / f"{variant}, seed {seed}", runs / f"{variant}, seed {seed}.json"
    if output.exists():
        return json.loads(output.read_text())
    contrast, plain = PlacesPgl.direction_loss, networks.build_pretraining

    def compare(net: PlacesPgl, query: Tensor, key: Tensor) -> Tensor:
        return contrast(net, query, key) + (TERMS[variant](query, key) if variant in TERMS else 0)

    def changed(config):
        net, geometry = plain(config)
        NETWORKS.get(variant, lambda _: None)(net)
        return net, geometry

    arm = "pgl, by place, negatives of the batch" if variant == "batch" else BEST
    config = promise.chosen_pretraining(store, run, arm, seed, STEPS, SEARCHED)
    began = time.monotonic()
    with (
        mock.patch.object(PlacesPgl, "direction_loss", compare),
        mock.patch.object(pretrain, "build_pretraining", changed),
    ):
        promise.report_stop(run, train_loop.train(config))
    net = changed(config)[0]
    net.load_state_dict(checkpoint.state_of(str(run))["model"])
    settings = {"index": store, "seed": seed, "num_scans": NUM_LABELLED, "size": promise.BASE["views"]["size"]}
    panel = Judges(
        read_index(store), build(ProbeConfig, settings | promise.SPLITS | {"init": "random"}), JUDGES, DECODERS
    )
    scores = panel.judge(net.online["encoder"].eval(), "trained" if variant == "groupnorm" else "reestimated")
    values = {judge: score.value for judge, score in scores.items()} | {
        "by_decoder": scores["decoder"].details["seeds"]
    }
    output.write_text(json.dumps({"variant": variant, "seed": seed, **values}))
    print(f"{variant}, seed {seed}: {values} in {time.monotonic() - began:.0f} s", flush=True)
    return values


def main() -> None:
    """See the top."""
    store, runs, names, *rest = sys.argv[1:]
    seeds = [int(seed) for seed in (rest[0] if rest else "0").removeprefix("SEEDS=").split(",")]
    if unknown := [name for name in names.split(",") if name not in VARIANTS]:
        raise SystemExit(f"{unknown[0]!r} is no variant: {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    for seed in seeds:
        for name in names.split(","):
            screened(store, Path(runs), name, seed)


if __name__ == "__main__":
    main()
