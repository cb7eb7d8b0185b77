"""The controls that the collapse alarm was set by, and what else might have been watched.

python tests/benchmarks/health_controls.py draw OUT.png
    the recorded trainings of tests/golden/health_controls.json as one picture: health figures on OpenKBP, phantoms and
    blank scans (encoder of width 8, views of 32x64x64 and 16x48x48, 28 November 2026), sound ones, wrong priors and
    3,000 steps among them, and ones made to collapse: no predictor, no stop-gradient, blank scans, the rate times 10
    and 30
python tests/benchmarks/health_controls.py record STORE OUT.json [NAME ...]
    trains CONTROLS anew (150 steps, views of 16x48x48, one thread) with every candidate for an alarm in each row, where
    they are not there yet: the cosine at the same place less that at another scan's, retrieval@1 as a multiple of what
    the scan alone gives, and how far from its own place a place is found in the other view, as a share of chance (mm)
python tests/benchmarks/health_controls.py table OUT.json
    what of each candidate the sound and the collapsed trainings reach in their second half
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch.nn.functional as F

from pgl_ray.config import PretrainConfig, build
from pgl_ray.data import store, trainings
from pgl_ray.model.byol import Byol, pool
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.pgl import Output, Pair, Pgl, align
from pgl_ray.prior import Geometry, interpolation_matrices
from pgl_ray.train import health, networks, one_step, optim

GOLDEN = Path(__file__).parents[1] / "golden" / "health_controls.json"
STEPS, EVERY, FLOAT32 = 150, 10, torch.autocast("cpu", enabled=False)
PLACES = {
    "align": {"flip": False, "output_stride": [8, 16, 16], "more_strides": [[2, 4, 4], [4, 8, 8]]},
    "loss": {"kind": "contrast", "displacement": 1.0},
}
# name -> what the config says beyond the base, and what is broken
SOUND = {
    "pgl": ({}, ""),
    "byol": ({"method": "byol"}, ""),
    "genesis": ({"method": "genesis"}, ""),
    "pgl, by place": (PLACES, ""),
    "pgl, wrong priors": ({"align": {"wrong_priors": True}}, ""),
}
COLLAPSED = {
    f"{name}, {fault}": (own, fault)
    for name, (own, _) in list(SOUND.items())[:2]
    for fault in ("no predictor", "no stop-gradient", "blank scans", "rate x 30")
}
CANDIDATES = {
    "directions": "directions that features spread over",
    "cosine_gap": "cosine at the same place less elsewhere (of what is compared)",
    "encoder_cosine_gap": "the same of the encoder's map",
    "retrieval": "retrieval@1 of the encoder's map over what the scan alone gives",
    "error": "distance between a place and where it is found, as a share of chance",
}


def controls(collapsed: bool) -> dict[str, list[dict[str, float]]]:
    """Name -> rows of health figures of the sound or the collapsed trainings."""
    golden = json.loads(GOLDEN.read_text())
    return {
        name: [{key: value for key, value in zip(golden["columns"], row) if value is not None} for row in one["rows"]]
        for name, one in golden["controls"].items()
        if one["collapsed"] == collapsed
    }


def draw(path: str) -> None:
    """`health.directions` of every recorded control over the share of its training."""
    figure, axes = plt.subplots(figsize=(9, 5))
    for kind, color in (("sound", "tab:green"), ("collapsed", "tab:red")):
        for number, rows in enumerate(controls(kind == "collapsed").values()):
            values = [max(health.directions(row), 1e-3) for row in rows]
            share = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(share, values, color=color, alpha=0.6, label=kind if number == 0 else None)
    axes.axhline(health.COLLAPSED, color="black", linestyle="--", label=f"alarm below {health.COLLAPSED}")
    axes.set(yscale="log", xlabel="share of the recorded training", ylabel="directions that features spread over")
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


# -- trained anew, with every candidate -------------------------------------------------------------------------------


def record(where: str, own: dict, fault: str) -> list[dict[str, float]]:
    """Trains one control; its rows of candidates."""
    values = {"index": where, "run": "r", "split": "train", "max_steps": STEPS, "global_batch_size": 16, "seed": 0}
    values |= {"encoder": {"width": 8, "depths": [1, 1, 2, 1]}, "heads": {"hidden": 256, "out": 64}}
    values |= {"views": {"size": [16, 48, 48], "foreground": True}, "ema_decay": 0.97, **own}
    values |= {} if own.get("method") == "genesis" else {"optim": {"lr": 2.4}}  # as promise.py has it
    config = build(PretrainConfig, values)
    index = store.read_index(where)
    plan = trainings.make_plan(config, index)
    spacing_mm = {scan.scan_id: scan.spacing_mm for scan in index.scans}
    render = trainings.make_renderer(config, index, plan)
    net, geometry = networks.build_pretraining(config)
    net = broken(net.train(), fault)
    rate = config.optim.lr * (30 if fault == "rate x 30" else 1)
    optimizer, rows = optim.build_pretraining(net, config.optim.model_copy(update={"lr": rate})), []
    schedule = optim.warmup_cosine(optimizer, STEPS // 10, STEPS)
    for step in range(STEPS):
        columns = plan.columns(step, step + 1)
        batch = {name: torch.from_numpy(np.array(column)) for name, column in render(columns).items()}
        if fault == "blank scans":
            batch |= {name: torch.zeros_like(batch[name]) for name in ("view_1", "view_2")}
        pair = Pair.from_batch(batch)
        pair = pair.with_wrong_priors() if config.align.wrong_priors else pair
        decay = optim.ema_decay(step, STEPS, config.ema_decay)
        done = one_step.train_step(net, net, optimizer, schedule, pair, decay, FLOAT32)
        if step % EVERY == 0 or step == STEPS - 1:
            mm = torch.tensor([spacing_mm[plan.scan_ids[scan]] for scan in columns["scan"]])
            mm = mm.roll(1, 0) if config.align.wrong_priors else mm
            row = health.panel(net, done.output, done.pair, geometry)
            rows.append(
                {"step": step + 1, **candidates(row), "error": error(net, done.output, done.pair, geometry, mm)}
            )
            if not np.isfinite(done.output.loss.item()):
                break
    return rows


def broken(net: nn.Module, fault: str) -> nn.Module:
    """The network with one thing taken away."""
    if fault == "no predictor":
        net.predictor = nn.Identity()
    if fault == "no stop-gradient":
        net.forward = lambda pair: without_stop_gradient(net, pair)
    return net


def without_stop_gradient(net: Pgl | Byol, pair: Pair) -> Output:
    """Both losses where the keys are the online path's own, and learn, too."""
    maps, priors = net.online["encoder"](pair.views)[-1], (pair.boxes, pair.flips, pair.regions)
    read = pool if isinstance(net, Byol) else lambda y: align(y, interpolation_matrices(*priors, net.geometry))
    y = maps if isinstance(net, Pgl) else read(maps)
    key = net.online["projector"](y)
    key = read(key) if isinstance(net, Pgl) else key
    (query_1, query_2), (key_1, key_2) = net.predictor(key).chunk(2), key.chunk(2)
    # not `local_consistency_loss`, which lets no gradient reach the key
    loss = sum(4 - 4 * F.cosine_similarity(*both, dim=1).mean() for both in ((query_1, key_2), (query_2, key_1))) / 2
    return Output(loss, maps.detach(), query_1.detach(), key_2.detach())


