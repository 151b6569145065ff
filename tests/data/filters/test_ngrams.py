import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.data.filters.ngrams import ngram_hashes

BASE, FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def polynomial(words):
    """By the definition, in Python's integers."""
    value = sum(word * BASE ** (len(words) - 1 - place) for place, word in enumerate(words)) % 2**64
    value = (value ^ (value >> 30)) * FACTORS[0] % 2**64
    value = (value ^ (value >> 27)) * FACTORS[1] % 2**64
    return value ^ (value >> 31)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(1, 17))
def test_ngrams_hash_to_the_polynomial_of_their_words(words, n):
    expected = [polynomial(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert ngram_hashes(np.array(words, np.uint64), n).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_two_ngrams_share_a_hash_just_when_they_are_the_same_words_in_the_same_order(n):
    words = np.random.default_rng(n).integers(0, 2**64, 3, np.uint64)[np.random.default_rng(0).integers(0, 3, 3_000)]
    ngrams = {tuple(words[i : i + n].tolist()) for i in range(len(words) - n + 1)}
    assert len(np.unique(ngram_hashes(words, n))) == len(ngrams)
