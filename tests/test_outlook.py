"""What is said before a run, and the presets, against sums and loops that share no code with it."""

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pgl_ray import outlook, pretrain
from pgl_ray.config import FailedRun, PretrainConfig, build, load
from pgl_ray.data import stream, trainings
from pgl_ray.data.sampling import PAIR_NUMBERS, sample_pairs
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import Index, write_index
from pgl_ray.prior import Geometry, clamped_shares
from pgl_ray.train import launch, networks, nodes, optim

ROOT = Path(__file__).resolve().parents[1]
SCANS = {"cube": (128, 128, 128), "long": (150, 512, 512), "thin": (60, 512, 480)}  # of the presets' tests
CHUNK = '{"codecs": [{"configuration": {"chunk_shape": [8, 64, 64]}}]}'
SMALL = ["index=s", "run=r", "encoder.width=2", "encoder.depths=[1,1,1,1]", "heads.hidden=4", "heads.out=4"]


def loops_shares(boxes, flips, size, stride, center, by=0.0) -> list[float]:
    """Share of bins whose middle lies outside a view's outermost feature centres by more than `by` voxels, bin by
    bin."""
    shares = []
    for a in range(3):
        num, clamped, cells = 0, 0, size[a] // stride[a]
        for i, view, k in itertools.product(range(len(boxes)), range(2), range(cells)):
            low, high = (int(edge) for edge in boxes[i][view][a])
            start, stop = max(boxes[i][j][a][0] for j in (0, 1)), min(boxes[i][j][a][1] for j in (0, 1))
            place = start + (stop - start) * (k + 0.5) / cells
            seen = (place - low) / (high - low) * size[a]
            first, last = center[a], center[a] + stride[a] * (cells - 1)
            if flips[i][view][a]:  # the cells' centres as the flip leaves them
                first, last = size[a] - last, size[a] - first
            num, clamped = num + 1, clamped + (seen < first - by or seen > last + by)
        shares.append(clamped / num)
    return shares


