from itertools import product

import numpy as np
import pytest
import torch

from lilpipe.generation.sampling import choose, uniforms


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


def test_temperature_zero_takes_the_likeliest():
    assert choose(logits(0.2, 0.5, 0.3), torch.tensor([0.99]), temperature=0).tolist() == [1]


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
