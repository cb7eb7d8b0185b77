"""What a GPU's steps are made of, seen where there is none: the meta device's values cannot be read, so whatever waits
for them fails; and every operation of a step passes by a dispatch mode that counts it."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgl_ray import bench
from pgl_ray.config import BenchConfig, FinetuneConfig, IntensityConfig, PretrainConfig, TrainConfig, ViewsConfig, load
from pgl_ray.data.batch_views import finish
from pgl_ray.data.sampling import largest_crop
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.inference import segment
from pgl_ray.model.losses import segmentation_loss
from pgl_ray.model.pgl import Pair
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import LightSegmenter, Segmenter
from pgl_ray.train import capacity, health, networks, nodes, one_step, optim

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = ["index=a", "run=b", "encoder.width=4", "encoder.depths=[1,1,1,1]", "heads.hidden=8", "heads.out=4"]
SMALL += ["views.size=[16,32,32]"]
BY_PLACE = ["loss.kind=contrast", "loss.displacement=1", "align.flip=false", "align.more_strides=[[2,4,4],[4,8,8]]"]
FLOAT32 = on.autocast(CPU, "float32")


class FromHost(TorchFunctionMode):
    """Refuses tensors that are made on the meta device of the host's numbers: on a GPU a copy that waits.

    Lists as indices (x[:, [0, 2]]) are such copies, too, and are not seen.
    """

    MAKE = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
    MOVE = (torch.Tensor.to, torch.Tensor.cuda)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        moved = func in self.MOVE and args[0].device != META
        if (moved or func in self.MAKE) and made.device == META:
            raise RuntimeError(f"{func} copies from host to device")
        return made


class OnDevice(TorchDispatchMode):
    """Counts operations, and refuses copies between host and meta device; reading a value there fails by itself."""

    def __init__(self):
        super().__init__()
        self.ops, self.made = Counter(), FromHost()

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops[func] += 1
        given, made = (
            {x.device.type for x in tree_leaves(of) if isinstance(x, torch.Tensor) and x.ndim}
            for of in ((args, kwargs), out)
        )
        if given and made and given | made > {"meta"}:
            raise RuntimeError(f"{func} copies between host and device")
        return out


@pytest.fixture
def meta(monkeypatch):
    """The meta device where autocast, which does not know it, takes it for the CPU."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kw: autocast("cpu", *args, **kw))
    return META


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.mean()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x + torch.ones(3, 4).to(x.device),
        lambda x: x + torch.tensor([1.0, 2, 3, 4], device=x.device),
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x + torch.asarray([1.0, 2, 3, 4], device=x.device),
        lambda x: x + x.new_tensor([1.0, 2, 3, 4]),
        lambda x: x * torch.tensor(2.0).to(x.device),
        lambda x: x[:, torch.tensor([0, 2])] * torch.from_numpy(np.ones(2)).to(x.device),
    ],
)
def test_whatever_waits_for_the_device_is_seen(waits):
    x = torch.randn(3, 4).to(META)
    with OnDevice(), pytest.raises((RuntimeError, NotImplementedError)):
        waits(x)