def loops_compared(boxes, flips, size, strides, num_bins) -> tuple[list[float], list[float]]:
    """Share of clamped bins among those that PGL by place compares, of all maps and of the last: a pair's bins that no
    view clamps come first, the rest are as likely as each other."""
    totals, num = [], 0
    for stride in strides:
        cells = [p // s for p, s in zip(size, stride)]
        total, drawn = np.zeros(3), min(num_bins, math.prod(cells))
        for box, flip in zip(boxes, flips):
            outside = [[], []]  # per view and axis, of each bin along it
            for view, a in itertools.product(range(2), range(3)):
                (low, high), start = box[view][a], max(box[j][a][0] for j in (0, 1))
                stop, last = min(box[j][a][1] for j in (0, 1)), 0.5 + stride[a] * (cells[a] - 1)
                seen = [(start + (stop - start) * (k + 0.5) / cells[a] - low) / (high - low) for k in range(cells[a])]
                seen = [size[a] * (1 - one if flip[view][a] else one) for one in seen]
                outside[view].append([not 0.5 <= one <= last for one in seen])
            bins = list(itertools.product(*map(range, cells)))
            of_bins = np.array([[[outside[view][a][at[a]] for a in range(3)] for view in (0, 1)] for at in bins])
            invalid = of_bins[of_bins.any((1, 2))]
            rest = max(0, drawn - (len(bins) - len(invalid)))
            total += rest * invalid.mean((0, 1)) if rest else 0
        totals.append(total / len(boxes))
        num += drawn
    return (sum(totals) / num).tolist(), (totals[-1] / drawn).tolist()


def summed_turnover(num_steps, decay) -> float:
    """Eq. 10 with BYOL's schedule, step by step."""
    total = 0.0
    for step in range(num_steps):
        omega = 1 - (1 - decay) * (math.cos(math.pi * step / num_steps) + 1) / 2
        total += 1 - omega
    return total


def presets() -> list:
    """Every pre-training of a size of its own: conf/ but the paper's own (conf/pretrain.yaml), which is as it is, and
    the sweeps and grids that don't leave the size to conf/tune_small.yaml, but smoke, which shows that a sweep runs."""
    configs = {}
    for path in sorted((ROOT / "tune_spaces").glob("*.yaml")):
        base = (OmegaConf.to_container(OmegaConf.load(path)).get("base_pretrain") or {}) if path.stem != "smoke" else {}
        if "max_steps" in base:
            configs[path.stem] = base
    for path in sorted((ROOT / "conf").glob("pretrain_*.yaml")):
        configs[path.stem] = OmegaConf.to_container(OmegaConf.load(path))
    for path in sorted((ROOT / "conf").glob("tune_*.yaml")):
        configs[path.stem] = OmegaConf.to_container(OmegaConf.load(path))["base_pretrain"]
    assert {"pretrain_small", "pretrain_medium", "pretrain_full", "tune_small", "paper_phantom"} <= set(configs)
    return [pytest.param(k, build(PretrainConfig, {"index": "s", "run": "r", **configs[k]}), id=k) for k in configs]


@pytest.mark.parametrize(("name", "config"), presets())
def test_presets_have_a_target_that_turns_over(name, config):
    assert config.max_steps, f"{name}: a length in epochs would depend on the number of scans"
    assert summed_turnover(config.max_steps, config.ema_decay) >= 4


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("name", "config"), presets())
def test_presets_clamp_at_most_a_fifth_of_the_bins(name, config, scan):
    rng = np.random.default_rng(0)
    shape, num = np.array([SCANS[scan]]), 256
    boxes, flips = sample_pairs(rng.random((num, PAIR_NUMBERS)), np.repeat(shape, num, 0), config.views)
    assert config.encoder.kind == "resnet" and config.align.centers == "receptive_field"  # centres at 0.5
    size, stride = config.views.size, config.align.output_stride
    if not config.beyond_paper:
        shares = loops_shares(boxes, flips, size, stride, (0.5, 0.5, 0.5))
    else:
        # a fine map has bins enough that no view clamps, which are drawn first: none of the 64 is clamped
        coarse = [one for one in (*config.align.more_strides, stride) if math.prod(np.divide(size, one)) < 2000]
        num_fine = len(config.align.more_strides) + 1 - len(coarse)
        shares = loops_compared(boxes[:64], flips[:64], size, coarse, config.loss.num_bins)[0] if coarse else [0.0]
        shares = np.array(shares) * len(coarse) / (len(coarse) + num_fine)
    assert max(shares) <= (0.25 if name.endswith("openkbp") else 0.2)  # these compare the paper's deep map


@pytest.mark.parametrize("name", ["small", "medium", "full"])
def test_fine_tuning_takes_the_presets_encoder(name):
    files = [OmegaConf.load(ROOT / "conf" / f"{door}_{name}.yaml") for door in ("pretrain", "finetune")]
    assert files[0].get("encoder") == files[1].get("encoder")


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_clamped_shares_equal_loops(data):
    stride = data.draw(st.permutations([2, 4, 8]))
    cells = data.draw(st.permutations([2, 3, 5]))
    size = tuple(s * n for s, n in zip(stride, cells, strict=True))
    center = tuple(data.draw(st.sampled_from([0.5, s / 2, 0.75])) for s in stride)
    seed = data.draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    length = rng.integers(np.array(size), 2 * np.array(size), (6, 2, 3))
    start = rng.integers(0, np.array(size), (6, 2, 3))  # below every length: the boxes overlap
    boxes, flips = np.stack([start, start + length], -1), rng.random((6, 2, 3)) < 0.5
    got = clamped_shares(torch.from_numpy(boxes), torch.from_numpy(flips), Geometry(size, stride, center))
    fewer, more = (loops_shares(boxes, flips, size, stride, center, by) for by in (1e-3, -1e-3))
    assert (np.array(fewer) - 1e-6 <= got).all() and (got <= np.array(more) + 1e-6).all()  # equal but for ties


