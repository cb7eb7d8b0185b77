"""Every knob of pgl_ray, and the one way to read them.

Each door has one frozen model whose defaults are the paper's numbers. A command line is
`[file.yaml ...] [a.b=c ...]`: files are merged in order, then the dotted overrides; `load` checks the result
and reports every fault in one message that names the dotted path.
"""

import math
import os
import re
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

PRETRAINED = "pretrained:"  # before the name of weights that come with pgl_ray
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's working directory


def _absolute(value: str) -> str:
    """Workers run in other directories, so paths are made absolute where they are read."""
    if not value:
        raise PydanticCustomError("path", "is empty: give a path")
    if "://" in value:
        raise PydanticCustomError(
            "path", "only stores and runs of pretrain and finetune may lie in a bucket: give a folder"
        )
    path = os.path.expanduser(value)
    if not os.path.isabs(path) and JOB_FOLDER in f"{os.getcwd()}/":
        raise PydanticCustomError("path", "a job's working directory is a copy that is removed: give an absolute path")
    return os.path.abspath(path)


def _absolute_or_url(value: str) -> str:
    return value.rstrip("/") if "://" in value else _absolute(value)


def _absolute_unless_named(value: str) -> str:
    return value if value == "random" or value.startswith(PRETRAINED) else _absolute_or_url(value)


def _as_written(value: Any) -> Any:
    """Refuses a number in place of a path, where what was written (007, 1e5, yes) is not known any more."""
    if isinstance(value, int | float):
        raise PydanticCustomError("path", "is read as a number or as yes/no: put the path into quotes")
    return value


def _share_or_number(value: Any) -> Any:
    """Labelled scans: 1.0 and null are all of them; 1 could be meant as one scan, which cannot be split."""
    if value is None:
        return 1.0
    if type(value) is float and 0 < value <= 1:
        return value
    if type(value) in (int, float) and 2 <= value < math.inf and value % 1 == 0:
        return int(value)
    raise PydanticCustomError(
        "scans", "expected a share above 0 and up to 1.0 (all), or a number from 2 on (to train on and to validate)"
    )


WrittenPath = Annotated[str, BeforeValidator(_as_written)]
StorePath = Annotated[WrittenPath, AfterValidator(_absolute_or_url)]
RunPath = StorePath  # of a pre-training or fine-tuning; a sweep is a folder
FilePath = Annotated[WrittenPath, AfterValidator(_absolute)]
Init = Annotated[str, AfterValidator(_absolute_unless_named)]
Seed = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
LabelledScans = Annotated[int | float, BeforeValidator(_share_or_number)]
LEAST_VOXEL_MM, LARGEST_VOXEL_MM = 0.02, 30.0  # finest cone-beam CT: 0.075; thickest slices: 10 to 20
Length = Annotated[float, Field(ge=LEAST_VOXEL_MM, le=LARGEST_VOXEL_MM)]  # of a voxel, in mm
Triple = tuple[Positive, Positive, Positive]
Verb = Literal["choice", "grid_search", "uniform", "loguniform", "quniform", "randint"]


class Gone(NamedTuple):
    """A setting of earlier versions: the one value that it has now, and what to write in place of another one."""

    value: Any
    instead: str = ""


class Section(BaseModel):
    """A frozen group of knobs: unknown keys are refused, attribute docstrings are the descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gone: ClassVar[dict[str, Gone]] = {}
    """Settings of earlier versions, by their names; saved runs have them."""


def _listed(value: Any) -> Any:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


def _without_null(value: Any) -> Any:
    """A dict without the keys that are set to null."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _check_range(name: str, value: tuple[float, float]) -> None:
    if not value[0] <= value[1]:
        raise ValueError(f"{name}: lower bound {value[0]} is above upper bound {value[1]}")


# -- sections shared by several doors -------------------------------------------------------------------------------


class CropConfig(Section):
    """Random crops, resized and flipped (paper, Sec. 3.2, operations 1 and 2)."""

    size: Triple = (16, 96, 96)
    """Size after the resize in voxels (D, H, W)."""
    crop_scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.1, 1.4)
    """Crop size as a multiple of the size, drawn per axis."""
    flip_prob: Share = 0.5
    """Probability of a flip along each axis."""
    foreground: bool = False
    """Keep the middle of every crop inside the box around the body; off as in the paper."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range("crop_scale", self.crop_scale)
        return self


class ViewsConfig(CropConfig):
    """Pairs of views; their size is the paper's P."""

    gone = {"overlap_of": Gone("smaller")}

    min_overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Least overlap of two views of a scan, as a share of the smaller crop's volume (the paper does not say of which
    volume)."""


class PatchConfig(CropConfig):
    """Patches of fine-tuning."""

    size: Triple = (64, 192, 192)
    """Patch size in voxels (D, H, W); the paper takes 48x160x160 for BCV."""


class IntensityConfig(Section):
    """Intensity operations (paper, Sec. 3.2, operations 3 to 6), on z-scored voxels."""

    noise_prob: Share = 0.1
    """Probability of white Gaussian noise."""
    noise_variance: tuple[NonNegative, NonNegative] = (0.0, 0.1)
    """Range of the noise variance."""
    blur_prob: Share = 0.2
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[NonNegative, NonNegative] = (0.5, 1.0)
    """Range of the blur's sigma in voxels."""
    gain_prob: Share = 0.5
    """Probability of the brightness and contrast change."""
    gain: tuple[NonNegative, NonNegative] = (0.75, 1.25)
    """Range of the factor; the result is clipped to the view's own range."""
    gamma_prob: Share = 0.5
    """Probability of the gamma transformation."""
    gamma: tuple[NonNegative, NonNegative] = (0.7, 1.5)
    """Range of the exponent (Eq. 2)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("noise_variance", "blur_sigma", "gain", "gamma"):
            _check_range(name, getattr(self, name))
        return self


class EncoderConfig(Section):
    """3D ResNet with bottleneck blocks (paper, Sec. 3.3), or nnU-Net's residual encoder."""

    kind: Literal["resnet", "resenc"] = "resnet"
    """resnet: the paper's; resenc: nnU-Net's ResEnc-L, whose weights nnU-Net fine-tunes (export to .pth)."""
    depths: tuple[Positive, ...] = (3, 4, 6, 3)
    """Residual blocks per stage; 3-4-6-3 is ResNet-50; of kind=resenc 1-3-4-6-6-6 where not said otherwise."""
    width: Positive = 64
    """Channels of the stem; stage i puts out width * 4 * 2**i channels. Of kind=resenc 32 where not said otherwise;
    stage i puts out width * 2**i, at most 10 * width."""
    stage_strides: Literal["early", "late"] = "early"
    """Strides of the four stages: early = 2,2,2,1 (15 GFLOP per 16x96x96 view), late = 1,2,2,2 (80 GFLOP).
    kind=resenc knows early alone: 1, then 1,2,2 (D, H, W), then 2."""

    @model_validator(mode="before")
    @classmethod
    def _resencs_own_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "resenc":
            return {"depths": (1, 3, 4, 6, 6, 6), "width": 32, **values}
        return values

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "resnet" and len(self.depths) != 4:
            raise ValueError(f"encoder.depths={list(self.depths)}: kind=resnet has 4 stages")
        if self.kind == "resenc" and not 5 <= len(self.depths) <= 7:
            raise ValueError(f"encoder.depths={list(self.depths)}: kind=resenc has 5 to 7 stages")
        if self.kind == "resenc" and self.stage_strides != "early":
            raise ValueError(f"encoder.stage_strides={self.stage_strides}: kind=resenc knows early alone")
        return self


