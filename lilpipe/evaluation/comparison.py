"""What may be said of a difference: "better" outside of two standard errors, and nothing inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from lilpipe.metrics.pass_at_k import Estimate, mean_estimate

NOISE_ERRORS = 2.0
"""Standard errors within which a difference is noise: 1 in 20 differences of equals lies outside."""

Word = Literal["better", "worse", "no difference within the noise"]


def paired(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Mean difference on the same prompts, whose error is below that of two means that are not paired."""
    return mean_estimate([a - b for a, b in zip(after, before, strict=True)])


def over_seeds(differences: Sequence[Estimate]) -> Estimate:
    """Mean of the differences of several seeds; ``n`` counts seeds.

    Its error is the larger of that over seeds and that over prompts: few seeds may agree by chance. Between seeds the
    prompts' errors are taken to be independent.
    """
    seeds = mean_estimate([difference.value for difference in differences])
    prompts = math.sqrt(math.fsum(difference.stderr**2 for difference in differences)) / len(differences)
    return Estimate(seeds.value, max(seeds.stderr, prompts), seeds.n)


def beyond_noise(difference: Estimate) -> int:
    """1 for a difference above the noise, -1 for one below it, 0 within; a single value shows nothing."""
    if difference.n < 2 or abs(difference.value) <= NOISE_ERRORS * difference.stderr:
        return 0
    return 1 if difference.value > 0 else -1


def wording(difference: Estimate, *, higher_is_better: bool = True) -> Word:
    """What may be said of a difference."""
    sign = beyond_noise(difference) * (1 if higher_is_better else -1)
    if sign == 0:
        return "no difference within the noise"
    return "better" if sign > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """One model beside another, in a measure of which more is better."""

    measure: str
    difference: Estimate
    _: KW_ONLY
    model: str
    than: str
    unit: str = "prompts"
    """What the difference is a mean over."""

    @property
    def word(self) -> Word:
        """What may be said."""
        return wording(self.difference)

    @property
    def amount(self) -> str:
        """The difference with its standard error."""
        return f"{self.difference.value:+.3f} ± {self.difference.stderr:.3f} ({self.difference.n:,} {self.unit})"

    @property
    def sentence(self) -> str:
        """One line for people, such as ``accuracy: grpo is better than dpo, +0.120 ± 0.020 (500 prompts)``."""
        if self.word == "no difference within the noise":
            return f"{self.measure}: {self.word} between {self.model} and {self.than}, {self.amount}"
        return f"{self.measure}: {self.model} is {self.word} than {self.than}, {self.amount}"
