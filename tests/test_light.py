"""Small fine-tuning: the light decoder, the weight of the cross-entropy, AdamW, and the encoder's own rate."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import train_loop as loop

from pgl_ray import export
from pgl_ray.config import ExportConfig, FinetuneConfig, FinetuneOptimConfig, load
from pgl_ray.data.store import Index, write_index
from pgl_ray.model.device import autocast
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.model.segmenter import LightDecoder, LightSegmenter, Segmenter, build_segmenter, light_levels, silence
from pgl_ray.train import checkpoint, networks, one_step, optim, weights

CPU = torch.device("cpu")
TINY = {"depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}
ENCODERS = {
    "early": {"kind": "resnet", **TINY},
    "late": {"kind": "resnet", **TINY, "stage_strides": "late"},
    **{f"resenc{num}": {"kind": "resenc", "depths": [1] * num, "width": 4} for num in (5, 6, 7)},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small kernels: on a busy machine two threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def light(kind="early", num_outputs=3) -> LightSegmenter:
    model = build_segmenter(build_encoder(**ENCODERS[kind]), num_outputs, "light")
    init_kaiming_uniform(model, 0)
    return model


def config(*args) -> FinetuneConfig:
    return load(FinetuneConfig, ["index=s", "run=r", "encoder.depths=[1,1,1,1]", "encoder.width=4", *args])


def index() -> Index:
    return Index(store="s", scans=(), labels={"a": 1, "b": 2}, hu_window=(-1024.0, 325.0))


# -- the decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("size", [(16, 32, 48), (13, 37, 50), (9, 17, 33), (1, 16, 1), (8, 1, 23)])
def test_any_encoder_and_any_size(kind, size):
    model = light(kind).eval()
    if kind.startswith("resenc"):
        # its InstanceNorm needs two cells in the last map
        size = tuple(n + stride + 2 for n, stride in zip(size, model.encoder.strides[-1]))
    with torch.no_grad():
        assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)
    assert model.head.out_channels == 3


def test_its_maps_have_the_same_strides_whatever_the_encoder():
    for kind, levels in (("early", [1, 2, 4]), ("late", [2, 3, 4]), ("resenc6", [2, 3, 5])):
        encoder = build_encoder(**ENCODERS[kind])
        assert light_levels(encoder.strides) == levels
        assert [encoder.strides[i] for i in levels[:2]] == [(2, 4, 4), (4, 8, 8)]


@pytest.mark.slow
def test_a_line_one_voxel_wide_can_be_drawn():
    """As a spinal cord on 4 mm voxels: the decoder's finest map is the encoder's."""
    torch.manual_seed(0)
    model, line = light(num_outputs=1), torch.zeros(1, 1, 16, 32, 48)
    line[..., 13, 21] = line[..., 22, 30] = 1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(model(line), line, pos_weight=torch.tensor(20.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model(line) > 0
    assert 2 * (drawn * line).sum() / (drawn.sum() + line.sum()) > 0.6


def test_it_needs_only_a_list_of_maps():
    """As a judge of frozen maps has it: no encoder, maps of two levels, an odd grid."""
    decoder, size = LightDecoder((6, 10), ((2, 4, 4), (8, 16, 16)), 5, width=8), (13, 30, 37)
    maps = [torch.randn(2, 6, 7, 8, 10), torch.randn(2, 10, 2, 2, 3)]
    assert decoder(maps, size).shape == (2, 5, *size)
    decoder(maps, size).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    model = light().eval()
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        stages = model.encoder(x)
        assert torch.equal(model(x), model.decoder([stages[i] for i in (0, 1, 2, 4)], size))


@pytest.mark.parametrize("size", [(13, 30, 37), (1, 64, 2)])
def test_logits_at_some_planes_are_those_of_all(size):
    strides = ((2, 4, 4), (8, 16, 16))
    torch.manual_seed(0)
    decoder = LightDecoder((6, 10), strides, 5, width=8).double().eval()
    maps = [torch.randn(2, c, *(-(-n // s) for n, s in zip(size, by))).double() for c, by in zip((6, 10), strides)]
    places = [torch.arange(0, size[0]), torch.arange(1, size[1], 2), torch.tensor([size[2] - 1, 0])]
    expected = decoder(maps, size)[:, :, :, 1::2][..., [size[2] - 1, 0]]
    torch.testing.assert_close(decoder.at(maps, places), expected)


def test_every_parameter_takes_part():
    model = light()
    model(torch.randn(2, 1, 16, 32, 48)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_output_stays_with_its_voxel(axis):
    """A longer scan leaves the near end's logits alone: nothing is stretched when a size is no multiple."""
    model, size = light().double().eval(), [9, 18, 17]
    size[axis] = 301  # longer than the receptive field
    x = torch.randn(1, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, part = model(x), model(x.narrow(2 + axis, 0, 299))
    change = (whole.narrow(2 + axis, 0, 299) - part).abs().amax([d for d in range(5) if d != 2 + axis])
    assert change[:50].max() < 1e-12 < change[-1]


@pytest.mark.slow
def test_learns_where_a_ball_is():
    torch.manual_seed(0)
    model = light(num_outputs=1)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (16, 32, 48)), indexing="ij"))
    ball = ((grid - torch.tensor([8, 14, 20])[:, None, None, None]).square().sum(0) < 49).float()[None, None]
    x = ball + 0.1 * torch.randn(1, 1, 16, 32, 48)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = F.binary_cross_entropy_with_logits(model(x), ball)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model(x) > 0
    assert 2 * (predicted * ball).sum() / (predicted.sum() + ball.sum()) > 0.9


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decoder, kind", [("paper", Segmenter), ("light", LightSegmenter)])
def test_what_was_trained_is_rebuilt(tmp_path, decoder, kind):
    """By its checkpoint alone, and by the file that export makes of it."""
    model, meta, _ = networks.build_finetuning(config(f"decoder={decoder}"), index())
    assert type(model) is kind and meta.decoder == decoder
    torch.save({"model": model.state_dict(), "meta": json.loads(json.dumps(meta.plain()))}, tmp_path / "tuned.pt")
    again, _ = weights.load_segmenter(str(tmp_path / "tuned.pt"))
    x = torch.randn(1, 1, 13, 37, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    encoder, _ = weights.load_encoder(str(tmp_path / "tuned.pt"))
    assert loop.equal(encoder.state_dict(), model.encoder.state_dict())
    for name in ("a.safetensors", "a.pt2"):
        settings = {"run": str(tmp_path / "tuned.pt"), "output": str(tmp_path / name), "size": (16, 32, 48)}
        assert export.run(ExportConfig(**settings)).part == "segmenter"
    exported, _ = export.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(exported(x), again(x))


def test_a_checkpoint_of_before_has_the_papers_decoder(tmp_path):
    model, meta, _ = networks.build_finetuning(config(), index())
    earlier = {key: value for key, value in meta.plain().items() if key != "decoder"}
    torch.save({"model": model.state_dict(), "meta": earlier}, tmp_path / "tuned.pt")
    assert type(weights.load_segmenter(str(tmp_path / "tuned.pt"))[0]) is Segmenter


def test_genesis_gives_a_light_decoder_only_its_encoder(tmp_path):
    restorer = Genesis(Encoder(**TINY))
    meta = {"door": "pretrain", "method": "genesis", "encoder": TINY, "hu_window": [-1024.0, 325.0]}
    torch.save({"model": restorer.state_dict(), "meta": meta}, tmp_path / "genesis.pt")
    for decoder, others in (("paper", {"head"}), ("light", {"head", "aspp", "ups"})):
        model, _, report = networks.build_finetuning(
            config(f"decoder={decoder}", f"init={tmp_path}/genesis.pt"), index()
        )
        assert {name.split(".")[1] for name in report.left_out} == others and not report.mismatches()
        assert loop.equal(model.encoder.state_dict(), restorer.online.encoder.state_dict())
    random, _, _ = networks.build_finetuning(config("decoder=light"), index())
    assert loop.equal(model.decoder.state_dict(), random.decoder.state_dict())


# -- the loss ----------------------------------------------------------------------------------------------------------


def batch(num=4):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (num, 1, 8, 16, 24), generator=generator).to(torch.uint8)
    patch = torch.randn(num, 1, 8, 16, 24, generator=generator).half()
    return {"patch": patch, "target": target, "labelled": torch.ones(num, 3, dtype=torch.uint8)}


