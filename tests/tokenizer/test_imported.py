"""Tokenizers from elsewhere, in the styles of twelve families, against transformers' ids."""

import functools
import json
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from lilpipe.errors import ArtifactError, DataError
from lilpipe.tokenizer.encoding import NAMED_TOKENS, BytePairTokenizer, ImportedTokenizer, Tokenizer
from lilpipe.tokenizer.huggingface import token_decoder
from tests.tokenizer.conftest import FAMILIAR, TEXT
from tests.tokenizer.foreign import FAMILIES, SENTENCES, write

UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd2\ufdd3"), max_size=12)
PIECES = [
    *FAMILIAR,
    *(
        "<unk>",
        "</s>",
        "<|im_end|>",
        "<|endoftext|>",
        "<think>",
        "<｜User｜>",
        "[INST]",
        "<extra_id_0>",
        "<|end|> \n x",
    ),
    *(
        "<|end|> \n x",
        "▁",
        "<0x41>",
        "Ġ",
        "##a",
        "\x00",
        "\x1b[0m",
        "\x7f",
        "\u200b",
        "\ufeff",
        "e\u0301",
        "ﬁ",
        "Å",
        "가",
        "각",
    ),
    *("👩🏽‍🚀", "🏳️‍🌈", "🇩🇪", "नि", "ก็", "שָׁלוֹם", "مرحبا", "Ελλάς", "ǅ", "İ", "ß", "½", "٣", "一二三"),
    *("    ", "        ", "\t\t", "\n\n\n", "\r", "\u3000", "\u00a0", "   \n  ", "if x:\n        y()\n", "</body>"),
]
MIXED = st.lists(st.one_of(UNICODE, st.sampled_from(PIECES)), max_size=10).map("".join)


@functools.cache
def pair(name) -> tuple[Any, Any]:
    """Our tokenizer of a family, and transformers'."""
    directory = write(name, Path(tempfile.mkdtemp()))
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


def check(name, text):
    tokenizer, peer = pair(name)
    expected = peer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = tokenizer.encode(text)
    if name == "t5" and any(token in text for token in tokenizer.special_ids):
        # A Unigram vocabulary of the library finds a special token in text, as SentencePiece does not.
        assert not set(ids) & set(tokenizer.special_ids.values()) - {peer.unk_token_id}
    else:
        assert ids == expected
    assert tokenizer.encode_marked(text) == peer(text, add_special_tokens=False).input_ids
    for encoded in (ids, tokenizer.encode_marked(text)):
        assert tokenizer.decode(encoded) == peer.decode(encoded)


