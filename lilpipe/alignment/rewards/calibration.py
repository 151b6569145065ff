"""How far a reward model's probabilities can be trusted: what it is 80 % sure of should come true 8 times in 10.

A margin m between two answers states the probability sigmoid(m) that people prefer the first. Which of the two stands
first is arbitrary, so every pair counts by the answer that the model prefers: its confidence lies between 0.5 and 1,
and it is right if people prefer that answer too.
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
    """The pairs whose confidence lies in one interval."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean of what was stated; 0 where there are no pairs."""
    share: float
    """Share that came true, a tie counting half; 0 where there are no pairs."""


@dataclass(frozen=True)
class Calibration:
    """Stated probabilities against what came true."""

    bins: list[Bin]
    brier: float
    """Mean of (1 - P(chosen))^2 (Brier 1950): 0.25 for a model that knows nothing, 0 for one that is sure and right."""
    error: float
    """Expected calibration error: mean over pairs of |confidence - share| of their bin (Naeini et al. 2015)."""


def calibration(margins: Sequence[float]) -> Calibration:
    """From by how much each chosen answer scores above the rejected one; at least one."""
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
    """Sections of a report: the reliability table with its picture, and the histogram of margins; none for no pairs."""
    if not margins:
        return {}
    found = calibration(margins)
    rows: list[dict[str, page.Cell]] = [
        {
            "confidence": f"{item.low:.2f} to {item.high:.2f}",
            "pairs": item.count,
            "stated": f"{item.confidence:.3f}" if item.count else "",
            "came true": f"{item.share:.3f}" if item.count else "",
        }
        for item in found.bins
    ]
    scores = page.note(f"Brier score {found.brier:.3f}, expected calibration error {found.error:.3f}.")
    return {
        "Calibration on held-out pairs": [scores, page.table(rows), _reliability(found.bins)],
        "Margins of held-out pairs": [
            page.note("Pairs by score of the chosen answer minus score of the rejected one."),
            _histogram(margins),
        ],
    }


def _reliability(bins: Sequence[Bin]) -> page.Fragment:
    """Share that came true over the stated confidence."""
    filled = [item for item in bins if item.count]
    certain = charts.Line("as stated", [0.5, 1], [0.5, 1], "--", charts.COLOURS[-1])
    measured = charts.Line("measured", [b.confidence for b in filled], [b.share for b in filled], "-o")
    return charts.svg(charts.lines({"": [certain, measured]}, "confidence stated", "share that came true"))


def _histogram(margins: Sequence[float]) -> page.Fragment:
    """Margins, those of pairs that the model gets wrong in another colour."""
    low, high = min(0.0, *margins), max(0.0, *margins)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    kinds = {"right": [m for m in margins if m >= 0], "wrong": [m for m in margins if m < 0]}
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in kinds.items()}
    return charts.svg(charts.histograms([charts.Histogram("", edges.tolist(), counts)]))
