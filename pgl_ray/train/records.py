"""What the files of a run say, parsed once where they are read: run.json, and what a checkpoint says of its network."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pgl_ray.config import ViewsConfig
from pgl_ray.prior import triple
from pgl_ray.train.run_files import RECORD, write_json

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: damaged; names the file.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def parse(model: type[Model], values: Any, subject: str) -> Model:
    """What was read from a file, as a record.

    Args:
        model: the record's class.
        values: plain values.
        subject: of the error's sentence, with its verb: "FILE is".

    Raises:
        ValueError: damaged; one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}".removeprefix(": ") for item in error.errors()]
        raise ValueError(f"{subject} damaged: {'; '.join(faults)}") from None


Facts = Annotated[dict[str, Any], BeforeValidator(lambda values: values or {})]  # none: not recorded


class RunStore(BaseModel):
    """Of a run's store, when the run was opened.

    Attributes:
        num_scans: that a pre-training draws from, or of the whole store.
        labels: organ -> label value.
        hu_window: (low, high), HU, that voxels are clipped to.
        splits: in which scans have labels; none: an earlier version did not note them.
        spacing_mm: that all scans were resampled to (D, H, W); none: each has its own.
        scans_hash: over names and voxels of the scans that the run trains on, and validates on.
        labels_hash: of a fine-tuning, over what is labelled in them, and their source files.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    num_scans: int = 0
    labels: dict[str, int] = {}
    hu_window: tuple[float, float] | None = None
    splits: list[str] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    scans_hash: str = ""
    labels_hash: str = ""


class RunScans(BaseModel):
    """scan_ids that a fine-tuning trains on and validates on."""

    model_config = ConfigDict(frozen=True, extra="allow")

    train: list[str]
    val: list[str]


class RunRecord(BaseModel):
    """run.json: what a run is, written when it is opened. What another version adds to it stays in it.

    Attributes:
        door: that trains it, pretrain or finetune.
        config: the door's, resolved, as it was written: another version may have other keys.
        versions: of pgl_ray and torch at the start.
        started: local time, ISO 8601.
        num_parameters: of the encoder that is pre-trained, or of the segmentation network.
        num_trained_parameters: of a fine-tuning, whose encoder may be frozen.
        num_steps: when it is finished; 0: not recorded.
        plan: identity of `stream.Plan`, which decides the rows of each step.
        store: what it was opened on.
        scans: of a fine-tuning.
        weights: of a fine-tuning, what became of those of config.init (`weights.Report`); none: random.
        outlook: of a pre-training, `outlook.Outlook.facts`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    door: str
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started: str = ""
    num_parameters: int = 0
    num_trained_parameters: int = 0
    num_steps: int = 0
    plan: str = ""
    store: RunStore = RunStore()
    scans: RunScans | None = None
    weights: dict[str, Any] | None = None
    outlook: Facts = {}

    @classmethod
    def read(cls, run: str | Path) -> Self:
        """The record of a run's folder on this machine.

        Raises:
            OSError: it has none.
            ValueError: damaged.
        """
        path = Path(run, RECORD)
        return parse(cls, read_json(path), f"{path} is")

    def write(self, run: Path) -> None:
        """Writes run.json in one step."""
        write_json(run / RECORD, self.model_dump(exclude_unset=True))

    def steps_left(self, rows: list[dict[str, float]]) -> int:
        """Steps that a training had before it at its newest row of metrics; 0 where it ended, by its plan or, of a
        fine-tuning, because nothing better came (`patience`), and where it has none."""
        best = stale = 0.0
        for dice in (row["val/dice"] for row in rows if "val/dice" in row):
            stale = 0 if dice > best or not best else stale + 1
            best = max(best, dice)
        if not rows or stale >= self.config.get("patience", math.inf):
            return 0
        return max(0, self.num_steps - int(rows[-1]["step"]))

    @property
    def index(self) -> str:
        """Folder or URL of the store."""
        return self.config["index"]

    @property
    def init(self) -> str:
        """Weights that it began from, as given; "random" of a pre-training, too."""
        return self.config.get("init", "random")

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.config["seed"]

    @property
    def method(self) -> str:
        """Of a pre-training: pgl, byol or genesis."""
        return self.config.get("method", "pgl")

    @property
    def learning_rate(self) -> float:
        """The highest one."""
        return self.config["optim"]["lr"]


def _with_kind(encoder: Any) -> Any:
    """Before there were other encoders, the paper's was not named."""
    return {"kind": "resnet", **encoder} if isinstance(encoder, dict) else encoder


class CheckpointMeta(BaseModel):
    """What a checkpoint says of its network: all that is needed to use the weights elsewhere.

    Attributes:
        door: that trained it, pretrain or finetune; "": an exported file.
        method: of a pre-training: pgl, byol or genesis; "": not one, or not recorded.
        encoder: settings, for `build_encoder`.
        level: of a pre-training, number of the last map that was trained, the stages behind it were not; none: all.
        hu_window: (low, high), HU, that voxels are clipped to.
        data: of the training scans, `data.facts.training_facts`; {}: not recorded.
        config: the door's, JSON; {}: not recorded.
        steps: trained so far; none: not recorded. The checkpoint has it next to this.
        decoder, task, num_outputs, labels, patch_size, spacing_mm: of a segmentation network: paper or light; binary
            or multiclass; channels of its logits; organ -> label value; (D, H, W) of its windows; voxel size of a
            resampled store in mm (D, H, W), or none.
        init_level: of a segmentation network, number of the last map of its encoder that was pre-trained.
    """

    model_config = ConfigDict(frozen=True)

    door: str = ""
    method: str = ""
    encoder: Annotated[dict[str, Any], BeforeValidator(_with_kind)]
    level: int | None = None
    decoder: Literal["paper", "light"] = "paper"
    hu_window: tuple[float, float]
    spacing_mm: tuple[float, float, float] | None = None
    labels: dict[str, int] = {}
    task: Literal["multiclass", "binary"] = "multiclass"
    num_outputs: int = 0
    patch_size: tuple[int, int, int] | None = None
    init_level: int | None = None
    config: str = "{}"
    data: Facts = {}
    steps: int | None = None

    def plain(self) -> dict[str, Any]:
        """As checkpoints hold it, which are read without running code."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def view_size(self) -> tuple[int, int, int]:
        """(D, H, W) of the views of its pre-training; the default where that is not recorded."""
        views = json.loads(self.config).get("views")
        return triple(views["size"]) if isinstance(views, dict) and views.get("size") else ViewsConfig().size
