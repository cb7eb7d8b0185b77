"""Knobs of trainings that several doors share: loss, optimizer, health, workers, Ray."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from pgl_ray.config.fields import NonNegative, Positive, Section, Seed, StorePath, Triple


class PretrainLossConfig(Section):
    """What is asked of aligned features (method=pgl alone); the defaults are the paper's Eq. 8."""

    kind: Literal["consistency", "contrast"] = "consistency"
    """consistency: features of one place agree (Eq. 8); contrast: they also differ from those of other places
    (InfoNCE)."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of kind=contrast: what cosines are divided by."""
    negatives: Literal["pair", "batch"] = "pair"
    """Of kind=contrast: other places of the same pair, or of all pairs of a worker's batch, whose scans can be told
    apart by their looks instead of by place; so with batch the loss depends on the number of workers."""
    num_bins: Positive = 64
    """Bins per pair and map that are compared where kind, more_strides or displacement are not the paper's, which
    compares all."""
    displacement: NonNegative = 0.0
    """Weight of a second task: a small head tells the way between cells of the two views, which the priors know."""


class HealthConfig(Section):
    """The health panel: whether features spread, and whether they know places."""

    every: Positive = 50
    """Steps between two rows of health figures (their singular values cost as much as a small step)."""
    stop_on_collapse: bool = False
    """End the run with an error when two health rows in a row say that the features collapsed: what is watched is
    health/directions (over how many directions features spread), below 1.02; or that most views have one value
    throughout (data/blank_share)."""


class ProbeSettings(Section):
    """Scans and voxels of a voxel probe."""

    index: StorePath | None = None
    """Store written by prepare, with labels; none: the one that is trained on."""
    size: Triple | None = None
    """Window that the encoder sees, in voxels (D, H, W); none: views.size."""
    split: str = "train"
    """Split the labelled training scans are taken from."""
    num_scans: Positive = 5
    """Labelled scans to train on."""
    test_split: str = "test"
    """Split the classifier is tested on."""
    num_test_scans: Positive = 10
    """Scans to test on."""
    voxels_per_class: Positive = 100
    """Voxels drawn per scan and class, background included."""
    seed: Seed = 0
    """Seed of scans, voxels and of init=random."""


class ProbeCurveConfig(ProbeSettings):
    """A voxel probe of the encoder while it is pre-trained: probe/balanced_accuracy and the recalls in the metrics."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between two probes, beside those at the first and the last step; 0: none. The first worker does it, on
    scans that it reads once and keeps in memory, and the others wait."""
    num_test_scans: Positive = 5
    """Scans to test on."""


class PretrainOptimConfig(Section):
    """Optimizer of pre-training, with linear warm-up and a cosine to zero, without restart (paper, Sec. 5.1; BYOL)."""

    kind: Literal["auto", "lars", "sgd", "adamw"] = "auto"
    """auto: the method's own, LARS for pgl and byol (paper, Sec. 5.1), SGD for genesis as in its authors' code (without
    Nesterov's momentum; their steps of the rate are replaced by the warm-up and the cosine of all methods)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate after the warm-up; none: the kind's, lars 0.2 (the paper's), sgd 0.1, adamw 0.001."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of lars and sgd."""
    weight_decay: NonNegative | None = None
    """Weight decay; none: the kind's, lars 1.5e-6 (BYOL's; the paper gives none), sgd 0, adamw 0.01. LARS exempts
    biases and norm parameters."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0
    """Length of the warm-up in epochs; at most a tenth of the run."""


METHOD_OPTIM = {"pgl": "lars", "byol": "lars", "genesis": "sgd"}
OPTIM_DEFAULTS = {
    "lars": {"lr": 0.2, "weight_decay": 1.5e-6},
    # Models Genesis' 1.0 is for targets in [0, 1] behind a sigmoid; ours are z-scores behind a linear head
    "sgd": {"lr": 0.1, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}


def resolved_optim(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Values of a `PretrainOptimConfig` as given -> the same with the method's kind and the kind's defaults.

    Raises:
        ValueError: a rate without its kind, for a method whose own optimizer is not the one that `lr` is mostly given
            for: LARS's rates are many times too high for SGD.
    """
    kind = given.get("kind") or "auto"
    if kind == "auto":
        kind = METHOD_OPTIM[method]
        if kind != "lars" and given.get("lr") is not None:
            raise ValueError(
                f"optim.lr={given['lr']} without optim.kind: method={method} takes {kind}, not lars, for which that "
                f"rate may be meant: take optim.lr=null for {kind}'s own, or add optim.kind={kind}"
            )
    set_by_user = {key: value for key, value in given.items() if value is not None}
    return OPTIM_DEFAULTS[kind] | set_by_user | {"kind": kind}


