"""The figure is taken apart: what its bars add up to, and where its lines are."""

import numpy as np
import pytest

from lilpipe.data.chain import Bounds
from lilpipe.data.histograms import score_figure
from lilpipe.report import figure

from .corpora import document, write_corpus

CHARS = "length.chars"


def corpus(folder, kept, rejected=(), score=CHARS):
    """Documents with these values of a score; None is a document without one."""
    made = [
        [document(f"{side}/{n}", scores={} if value is None else {score: value}) for n, value in enumerate(values)]
        for side, values in (("kept", kept), ("rejected", rejected))
    ]
    return write_corpus(folder, made[0], [(each, "c4", "lorem_ipsum", "") for each in made[1]])


def only_axes(picture):
    assert picture is not None
    (axes,) = [each for each in picture.axes if each.get_visible()]
    return axes


def bars(axes):
    """Bin edges, and documents in each bin: kept and rejected."""
    together, kept = (patch.get_data() for patch in axes.patches)
    assert together.edges.tolist() == kept.edges.tolist()
    return kept.edges, kept.values, together.values - kept.values


def thresholds(axes):
    return [line.get_xdata()[0] for line in axes.lines]


def draw(folder, kept, rejected=(), score=CHARS, bounds=Bounds(least=1)):  # noqa: B008 (frozen)
    return only_axes(score_figure(corpus(folder, kept, rejected, score), {score: bounds}))


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
    axes = draw(tmp_path, [*kept.tolist(), None, None], [*rejected.tolist(), None])
    edges, num_kept, num_rejected = bars(axes)
    assert (num_kept.sum(), num_rejected.sum()) == (150, 50)
    assert np.all(np.diff(edges) > 0)
    for each, counts in ((kept, num_kept), (rejected, num_rejected)):
        inside = np.clip(each, edges[0], edges[-1])  # zeros are drawn below 1, where an axis is logarithmic
        for low, high, count in zip(edges[1:-2], edges[2:-1], counts[1:-1], strict=True):
            assert count == np.count_nonzero((inside >= low) & (inside < high))


def test_the_threshold_is_drawn_where_it_is_and_only_if_it_is_among_the_values(tmp_path):
    assert thresholds(draw(tmp_path / "one", [10, 20, 90], bounds=Bounds(least=25))) == [25]
    assert thresholds(draw(tmp_path / "two", [10, 20, 90], bounds=Bounds(least=15, most=80))) == [15, 80]
    assert thresholds(draw(tmp_path / "out", [10, 20, 90], bounds=Bounds(least=5, most=100))) == []
    assert thresholds(draw(tmp_path / "end", [10, 20, 90], bounds=Bounds(least=10))) == [10]


@pytest.mark.parametrize("value", [0, 1, 250, -3])
def test_a_score_that_is_the_same_for_all_is_one_bar(tmp_path, value):
    edges, kept, rejected = bars(draw(tmp_path, [value] * 5, [value] * 2, bounds=Bounds(most=0)))
    assert edges[0] <= value <= edges[1]
    assert (kept[0], rejected[0], kept.sum(), rejected.sum()) == (5, 2, 5, 2)


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 10, 300], "linear"), ([1, 10, 301], "log"), ([0, 3, 500], "log"), ([-1, 9e9], "linear")]
)
def test_values_of_very_different_size_are_drawn_on_a_logarithmic_axis(tmp_path, values, scale):
    assert draw(tmp_path, values).get_xscale() == scale


def test_of_a_count_the_documents_without_any_have_a_bar_of_their_own(tmp_path):
    edges, kept, rejected = bars(draw(tmp_path, [0, 0, 0, 1, 2, 5_000], [0]))
    assert (kept[0], rejected[0]) == (3, 1)
    assert edges[:2].tolist() == [0.5, 1]


def test_scores_that_were_not_taken_have_no_histogram_and_the_rest_keep_their_order(tmp_path):
    folder = corpus(tmp_path / "some", [300], [4.0])
    names = ["pii.emails", CHARS, "c4.num_sentences"]
    picture = score_figure(folder, dict.fromkeys(names, Bounds(most=3)))
    assert only_axes(picture).get_title(loc="left") == "length · chars"
    rows = [document("a", scores={"c4.num_sentences": 7, CHARS: 5})]
    picture = score_figure(write_corpus(tmp_path / "two", rows), dict.fromkeys(names, Bounds(most=3)))
    assert picture is not None
    shown = [axes for axes in picture.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["length · chars", "c4 · num sentences"]


def test_where_no_score_was_taken_there_is_no_figure(tmp_path):
    folder = corpus(tmp_path, [None], [None])
    assert score_figure(folder, {CHARS: Bounds(least=200)}) is None
    assert score_figure(corpus(tmp_path / "other", [3]), {}) is None


def test_the_same_corpus_is_drawn_in_the_same_bytes(tmp_path):
    folder = corpus(tmp_path, [1, 20, 3_000], [5])
    pictures = [score_figure(folder, {CHARS: Bounds(least=200)}) for _ in range(2)]
    assert len({figure(picture) for picture in pictures if picture is not None}) == 1
