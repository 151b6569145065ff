"""Report pages: each one self-contained HTML file, rendered by Jinja from ``templates/``.

A page is a title, key figures and sections of fragments. The templates escape every text that is not a ``Fragment``,
so text from documents and models never becomes markup. Charts are inlined as SVG (``lilpipe.charts``): a page opens
from the store, an attachment or MLflow alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Cell = str | int | float | None
Fragment = Markup
"""HTML; any other string is text and is escaped."""
Body = Fragment | Sequence[Fragment]
Sections = Mapping[str, Body]
"""Heading to the fragment or fragments below it."""


def render(title: str, sections: Sections, *, subtitle: str = "", key_figures: Mapping[str, Cell] | None = None) -> str:
    """A whole page."""
    template = _environment().get_template("page.html")
    return template.render(title=title, sections=sections, subtitle=subtitle, key_figures=key_figures or {})


def heading(text: str) -> Fragment:
    """A heading inside a section."""
    return _fragment("heading", text)


def note(text: str) -> Fragment:
    """A line of explanation."""
    return _fragment("note", text)


def table(rows: Sequence[Mapping[str, Cell]]) -> Fragment:
    """A table whose columns are the keys of the first row; columns of numbers and shares are aligned to the right."""
    columns = {name: all(_is_numeric(row.get(name)) for row in rows) for name in (rows[0] if rows else ())}
    return _fragment("table", columns, rows)


def bar_table(counts: Mapping[str, float], *, total: float = 0) -> Fragment:
    """Each count with a bar, scaled to the largest; with ``total``, each share of it too."""
    return _fragment("bar_table", counts, total, max([*counts.values(), total], default=0) or 1)


def text_block(text: str, *, title: str = "", detail: str = "", max_chars: int = 1_500) -> Fragment:
    """A text with its line breaks, cut at ``max_chars``; folded under ``title`` where one is given."""
    block = highlighted(
        [(text if len(text) <= max_chars else f"{text[:max_chars]} … ({len(text):,} characters)", False)]
    )
    return folded(block, title=title, detail=detail) if title else block


def highlighted(parts: Sequence[tuple[str, bool]]) -> Fragment:
    """A text in parts, those with True highlighted."""
    return _fragment("highlighted", parts)


def folded(body: Fragment, *, title: str, detail: str = "") -> Fragment:
    """A fragment that is shown when its title is clicked."""
    return _fragment("folded", body, title, detail)


def show(value: Cell) -> str:
    """A cell's text: numbers with thousands separators and four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _fragment(macro: str, *values: Any) -> Fragment:
    return getattr(_environment().get_template("fragments.html").module, macro)(*values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    return environment


def _is_numeric(value: Cell) -> bool:
    return not isinstance(value, str) or value == "" or value.endswith("%")
