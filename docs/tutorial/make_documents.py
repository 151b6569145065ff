"""Writes real documents for the tutorial: the docstrings of Python's standard library, as JSON Lines.

One document for each module, class and function that has at least 300 characters of documentation.

    python docs/tutorial/make_documents.py mine/documents.jsonl
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 300
SKIPPED = {"antigravity", "idlelib", "lib2to3", "this", "turtledemo"}
"""Modules that open a window, print something or are deprecated when they are imported."""


def documents() -> Iterator[dict[str, str]]:
    """Rows with `id`, `text` and `licence`, sorted by module and name."""
    for module_name in sorted(sys.stdlib_module_names - SKIPPED):
        if module_name.startswith("_"):
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # another platform's
            continue
        yield from rows(module_name, inspect.getdoc(module))
        for name, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) != module_name or name.startswith("_"):
                continue
            texts = [inspect.getdoc(member)] if inspect.isclass(member) or inspect.isfunction(member) else []
            if inspect.isclass(member):
                texts += [inspect.getdoc(method) for _, method in sorted(vars(member).items()) if callable(method)]
            yield from rows(f"{module_name}.{name}", "\n\n".join(text for text in texts if text))


def rows(identifier: str, text: str | None) -> Iterator[dict[str, str]]:
    """One row, or none if the text is too short."""
    if text and len(text) >= MIN_CHARS:
        yield {"id": identifier, "text": text, "licence": "PSF-2.0"}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in documents()]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} documents, {path.stat().st_size:,} bytes")
