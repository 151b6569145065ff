import re
import unicodedata

import numpy as np
import pytest
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION, split_into_words
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.data.filters import words as words_module
from lilpipe.data.filters.words import (
    ALPHABETIC,
    NON_SYMBOL,
    PUNCTUATION,
    SENTENCE_END,
    STOP_WORDS,
    STOP_WORDS_FROM_BIT,
    Words,
)
from tests.data.prose import prose

TOKENS = {
    "The river, (so they say) isn't wide.": "The river , ( so they say ) is n't wide .",
    "Anna's cat: it'll sleep... now?!": "Anna 's cat : it 'll sleep ... now ? !",
    "e.g. Mr. J. Doe and/or NASA.": "e.g. Mr. J. Doe and/or NASA .",
    "well-known, self-made--and either/or": "well - known , self - made -- and either / or",
    "see https://example.org/a-b/c?d=e, or b.org": "see https://example.org/a-b/c?d=e , or b.org",
    "``x_1`` = a.b(c), --flag": "` ` x_1 ` ` = a.b(c ) , --flag",
    "===== ----- 10km 5% $3.50": "= = = = = ----- 10 km 5 % $ 3.50",
    "It cannot (cannot) be": "It can not ( can not ) be",
    "one.Two 3-4 a<b": "one . Two 3 - 4 a < b",
    "→ ✓done “Über” naïve": "→ ✓ done “ Über ” naïve",
}


@pytest.mark.parametrize("text", TOKENS)
def test_marks_split_from_words_as_spacys_rules_have_it(text):
    assert Words(text).tokens == TOKENS[text].split()
    assert Words(text).tokens == split_into_words(text)


@pytest.mark.parametrize("seed", range(10))
def test_prose_splits_as_spacy_splits_it(seed):
    assert Words(prose(seed, 12)).tokens == split_into_words(prose(seed, 12))


texts = st.text(st.sampled_from("abcXYZé的१ ,.!'’\"-_/:=<>()…0123 \n\t\u2028✓\ud800sn t")) | st.text()


@given(texts)
def test_tokens_are_the_text_without_its_white_space(text):
    tokens = Words(text).tokens
    assert "".join(tokens) == "".join(text.split())
    assert all(tokens)


@given(texts)
def test_hashes_are_those_of_the_lower_cased_words_alone(text):
    words = [word for word in re.findall(r"\w+", text) if any(map(str.isalnum, word))]
    expected = [Words(word).hashes.tolist() for word in words]
    assert all(len(hashes) == 1 for hashes in expected)
    assert Words(text).hashes.tolist() == [hashes[0] for hashes in expected]
    if text.lower().upper() == text.upper():
        assert Words(text.lower()).hashes.tolist() == Words(text).hashes.tolist()


def test_hashes_are_the_same_on_every_machine_and_forever():
    # counts and signatures of earlier runs hold them: XXH3, 64 bits, of the word's UTF-8 bytes
    assert Words("Überall, THE!").hashes.tolist() == [0xB9BCFD08901FFEA4, 0xCB1283631CF33D7D]
    assert Words("a b").hashes.dtype == np.uint64


@given(texts)
def test_every_token_has_its_length_its_marks_and_a_hash_of_its_own(text):
    words = Words(text)
    tokens = words.tokens
    assert words.token_lengths.tolist() == [len(token) for token in tokens]
    assert len(set(words.token_hashes.tolist())) == len(set(tokens))
    for token, marks in zip(tokens, words.marks.tolist(), strict=True):
        assert bool(marks & ALPHABETIC) == any(char.isalpha() for char in token)
        assert bool(marks & NON_SYMBOL) == any(char not in PUNCTUATION_SET for char in token)
        assert bool(marks & SENTENCE_END) == (token in TERMINAL_PUNCTUATION)
        assert bool(marks & PUNCTUATION) == all(unicodedata.category(char).startswith("P") for char in token)
        assert marks >> STOP_WORDS_FROM_BIT == (1 << STOP_WORDS.index(token) if token in STOP_WORDS else 0)


def test_a_table_that_fills_up_and_is_emptied_changes_nothing(monkeypatch):
    text = prose(1, 12) + " x" * 40 + " " + "y" * 100
    before = Words(text)
    facts = [before.hashes, before.token_hashes, before.token_lengths, before.marks]
    monkeypatch.setattr(words_module, "_MAX_CHUNKS", 3)
    for table in (words_module._TOKEN_FACTS, words_module._WORD_HASHES):
        table.clear()
    after = Words(text)
    for old, new in zip(facts, [after.hashes, after.token_hashes, after.token_lengths, after.marks], strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(words_module._TOKEN_FACTS) <= 3


def test_long_chunks_are_split_but_not_remembered():
    long = "a1" * 50
    assert Words(f"({long}).").tokens == ["(", long, ")", "."]
    Words(long).hashes  # noqa: B018
    assert long not in words_module._WORD_HASHES
