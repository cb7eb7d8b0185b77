"""The one way to read knobs: YAML files and `a.b=c`, checked, every fault in one message."""

import re
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ValidationError,
)

from pgl_ray.config.fields import Section, kinds_of, section_of
from pgl_ray.config.trainings import CheckAlignConfig, FinetuneConfig, PretrainConfig

Model = TypeVar("Model", bound=Section)


def load(model: type[Model], args: list[str]) -> Model:
    """Builds a config from `[file.yaml ...] [a.b=c ...]`.

    Raises:
        ValueError: one message with every fault: dotted path, given value, accepted values.
    """
    merged: DictConfig | ListConfig | TupleConfig = OmegaConf.create({})
    texts: list[Any] = []
    for arg in sorted(args, key=lambda arg: not _is_file(model, arg)):  # the files first, each kind in order
        key, eq, value = arg.partition("=")
        try:
            if _is_file(model, arg):
                part = _load_file(model, arg)
            elif eq:
                annotation = _annotation_at(model, key)
                text = _is_text(annotation) or _is_texts(annotation)
                if not value.strip() and (not text or annotation == (str | None)):  # paths refuse it
                    raise ValueError(f"{key}= is empty, as where a variable in it is: give a value, or leave it out")
                if text:
                    texts.append(_typed(annotation, value))
                    arg = f"{key}={PLACEHOLDER}{len(texts) - 1}"
                else:
                    arg = f"{key}={_in_decimals(annotation, value)}"
                part = OmegaConf.from_dotlist([arg])
            else:
                raise ValueError(f"{arg!r}: expected a .yaml file or key=value")
            merged = OmegaConf.merge(merged, part)
        except FileNotFoundError:
            raise ValueError(f"config file {arg!r} does not exist") from None
        except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError, TypeError) as error:
            raise ValueError(f"{arg!r}: {' '.join(str(error).split())}") from None
    return build(model, _put_back(OmegaConf.to_container(merged, resolve=False), texts))


def _is_file(model: type[Section], arg: str) -> bool:
    """Whether it names a YAML file, whose folders may have a = in their names, and is no key=value."""
    key, eq, _ = arg.partition("=")
    is_key = eq and ("/" not in key or re.split(r"[.\[]", key)[0] in model.model_fields)
    return arg.endswith((".yaml", ".yml")) and not is_key


# Paths and other texts mean what was typed: YAML would read 007 as 7, 1e5 and 2_000 as numbers, yes as true. Numbers
# are decimal: YAML would read 010 as octal, and 1:30 in base 60.

PLACEHOLDER = "\ue000text "  # stands for a text of the command line, with its number, until all is merged


def _annotation_at(model: Any, key: str) -> Any:
    """The type of the field at a dotted path; none: no field, or inside a free dict."""
    annotation = model
    for part in re.findall(r"[^.\[\]]+", key):
        if part.isdecimal():  # of a list
            continue
        section = section_of(annotation) if annotation else None
        field = section.model_fields.get(part) if section else None
        annotation = field.annotation if field else None
    return annotation


def _is_text(annotation: Any) -> bool:
    return kinds_of(annotation) - {NoneType} == {str}


def _is_texts(annotation: Any) -> bool:
    """Whether it is a list of texts."""
    listed = get_origin(annotation) in (list, tuple)
    return listed and all(_is_text(part) for part in get_args(annotation) if part is not Ellipsis)


def _typed(annotation: Any, value: str) -> Any:
    """What was typed for a text, or for a list of texts ([a, b], or one of them)."""
    if _is_texts(annotation):
        return yaml.load(value, yaml.BaseLoader) if value.startswith("[") else value
    return None if value == "null" and NoneType in kinds_of(annotation) else value


def _put_back(values: Any, texts: list[Any]) -> Any:
    if isinstance(values, dict):
        return {key: _put_back(value, texts) for key, value in values.items()}
    if isinstance(values, str) and values.startswith(PLACEHOLDER):
        return texts[int(values.removeprefix(PLACEHOLDER))]
    return values


def _load_file(model: type[Section], path: str) -> Any:
    """A YAML file, or a door's part of it, in which texts and numbers stand as they are written."""
    read = _own_section(model, OmegaConf.load(path), path)
    if not OmegaConf.is_dict(read):
        return read
    with open(path, encoding="utf-8") as file:
        written = _own_section(model, yaml.load(file, yaml.BaseLoader), path)
    values = _as_written(model, OmegaConf.to_container(read, resolve=False), written)
    if model is CheckAlignConfig:
        fields, pretrain_fields = model.model_fields, PretrainConfig.model_fields
        values = {key: value for key, value in values.items() if key in fields or key not in pretrain_fields}
    return OmegaConf.create(values)


def _as_written(annotation: Any, read: Any, written: Any) -> Any:
    """`read` with what was written wherever a text is wanted and YAML made a number or a truth of it, or where it is
    another number than what was written."""
    section = section_of(annotation)
    if isinstance(read, dict) and isinstance(written, dict):
        fields = section.model_fields if section else {}
        return {
            key: _as_written(fields[key].annotation if key in fields else None, value, written.get(key))
            for key, value in read.items()
        }
    if isinstance(read, list) and isinstance(written, list):
        inner = section or (str if _is_texts(annotation) else None)
        return [_as_written(inner, *pair) for pair in zip(read, written)]
    if not isinstance(read, bool | int | float) or not isinstance(written, str):
        return read
    if _is_text(annotation) or ":" in written:
        return written  # in place of a number it is refused
    return int(written.replace("_", "")) if re.fullmatch(r"[-+]?0[0-9_]+", written) else read


def _in_decimals(annotation: Any, value: str) -> str:
    """What was typed for no text; where YAML would read something else than is written, so that it reads that."""
    read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    meant = _as_written(annotation, read["value"], yaml.load(value, yaml.BaseLoader))
    return value if meant == read["value"] else yaml.safe_dump(meant, default_flow_style=True)


def _own_section(model: type[Section], file: Any, name: str) -> Any:
    """A door's part of a file that holds one section per door, as a sweep's best.yaml; any other file as it is."""
    doors = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    if not file or not set(file) <= set(doors):
        return file
    reader = PretrainConfig if model is CheckAlignConfig else model
    door = next((part for part, config in doors.items() if issubclass(reader, config)), None)
    if door not in file:
        raise ValueError(f"{name!r} has settings for {', '.join(file)} alone, none for this door")
    return file[door]


def build(model: type[Model], values: dict[str, Any]) -> Model:
    """Validates a nested dict; faults come as one ValueError that names each dotted path."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(model, item) for item in error.errors())) from None


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
        model = section_of(field.annotation) if field else None
    return list(model.model_fields) if model else []


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
        section = section_of(field.annotation)
        if section and section is not model and get_origin(field.annotation) is not tuple:
            rows += keys(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else str(field.default)
        rows.append((prefix + name, default, " ".join((field.description or "").split())))
    return rows


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted keys of nested dicts."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flattened(part, f"{name}.{key}" if name else key).items()}
