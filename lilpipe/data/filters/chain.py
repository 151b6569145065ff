"""What a filter is: a document goes in; it is kept, changed or rejected, and every score that decided is noted.

A filter is an object with a ``stage`` name, its ``bounds``, and a call. The corpus stage runs its filters over each
document in turn, cheap ones first; the first that rejects ends it. Scores are kept with the document, so that a
report can draw them and ``lilpipe trace`` can show each verdict beside its threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lilpipe.data.filters.words import Words


@dataclass(slots=True)
class Document:
    """A document on its way through the filters; they may change ``text``."""

    id: str
    text: str
    source: str
    name: str = ""
    version: str = ""
    licence: str = ""
    label: str = ""
    url: str = ""
    date: str = ""
    file: str = ""
    row: int = 0
    num_bytes: int = 0
    """Of the text as read."""
    language: str | None = None
    """None until it has been identified."""
    language_score: float | None = None
    key: int = 0
    """Hash of the normalised text as read, 64 bits: its order in the corpus."""
    place: int = 0
    """Its number in the shard, as read."""
    scores: dict[str, float] = field(default_factory=dict)
    """``<stage>.<score>`` to value, in the order in which they were taken."""
    _words: tuple[str, Words] | None = None

    @property
    def words(self) -> Words:
        """The words of the text as it is now."""
        if self._words is None or self._words[0] is not self.text:
            self._words = self.text, Words(self.text)
        return self._words[1]

    def forget_words(self) -> None:
        """Free what ``words`` remembers."""
        self._words = None


class Rejection(NamedTuple):
    """Why a document goes."""

    reason: str
    """Named by what failed, such as `too_few_words`."""
    detail: str = ""
    """For a duplicate the id of the document that stays; for a match what was matched."""


class Bounds(NamedTuple):
    """The values of a score that pass; None is no bound."""

    least: float | None = None
    most: float | None = None


class Filter(Protocol):
    """One filter."""

    @property
    def stage(self) -> str:
        """Name in reports, such as `gopher_quality`."""
        ...

    @property
    def bounds(self) -> Mapping[str, Bounds]:
        """Every score that the filter notes, by its name without the stage, and the values of it that pass."""
        ...

    def __call__(self, document: Document) -> Rejection | None:
        """Note scores as ``document.scores[f"{stage}.{name}"]``; change the text or say why the document goes."""
        ...


def run_filters(filters: Sequence[Filter], document: Document) -> tuple[str, Rejection] | None:
    """Pass a document through filters; returns the stage that rejects it, and why, or None."""
    for each in filters:
        if rejection := each(document):
            return each.stage, rejection
    return None


def score_names(filters: Iterable[Filter]) -> list[str]:
    """All scores that the filters note, in their order."""
    return [f"{each.stage}.{name}" for each in filters for name in each.bounds]