# -- sums of the schedules --------------------------------------------------------------------------------------------


def test_the_papers_run():
    config = load(PretrainConfig, ["index=s", "run=r"])
    steps = config.epochs * 1808 // config.global_batch_size  # 7,062 whole batches
    warmup = optim.warmup_steps(config.optim, 1808, config.global_batch_size, steps)
    assert warmup == 28
    assert round(optim.turnover(steps, config.ema_decay), 1) == 14.1
    assert round(optim.sum_of_rates(config.optim.lr, warmup, steps)) == 706


@pytest.mark.parametrize(("lr", "warmup", "steps"), [(0.2, 4, 20), (1.5, 0, 7), (2.0, 1, 1), (0.3, 10, 100)])
@pytest.mark.slow
def test_sum_of_rates_is_what_the_optimizer_gets(lr, warmup, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule, total = optim.warmup_cosine(optimizer, warmup, steps), 0.0
    for _ in range(steps):
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert math.isclose(optim.sum_of_rates(lr, warmup, steps), total)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1))
def test_turnover_is_the_sum(steps, decay):
    assert math.isclose(optim.turnover(steps, decay), summed_turnover(steps, decay), abs_tol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20000), st.sampled_from([4.0, 1.0, 14.0]))
def test_slowest_decay_is_enough_and_hardly_more(steps, least):
    decay = optim.slowest_decay(steps, least)
    if decay is None:
        assert summed_turnover(steps, 0.0) < least + 1e-6
        return
    turned = summed_turnover(steps, decay)
    assert 0 <= decay < 1 and least - 1e-6 <= turned <= 1.11 * least  # one of two digits more: a tenth


# -- what is printed --------------------------------------------------------------------------------------------------


def look(*args, shapes=((60, 200, 180), (90, 256, 256))) -> outlook.Outlook:
    """Of a store of such scans, which is not there: nothing is read."""
    config = load(PretrainConfig, [*SMALL, *args])
    records = [
        SimpleNamespace(
            scan_id=f"s{i}",
            split="train",
            shape=shape,
            foreground_box=(5, shape[0] - 5, 9, shape[1] - 9, 20, shape[2] - 20),
            array_metadata=CHUNK,
        )
        for i, shape in enumerate(shapes)
    ]
    index = Index("s", tuple(records), {}, (-1024.0, 325.0))
    plan = trainings.make_plan(config, index)
    assert isinstance(plan, stream.Plan)
    model, geometry = networks.build_pretraining(config)
    renderer, encoder = trainings.make_renderer(config, index, plan), model.get_submodule("online.encoder")
    return outlook.of(config, index, plan, renderer, encoder, geometry)


GOOD = ["views.size=[48,96,96]", "max_steps=400", "ema_decay=0.97", "optim.lr=1"]


def notes(ahead: outlook.Outlook) -> list[str]:
    return [line for line in ahead.lines if line.startswith("note: ")]


def test_good_settings_need_no_note():
    ahead = look(*GOOD)
    assert notes(ahead) == [] and len(ahead.lines) == 2
    assert math.isclose(ahead.facts["target_turnover"], summed_turnover(400, 0.97))
    assert "turns over 6.0 times" in ahead.lines[0] and "add up to 200.5 (the paper's: 706)" in ahead.lines[0]
    shares = [round(100 * share) for share in ahead.facts["clamped_share"]]
    assert f"clamped bins (D, H, W): {shares[0]}, {shares[1]}, {shares[2]} %" in ahead.lines[1]
    assert 0 < max(ahead.facts["clamped_share"]) <= 0.2


