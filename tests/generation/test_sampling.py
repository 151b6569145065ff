from itertools import product
from typing import Any, cast

import numpy as np
import pytest
import torch

from lilpipe.generation.requests import SamplingParams
from lilpipe.generation.sampling import choose, draw, penalize, uniforms

LAW = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def logits(*probabilities):
    return torch.tensor([probabilities]).log()


def test_a_stream_is_uniform_and_never_reaches_one():
    draws = uniforms(0, 1, 2, 20_000).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 50  # chi-squared, 19 degrees of freedom: p < 1e-4
    assert abs(float(np.corrcoef(draws[1:], draws[:-1])[0, 1])) < 0.03


def test_streams_differ_and_are_fixed_for_ever():
    assert uniforms(0, 0, 0, 3).tolist() == [0.5248813629150391, 0.4532310366630554, 0.523676335811615]
    streams = torch.stack([uniforms(*key, num_tokens=8) for key in product(range(3), repeat=3)])
    assert len(torch.unique(streams)) == 27 * 8


def test_a_longer_stream_begins_with_the_shorter_one():
    assert torch.equal(uniforms(1, 2, 3, 10)[:4], uniforms(1, 2, 3, 4))


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-40, 1e-30])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_temperature_zero_and_what_is_next_to_it_take_the_likeliest(temperature, top_p):
    row, draws = logits(0.2, 0.5, 0.3), torch.tensor([0.99])
    assert choose(row, draws, temperature=temperature, top_p=top_p).tolist() == [1]


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 4), (1 - 2**-24, 4)])
def test_a_token_is_the_inverse_of_the_cumulative_distribution(draw, token):
    """Tokens of probability 0 are never chosen, at either end."""
    rows = logits(0.0, 0.25, 0.5, 0.0, 0.25, 0.0)
    assert choose(rows, torch.tensor([draw]), temperature=1).tolist() == [token]


@pytest.mark.parametrize("vocab_size", [7, 1024, 50_000])
def test_the_largest_uniform_stays_in_the_vocabulary(vocab_size):
    rows = torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.full((8,), 1 - 2**-24)
    for top_p in (1.0, 0.999999, 0.5):
        chosen = choose(rows, draws, temperature=1, top_p=top_p)
        assert (chosen >= 0).all()
        assert (chosen < vocab_size).all()


def naive_nucleus(row, temperature, top_p):
    """The distribution after nucleus sampling, token by token in float64."""
    probabilities = (row.double() / temperature).softmax(-1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_frequencies_are_those_of_the_naive_nucleus(temperature, top_p):
    row = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 2
    num_draws = 20_000
    draws = (torch.arange(num_draws) + 0.5) / num_draws  # every quantile once: no statistics are needed
    chosen = choose(row.expand(num_draws, -1), draws, temperature=temperature, top_p=top_p)
    frequencies = torch.bincount(chosen, minlength=12).double() / num_draws
    torch.testing.assert_close(frequencies, naive_nucleus(row, temperature, top_p), atol=1e-4, rtol=0)


def test_a_row_does_not_depend_on_the_others():
    rows = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    draws = torch.rand(6, generator=torch.Generator().manual_seed(2))
    together = choose(rows, draws, temperature=0.8, top_p=0.7)
    alone = [choose(rows[i : i + 1], draws[i : i + 1], temperature=0.8, top_p=0.7) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"min_p": 0.1},
        {"top_k": 7, "top_p": 0.8},
        {"top_p": 0.9, "min_p": 0.2},
        {"top_k": 300, "min_p": 0.001},
        {"top_k": 8, "top_p": 0.95, "min_p": 0.05},
        {"top_k": 2000},
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers_filters(temperature, filters):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in filters:
            warpers.append(warper(filters[name]))
    row = torch.randn(1, 400, generator=torch.Generator().manual_seed(4)) * 2
    expected = row
    for warper in warpers:
        expected = warper(None, expected)
    num_draws = 8_000
    draws = (torch.arange(num_draws) + 0.5) / num_draws
    chosen = choose(row.expand(num_draws, -1), draws, temperature=temperature, **filters)
    frequencies = torch.bincount(chosen, minlength=400) / num_draws
    torch.testing.assert_close(frequencies, expected.softmax(-1)[0], atol=4e-4, rtol=0)


@pytest.mark.parametrize("vocab_size", [40, 64, 65, 1000, 5000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_draw_is_the_inverse_of_the_whole_cumulative_distribution(vocab_size, temperature):
    rows = torch.randn(300, vocab_size, generator=torch.Generator().manual_seed(5)).double() * 3
    draws = torch.rand(300, generator=torch.Generator().manual_seed(6)).double()
    expected = torch.searchsorted((rows / temperature).softmax(-1).cumsum(-1), draws[:, None])[:, 0]
    tokens, logprobs = draw(rows, draws, LAW._replace(temperature=temperature))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_a_flat_distribution_needs_more_than_the_likeliest_candidates():
    """The nucleus of a flat distribution is wide, and rows beside it are narrow: each meets its own width."""
    rows = torch.stack([torch.zeros(5000), torch.linspace(0, 1, 5000), torch.linspace(0, 50, 5000)])
    rows = rows + 1e-4 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    num_draws = 500
    draws = ((torch.arange(num_draws) + 0.5) / num_draws).repeat(3)
    chosen = choose(rows.repeat_interleave(num_draws, 0), draws, temperature=1.0, top_p=0.9).view(3, num_draws)
    for row, tokens in zip(rows, chosen, strict=True):
        kept = naive_nucleus(row, 1.0, 0.9) > 0
        assert kept[tokens].all()
        assert len(torch.unique(tokens)) >= min(num_draws // 2, int(kept.sum()) // 2)


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    tokens = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, tokens, True)
    torch.testing.assert_close(
        penalize(rows, seen, 1.3), cast(Any, RepetitionPenaltyLogitsProcessor(1.3))(tokens, rows)
    )


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"temperature": 0.3}, {"top_k": 3}, {"min_p": 0.3}, {"repetition_penalty": 4.0}],
    ids=str,
)
def test_logprobs_are_those_before_temperature_filters_and_penalty(changes):
    rows = torch.randn(20, 90, generator=torch.Generator().manual_seed(3)) * 3
    seen = torch.ones(20, 90, dtype=torch.bool)
    tokens, logprobs = draw(rows, torch.rand(20), LAW._replace(**changes), seen)
    torch.testing.assert_close(logprobs, rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_a_row_of_nan_gives_a_token_of_the_vocabulary_and_a_logprob_of_nan():
    rows = torch.zeros(2, 70)
    rows[1, 3] = float("nan")
    tokens, logprobs = draw(rows, torch.tensor([0.5, 0.5]), LAW)
    assert (tokens < 70).all()
    assert logprobs.isnan().tolist() == [False, True]
