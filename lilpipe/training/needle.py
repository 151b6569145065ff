"""Needle in a haystack: whether a model retrieves, at the end of a long text, a fact from somewhere in it.

After Kamradt 2023 ("Needle in a haystack: pressure testing LLMs"), adapted to models that cannot answer questions yet.
A sentence with a random number is inserted into validation text, and the text ends with the beginning of that sentence.
The true number must be more likely than other numbers. Nothing is sampled, and all answers to a question have the same
number of tokens, so that their log-probabilities are comparable.

Dimensions: N texts, A answers (the true one first), T tokens of a row (``seq_len``), K tokens of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.config.training import NeedleConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.scores import IGNORED, Scores
from lilpipe.seeds import derive_seed
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.shards import TokenShards

NUM_ANSWERS = 4
"""The true answer and three others: chance is 25 %."""
TOKENS_AT_ONCE = 2**15
"""Maximum tokens of a forward pass, but at least one text with its answers."""
CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Quito", "Riga", "Accra", "Perth", "Turin", "Bergen", "Kyoto")


class Needle(NamedTuple):
    """Results at one depth."""

    depth: float
    accuracy: float
    """Share of texts in which the true answer is the most likely; ties count as 1 / number of tied answers."""
    margin: float
    """Log-probability of the true answer minus the mean of the others, in nats, averaged over texts."""


class Texts(NamedTuple):
    """Texts with their answers; int64."""

    contexts: Tensor
    """[N, T + 1 - K], up to the answer."""
    answers: Tensor
    """[N, A, K]."""
    depths: Tensor
    """Position of each fact, float64 [N]: 0 at the start of the filler, 1 at its end."""


Score = Callable[[Tensor, Tensor], Scores]
"""Maps inputs and targets [B, T] to the model's scores of the targets."""