class HeadsConfig(Section):
    """Projector and predictor: Conv1x1(hidden)-BN-ReLU-Conv1x1(out) (paper, Sec. 3.3)."""

    hidden: Positive = 4096
    """Channels of the hidden layer."""
    out: Positive = 256
    """Channels of the features that are compared."""


class AlignConfig(Section):
    """The prior-guided aligner (paper, Eq. 4 to 7; method=pgl alone) and its ablations (Tables 5 to 8; any method)."""

    gone = {"sampling_ratio": Gone(1)}

    output_stride: Triple = (8, 16, 16)
    """View voxels per feature cell (D, H, W): which of the encoder's maps is compared, the deepest one of that stride.
    Stages behind it are neither run nor trained; (4,8,8) is one stage earlier than the paper's."""
    more_strides: tuple[Triple, ...] = ()
    """Further maps that are compared beside that one, by their output strides, e.g. [[2,4,4],[4,8,8]]; none: the
    paper."""
    centers: Literal["receptive_field", "cell"] = "receptive_field"
    """Where a feature cell sits: at its receptive field's centre, or in the middle of its cell (the paper's)."""
    mask_clamped: bool = False
    """Leave bins out of the loss that lie beyond the outermost feature centres in either view, instead of clamping, and
    pairs that have no other bin (at 16x96x96 and 8,16,16 more than half of them: align/valid_pairs_share)."""
    flip: bool = True
    """false = the paper's `w/o F`: views are not flipped, so nothing is to undo."""
    crop: bool = True
    """false = the paper's `w/o CS`: both views show one crop of exactly the view size, so the overlap is all of it."""
    wrong_priors: bool = False
    """A control, never for use: every pair is aligned by another pair's priors. The health panel must show it."""

    @model_validator(mode="after")
    def _shows_wrong_priors(self) -> Self:
        if self.wrong_priors and not (self.flip or self.crop):
            raise ValueError("align.wrong_priors shows nothing without flips and crops: set align.flip or align.crop")
        return self


class PretrainLossConfig(Section):
    """What is asked of aligned features (method=pgl alone); the defaults are the paper's Eq. 8."""

    kind: Literal["consistency", "contrast"] = "consistency"
    """consistency: features of one place agree (Eq. 8); contrast: they also differ from those of other places
    (InfoNCE)."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of kind=contrast: what cosines are divided by."""
    negatives: Literal["pair", "batch"] = "pair"
    """Of kind=contrast: other places of the same pair, or of the whole batch, whose scans can be told apart by their
    looks instead of by place."""
    num_bins: Positive = 64
    """Bins per pair and map that are compared where kind, more_strides or displacement are not the paper's, which
    compares all."""
    displacement: NonNegative = 0.0
    """Weight of a second task: a small head tells the way between cells of the two views, which the priors know."""


class StreamConfig(Section):
    """How pairs of views are read and made, and how they reach the workers."""

    gone = {
        "augment_on": Gone("auto", "stream.on_gpu=intensity (gpu) or nothing (cpu) says it now"),
        "resize_on": Gone("cpu", "stream.on_gpu=all says it now"),
    }

    pairs_per_region: Positive = 1
    """Pairs drawn inside one region of a scan, twice the view size per axis, which is read once; it divides
    `pairs_per_scan`. 1 is the paper: every pair is drawn from the whole scan."""
    on_gpu: Literal["auto", "nothing", "intensity", "all"] = "auto"
    """What is done to the views on the training device, a batch at a time, and not where they are read: intensity = the
    intensity operations (the same views to float16's rounding); all = resize and flip, too, and crops travel as they
    are stored, 2.7 times the bytes of finished views from an int16 store, 1.3 times from uint8. auto = intensity where
    the workers have CUDA; method=genesis deforms finished views, so it takes nothing."""
    on_error: Literal["fail", "skip"] = "fail"
    """A scan that cannot be read while training: fail = the run ends with an error; skip = its place in the batch is
    taken by the same draw of the next scan that can be read, so all batches keep their size, and the metrics
    (data/skipped_share) and skipped.json in the run's folder say which scans were left out how often."""
    max_skipped_share: Share = 0.01
    """Share of the run's pairs so far, or of an epoch's where they are fewer, that may be skipped before the run ends
    with an error."""