@pytest.mark.parametrize("foreground", ["true", "false"])
@pytest.mark.parametrize("args", [["views.size=[16,96,64]"], ["views.size=[24,32,96]"]])
def test_the_share_is_that_of_pairs_of_these_scans(args, foreground):
    """D, H and W differ, in views, strides and scans."""
    args = [*args, f"views.foreground={foreground}", "align.output_stride=[4,8,8]", "max_steps=400"]
    config, shapes = load(PretrainConfig, [*SMALL, *args]), np.array([(60, 200, 180), (90, 256, 256)] * 400)
    bodies = np.stack([np.array([[5, d - 5], [9, h - 9], [20, w - 20]]) for d, h, w in shapes.tolist()])
    u = np.random.default_rng(1).random((len(shapes), PAIR_NUMBERS))
    boxes, flips = sample_pairs(u, shapes, config.views, bodies if config.views.foreground else None)
    expected = loops_shares(boxes, flips, config.views.size, (4, 8, 8), (0.5,) * 3)
    np.testing.assert_allclose(look(*args).facts["clamped_share"], expected, atol=0.03)


@pytest.mark.parametrize(
    ("args", "size", "strides", "num_bins"),
    [
        (["align.output_stride=[4,8,8]", "align.more_strides=[[8,16,16]]"], (16, 48, 64), [(8, 16, 16), (4, 8, 8)], 64),
        (["loss.kind=contrast", "loss.num_bins=12", "align.output_stride=[8,16,16]"], (32, 48, 64), [(8, 16, 16)], 12),
        (["loss.displacement=1"], (24, 64, 48), [(8, 16, 16)], 64),
    ],
)
def test_of_pgl_by_place_the_drawn_bins_of_all_maps_count(args, size, strides, num_bins):
    args = [*args, f"views.size=[{','.join(map(str, size))}]", "max_steps=400", "ema_decay=0.97"]
    config, shapes = load(PretrainConfig, [*SMALL, *args]), np.array([(60, 200, 180), (90, 256, 256)] * 60)
    u = np.random.default_rng(1).random((len(shapes), PAIR_NUMBERS))
    expected, _ = loops_compared(*sample_pairs(u, shapes, config.views), size, strides, num_bins)
    ahead = look(*args)
    np.testing.assert_allclose(ahead.facts["clamped_share"], expected, atol=0.05)
    named = re.findall(r"of those compared, ([\d, ]+) % on the map of stride \[([\d,]+)\]", ahead.lines[1])
    assert len(named) == (len(strides) > 1)
    if named:
        coarsest = loops_compared(*sample_pairs(u, shapes, config.views), size, [(8, 16, 16)], num_bins)[0]
        assert named[0][1] == "8,16,16"
        np.testing.assert_allclose([int(one) / 100 for one in named[0][0].split(", ")], coarsest, atol=0.055)


@pytest.mark.parametrize(
    "args",
    [
        ["max_steps=200", "ema_decay=0.99"],
        ["max_steps=200", "ema_decay=0.999"],
        ["max_steps=30"],
        ["max_steps=3", "ema_decay=0.5"],
        ["max_steps=100000", "ema_decay=1"],
        ["max_steps=500", "ema_decay=0.99", "method=byol"],
    ],
)
def test_a_slow_target_is_noted_with_what_mends_it(args):
    [note] = [one for one in notes(look(*GOOD, *args)) if "target" in one]
    turned = float(re.search(r"it turns over ([\d.]+) times, fewer than 4", note)[1])
    values = dict(arg.split("=") for arg in [*GOOD, *args])
    assert abs(turned - summed_turnover(int(values["max_steps"]), float(values["ema_decay"]))) < 0.051
    mend = re.search(r"; (?:max_steps=(\d+) with )?ema_decay=([\d.]+) would turn it over ([\d.]+) times$", note)
    steps = mend[1] or values["max_steps"]
    assert abs(summed_turnover(int(steps), float(mend[2])) - float(mend[3])) < 0.051
    mended = notes(look(*GOOD, *args, f"max_steps={steps}", f"ema_decay={mend[2]}"))
    assert not [one for one in mended if "target" in one]


