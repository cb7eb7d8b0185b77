"""Knobs of what a network sees: crops, intensity, the stream, and of the encoder that sees it."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from pgl_ray.config.fields import NonNegative, Positive, Section, Share, Triple, check_range


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
        check_range("crop_scale", self.crop_scale)
        return self


class ViewsConfig(CropConfig):
    """Pairs of views; their size is the paper's P."""

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
            check_range(name, getattr(self, name))
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
    """Projector and predictor: Conv1x1(hidden)-BN-ReLU-Conv1x1(out) (paper, Sec. 3.3). Not used by genesis."""

    hidden: Positive = 4096
    """Channels of the hidden layer."""
    out: Positive = 256
    """Channels of the features that are compared."""


class AlignConfig(Section):
    """The prior-guided aligner (paper, Eq. 4 to 7; method=pgl alone) and its ablations (Tables 5 to 8; any method)."""

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
    pairs that have no other bin (at 16x96x96 and 8,16,16 more than half of them: align/valid_pairs_share). The mean
    is over a worker's pairs that have one, so it depends on the number of workers."""
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


class StreamConfig(Section):
    """How pairs of views are read and made, and how they reach the workers."""

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