class HealthConfig(Section):
    """The health panel: whether features spread, and whether they know places."""

    every: Positive = 50
    """Steps between two rows of health figures (their singular values cost as much as a small step)."""
    stop_on_collapse: bool = False
    """End the run with an error when two health rows in a row say that the features collapsed: what is watched is
    health/directions (over how many directions features spread), below 1.0."""


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

    gone = {"trust_coefficient": Gone(1e-3)}

    kind: Literal["auto", "lars", "sgd", "adamw"] = "auto"
    """auto: the method's own, LARS for pgl and byol (paper, Sec. 5.1), SGD for genesis as in its authors' code (without
    Nesterov's momentum; their steps of the rate are replaced by the warm-up and the cosine of all methods)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate after the warm-up; none: the kind's, lars 0.2 (the paper's), sgd 0.1, adamw 0.001."""
    momentum: Share = 0.9
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

    gone = {"power": Gone(0.9)}

    kind: Literal["sgd", "adamw"] = "sgd"
    """sgd: the paper's, with Nesterov's momentum; adamw: reaches more in a few hundred steps."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Initial learning rate; of kind=adamw 0.003 where not said otherwise."""
    encoder_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """The encoder's rate as a multiple of `lr`, e.g. 0.1 to keep close to pre-trained weights; freeze=true for none."""
    momentum: Share = 0.9
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

    gone = {"keep_checkpoints": Gone(2)}

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
    """torch.compile; auto: on CUDA. What it cannot compile runs as it is."""
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

    gone = {"tmp_dir": Gone(None, "set RAY_TMPDIR in the environment, which Ray reads")}

    address: str | None = None
    """Address of a running cluster; none: the one in RAY_ADDRESS, else a new one on this machine."""
    num_cpus: Positive | None = None
    """Logical CPUs of a new local cluster; none: this machine's cores, at least 4."""
    object_store_mb: Positive | None = None
    """Object store of a new local cluster in MB; none: Ray's own choice, 30 % of the memory. Batches that find no room
    in it go over the disk (128 pairs of 16x96x96: 75 MB; a run says how much it wants)."""


# -- one model per door ---------------------------------------------------------------------------------------------


class LabelsConfig(Section):
    """What the values of a label map mean, where the folder's dataset.json does not say it."""

    names: dict[str, Annotated[int, Field(ge=1, le=2**16 - 1)]] = {}
    """Organ name -> value in the label maps. DICOM contours (RTSTRUCT) become labels where their structures are named
    here."""
    table: str | None = None
    """CSV inside the source folder (comma, semicolon or tab) with a row per scan, by its id, file name or path; columns
    `split` and `labelled_organs` (separated by blanks, or by ; or |) are optional. An organ that a row does not list is
    unlabelled in that scan, not absent."""


class PartConfig(Section):
    """Scans of a data set that lie alike."""

    images: str
    """Pattern of the volumes below the source folder: {id} stands for a scan's name, a leading **/ for any folders."""
    labels: str | None = None
    """Pattern of their label maps, with the same {id} and **/; {organ} stands for the names in labels.names, where each
    organ has its own mask. None: no labels are used."""
    ids: tuple[str, ...] = ()
    """Scans that belong to the part, `case_000-209` for a range; none: all."""
    num_scans: Positive | None = None
    """Scans that were published."""
    split: str = ""
    """Their split."""


class RecipeConfig(Section):
    """A public data set: what it is, where its files lie, its split."""

    name: str = ""
    """Of the data set."""
    licence: str = ""
    """Under which it was published; it is noted in the store."""
    origin: str = ""
    """Where to get it."""
    prefix: str = ""
    """Put before every {id} to name the scans."""
    parts: tuple[PartConfig, ...] = ()
    """Where the scans lie; none: one of the layouts that prepare knows."""
    split_sizes: dict[str, Positive] = {}
    """Split -> number of labelled scans, drawn by split_seed; what is left over goes to the last."""
    split_seed: Seed = 0
    """Seed of that draw."""

    @field_validator("parts")
    @classmethod
    def _has_id(cls, parts: tuple[PartConfig, ...]) -> tuple[PartConfig, ...]:
        for part in parts:
            for pattern in (part.images, part.labels):
                if pattern and "{id}" not in pattern:
                    raise ValueError(f"recipe.parts: pattern {pattern!r} has no {{id}}")
        return parts


class PrepareConfig(Section):
    """CT files -> Zarr store + Parquet index."""

    source: FilePath
    """Folder of CT volumes (NIfTI, NRRD, MHA/MHD, DICOM): any folders, images/ + labels/, nnU-Net's or MSD's (imagesTr,
    labelsTr), or as a recipe says."""
    store: StorePath
    """Folder of the store, or s3://, gs://, az:// with bucket and prefix; an existing store is added to."""
    recipe: RecipeConfig = RecipeConfig()
    series: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """DICOM series to take, by SeriesInstanceUID or SeriesDescription; none: every CT series."""
    hu_window: tuple[float, float] = (-1024.0, 325.0)
    """HU window of the statistics and, later, of the views (paper, Sec. 5.1)."""
    chunk: Triple = (8, 64, 64)
    """Inner chunk of the sharded arrays in voxels (D, H, W)."""
    encoding: Literal["int16", "uint8"] = "int16"
    """int16: HU, lossless. uint8: 256 steps over hu_window, half the size; what lies outside is clipped, the loss is
    noted per scan (1.5 to 2 HU rms for the default window)."""
    compression: Literal["lz4", "none"] = "lz4"
    """lz4, or none: twice the size on disk for a quarter less CPU time per pair of views (hardly less with regions)."""
    spacing_mm: tuple[Length, Length, Length] | None = None
    """Resample to this voxel size (D, H, W): linear (order 1), before it a Gaussian of sigma (ratio - 1) / 2 voxels
    along axes that get coarser; labels take the nearest voxel. None: each scan keeps its own, as in the paper."""
    labels: LabelsConfig = LabelsConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range("hu_window", self.hu_window)
        return self


class StoreConfig(Section):
    """Reads every chunk of a store; names what is damaged, and converts just that again (repair)."""

    store: StorePath
    """Store written by prepare."""
    ray: RayConfig = RayConfig()


class InspectConfig(Section):
    """Store -> one HTML page: table of scans, pictures, what stands out, totals."""

    store: StorePath
    """Store written by prepare."""
    output: FilePath | None = None
    """HTML file; none: inspect.html in the store's folder, of a store in a bucket in this folder."""
    num_pictures: Annotated[int, Field(ge=0)] = 48
    """Scans that are shown, those that stand out first, then evenly spread ones."""