def pair(device, num=4) -> Pair:
    box = torch.tensor([[2, 18], [0, 40], [3, 40]], dtype=torch.int32).expand(num, 3, 2)
    view, flip = torch.zeros(num, 1, 16, 32, 32), torch.zeros(num, 3, dtype=torch.bool)
    return Pair(*(value.to(device) for value in (view, view, box, box, flip, flip, view, view)))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [["method=pgl"], ["align.mask_clamped=true"], ["method=byol"], ["method=genesis"], BY_PLACE],
    ids=lambda settings: settings[0],
)
def test_no_pretraining_step_waits_for_the_device(meta, settings, parts):
    config = load(PretrainConfig, [*SMALL, *settings])
    net = networks.build_pretraining(config)[0].to(meta).train()
    optimizer = optim.build_pretraining(net, config.optim)
    schedule, batch = optim.warmup_cosine(optimizer, 2, 10), pair(meta)
    for _ in range(2):  # the first one lays out the momentum
        with OnDevice() as seen:
            done = one_step.train_step(net, net, optimizer, schedule, batch, 0.99, FLOAT32, parts)
    assert done.grad_norm.device == meta and sum(seen.ops.values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("binary", 2)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("network", [Segmenter, LightSegmenter])
def test_no_finetuning_step_waits_for_the_device(meta, network, task, outputs, parts):
    net = network(build_encoder(depths=(1, 1, 1, 1), width=4), outputs).to(meta).train()
    sgd = optim.build_finetuning(net, load(FinetuneConfig, ["index=s", "run=r"]).optim)
    patch, target = torch.zeros(4, 1, 16, 32, 32).half().to(meta), torch.zeros(4, 1, 16, 32, 32, dtype=torch.uint8)
    batch = {"patch": patch, "target": target.to(meta), "labelled": torch.ones(4, 3, dtype=torch.uint8).to(meta)}
    for _ in range(2):
        with OnDevice():
            loss = one_step.backward(net, net, batch, task, parts, FLOAT32)
            norm = health.norm(p.grad for p in net.parameters() if p.grad is not None)
            sgd.step()
            sgd.zero_grad(set_to_none=True)
    assert loss.device == norm.device == meta


@pytest.mark.parametrize("kind", [torch.int16, torch.uint8])
def test_finishing_views_does_not_wait_for_the_device(meta, kind):
    config, num = ViewsConfig(size=(8, 24, 16)), 3
    batch = {"scaling": torch.ones(num, 2)}
    for view in ("1", "2"):
        batch["crop_" + view] = torch.zeros(num, 1, *largest_crop(config), dtype=kind)
        batch["box_" + view] = torch.tensor([[0, 9], [0, 25], [0, 20]], dtype=torch.int32).expand(num, 3, 2)
        batch["flip_" + view] = torch.zeros(num, 3, dtype=torch.uint8)
        batch["intensity_" + view], batch["noise_seed_" + view] = torch.ones(num, 4), torch.arange(num)
    batch = {name: value.to(meta) for name, value in batch.items()}
    given = batch, config.size, IntensityConfig(), [-1024.0, 325.0]
    finish(*given)  # brings the table of 8-bit codes there, once
    with OnDevice():
        done = Pair.from_batch(finish(*given)).with_wrong_priors()
    assert done.view_1.shape == (num, 1, 8, 24, 16) and done.view_2.device == meta


def test_optimizer_norm_and_target_are_a_few_operations():
    counts = []
    for depths in ("[1,1,1,1]", "[2,3,2,1]"):
        config = load(PretrainConfig, [*SMALL, f"encoder.depths={depths}"])
        net = networks.build_pretraining(config)[0].to(META)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = optim.build_pretraining(net, config.optim)
        for _ in range(2):
            for p in trained:
                p.grad = torch.zeros_like(p)
            with OnDevice() as seen:
                health.norm(p.grad for p in trained)
                optimizer.step()
                net.follow(0.99)
        counts.append((sum(seen.ops.values()), len(trained)))
    assert counts[0][0] == counts[1][0] < 40 and counts[1][1] > counts[0][1] + 10


# -- losses without picking rows --------------------------------------------------------------------------------------


def test_binary_loss_is_only_that_of_the_labelled_samples():
    """Oracle: the rows picked by hand, MONAI's loss on each channel; gradients, too."""
    from monai.losses import DiceCELoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 3, 4, 5, generator=generator, requires_grad=True)
    target = torch.randint(0, 4, (4, 1, 3, 4, 5), generator=generator)
    labelled = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()  # the last one nowhere
    one, losses = DiceCELoss(sigmoid=True, batch=True, smooth_nr=0), []
    for channel, rows in ((0, [0, 1, 3]), (1, [1, 2, 3])):
        losses.append(one(logits[rows, channel : channel + 1], (target[rows] > channel).float()))
    expected = torch.stack(losses).mean()
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = segmentation_loss(logits, target, "binary", labelled)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-7, rtol=1e-5)


# -- batches on their way ---------------------------------------------------------------------------------------------


def test_on_a_cpu_batches_pass_as_they_are_and_waiting_counts(monkeypatch):
    clock, given = SimpleNamespace(now=0.0), [{"x": torch.ones(2)} for _ in range(3)]
    monkeypatch.setattr(on.time, "monotonic", lambda: clock.now)

    def source():
        for batch in given:
            clock.now += 2.0
            yield batch
        raise ValueError("the stream broke")

    batches, seen = on.Batches(source(), CPU), []
    with pytest.raises(ValueError, match="the stream broke"):
        for batch in batches:
            seen.append(batch)
            clock.now += 100.0
    assert all(a is b for a, b in zip(seen, given, strict=True))
    assert batches.waited_s() == 6.0 and batches.waited_s() == 0.0


