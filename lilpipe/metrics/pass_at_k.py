"""pass@k: the probability that at least one of k sampled completions is correct (Chen et al. 2021, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error."""

    value: float
    stderr: float
    n: int


def pass_at_k(num_generations: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from ``num_correct`` of ``num_generations`` completions of one prompt.

    This is the fraction of subsets of k samples that contain a correct one: 1 - C(n-c, k) / C(n, k).
    """
    if not 0 <= num_correct <= num_generations or not 1 <= k <= num_generations:
        raise ValueError(
            f"pass_at_k: got num_generations {num_generations}, num_correct {num_correct}, k {k}; expected "
            "0 <= num_correct <= num_generations and 1 <= k <= num_generations"
        )
    return 1 - math.comb(num_generations - num_correct, k) / math.comb(num_generations, k)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over prompts with the standard error of the mean; the standard error is 0 for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 0.0, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def ratio_estimate(successes: int, n: int) -> Estimate:
    """Return a proportion with its binomial standard error."""
    share = successes / n
    return Estimate(share, math.sqrt(share * (1 - share) / n), n)
