"""The filter interface: a filter keeps, changes or rejects a document, and records the scores behind its decision.

A filter is a callable with a ``stage`` name and ``bounds``. The corpus stage applies its filters to each document,
cheap filters first, up to the first rejection. Scores are stored with the document: the report plots them, and
``lilpipe trace`` shows them next to the thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lilpipe.data.filters.words import Words


@dataclass(slots=True)
class Document:
    """A document in the chain of filters, which may change ``text``."""

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
    """Size of the original text."""
    language: str | None = None
    """None before language identification."""
    language_score: float | None = None
    key: int = 0
    """64-bit hash of the normalised original text, which determines the order of documents in the corpus."""
    place: int = 0
    """Position in the shard before filtering."""
    scores: dict[str, float] = field(default_factory=dict)
    """``<stage>.<score>`` to value, in the order of computation."""
    _words: tuple[str, Words] | None = None

    @property
    def words(self) -> Words:
        """Words of the current text, cached."""
        if self._words is None or self._words[0] is not self.text:
            self._words = self.text, Words(self.text)
        return self._words[1]

    def forget_words(self) -> None:
        """Clear the cache of ``words``."""
        self._words = None


class Rejection(NamedTuple):
    """The reason why a document is rejected."""

    reason: str
    """Name of what failed, such as `too_few_words`."""
    detail: str = ""
    """For a duplicate, the id of the kept document; for a match, what matched."""


class Bounds(NamedTuple):
    """Allowed range of a score; None means no bound."""

    least: float | None = None
    most: float | None = None


class Filter(Protocol):
    """A filter of documents."""

    @property
    def stage(self) -> str:
        """Name in reports, such as `gopher_quality`."""
        ...

    @property
    def bounds(self) -> Mapping[str, Bounds]:
        """The scores that the filter records, without the stage name, and their allowed ranges."""
        ...

    def __call__(self, document: Document) -> Rejection | None:
        """Record scores as ``document.scores[f"{stage}.{name}"]``; change the text or return a rejection."""
        ...


def run_filters(filters: Sequence[Filter], document: Document) -> tuple[str, Rejection] | None:
    """Apply filters to a document; return the rejecting stage and the rejection, or None."""
    for each in filters:
        if rejection := each(document):
            return each.stage, rejection
    return None


def score_names(filters: Iterable[Filter]) -> list[str]:
    """Return the names of all scores that the filters record, in order."""
    return [f"{each.stage}.{name}" for each in filters for name in each.bounds]
