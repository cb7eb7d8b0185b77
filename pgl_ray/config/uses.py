"""Knobs of the doors that use what was trained: evaluate, predict, export, report, embed, match, demo, doctor."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pgl_ray.config.fields import (
    FilePath,
    Init,
    Positive,
    RunPath,
    Section,
    Seed,
    StorePath,
    Triple,
    check_range,
    listed,
)
from pgl_ray.config.training import RayConfig


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
    """Test-time augmentation: average the logits of all eight flips of every window (eight times the work); refused
    where the network was trained without flips."""
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
    """Test-time augmentation: average the logits of all eight flips of every window (eight times the work); refused
    where the network was trained without flips."""
    inference: InferenceConfig = InferenceConfig()


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

    run: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)]
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
    maps: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Names of the encoder's maps that are used: stem, layer1, ... layer4 of a ResNet, stage1, ... of a ResEnc."""
    spacing: Literal["own", "weights"] = "own"
    """own: scans as they are, with a note where their voxel size is unlike that of the weights' training; weights: they
    are resampled to that size first."""
    size: Triple | None = None
    """Views of the encoder's training in voxels (D, H, W), scans are covered by windows of twice that; none: as the
    weights say, or 16,96,96 where they don't."""
    hu_window: tuple[float, float] | None = None
    """HU that the weights expect, for weights that do not say it; none: what they say, or the store's."""
    seed: Seed = 0
    """Seed of the views that BatchNorm's statistics and the scale of features are estimated on."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.hu_window:
            check_range("hu_window", self.hu_window)
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
    maps: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
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
    maps: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Names of the encoder's maps that are compared, e.g. [layer3,layer4]; none: all but the finest."""
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
    num_labelled: Annotated[int, Field(ge=2)] = 5
    """Labelled phantoms for fine-tuning, one of them for validation."""
    num_test: Annotated[int, Field(ge=2)] = 6
    """Labelled phantoms for the comparison; places of one are searched in another."""
    pretrain_steps: Positive = 120
    """Steps of PGL pre-training."""
    finetune_steps: Positive = 120
    """Steps of each fine-tuning."""
    ray: RayConfig = RayConfig()
