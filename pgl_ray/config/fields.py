"""What the knobs' values are: paths, seeds, shares, lengths; the section that all of them stand in."""

import contextlib
import math
import os
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pgl_ray.paths import is_url

PRETRAINED = "pretrained:"  # before the name of weights that come with pgl_ray
LONGEST_NAME = 255  # bytes, of a file or folder
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's working directory


def _absolute(value: str) -> str:
    """Workers run in other directories, so paths are made absolute where they are read."""
    if not value:
        raise PydanticCustomError("path", "is empty: give a path")
    if is_url(value):
        raise PydanticCustomError(
            "path", "only stores and runs of pretrain and finetune may lie in a bucket: give a folder"
        )
    path = os.path.expanduser(value)
    if not os.path.isabs(path) and JOB_FOLDER in f"{os.getcwd()}/":
        raise PydanticCustomError("path", "a job's working directory is a copy that is removed: give an absolute path")
    if max(len(part) for part in os.fsencode(path).split(b"/")) > LONGEST_NAME:
        raise PydanticCustomError("path", f"has a name longer than {LONGEST_NAME} bytes, which no file has: shorten it")
    return os.path.abspath(path)


def _absolute_or_url(value: str) -> str:
    if not is_url(value):
        return _absolute(value)
    scheme, _, rest = value.partition("://")
    if scheme != "file" and not rest.partition("/")[0].strip():
        raise PydanticCustomError(
            "path",
            "names no bucket after ://, as where a variable in it is empty: give {given}",
            {"given": f"{scheme or 's3'}://BUCKET/..."},
        )
    return value.rstrip("/")


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
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # views are drawn from it as an int64
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PerScan = Annotated[int, Field(ge=1, le=10**6)]  # draws in an epoch, of which all are shuffled in memory
LabelledScans = Annotated[int | float, BeforeValidator(_share_or_number)]
LEAST_VOXEL_MM, LARGEST_VOXEL_MM = 0.02, 30.0  # finest cone-beam CT: 0.075; thickest slices: 10 to 20
Length = Annotated[float, Field(ge=LEAST_VOXEL_MM, le=LARGEST_VOXEL_MM)]  # of a voxel, in mm
Triple = tuple[Positive, Positive, Positive]
Verb = Literal["choice", "grid_search", "uniform", "loguniform", "quniform", "randint"]


class Section(BaseModel):
    """A frozen group of knobs: unknown keys are refused, attribute docstrings are the descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truths_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = kinds_of(cls.model_fields[str(info.field_name)].annotation, ALL)
        if bool not in kinds and kinds & {int, float} and any(isinstance(one, bool) for one in _flat(value)):
            raise PydanticCustomError("number", "expected a number, not yes or no")
        return value


def _flat(value: Any) -> list[Any]:
    """A value alone, or those of lists and dicts."""
    value = list(value.values()) if isinstance(value, dict) else value
    return [one for part in value for one in _flat(part)] if isinstance(value, list | tuple) else [value]


EITHER = (Union, UnionType)
ALL = (*EITHER, tuple, list, dict)


def kinds_of(annotation: Any, through: tuple[Any, ...] = EITHER) -> set[Any]:
    """The plain types that an annotation allows, seen through unions or what is given; of Literal its values' types."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0], through)
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in through:
        return {kind for part in get_args(annotation) for kind in kinds_of(part, through)}
    return {annotation}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds; none: it holds a value."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def with_absolute_paths(model: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """Values of a section, its keys dotted or nested, with paths made absolute; what is refused stays as it is."""
    absolute = {}
    for name, value in values.items():
        key, _, rest = str(name).partition(".")
        field = model.model_fields.get(key)
        section = section_of(field.annotation) if field else None
        if section and rest:
            value = with_absolute_paths(section, {rest: value})[rest]
        elif section and isinstance(value, dict):
            value = with_absolute_paths(section, value)
        elif field and isinstance(value, str):
            kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            with contextlib.suppress(ValidationError):
                read = TypeAdapter[Any](kind).validate_python(value)
                value = read if isinstance(read, str) else value
        absolute[name] = value
    return absolute


def listed(value: Any) -> Any:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


def without_null(value: Any) -> Any:
    """A dict without the keys that are set to null."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def check_range(name: str, value: tuple[float, float]) -> None:
    """Refuses a range whose ends are in the wrong order."""
    if not value[0] <= value[1]:
        raise ValueError(f"{name}: lower bound {value[0]} is above upper bound {value[1]}")


class FailedRun(RuntimeError):
    """A run that could not finish for a reason outside the command line; exit code 1."""
