"""Knobs of the doors that train or measure a training: pretrain, bench, check_align, finetune, probe."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pgl_ray.config.fields import (
    FilePath,
    Init,
    LabelledScans,
    PerScan,
    Positive,
    RunPath,
    Section,
    Seed,
    Share,
    StorePath,
    Triple,
    listed,
)
from pgl_ray.config.training import (
    METHOD_OPTIM,
    OPTIM_DEFAULTS,
    FinetuneOptimConfig,
    HealthConfig,
    LossConfig,
    PretrainLossConfig,
    PretrainOptimConfig,
    ProbeCurveConfig,
    ProbeSettings,
    RayConfig,
    TrainConfig,
    check_divisible,
    resolved_optim,
)
from pgl_ray.config.views import (
    AlignConfig,
    EncoderConfig,
    HeadsConfig,
    IntensityConfig,
    PatchConfig,
    StreamConfig,
    ViewsConfig,
)


class PretrainConfig(Section):
    """Self-supervised pre-training (paper, Sec. 3 and 5.1)."""

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
    pairs_per_scan: PerScan = 1
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
        check_divisible(self.global_batch_size, self.train)
        if self.method == "genesis" and self.stream.on_gpu in ("intensity", "all"):
            raise ValueError("method=genesis deforms finished views: stream.on_gpu must be nothing or auto")
        if self.pairs_per_scan % self.stream.pairs_per_region:
            raise ValueError(
                f"stream.pairs_per_region={self.stream.pairs_per_region} must divide pairs_per_scan="
                f"{self.pairs_per_scan}: raise pairs_per_scan and lower epochs"
            )
        if self.method != "pgl" and (self.loss != PretrainLossConfig() or self.align.more_strides):
            own, plain = self.loss.model_dump(), PretrainLossConfig().model_dump()
            mend = [f"loss.{key}={plain[key]}" for key, value in own.items() if value != plain[key]]
            mend += ["align.more_strides=[]"] if self.align.more_strides else []
            raise ValueError(
                f"loss.* and align.more_strides are of method=pgl, not {self.method}: leave them out, or where a file "
                f"gives them take {' '.join(mend)}"
            )
        for key in ("wrong_priors", "mask_clamped"):
            if self.method != "pgl" and getattr(self.align, key):
                raise ValueError(f"align.{key} is of method=pgl: {self.method} aligns nothing; take align.{key}=false")
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

    @model_validator(mode="after")
    def _tells_places_apart(self) -> Self:
        """Each map is compared once, and has places to tell one from."""
        maps = [*self.align.more_strides, self.align.output_stride]
        others = [list(one) for one in dict.fromkeys(self.align.more_strides) if one != self.align.output_stride]
        if self.method == "pgl" and len(others) + 1 < len(maps):
            raise ValueError(
                f"align.more_strides={self.align.more_strides} with align.output_stride={self.align.output_stride}: a "
                f"map is compared once: take align.more_strides={str(others).replace(' ', '')}, or another map for it"
            )
        if self.method != "pgl" or self.loss.kind != "contrast":
            return self
        of_one_pair = self.loss.negatives == "pair" or self.global_batch_size == self.train.num_workers
        if of_one_pair and self.loss.num_bins == 1:
            raise ValueError("loss.num_bins=1 leaves contrast no other place to tell one from: take 2 or more")
        if of_one_pair and self.views.size in maps:
            raise ValueError(
                f"loss.kind=contrast has no other place to tell one from where views.size={self.views.size} is one "
                "cell: take larger views, or a smaller stride in align.output_stride and align.more_strides"
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
    """Pre-training run whose config is checked, and whose folder and report get table and picture; of a run in a
    bucket, or with settings typed that are not the run's, they go to `output`."""
    num_pairs: Annotated[int, Field(ge=64)] = 128
    """Random pairs of views; all 64 pairs of flips come up in turn."""
    output: Annotated[FilePath, Field(validate_default=True)] = "check_align"
    """Folder for check_align.json and check_align.png where they go to no run."""
    seed: Seed = 0
    """Seed of the pairs, and of the phantom."""
    split: str | None = None
    """Split of the index whose scans are cropped; none: all scans."""
    views: ViewsConfig = ViewsConfig()
    encoder: EncoderConfig = EncoderConfig()
    align: AlignConfig = AlignConfig()


class FinetuneConfig(Section):
    """Supervised training of the segmentation network (paper, Sec. 5.1 and Appendix B)."""

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
    patches_per_scan: PerScan = 8
    """Patches per scan and epoch."""
    foreground_share: Share = 0.0
    """Share of the patches that are centred in the box of a random labelled organ; 0 = uniform, as the paper."""
    patch: PatchConfig = PatchConfig()
    """Geometry of the patches: that of pre-training's views (Sec. 5.1)."""
    intensity: IntensityConfig = IntensityConfig()
    encoder: EncoderConfig | None = None
    """Encoder; none: the checkpoint's, or the default for init=random."""
    decoder: Literal["paper", "light"] = "paper"
    """paper: ASPP and three steps with skips (Appendix B), which from a deeper encoder than the paper's end on a coarse
    map; light: a feature pyramid of width 32 on four of the encoder's maps, which learns in a few hundred steps."""
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
        check_divisible(self.global_batch_size, self.train)
        batch = self.global_batch_size // self.train.num_workers
        if batch % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide a worker's {batch} patches (global_batch_size / "
                "train.num_workers)"
            )
        return self


class ProbeConfig(ProbeSettings):
    """Judges of a frozen encoder: a linear classifier of voxels, a light decoder, point matching."""

    index: StorePath
    """Store written by prepare, with labels."""
    size: Triple | None = None
    """Window that the encoder sees, in voxels (D, H, W); none: the views of its pre-training, or 16,96,96 where the
    weights don't say them (fine-tuned ones do not)."""
    init: Init = "random"
    """Encoder: `random`, a run's folder, `pretrained:NAME`, or a file as for fine-tuning."""
    encoder: EncoderConfig | None = None
    """Encoder; none: the checkpoint's, or the default for init=random."""
    judges: Annotated[
        tuple[Literal["voxels", "decoder", "matching"], ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("voxels",)
    """voxels: a linear classifier names the organ of single voxels; decoder: a light decoder learns organs from the
    frozen maps (Dice, HD95); matching: organ centroids and places under known deformations are found again by the
    nearest feature (mm)."""
    decoder_seeds: Positive = 1
    """Decoders that are trained per encoder, each from its own seed; intervals are over them, too."""
    ends: bool = True
    """Judge random weights of the same size beside it, in every reading: the strongest is what a claim must beat.
    false: a control or ceiling that is given is judged without them."""
    all_readings: bool = False
    """Every judge reads the encoder in every state of its BatchNorm; otherwise the other states are the voxel probe's
    alone, which is quick."""
    control: RunPath | None = None
    """A run that learnt no places, pre-trained with align.wrong_priors=true: a second control, in every reading."""
    ceiling: RunPath | None = None
    """A run of the same size that was fine-tuned with all labels: its encoder is the upper end."""
    output: FilePath | None = None
    """JSON file for the result; none: <init>/probe.json, X.probe.json beside a file or checkpoint X, or no file for
    random and pretrained:NAME."""
