import re
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.data.filters import repetition
from lilpipe.data.filters.repetition import (
    duplicate_ngram_chars,
    duplicates,
    ngram_coverage,
    repeated_ngrams,
    split_lines,
    split_paragraphs,
    top_ngram_chars,
)
from lilpipe.data.filters.words import Words

SIZES = [2, 3, 5, 6, 10]


def arrays(words):
    """Hashes of the words, and the characters before each."""
    hashes = np.array([Words(word).token_hashes[0] for word in words], np.uint64)
    return hashes, [0, *accumulate(map(len, words))]


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def naive_top_chars(words, n):
    (top, count), *_ = Counter(ngrams(words, n)).most_common(1)
    return len(" ".join(top)) * count


def naive_duplicate_chars(words, n):
    seen, chars, place = set(), 0, 0
    while place <= len(words) - n:
        ngram = tuple(words[place : place + n])
        if ngram in seen:
            chars += len("".join(ngram))
            place += n
        else:
            seen.add(ngram)
            place += 1
    return chars


def naive_coverage(words, n):
    covered = set()
    for place, ngram in enumerate(ngrams(words, n)):
        if ngram in ngrams(words, n)[:place]:
            covered |= set(range(place, place + n))
    return len(covered) / len(words) if words else 0


# few words, of different lengths, so that much is repeated
repetitive = st.lists(st.sampled_from(["a", "bb", "cccc"]), max_size=60) | st.lists(st.sampled_from("abcdefgh"))


@pytest.mark.parametrize("block_cells", [1, 40, 2**14])
@given(words=repetitive)
def test_repeated_ngrams_are_those_that_stood_before_with_the_place_of_the_first(block_cells, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repetition, "_BLOCK_CELLS", block_cells)
        found = list(repeated_ngrams(arrays(words)[0], SIZES))
    assert [repeats.size for repeats in found] == SIZES
    for repeats in found:
        grams = ngrams(words, repeats.size)
        expected = [(place, grams.index(gram)) for place, gram in enumerate(grams) if grams.index(gram) < place]
        assert list(zip(repeats.positions.tolist(), repeats.origins.tolist(), strict=True)) == expected


@given(repetitive)
def test_the_characters_of_repeated_ngrams_are_those_of_a_plain_count(words):
    hashes, offsets = arrays(words)
    for repeats in repeated_ngrams(hashes, SIZES):
        assert duplicate_ngram_chars(repeats, offsets) == naive_duplicate_chars(words, repeats.size)
        assert ngram_coverage(repeats, len(words)) == pytest.approx(naive_coverage(words, repeats.size))
        if repeats.size <= len(words):
            assert top_ngram_chars(repeats, offsets) == naive_top_chars(words, repeats.size)


def test_an_ngram_that_only_stood_inside_a_repetition_has_not_been_read():
    words = list("xabcyabcdzbcdw")
    assert naive_duplicate_chars(words, 3) == 3
    # `b c d` stands inside nothing but `a b c d`, whose first three words were the repetition
    (repeats,) = repeated_ngrams(arrays(words)[0], [3])
    assert repeats.positions.tolist() == [5, 10]
    assert duplicate_ngram_chars(repeats, arrays(words)[1]) == 3


def test_long_texts_give_what_short_ones_give():
    words = np.random.default_rng(0).choice(["a", "bb", "ccc", "dddd", "eeeee", "f"], 30_000).tolist()
    hashes, offsets = arrays(words)
    for repeats in repeated_ngrams(hashes, [2, 4, 7]):
        assert top_ngram_chars(repeats, offsets) == naive_top_chars(words, repeats.size)
        assert duplicate_ngram_chars(repeats, offsets) == naive_duplicate_chars(words, repeats.size)


@given(st.lists(st.sampled_from(["", "a", "bb", "ccc"])))
def test_duplicates_are_counted_from_their_second_occurrence(elements):
    again = [element for place, element in enumerate(elements) if element in elements[:place]]
    assert duplicates(elements) == (len(again), len("".join(again)))


@given(st.text(st.sampled_from("\n\n\na \t")))
def test_runs_of_line_breaks_part_lines_and_paragraphs(text):
    assert split_lines(text) == re.split(r"\n+", text)
    assert split_paragraphs(text) == re.split(r"\n{2,}", text.strip())
