"""Filters defined by scores with bounds.

A heuristic yields its scores, cheap ones first. The first score out of bounds rejects the document, and the remaining
scores are not computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from lilpipe.data.filters.chain import Bounds, Document, Rejection

Scores = Iterator[tuple[str, float]]


class Rule(NamedTuple):
    """Allowed range of a score, and the rejection reasons below and above it."""

    bounds: Bounds
    too_low: str = ""
    too_high: str = ""

    def reason(self, value: float) -> str:
        """Return the rejection reason for a value, or an empty string."""
        least, most = self.bounds
        if least is not None and value < least:
            return self.too_low
        return self.too_high if most is not None and value > most else ""


def at_least(least: float, reason: str) -> Rule:
    """Return a rule with only a lower bound."""
    return Rule(Bounds(least=least), too_low=reason)


def at_most(most: float, reason: str) -> Rule:
    """Return a rule with only an upper bound."""
    return Rule(Bounds(most=most), too_high=reason)


class Heuristic(ABC):
    """Base class of filters that judge a document by scores."""

    stage: ClassVar[str]

    def __init__(self, rules: dict[str, Rule]) -> None:
        self.rules = rules
        self.bounds: Mapping[str, Bounds] = {name: rule.bounds for name, rule in rules.items()}

    @abstractmethod
    def scores(self, document: Document) -> Scores:
        """Yield names and values of the scores, in the order of the rules."""

    def __call__(self, document: Document) -> Rejection | None:
        """Record scores until one is out of bounds."""
        for name, value in self.scores(document):
            document.scores[f"{self.stage}.{name}"] = value
            if reason := self.rules[name].reason(value):
                return Rejection(reason)
        return None
