"""Report pages: self-contained HTML files, rendered by Jinja from ``templates/``.

A page has a title, key figures and sections of fragments. The templates escape all text that is not a ``Fragment``, so
text from documents and models never becomes markup. Charts are inline SVG (``lilpipe.charts``), so a page looks the
same in the store, as an attachment and in MLflow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lilpipe.credentials import hide_credentials

Cell = str | int | float | None
Fragment = Markup
"""HTML; any other string is text and is escaped."""
Body = Fragment | Sequence[Fragment]
Sections = Mapping[str, Body]
"""Maps headings to the fragment or fragments below them."""


def render(title: str, sections: Sections, *, subtitle: str = "", key_figures: Mapping[str, Cell] | None = None) -> str:
    """Render a whole page."""
    template = _environment().get_template("page.html")
    text = template.render(title=title, sections=sections, subtitle=subtitle, key_figures=key_figures or {})
    return hide_credentials(text)


def heading(text: str) -> Fragment:
    """Return a heading inside a section."""
    return _fragment("heading", text)


def note(text: str) -> Fragment:
    """Return a line of explanation."""
    return _fragment("note", text)


def table(rows: Sequence[Mapping[str, Cell]]) -> Fragment:
    """Return a table whose columns are the keys of the first row; numeric columns are right-aligned."""
    columns = {name: all(_is_numeric(row.get(name)) for row in rows) for name in (rows[0] if rows else ())}
    return _fragment("table", columns, rows)


def bar_table(counts: Mapping[str, float], *, total: float = 0) -> Fragment:
    """Return a table of counts with bars, scaled to the largest; with ``total``, also each count's fraction of it."""
    return _fragment("bar_table", counts, total, max([*counts.values(), total], default=0) or 1)


def text_block(text: str, *, title: str = "", detail: str = "", max_chars: int = 1_500) -> Fragment:
    """Return a text with its line breaks, truncated to ``max_chars``; with ``title`` it is collapsed."""
    block = highlighted(
        [(text if len(text) <= max_chars else f"{text[:max_chars]} … ({len(text):,} characters)", False)]
    )
    return folded(block, title=title, detail=detail) if title else block


def highlighted(parts: Sequence[tuple[str, bool]]) -> Fragment:
    """Return a text in parts; parts with True are highlighted."""
    return _fragment("highlighted", parts)


def folded(body: Fragment, *, title: str, detail: str = "") -> Fragment:
    """Return a collapsed fragment that opens when its title is clicked."""
    return _fragment("folded", body, title, detail)


def show(value: Cell) -> str:
    """Format a cell: numbers with thousands separators and four significant digits, None as an empty string."""
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
