"""Older files: SentencePiece's models against its own library, GPT-2's pair against transformers."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lilpipe.errors import ArtifactError
from lilpipe.tokenizer.encoding import Tokenizer
from tests.tokenizer.foreign import SENTENCES, gpt2

sentencepiece = pytest.importorskip("sentencepiece")

STYLES = {
    "Llama 2": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "Gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "\n\n", "<2mass>"],
        "split_digits": True,
    },
    "T5": {"model_type": "unigram", "vocab_size": 150, "normalization_rule_name": "nmt_nfkc"},
    "XGLM": {"model_type": "unigram", "vocab_size": 410, "byte_fallback": True, "normalization_rule_name": "nfkc"},
}
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cn", "Co", "Cc"]), max_size=6),
        st.sampled_from(
            ["the thing", " thin", "  ", "theory", "12", "l'été", "人", "👩", "<2mass>", "\n\n", "é", "<s>"]
        ),
    ),
    max_size=8,
).map("".join)


def learnt(directory, **style):
    model = io.BytesIO()
    kept = {"remove_extra_whitespaces": style["model_type"] == "unigram", "control_symbols": ["[INST]"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 400, "character_coverage": 0.99, "hard_vocab_limit": False, **kept, **style},
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    peer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return Tokenizer.load(directory), peer


@pytest.mark.parametrize("style", STYLES)
def test_a_sentencepiece_model_gives_its_own_ids(style, tmp_path):
    tokenizer, peer = learnt(tmp_path, **STYLES[style])
    assert tokenizer.vocab_size == len(peer)
    assert tokenizer.special_ids["[INST]"] == peer.piece_to_id("[INST]")
    assert tokenizer.document_end_id == peer.eos_id()
    assert tokenizer.document_start_ids == ((peer.bos_id(),) if STYLES[style]["model_type"] == "bpe" else ())

    @given(TEXTS)
    @settings(max_examples=80, deadline=None)
    def ids_are_its_own(text):
        assert tokenizer.encode(text) == peer.encode(text)

    for text in SENTENCES:
        assert tokenizer.encode(text) == peer.encode(text)
        if peer.unk_id() not in peer.encode(text):
            assert tokenizer.decode(peer.encode(text)).removeprefix(" ") == peer.decode(peer.encode(text))
    ids_are_its_own()


def test_what_was_converted_is_saved_beside_the_model(tmp_path):
    (tmp_path / "first").mkdir()
    tokenizer, _ = learnt(tmp_path / "first", **STYLES["Llama 2"])
    tokenizer.save(tmp_path / "second")
    loaded = Tokenizer.load(tmp_path / "second")
    assert loaded.digest == tokenizer.digest
    assert (tmp_path / "second/tokenizer.model").read_bytes() == (tmp_path / "first/tokenizer.model").read_bytes()
    peer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert peer("the thing").input_ids == [*loaded.document_start_ids, *loaded.encode("the thing")]


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"YQ== 0\nYg== 1\n", b"\x0a\xff\xff\x7f"])
def test_a_damaged_model_is_named(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"tokenizer\.model: got no SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_a_truncated_model_is_named(tmp_path):
    learnt(tmp_path, **STYLES["Llama 2"])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:2001])
    with pytest.raises(ArtifactError, match=r"tokenizer\.model: got no SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_gpt2s_pair_of_files_is_read(tmp_path):
    library, _ = gpt2()
    library.model.save(str(tmp_path))  # vocab.json and merges.txt
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = library.token_to_id("<|endoftext|>")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 400}))
    tokenizer, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*SENTENCES, "<|endoftext|>"):
        assert tokenizer.encode(text) == peer(text, split_special_tokens=True).input_ids
        assert tokenizer.encode_marked(text) == peer(text).input_ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(ArtifactError, match=r"got the class Qwen2Tokenizer, whose pattern is not in the files"):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing; .*tokenizer\.model, or vocab\.json"):
        Tokenizer.load(tmp_path)
