"""Reports: one self-contained HTML page each, for people.

A page is a title, some key figures and sections of HTML fragments. ``table``, ``bars``, ``figure``, ``text_block``
and ``note`` make fragments; every text that comes from outside goes through ``html.escape`` there. Pictures are
inlined as SVG, so a report can be opened from a store, an attachment or the MLflow UI alike.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Cell = str | int | float | None

INK = "#1f2733"
ACCENT = "#2f6fb0"
COLOURS = ("#2f6fb0", "#d97a34", "#4a9a66", "#b6494f", "#7d63ad", "#8a6d4b", "#5b8f9e", "#9aa0a8")

STYLE = """
:root { --ink: #1f2733; --soft: #667080; --line: #e3e7ec; --back: #f6f7f9; --accent: #2f6fb0; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 18px 0 6px; color: var(--soft); font-weight: 600; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
.subtitle, .note { color: var(--soft); margin: 0 0 10px; }
.key-figures { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.key-figures div { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; flex: 1; }
.key-figures b { display: block; font-size: 22px; white-space: nowrap; }
.key-figures span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 5px 12px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.bars { table-layout: fixed; }
.bars td { padding-right: 14px; }
.bar { background: #e9eef5; border-radius: 4px; height: 14px; min-width: 120px; margin-top: 4px; }
.bar i { display: block; background: var(--accent); border-radius: 4px; height: 14px; }
details { border-bottom: 1px solid var(--line); padding: 6px 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary small { color: var(--soft); margin-left: 8px; }
pre { background: var(--back); border-radius: 8px; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, monospace; max-height: 340px; overflow-y: auto; margin: 8px 0; }
svg { max-width: 100%; height: auto; }
.panels { display: grid; grid-template-columns: repeat(3, 1fr); gap: 18px 26px; }
.panels figure { margin: 0; font-size: 12px; }
.panels figcaption { font-weight: 600; margin-bottom: 3px; }
.panels small { float: right; color: var(--soft); font-weight: 400; }
.panels svg { width: 100%; height: 90px; display: block; border-bottom: 1px solid var(--soft); }
.panels .mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 3; vector-effect: non-scaling-stroke; }
.panels div { display: flex; justify-content: space-between; color: var(--soft); }
.panels b::before { content: "┊ "; }
.panels b { color: var(--ink); }
"""

_PLOT_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lilpipe",  # the same picture is the same bytes
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
}


def page(
    title: str,
    sections: Mapping[str, str | Sequence[str]],
    *,
    subtitle: str = "",
    key_figures: Mapping[str, Cell] | None = None,
) -> str:
    """A whole HTML page; ``sections`` maps each heading to its fragment or fragments of HTML."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""]
    if key_figures:
        cells = (
            f"<div><b>{_show(value)}</b><span>{html.escape(name)}</span></div>" for name, value in key_figures.items()
        )
        parts.append(f'<div class="key-figures">{"".join(cells)}</div>')
    for name, body in sections.items():
        fragments = body if isinstance(body, str) else "\n".join(body)
        parts.append(f"<section><h2>{html.escape(name)}</h2>\n{fragments}</section>")
    content = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><main>{content}</main></body></html>\n"
    )


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{html.escape(text)}</h3>"


def note(text: str) -> str:
    """A quiet line of explanation."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """A table whose columns are the keys of the first row; numbers and shares are aligned to the right."""
    if not rows:
        return note("None.")
    columns = list(rows[0])
    numeric = {name for name in columns if all(_is_numeric(row.get(name)) for row in rows)}
    head = "".join(_cell("th", html.escape(name), numeric=name in numeric) for name in columns)
    body = "".join(
        "<tr>" + "".join(_cell("td", _show(row.get(name)), numeric=name in numeric) for name in columns) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def bars(counts: Mapping[str, float], *, total: float | None = None, unit: str = "") -> str:
    """A horizontal bar for each name, scaled to the largest; with ``total``, each share of it beside the count."""
    if not counts:
        return note("None.")
    largest = max([*counts.values(), total or 0]) or 1
    rows = []
    for name, value in counts.items():
        share = f'<td class="number">{value / total:.1%}</td>' if total else ""
        rows.append(
            f'<tr><td>{html.escape(name)}</td><td class="number">{_show(value)}</td>{share}'
            f'<td><div class="bar"><i style="width:{100 * value / largest:.2f}%"></i></div></td></tr>'
        )
    widths = ("32%", "10%", "10%", "48%") if total else ("32%", "10%", "58%")
    columns = "".join(f'<col style="width:{width}">' for width in widths)
    body = f"<colgroup>{columns}</colgroup><tbody>{''.join(rows)}</tbody>"
    return f'{note(unit) if unit else ""}<table class="bars">{body}</table>'


def text_block(text: str, *, title: str = "", detail: str = "", max_chars: int = 1_500) -> str:
    """A text as it is, escaped and cut at ``max_chars``; folded under ``title`` where one is given."""
    shown = text if len(text) <= max_chars else f"{text[:max_chars]} … ({len(text):,} characters)"
    block = f"<pre>{html.escape(shown)}</pre>"
    if not title:
        return block
    small = f"<small>{html.escape(detail)}</small>" if detail else ""
    return f"<details><summary>{html.escape(title)}{small}</summary>{block}</details>"


def figure(picture: Figure) -> str:
    """A matplotlib figure as inline SVG (make it with ``matplotlib.figure.Figure``: no global state, no display)."""
    for axes in picture.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with rc_context(_PLOT_STYLE):
        picture.savefig(
            buffer, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    return f"<div>{svg[svg.index('<svg') :]}</div>"


@dataclass(frozen=True)
class Histogram:
    """Counts by bin, stacked; every bin is drawn as wide as any other, so edges in a geometric row make a log axis."""

    title: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]
    """Name of each layer, the lowest first, to its count in each bin."""
    marks: Sequence[float] = ()
    """Values at which a dotted line stands."""


def histograms(panels: Sequence[Histogram]) -> str:
    """Small histograms side by side, as plain SVG: matplotlib takes a tenth of a second for each."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.counts))
    colours = dict(zip(names, COLOURS, strict=False))
    legend = " ".join(f'<span style="color:{colours[name]}">■</span> {html.escape(name)}' for name in names)
    figures = "".join(_histogram(panel, colours) for panel in panels)
    return f'<p class="note">{legend}</p><div class="panels">{figures}</div>'


PANEL_WIDTH, PANEL_HEIGHT = 300, 90


def _histogram(panel: Histogram, colours: Mapping[str, str]) -> str:
    layers = list(panel.counts.items())
    num_bins = len(panel.edges) - 1
    tallest = max(1, *(sum(column) for column in zip(*panel.counts.values(), strict=True)))
    width = PANEL_WIDTH / num_bins
    below = [0] * num_bins
    shapes = []
    for name, counts in layers:
        bars = [
            f"M{i * width:.1f} {_height(below[i], tallest)}V{_height(below[i] + count, tallest)}"
            f"h{width:.1f}V{_height(below[i], tallest)}z"
            for i, count in enumerate(counts)
            if count
        ]
        shapes.append(f'<path fill="{colours[name]}" d="{"".join(bars)}"/>')
        below = [low + count for low, count in zip(below, counts, strict=True)]
    for mark in panel.marks:
        at = PANEL_WIDTH * _position(mark, panel.edges)
        shapes.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{PANEL_HEIGHT}"/>')
    marks = "".join(f"<b>{_show(mark)}</b>" for mark in panel.marks)
    return (
        f"<figure><figcaption>{html.escape(panel.title)}<small>up to {_show(tallest)} in a bin</small></figcaption>"
        f'<svg viewBox="0 0 {PANEL_WIDTH} {PANEL_HEIGHT}" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f"<div><span>{_show(panel.edges[0])}</span>{marks}<span>{_show(panel.edges[-1])}</span></div></figure>"
    )


def _height(count: int, tallest: int) -> str:
    return f"{PANEL_HEIGHT * (1 - count / tallest):.1f}"


def _position(value: float, edges: Sequence[float]) -> float:
    """Where a value lies on the axis, 0 to 1."""
    for i, (low, high) in enumerate(pairwise(edges)):
        if value <= high:
            return (i + max(0.0, value - low) / (high - low)) / (len(edges) - 1)
    return 1.0


def _is_numeric(value: Cell) -> bool:
    return not isinstance(value, str) or value == "" or value.endswith("%")


def _cell(tag: str, content: str, *, numeric: bool) -> str:
    return f'<{tag} class="number">{content}</{tag}>' if numeric else f"<{tag}>{content}</{tag}>"


def _show(value: Cell) -> str:
    """A cell's text: numbers with thousands separators and four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return html.escape(str(value))
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
