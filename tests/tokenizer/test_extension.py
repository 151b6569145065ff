import random
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.messages import Message
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import STAGE, external, train_tokenizer
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import BytePairTokenizer, ImportedTokenizer, Tokenizer
from lilpipe.tokenizer.extension import count_pieces, extend, learn_merges, unreachable_tokens
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.vocabulary import Vocabulary
from tests import artifacts
from tests.tokenizer.conftest import PROSE, TEXT
from tests.tokenizer.foreign import write

BYTES = {bytes([byte]): byte for byte in range(256)}
OTHER = [
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "人工知能は面白い。人工知能と人工言語。",
    "1999 1999 2024",
]


@pytest.fixture(scope="module")
def base():
    return train_tokenizer(PROSE * 3, vocab_size=330, pattern="gpt4")


@pytest.fixture(scope="module")
def extended(base):
    return BytePairTokenizer(extend(OTHER * 3, base.ranks, 60, pattern="gpt4"), "gpt4")


def test_extending_the_bytes_is_training_from_nothing():
    assert (
        extend(PROSE * 3, BYTES, 150, pattern="gpt4")
        == train_tokenizer(PROSE * 3, vocab_size=414, pattern="gpt4").ranks
    )


@given(st.lists(st.text("abc", max_size=12), max_size=8))
@settings(max_examples=200, deadline=None)
def test_merges_are_those_of_the_textbook_algorithm(texts):
    words = [([ord(letter) for letter in text], index + 1) for index, text in enumerate(texts)]
    assert learn_merges([(list(ids), count) for ids, count in words], 20, first_id=256) == naive_merges(words, 20)


def naive_merges(words, num_merges):
    merges = []
    while len(merges) < num_merges:
        pairs = {}
        for ids, count in words:
            for pair in pairwise(ids):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            apply_merge(ids, best, 256 + len(merges))
        merges.append(best)
    return merges


def apply_merge(ids, pair, new):
    for index in range(len(ids) - 1):
        if tuple(ids[index : index + 2]) == pair:
            ids[index : index + 2] = [new]


def test_the_tokens_of_the_base_keep_their_ids(base, extended):
    assert list(extended.ranks)[: len(base.ranks)] == list(base.ranks)
    assert extended.vocab_size == base.vocab_size + 60
    assert len(extended.encode(OTHER[0])) < 0.7 * len(base.encode(OTHER[0]))


@given(text=st.one_of(TEXT, st.lists(st.sampled_from([*OTHER[0].split(), *OTHER[1], " ", "19"])).map("".join)))
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_base_with_the_merges_learnt_applied(base, extended, text):
    expected = []
    for piece in regex.findall(PATTERNS["gpt4"], text):
        ids = base.encode(piece)
        for token, rank in list(extended.ranks.items())[len(base.ranks) :]:
            for index in range(len(ids) - 1):
                if base_bytes(extended, ids[index : index + 2]) == token:
                    ids[index : index + 2] = [rank]
        expected += ids
    assert extended.encode(text) == expected


def base_bytes(tokenizer, ids):
    tokens = list(tokenizer.ranks)
    return b"".join(tokens[i] for i in ids)


def test_neither_order_nor_grouping_of_texts_matters(base):
    shuffled = random.Random(0).sample(OTHER, len(OTHER))
    assert extend(OTHER, base.ranks, 40, pattern="gpt4") == extend(iter(shuffled), base.ranks, 40, pattern="gpt4")


def test_a_pattern_with_groups_counts_whole_pieces():
    assert count_pieces(["ab ab"], r"(a)(b)| ") == {"ab": 2, " ": 1}


def test_tokens_that_the_pattern_cuts_are_unreachable():
    ranks = BYTES | {b"12": 256, b"ab": 257, "é".encode()[:1] + b"\xff": 258}
    assert unreachable_tokens(ranks, "single_digits") == [b"12"]
    assert unreachable_tokens(ranks, "gpt4") == []


# --- the stage ----------------------------------------------------------------------------------------------------


def run_stage(tmp_path, texts=OTHER, **values) -> tuple[Any, Any, Workspace]:
    inputs = {"corpus": artifacts.corpus(tmp_path / "corpus", list(texts) * 4)}
    workspace = Workspace(tmp_path / "work")
    return STAGE.run(TokenizerConfig(**values), inputs, workspace), Tokenizer.load(workspace.output), workspace


@pytest.mark.parametrize("form", ["folder", "tokenizer.json", "x.tiktoken"])
def test_the_stage_extends_a_vocabulary_of_any_form(tmp_path, base, form):
    base.save(tmp_path)
    base.save_tiktoken(tmp_path / "x.tiktoken")
    path = tmp_path if form == "folder" else tmp_path / form
    _, tokenizer, workspace = run_stage(tmp_path, base=str(path), pattern="gpt4", vocab_size=base.vocab_size + 60)
    assert tokenizer.ranks == extend(OTHER * 4, base.ranks, 60, pattern="gpt4")
    assert f"60 tokens above a base of {len(base.ranks)}" in (workspace.report / "report.html").read_text()


def test_a_base_that_fills_the_vocabulary_is_taken_as_it_is(tmp_path, base):
    base.save(tmp_path)
    _, tokenizer, _ = run_stage(tmp_path, base=str(tmp_path), pattern="gpt4", vocab_size=base.vocab_size)
    assert tokenizer.digest == base.digest


