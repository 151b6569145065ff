"""How far a reward model's probabilities can be trusted: what it is 80 % sure of should come true 8 times in 10.

A margin m between two answers states the probability sigmoid(m) that people prefer the first. Which of the two stands
first is arbitrary, so every pair counts by the answer that the model prefers: its confidence lies between 0.5 and 1,
and it is right if people prefer that answer too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from lilpipe import report

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


def preference_sections(margins: Sequence[float]) -> dict[str, str]:
    """Sections of a report: the reliability table with its picture, and the histogram of margins; none for no pairs."""
    if not margins:
        return {}
    found = calibration(margins)
    rows: list[dict[str, report.Cell]] = [
        {
            "confidence": f"{item.low:.2f} to {item.high:.2f}",
            "pairs": item.count,
            "stated": f"{item.confidence:.3f}" if item.count else "",
            "came true": f"{item.share:.3f}" if item.count else "",
        }
        for item in found.bins
    ]
    figures = report.note(f"Brier score {found.brier:.3f}, expected calibration error {found.error:.3f}.")
    return {
        "Calibration on held-out pairs": figures + report.table(rows) + report.figure(_reliability(found.bins)),
        "Margins of held-out pairs": report.figure(_histogram(margins)),
    }


def _reliability(bins: Sequence[Bin]) -> Figure:
    """Share that came true over the stated confidence; dots grow with the number of pairs."""
    filled = [item for item in bins if item.count]
    largest = max(item.count for item in filled)
    picture = Figure(figsize=(4, 3.4))
    axes = picture.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=report.COLOURS[-1], linewidth=1, linestyle="--")
    axes.plot([b.confidence for b in filled], [b.share for b in filled], color=report.ACCENT, linewidth=1)
    sizes = [10 + 60 * b.count / largest for b in filled]
    axes.scatter([b.confidence for b in filled], [b.share for b in filled], s=sizes, color=report.ACCENT)
    axes.set(xlabel="confidence stated", ylabel="share that came true", ylim=(0, 1.05))
    return picture


def _histogram(margins: Sequence[float]) -> Figure:
    """Margins, those of pairs that the model gets wrong in another colour."""
    picture = Figure(figsize=(6, 2.6))
    axes = picture.subplots()
    wrong, right = [m for m in margins if m < 0], [m for m in margins if m >= 0]
    low, high = min(0.0, *margins), max(0.0, *margins)
    edges = [low + (high - low or 1.0) * index / 30 for index in range(31)]
    axes.hist([wrong, right], bins=edges, stacked=True, color=[report.COLOURS[3], report.ACCENT])
    axes.set(xlabel="score of chosen - score of rejected", ylabel="pairs")
    return picture
