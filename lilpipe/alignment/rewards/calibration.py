"""Calibration of a reward model: of pairs predicted at 80 %, 80 % should be right.

A margin m between two completions predicts with probability sigmoid(m) that people prefer the first. The order of the
two is arbitrary, so each pair counts by the completion that the model prefers: its confidence is between 0.5 and 1, and
the model is right if people prefer it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lilpipe import charts, page

NUM_BINS = 10
"""Bins of equal width over [0.5, 1]."""


@dataclass(frozen=True)
class Bin:
    """Pairs with a confidence in one interval."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean confidence; 0 without pairs."""
    share: float
    """Share of pairs that the model gets right, a tie counting half; 0 without pairs."""


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities compared with outcomes."""

    bins: list[Bin]
    brier: float
    """Mean of (1 - P(chosen))^2 (Brier 1950): 0.25 at chance, 0 for certain and correct predictions."""
    error: float
    """Expected calibration error: mean over pairs of |confidence - share| of their bin (Naeini et al. 2015)."""


def calibration(margins: Sequence[float]) -> Calibration:
    """Compute calibration from the score margins (chosen minus rejected) of at least one pair."""
    members: list[list[float]] = [[] for _ in range(NUM_BINS)]
    for margin in margins:
        members[min(int((_sigmoid(abs(margin)) - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)].append(margin)
    bins = [_bin(index, group) for index, group in enumerate(members)]
    brier = math.fsum((1 - _sigmoid(margin)) ** 2 for margin in margins) / len(margins)
    error = math.fsum(item.count * abs(item.confidence - item.share) for item in bins) / len(margins)
    return Calibration(bins, brier, error)


def _bin(index: int, margins: Sequence[float]) -> Bin:
    low, high = (0.5 + 0.5 * edge / NUM_BINS for edge in (index, index + 1))
    if not margins:
        return Bin(low, high, 0, 0.0, 0.0)
    confidence = math.fsum(_sigmoid(abs(margin)) for margin in margins) / len(margins)
    right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    return Bin(low, high, len(margins), confidence, right / len(margins))


def _sigmoid(value: float) -> float:
    if value < -700:  # exp would overflow
        return 0.0
    return 1 / (1 + math.exp(-value))


def preference_sections(margins: Sequence[float]) -> page.Sections:
    """Return report sections: reliability table, reliability diagram and histogram of margins; empty without pairs."""
    if not margins:
        return {}
    found = calibration(margins)
    rows: list[dict[str, page.Cell]] = [
        {
            "confidence": f"{item.low:.2f} to {item.high:.2f}",
            "pairs": item.count,
            "mean confidence": f"{item.confidence:.3f}" if item.count else "",
            "accuracy": f"{item.share:.3f}" if item.count else "",
        }
        for item in found.bins
    ]
    scores = page.note(f"Brier score {found.brier:.3f}, expected calibration error {found.error:.3f}.")
    return {
        "Calibration on validation pairs": [scores, page.table(rows), _reliability(found.bins)],
        "Margins of validation pairs": [
            page.note("Pairs by score of the chosen minus score of the rejected completion."),
            _histogram(margins),
        ],
    }


def _reliability(bins: Sequence[Bin]) -> page.Fragment:
    """Plot accuracy over confidence (reliability diagram)."""
    filled = [item for item in bins if item.count]
    certain = charts.Line("perfectly calibrated", [0.5, 1], [0.5, 1], "--", charts.COLOURS[-1])
    measured = charts.Line("measured", [b.confidence for b in filled], [b.share for b in filled], "-o")
    return charts.svg(charts.lines({"": [certain, measured]}, "confidence", "accuracy"))


def _histogram(margins: Sequence[float]) -> page.Fragment:
    """Plot the margins; pairs that the model gets wrong have another colour."""
    low, high = min(0.0, *margins), max(0.0, *margins)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    kinds = {"right": [m for m in margins if m >= 0], "wrong": [m for m in margins if m < 0]}
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in kinds.items()}
    return charts.svg(charts.histograms([charts.Histogram("", edges.tolist(), counts)]))
