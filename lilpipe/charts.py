"""Charts of report pages: lines, bars, histograms and matrices with matplotlib, in one style, as inline SVG.

Labels are SVG text and not paths: a chart takes a third of the bytes and the time, and all scripts are supported.
matplotlib is imported with the first chart, which saves 0.4 s in processes without charts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lilpipe.page import Fragment, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Numbers = Sequence[float] | np.ndarray

COLOURS = ("#3b82c4", "#d97a34", "#4a9a66", "#b6494f", "#7d63ad", "#8a6d4b", "#5b8f9e", "#9aa0a8")
WIDTH = 9.4
"""Width of a chart in inches: the width of a page's column."""
GRID_COLUMNS = 3
MAX_VECTOR_POINTS = 1_000
"""Above this number, points are drawn as a bitmap inside the SVG; otherwise a page would have megabytes."""

_INK = "#1f2733"  # replaced by the page's text colour, for light and dark mode
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lilpipe",  # equal charts have equal bytes
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # only to measure text; the page sets its own font
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.formatter.use_mathtext": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True)
class Line:
    """Points of a line, in order."""

    label: str
    """Shown in the legend unless empty."""
    x: Numbers
    y: Numbers
    style: str = "-"
    """Format of matplotlib: ``-`` line, ``--`` dashed, ``o`` dots, ``D`` diamonds, ``-o`` line with dots."""
    colour: str = COLOURS[0]
    errors: Sequence[Sequence[float]] | None = None
    """Lengths of the error bars, [2, points]: below and above."""
    opacity: float = 1.0
    width: float = 1.4

    @classmethod
    def of_points(cls, points: Sequence[tuple[float, float]], label: str = "", *, colour: str = COLOURS[0]) -> Line:
        """Return a line through (x, y) points, with dots if there are few."""
        x, y = zip(*points, strict=True)
        return cls(label, x, y, "-o" if len(points) < 30 else "-", colour)


@dataclass(frozen=True)
class Histogram:
    """Counts per bin, stacked; all bins are drawn with equal width, so geometrically spaced edges make a log axis."""

    title: str
    edges: Numbers
    counts: Mapping[str, Numbers]
    """Maps the name of each layer, from the bottom, to its count in each bin."""
    marks: Sequence[float] = ()
    """Values marked with a dotted line."""


def svg(figure: Figure) -> Fragment:
    """Return a chart as inline SVG with a transparent background, in the page's text colour."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the browser has other fonts
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, dpi=110, metadata=metadata)
    text = buffer.getvalue()
    return Fragment(text[text.index("<svg") :].replace(_INK, "currentColor"))


def lines(
    panels: Mapping[str, Sequence[Line]], xlabel: str = "", ylabel: str = "", *, log: bool = False, height: float = 0
) -> Figure:
    """Draw lines and dots, one panel per title; ``log`` makes both axes logarithmic, ``height`` is in inches."""
    with _drawing(len(panels), heights=(height or 3.2, height or 2.3)) as (figure, all_axes):
        for axes, (title, members) in zip(all_axes, panels.items(), strict=False):
            drawn = [_draw_line(axes, line) for line in members]
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if log:
                axes.set(xscale="log", yscale="log")
                axes.grid(visible=True, alpha=0.2)
                for axis in (axes.xaxis, axes.yaxis):
                    _format_log(axis)
            handles = {line.label: handle for line, handle in zip(members, drawn, strict=True) if line.label}
            _legend(figure if len(panels) == 1 else axes, handles)
    return figure


def bars(
    names: Sequence[str],
    panels: Mapping[str, Mapping[str, Numbers]],
    *,
    stacked: bool = False,
    errors: Mapping[str, Numbers] | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw horizontal bars: a stack or a group for each name, in one panel per unit, side by side.

    ``panels`` maps each unit to its series, and each series to a value for each name; the axes end at ``limit``.
    """
    num_series = max(map(len, panels.values()))
    height = 0.8 + len(names) * (0.34 if stacked else 0.16 + 0.18 * num_series)
    with _drawing(len(panels), heights=(height, height), columns=len(panels), sharey=True) as (figure, all_axes):
        places, thickness = np.arange(len(names)), 0.72 if stacked else 0.8 / num_series
        handles = {}
        for axes, (unit, series) in zip(all_axes, panels.items(), strict=True):
            start = np.zeros(len(names))
            for index, (label, values) in enumerate(series.items()):
                at = places if stacked else places + (index - (num_series - 1) / 2) * thickness
                colour, error = COLOURS[index % len(COLOURS)], (errors or {}).get(label)
                handles[label] = axes.barh(at, values, thickness, left=start, xerr=error, color=colour, ecolor=_INK)
                start = start + np.asarray(values) if stacked else start
            axes.set(xlabel=unit, xlim=(0, limit))
            axes.margins(y=0.02)
        all_axes[0].set_yticks(places, names)
        all_axes[0].invert_yaxis()
        _legend(figure, handles)
    return figure


