"""Vocabularies from elsewhere, made here by Hugging Face's own library, against the ids that it gives."""

import json

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as Peer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lilpipe.errors import ArtifactError, DataError
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.vocabulary import to_hugging_face
from tests.tokenizer.conftest import TEXT

SENTENCES = ["the theory of the thing is thinner than the other thing", "naïve 12345 l'été, they're there's"] * 3
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]


def gpt2(directory, *, normalizer=None):
    """Trained as GPT-2's was: ByteLevel's own pattern, and one special token, behind the merges."""
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    peer.add_special_tokens(["<|endoftext|>"])
    peer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": peer.token_to_id("<|endoftext|>")}))
    return peer


def llama3(directory):
    """As it was converted from tiktoken's file: every pair that makes a token is among the merges."""
    ranks = train_tokenizer(SENTENCES, vocab_size=300, pattern="llama3").ranks
    special = [(len(ranks) + index, name) for index, name in enumerate(LLAMA3_SPECIAL)]
    pairs = [
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    content = to_hugging_face(ranks, PATTERNS["llama3"], special, pairs)
    content["model"]["ignore_merges"] = True
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [len(ranks) + 1, len(ranks) + 2]}))
    return Peer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(params=[gpt2, llama3], ids=["GPT-2", "Llama 3"], scope="module")
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported")
    return request.param(directory), Tokenizer.load(directory)


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_the_librarys_own(pair, text):
    peer, tokenizer = pair
    peer.encode_special_tokens = True  # a special token's name in a text is text, as it is to us
    assert tokenizer.encode(text) == peer.encode(text).ids
    peer.encode_special_tokens = False
    assert tokenizer.encode_marked(f"{text}{tokenizer.document_end}") == [
        *tokenizer.encode(text),
        tokenizer.document_end_id,
    ]


def test_its_own_special_tokens_stay_and_the_first_named_end_ends_a_document(tmp_path):
    llama3(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert list(tokenizer.special_ids) == LLAMA3_SPECIAL
    assert tokenizer.document_end == "<|end_of_text|>"
    assert tokenizer.padding_id == tokenizer.document_end_id
    assert not tokenizer.has_turns


def test_what_is_saved_loads_without_the_models_config(pair, tmp_path):
    _, tokenizer = pair
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.digest, again.document_end) == (tokenizer.digest, tokenizer.document_end)
    assert Peer.from_file(str(tmp_path / "tokenizer.json")).encode("the thing's 12345").ids == again.encode(
        "the thing's 12345"
    )


def test_a_conversation_needs_tokens_for_turns(pair):
    with pytest.raises(DataError, match=r"without <\|user\|>.*tokenizer\.base"):
        _ = pair[1].user_id


def test_gpt2s_pair_of_files_is_read(tmp_path):
    peer = gpt2(tmp_path)
    peer.model.save(str(tmp_path))  # vocab.json and merges.txt
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = peer.token_to_id("<|endoftext|>")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.load(tmp_path).encode("the thing's 123") == peer.encode("the thing's 123").ids


def without_a_merge(content):
    del content["model"]["merges"][3]


def with_a_normalizer(content):
    content["normalizer"] = {"type": "NFC"}


def with_a_word_of_plain_text(content):
    content["added_tokens"][0]["special"] = False


def with_a_gap(content):
    content["added_tokens"][0]["id"] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_merge, "by which tiktoken would merge"),
        (with_a_normalizer, "normalizer"),
        (with_a_word_of_plain_text, "that is not special"),
        (with_a_gap, "eos_token: got none"),
    ],
)
def test_what_would_change_ids_is_refused(tmp_path, damage, message):
    gpt2(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    damage(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        Tokenizer.load(tmp_path)


def test_a_model_from_elsewhere_must_say_which_token_ends_a_text(tmp_path):
    gpt2(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match="eos_token: got none"):
        Tokenizer.load(tmp_path)