@pytest.mark.parametrize("name", FAMILIES)
def test_sentences_and_pieces_of_text_have_the_ids_of_transformers(name):
    for text in ["", *SENTENCES, *PIECES, *(f"a {piece} b" for piece in PIECES), "".join(PIECES)]:
        check(name, text)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_has_the_ids_of_transformers(name):
    @given(MIXED)
    @example("\x00")
    @settings(max_examples=60, deadline=None)
    def any_text(text):
        check(name, text)

    any_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_thousand_texts_have_the_ids_of_transformers(name):
    draw = random.Random(name)
    planes = [range(0x20, 0x250), range(0x370, 0x1200), range(0x3040, 0x9FFF), range(0x1F300, 0x1FAFF), range(0x20)]

    def character():
        return chr(draw.choice(draw.choice(planes)))

    for _ in range(10_000):
        parts = [
            draw.choice(PIECES) if draw.random() < 0.5 else "".join(character() for _ in range(draw.randrange(1, 9)))
            for _ in range(draw.randrange(12))
        ]
        check(name, draw.choice(["", " ", "\n"]).join(parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_never_becomes_a_special_token(name):
    tokenizer, _ = pair(name)
    special = {number for token, number in tokenizer.special_ids.items() if token != "<unk>"}
    for token in tokenizer.special_ids:
        for text in (token, f"a{token}b", f" {token} ", token * 3, f"<{token}>"):
            assert not special & set(tokenizer.encode(text))


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_arrays_and_lists_agree(name):
    tokenizer, _ = pair(name)
    texts = [*SENTENCES, "\ud800 lone", "\ufdd3\U000f0000 private"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode(texts[-2]) == tokenizer.encode("\ufffd lone")


STARTS = {"llama3": "<|begin_of_text|>", "deepseek": "<｜begin▁of▁sentence｜>", "llama2": "<s>", "mistral": "<s>"}
STARTS["gemma"] = "<bos>"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_starts_as_the_model_expects(name):
    tokenizer, peer = pair(name)
    expected = [STARTS[name]] if name in STARTS else []
    assert [tokenizer.decode([token]) for token in tokenizer.document_start_ids] == expected
    text = "the thing"
    if name != "deepseek":  # transformers 5 ignores its add_bos_token
        assert [*tokenizer.document_start_ids, *tokenizer.encode(text)] == peer(text).input_ids
    first = tokenizer.document_start_ids or (tokenizer.document_end_id,)
    assert tokenizer.encode_prompt(text) == [*first, *tokenizer.encode(text)]


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_of_tokens_make_up_the_text(name):
    tokenizer, _ = pair(name)
    for text in (*SENTENCES, "日本語 \x00 é👩🏽‍🚀"):
        ids = tokenizer.encode(text)
        spelled = b"".join(tokenizer.token_bytes(ids)).decode(errors="replace")
        assert spelled.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")
        assert len(spelled) - len(tokenizer.decode(ids)) in (0, 1)  # the decoder drops the space before the first word
    assert len(tokenizer.vocabulary) == tokenizer.vocab_size


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_kept_as_they_came_and_load_without_the_models_settings(name, tmp_path):
    first = write(name, tmp_path)
    tokenizer = Tokenizer.load(first)
    others = [
        number for token, number in tokenizer.special_ids.items() if token not in ("<unk>", tokenizer.document_end)
    ]
    ends = others[:1] or [tokenizer.document_end_id]
    (first / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    loaded = Tokenizer.load(first)
    assert loaded.document_end_id == ends[0]
    loaded.save(tmp_path / "second")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (first / file).read_bytes()
    again = Tokenizer.load(tmp_path / "second")
    assert (again.digest, again.document_end_id) == (loaded.digest, ends[0])
    assert (again.digest == tokenizer.digest) == (not others)  # its documents end in another token
    assert again.text_digest == tokenizer.text_digest


def test_each_family_has_another_digest():
    assert len({pair(name)[0].digest for name in FAMILIES}) == len(FAMILIES)
    assert pair("phi3")[0].text_digest == pair("llama2")[0].text_digest  # which has other special tokens alone


def test_the_end_of_a_document_is_no_end_of_a_turn_if_the_model_names_both(tmp_path):
    """As Qwen's instruct models name <|im_end|> first."""
    write("qwen", tmp_path)
    ids = Tokenizer.load(tmp_path).special_ids
    chatml = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(
        chatml + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    both = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": both}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": both[0]}))
    assert Tokenizer.load(tmp_path).document_end == "<|endoftext|>"


def test_flags_and_tokens_of_the_settings_count_as_in_transformers(tmp_path):
    write("gpt_neox", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    runs = [token for token in content["added_tokens"] if not token["special"]]
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    changed = {**{key: value for key, value in runs[0].items() if key != "id"}, "rstrip": True}
    stated["added_tokens_decoder"] = {str(runs[0]["id"]): changed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    tokenizer, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a" + runs[0]["content"] + "   b", "x\n"]:
        assert tokenizer.encode_marked(text) == peer(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == peer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_a_token_that_the_settings_name_is_special_unless_text_consists_of_it(tmp_path):
    write("bloom", tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    stated |= {"mask_token": "lonely", "pad_token": "!"}  # both in the vocabulary, not among the added tokens
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    tokenizer, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_ids["lonely"] == peer.mask_token_id == 900
    assert tokenizer.encode_marked("a lonely") == peer("a lonely", add_special_tokens=False).input_ids
    assert tokenizer.encode("a lonely!") == pair("bloom")[0].encode("a lonely!")


def test_special_tokens_that_nothing_writes_may_lie_beyond_the_models_vocabulary(tmp_path):
    """As Gemma 3's <image_soft_token>."""
    tokenizer = pair("gemma")[0].extended(["<image>"])
    assert (tokenizer.vocab_size, tokenizer.num_needed_ids) == (675, 674)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<image>")
    tokenizer.save(tmp_path / "without")
    for file in (tmp_path / "without").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<image>")
    assert Tokenizer.load(tmp_path).num_needed_ids == 675


@pytest.mark.parametrize(
    ("decoder", "names", "spelled"),
    [
        ({"type": "ByteLevel"}, ["Ġthe", "Ã©", "Ċ", "人"], [b" the", "é".encode(), b"\n", "人".encode()]),
        ({"type": "Metaspace", "replacement": "▁"}, ["▁the", "é"], [b" the", "é".encode()]),
        ({"type": "WordPiece", "prefix": "##"}, ["the", "##ory"], [b" the", b"ory"]),
        ({"type": "BPEDecoder", "suffix": "</w>"}, ["the</w>", "ory"], [b"the ", b"ory"]),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            ["▁▁a", "<0xE4>", "<0xZZ>"],
            [b"  a", b"\xe4", b"<0xZZ>"],
        ),
        (None, ["the"], [b"the"]),
    ],
)
def test_names_of_tokens_spell_bytes_as_the_decoder_says(decoder, names, spelled):
    assert [token_decoder(decoder)(name) for name in names] == spelled


@pytest.mark.parametrize("name", [*FAMILIES, "own"])
def test_ids_beyond_the_vocabulary_have_no_text(name, tokenizer):
    """A model's embedding is often padded, and a weak model generates the ids of the padding."""
    tokenizer = tokenizer if name == "own" else pair(name)[0]
    ids = tokenizer.encode("a thing")
    beyond = len(tokenizer.vocabulary)
    assert tokenizer.decode([beyond, *ids, beyond + 1000]) == tokenizer.decode(ids)
    assert tokenizer.token_bytes([beyond, ids[0]]) == [b"", tokenizer.vocabulary[ids[0]]]


# --- places of tokens in a text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_know_their_characters(name):
    tokenizer, _ = pair(name)
    token = tokenizer.document_end
    text = f"the thing{token} naïve 人{token}\n  x 👩🏽‍🚀{token}"
    encoded = tokenizer.encode_with_offsets(text)
    special = [i for i, number in enumerate(encoded.ids) if number == tokenizer.document_end_id]
    starts = [place for place in range(len(text)) if text.startswith(token, place)]
    assert encoded.starts[special].tolist() == starts
    assert (encoded.ends - encoded.starts)[special].tolist() == [len(token)] * 3
    assert (encoded.starts[1:] >= encoded.starts[:-1]).all()
    assert encoded.ends[-1] == len(text)


# --- damaged files ------------------------------------------------------------------------------------------------


def damage(directory, change):
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["added_tokens"][0].update(id=500), "got id 500 for .*expected 400"),
        (lambda content: content.pop("model"), "'model'"),
        (lambda content: content["model"].pop("vocab"), "'vocab'"),
        (lambda content: content["model"].update(type="Magic"), "tokenizers cannot read it"),
        (lambda content: content["model"]["merges"].append(["no", "such"]), "tokenizers cannot read it"),
        (lambda content: content.update(pre_tokenizer={"type": "Magic"}), "tokenizers cannot read it"),
        (lambda content: content["added_tokens"][0].update(content="<|other|>"), "eos_token: got none"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    write("gpt2", tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ArtifactError, match=rf"tokenizer\.json: got no usable tokenizer \(.*{message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_file_that_is_no_json_or_a_pickle_is_named(tmp_path, file):
    for data, message in ((b"{", "cannot be read as JSON"), (pickle.dumps({}), "pickle"), (b"[]", "got a JSON list")):
        write("gpt2", tmp_path)
        (tmp_path / file).write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"{file}: .*{message}"):
            Tokenizer.load(tmp_path)


def test_a_text_that_is_too_much_for_the_library_is_refused_by_name(tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 names it."""

    tokenizer: Any = Tokenizer.load(write("gpt2", tmp_path))
    library = tokenizer._encoder._library

    class Failing:
        def encode_batch_fast(self, texts, **_):
            if any("bad" in text for text in texts):
                raise PanicException("retry-limit-in-match over")
            return library.encode_batch_fast(texts, add_special_tokens=False)

    monkeypatch.setattr(tokenizer._encoder, "_library", Failing())
    assert len(tokenizer.encode_batch(["a", "b"])) == 2
    with pytest.raises(DataError, match=r"a text of 5 characters that begins with 'a bad': tokenizers fails on it"):
        tokenizer.encode_batch(["a", "a bad"])


# --- more special tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_can_be_added_behind_any_vocabulary(name, tmp_path):
    tokenizer, _ = pair(name)
    names = [token for token in NAMED_TOKENS if token not in tokenizer.special_ids]
    extended = tokenizer.extended(names)
    assert extended.has_turns
    assert extended.text_digest == tokenizer.text_digest
    assert extended.document_end == tokenizer.document_end
    extended.save(tmp_path)
    loaded, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, ImportedTokenizer)
    assert loaded.digest == extended.digest
    assert [loaded.special_ids[token] - tokenizer.vocab_size for token in names] == [*range(len(names))]
    for text in (*SENTENCES, "a<|user|>b"):
        assert loaded.encode(text) == tokenizer.encode(text)
    marked = "<|user|>hi<|end_of_turn|>"
    assert loaded.encode_marked(marked) == peer(marked, add_special_tokens=False).input_ids
    assert loaded.encode_marked(marked)[0] == loaded.special_ids["<|user|>"]


@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_a_vocabulary_that_tiktoken_can_express_has_the_same_ids_there(text):
    tokenizer, _ = pair("gpt2")
    ranks = tokenizer.as_ranks()
    assert BytePairTokenizer(ranks.ranks, ranks.pattern).encode(text) == tokenizer.encode(text)


def test_one_that_tiktoken_cannot_express_is_not_taken_for_ranks():
    for name in FAMILIES:
        if name not in ("gpt2", "smollm2"):
            with pytest.raises((ValueError, LookupError)):
                pair(name)[0].as_ranks()


def test_an_added_token_may_match_whole_words_alone(tmp_path):
    write("gpt2", tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([AddedToken("thing", single_word=True, lstrip=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a   thing and things", "thing thinga", "<|endoftext|>thing"):
        assert tokenizer.encode_marked(text) == peer(text).input_ids