class PretrainConfig(Section):
    """Self-supervised pre-training (paper, Sec. 3 and 5.1)."""

    gone = {
        "ema_schedule": Gone("cosine"),
        "deform": Gone({"nonlinear_prob": 0.9, "shuffle_prob": 0.5, "cutout_prob": 0.9, "inner_share": 0.2}),
    }

    method: Literal["pgl", "byol", "genesis"] = "pgl"
    """pgl: local consistency of aligned features; byol: global consistency of pooled features; genesis: Models Genesis,
    restoring deformed views with the segmentation network. All train on the same views."""
    index: StorePath
    """Store written by prepare."""
    run: RunPath
    """Folder of the run, or its place in a bucket (s3://, gs://, az://); typed again, an interrupted run continues."""
    seed: Seed = 0
    """Seed of priors, augmentation and initialisation."""
    split: str | None = None
    """Split of the index to train on; none: all scans, labelled or not."""
    epochs: Positive = 500
    """Passes over the scans."""
    max_steps: Positive | None = None
    """Length of the run in steps instead of epochs; all schedules span it."""
    global_batch_size: Positive = 128
    """View pairs per step over all workers."""
    pairs_per_scan: Positive = 1
    """View pairs per scan and epoch."""
    ema_decay: Share = 0.996
    """Target decay omega at the start (Eq. 10); it rises to 1 along a cosine, as in BYOL. Not used by genesis."""
    views: ViewsConfig = ViewsConfig()
    intensity: IntensityConfig = IntensityConfig()
    stream: StreamConfig = StreamConfig()
    encoder: EncoderConfig = EncoderConfig()
    heads: HeadsConfig = HeadsConfig()
    align: AlignConfig = AlignConfig()
    loss: PretrainLossConfig = PretrainLossConfig()
    health: HealthConfig = HealthConfig()
    probe: ProbeCurveConfig = ProbeCurveConfig()
    optim: PretrainOptimConfig = PretrainOptimConfig()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _methods_optimizer(cls, values: Any) -> Any:
        """Nothing is left open: a run's config.yaml names its optimizer and its rate."""
        if isinstance(values, dict) and values.get("method", "pgl") in list(METHOD_OPTIM):
            given = values.get("optim", {})
            given = given.model_dump() if isinstance(given, Section) else given
            if isinstance(given, dict) and given.get("kind", "auto") in ("auto", None, *OPTIM_DEFAULTS):
                return {**values, "optim": resolved_optim(values.get("method", "pgl"), given)}
        return values

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_divisible(self.global_batch_size, self.train)
        if self.method == "genesis" and self.stream.on_gpu in ("intensity", "all"):
            raise ValueError("method=genesis deforms finished views: stream.on_gpu must be nothing or auto")
        if self.pairs_per_scan % self.stream.pairs_per_region:
            raise ValueError(
                f"stream.pairs_per_region={self.stream.pairs_per_region} must divide pairs_per_scan="
                f"{self.pairs_per_scan}: raise pairs_per_scan and lower epochs"
            )
        if self.method != "pgl" and (self.loss != PretrainLossConfig() or self.align.more_strides):
            raise ValueError(f"loss.* and align.more_strides are of method=pgl, not {self.method}: leave them out")
        if self.align.mask_clamped and self.beyond_paper:
            raise ValueError(
                "align.mask_clamped masks whole maps; with loss.kind, loss.displacement or align.more_strides bins are "
                "drawn, those not clamped first: leave it out"
            )
        if self.align.mask_clamped and any(p == s for p, s in zip(self.views.size, self.align.output_stride)):
            raise ValueError(
                f"align.mask_clamped leaves no bin: views.size={self.views.size} has one cell on an axis of "
                f"align.output_stride={self.align.output_stride}; take larger views or a smaller stride"
            )
        if self.align.wrong_priors and self.global_batch_size < 2 * self.train.num_workers:
            raise ValueError(
                f"align.wrong_priors takes another pair's priors: global_batch_size={self.global_batch_size} must be "
                f"at least 2 per worker of train.num_workers={self.train.num_workers}"
            )
        return self

    @property
    def beyond_paper(self) -> bool:
        """Whether PGL compares anything else than one whole map by Eq. 8."""
        return self.loss.kind != "consistency" or self.loss.displacement > 0 or bool(self.align.more_strides)


class BenchConfig(PretrainConfig):
    """Where the time of a pre-training goes: the stream of views against the training step, on this machine."""

    run: str = ""
    """Not used: nothing is kept."""
    bench_s: Annotated[float, Field(gt=0)] = 4.0
    """Seconds that the stream is measured, each of three times, after half as long to get going."""


class CheckAlignConfig(Section):
    """Does the aligner bring the same anatomy together? Coordinate ramps through the configured geometry. A file may be
    a pre-training's: what is not named here is left out."""

    index: StorePath | None = None
    """Store whose scans are cropped; none: a phantom scan."""
    run: RunPath | None = None
    """Pre-training run whose config is checked, and whose folder and report get table and picture; of a run in a bucket
    they go to `output`."""
    num_pairs: Annotated[int, Field(ge=64)] = 128
    """Random pairs of views; all 64 pairs of flips come up in turn."""
    output: Annotated[FilePath, Field(validate_default=True)] = "check_align"
    """Folder for check_align.json and check_align.png where no run is given."""
    seed: Seed = 0
    """Seed of the pairs, and of the phantom."""
    split: str | None = None
    """Split of the index whose scans are cropped; none: all scans."""
    views: ViewsConfig = ViewsConfig()
    encoder: EncoderConfig = EncoderConfig()
    align: AlignConfig = AlignConfig()


