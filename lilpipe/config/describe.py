"""Descriptions of settings for the reference and ``lilpipe config``, derived from the pydantic models."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.section import BuiltIn, Operational, Rounding, Section

Effect = Literal["", "operational", "rounding"]

UNITS = {
    "seconds": "seconds",
    "bytes": "bytes",
    "gb": "GB",
    "mib": "MiB",
    "tokens": "tokens",
    "chars": "characters",
}
"""Maps the last word of a setting's name to its unit."""


@dataclass(frozen=True)
class Setting:
    """Description of one setting."""

    name: str
    """Full dotted name."""
    type: str
    default: str
    recipe_default: str | None
    """Value in the recipe `tiny` if it differs from the default."""
    unit: str | None
    effect: Effect
    meaning: str


@dataclass(frozen=True)
class Table:
    """One TOML table: a configuration section and its settings."""

    header: str
    """TOML header, such as `[sft.optimizer]` or `[[corpus.sources]]`."""
    meaning: str
    settings: list[Setting]

    @property
    def anchor(self) -> str:
        """HTML anchor of the table."""
        return self.header.strip("[]")


def tables(section: type[BaseModel], header: str, default: Any, tiny: Any, effect: Effect = "") -> Iterator[Table]:
    """Yield the tables of a section and its nested sections, depth first.

    ``default`` and ``tiny`` are the section's instances in the defaults and in the recipe `tiny`, or None.
    """
    prefix = header.strip("[]")
    settings: list[Setting] = []
    inner: list[Table] = []
    for name in _own_first(section):
        field = section.model_fields[name]
        key = f"{prefix}.{field.alias or name}"
        inside = effect_of(field) or effect
        value = getattr(default, name) if isinstance(default, BaseModel) else default_of(field)
        recipe = getattr(tiny, name) if isinstance(tiny, BaseModel) else value
        nested = section_of(field.annotation)
        if nested and not _is_optional(field.annotation):
            inner += tables(nested, f"[{key}]", value, recipe, inside)
            continue
        settings.append(describe(key, field, value, recipe, inside))
        if nested:
            inner += tables(nested, f"[{key}]", None, None, inside)
        else:
            inner += rows_of(field, key, inside)
    yield Table(header, inspect.getdoc(section) or "", settings)
    yield from inner


def _own_first(section: type[BaseModel]) -> list[str]:
    """Return the names of a section's fields: its own, then those of each base class."""
    names = [name for base in section.__mro__ for name in vars(base).get("__annotations__", {})]
    return [name for name in dict.fromkeys(names) if name in section.model_fields]


def all_settings(model: type[PipelineConfig] = PipelineConfig) -> dict[str, Setting]:
    """Return all settings by dotted name, as written in TOML."""
    found: dict[str, Setting] = {}
    for name, field in model.model_fields.items():
        key = field.alias or name
        section = section_of(field.annotation)
        for table in tables(section, f"[{key}]", default_of(field), None) if section else ():
            found |= {setting.name: setting for setting in table.settings}
        if section is None:
            found[key] = describe(key, field, default_of(field), default_of(field), "")
            for table in rows_of(field, key, ""):
                found |= {setting.name: setting for setting in table.settings}
    return found


def rows_of(field: FieldInfo, key: str, effect: Effect) -> Iterator[Table]:
    """Yield the tables of the sections in a list or dictionary."""
    for part in _parts(field.annotation):
        if section_of(part) and get_origin(field.annotation) in (tuple, list):
            yield from tables(part, f"[[{key}]]", None, None, effect)
        elif section_of(part) and get_origin(field.annotation) is dict:
            yield from tables(part, f"[{key}.NAME]", None, None, effect)


# --- one setting --------------------------------------------------------------------------------------------------


def describe(key: str, field: FieldInfo, value: Any, recipe: Any, effect: Effect) -> Setting:
    """Return the description of a field; ``value`` is its default, ``recipe`` its value in `tiny`."""
    shown = show_value(value)
    in_recipe = show_value(recipe)
    return Setting(
        name=key,
        type=show_type(_whole_annotation(field)),
        default=shown,
        recipe_default=in_recipe if in_recipe != shown and key != "recipe" else None,
        unit=UNITS.get(key.rpartition(".")[2].rpartition("_")[2]),
        effect=effect_of(field) or effect,
        meaning=inspect.cleandoc(field.description or ""),
    )


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field."""
    return field.get_default(call_default_factory=True)


def _whole_annotation(field: FieldInfo) -> Any:
    annotation: Any = field.annotation
    for mark in field.metadata:
        annotation = Annotated[annotation, mark]
    return annotation


def effect_of(field: FieldInfo) -> Effect:
    """Return whether a field is operational, changes only rounding, or neither (an empty string)."""
    if any(mark is Operational for mark in field.metadata):
        return "operational"
    return "rounding" if any(mark is Rounding for mark in field.metadata) else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section of an annotation ``S`` or ``S | None``, or None."""
    for part in (annotation, *(_parts(annotation) if _is_optional(annotation) else ())):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and types.NoneType in get_args(annotation)


def _parts(annotation: Any) -> tuple[Any, ...]:
    return tuple(part for part in get_args(annotation) if part not in (types.NoneType, ...))


def show_value(value: Any) -> str:
    """Return a default as written in TOML."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "not set"
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        return "set" if not value else _toml(value)
    if isinstance(value, dict | tuple) and not value:
        return "empty"
    text = _toml(value)
    return text if len(text) <= 160 else "see the source"


def _toml(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)


def show_type(annotation: Any) -> str:
    """Return a type with its constraints in words, such as `integer > 0` or `list of strings`."""
    origin, parts = get_origin(annotation), _parts(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        constraints = [text for text in map(_constraint, marks) if text]
        if constraints and constraints[0].startswith("≥") and constraints[1:] and constraints[1].startswith("≤"):
            constraints = [f"from {constraints[0][2:]} to {constraints[1][2:]}"]
        return " ".join([show_type(inner), *constraints])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(show_type(part) for part in parts)
    if origin in (tuple, list):
        return f"list of {_plural(parts[0])}"
    if origin is dict:
        return f"table of {_plural(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "table"
    return {int: "integer", float: "number", bool: "boolean", str: "string"}.get(annotation, "any value")


def _plural(annotation: Any) -> str:
    """Return the type of list items in words, such as `integers > 0` or `tables`."""
    text = show_type(annotation)
    noun, space, constraint = text.partition(" ")
    if get_origin(annotation) is Literal:
        return text
    return "any values" if text == "any value" else f"{noun}s{space}{constraint}"


def _constraint(mark: Any) -> str:
    match mark:
        case annotated_types.Gt(gt=bound):
            return f"> {bound}"
        case annotated_types.Ge(ge=bound):
            return f"≥ {bound}"
        case annotated_types.Lt(lt=bound):
            return f"< {bound}"
        case annotated_types.Le(le=bound):
            return f"≤ {bound}"
        case BuiltIn(names=names) if names:
            return f"({', '.join(names)}, or custom)"
        case annotated_types.MinLen(min_length=length):
            return f"(at least {length})"
        case FieldInfo():
            return " ".join(filter(None, map(_constraint, mark.metadata)))
    return ""
