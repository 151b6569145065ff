"""A fact in a long text: models that are known to find it, or not to, and texts read as text."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import NeedleConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokens.shards import TokenShards
from lilpipe.training.needle import Needle, Texts, by_depth, make_texts, metrics, needle, read_filler
from tests.training.conftest import write_tokens

SEQ_LEN = 160
CONFIG = NeedleConfig(depths=(0.0, 0.5, 1.0), num_samples=12)
HAY = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 9


@pytest.fixture(scope="module")
def words():
    """A tokenizer with merges, in which numbers differ in their number of tokens."""
    return train_tokenizer([HAY, "10 11 12 19 1999 2000 2024 42 7777"] * 4, vocab_size=330, pattern="gpt2")


@pytest.fixture(scope="module")
def hay(words):
    return np.array(words.encode(HAY))


class Copying(nn.Module):
    """An induction head: where the last tokens stood before, what followed them then is likely."""

    def __init__(self, window=10**9, num_matched=6):
        super().__init__()
        self.window, self.num_matched = window, num_matched
        self.calls = 0

    def logprob(self, seen, target):
        seen = seen[-self.window :]
        end = seen[-self.num_matched :]
        found = [i for i in range(len(seen) - len(end)) if seen[i : i + len(end)] == end]
        return -0.1 if found and seen[found[-1] + len(end)] == target else -5.0

    def forward(self, tokens_BT, targets_BT):
        self.calls += 1
        logprobs = torch.zeros(targets_BT.shape)
        for b, t in (targets_BT >= 0).nonzero().tolist():
            logprobs[b, t] = self.logprob(tokens_BT[b, : t + 1].tolist(), int(targets_BT[b, t]))
        return Scores(logprobs, torch.zeros_like(logprobs))


class Guessing(nn.Module):
    """Log-probabilities that have nothing to do with the text."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, tokens_BT, targets_BT):
        logprobs = torch.randn(targets_BT.shape, generator=self.generator)
        return Scores(logprobs.where(targets_BT >= 0, 0.0), torch.zeros_like(logprobs))


def measure(model, tokenizer, hay, *, config=CONFIG, seed=1, **options):
    return needle(model, make_texts(tokenizer, hay, seq_len=SEQ_LEN, config=config, seed=seed), **options)


# --- models -------------------------------------------------------------------------------------------------------


def test_a_model_that_copies_finds_every_fact(words, hay):
    found = measure(Copying(), words, hay)
    assert [(each.depth, each.accuracy) for each in found] == [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]
    assert all(each.margin > 4.9 for each in found)
    assert metrics(found, seq_len=SEQ_LEN)["needle_160_accuracy"] == 1.0


def test_a_model_that_sees_the_last_tokens_alone_finds_the_facts_that_stand_there(words, hay):
    found = measure(Copying(window=70), words, hay)
    assert [each.accuracy for each in found] == pytest.approx([0.25, 0.25, 1.0], abs=1e-9)
    assert [each.margin for each in found][:2] == [0.0, 0.0]
    assert metrics(found, seq_len=SEQ_LEN)["needle_160_accuracy_at_100"] == 1.0


def test_a_model_that_guesses_is_right_about_a_quarter_of_the_time(words, hay):
    found = measure(Guessing(), words, hay, config=NeedleConfig(depths=(0.3,), num_samples=400))
    assert found[0].accuracy == pytest.approx(0.25, abs=0.07)  # three standard errors
    assert found[0].margin == pytest.approx(0.0, abs=0.4)


def test_workers_divide_the_texts_and_run_the_model_equally_often(words, hay, monkeypatch):
    """Eight texts over three workers, so that one is scored twice; their parts are added up here."""
    config = NeedleConfig(depths=(0.0, 1.0), num_samples=4)
    alone = measure(Copying(window=70), words, hay, config=config)
    monkeypatch.setattr("lilpipe.training.needle.TOKENS_AT_ONCE", 1)
    parts, models = [], [Copying(window=70) for _ in range(3)]
    for rank, model in enumerate(models):
        monkeypatch.setattr("lilpipe.distributed.sum_floats", lambda values: parts.append(values) or values)
        measure(model, words, hay, config=config, rank=rank, world_size=3)
    monkeypatch.setattr(
        "lilpipe.distributed.sum_floats", lambda _: [sum(column) for column in zip(*parts, strict=True)]
    )
    together = measure(Guessing(), words, hay, config=config)
    assert [model.calls for model in models] == [3, 3, 3]
    assert [each.accuracy for each in alone] == [0.25, 1.0]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_accuracy_and_margin_are_the_means_of_their_depth():
    depths = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    texts = Texts(torch.zeros(4, 1), torch.zeros(4, 3, 1), depths)
    scores = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -3.0, -3.0], [-1.0, -0.5, -2.5], [-3.0, -4.0, -5.0]])
    first, last = by_depth(texts, scores)
    assert first == pytest.approx(Needle(0.0, 0.5, (2.0 + 0.5) / 2))
    assert last == pytest.approx(Needle(1.0, (1 / 3 + 1) / 2, (0 + 1.5) / 2))


