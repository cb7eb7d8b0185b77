"""What a config model says of its keys, for people: default, possible values and description, section by section."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pgl_ray.config import Section

NAMES = {int: "whole number", float: "number", str: "text", bool: "true | false"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Knob(NamedTuple):
    """A dotted key. `values` says what it may be, e.g. `whole number >= 1 | null`."""

    key: str
    default: str
    values: str
    about: str


def sections(model: type[Section], prefix: str = "") -> list[tuple[str, str, list[Knob]]]:
    """(dotted name, description, keys) of a model, whose own keys come first under the name "", and of its sections."""
    keys, below = [], []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section:
            below += sections(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else plain(field.default)
        about = " ".join((field.description or "").split())
        keys.append(Knob(prefix + name, default, values(field), about))
    return [(prefix.rstrip("."), " ".join((model.__doc__ or "").split()), keys), *below]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field is, or may be; none: it is a value."""
    parts = [annotation, *(get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ())]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def plain(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(plain, value))}]"
    return str(value)


def values(field: FieldInfo) -> str:
    """What a field may be, in words."""
    return _in_words(field.annotation, field.metadata)


def _in_words(kind: Any, metadata: Any = ()) -> str:
    if get_origin(kind) is Annotated:
        kind, *constraints = get_args(kind)
        return _in_words(kind, [*metadata, *constraints])
    bounds = "".join(f" {sign} {bound:g}" for name, sign in BOUNDS.items() for bound in _bounds(metadata, name))
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        known = [_in_words(arg, metadata) for arg in args if arg is not NoneType]
        return " | ".join([*known, *(["null"] if NoneType in args else [])])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple and args[-1] is not Ellipsis:
        words = [_in_words(arg) for arg in args]
        return f"[{len(args)} of {words[0]}]" if len(set(words)) == 1 else f"[{', '.join(words)}]"
    if origin in (tuple, list):
        return f"[any number of {_in_words(args[0])}]"
    if origin is dict:
        return f"{_in_words(args[0])} -> {_in_words(args[1])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"{{{', '.join(kind.model_fields)}}}"
    return NAMES.get(kind, "anything") + bounds


def _bounds(metadata: Any, name: str) -> list[float]:
    """The bounds of one kind in a field's metadata, which pydantic may have packed into one Field."""
    flat = [part for item in metadata for part in (item, *getattr(item, "metadata", ()))]
    return [value for part in flat if isinstance(value := getattr(part, name, None), int | float)]