class FinetuneConfig(Section):
    """Supervised training of the segmentation network (paper, Sec. 5.1 and Appendix B)."""

    gone = {"scan_share": Gone(1.0, "give the share as num_scans")}

    index: StorePath
    """Store written by prepare, with labels."""
    run: RunPath
    """Folder of the run, or its place in a bucket (s3://, gs://, az://); typed again, an interrupted run continues."""
    init: Init = "random"
    """Initialisation of the encoder: `random` (Kaiming uniform), a run's folder (with method=genesis ASPP and decoder
    come along), `pretrained:NAME` (weights that come with pgl_ray: openkbp_small), a .safetensors file of `export`, or
    a .pth file with the keys of MONAI's resnet50 (MedicalNet)."""
    allow_partial: bool = False
    """Take of `init` the tensors whose names and shapes fit, and say which; false: a mismatch is an error."""
    freeze: bool = False
    """Leave the encoder as `init` has it: no gradients, and its BatchNorm as in inference, with statistics that are
    estimated once, at the start, on unlabelled views of the split, for every `init` alike."""
    seed: Seed = 0
    """Seed of the split, the patches and the initialisation."""
    split: str = "train"
    """Split of the index that the scans are taken from."""
    num_scans: LabelledScans = 1.0
    """Labelled scans to use, validation included, drawn with the seed: a share of them, e.g. 0.2 (1.0: all), or a
    number from 2 on; fewer are part of more."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of them kept for validation, at least one scan."""
    task: Literal["multiclass", "binary"] = "multiclass"
    """multiclass: softmax over background and organs (Eq. 12); binary: one sigmoid per label value, a smaller value
    includes the larger ones, as organ includes tumour (Eq. 11)."""
    epochs: Positive = 100
    """Passes over the training scans."""
    max_steps: Positive | None = None
    """Length of the run in steps instead of epochs."""
    global_batch_size: Positive = 8
    """Patches per step over all workers."""
    accumulate: Positive = 1
    """Parts that a worker's patches of a step go through the network in, where memory is short. The gradient is that of
    the whole, the Dice of Eq. 11 and 12 included (which costs a second forward pass); BatchNorm sees a part at a
    time."""
    patches_per_scan: Positive = 8
    """Patches per scan and epoch."""
    foreground_share: Share = 0.0
    """Share of the patches that are centred in the box of a random labelled organ; 0 = uniform, as the paper."""
    patch: PatchConfig = PatchConfig()
    """Geometry of the patches: that of pre-training's views (Sec. 5.1)."""
    intensity: IntensityConfig = IntensityConfig()
    encoder: EncoderConfig | None = None
    """Encoder; none: the checkpoint's, or the default for init=random."""
    decoder: Literal["paper", "light"] = "paper"
    """paper: ASPP and three steps with skips (Appendix B); light: a feature pyramid of width 32 on four of the
    encoder's maps, which learns in a few hundred steps."""
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    loss: LossConfig = LossConfig()
    validate_every: Positive = 5
    """Epochs between two validations."""
    patience: Positive = 4
    """Validations without a better mean Dice after which training stops as overfitted; those before the first Dice
    above 0 do not count. The network of the best validation is kept."""
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_divisible(self.global_batch_size, self.train)
        batch = self.global_batch_size // self.train.num_workers
        if batch % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide a worker's {batch} patches (global_batch_size / "
                "train.num_workers)"
            )
        return self


class InferenceConfig(Section):
    """Sliding-window inference."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Overlap of neighbouring windows."""
    batch_size: Positive = 1
    """Windows per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the network; auto = bfloat16 on a GPU that has it, float32 on a CPU. Logits are added up in float32."""


class EvaluateConfig(Section):
    """Dice, IoU, HD and HD95 of a fine-tuned run on labelled scans."""

    run: RunPath
    """Fine-tuning run."""
    index: StorePath
    """Store written by prepare, with labels."""
    split: str = "test"
    """Split of the index to evaluate on."""
    num_scans: Positive | None = None
    """Scans to evaluate, the first ones by scan_id; none: all of the split."""
    output: FilePath | None = None
    """Folder of the results; none: <run>/evaluation."""
    save_predictions: bool = True
    """Write each predicted label map as NIfTI beside the metrics."""
    tta: bool = False
    """Test-time augmentation: average the logits of all eight flips of every window (eight times the work)."""
    compare: RunPath | None = None
    """Another run (or folder of results) that was evaluated on the same scans: differences, their 95 % intervals, and
    Wilcoxon's signed-rank test over the scans."""
    seed: Seed = 0
    """Seed of the bootstrap draws behind the intervals."""
    inference: InferenceConfig = InferenceConfig()


class PredictConfig(Section):
    """Label maps for CT volumes of any supported format."""

    run: RunPath
    """Fine-tuning run."""
    input: FilePath
    """A CT volume, a DICOM series' folder, or a folder of several."""
    output: FilePath
    """Label map (.nii.gz) for one volume or series, or a folder for many."""
    viewer: bool = True
    """Beside each label map, an HTML page with the scan, the labels and the organs' volumes, and pictures (PNG)."""
    tta: bool = False
    """Test-time augmentation: average the logits of all eight flips of every window (eight times the work)."""
    inference: InferenceConfig = InferenceConfig()


class ProbeConfig(ProbeSettings):
    """Judges of a frozen encoder: a linear classifier of voxels, a light decoder, point matching."""

    index: StorePath
    """Store written by prepare, with labels."""
    size: Triple = (16, 96, 96)
    """Window that the encoder sees, in voxels (D, H, W)."""
    init: Init = "random"
    """Encoder: `random`, a run's folder, `pretrained:NAME`, or a file as for fine-tuning."""
    encoder: EncoderConfig | None = None
    """Encoder; none: the checkpoint's, or the default for init=random."""
    judges: Annotated[
        tuple[Literal["voxels", "decoder", "matching"], ...], BeforeValidator(_listed), Field(min_length=1)
    ] = ("voxels",)
    """voxels: a linear classifier names the organ of single voxels; decoder: a light decoder learns organs from the
    frozen maps (Dice, HD95); matching: organ centroids and places under known deformations are found again by the
    nearest feature (mm)."""
    decoder_seeds: Positive = 1
    """Decoders that are trained per encoder, each from its own seed."""
    ends: bool = True
    """Judge random weights of the same size beside it, in every reading: the strongest is what a claim must beat."""
    control: RunPath | None = None
    """A run that learnt no places, pre-trained with align.wrong_priors=true: a second control."""
    ceiling: RunPath | None = None
    """A run of the same size that was fine-tuned with all labels: its encoder is the upper end."""
    output: FilePath | None = None
    """JSON file for the result; none: <init>/probe.json, X.probe.json beside a file X, or no file for random
    and pretrained:NAME."""


