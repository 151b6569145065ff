"""What the bars of a score add up to, where they lie, and which thresholds are drawn."""

import numpy as np
import pytest

from lilpipe.data.filters.chain import Bounds
from lilpipe.data.histograms import score_histograms

from .corpora import document, write_corpus

CHARS = "length.chars"


def corpus(folder, kept, rejected=(), score=CHARS):
    """Documents with these values of a score; None is a document without one."""
    made = [
        [document(f"{side}/{n}", scores={} if value is None else {score: value}) for n, value in enumerate(values)]
        for side, values in (("kept", kept), ("rejected", rejected))
    ]
    return write_corpus(folder, made[0], [(each, "c4", "lorem_ipsum", "") for each in made[1]])


def histogram(folder, kept, rejected=(), bounds=Bounds(least=1)):  # noqa: B008 (frozen)
    """Edges, documents in each bin, kept and rejected, and the thresholds that are drawn."""
    (made,) = score_histograms(corpus(folder, kept, rejected), {CHARS: bounds})
    assert list(made.counts) == ["kept", "rejected"]
    return np.array(made.edges), *map(np.array, made.counts.values()), list(made.marks)


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
    edges, num_kept, num_rejected, _ = histogram(tmp_path, [*kept.tolist(), None, None], [*rejected.tolist(), None])
    assert (num_kept.sum(), num_rejected.sum()) == (150, 50)
    assert np.all(np.diff(edges) > 0)
    for each, counts in ((kept, num_kept), (rejected, num_rejected)):
        inside = np.clip(each, edges[0], edges[-1])  # zeros are drawn below 1, where an axis is logarithmic
        for low, high, count in zip(edges[1:-2], edges[2:-1], counts[1:-1], strict=True):
            assert count == np.count_nonzero((inside >= low) & (inside < high))


def test_the_threshold_is_drawn_where_it_is_and_only_if_it_is_among_the_values(tmp_path):
    def thresholds(name, **bounds):
        return histogram(tmp_path / name, [10, 20, 90], bounds=Bounds(**bounds))[3]

    assert thresholds("one", least=25) == [25]
    assert thresholds("two", least=15, most=80) == [15, 80]
    assert thresholds("out", least=5, most=100) == []
    assert thresholds("end", least=10) == [10]


@pytest.mark.parametrize("value", [0, 1, 250, -3])
def test_a_score_that_is_the_same_for_all_is_one_bar(tmp_path, value):
    edges, kept, rejected, _ = histogram(tmp_path, [value] * 5, [value] * 2)
    assert edges[0] <= value <= edges[1]
    assert (kept[0], rejected[0], kept.sum(), rejected.sum()) == (5, 2, 5, 2)


@pytest.mark.parametrize(
    ("values", "logarithmic"), [([1, 10, 300], False), ([1, 10, 301], True), ([-1, 9e9], False), ([0, 299], False)]
)
def test_values_of_very_different_size_lie_on_a_logarithmic_axis(tmp_path, values, logarithmic):
    edges = histogram(tmp_path, values)[0]
    widths = np.diff(np.log(edges) if logarithmic else edges)
    np.testing.assert_allclose(widths, widths[0])
    assert (edges[0], edges[-1]) == pytest.approx((min(values), max(values)))


def test_of_a_count_the_documents_without_any_have_a_bar_of_their_own(tmp_path):
    edges, kept, rejected, _ = histogram(tmp_path, [0, 0, 0, 1, 2, 5_000], [0])
    assert (kept[0], rejected[0]) == (3, 1)
    assert edges[:2].tolist() == [0.5, 1]


def test_scores_that_were_not_taken_have_no_histogram_and_the_rest_keep_their_order(tmp_path):
    rows = [document("a", scores={"c4.num_sentences": 7, CHARS: 5})]
    names = ["pii.emails", CHARS, "c4.num_sentences"]
    made = score_histograms(write_corpus(tmp_path / "two", rows), dict.fromkeys(names, Bounds(most=3)))
    assert [each.title for each in made] == ["length · chars", "c4 · num sentences"]
    assert score_histograms(corpus(tmp_path / "none", [None], [None]), {CHARS: Bounds(least=200)}) == []
    assert score_histograms(corpus(tmp_path / "other", [3]), {}) == []
