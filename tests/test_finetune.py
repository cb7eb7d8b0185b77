"""Fine-tuning without Ray: gradients in parts, the frozen encoder, the split, and what is said when a run must stop."""

import numpy as np
import pytest
import torch
import train_loop as loop
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from pgl_ray import finetune
from pgl_ray.config import FinetuneConfig, FinetuneOptimConfig, load
from pgl_ray.data import trainings
from pgl_ray.data.scan_files import write_scan
from pgl_ray.data.store import read_index, write_index
from pgl_ray.judge import readings
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.inference import out_of_memory
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train import networks, one_step, optim, stops

CPU = torch.device("cpu")


def config(*args) -> FinetuneConfig:
    return load(FinetuneConfig, ["index=s", "run=r", *args])


def network(outputs=3, seed=0) -> Segmenter:
    model = Segmenter(Encoder(depths=(1, 1, 1, 1), width=4), outputs)
    init_kaiming_uniform(model, seed)
    return model


def batch(num=4, seed=0):
    """Patches whose organs differ much in size, one of them partly labelled."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (num, 1, 8, 16, 24), generator=generator) * (torch.arange(num) % 2).view(
        -1, 1, 1, 1, 1
    )
    labelled = torch.ones(num, 3, dtype=torch.uint8)
    labelled[1, 2] = 0
    patch = torch.randn(num, 1, 8, 16, 24, generator=generator).half()
    return {"patch": patch, "target": target.to(torch.uint8), "labelled": labelled}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("binary", 2)])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_gradient_of_the_whole_batch(task, outputs, parts):
    """With BatchNorm as in inference the passes differ in rounding alone."""
    model, given = network(outputs).eval(), batch()
    loss = segmentation_loss(model(given["patch"].float()), given["target"].long(), task, given["labelled"].bool())
    loss.backward()
    whole = gradients(model)
    model.zero_grad()
    summed = one_step.backward(model, model, given, task, parts, on.autocast(CPU, "float32"))
    assert summed.item() == pytest.approx(loss.item(), rel=1e-5) and not summed.requires_grad
    largest = max(value.abs().max() for value in whole.values())
    for name, value in gradients(model).items():
        assert (value - whole[name]).abs().max() < 1e-4 * largest, name
    # Dice is no mean over parts: accumulating the parts' own losses would give another gradient
    model.zero_grad()
    for rows in torch.arange(4).chunk(parts):
        part = {key: value[rows] for key, value in given.items()}
        (one_step.backward(model, model, part, task, 1, on.autocast(CPU, "float32")))
    assert any((value / parts - whole[n]).abs().max() > 1e-2 * largest for n, value in gradients(model).items())


def test_parts_are_taken_into_the_running_statistics_once():
    model, other, given = network().train(), network().train(), batch()
    one_step.backward(model, model, given, "multiclass", 2, on.autocast(CPU, "bfloat16"))
    with torch.no_grad(), on.autocast(CPU, "bfloat16"):
        for patch in given["patch"].chunk(2):
            other(patch.float())
    for (name, value), expected in zip(model.named_buffers(), other.buffers()):
        if value.is_floating_point():
            torch.testing.assert_close(value, expected, msg=name)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)} == {0.1}


def test_workers_wait_for_each_other_only_at_the_last_part(tmp_path):
    """Under DDP, of one process here: gradients are reduced once a step."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        net, reduced = network().eval(), []
        model = DistributedDataParallel(net)

        def count(_, bucket):
            reduced.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, count)
        one_step.backward(model, net, batch(), "multiclass", 4, on.autocast(CPU, "float32"))
        assert sorted(reduced) == sorted(set(reduced)) and reduced
        single = network().eval()
        one_step.backward(single, single, batch(), "multiclass", 4, on.autocast(CPU, "float32"))
        for name, value in gradients(net).items():
            torch.testing.assert_close(value, gradients(single)[name])
    finally:
        destroy_process_group()


