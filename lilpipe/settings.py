"""`lilpipe config`: print the resolved settings as loadable TOML with comments, and search settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_origin

from lilpipe.config.describe import Effect, Setting, all_settings, default_of, describe, effect_of, show_value
from lilpipe.config.families import FAMILY_FIELDS
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.section import Section
from lilpipe.errors import ConfigError
from lilpipe.recipes import Resolved

Origin = Callable[[str, Any, Any], str]
"""Maps a setting's dotted name, value and default to the origin of the value."""


def show_config(resolved: Resolved, step: str | None = None) -> str:
    """Return all settings, or the resolved section of one step, as TOML.

    The comment of each setting gives its type, unit, default and source. Loading the TOML as a configuration file gives
    the same configuration. Raises ``ConfigError`` if the step is unknown.
    """
    config = resolved.config
    if step is None:
        return "\n".join(_table("", config, _defaults(config), _origin(resolved), "")).lstrip("\n") + "\n"
    if step not in config.steps:
        raise ConfigError(f"step {step!r}: there is no such step; known: {', '.join(config.steps)}")
    stage, section = config.steps[step].stage, config.section(step)
    default = _defaults(config).get(stage)
    lines = _table(stage, section, default, _origin(resolved, step), "")
    return f"# Step {step}, stage {stage}\n" + "\n".join(lines).lstrip("\n") + "\n"


def search(word: str, model: type[PipelineConfig] = PipelineConfig) -> list[Setting]:
    """Return the settings whose name or description contains a word; matches in the name come first."""
    wanted = word.lower()
    settings = [item for item in all_settings(model).values() if wanted in f"{item.name}\n{item.meaning}".lower()]
    return sorted(settings, key=lambda item: wanted not in item.name.lower())


def facts(setting: Setting, source: str = "") -> str:
    """Return type, unit, default and source of a setting on one line."""
    default = "required" if setting.default == "required" else f"default {setting.default}"
    parts = [setting.type.replace("`", ""), setting.unit, default, f"source: {source}" if source else None]
    return " · ".join(part for part in parts if part)


# --- origin of values ---------------------------------------------------------------------------------------------


def _defaults(config: PipelineConfig) -> dict[str, Any]:
    fields = type(config).model_fields
    return {field.alias or name: default_of(field) for name, field in fields.items()}


def _origin(resolved: Resolved, step: str | None = None) -> Origin:
    config, recipe = resolved.config, _values(resolved.start)
    node = config.steps[step] if step else None

    def origin(name: str, value: Any, default: Any) -> str:
        below = name.partition(".")[2]
        if node is not None and _covers(node.settings, below):
            return f"steps.{step}.settings"
        whole: Any = _values(config)
        for part in name.split("."):
            whole = whole.get(part) if isinstance(whole, dict) else None
        if node is not None and whole != _plain(value):
            return "seed" if below == "seed" else "weights of corpus.sources"
        before: Any = recipe
        for part in name.split("."):
            before = before.get(part) if isinstance(before, dict) else None
        if _covers(resolved.from_overrides, name):
            unset = value is None and before is not None
            return f"--set; not in this file, because TOML has no null: repeat --set {name}=null" if unset else "--set"
        if _covers(resolved.from_file, name):
            return str(resolved.file)
        section, _, last = name.rpartition(".")
        if last in FAMILY_FIELDS and f"{section}.architecture" in resolved.from_file | resolved.from_overrides:
            return "architecture"
        if before != _plain(value) and name not in ("recipe", "file"):
            return "depth or params"
        return "default" if _plain(value) == _plain(default) else f"recipe {resolved.start.recipe}"

    return origin


def _covers(given: Any, name: str) -> bool:
    """Return whether the dotted names contain the setting, one of its parent tables or one of its parts."""
    return any(name == each or name.startswith(f"{each}.") or each.startswith(f"{name}.") for each in given)


def _values(config: PipelineConfig) -> dict[str, Any]:
    return config.model_dump(by_alias=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(by_alias=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


# --- TOML ---------------------------------------------------------------------------------------------------------


def _table(header: str, section: Section, default: Any, origin: Origin, effect: Effect) -> Iterator[str]:
    """Yield the TOML lines of a section: its settings, then the tables of its nested sections."""
    inner: list[tuple[str, Any, Any, Effect]] = []
    if header:
        yield f"\n[{header}]"
    for name, field in type(section).model_fields.items():
        key = field.alias or name
        path, value = f"{header}.{key}" if header else key, getattr(section, name)
        before = default.get(key) if isinstance(default, dict) else getattr(default, name, default_of(field))
        inside: Effect = effect_of(field) or effect
        if isinstance(value, Section):
            inner.append((path, value, before, inside))
            continue
        if get_origin(field.annotation) is dict and any(isinstance(item, Section) for item in value.values()):
            for each, item in value.items():
                inner.append((f"{path}.{_key(each)}", item, None, inside))
            continue
        source = origin(path, value, before)
        comment = facts(describe(path, field, before, before, inside), source)
        yield from _lines(key, value, comment)
    for path, value, before, inside in inner:
        yield from _table(path, value, before, origin, inside)


def _lines(key: str, value: Any, comment: str) -> Iterator[str]:
    if value is None:
        yield f"# {key} is not set  # {comment}"
    elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
        yield f"# {comment}"
        yield f"{key} = ["
        for item in value:
            yield f"    {_toml(item)},"
        yield "]"
    else:
        yield f"{key} = {_toml(value)}  # {comment}"


def _toml(value: Any) -> str:
    """Format a value on one line; unset entries of tables are omitted."""
    if isinstance(value, Section):
        unset = type(value).model_construct()  # to omit defaults
        value = {
            field.alias or name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if getattr(value, name) != getattr(unset, name, ...)
        }
    if isinstance(value, dict):
        if all(item is None for item in value.values()):
            return "{}"
        return "{ " + ", ".join(f"{_key(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def show_found(settings: list[Setting], resolved: Resolved) -> Iterator[str]:
    """Yield the lines of search results: name and value, ``facts`` and description of each setting."""
    values = _values(resolved.config)
    for setting in settings:
        value: Any = values
        for part in setting.name.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        yield setting.name + ("" if value is ... else f" = {show_value(value)}")
        yield f"    {facts(setting)}"
        yield from (f"    {line}" for line in setting.meaning.splitlines())
