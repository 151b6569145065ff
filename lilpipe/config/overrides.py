"""Merging of settings into a configuration: TOML tables and dotted overrides such as ``sft.num_epochs=4``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lilpipe.config.section import CODE_FILE, Section
from lilpipe.errors import ConfigError


def parse_override(text: str) -> tuple[str, Any]:
    """Parse ``sft.num_epochs=4`` into a key and a JSON value; a value that is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected KEY=VALUE, such as sft.num_epochs=4")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def explain(error: ValidationError) -> str:
    """Format a validation error, one line per wrong field: where, what was got, what was expected."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{field}: there is no such setting; check the spelling")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(item["input"], dict | BaseModel) else f" (got {item['input']!r})"
            lines.append(f"{field}: {message}{got}" if field else message)
    return "\n".join(lines)


def merge(
    values: dict[str, Any], changes: dict[str, Any], *, model: type[BaseModel], where: str, prefix: str = ""
) -> None:
    """Merge ``changes`` into the ``values`` of a section.

    Sections are merged; any other value is replaced, including lists and tables with user-defined keys. Raises
    ``ConfigError`` if a setting does not exist.
    """
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    if issubclass(model, Section):
        changes = {**model.implied(values, changes), **changes}
    for key, change in changes.items():
        if key not in fields:
            raise ConfigError(_unknown(f"{prefix}{key}", fields, where=where))
        section = fields[key]
        if isinstance(change, dict) and isinstance(section, type) and issubclass(section, BaseModel):
            merge(values[key], change, model=section, where=where, prefix=f"{prefix}{key}.")
        else:
            values[key] = change


def resolve_files(values: Any, annotation: Any, folder: Path) -> Any:
    """Return settings with all paths of extension files (``section.CodeFile``) resolved relative to ``folder``."""
    model = _section_in(annotation)
    if isinstance(values, list | tuple):
        return [resolve_files(item, annotation, folder) for item in values]
    if not isinstance(values, dict):
        return values
    if model is None or get_origin(annotation) is dict:  # a table with user-defined keys
        return {key: resolve_files(item, model, folder) if model else item for key, item in values.items()}
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    resolved = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is not None and isinstance(value, str) and CODE_FILE in field.metadata:
            value = str(folder / value)
        resolved[key] = value if field is None else resolve_files(value, field.annotation, folder)
    return resolved


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation: ``S``, ``S | None``, or a list or table of ``S``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def set_dotted(values: dict[str, Any], key: str, value: Any, *, model: type[BaseModel], where: str) -> None:
    """Set one dotted key; other keys of a table are kept. Raises ``ConfigError`` if a setting does not exist."""
    names, section, current = key.split("."), model, values
    for depth, name in enumerate(names[:-1]):
        fields = {field.alias or own: field.annotation for own, field in section.model_fields.items()}
        annotation = fields.get(name)
        if get_origin(annotation) is dict:
            value, names = _with_key(current[name], names[depth + 1 :], value), names[: depth + 1]
            break
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section, current = annotation, current[name]
    change = value
    for name in reversed(names):
        change = {name: change}
    merge(values, change, model=model, where=where)


def _with_key(table: Any, names: list[str], value: Any) -> dict[str, Any]:
    """Return a copy of a table of tables with the value at ``names``."""
    kept = table if isinstance(table, dict) else {}
    first, *rest = names
    return {**kept, first: _with_key(kept.get(first), rest, value) if rest else value}


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Iterate over the full names of all settings in nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _unknown(name: str, known: Iterable[str], *, where: str) -> str:
    parent, _, last = name.rpartition(".")
    close = difflib.get_close_matches(last, list(known), n=1)
    hint = f"did you mean {f'{parent}.' if parent else ''}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"{where}: there is no setting {name!r}; {hint}"