@pytest.mark.parametrize("task, num, papers", [("multiclass", 3, 1 / 3), ("binary", 2, 1.0)])
def test_the_cross_entropys_weight_is_the_papers_unless_given(task, num, papers):
    given = batch()
    target, labelled = given["target"].long(), given["labelled"].bool()
    logits = torch.randn(4, num, 8, 16, 24, generator=torch.Generator().manual_seed(1))
    loss = {weight: segmentation_loss(logits, target, task, labelled, weight) for weight in (None, papers, 0.0, 2.5)}
    torch.testing.assert_close(loss[None], loss[papers])
    if task == "multiclass":
        entropy = F.cross_entropy(logits, target[:, 0])
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, torch.cat([target >= 1, target >= 2], 1).float())
    torch.testing.assert_close(loss[2.5] - loss[0.0], 2.5 * entropy)
    assert config().loss.ce_weight is None and config("loss.ce_weight=1").loss.ce_weight == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_the_weight_reaches_the_gradient(parts):
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        model = light().eval()
        one_step.backward(model, model, batch(), "multiclass", parts, autocast(CPU, "float32"), weight)
        gradients[weight] = model.head.bias.grad.clone()
    torch.testing.assert_close(
        gradients[3.0] - gradients[0.0], 3 * (gradients[1.0] - gradients[0.0]), atol=1e-5, rtol=1e-3
    )
    assert (gradients[1.0] - gradients[0.0]).abs().max() > 1e-3


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd, strong decay": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("task", ["multiclass", "binary"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_what_no_scan_annotates_is_never_named(task, kind, seed):
    """Whatever the head begins with and however weights decay; the others are learnt, where the decay lets them."""
    torch.manual_seed(seed)
    head = torch.nn.Conv3d(8, 2 + (task == "multiclass"), 1)
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 1), torch.nn.ReLU(), head)
    optimizer = OPTIMIZERS[kind](net.parameters())
    silence(head, [True, False], optimizer)
    target = torch.randint(2, (2, 1, 4, 8, 8), dtype=torch.uint8)
    x, labelled = target * 2.0 - 1 + 0.1 * torch.randn(target.shape), torch.tensor([[1, 1, 0]] * 2)
    for _ in range(200):
        optimizer.zero_grad()
        segmentation_loss(net(x), target, task, labelled, 1.0).backward()
        optimizer.step()
    logits = net(x * 3)
    assert (logits[:, -1] < -1000).all()
    seen = logits.argmax(1) if task == "multiclass" else (logits[:, 0] > 0).long()
    assert "strong" in kind or (seen == target[:, 0]).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["light", "paper"])