def candidates(row: dict[str, float]) -> dict[str, float]:
    """What an alarm might look at, of a row of the health panel."""
    compared = "health/" if "health/cosine_aligned" in row else "health/view_"
    found = {"directions": health.directions(row)}
    for name, prefix in (("cosine_gap", compared), ("encoder_cosine_gap", "health/encoder_")):
        if f"{prefix}cosine_aligned" in row:
            found[name] = row[f"{prefix}cosine_aligned"] - row[f"{prefix}cosine_shuffled"]
    if "health/encoder_retrieval" in row:
        found["retrieval"] = row["health/encoder_retrieval"] / row["health/encoder_retrieval_chance"]
    return found


@torch.no_grad()
def error(net: nn.Module, output: Output, pair: Pair, geometry: Geometry, spacing_mm: Tensor) -> float:
    """How far in mm from its own place a place of view 1 is found among those of view 2 by the encoder's map, the
    median over all, as a share of the median distance of two places of one overlap."""
    matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, geometry)
    maps = align(net.plain_maps(pair.views) if isinstance(net, Genesis) else output.maps, matrices)
    maps = F.normalize(maps - maps.mean((0, 2, 3, 4), keepdim=True), dim=1).flatten(2)
    one, two = maps.chunk(2)  # [N, C, places]
    share = [(torch.arange(len(matrix[0])) + 0.5) / len(matrix[0]) for matrix in matrices]
    at = torch.stack(torch.meshgrid(*share, indexing="ij"), -1).flatten(0, 2)  # [places, 3]
    region = pair.regions[: len(one)].float()
    at = at * ((region[..., 1] - region[..., 0]) * spacing_mm)[:, None]  # [N, places, 3], mm
    found = (one.transpose(1, 2) @ two).argmax(2)
    distance = torch.linalg.vector_norm(at.gather(1, found[..., None].expand_as(at)) - at, dim=2)
    chance = torch.cdist(at, at).flatten(1).median(1).values
    return (distance.median(1).values / chance).median().item()


def records(where: str, path: Path, names: list[str]) -> None:
    """Adds what is not there yet to the file."""
    torch.set_num_threads(1)
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name, (own, fault) in (SOUND | COLLAPSED).items():
        if name in rows or (names and name not in names):
            continue
        rows[name] = [{k: round(v, 4) for k, v in row.items()} for row in record(where, own, fault)]
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
        path.write_text("{\n" + lines + "\n}\n")
        print(name, rows[name][-1], flush=True)


def table(rows: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Markdown: of each candidate the extremes over the rows in the second half of sound and of collapsed trainings."""
    yield "| candidate | sound | made to collapse | apart |"
    yield "|---|---|---|---|"
    for name, text in CANDIDATES.items():
        values = [
            [row[name] for key in kind for row in rows[key][len(rows[key]) // 2 :] if name in row]
            for kind in (SOUND, COLLAPSED)
        ]
        bounds = [(min(one), max(one)) for one in values]
        apart = bounds[0][0] > bounds[1][1] or bounds[0][1] < bounds[1][0]
        cells = " | ".join(f"{low:.2f} to {high:.2f}" for low, high in bounds)
        yield f"| {text} | {cells} | {'yes' if apart else 'no'} |"


def main() -> None:
    """See the top."""
    verb, *rest = sys.argv[1:]
    if verb == "draw":
        draw(*rest)
    elif verb == "record":
        records(rest[0], Path(rest[1]), rest[2:])
    else:
        print(*table(json.loads(Path(rest[0]).read_text())), sep="\n")


if __name__ == "__main__":
    main()
