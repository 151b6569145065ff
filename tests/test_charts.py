"""Charts show the values they were given, and labels from outside as plain text, the same bytes each time."""

import re
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lilpipe import charts
from lilpipe.charts import Histogram, Line

HOSTILE = "<script>alert('x')</script>"


def make(label):
    """One chart of each kind, with this text wherever a text is shown."""
    lines = {label: [Line(label, [1, 2], [3, 4]), Line(f"{label}2", [1, 2], [4, 5], "o")]}
    return {
        "lines": charts.lines(lines, label, label),
        "bars": charts.bars([label, "b"], {label: {label: [1, 2], f"{label}2": [3, 4]}}, stacked=True),
        "histograms": charts.histograms([Histogram(label, [0, 1, 2], {label: [3, 4], f"{label}2": [1, 2]})]),
        "matrix": charts.matrix([label, f"{label}2"], [[1, 2], [3, 4]], rows=label, columns=label),
    }


def panels(figure) -> list[Any]:
    return list(figure.axes)


KINDS = ("lines", "bars", "histograms", "matrix")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [HOSTILE, "$x_{$", "_private", "语言", "--> ]]>"])
def test_a_label_from_outside_is_shown_as_it_is(kind, label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = charts.svg(make(label)[kind])
    assert "<script" not in drawn
    shown = re.findall(r"<text[^>]*>(.*?)</text>", drawn)
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    expected = {"lines": 4, "bars": 3, "histograms": 2, "matrix": 4}[kind]
    assert shown.count(escaped) == expected
    assert shown.count(f"{escaped}2") == (2 if kind == "matrix" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_chart_is_the_same_bytes_fetches_nothing_and_takes_its_ink_from_the_page(kind):
    drawn = charts.svg(make("name")[kind])
    assert drawn == charts.svg(make("name")[kind])
    assert "<metadata" not in drawn
    assert 'href="http' not in drawn
    assert "currentColor" in drawn
    assert "#1f2733" not in drawn


def test_bars_of_a_histogram_are_as_high_as_their_counts_and_stacked_and_thresholds_are_between_them():
    panel = Histogram("score", [0, 1, 10, 100], {"kept": [4, 0, 1], "rejected": [4, 2, 0]}, marks=[1, 55])
    (axes,) = panels(charts.histograms([panel]))
    behind, kept = (patch.get_data() for patch in axes.patches)
    assert (behind.values.tolist(), behind.baseline) == ([8, 2, 1], 0)
    assert (kept.values.tolist(), kept.baseline) == ([4, 0, 1], 0)
    assert kept.edges.tolist() == [0, 1, 2, 3]
    marks = [segment[0][0] for segment in axes.collections[0].get_segments()]
    assert marks == pytest.approx([1, 2.5])
    ticks = {label.get_text(): label.get_position()[0] for label in axes.get_xticklabels()}
    assert ticks == {"0": 0, "1": 1, "10": 2, "100": 3}
    assert axes.get_xlabel() == "┊ 1   ┊ 55"
    assert axes.get_ylim()[1] >= 8


def test_stacked_bars_stand_on_one_another_and_grouped_ones_side_by_side():
    series = {"one": [3.0, 1.0], "two": [2.0, 5.0]}
    stacked = charts.bars(["a", "b"], {"MB": series, "documents": series}, stacked=True)
    _, second = panels(stacked)
    assert [(bar.get_x(), bar.get_width()) for bar in second.patches] == [(0, 3), (0, 1), (3, 2), (1, 5)]
    (grouped,) = panels(charts.bars(["a", "b"], {"MB": series}, errors={"one": [0.5, 0.25]}))
    assert [(bar.get_x(), bar.get_width()) for bar in grouped.patches] == [(0, 3), (0, 1), (0, 2), (0, 5)]
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in grouped.patches)
    assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(spans))
    (errors,) = grouped.collections
    assert [(one[0], other[0]) for one, other in errors.get_segments()] == [(2.5, 3.5), (0.75, 1.25)]


def test_lines_of_each_title_are_a_panel_with_error_bars_and_many_dots_become_a_bitmap():
    point = Line("predicted", [10], [2.0], "D", errors=[[0.5], [0.25]])
    many = np.arange(1, charts.MAX_VECTOR_POINTS + 2)
    figure = charts.lines({"first": [point], "second": [Line("", many, many, "o")]}, log=True)
    first, second = panels(figure)
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("first", "second")
    assert first.lines[0].get_xydata().tolist() == [[10, 2]]
    assert first.collections[0].get_segments()[0].tolist() == [[10, 1.5], [10, 2.25]]
    drawn = charts.svg(figure)
    assert drawn.count("<image") == 1
    assert len(drawn) < 100_000


def test_a_matrix_shows_each_count_in_its_row_and_column():
    (axes,) = panels(charts.matrix(["cat", "dog"], [[5, 0], [1, 2]], rows="class", columns="taken for"))
    shown = {(text.get_position()): text.get_text() for text in axes.texts}
    assert shown == {(0.5, 0.5): "5", (1.5, 0.5): "0", (0.5, 1.5): "1", (1.5, 1.5): "2"}
    assert axes.yaxis_inverted()