class SchedulerConfig(Section):
    """Which trials of a sweep are stopped early."""

    kind: Literal["none", "asha", "pbt"] = "none"
    """asha: at each rung the worse trials are stopped (Li et al. 2020); pbt: the worst quarter goes on from one of the
    best, with its learning rate changed (Jaderberg et al. 2017); its trials run all at a time."""
    grace: Annotated[int, Field(ge=1, le=99)] = 25
    """Percent of a judged stage: where the first rung stands, or between two changes of pbt."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """asha keeps about one in so many trials at a rung; the next one stands so many times further."""


class TuneConfig(Section):
    """Trials of pretrain, probe, finetune and evaluate, those stages that have a base: a sweep, or a grid of arms."""

    run: FilePath
    """Folder of the sweep; the same command again continues an interrupted one, one with a larger space adds to it."""
    index: StorePath
    """Store written by prepare, with labels; a stage may take another: base_pretrain.index."""
    base_pretrain: dict[str, Any] | None = None
    """What the trials' pre-training config says beyond the defaults; none: no pre-training."""
    base_probe: dict[str, Any] | None = None
    """The same of a probe of the pre-trained encoder; none: no probe. Its `ends` is false where it is not given: random
    weights are an arm of the sweep (probe.init: random), judged once, in every reading."""
    base_finetune: dict[str, Any] | None = {}
    """The same of fine-tuning. With `init` (or where an arm sets finetune.init) there is no pre-training before it."""
    base_evaluate: dict[str, Any] | None = None
    """The same of the evaluation of the fine-tuned network; none: no evaluation."""
    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(_without_null)] = {}
    """Name -> dotted keys and values that belong together; every arm meets every point of the space. `arms.NAME=null`
    leaves one out."""
    space: Annotated[dict[str, dict[Verb, list[Any]]], BeforeValidator(_without_null)] = {}
    """Dotted key (pretrain.ema_decay, finetune.optim.lr) -> one of Ray Tune's verbs and its arguments. `a + b` gives
    two keys one value. On a command line: 'space[finetune.optim.lr].choice=[1,2]'."""
    judge: str = "val/dice"
    """Figure of the last stage that trials are judged by: of the metrics, higher is better; where a probe comes last,
    probe/balanced_accuracy, probe/decoder_dice, or probe/matching_mm, of which lower is better."""
    first_judge: str | None = None
    """Figure of a probe (as above) that the scheduler may stop trials by before fine-tuning; none: pre-training is not
    judged, only a collapse ends it."""
    scheduler: SchedulerConfig = SchedulerConfig()
    search: Literal["random", "optuna"] = "random"
    """How values are drawn: at random, or by Optuna's TPE from what earlier trials gave (extra `tune`)."""
    num_trials: Positive = 1
    """Draws from the space; a grid_search and the arms multiply them."""
    max_trials: Positive = 64
    """Largest number of trials that is accepted."""
    max_concurrent: Positive | None = None
    """Trials at a time; none: as many as the cluster's CPUs and GPUs hold, with those that its autoscaler can add."""
    published: Literal["bcv", "liver", "kits", "spleen"] | None = None
    """Tables of conf/published.yaml that the report sets beside the arms of the same name."""
    seed: Seed = 0
    """Seed of the draws."""
    ray: RayConfig = RayConfig()


class ExportConfig(Section):
    """A run's weights in a file for other code, with what the network expects as input."""

    run: RunPath
    """Pre-training or fine-tuning run."""
    output: FilePath
    """File to write: *.safetensors (weights, for MONAI and `pgl_ray.export.load`), *.pt2 (torch.export), *.onnx, or
    *.pth (nnU-Net, for encoder.kind=resenc)."""
    part: Literal["auto", "encoder", "segmenter"] = "auto"
    """What to export; auto: the encoder of a pre-training run, the segmentation network of a fine-tuning run."""
    size: Triple | None = None
    """Window (D, H, W) that a .pt2 or .onnx file takes, any number at a time; none: the run's views or patches."""


class ReportConfig(Section):
    """Runs -> one self-contained HTML page."""

    run: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
    """Run folders: one, or [a,b,c] to compare."""
    output: FilePath | None = None
    """HTML file; none: report.html in the first run's folder or bucket."""
    title: str = "pgl_ray report"
    """Heading of the page."""
    notes: list[str] = []
    """Paragraphs that stand below the answers."""


class FeaturesConfig(Section):
    """An encoder and how scans are shown to it."""

    init: Init
    """Encoder: a run's folder, `pretrained:NAME` (weights that come with pgl_ray: openkbp_small), a .safetensors file
    of `export`, or other weights as for fine-tuning."""
    maps: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Names of the encoder's maps that are used: stem, layer1, ... layer4 of a ResNet, stage1, ... of a ResEnc."""
    spacing: Literal["own", "weights"] = "own"
    """own: scans as they are, with a note where their voxel size is unlike that of the weights' training; weights: they
    are resampled to that size first."""
    size: Triple = (16, 96, 96)
    """Views of the encoder's training in voxels (D, H, W); scans are covered by windows of twice that."""
    hu_window: tuple[float, float] | None = None
    """HU that the weights expect, for weights that do not say it; none: what they say, or the store's."""
    seed: Seed = 0
    """Seed of the views that BatchNorm's statistics and the scale of features are estimated on."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.hu_window:
            _check_range("hu_window", self.hu_window)
        return self


class EmbedConfig(FeaturesConfig):
    """A vector per scan, and on request the maps of whole scans, of a frozen encoder: Parquet, Zarr and a page."""

    index: StorePath | None = None
    """Store written by prepare: its scans are embedded, and BatchNorm's statistics are estimated on them, as the judges
    do it."""
    input: FilePath | None = None
    """CTs to embed instead: a file, a DICOM series' folder, or a folder of several. Without `index` BatchNorm stays as
    trained."""
    output: FilePath
    """Folder of embeddings.parquet, embed.html and dense/; the same command again adds what is new or changed."""
    maps: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Names of the encoder's maps that are pooled, and written with `dense`: stem, layer1, ... layer4 of a ResNet,
    stage1, ... of a ResEnc; none: the last that was trained."""
    dense: bool = False
    """Write the maps of whole scans as well, dense/SCAN_ID.zarr, float16."""
    workers: Positive | None = None
    """Processes that embed, on Ray where there are several; none: this one alone for a few scans or where it has a GPU,
    else one per core, or per GPU of a cluster."""
    pictures: Annotated[int, Field(ge=0)] = 200
    """Scans whose nearest neighbours the page shows as pictures; of more, evenly chosen ones."""
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _scans(self) -> Self:
        if self.index is None and self.input is None:
            raise ValueError("index=... or input=... is required: a store, or CTs")
        return self


