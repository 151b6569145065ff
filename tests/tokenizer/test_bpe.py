import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import regex

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import DEFAULT_PATTERN, STAGE, train_tokenizer
from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer
from lilpipe.tokenizer.vocabulary import read_vocabulary, recover_merges
from tests import artifacts
from tests.tokenizer.conftest import PROSE


def naive_bpe(texts, num_merges):
    """The textbook algorithm; of equally frequent pairs the one of lowest ids goes first."""
    words = Counter(piece.encode() for text in texts for piece in regex.findall(DEFAULT_PATTERN, text))
    split = {word: list(word) for word in words}
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(num_merges):
        pairs = Counter()
        for word, ids in split.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in split.values():
            for index in range(len(ids) - 1):
                if tuple(ids[index : index + 2]) == best:
                    ids[index : index + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def test_merges_are_those_of_the_textbook_algorithm():
    assert list(train_tokenizer(PROSE, vocab_size=256 + 60 + 8).ranks) == naive_bpe(PROSE, 60)


def test_neither_order_nor_grouping_of_texts_matters():
    texts = PROSE * 3
    shuffled = random.Random(0).sample(texts, len(texts))
    assert train_tokenizer(texts, vocab_size=400).digest == train_tokenizer(iter(shuffled), vocab_size=400).digest


def test_every_merge_of_a_trained_vocabulary_can_be_recovered(tokenizer):
    assert [left + right for left, right in recover_merges(tokenizer.ranks)] == list(tokenizer.ranks)[256:]


def test_too_little_text_says_how_large_a_vocabulary_it_allows():
    with pytest.raises(DataError, match=r"vocab_size: got 1000.*has only (\d+); .* at most (\d+)") as error:
        train_tokenizer(["a few words, hardly more"], vocab_size=1000)
    largest = int(str(error.value).rsplit(" ", 1)[1])
    assert train_tokenizer(["a few words, hardly more"], vocab_size=largest).vocab_size == largest
    with pytest.raises(DataError):
        train_tokenizer(["a few words, hardly more"], vocab_size=largest + 1)


def test_no_text_at_all_is_too_little():
    with pytest.raises(DataError, match="the text has only 0"):
        train_tokenizer([], vocab_size=300)


def run_stage(tmp_path, *, exercises=None, **settings) -> tuple[Any, Any, Workspace]:
    inputs = {"corpus": artifacts.corpus(tmp_path / "corpus", PROSE * 4)}
    if exercises is not None:
        inputs["prompts"] = artifacts.prompts(tmp_path / "prompts", exercises)
    workspace = Workspace(tmp_path / "work")
    metrics = STAGE.run(TokenizerConfig(**settings), inputs, workspace)
    return metrics, Tokenizer.load(workspace.output), workspace


def test_the_stage_trains_on_the_corpus(tmp_path):
    metrics, tokenizer, workspace = run_stage(tmp_path, vocab_size=400)
    num_bytes = sum(len(text.encode()) for text in PROSE)
    num_tokens = sum(len(tokenizer.encode(text)) for text in PROSE)
    assert tokenizer.digest == train_tokenizer(PROSE * 4, vocab_size=400).digest
    assert metrics["training_bytes"] == 4 * num_bytes
    assert metrics["bytes_per_token"] == metrics["bytes_per_token_books"] == num_bytes / num_tokens
    assert metrics["vocab_size"] == 400
    page = (workspace.report / "report.html").read_text()
    assert "Longest tokens" in page
    assert "books" in page
    exported = read_vocabulary(workspace.output / "tokenizer.tiktoken")
    assert BytePairTokenizer(exported.ranks, DEFAULT_PATTERN).digest == tokenizer.digest


def test_exercises_teach_their_words_within_their_ratio(tmp_path):
    exercises = ["Xylophone zebra!"] * 100
    _, without, _ = run_stage(tmp_path / "a", vocab_size=400)
    metrics, tokenizer, _ = run_stage(tmp_path / "b", vocab_size=400, exercises=exercises, max_exercise_ratio=0.25)
    num_bytes = 4 * sum(len(text.encode()) for text in PROSE)
    assert b"Xylophone" not in without.ranks
    assert b"Xylophone" in tokenizer.ranks
    assert metrics["training_bytes"] == num_bytes + min(num_bytes // 3, 1600)
    assert {"bytes_per_token_books", "bytes_per_token_exercises"} <= metrics.keys()


def test_a_share_of_zero_leaves_exercises_out(tmp_path):
    metrics, tokenizer, _ = run_stage(tmp_path, vocab_size=400, exercises=["Xylophone"] * 99, max_exercise_ratio=0)
    assert tokenizer.digest == train_tokenizer(PROSE * 4, vocab_size=400).digest
    assert "bytes_per_token_exercises" not in metrics


def test_special_tokens_can_be_reserved(tmp_path):
    metrics, tokenizer, _ = run_stage(tmp_path, vocab_size=400, num_reserved=20)
    assert metrics["vocab_size"] == tokenizer.vocab_size == 400
    assert tokenizer.special_ids["<|reserved_19|>"] == 399


def test_max_bytes_is_kept_to(tmp_path):
    metrics, _, _ = run_stage(tmp_path, vocab_size=300, max_bytes=300)
    assert 297 <= metrics["training_bytes"] <= 300


def test_a_pattern_that_does_not_compile_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.pattern: got '\(', expected a regular expression"):
        run_stage(tmp_path, vocab_size=300, pattern="(")


def test_a_pattern_that_would_lose_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.pattern: .* matches [\d,]+ of [\d,]+ bytes"):
        run_stage(tmp_path, vocab_size=300, pattern=r"\p{L}+")
