"""pass@k: the chance that at least one of k sampled answers is right (Chen et al. 2021, section 2.1)."""

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


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from ``num_correct`` of ``num_samples`` answers to one prompt.

    The share of the subsets of k samples that hold a correct one: 1 - C(n-c, k) / C(n, k).
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass_at_k: got num_samples {num_samples}, num_correct {num_correct}, k {k}; expected "
            "0 <= num_correct <= num_samples and 1 <= k <= num_samples"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean over prompts; the standard error is that of the mean of independent draws, 0 for a single one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 0.0, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def share_estimate(successes: int, n: int) -> Estimate:
    """A share with its binomial standard error."""
    share = successes / n
    return Estimate(share, math.sqrt(share * (1 - share) / n), n)