class MatchConfig(FeaturesConfig):
    """Places of one CT are found in another by the nearest feature: table, similarity maps, and a page to click in."""

    a: FilePath
    """CT with the places: a file, or a folder with one DICOM series."""
    b: FilePath
    """CT that is searched."""
    point: tuple[float, float, float] | None = None
    """A place of scan A in mm (x, y, z; RAS+)."""
    voxel: tuple[int, int, int] | None = None
    """The same as a voxel's index (i, j, k) in the file's own axes, from 0."""
    labels: FilePath | None = None
    """A label map of scan A: each value's centroid."""
    names: dict[str, Positive] = {}
    """Organ name -> value of `labels`; none: label_1, ..."""
    landmarks: FilePath | None = None
    """A CSV file with columns name, x, y, z (mm, RAS+)."""
    output: FilePath
    """Folder of matches.csv, similarity_*.nii.gz and match.html."""
    index: StorePath | None = None
    """Store on whose scans BatchNorm's statistics are estimated, as the judges do it; none: as trained."""
    maps: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Names of the encoder's maps that are compared, e.g. [layer3,layer4]; none: all but a ResNet's stem."""
    apart_mm: Annotated[float, Field(gt=0)] = 40.0
    """How far from the found place the runner-up must lie."""
    similarity_maps: Annotated[int, Field(ge=0)] = 8
    """Places whose similarity map is written as NIfTI, the first ones."""
    page_mb: Annotated[float, Field(ge=0)] = 25.0
    """Largest page in MB; 0: none is made."""

    @field_validator("point", "voxel", mode="before")
    @classmethod
    def _three(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and (not isinstance(value, list | tuple) or len(value) != 3):
            what = "[x,y,z] in mm" if info.field_name == "point" else "[i,j,k]"
            raise ValueError(f"{info.field_name}={value}: expected three numbers, {what}")
        return value


class DoctorConfig(Section):
    """What usually goes wrong, looked for on every node of a cluster, or on this machine: ok, or the mend."""

    index: StorePath | None = None
    """Store that a run will read; some scans are read to see how fast that goes."""
    run: RunPath | None = None
    """Folder of the run, which need not be there yet, or its place in a bucket; a small file is written there and
    removed."""
    ray: RayConfig = RayConfig()


class DemoConfig(Section):
    """Phantoms -> prepare -> pre-train -> judges -> fine-tune -> evaluate -> report at a small size."""

    out: Annotated[FilePath, Field(validate_default=True)] = "demo"
    """Folder of everything the demo writes."""
    seed: Seed = 0
    """Seed of phantoms and runs."""
    num_unlabelled: Positive = 24
    """Phantoms for pre-training."""
    num_labelled: Positive = 5
    """Labelled phantoms for fine-tuning, one of them for validation."""
    num_test: Positive = 6
    """Labelled phantoms for the comparison."""
    pretrain_steps: Positive = 120
    """Steps of PGL pre-training."""
    finetune_steps: Positive = 120
    """Steps of each fine-tuning."""
    ray: RayConfig = RayConfig()


def _check_divisible(batch: int, train: TrainConfig) -> None:
    for name, workers in (("num_workers", train.num_workers), ("min_workers", train.min_workers)):
        if workers and batch % workers:
            raise ValueError(f"global_batch_size {batch} is not divisible by train.{name} {workers}")


# -- reading ----------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=Section)


def load(model: type[Model], args: list[str]) -> Model:
    """Builds a config from `[file.yaml ...] [a.b=c ...]`.

    Raises:
        ValueError: one message with every fault: dotted path, given value, accepted values.
    """
    merged: DictConfig | ListConfig | TupleConfig = OmegaConf.create({})
    kept: list[Any] = []
    for arg in args:
        key, eq, value = arg.partition("=")
        try:
            if eq and not key.endswith((".yaml", ".yml")):
                annotation = _annotation_at(model, key)
                if _is_text(annotation) or _is_texts(annotation):
                    kept.append(_typed(annotation, value))
                    arg = f"{key}={KEPT}{len(kept) - 1}"
                part = OmegaConf.from_dotlist([arg])
            elif arg.endswith((".yaml", ".yml")):
                part = _load_file(model, arg)
            else:
                raise ValueError(f"{arg!r}: expected a .yaml file or key=value")
            merged = OmegaConf.merge(merged, part)
        except FileNotFoundError:
            raise ValueError(f"config file {arg!r} does not exist") from None
        except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError, TypeError) as error:
            raise ValueError(f"{arg!r}: {' '.join(str(error).split())}") from None
    return build(model, _put_back(OmegaConf.to_container(merged, resolve=False), kept))


# Paths and other texts mean what was typed: YAML would read 007 as 7, 1e5 and 2_000 as numbers, yes as true.

KEPT = "\ue000text "  # stands for a text of the command line, with its number, until all is merged


def _annotation_at(model: Any, key: str) -> Any:
    """The type of the field at a dotted path; none: no field, or inside a free dict."""
    annotation = model
    for part in re.findall(r"[^.\[\]]+", key):
        if part.isdecimal():  # of a list
            continue
        section = _section_of(annotation) if annotation else None
        field = section.model_fields.get(part) if section else None
        annotation = field.annotation if field else None
    return annotation


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows; of Literal the types of its values."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}


def _is_text(annotation: Any) -> bool:
    return _kinds(annotation) - {NoneType} == {str}


def _is_texts(annotation: Any) -> bool:
    """Whether it is a list of texts."""
    listed = get_origin(annotation) in (list, tuple)
    return listed and all(_is_text(part) for part in get_args(annotation) if part is not Ellipsis)


def _typed(annotation: Any, value: str) -> Any:
    """What was typed for a text, or for a list of texts ([a, b], or one of them)."""
    if _is_texts(annotation):
        return yaml.load(value, yaml.BaseLoader) if value.startswith("[") else value
    return None if value == "null" and NoneType in _kinds(annotation) else value


def _put_back(values: Any, kept: list[Any]) -> Any:
    if isinstance(values, dict):
        return {key: _put_back(value, kept) for key, value in values.items()}
    if isinstance(values, str) and values.startswith(KEPT):
        return kept[int(values.removeprefix(KEPT))]
    return values


def _load_file(model: type[Section], path: str) -> Any:
    """A YAML file, or a door's part of it, in which the fields that are texts stand as they are written."""
    read = _own_section(model, OmegaConf.load(path), path)
    if not OmegaConf.is_dict(read):
        return read
    with open(path, encoding="utf-8") as file:
        written = _own_section(model, yaml.load(file, yaml.BaseLoader), path)
    values = _with_texts(model, OmegaConf.to_container(read, resolve=False), written)
    if model is CheckAlignConfig:
        own, theirs = model.model_fields, PretrainConfig.model_fields
        values = {key: value for key, value in values.items() if key in own or key not in theirs}
    return OmegaConf.create(values)


