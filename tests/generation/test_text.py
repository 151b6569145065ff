import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.generation.text import TextStream, token_bytes
from tests.model.checkpoints import small_tokenizer

TOKENIZER = small_tokenizer()
VOCABULARY = token_bytes(TOKENIZER)


def said(tokens, stop=(), *, size=1):
    """The pieces that come when the tokens come ``size`` at a time."""
    text = TextStream(VOCABULARY, stop)
    pieces = [text.push(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    return [*pieces, text.finish()], text.stopped


def test_tokens_have_the_bytes_that_they_decode_to():
    assert len(VOCABULARY) == TOKENIZER.vocab_size
    for token, content in enumerate(VOCABULARY):
        assert content.decode(errors="replace") == TOKENIZER.decode([token])


TOKENS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30)
STOP = st.text("aeth ing|>", min_size=1, max_size=4)


@given(TOKENS, STOP, st.integers(1, 4))
def test_pieces_make_up_the_text_before_the_stop_string(tokens, stop, size):
    pieces, stopped = said(tokens, [stop], size=size)
    before, found, _ = TOKENIZER.decode(tokens).partition(stop)
    assert ("".join(pieces), stopped) == (before, bool(found))


@given(TOKENS, st.lists(STOP, max_size=3), st.integers(1, 4))
def test_of_several_stop_strings_none_is_ever_said(tokens, stop, size):
    pieces, stopped = said(tokens, stop, size=size)
    whole, text = TOKENIZER.decode(tokens), "".join(pieces)
    assert whole.startswith(text) if stopped else whole == text
    assert stopped == any(part in whole for part in stop)
    assert not any(part in text for part in stop)


@given(st.text(max_size=20))
def test_any_text_comes_back_and_no_piece_holds_half_a_character(text):
    pieces, _ = said(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known():
    text = TextStream(VOCABULARY, ["\n\nQ"])
    assert [text.push(TOKENIZER.encode(part)) for part in ("a\n", "\nb", "c\n", "\n", "Q no more")] == [
        *("a", "\n\nb", "c", "", "")
    ]
    assert text.stopped
    assert text.push(TOKENIZER.encode("and on")) + text.finish() == ""


@pytest.mark.parametrize(("stop", "expected"), [(["aab"], "a"), (["ab", "b"], "aa"), (["x"], "aaab")])
def test_a_stop_string_is_found_although_it_begins_like_itself(stop, expected):
    assert "".join(said(TOKENIZER.encode("aaab"))[0]) == "aaab"
    assert "".join(said(TOKENIZER.encode("aaab"), stop)[0]) == expected
