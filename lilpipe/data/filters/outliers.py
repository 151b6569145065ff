"""Heuristics of Llama 3 (Grattafiori et al. 2024, 3.1.1): duplicate n-gram coverage, dirty words, outlier tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.repetition import ngram_coverage, repeated_ngrams
from lilpipe.data.filters.rules import Heuristic, Scores, at_most
from lilpipe.data.filters.words import Words
from lilpipe.errors import ConfigError


class DuplicateNgramCoverage(Heuristic):
    """Share of a text's words in an n-gram that has occurred before (Rae et al. 2021).

    It finds logs and error messages, whose lines are long and not exactly equal.
    """

    stage = "ngram_coverage"

    def __init__(self, most: float, ngram_size: int) -> None:
        super().__init__({"coverage": at_most(most, "duplicate_ngram_coverage")})
        self.ngram_size = ngram_size

    def scores(self, document: Document) -> Scores:
        """Yield the coverage."""
        hashes = document.words.hashes
        (repeats,) = repeated_ngrams(hashes, [self.ngram_size])
        yield "coverage", ngram_coverage(repeats, len(hashes))


# --- dirty words --------------------------------------------------------------------------------------------------

NEUTRAL_LIST = (
    "camgirl", "camgirls", "hentai", "milf", "nsfw", "porn", "porno", "pornography", "upskirt", "xxx", "sex cam",
    "sex chat", "sex tape", "nude pics", "adult video", "adult webcam", "escort service",
)  # fmt: skip
"""Words and phrases of adult sites; no insults, and no words that have another meaning on their own."""


class DirtyWords(Heuristic):
    """Counts listed words, to find adult sites that are not on a domain block list.

    An entry may have several words; case and punctuation are ignored.

    Args:
        most: Maximum number of occurrences.
        path: File with one entry per line; ``NEUTRAL_LIST`` if None.
    """

    stage = "dirty_words"

    def __init__(self, most: int, path: str | None = None) -> None:
        super().__init__({"num_dirty_words": at_most(most, "too_many_dirty_words")})
        entries = NEUTRAL_LIST if path is None else _read_entries(path)
        self.entries: dict[int, set[tuple[int, ...]]] = {}
        for entry in (tuple(Words(entry).hashes.tolist()) for entry in entries):
            if entry:
                self.entries.setdefault(entry[0], set()).add(entry)
        self.first_words = np.array(sorted(self.entries), np.uint64)

    def scores(self, document: Document) -> Scores:
        """Yield the number of occurrences."""
        hashes = document.words.hashes
        starts = np.flatnonzero(np.isin(hashes, self.first_words)).tolist()
        yield "num_dirty_words", sum(self._count_at(start, hashes) for start in starts)

    def _count_at(self, start: int, hashes: np.ndarray) -> int:
        entries = self.entries[int(hashes[start])]
        return sum(tuple(hashes[start : start + len(entry)].tolist()) == entry for entry in entries)


def _read_entries(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"corpus.quality.dirty_words: cannot read {path!r} ({error}); expected a UTF-8 file with one word per "
            "line, or no value for the built-in list"
        ) from error


# --- outlier tokens -----------------------------------------------------------------------------------------------


class WordCounts(NamedTuple):
    """Number of occurrences of each word."""

    hashes: np.ndarray
    """uint64 [words], ascending and unique."""
    counts: np.ndarray
    """int64 [words]."""


_BUFFERED_WORDS = 2**20


class WordCounter:
    """Counts words; memory grows with the number of distinct words."""

    def __init__(self) -> None:
        self._total = WordCounts(np.empty(0, np.uint64), np.empty(0, np.int64))
        self._buffered: list[np.ndarray] = []
        self._num_buffered = 0

    def add(self, words: Words) -> None:
        """Add the words of a document."""
        self._buffered.append(words.hashes)
        self._num_buffered += len(words.hashes)
        if self._num_buffered >= _BUFFERED_WORDS:
            self.total()

    def total(self) -> WordCounts:
        """Return the counts so far."""
        self._total = merge_counts([self._total, _count(self._buffered)])
        self._buffered, self._num_buffered = [], 0
        return self._total


def merge_counts(parts: Iterable[WordCounts]) -> WordCounts:
    """Sum counts; the result does not depend on the order or the division of the parts."""
    parts = list(parts)
    hashes, inverse = np.unique(np.concatenate([part.hashes for part in parts]), return_inverse=True)
    counts = np.zeros(len(hashes), np.int64)
    np.add.at(counts, inverse, np.concatenate([part.counts for part in parts]))
    return WordCounts(hashes, counts)


def _count(buffered: list[np.ndarray]) -> WordCounts:
    hashes, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *buffered]), return_counts=True)
    return WordCounts(hashes, counts.astype(np.int64))


class Unigrams(NamedTuple):
    """A word distribution with add-one smoothing.

    A word with count c among n has probability (c + 1) / (n + v + 1), where v is the number of distinct words. All
    unseen words share the probability of one word with c = 0.
    """

    hashes: np.ndarray
    """uint64 [words], ascending."""
    probabilities: np.ndarray
    """float64 [words]."""
    unseen: float
    """Probability of a word that is not in ``hashes``."""

    @classmethod
    def from_counts(cls, counts: WordCounts, max_words: int = 2**22) -> Unigrams:
        """Return the distribution of counts. Beyond `max_words`, the rarest words count as unseen; ties are broken by
        hash, the greatest first.
        """
        denominator = int(counts.counts.sum()) + len(counts.hashes) + 1
        hashes, kept = counts
        if len(hashes) > max_words:
            most_frequent = np.sort(np.argsort(-kept, kind="stable")[:max_words])
            hashes, kept = hashes[most_frequent], kept[most_frequent]
        return cls(hashes, (kept + 1) / denominator, 1 / denominator)

    def probability(self, hashes: np.ndarray) -> np.ndarray:
        """Return the probabilities of words, float64 [hashes]."""
        if not len(self.hashes):
            return np.full(len(hashes), self.unseen)
        places = np.searchsorted(self.hashes[:-1], hashes)
        return np.where(self.hashes[places] == hashes, self.probabilities[places], self.unseen)


class Divergence(Heuristic):
    """Kullback-Leibler divergence of a document's word distribution from that of the corpus, in nats.

    It is high for documents with outlier tokens, and also for short documents, because each word has a large share.
    """

    stage = "divergence"

    def __init__(self, most: float, reference: Unigrams) -> None:
        super().__init__({"kl_divergence": at_most(most, "outlier_words")})
        self.reference = reference

    def scores(self, document: Document) -> Scores:
        """Yield the divergence."""
        hashes, counts = np.unique(document.words.hashes, return_counts=True)
        shares = counts / max(int(counts.sum()), 1)
        yield "kl_divergence", float(shares @ np.log(shares / self.reference.probability(hashes)))
