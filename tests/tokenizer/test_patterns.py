import pydantic
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from rustbpe import Tokenizer as RustTokenizer  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lilpipe.config.tokens import PATTERN_NAMES, TokenizerConfig
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokenizer.patterns import PATTERNS, pattern_name
from tests.tokenizer.conftest import PROSE, TEXT

SENTENCE = "HelloWorld I'LL pay 12345 km²  at\n\n  <b>/\n"
CUT = {
    "single_digits": "HelloWorld| I|'LL| pay| 1|2|3|4|5| km|²| | at|\n\n| | <|b|>/\n",
    "gpt2": "HelloWorld| I|'|LL| pay| 12345| km|²| | at|\n\n | <|b|>/|\n",
    "gpt4": "HelloWorld| I|'LL| pay| |123|45| km|²| | at|\n\n| | <|b|>/\n",
    "gpt4o": "Hello|World| I'LL| pay| |123|45| km|²| | at|\n\n| | <|b|>/\n",
    "llama3": "HelloWorld| I|'LL| pay| |123|45| km|²| | at|\n\n| | <|b|>/\n",
}


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def preset_tokenizer(preset):
    return train_tokenizer(PROSE * 3, vocab_size=400, pattern=preset)


@pytest.fixture(scope="module")
def peer(preset_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    preset_tokenizer.save(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def test_a_sentence_is_cut_as_by_the_tokenizer_that_the_preset_is_named_after(preset):
    assert "|".join(regex.findall(PATTERNS[preset], SENTENCE)) == CUT[preset]


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back_and_has_the_ids_of_transformers(preset_tokenizer, peer, text):
    ids = preset_tokenizer.encode(text)
    assert preset_tokenizer.decode(ids) == text
    assert ids == peer(text, split_special_tokens=True).input_ids


@given(text=st.text(st.characters(categories=["Cs", "Lu", "Nd", "Zs"]), max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_lone_surrogate_comes_back_as_the_replacement_character(preset_tokenizer, text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert preset_tokenizer.decode(preset_tokenizer.encode(text)) == expected


@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_training_cuts_as_encoding_does(preset, text):
    trainer = RustTokenizer()
    trainer.train_from_iterator(iter(PROSE), 300, pattern=PATTERNS[preset])
    ours = BytePairTokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, preset)
    assert trainer.encode(text) == ours.encode(text)


def test_both_regular_expression_engines_cut_alike_around_every_code_point(preset):
    # One in 97, so that a different sample of each block is seen. Each piece of Oniguruma's is made a token, so that
    # tiktoken gives one id for a piece exactly where it cuts the same.
    codes = [code for code in range(0, 0x110000, 97) if not 0xD800 <= code < 0xE000]
    text = "".join(f"a{c}a {c}7{c}\n{c}!'{c} A{c}B{c}{c}  {c}\r{c}'S x'll" for c in map(chr, codes))
    splitter = pre_tokenizers.Split(Regex(PATTERNS[preset]), "isolated")
    pieces = [piece.encode() for piece, _ in splitter.pre_tokenize_str(text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        ranks.setdefault(piece, len(ranks))
    assert BytePairTokenizer(ranks, preset).encode(text) == [ranks[piece] for piece in pieces]


def test_the_default_is_the_preset_of_single_digits():
    assert TokenizerConfig().pattern == "single_digits"
    assert (
        train_tokenizer(PROSE, vocab_size=300).digest
        == train_tokenizer(PROSE, vocab_size=300, pattern="single_digits").digest
    )


def test_a_regular_expression_has_the_name_of_its_preset():
    assert pattern_name(PATTERNS["gpt4o"]) == "gpt4o"
    assert pattern_name("a|b") == "a|b"


def test_a_misspelt_preset_is_not_taken_for_a_regular_expression():
    with pytest.raises(pydantic.ValidationError, match="pattern: got 'gpt5', expected a regular expression or one of"):
        TokenizerConfig(pattern="gpt5")


def test_a_size_that_cannot_hold_a_merge_is_refused():
    with pytest.raises(pydantic.ValidationError, match="vocab_size: got 270, expected at least 273"):
        TokenizerConfig(vocab_size=270, num_reserved=10)
    assert TokenizerConfig(vocab_size=273, num_reserved=10).vocab_size == 273


def test_sizes_go_up_to_262144():
    assert TokenizerConfig(vocab_size=262_144).vocab_size == 262_144
    with pytest.raises(pydantic.ValidationError, match="less than or equal to 262144"):
        TokenizerConfig(vocab_size=262_145)


def test_config_accepts_the_names_of_all_patterns():
    assert set(PATTERN_NAMES) == set(PATTERNS)
