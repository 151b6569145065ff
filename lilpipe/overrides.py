"""Laying settings over a configuration: tables of a file, and dotted overrides such as ``sft.num_epochs=4``."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from lilpipe.errors import ConfigError


def parse_override(text: str) -> tuple[str, Any]:
    """``sft.num_epochs=4`` as a key and a JSON value; what is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected KEY=VALUE, such as sft.num_epochs=4")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def explain(error: ValidationError) -> str:
    """One line per wrong field: where, what was got, what was expected."""
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


def merge(values: dict[str, Any], changes: dict[str, Any], *, where: str, prefix: str = "") -> None:
    """Lay ``changes`` over ``values``; tables merge, anything else replaces."""
    for key, change in changes.items():
        name = f"{prefix}{key}"
        free = name in ("steps", "orchestration.stage_timeout_seconds") or prefix.startswith("steps.")
        if key not in values and not free and not prefix.startswith(("steps.", "orchestration.stage_timeout")):
            raise ConfigError(_unknown(name, values, where=where))
        if isinstance(change, dict) and isinstance(values.get(key), dict) and name != "steps":
            merge(values[key], change, where=where, prefix=f"{name}.")
        else:
            values[key] = change


def set_dotted(values: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set one dotted key that must exist."""
    change: dict[str, Any] = {}
    inner = change
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    merge(values, change, where=where)


def _unknown(name: str, known: dict[str, Any], *, where: str) -> str:
    parent, _, last = name.rpartition(".")
    close = difflib.get_close_matches(last, known, n=1)
    hint = f"did you mean {f'{parent}.' if parent else ''}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"{where}: there is no setting {name!r}; {hint}"
