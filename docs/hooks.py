"""MkDocs hooks: add the generated reference pages to the site and to its navigation.

A navigation entry that ends in `/` stands for all pages below that folder: the index, then the others by name, then
generated pages in the order in which they are made.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # `mkdocs` is not run as a module of this repository


@cache
def generated_pages() -> dict[str, str]:
    """Path below `docs/` to the Markdown or SVG of each generated file."""
    from docs.generate import api, commands, errors, picture, settings, stages

    return {
        **settings.pages(),
        **stages.pages(),
        **commands.pages(ROOT / "Makefile"),
        **errors.pages(ROOT),
        **api.pages(ROOT / "lilpipe"),
        **picture.pages(),
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace folders in the navigation by the generated pages below them."""
    config.nav = _expand(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, markdown in generated_pages().items():
        files.append(File.generated(config, path, content=markdown))
    return files


def _expand(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {title: _expand(value) for title, value in entry.items()}
    if isinstance(entry, list):
        return [_expand(value) for value in entry]
    if entry.endswith("/"):
        written = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / entry).rglob("*.md"))
        pages = [path for path in (*written, *generated_pages()) if path.startswith(entry)]
        return sorted(pages, key=lambda path: not path.endswith("index.md"))
    return entry