@pytest.mark.parametrize(
    ("args", "axes"),
    [
        (["views.size=[16,96,96]"], [True, False, False]),
        (["views.size=[48,48,96]"], [False, True, False]),
        (["views.size=[48,96,32]"], [False, False, True]),
        (["views.size=[8,16,16]"], [True, True, True]),
        (["views.size=[32,64,64]", "encoder.stage_strides=late"], [True, True, True]),
        (["views.size=[16,48,48]", "pairs_per_scan=4", "stream.pairs_per_region=4"], [True, True, True]),
        (["views.size=[16,96,96]", "align.crop=false"], [True, False, False]),
        (["views.size=[16,96,96]", "align.centers=cell"], [True, False, False]),
        (
            ["views.size=[16,48,48]", "align.output_stride=[4,8,8]", "align.more_strides=[[8,16,16]]"],
            [True, False, False],
        ),
    ],
)
def test_clamped_bins_are_noted_with_what_mends_it(args, axes):
    ahead = look(*GOOD, *args)
    [note] = notes(ahead)
    assert [share > 0.2 for share in ahead.facts["clamped_share"]] == axes
    percent = ", ".join(f"{100 * share:.0f}" for share in ahead.facts["clamped_share"])
    assert note.startswith(f"note: {percent} % of the bins lie beyond") and "more than 20 %" in note
    mends = re.findall(r"((?:views\.size|align\.output_stride)\S+)(?: with (align\S+))? would clamp ([\d, ]+) %", note)
    finer = "[2,4,4]" if "align.output_stride=[4,8,8]" in args else "[4,8,8]"
    assert len(mends) == 2 and f"align.output_stride={finer}" in mends[1]
    for *keys, shares in mends:
        mended = look(*GOOD, *args, *filter(None, keys))
        assert notes(mended) == []
        assert [f"{100 * share:.0f}" for share in mended.facts["clamped_share"]] == shares.split(", ")


def test_scans_that_larger_views_do_not_fit():
    shapes = {"shapes": [(20, 200, 200)]}
    [note] = notes(look(*GOOD, "views.size=[16,96,96]", **shapes))
    assert re.search(r": align.output_stride=\[2,4,4\] would clamp [\d, ]+ %$", note)
    assert notes(look(*GOOD, "views.size=[16,96,96]", "align.output_stride=[2,4,4]", **shapes)) == []
    [note] = notes(look(*GOOD, "views.size=[4,96,4]", "align.output_stride=[1,2,2]", shapes=[(9, 200, 5)]))
    assert note.endswith(": take larger views.size or a finer align.output_stride")


def test_axes_that_are_well_need_not_fit():
    [note] = notes(look(*GOOD, "views.size=[16,96,96]", shapes=[(90, 80, 200)]))  # crops reach beyond 80 rows as it is
    assert re.search(r": views.size=\[\d+,96,96\] would clamp", note)


def test_methods_without_target_or_alignment():
    byol, genesis = look(*GOOD, "method=byol"), look(*GOOD, "method=genesis", "optim.lr=null")
    assert set(byol.facts) == {"sum_of_rates", "target_turnover"} and len(byol.lines) == 1
    assert set(genesis.facts) == {"sum_of_rates"} and len(genesis.lines) == 1 and "target" not in genesis.lines[0]
    assert notes(look("max_steps=3", "method=genesis")) == []


def lars_moved(lr, momentum, num_steps, warmup=0) -> float:
    """How far LARS moves a weight of norm 1 that every step pulls the same way: its layer-wise rate is a thousandth."""
    velocity = moved = 0.0
    for step in range(num_steps):
        rest = (step - warmup) / max(1, num_steps - warmup)
        rate = lr * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest)))
        velocity = momentum * velocity + rate * 1e-3
        moved += velocity
    return moved


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("lr", "num_steps"), [(0.0001, 400), (0.2, 300), (3, 20), (9.9, 3), (1e-9, 40)])
def test_rates_too_low_to_get_anywhere(momentum, lr, num_steps):
    """What the note recommends is enough, makes no other note of rates, and is hardly more than needed."""
    given = [*GOOD, "ema_decay=0", f"optim.momentum={momentum}"]
    [note] = notes(look(*given, f"optim.lr={lr}", f"max_steps={num_steps}"))[:1]
    assert re.match(f"note: the rates are low: LARS moves a weight by at most .* in {num_steps} steps", note)
    assert lars_moved(lr, momentum, num_steps) < 0.5
    mended = dict(re.findall(r"(optim\.lr|max_steps)=(\S+)", note))
    assert mended
    settings = {"optim.lr": lr, "max_steps": num_steps} | mended
    after = notes(look(*given, *(f"{key}={value}" for key, value in settings.items())))
    assert not [line for line in after if "the rate" in line]
    rates = optim.sum_of_rates(float(settings["optim.lr"]), 1, int(settings["max_steps"]))
    assert 0.45 < rates * 1e-3 / (1 - momentum) < 0.65


