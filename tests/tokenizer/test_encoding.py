import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lilpipe.errors import ArtifactError
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer, special_tokens
from tests.tokenizer.conftest import PROSE, TEXT

SURROGATES = st.text(st.characters(categories=["Cs", "Lu"]), max_size=6)


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def peer(saved):
    return PreTrainedTokenizerFast.from_pretrained(saved)


@given(text=TEXT)
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_transformers_and_decode_to_the_text(tokenizer, peer, text):
    ids = tokenizer.encode(text)
    assert ids == peer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids


@given(text=SURROGATES)
@settings(deadline=None)
def test_lone_surrogates_become_replacement_characters(tokenizer, text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text) == tokenizer.encode(expected)


def test_text_of_a_special_token_is_ordinary_text(tokenizer):
    for name in special_tokens():
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < tokenizer.vocab_size - len(special_tokens())
        assert tokenizer.decode(ids) == f"a{name}b"


def test_special_tokens_have_the_same_ids_in_transformers(tokenizer, peer):
    assert peer.convert_tokens_to_ids(list(special_tokens())) == list(range(412, 420))
    assert peer("a<|user|>b<|end_of_turn|>").input_ids == [
        *tokenizer.encode("a"),
        tokenizer.user_id,
        *tokenizer.encode("b"),
        tokenizer.turn_end_id,
    ]
    assert len(peer) == tokenizer.vocab_size == 420
    assert (peer.pad_token_id, peer.eos_token_id) == (tokenizer.padding_id, tokenizer.document_end_id)
    assert tokenizer.decode([tokenizer.document_end_id]) == "<|end_of_document|>"


def test_transformers_finds_the_tokenizer_of_a_llama_checkpoint(tokenizer, saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    peer = AutoTokenizer.from_pretrained(tmp_path)
    text = " The  fox\n\n aaaaaa12 é"
    assert peer(text).input_ids == tokenizer.encode(text)
    assert peer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own():
    tokenizer = train_tokenizer(["2024 2024 2024 12 12 " * 50, "words and words again " * 20], vocab_size=278)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024 12")] == ["2", "0", "2", "4", " 1", "2"]


def test_every_code_point_is_classified_alike_by_both_regular_expression_engines(tokenizer, peer):
    # One in 97, so that a different sample of each block is seen; the pattern's classes are L, N, space and the rest.
    for code in range(0, 0x110000, 97):
        if not 0xD800 <= code < 0xE000:
            text = f"a{chr(code)}a {chr(code)}7{chr(code)}\n{chr(code)}!"
            assert tokenizer.encode(text) == peer(text).input_ids, hex(code)


def test_saving_and_loading_changes_nothing(tokenizer, saved, tmp_path):
    loaded: Any = Tokenizer.load(saved)
    assert (loaded.ranks, loaded.pattern, loaded.digest) == (tokenizer.ranks, tokenizer.pattern, tokenizer.digest)
    loaded.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}


def test_the_digest_tells_vocabularies_and_patterns_apart(tokenizer):
    swapped = dict(tokenizer.ranks)
    first, second = list(swapped)[300:302]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    others = [
        BytePairTokenizer(swapped, tokenizer.pattern),
        BytePairTokenizer(tokenizer.ranks, tokenizer.pattern + "|x"),
    ]
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 3


def test_any_number_of_special_tokens_can_be_reserved(tmp_path):
    tokenizer = BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, ".", num_reserved=3)
    assert list(tokenizer.special_ids)[-3:] == ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
    assert (tokenizer.vocab_size, tokenizer.special_ids["<|reserved_2|>"]) == (265, 264)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).special_ids == tokenizer.special_ids
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)("<|reserved_2|>").input_ids == [264]


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("<|user|>", "<|human|>"),
        lambda text: "{}",
        lambda text: text.replace('"!": 33', '"!": 500'),
    ],
)
def test_a_damaged_vocabulary_is_an_error_that_names_the_file(saved, tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage((saved / "tokenizer.json").read_text()))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: got no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_no_file_of_a_tokenizer_needs_pickle(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


# --- runs of a million characters ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spaced():
    patterns = ("single_digits", "gpt2")
    return {pattern: train_tokenizer(PROSE * 3, vocab_size=400, pattern=pattern) for pattern in patterns}


@pytest.mark.parametrize(
    ("pattern", "run"),
    [
        ("single_digits", " " * 1_100_000),
        pytest.param("single_digits", "\t" * 1_100_000, marks=pytest.mark.slow),
        pytest.param("single_digits", " \u3000" * 800_000, marks=pytest.mark.slow),
        pytest.param("gpt2", " " * 1_100_000, marks=pytest.mark.slow),
        pytest.param("gpt2", "\n" * 2_100_000, marks=pytest.mark.slow),
    ],
    ids=["spaces", "tabs", "ideographic spaces", "spaces, GPT-2", "line breaks, GPT-2"],
)
def test_a_run_of_white_space_has_the_ids_of_any_other_text(spaced, tmp_path, pattern, run):
    tokenizer = spaced[pattern]
    tokenizer.save(tmp_path)
    text = f"the fox{run}jumps over 12"
    expected = Library.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert tokenizer.encode_array(text).tolist() == expected
    assert tokenizer.encode_marked(f"{text}<|user|>") == [*expected, tokenizer.user_id]


def test_a_shorter_run_is_encoded_alike_by_both_ways(spaced):
    for tokenizer in spaced.values():
        for text in (*PROSE, "a" + " " * 5_000 + "b", "\n \t" * 1_000, "<|user|>"):
            assert tokenizer._encoder._encode_pieces(text).tolist() == tokenizer.encode(text)