class FinetuneOptimConfig(Section):
    """Optimizer of fine-tuning, its rate times (1 - step / steps) ** 0.9 (paper, Sec. 5.1: SGD, 0.01, and no more)."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """sgd: the paper's, with Nesterov's momentum; adamw: reaches more in a few hundred steps."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Initial learning rate; of kind=adamw 0.003 where not said otherwise."""
    encoder_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """The encoder's rate as a multiple of `lr`, e.g. 0.1 to keep close to pre-trained weights; freeze=true for none."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov momentum of sgd (the paper gives none)."""
    weight_decay: NonNegative = 1e-4
    """Weight decay (the paper gives none); of kind=adamw 0.01 where not said otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _adamws_own_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "adamw":
            return {"lr": 3e-3, "weight_decay": 1e-2, **values}
        return values


class LossConfig(Section):
    """Loss of fine-tuning: Dice and cross-entropy (paper, Eq. 11 and 12)."""

    ce_weight: NonNegative | None = None
    """Weight of the cross-entropy beside the Dice; none: the paper's, 1 / number of classes for task=multiclass
    (Eq. 12), 1 for task=binary (Eq. 11). With many organs and few steps 1 finds more of them."""


class TrainConfig(Section):
    """How Ray Train runs the loop."""

    num_workers: Positive = 1
    """Workers (processes) under DDP; with GPUs one each."""
    min_workers: Positive | None = None
    """Go on with as few workers where the cluster has lost some, and take new ones in up to max_workers, each time from
    the last checkpoint. The global batch and the learning rate stay: each worker takes more of the batch, in as many
    parts as keep a part no larger than with max_workers. None: num_workers, always."""
    max_workers: Positive | None = None
    """Most workers where min_workers is given; none: num_workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the workers compute; auto: on CUDA where the cluster has a GPU for every worker, or its autoscaler can make
    it so. With auto, no run goes on on CPUs after GPUs, GPUs after CPUs, or other models of GPU; cpu, cuda: it may."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """Ray CPUs that one worker reserves; what remains renders the views."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPUs that one worker reserves where it computes on CUDA; 0.5 lets two trials of a sweep share one."""
    threads_per_worker: Annotated[int, Field(ge=0)] = 0
    """Torch threads per worker; 0 shares the node's cores evenly."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast precision; auto = bfloat16 on CUDA, float32 on a CPU (bfloat16 gradients are wrong there: refused)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on one GPU (1.46 times as fast on an H200, after a minute or more of compiling). What it
    cannot compile runs as it is, with a note."""
    recompute: bool = False
    """Keep only the encoder stages' outputs for the backward pass and compute the rest again: less memory, a third more
    time, the same results."""
    log_every: Positive = 10
    """Steps between two rows of metrics."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of the worker group after a worker's death."""
    timeout_s: Annotated[float, Field(ge=1)] = 600.0
    """Seconds that workers wait for one that stands still, before they say which and start again."""
    tracker: Literal["none", "mlflow", "wandb"] = "none"
    """Where the metrics go besides the run's folder: MLflow or Weights & Biases (extras of that name)."""

    @model_validator(mode="before")
    @classmethod
    def _most_workers(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_workers") is not None:
            return {"num_workers": values["max_workers"], **values}
        return values

    @model_validator(mode="after")
    def _elastic(self) -> Self:
        if self.max_workers not in (None, self.num_workers):
            raise ValueError(
                f"train.max_workers={self.max_workers} and train.num_workers={self.num_workers}: give one of them"
            )
        if self.max_workers and not self.min_workers:
            raise ValueError(f"train.max_workers={self.max_workers} goes with train.min_workers: give both")
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"train.min_workers={self.min_workers} is above the {self.num_workers} of train.max_workers"
            )
        return self

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"train.gpus_per_worker={self.gpus_per_worker} goes with train.num_workers=1, not {self.num_workers}: "
                "workers of one run cannot share a GPU"
            )
        return self


class RayConfig(Section):
    """Which Ray cluster to use; a new one on this machine keeps its sockets and logs below RAY_TMPDIR, a short path."""

    address: str | None = None
    """Address of a running cluster; none: the one in RAY_ADDRESS, else a new one on this machine."""
    num_cpus: Positive | None = None
    """Logical CPUs of a new local cluster; none: this machine's cores, at least 4."""
    object_store_mb: Annotated[int, Field(ge=75)] | None = None
    """Object store of a new local cluster in MB; none: Ray's own choice, 30 % of the memory. Batches that find no room
    in it go over the disk (128 pairs of 16x96x96: 75 MB, Ray's least; a run says how much it wants)."""


def check_divisible(batch: int, train: TrainConfig) -> None:
    """Refuses a batch that cannot be shared out among the workers."""
    for name, workers in (("num_workers", train.num_workers), ("min_workers", train.min_workers)):
        if workers and batch % workers:
            raise ValueError(f"global_batch_size {batch} is not divisible by train.{name} {workers}")
