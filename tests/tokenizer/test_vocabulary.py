import json

import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lilpipe.errors import DataError
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.vocabulary import BYTE_CHARACTERS, read_vocabulary, recover_merges, to_hugging_face
from tests.tokenizer.conftest import PROSE, TEXT

BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture
def uncached(monkeypatch):
    """tiktoken would remember a file by its path."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


def test_a_tiktoken_file_is_read_alike_by_tiktoken_and_back(tokenizer, tmp_path, uncached):
    path = tmp_path / "tokenizer.tiktoken"
    tokenizer.save_tiktoken(path)
    assert tiktoken.load.load_tiktoken_bpe(str(path)) == tokenizer.ranks
    assert BytePairTokenizer(read_vocabulary(path).ranks, "single_digits").digest == tokenizer.digest
    assert path.read_bytes().splitlines()[97] == b"YQ== 97"


def gpt2_files(folder, tokenizer):
    """GPT-2's pair of files, whose first ids are the bytes in GPT-2's order and whose last id is special."""
    order = {bytes([byte]): rank for rank, byte in enumerate(BYTE_CHARACTERS)}
    merges = recover_merges(tokenizer.ranks)
    ranks = order | {left + right: 256 + index for index, (left, right) in enumerate(merges)}
    names = {"".join(BYTE_CHARACTERS[byte] for byte in token): rank for token, rank in ranks.items()}
    (folder / "encoder.json").write_text(json.dumps({**names, "<|endoftext|>": len(names)}))
    pairs = [" ".join("".join(BYTE_CHARACTERS[byte] for byte in part) for part in pair) for pair in merges]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *pairs, ""]))


def test_the_files_of_gpt2_are_read_as_by_tiktoken(tokenizer, tmp_path, uncached):
    gpt2_files(tmp_path, tokenizer)
    vocabulary = read_vocabulary(tmp_path)
    expected = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json")
    )
    assert vocabulary.ranks == expected
    assert vocabulary.pattern == PATTERNS["gpt2"]
    assert vocabulary.special == ((len(expected), "<|endoftext|>"),)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A byte-level tokenizer that Hugging Face's library trained and wrote."""
    trained = HuggingFaceTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trained.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))  # pyright: ignore
    trained.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    trained.save(str(path))
    return trained, path


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_a_foreign_tokenizer_gives_its_own_ids(foreign, text):
    trained, path = foreign
    vocabulary = read_vocabulary(path.parent)
    assert vocabulary.special == ((400, "<s>"),)
    assert vocabulary.pattern is not None
    assert BytePairTokenizer(vocabulary.ranks, vocabulary.pattern).encode(text) == trained.encode(text).ids


def test_merges_are_recovered_from_ranks():
    ranks = dict(BYTES)
    pairs = [(b"a", b"a"), (b"aa", b"a"), (b"b", b"aa"), (b"aa", b"aa"), (b"b", b"c"), (b"baa", b"bc")]
    for left, right in pairs:
        ranks[left + right] = len(ranks)
    assert recover_merges(ranks) == pairs


def test_a_token_that_no_pair_makes_has_no_merge():
    assert recover_merges(BYTES | {b"abc": 256, b"de": 257}) == [(b"d", b"e")]


@given(
    tokens=st.lists(st.text("ab ", min_size=2, max_size=5), unique=True, max_size=12),
    texts=st.lists(st.text("ab ", max_size=20), min_size=5, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_tokens_in_any_order_encode_alike_in_both_formats(tokens, texts):
    # Most such vocabularies are none that training makes: tokens come before what they are made of, or without it.
    ranks = BYTES | {token.encode(): 256 + index for index, token in enumerate(tokens)}
    ours = BytePairTokenizer(ranks, "gpt2")
    peer = HuggingFaceTokenizer.from_str(json.dumps(to_hugging_face(ranks, PATTERNS["gpt2"], ())))
    for text in [*texts, *tokens]:
        assert ours.encode(text) == peer.encode(text).ids


def test_a_tokenizer_trained_here_needs_no_whole_pieces(tokenizer):
    assert to_hugging_face(tokenizer.ranks, tokenizer.pattern, ())["model"]["ignore_merges"] is False


def test_a_path_without_a_vocabulary_is_named(tmp_path):
    with pytest.raises(DataError, match=r"got no vocabulary there, expected a \.tiktoken file"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.tiktoken", "YQ== 0\nYg==\n", "line 2: got b'Yg=='"),
        ("x.tiktoken", "YQ== 0\n", "255 of the 256 bytes are missing, first 0"),
        ("x.tiktoken", "\x00\xff", "line 1"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "got model 'Unigram'"),
        ("tokenizer.json", "[]", "cannot be read"),
        ("tokenizer.json", "{", "cannot be read"),
    ],
)
def test_what_is_no_vocabulary_is_an_error_that_names_the_file(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: got something .*{said}"):
        read_vocabulary(tmp_path / name)


def damaged(foreign, tmp_path, change):
    content = json.loads(foreign[1].read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return read_vocabulary(tmp_path)


def test_ids_that_are_no_ranks_are_refused(foreign, tmp_path):
    def swap(content):
        vocab = content["model"]["vocab"]
        first, second = (name for name, rank in vocab.items() if rank in (300, 301))
        vocab[first], vocab[second] = vocab[second], vocab[first]

    with pytest.raises(DataError, match="ids are not in the order of the merges"):
        damaged(foreign, tmp_path, swap)


def test_a_normalizer_is_refused_since_it_changes_text(foreign, tmp_path):
    with pytest.raises(DataError, match="NFC"):
        damaged(foreign, tmp_path, lambda content: content.update(normalizer={"type": "NFC"}))


def test_a_pre_tokenizer_of_another_kind_is_refused(foreign, tmp_path):
    with pytest.raises(DataError, match="expected ByteLevel after at most one Split"):
        damaged(foreign, tmp_path, lambda content: content.update(pre_tokenizer={"type": "Whitespace"}))


def test_merges_that_tiktoken_would_not_make_are_refused(foreign, tmp_path):
    def without_a_merge(content):
        del content["model"]["merges"][3]

    with pytest.raises(DataError, match="by which tiktoken would merge"):
        damaged(foreign, tmp_path, without_a_merge)


def test_added_tokens_of_plain_text_are_refused(foreign, tmp_path):
    with pytest.raises(DataError, match="'<s>' that is not special"):
        damaged(foreign, tmp_path, lambda content: content["added_tokens"][0].update(special=False))