@pytest.mark.parametrize("method", ["pgl", "byol"])
def test_a_rate_that_moves_too_far_at_once(method):
    """More than 10 at momentum 0.9; at 7.2 PGL by place trained best (tune_spaces/README.md)."""
    for lr, momentum in ((24, 0.9), (72, 0.9), (101, 0.0), (1000, 0.0)):
        [note] = notes(look(*GOOD, f"method={method}", f"optim.lr={lr}", f"optim.momentum={momentum}"))
        most = re.fullmatch(r"note: the rate is high: .* take optim.lr=([\d.]+) or less", note)[1]
        assert notes(look(*GOOD, f"method={method}", f"optim.lr={most}", f"optim.momentum={momentum}")) == []
    assert notes(look(*GOOD, f"method={method}", "optim.lr=7.2")) == []


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_optimizers_have_no_bounds_of_lars(kind):
    for lr in (1e-6, 0.001, 0.02):
        ahead = look(*GOOD, f"optim.kind={kind}", f"optim.lr={lr}")
        assert notes(ahead) == [] and "706" not in ahead.lines[0]


@pytest.mark.parametrize("method", ["pgl", "byol", "genesis"])
@pytest.mark.parametrize(("kind", "high", "own"), [("adamw", 1.5, 0.001), ("adamw", 0.021, 0.001), ("sgd", 1.5, 0.1)])
def test_a_rate_of_lars_given_to_another_is_noted(method, kind, high, own):
    """As over a preset, whose rate is one of LARS."""
    given = [*GOOD, f"method={method}", f"optim.kind={kind}", f"optim.lr={high}"]
    said = f"note: optim.lr={high} is high for {kind} (its own: {own}): if it was meant for lars, take optim.lr=null"
    assert notes(look(*given)) == [said]
    assert notes(look(*given, "optim.lr=null")) == []


def test_the_driver_prints_it_and_the_run_keeps_it(tmp_path, monkeypatch, capsys):
    """All of a run but its training, with a store on disk."""
    for name in ("a", "b"):
        write_scan(tmp_path / "store", name, np.zeros((24, 64, 80), np.int16), np.eye(4), split="train")
    write_index(tmp_path / "store", {}, (-1024.0, 325.0))
    for room, name, value in ((launch, "connect", None), (nodes, "await_nodes", False), (launch, "fit", "stopped")):
        monkeypatch.setattr(room, name, lambda *args, value=value: value)
    monkeypatch.setattr(stream, "too_large", lambda *args: None)
    args = [*SMALL, f"index={tmp_path}/store", f"run={tmp_path}/run", "views.size=[16,32,48]", "max_steps=40"]
    with pytest.raises(FailedRun, match="stopped"):
        pretrain.run(load(PretrainConfig, args))
    lines, facts = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "run" / "run.json").read_text())
    assert lines[0].startswith("pretrain: pgl by LARS at 0.2, 2 scans") and lines[1].startswith(
        "pretrain: in 40 steps the target turns"
    )
    assert (
        lines[2].startswith("pretrain: clamped bins") and [line[:16] for line in lines[3:]] == ["pretrain: note: "] * 3
    )
    assert set(facts["outlook"]) == {"sum_of_rates", "target_turnover", "clamped_share"}
    assert math.isclose(facts["outlook"]["target_turnover"], summed_turnover(40, 0.996))
