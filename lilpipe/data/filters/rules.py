"""A filter as a sequence of scores with bounds.

A heuristic yields its scores, cheap ones first; the first that is out of bounds rejects the document, and those behind
it are not taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from lilpipe.data.filters.chain import Bounds, Document, Rejection

Scores = Iterator[tuple[str, float]]


class Rule(NamedTuple):
    """The values of a score that pass, and the reasons that it gives for others."""

    bounds: Bounds
    too_low: str = ""
    too_high: str = ""

    def reason(self, value: float) -> str:
        """Why this value does not pass; empty if it does."""
        least, most = self.bounds
        if least is not None and value < least:
            return self.too_low
        return self.too_high if most is not None and value > most else ""


def at_least(least: float, reason: str) -> Rule:
    """A rule with a lower bound alone."""
    return Rule(Bounds(least=least), too_low=reason)


def at_most(most: float, reason: str) -> Rule:
    """A rule with an upper bound alone."""
    return Rule(Bounds(most=most), too_high=reason)


class Heuristic(ABC):
    """A filter that judges a document by scores."""

    stage: ClassVar[str]

    def __init__(self, rules: dict[str, Rule]) -> None:
        self.rules = rules
        self.bounds: Mapping[str, Bounds] = {name: rule.bounds for name, rule in rules.items()}

    @abstractmethod
    def scores(self, document: Document) -> Scores:
        """Names and values of the scores, in the order of the rules."""

    def __call__(self, document: Document) -> Rejection | None:
        """Note scores until one is out of bounds."""
        for name, value in self.scores(document):
            document.scores[f"{self.stage}.{name}"] = value
            if reason := self.rules[name].reason(value):
                return Rejection(reason)
        return None