def _with_texts(annotation: Any, read: Any, written: Any) -> Any:
    """`read` with what was written wherever a text is wanted and YAML made a number or a truth of it."""
    section = _section_of(annotation)
    if isinstance(read, dict) and isinstance(written, dict) and section:
        fields = section.model_fields
        return {
            key: _with_texts(fields[key].annotation, value, written.get(key)) if key in fields else value
            for key, value in read.items()
        }
    if isinstance(read, list) and isinstance(written, list) and (section or _is_texts(annotation)):
        inner = section or str
        return [_with_texts(inner, *pair) for pair in zip(read, written)]
    if isinstance(read, bool | int | float) and isinstance(written, str) and _is_text(annotation):
        return written
    return read


def _own_section(model: type[Section], file: Any, name: str) -> Any:
    """A door's part of a file that holds one section per door, as a sweep's best.yaml; any other file as it is."""
    doors = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    if not file or not set(file) <= set(doors):
        return file
    reader = PretrainConfig if model is CheckAlignConfig else model
    own = next((part for part, config in doors.items() if issubclass(reader, config)), None)
    if own not in file:
        raise ValueError(f"{name!r} has settings for {', '.join(file)} alone, none for this door")
    return file[own]


def build(model: type[Model], values: dict[str, Any]) -> Model:
    """Validates a nested dict; faults come as one ValueError that names each dotted path.

    Settings of earlier versions may stand in it with the value that they always have now.
    """
    values, other = without_gone(model, values)
    faults = [f"{path}={value}: {gone.instead}" for path, (value, gone) in other.items()]
    try:
        built = model.model_validate(values)
    except ValidationError as error:
        faults += [_describe(model, item) for item in error.errors()]
    if faults:
        raise ValueError("; ".join(faults)) from None
    return built


def without_gone(model: type[Section], values: Any, prefix: str = "") -> tuple[Any, dict[str, tuple[Any, Gone]]]:
    """Splits a nested dict into what today's settings are read from, and settings of earlier versions.

    Returns:
        The dict without the settings of earlier versions, and those of another value than today's: dotted path ->
        (value, what it is today).
    """
    if not isinstance(values, dict):
        return values, {}
    rest: dict[str, Any] = {}
    other: dict[str, tuple[Any, Any]] = {}
    for key, value in values.items():
        field, gone = model.model_fields.get(key), model.gone.get(key)
        section = _section_of(field.annotation) if field else None
        if section:
            rest[key], below = without_gone(section, value, f"{prefix}{key}.")
            other |= below
        elif gone is None:
            rest[key] = value
        else:
            other |= _others(f"{prefix}{key}", value, gone)
    return rest, other


def _others(path: str, value: Any, gone: Gone) -> dict[str, tuple[Any, Gone]]:
    """A setting of earlier versions, or a section of them, as far as its value is not today's."""
    if isinstance(value, dict) and isinstance(gone.value, dict):
        never = Gone(..., "no version has this setting")
        known = {key: Gone(one) for key, one in gone.value.items()}
        parts = [_others(f"{path}.{key}", part, known.get(key, never)) for key, part in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    gone = gone._replace(instead=gone.instead or f"this is always {gone.value} now, leave it out")
    return {} if value == gone.value else {path: (value, gone)}


def _describe(model: type[Section], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {path!r}; known here: {', '.join(sorted(_fields_at(model, item['loc'][:-1])))}"
    if item["type"] == "missing":
        return f"{path}=... is required ({_field_doc(model, item['loc'])})"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}={item['input']!r}: {message}" if item["type"] != "value_error" else message


def _fields_at(model: Any, loc: tuple) -> list[str]:
    for part in (part for part in loc if isinstance(part, str)):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section_of(field.annotation) if field else None
    return list(model.model_fields) if model else []


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _field_doc(model: type[Section], loc: tuple) -> str:
    field = model.model_fields.get(str(loc[0]))
    return (field.description or "") if field else ""


def to_yaml(config: Section) -> str:
    """The resolved config as YAML that `load` reads back to an equal model."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def keys(model: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """All dotted keys of a model as (key, default, description)."""
    rows = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section and section is not model and get_origin(field.annotation) is not tuple:
            rows += keys(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else str(field.default)
        rows.append((prefix + name, default, " ".join((field.description or "").split())))
    return rows


class FailedRun(RuntimeError):
    """A run that could not finish for a reason outside the command line; exit code 1."""