def test_a_fresh_decoder_finds_as_good_as_nothing_and_the_same_each_time(words, hay):
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=SEQ_LEN)
    model = Transformer(config, words.vocab_size)
    model.init_weights(0)
    model.eval()

    def score(inputs_BT, targets_BT):
        return model(inputs_BT, targets_BT=targets_BT)

    found = measure(score, words, hay)
    assert found == measure(score, words, hay)
    assert all(abs(each.margin) < 1 for each in found)
    assert all(each.accuracy < 0.8 for each in found)


# --- texts --------------------------------------------------------------------------------------------------------


def test_texts_hold_their_fact_at_its_depth_once_and_end_in_its_question(words, hay):
    texts = make_texts(words, hay, seq_len=SEQ_LEN, config=CONFIG, seed=1)
    num_last = texts.answers.shape[-1]
    assert texts.contexts.shape == (36, SEQ_LEN + 1 - num_last)
    for context, answers, depth in zip(*(part.tolist() for part in texts), strict=True):
        text, ends = words.decode(context), [words.decode(answer) for answer in answers]
        assert all(re.fullmatch(r" [1-9]\d\d\d", end) for end in ends)
        assert len(set(ends)) == 4
        (fact,) = re.finditer(rf"\nThe secret number of (\w+) is{ends[0]}\.\n", text)
        assert text.endswith(f"\nThe secret number of {fact[1]} is")
        after = len(text) - fact.end() - len(f"\nThe secret number of {fact[1]} is")
        assert fact.start() / (fact.start() + after) == pytest.approx(depth, abs=0.05)


def test_texts_of_a_fact_differ_in_its_place_alone_and_depend_on_the_seed_alone(words, hay):
    texts = make_texts(words, hay, seq_len=SEQ_LEN, config=CONFIG, seed=1)
    sorted_contexts = texts.contexts.view(12, 3, -1).sort(dim=-1).values
    assert torch.equal(sorted_contexts, sorted_contexts[:, :1].expand_as(sorted_contexts))
    again = make_texts(words, hay, seq_len=SEQ_LEN, config=CONFIG, seed=1)
    other = make_texts(words, hay, seq_len=SEQ_LEN, config=CONFIG, seed=2)
    assert torch.equal(texts.contexts, again.contexts)
    assert torch.equal(texts.answers, again.answers)
    assert not torch.equal(texts.answers, other.answers)


def test_filler_is_held_out_text_of_the_largest_stream_without_the_ends_of_documents(words, tmp_path):
    texts = {
        "long": {"train": ["sea"] * 9, "validation": ["never mind "] * 9},
        "short": {"train": ["sea"] * 9, "validation": ["Ishmael"]},
    }
    shards = TokenShards.open(write_tokens(tmp_path, words, texts).path)
    filler = read_filler(shards, num_tokens=10_000)
    assert words.decode(filler.tolist()) == "never mind " * 9
    assert len(read_filler(shards, num_tokens=5)) <= 5


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_length_without_room_for_a_fact_is_an_error_with_the_least_that_has(words, hay):
    with pytest.raises(ConfigError, match=r"needle: got seq_len 20, expected at least (\d+)") as raised:
        make_texts(words, hay, seq_len=20, config=CONFIG, seed=1)
    assert 20 < int(re.findall(r"at least (\d+)", str(raised.value))[0]) < SEQ_LEN


def test_no_held_out_text_is_an_error(words):
    with pytest.raises(DataError, match="got no validation text"):
        make_texts(words, np.array([], dtype=np.int64), seq_len=SEQ_LEN, config=CONFIG, seed=1)