def histograms(panels: Sequence[Histogram]) -> Figure:
    """Draw one histogram per panel, with the values of some edges below it."""
    from matplotlib.patches import StepPatch

    colours = dict(zip(dict.fromkeys(chain(*(panel.counts for panel in panels))), COLOURS, strict=False))
    with _drawing(len(panels), heights=(2.8, 1.5)) as (figure, all_axes):
        handles = {}
        for axes, panel in zip(all_axes, panels, strict=False):
            num_bins = len(panel.edges) - 1
            tops = dict(
                zip(
                    panel.counts,
                    np.cumsum([np.asarray(counts) for counts in panel.counts.values()], axis=0),
                    strict=True,
                )
            )
            for name, top in reversed(tops.items()):  # each from zero, behind the lower ones: half the bytes of bands
                bars = StepPatch(top, np.arange(num_bins + 1), fill=True, color=colours[name])
                handles[name] = axes.add_artist(bars)  # ten times faster than `stairs`, which also computes limits
            tallest = max(1, *(int(top.max()) for top in tops.values()))
            at = np.interp(panel.marks, panel.edges, np.arange(num_bins + 1))
            axes.vlines(at, 0, 1, colors=_INK, linestyles="dotted", transform=axes.get_xaxis_transform())
            alone = len(panels) == 1
            labelled = range(0, num_bins + 1, max(1, num_bins // 10) if alone else num_bins)
            axes.set_xticks(labelled, [show(panel.edges[edge]) for edge in labelled])
            values = "   ".join(f"┊ {show(mark)}" for mark in panel.marks)
            axes.set_xlabel(values, labelpad=None if alone else -10)  # between the labels of the ends
            axes.set_yticks([0, tallest], ["0", show(tallest)])
            axes.set(title=panel.title, xlim=(0, num_bins), ylim=(0, 1.03 * tallest))
        _legend(figure, {name: handles[name] for name in colours})
    return figure


def matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], *, rows: str, columns: str) -> Figure:
    """Draw counts by row and column, darker for a larger fraction of the row."""
    size = 1.6 + 0.5 * len(labels)
    with _drawing(1, heights=(size, size), width=size) as (figure, (axes, *_)):
        shares = [[count / max(sum(row), 1) for count in row] for row in counts]
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1)
        middles = np.arange(len(labels)) + 0.5
        axes.set_xticks(middles, labels, rotation=90)
        axes.set_yticks(middles, labels)
        axes.set(xlabel=columns, ylabel=rows)
        axes.invert_yaxis()
        for row, values in enumerate(shares):
            for column, share in enumerate(values):
                colour = "white" if share > 0.5 else "black"
                at = {"x": column + 0.5, "y": row + 0.5, "ha": "center", "va": "center"}
                axes.text(**at, s=str(counts[row][column]), color=colour, fontsize=9)
    return figure


@contextmanager
def _drawing(
    num_panels: int,
    *,
    heights: tuple[float, float],
    width: float = WIDTH,
    columns: int = GRID_COLUMNS,
    sharey: bool = False,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure in the page's style, and its axes, one per panel.

    ``heights`` is in inches: of a single panel, and of each row of several panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, rows * heights[num_panels > 1]))
        all_axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
        figure.subplots_adjust(0, 0, 1, 1, wspace=0.22 * columns / 3, hspace=0.75 / heights[num_panels > 1])
        for axes in all_axes[num_panels:]:
            axes.remove()
        yield figure, all_axes[:num_panels]


def _draw_line(axes: Axes, line: Line) -> Any:
    size = {"o": 3, "-o": 3, "D": 8}.get(line.style, 0)
    return axes.errorbar(
        line.x,
        line.y,
        yerr=line.errors,
        fmt=line.style,
        color=line.colour,
        alpha=line.opacity,
        linewidth=line.width,
        markersize=size,
        markerfacecolor="none" if line.style == "D" else line.colour,
        capsize=6,
        rasterized=line.style == "o" and len(line.x) > MAX_VECTOR_POINTS,
    )


def _format_log(axis: Axis) -> None:
    """Use plain numbers at powers of ten, and between them if there are fewer than two."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(lambda value, _: show(value) if value < 1e6 else f"{value:.3g}")
    axis.set_minor_formatter((lambda value, _: f"{value:.3g}") if high < 10 * low else "")


def _legend(parent: Figure | Axes, handles: Mapping[str, Any]) -> None:
    """Draw a legend: above a figure, or inside one of its panels."""
    from matplotlib.figure import Figure

    if len(handles) < 2:
        return
    place = {}
    if isinstance(parent, Figure):
        distance = 0.36 if any(axes.get_title(loc="left") for axes in parent.axes) else 0.1
        above = 1 + distance / parent.get_figheight()
        place = {"loc": "lower left", "bbox_to_anchor": (0, above), "ncols": 4, "borderpad": 0, "borderaxespad": 0}
    parent.legend(list(handles.values()), list(handles), fontsize="small", **place)
