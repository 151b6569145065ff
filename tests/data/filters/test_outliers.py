import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.data.filters import outliers
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.outliers import (
    DirtyWords,
    Divergence,
    DuplicateNgramCoverage,
    Unigrams,
    WordCounts,
    merge_counts,
)
from lilpipe.data.filters.words import Words
from lilpipe.errors import ConfigError
from tests.data.prose import count_words, prose

letters = st.lists(st.sampled_from("abcdefgh"), max_size=30).map(" ".join)


def judge(only, text):
    """The rejection, and the one score."""
    document = Document(id="1", text=text, source="test")
    rejection = only(document)
    (score,) = document.scores.values()
    return rejection, score


# --- counts ---------------------------------------------------------------------------------------------------------


def counted(counts):
    return dict(zip(counts.hashes.tolist(), counts.counts.tolist(), strict=True))


def naive_counts(texts):
    return Counter(Words(word).hashes.item() for text in texts for word in text.split())


@given(st.lists(letters), st.integers(1, 40))
def test_words_are_counted_over_all_documents_however_they_are_buffered(texts, buffered):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "_BUFFERED_WORDS", buffered)
        counts = count_words(map(Words, texts))
    assert counted(counts) == naive_counts(texts)
    assert np.array_equal(counts.hashes, np.unique(counts.hashes))


@given(st.lists(st.lists(letters), min_size=1), st.randoms())
def test_parts_of_a_corpus_merge_to_the_counts_of_all_of_it_in_any_order(parts, random):
    counts = [count_words(map(Words, texts)) for texts in parts]
    random.shuffle(counts)
    assert counted(merge_counts(counts)) == naive_counts([text for texts in parts for text in texts])


# --- divergence -----------------------------------------------------------------------------------------------------


def test_smoothing_adds_one_to_every_word_and_to_what_is_unseen():
    unigrams = Unigrams.from_counts(WordCounts(np.array([3, 5, 9], np.uint64), np.array([4, 1, 2])))
    assert unigrams.probability(np.array([9, 3, 4, 10, 0], np.uint64)) == pytest.approx(
        [3 / 11, 5 / 11, 1 / 11, 1 / 11, 1 / 11]
    )
    assert unigrams.probabilities.sum() + unigrams.unseen == pytest.approx(1)


def test_beyond_the_most_words_the_rarest_are_unseen():
    counts = WordCounts(np.array([3, 5, 7, 9], np.uint64), np.array([1, 4, 1, 2]))
    unigrams = Unigrams.from_counts(counts, max_words=3)
    assert unigrams.hashes.tolist() == [3, 5, 9]
    assert unigrams.probabilities == pytest.approx([2 / 13, 5 / 13, 3 / 13])
    assert unigrams.unseen == 1 / 13


@given(letters.filter(bool), letters)
def test_divergence_is_kullback_s_and_leibler_s(text, corpus):
    reference, counts = Counter(corpus.split()), Counter(text.split())
    num_corpus, num_text = reference.total() + len(reference) + 1, counts.total()
    expected = sum(
        count / num_text * math.log(count / num_text / ((reference[word] + 1) / num_corpus))
        for word, count in counts.items()
    )
    only = Divergence(100.0, Unigrams.from_counts(count_words([Words(corpus)])))
    assert judge(only, text)[1] == pytest.approx(expected)


def test_documents_of_outlier_tokens_diverge_more_than_prose():
    reference = Unigrams.from_counts(count_words(Words(prose(seed)) for seed in range(50)))
    only = Divergence(4.0, reference)
    assert judge(only, prose(77))[0] is None
    rejection, score = judge(only, " ".join(f"x{i}" for i in range(100)))
    assert rejection is not None
    assert rejection.reason == "outlier_words"
    assert score > 4


# --- dirty words ----------------------------------------------------------------------------------------------------


def test_words_of_the_list_count_whatever_their_case_and_what_stands_around_them(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("foo\nBar baz\n\nfoo\n", encoding="utf-8")
    only = DirtyWords(3, str(path))
    assert judge(only, "food, foobar; bar, and baz") == (None, 0)
    rejection, count = judge(only, "(Foo) foo-foo, BAR\nbaz! bar")
    assert (rejection, count) == (("too_many_dirty_words", ""), 4)
    assert judge(only, "foo foo bar baz") == (None, 3)


def test_the_list_built_in_knows_adult_sites_and_leaves_medicine_alone():
    only = DirtyWords(0)
    assert judge(only, "Breast cancer screening, and sex education in Essex.") == (None, 0)
    assert judge(only, "Free porn and a sex-tape")[1] == 2


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none.txt"))):
        DirtyWords(1, str(tmp_path / "none.txt"))


def test_an_empty_list_finds_nothing(tmp_path):
    (tmp_path / "empty").write_text("\n")
    assert judge(DirtyWords(0, str(tmp_path / "empty")), prose(1)) == (None, 0)


# --- n-gram coverage ------------------------------------------------------------------------------------------------


def test_lines_of_a_log_are_covered_by_what_has_been_there():
    log = "\n".join(f"[{i}] error: the file that you have asked for is not there" for i in range(10))
    rejection, score = judge(DuplicateNgramCoverage(0.5, 10), log)
    assert rejection is not None
    assert rejection.reason == "duplicate_ngram_coverage"
    assert score == pytest.approx(9 * 11 / (10 * 12))
    assert judge(DuplicateNgramCoverage(0.5, 10), prose(1)) == (None, 0)