def needle(score: Score, texts: Texts, *, rank: int = 0, world_size: int = 1) -> list[Needle]:
    """Measure at each depth how well a model retrieves facts.

    The texts are divided among ``world_size`` data ranks; this worker belongs to ``rank``. All workers must call this;
    they run equally many forward passes and get the same result.
    """
    num_texts, num_answers, _ = texts.answers.shape
    num_each = -(-num_texts // world_size)
    mine = torch.tensor([(rank + world_size * index) % num_texts for index in range(num_each)])
    sums_NA = torch.zeros(num_texts, num_answers, dtype=torch.float64).index_add_(
        0, mine, log_probs(score, texts, mine)
    )
    both = distributed.sum_floats([*sums_NA.flatten().tolist(), *mine.bincount(minlength=num_texts).tolist()])
    sums, counts = torch.tensor(both, dtype=torch.float64).split([num_texts * num_answers, num_texts])
    return by_depth(texts, sums.view(num_texts, num_answers) / counts[:, None])


def metrics(needles: Sequence[Needle], *, seq_len: int) -> Mapping[str, float]:
    """Return ``needle_<seq_len>_accuracy``, ``_margin``, and the accuracy at each depth in percent of the text."""
    found = {
        f"needle_{seq_len}_accuracy": sum(each.accuracy for each in needles) / len(needles),
        f"needle_{seq_len}_margin": sum(each.margin for each in needles) / len(needles),
    }
    return found | {f"needle_{seq_len}_accuracy_at_{100 * each.depth:g}": each.accuracy for each in needles}


def read_filler(shards: TokenShards, *, num_tokens: int) -> np.ndarray:
    """Return the first validation tokens of the largest corpus stream, without the tokens around documents."""
    streams = [shards.stream(name, "validation") for name in shards.corpus_streams or shards.streams]
    largest = max(streams, key=lambda stream: stream.num_tokens)
    if largest.num_tokens == 0:
        raise DataError("needle: got no validation text; raise tokens.validation_ratio")
    tokens = largest.read(0, min(num_tokens, largest.num_tokens)).astype(np.int64)
    around = [shards.tokenizer.document_end_id, *shards.tokenizer.document_start_ids]
    return tokens[~np.isin(tokens, around)]


# --- texts --------------------------------------------------------------------------------------------------------


def make_texts(tokenizer: Tokenizer, filler: np.ndarray, *, seq_len: int, config: NeedleConfig, seed: int) -> Texts:
    """Return texts for ``config.num_samples`` facts, each at every depth in otherwise equal text.

    ``filler``, int64 [tokens], is validation text; if it is short it is repeated. Raises ``ConfigError`` if ``seq_len``
    is too short for a fact and its question, ``DataError`` without filler.
    """
    if len(filler) == 0:
        raise DataError("needle: got no validation text; raise tokens.validation_ratio")
    draw = np.random.default_rng(derive_seed(seed, "needle", seq_len))
    numbers = _numbers(tokenizer)
    contexts, answers = [], []
    for _ in range(config.num_samples):
        ends = [numbers[index] for index in draw.choice(len(numbers), NUM_ANSWERS, replace=False)]
        question = tokenizer.encode(f"\nThe secret number of {CITIES[draw.integers(len(CITIES))]} is")
        fact = [*question, *ends[0], *tokenizer.encode(".\n")]
        room = seq_len + 1 - len(fact) - len(question) - len(ends[0])
        if room < 0:
            raise ConfigError(
                f"needle: got seq_len {seq_len}, expected at least {seq_len - room} for a fact and its question; "
                "remove pretrain.needle"
            )
        hay = filler.take(draw.integers(len(filler)) + np.arange(room), mode="wrap").tolist()
        for before in (round(depth * room) for depth in config.depths):
            contexts.append([*hay[:before], *fact, *hay[before:], *question])
            answers.append(ends)
    depths = torch.tensor(config.depths, dtype=torch.float64).repeat(config.num_samples)
    return Texts(torch.tensor(contexts), torch.tensor(answers), depths)


def _numbers(tokenizer: Tokenizer) -> list[list[int]]:
    """Return tokens of four-digit numbers, only those of the most common token count."""
    encoded = [tokenizer.encode(f" {number}") for number in range(1000, 10_000, 7)]
    ((length, _),) = Counter(map(len, encoded)).most_common(1)
    return [tokens for tokens in encoded if len(tokens) == length]


# --- scores -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(score: Score, texts: Texts, indices_N: Tensor) -> Tensor:
    """Return the log-probability of each answer of some texts, given their indices; float64 [N, A]."""
    _, num_answers, num_last = texts.answers.shape
    seq_len = texts.contexts.shape[1] + num_last - 1
    at_once = max(1, TOKENS_AT_ONCE // (num_answers * seq_len))
    parts = []
    for chosen in indices_N.split(at_once):
        contexts = texts.contexts[chosen][:, None].expand(-1, num_answers, -1)
        rows = torch.cat([contexts, texts.answers[chosen]], dim=-1).flatten(0, 1)  # [n x A, T + 1]
        targets = rows[:, 1:].clone()
        targets[:, :-num_last] = IGNORED
        scores = score(rows[:, :-1], targets)
        parts.append(scores.logprobs.double().sum(-1).view(-1, num_answers).cpu())
    return torch.cat(parts)


def by_depth(texts: Texts, log_probs_NA: Tensor) -> list[Needle]:
    """Return accuracy and margin at each depth, in order of first occurrence."""
    best_NA = log_probs_NA == log_probs_NA.amax(dim=-1, keepdim=True)
    right_N = best_NA[:, 0].double() / best_NA.sum(-1)
    margin_N = log_probs_NA[:, 0] - log_probs_NA[:, 1:].mean(-1)
    return [
        Needle(depth, right_N[texts.depths == depth].mean().item(), margin_N[texts.depths == depth].mean().item())
        for depth in dict.fromkeys(texts.depths.tolist())
    ]
