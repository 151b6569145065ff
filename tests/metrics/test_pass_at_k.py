from itertools import combinations
from statistics import fmean, stdev

import pytest

from lilpipe.metrics.pass_at_k import mean_estimate, pass_at_k, ratio_estimate


@pytest.mark.parametrize("num_generations", [1, 2, 5, 8])
def test_it_is_the_share_of_subsets_that_hold_a_correct_answer(num_generations):
    for num_correct in range(num_generations + 1):
        samples = [index < num_correct for index in range(num_generations)]
        for k in range(1, num_generations + 1):
            subsets = list(combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_generations, num_correct, k) == pytest.approx(expected)


def test_pass_at_1_is_the_share_of_correct_answers():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


@pytest.mark.parametrize("arguments", [(8, 9, 1), (8, -1, 1), (8, 3, 9), (8, 3, 0)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="pass_at_k: got num_generations 8"):
        pass_at_k(*arguments)


def test_a_mean_comes_with_its_standard_error():
    values = [0.0, 0.5, 1.0, 1.0]
    estimate = mean_estimate(values)
    assert estimate.value == pytest.approx(fmean(values))
    assert estimate.stderr == pytest.approx(stdev(values) / 2)
    assert estimate.n == 4
    assert mean_estimate([0.3]).stderr == 0


def test_a_share_has_the_binomial_error():
    estimate = ratio_estimate(30, 100)
    assert (estimate.value, estimate.n) == (0.3, 100)
    assert estimate.stderr == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
