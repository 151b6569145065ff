"""Bins are held against the values, and the drawing against the bins."""

import re

import numpy as np
import pytest

from lilpipe.data.chain import Bounds
from lilpipe.data.histograms import score_histograms
from lilpipe.report import Histogram, histograms

from .corpora import document, write_corpus

CHARS = "length.chars"


def corpus(folder, kept, rejected=(), score=CHARS):
    """Documents with these values of a score; None is a document without one."""
    made = [
        [document(f"{side}/{n}", scores={} if value is None else {score: value}) for n, value in enumerate(values)]
        for side, values in (("kept", kept), ("rejected", rejected))
    ]
    return write_corpus(folder, made[0], [(each, "c4", "lorem_ipsum", "") for each in made[1]])


def draw(folder, kept, rejected=(), score=CHARS, bounds=Bounds(least=1)):  # noqa: B008 (frozen)
    (panel,) = score_histograms(corpus(folder, kept, rejected, score), {score: bounds})
    return panel


def bins(panel):
    return np.array(panel.edges), np.array(panel.counts["kept"]), np.array(panel.counts["rejected"])


@pytest.mark.parametrize(
    "draw_values",
    [
        lambda draw: draw.normal(100, 20, 200),
        lambda draw: draw.lognormal(6, 3, 200),
        lambda draw: draw.poisson(0.5, 200) * draw.integers(1, 10_000, 200),
        lambda draw: draw.uniform(-5, 5, 200),
    ],
    ids=["linear", "logarithmic", "counts with zeros", "negative"],
)
def test_every_document_with_the_score_is_in_the_bin_that_its_value_lies_in(tmp_path, draw_values):
    values = draw_values(np.random.default_rng(0)).astype(np.float32)
    kept, rejected = values[:150], values[150:]
    edges, num_kept, num_rejected = bins(draw(tmp_path, [*kept.tolist(), None, None], [*rejected.tolist(), None]))
    assert (num_kept.sum(), num_rejected.sum()) == (150, 50)
    assert np.all(np.diff(edges) > 0)
    for each, counts in ((kept, num_kept), (rejected, num_rejected)):
        inside = np.clip(each, edges[0], edges[-1])  # zeros are drawn below 1, where an axis is logarithmic
        for low, high, count in zip(edges[1:-2], edges[2:-1], counts[1:-1], strict=True):
            assert count == np.count_nonzero((inside >= low) & (inside < high))


def test_the_threshold_is_drawn_where_it_is_and_only_if_it_is_among_the_values(tmp_path):
    assert draw(tmp_path / "one", [10, 20, 90], bounds=Bounds(least=25)).marks == [25]
    assert draw(tmp_path / "two", [10, 20, 90], bounds=Bounds(least=15, most=80)).marks == [15, 80]
    assert draw(tmp_path / "out", [10, 20, 90], bounds=Bounds(least=5, most=100)).marks == []
    assert draw(tmp_path / "end", [10, 20, 90], bounds=Bounds(least=10)).marks == [10]


@pytest.mark.parametrize("value", [0, 1, 250, -3])
def test_a_score_that_is_the_same_for_all_is_one_bar(tmp_path, value):
    edges, kept, rejected = bins(draw(tmp_path, [value] * 5, [value] * 2, bounds=Bounds(most=0)))
    assert edges[0] <= value <= edges[1]
    assert (kept[0], rejected[0], kept.sum(), rejected.sum()) == (5, 2, 5, 2)


@pytest.mark.parametrize(
    ("values", "even"), [([1, 10, 300], True), ([1, 10, 301], False), ([0, 3, 500], False), ([-1, 9e9], True)]
)
def test_values_of_very_different_size_have_bins_in_a_geometric_row(tmp_path, values, even):
    widths = np.diff(draw(tmp_path, values).edges)[1:]  # behind that of the zeros
    assert np.allclose(widths, widths[0]) == even
    assert even or np.allclose(widths[1:] / widths[:-1], widths[1] / widths[0])


def test_of_a_count_the_documents_without_any_have_a_bar_of_their_own(tmp_path):
    edges, kept, rejected = bins(draw(tmp_path, [0, 0, 0, 1, 2, 5_000], [0]))
    assert (kept[0], rejected[0]) == (3, 1)
    assert edges[:2].tolist() == [0.5, 1]


def test_scores_that_were_not_taken_have_no_histogram_and_the_rest_keep_their_order(tmp_path):
    names = ["pii.emails", CHARS, "c4.num_sentences"]
    panels = score_histograms(corpus(tmp_path / "some", [300], [4.0]), dict.fromkeys(names, Bounds(most=3)))
    assert [panel.title for panel in panels] == ["length · chars"]
    rows = [document("a", scores={"c4.num_sentences": 7, CHARS: 5})]
    panels = score_histograms(write_corpus(tmp_path / "two", rows), dict.fromkeys(names, Bounds(most=3)))
    assert [panel.title for panel in panels] == ["length · chars", "c4 · num sentences"]


def test_where_no_score_was_taken_there_is_none(tmp_path):
    assert score_histograms(corpus(tmp_path, [None], [None]), {CHARS: Bounds(least=200)}) == []
    assert score_histograms(corpus(tmp_path / "other", [3]), {}) == []


def test_bars_are_stacked_to_scale_and_a_mark_stands_where_its_value_is():
    html = histograms([Histogram("a <b>", [0, 1, 2, 4], {"kept": [1, 0, 2], "rejected": [0, 0, 2]}, marks=[3])])
    assert "a &lt;b&gt;" in html
    kept, rejected = re.findall(r'd="([^"]*)"', html)
    assert kept == "M0.0 90.0V67.5h100.0V90.0zM200.0 90.0V45.0h100.0V90.0z"
    assert rejected == "M200.0 45.0V0.0h100.0V45.0z"
    assert 'x1="250.0" x2="250.0"' in html


def test_empty_bins_draw_nothing():
    html = histograms([Histogram("none", [0, 1], {"kept": [0], "rejected": [0]})])
    assert re.findall(r'd="([^"]*)"', html) == ["", ""]