def test_a_base_larger_than_the_vocabulary_is_refused(tmp_path, base):
    base.save(tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size: got 300, expected at least 330: the 322 tokens of .* and 8"):
        run_stage(tmp_path, base=str(tmp_path), pattern="gpt4", vocab_size=300)


def test_too_little_text_says_how_large_an_extension_it_allows(tmp_path, base):
    base.save(tmp_path)
    with pytest.raises(DataError, match=r"beside 322 tokens of the base and 8 special tokens.* at most (\d+)") as error:
        run_stage(tmp_path, base=str(tmp_path), pattern="gpt4", vocab_size=5_000)
    largest = int(str(error.value).rsplit(" ", 1)[1])
    _, tokenizer, _ = run_stage(tmp_path, base=str(tmp_path), pattern="gpt4", vocab_size=largest)
    assert tokenizer.vocab_size == largest


def test_another_pattern_than_the_bases_is_refused_with_the_right_one(tmp_path):
    digits = train_tokenizer(["2024 1999 2000 314 159 265 358 979 "] * 9, vocab_size=279, pattern="gpt4")
    digits.save(tmp_path)
    with pytest.raises(ConfigError, match=r"got 'single_digits', under which \d+ of the 271 tokens .* set it") as error:
        run_stage(tmp_path, base=str(tmp_path), vocab_size=400)
    assert repr(PATTERNS["gpt4"]) in str(error.value)


def test_a_base_with_gaps_between_ids_is_refused(tmp_path):
    BytePairTokenizer(BYTES, ".").save_tiktoken(tmp_path / "x.tiktoken")
    with (tmp_path / "x.tiktoken").open("a") as file:
        file.write("YWI= 300\n")
    with pytest.raises(ConfigError, match=r"with 257 tokens and ids up to 300, expected ids without gaps"):
        run_stage(tmp_path, base=str(tmp_path / "x.tiktoken"), vocab_size=400)


def test_a_pattern_that_does_not_compile_is_named(tmp_path, base):
    with pytest.raises(ConfigError, match=r"tokenizer\.pattern: got '\(', expected a regular expression"):
        count_pieces([], "(")


def test_what_is_read_from_outside_is_part_of_the_fingerprint(tmp_path, base):
    base.save(tmp_path)
    config = TokenizerConfig(base=str(tmp_path), compare={"old": {"path": str(tmp_path)}})  # pyright: ignore
    before = external(config)
    assert set(before) == {"base", "compare old"}
    BytePairTokenizer(base.ranks, "gpt2").save(tmp_path)
    assert external(config) != before


def test_a_base_that_is_not_there_is_named_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match="got no vocabulary there"):
        external(TokenizerConfig(base=str(tmp_path / "none")))


def test_a_vocabulary_whose_tokens_no_merge_makes_can_be_extended():
    improper = Vocabulary(BYTES | {b"abcd": 256, b"ab": 257}, PATTERNS["gpt4"])
    ranks = extend(["abcd abcdx abcdx abx abx"], improper.ranks, 3, pattern="gpt4")
    assert list(ranks)[:258] == list(improper.ranks)
    assert BytePairTokenizer(ranks, "gpt4").encode("abcd") == [256]
    assert len(set(ranks)) == 261


# --- imported bases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "gemma", "bloom"])
def test_an_imported_base_that_tiktoken_cannot_express_gets_our_special_tokens(tmp_path, family):
    imported = Tokenizer.load(write(family, tmp_path))
    size = imported.vocab_size + 7
    metrics, tokenizer, workspace = run_stage(tmp_path, base=str(tmp_path), vocab_size=size)
    assert isinstance(tokenizer, ImportedTokenizer)
    assert tokenizer.has_turns
    assert metrics["vocab_size"] == tokenizer.vocab_size == size
    assert tokenizer.text_digest == imported.text_digest
    assert (tokenizer.document_end, tokenizer.document_start_ids) == (
        imported.document_end,
        imported.document_start_ids,
    )
    talk: list[Message] = [{"role": "user", "content": "hi <|user|>"}, {"role": "assistant", "content": "there"}]
    ids, mask = render(tokenizer, talk)
    hi, there = tokenizer.encode("hi <|user|>"), tokenizer.encode("there")
    assert ids == [tokenizer.user_id, *hi, tokenizer.turn_end_id, tokenizer.assistant_id, *there, tokenizer.turn_end_id]
    assert sum(mask) == len(there) + 1
    assert "bytes per token" in (workspace.report / "report.html").read_text()
    with pytest.raises(ConfigError, match=rf"vocab_size: got 5000, expected {size}: .* cannot be extended by merges"):
        run_stage(tmp_path / "merges", base=str(tmp_path), vocab_size=5000)


def test_an_imported_base_that_tiktoken_can_express_is_extended_by_merges_too(tmp_path):
    imported = Tokenizer.load(write("gpt2", tmp_path))
    _, tokenizer, _ = run_stage(tmp_path, base=str(tmp_path), pattern="gpt2", vocab_size=imported.vocab_size + 40)
    assert isinstance(tokenizer, BytePairTokenizer)
    assert list(tokenizer.ranks)[:400] == imported.vocabulary[:400]
    _, kept, _ = run_stage(tmp_path / "kept", base=str(tmp_path), vocab_size=imported.vocab_size + 7)
    assert isinstance(kept, ImportedTokenizer)


def test_a_damaged_imported_base_is_named(tmp_path):
    write("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.base: .*tokenizer_config\.json: cannot be read as JSON"):
        run_stage(tmp_path, base=str(tmp_path), vocab_size=408)
