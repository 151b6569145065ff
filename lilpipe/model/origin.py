"""Record of an imported model: repository, commit, license and base model, as far as they are known.

It is written at import and copied to every checkpoint trained from the model, up to the model card of the release.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe.artifact import write_atomically

ORIGIN_FILE = "origin.json"
MAX_CARD_CHARACTERS = 200
"""Longer values of a model card's metadata are left out."""
LICENSE = ("license", "license_name", "license_link")


def write_origin(origin: Mapping[str, Any], directory: Path) -> None:
    """Write the record, if anything is known."""
    if origin:
        write_atomically(directory / ORIGIN_FILE, json.dumps(origin, indent=2, sort_keys=True) + "\n")


def read_origin(directory: Path) -> dict[str, Any]:
    """Return the record; empty if the model was not imported."""
    path = directory / ORIGIN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def copy_origin(source: Path, directory: Path) -> None:
    """Copy the record to a checkpoint that was made from ``source``."""
    if (source / ORIGIN_FILE).exists():
        shutil.copyfile(source / ORIGIN_FILE, directory / ORIGIN_FILE)


def read_card(path: Path) -> dict[str, Any]:
    """Return license and ``base_model`` from a model card's metadata; empty if there is none."""
    from huggingface_hub import metadata_load  # the import takes 0.5 s

    try:
        data = metadata_load(path) if path.is_file() else None
    except (ValueError, OSError, RecursionError):
        return {}
    except Exception as error:  # PyYAML's errors; a card is no reason to refuse a model
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        return {}
    known = {key: (data or {}).get(key) for key in (*LICENSE, "base_model")}
    return {key: value for key, value in known.items() if _is_short(value)}


def _is_short(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 10 and all(isinstance(item, str) and _is_short(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= MAX_CARD_CHARACTERS and value.isprintable()


def card_metadata(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a card of a model made from this one: its license, and as base the imported model."""
    base = origin.get("repo_id") or origin.get("base_model")
    found = {key: origin[key] for key in LICENSE if key in origin}
    return found | ({"base_model": base} if base else {})


def lineage(origin: Mapping[str, Any]) -> str:
    """Return a sentence about the imported model, in Markdown; empty without a record."""
    if not origin:
        return ""
    names = {"repo_id": "repository", "gguf": "GGUF file", "base_model": "its base model", "license": "its license"}
    facts = []
    for key, value in origin.items():
        values = value if isinstance(value, list) else [value]
        facts.append(f"{names.get(key, key)} {', '.join(f'`{item}`' for item in values)}")
    return f"It started from an imported model ({'; '.join(facts)})."