def test_a_frozen_encoder_stays_as_it_is_bit_for_bit(tmp_path):
    write_scan(tmp_path, "a", np.zeros((8, 9, 10), np.int16), np.eye(4), split="train")
    index = write_index(tmp_path, {"a": 1, "b": 2}, (-1024.0, 325.0))
    args = ["freeze=true", "encoder.depths=[1,1,1,1]", "encoder.width=4"]
    model, _, _ = networks.build_finetuning(config(*args), index)
    sgd = optim.build_finetuning(model, FinetuneOptimConfig(lr=0.1, weight_decay=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        one_step.train_mode(model, freeze=True)
        one_step.backward(model, model, batch(seed=step), "multiclass", 1 + step, on.autocast(CPU, "float32"))
        sgd.step()
        optim.average_buffers(model)
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == name.startswith("encoder.") or "num_batches" in name or value.std() == 0, name
    assert all(p.grad is None for p in model.encoder.parameters())
    (tmp_path / "early").mkdir()
    early = build_encoder(depths=[1, 1, 1, 1], width=4)
    meta = {"door": "pretrain", "encoder": early.settings, "hu_window": [-1024.0, 325.0], "level": 2}
    state = {"meta": meta, "model": {f"online.encoder.{name}": value for name, value in early.state_dict().items()}}
    torch.save(state, tmp_path / "early" / "state.pt")
    with pytest.raises(ValueError, match=r"early was trained up to stage 2 .* reads stage 4, too.* take freeze=false"):
        networks.build_finetuning(config(*args, f"init={tmp_path}/early"), index)
    free, _, _ = networks.build_finetuning(config(*args[1:]), index)
    one_step.train_mode(free, freeze=False)
    one_step.backward(free, free, batch(), "multiclass", 1, on.autocast(CPU, "float32"))
    assert free.encoder.conv1.weight.grad.abs().sum() > 0
    assert not torch.equal(free.encoder.bn1.running_mean, before["encoder.bn1.running_mean"])


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return loop.scans(tmp_path_factory.mktemp("scans") / "store")


def statistics(state: dict) -> dict[str, torch.Tensor]:
    """The encoder's BatchNorm in a state."""
    encoder = {name: value for name, value in state["model"].items() if name.startswith("encoder.")}
    return {name: value for name, value in encoder.items() if "running_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("init", ["random", "trained"])
def test_a_frozen_encoder_is_prepared_as_the_judges_prepare_it(scans, tmp_path, monkeypatch, init):
    """On any number of workers, whatever it starts from; once, so a continued run has what its checkpoint has."""
    torch.manual_seed(1)
    first = build_encoder(**loop.ENCODER)
    for part in readings.norms(first):
        part.running_mean.uniform_(-1, 1)
    meta = {"door": "pretrain", "encoder": first.settings, "hu_window": [-1024.0, 325.0]}
    state = {"meta": meta, "model": {f"online.encoder.{name}": value for name, value in first.state_dict().items()}}
    torch.save(state, tmp_path / "init.pt")
    given = {"freeze": True, "seed": 3, "max_steps": 4, "init": init if init == "random" else str(tmp_path / "init.pt")}

    runs = {name: loop.finetuning(scans, tmp_path / name, **given) for name in ("one", "continued")}
    runs["two"] = loop.finetuning(scans, tmp_path / "two", **given, train={"num_workers": 2})
    index = read_index(scans)
    start = on.lay_out(networks.build_finetuning(runs["one"], index)[0].encoder, torch.device("cpu"))
    views = readings.unlabelled_views(index, list(index.scans), (16, 32, 32), 3)
    expected = {f"encoder.{n}": v for n, v in readings.read_as(start, "reestimated", views).named_buffers()}
    loop.train(runs["one"])
    loop.train(runs["two"], world=2)
    with pytest.raises(loop.Killed):
        loop.train(runs["continued"], until=3)
    monkeypatch.setattr(readings, "reestimate", lambda *args: pytest.fail("estimated a second time"))
    loop.train(runs["continued"])
    for name in runs:
        prepared = statistics(loop.state_of(tmp_path / name))
        assert prepared and all(torch.equal(value, expected[key]) for key, value in prepared.items()), name
    assert not any(torch.equal(value, start.get_buffer(key[8:])) for key, value in prepared.items())
    one, continued = (loop.state_of(tmp_path / name)["model"] for name in ("one", "continued"))
    assert loop.equal(one, continued)


def test_the_first_line_says_how_a_frozen_encoder_was_prepared(scans, tmp_path, monkeypatch, capsys):
    class Ended(Exception):
        pass

    def fit(*args):
        raise Ended

    monkeypatch.setattr(finetune.launch, "fit", fit)
    monkeypatch.setattr(finetune.launch, "connect", lambda ray: None)
    monkeypatch.setattr(finetune.nodes, "await_nodes", lambda train, checkpoint: False)
    monkeypatch.setattr(finetune.stream, "too_large", lambda *sizes: None)
    without = {"kind": "resenc", "depths": [1, 1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    line = ", encoder frozen (BatchNorm's statistics are those of 64 unlabelled views), paper decoder"
    for name, changes, expected in (
        ("frozen", {"freeze": True}, line),
        ("free", {}, "init=random, paper decoder"),
        ("instance", {"freeze": True, "encoder": without, "decoder": "light"}, "random, encoder frozen, light decoder"),
    ):
        with pytest.raises(Ended):
            finetune.run(loop.finetuning(scans, tmp_path / name, **changes))
        assert expected in capsys.readouterr().out


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    label = np.zeros((8, 9, 10), np.uint8)
    label[2:4, 3:5, 4:6] = 1
    for name in "abcdefghij":
        write_scan(folder, name, np.zeros(label.shape, np.int16), np.eye(4), label=label, labelled=(1,), split="train")
    return write_index(folder, {"liver": 1}, (-1024.0, 325.0))


def test_shares_of_the_labels_are_nested_and_split_by_the_seed(ten):
    sets = {}
    for share in (0.2, 0.5, 1.0):
        train, val = trainings.split_scans(config(f"num_scans={share}"), ten)
        sets[share] = {*train, *val}
        assert not set(train) & set(val) and len(sets[share]) == round(10 * share)
        assert len(val) == max(1, round(0.2 * 10 * share))
    assert sets[0.2] < sets[0.5] < sets[1.0] == set("abcdefghij")
    assert trainings.split_scans(config("num_scans=.5"), ten) == trainings.split_scans(config("num_scans=5"), ten)
    assert trainings.split_scans(config("seed=1"), ten) != trainings.split_scans(config(), ten)
    train, val = trainings.split_scans(config("num_scans=2", "val_share=.99"), ten)
    assert (len(train), len(val)) == (1, 1)  # never an empty training set
    for args, message in (
        (["num_scans=.1"], "num_scans=0.1: split='train'.*10 labelled scans, and at least 2"),
        (["num_scans=11"], "num_scans=11: split='train'.*10 labelled scans, and at least 2"),
        (["split=test"], "split='test'.*has 0 labelled scans"),
    ):
        with pytest.raises(ValueError, match=message):
            trainings.split_scans(config(*args), ten)
    assert config("num_scans=null").num_scans == config().num_scans == 1.0 and config("num_scans=4.0").num_scans == 4
    for wrong in ("1", "0", "-2", "0.0", "1.5", "2.5", "many", "true", ".inf", ".nan"):
        with pytest.raises(
            ValueError, match=r"^num_scans=\S+: expected a (share above 0 and up to 1.0|number, not yes)"
        ):
            config(f"num_scans={wrong}")
    with pytest.raises(ValueError, match="accumulate=3 must divide a worker's 4 patches"):
        config("accumulate=3", "train.num_workers=2")


def test_label_values_without_a_name_are_refused(tmp_path):
    label = np.zeros((8, 9, 10), np.uint8)
    label[2:4], label[5] = 1, 6
    write_scan(tmp_path, "a", np.zeros(label.shape, np.int16), np.eye(4), label=label, labelled=(1,), split="train")
    write_index(tmp_path, {"liver": 1}, (-1024.0, 325.0))
    with pytest.raises(ValueError, match=r"scan 'a' .*label values \[6\] that have no name; known: \{'liver': 1\}"):
        trainings.split_scans(config(), read_index(tmp_path))


def test_out_of_memory_names_the_batch_to_try():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)  # the CPU's own words
    assert out_of_memory(error.value) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    text = stops.smaller_batch(config("train.num_workers=2", "global_batch_size=24"))
    assert "with 12 patches of 64x192x192 at a time" in text
    assert "try accumulate=2, the same batch 6 at a time" in text and "global_batch_size=12" in text
    parts = config("train.num_workers=2", "global_batch_size=24", "accumulate=2")
    assert "accumulate=4, the same batch 3 at a time" in stops.smaller_batch(parts)
    assert "one alone is too large" in stops.smaller_batch(config("accumulate=8"))


def test_the_first_step_that_is_not_finite_is_named(tmp_path):
    values = np.array([[0.5, 1.0], [0.4, np.inf], [np.nan, np.nan]])
    text = stops.fault_of_losses(config(), values, 20, 0.25, tmp_path)
    assert "train/loss is 0.4 and train/grad_norm inf at step 19" in text and "best.pt keeps" in text
    assert "nothing was kept" in stops.fault_of_losses(config(), values, 20, -1.0, tmp_path)