def test_on_a_gpu_batches_are_copied_by_a_stream_of_their_own(monkeypatch):
    """CUDA by stand-ins that write down what is asked of them."""
    log, active, clock = [], ["compute"], SimpleNamespace(now=0)

    class Stream:
        def wait_stream(self, other):
            log.append(("compute waits", other is batches.copies))

    class Event:
        num = 0

        def __init__(self, enable_timing):
            self.number, Event.num = Event.num, Event.num + 1

        def record(self, stream):
            assert stream is compute
            clock.now += 1
            self.time = clock.now

        def synchronize(self):
            log.append(("host waits", self.number))

        def elapsed_time(self, other):
            return 1000.0 * (other.time - self.time)

    class Column:
        def __init__(self, name):
            self.name = name

        def to(self, device, non_blocking):
            log.append(("copy", self.name, active[-1], non_blocking))
            return self

        def record_stream(self, stream):
            log.append(("kept for", self.name, stream is compute))

    @contextlib.contextmanager
    def within(stream):
        active.append("copies" if stream is batches.copies else "?")
        yield
        active.pop()

    compute = Stream()
    fake = {"Stream": lambda device: Stream(), "Event": Event, "stream": within}
    for name, value in (fake | {"current_stream": lambda device: compute}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    source = [{"x": Column(f"x{i}"), "step": Column(f"step{i}")} for i in range(3)]
    batches = on.Batches(source, torch.device("cuda"), frozenset({"step", "missed"}))
    for number, batch in enumerate(batches):
        assert batch["step"] is source[number]["step"]
        log.append(("step", number))
    per_batch = [
        [("copy", f"x{i}", "copies", True), ("compute waits", True), ("kept for", f"x{i}", True), ("step", i)]
        for i in range(3)
    ]
    # events: asked 0, there 1, asked 2, there 3, ...: the batch after next waits until this one's step has begun
    assert log == [*per_batch[0], ("host waits", 1), *per_batch[1], ("host waits", 3), *per_batch[2]]
    assert batches.waited_s() == 3.0 and log[-1] == ("host waits", 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_on_cuda_bring_the_right_values():
    source = ({"x": torch.full((2**22,), float(i)).pin_memory(), "step": torch.tensor(i)} for i in range(20))
    batches, sums = on.Batches(source, torch.device("cuda"), frozenset({"step"})), []
    for batch in batches:
        torch.cuda._sleep(10**7)  # the host is ahead of it
        sums.append(batch["x"].mean())
        assert batch["step"].device == CPU and batch["x"].is_cuda
    assert torch.stack(sums).tolist() == list(range(20)) and batches.waited_s() >= 0


# -- inference in bfloat16 --------------------------------------------------------------------------------------------


def trained_network() -> tuple[Segmenter, np.ndarray, np.ndarray]:
    """A network that has learnt two bright organs, a scan and its classes."""
    rng, at = np.random.default_rng(0), np.moveaxis(np.indices((24, 48, 48)), 0, -1)
    classes = np.zeros((24, 48, 48), np.int64)
    for value, middle in ((1, (10, 16, 18)), (2, (14, 34, 28))):
        classes[(((at - middle) / (6, 9, 9)) ** 2).sum(-1) < 1] = value
    scan = (np.array([-1.0, 0.5, 2.0])[classes] + rng.normal(0, 0.2, classes.shape)).astype(np.float32)
    model = Segmenter(build_encoder(depths=(1, 1, 1, 1), width=8), 3)
    init_kaiming_uniform(model, 0)
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(80):
        d, h, w = rng.integers(0, (9, 17, 17))
        patch, target = (torch.from_numpy(x[None, None, d : d + 16, h : h + 32, w : w + 32]) for x in (scan, classes))
        sgd.zero_grad()
        segmentation_loss(model(patch), target, "multiclass").backward()
        sgd.step()
    return model.eval(), scan, classes


@pytest.mark.slow
def test_inference_in_bfloat16_gives_float32s_masks():
    """Tolerance: Dice of the two masks above 0.99 per organ, probabilities within 0.05, on average within 0.002."""
    model, scan, classes = trained_network()
    given = {"patch_size": (16, 32, 32), "task": "multiclass", "air": -1.0}
    masks = [segment(model, scan, **given, precision=kind) for kind in ("float32", "bfloat16", "auto")]
    np.testing.assert_array_equal(masks[2], masks[0])  # a CPU's auto
    for organ in (1, 2):
        a, b, truth = masks[0] == organ, masks[1] == organ, classes == organ
        assert 2 * (a & b).sum() > 0.99 * (a.sum() + b.sum())
        assert 2 * (a & truth).sum() > 0.7 * (a.sum() + truth.sum())  # a network that has learnt something
    x = torch.from_numpy(scan[:16, :32, :32])[None, None]
    with torch.inference_mode():
        exact = model(x).softmax(1)
        with on.autocast(CPU, "bfloat16"):
            rough = model(x)
        assert rough.dtype == torch.bfloat16
        difference = (rough.float().softmax(1) - exact).abs()
    assert difference.max() < 0.05 and difference.mean() < 0.002


def test_training_in_bfloat16_is_refused_on_a_cpu():
    """oneDNN leaves gradients unwritten there; CI found a loss of nan by it."""
    for kind, precision in (("cuda", "bfloat16"), ("cuda", "auto"), ("cpu", "auto"), ("cpu", "float32")):
        on.check_training_precision(kind, precision)
    with pytest.raises(ValueError, match=r"train\.precision=bfloat16 computes wrong gradients on a CPU: use float32"):
        on.check_training_precision("cpu", "bfloat16")


def test_doors_refuse_it_before_anything_runs(monkeypatch):
    monkeypatch.setattr(nodes, "cluster", lambda: capacity.Cluster({"CPU": 4.0}))
    with pytest.raises(ValueError, match=r"train\.precision=bfloat16"):
        nodes.check_resources(TrainConfig(precision="bfloat16"))
    with pytest.raises(ValueError, match=r"train\.precision=bfloat16"):
        bench.run(load(BenchConfig, ["index=a", "train.device=cpu", "train.precision=bfloat16"]))