def test_a_run_never_names_what_no_scan_annotates(tmp_path, kind):
    where = loop.scans(tmp_path / "store")
    index = write_index(where, {"organ": 1, "other": 2}, (-1024.0, 325.0))
    assert index.annotated(["s0", "s1"]) == [True, False]
    run = loop.finetuning(where, tmp_path / "run", decoder=kind, max_steps=4)
    with pytest.raises(loop.Killed):
        loop.train(run, until=2)
    loop.train(run)  # goes on
    network, _ = weights.load_segmenter(run.run)
    volume = torch.randn(1, 1, 20, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (network(volume)[:, 2] < -1000).all()


@pytest.mark.parametrize("num, parts", [(1, 2), (1, 6), (3, 4)])
def test_more_parts_than_patches_are_as_many_as_patches(num, parts):
    """As an elastic run with accumulate may ask for; InstanceNorm refuses an empty part."""
    given = {key: value[:num] for key, value in batch().items()}
    results = []
    for count in (num, parts):
        model = light("resenc5")
        loss = one_step.backward(model, model, given, "multiclass", count, autocast(CPU, "float32"))
        results.append([loss, *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_each_kind_has_its_own_rate_unless_given():
    paper = config().optim
    assert (paper.kind, paper.lr, paper.weight_decay, paper.encoder_lr_factor) == ("sgd", 0.01, 1e-4, 1)
    adamw = config("optim.kind=adamw").optim
    assert (adamw.lr, adamw.weight_decay) == (3e-3, 1e-2)
    assert config("optim.kind=adamw", "optim.lr=0.5").optim.lr == 0.5


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_encoders_rate_is_a_multiple_of_the_rest(kind):
    """A first step of either kind moves a weight in proportion to its rate."""
    moved = {}
    for factor in (1.0, 0.25):
        model = light()
        settings = FinetuneOptimConfig(kind=kind, lr=0.01, weight_decay=0, encoder_lr_factor=factor)
        optimizer = optim.build_finetuning(model, settings)
        schedule = optim.polynomial(optimizer, 10)
        known = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(known) == sorted(map(id, model.parameters())) and schedule.get_last_lr()[0] == 0.01
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        one_step.backward(model, model, batch(), "multiclass", 1, autocast(CPU, "float32"))
        optimizer.step()
        moved[factor] = {name: (p.detach() - before[name]).double() for name, p in model.named_parameters()}
    for name, change in moved[1.0].items():
        share = (moved[0.25][name] * change).sum() / change.square().sum()
        assert share == pytest.approx(0.25 if name.startswith("encoder.") else 1, rel=1e-2), name


def test_a_frozen_encoder_has_no_rate():
    model = light()
    model.encoder.requires_grad_(False)
    optimizer = optim.build_finetuning(model, FinetuneOptimConfig(encoder_lr_factor=0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.decoder.parameters()))]


SMALL = {"decoder": "light", "optim": {"kind": "adamw", "encoder_lr_factor": 0.5}, "loss": {"ce_weight": 1.0}}


@pytest.mark.slow
def test_an_interrupted_adamw_is_bit_for_bit_the_undisturbed_one(tmp_path):
    scans = loop.scans(tmp_path / "store")
    whole, killed = (loop.finetuning(scans, tmp_path / name, **SMALL) for name in ("whole", "killed"))
    assert loop.train(whole) is None
    with pytest.raises(loop.Killed):
        loop.train(killed, until=3)
    assert checkpoint.committed_step(killed.run) == 2
    loop.train(killed)
    states = [loop.state_of(run.run) for run in (whole, killed)]
    for state in states:
        state["meta"].pop("config")  # names the run
    assert loop.equal(*states) and loop.rows_of(whole.run) == loop.rows_of(killed.run)
    groups = states[0]["optimizer"]["param_groups"]
    assert len(groups) == 2 and states[0]["schedule"]["base_lrs"] == pytest.approx([3e-3, 1.5e-3])
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(states[0]["optimizer"]["state"][0])
    best, meta = weights.load_segmenter(str(Path(whole.run)))
    assert type(best) is LightSegmenter and meta.decoder == "light"
