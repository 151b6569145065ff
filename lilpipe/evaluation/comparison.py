"""Wording of differences: "better" or "worse" beyond two standard errors, otherwise noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from lilpipe.metrics.pass_at_k import Estimate, mean_estimate

NOISE_ERRORS = 2.0
"""Standard errors within which a difference is noise; of equal models, 1 in 20 differences is larger."""

Word = Literal["better", "worse", "no difference within the noise"]


def paired(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Return the mean difference on the same prompts; its standard error is below that of two unpaired means."""
    return mean_estimate([a - b for a, b in zip(after, before, strict=True)])


def beyond_noise(difference: Estimate) -> int:
    """Return 1 for a difference above the noise, -1 for one below it, 0 within; a single value is always noise."""
    if difference.n < 2 or abs(difference.value) <= NOISE_ERRORS * difference.stderr:
        return 0
    return 1 if difference.value > 0 else -1


def wording(difference: Estimate, *, higher_is_better: bool = True) -> Word:
    """Return the wording for a difference."""
    sign = beyond_noise(difference) * (1 if higher_is_better else -1)
    if sign == 0:
        return "no difference within the noise"
    return "better" if sign > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models by a measure where higher is better."""

    measure: str
    difference: Estimate
    _: KW_ONLY
    model: str
    than: str
    unit: str = "prompts"
    """What the difference is averaged over."""

    @property
    def word(self) -> Word:
        """Wording of the difference."""
        return wording(self.difference)

    @property
    def amount(self) -> str:
        """The difference with its standard error."""
        return f"{self.difference.value:+.3f} ± {self.difference.stderr:.3f} ({self.difference.n:,} {self.unit})"

    @property
    def sentence(self) -> str:
        """One line, such as ``accuracy: grpo is better than dpo, +0.120 ± 0.020 (500 prompts)``."""
        if self.word == "no difference within the noise":
            return f"{self.measure}: {self.word} between {self.model} and {self.than}, {self.amount}"
        return f"{self.measure}: {self.model} is {self.word} than {self.than}, {self.amount}"
