"""What a tokenizer learns from: documents of the corpus, by weight where weights are given, and exercises.

Documents are taken in the order of the corpus, which is random, each group of them until its bytes are used up. So a
limit takes a random sample, and the same one however the corpus is cut into files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import DataError
from lilpipe.schemas.documents import read_documents
from lilpipe.schemas.examples import read_exercises

ALL = ""
"""The one group of documents where nothing is weighed."""
EXERCISES = "exercises"


class Text(NamedTuple):
    """A text to learn from or to measure."""

    group: str
    """What its weight goes by."""
    source: str
    language: str | None
    text: str


@dataclass(frozen=True)
class TokenizerShare:
    """What was asked of a group of documents, and what there is."""

    asked: float
    """TokenizerShare of the bytes."""
    wanted: int
    """Bytes that the share comes to."""
    available: int
    """Bytes in the corpus."""

    @property
    def limit(self) -> int:
        """Bytes to take."""
        return min(self.wanted, self.available)


@dataclass(frozen=True)
class Sample:
    """Texts of the corpus and the exercises, the same at each reading."""

    corpus: Path
    prompts: Path | None
    weights_by: str | None
    shares: Mapping[str, TokenizerShare]
    """By group."""
    exercise_bytes: int
    """At most so much of the exercises."""

    @classmethod
    def plan(cls, config: TokenizerConfig, corpus: Path, prompts: Path | None) -> Sample:
        """Decide how much to take of what. Raises ``DataError`` for a weight of what the corpus has not."""
        by = config.weights_by if config.weights else None
        shares = share_out(count_bytes(corpus, by), config.weights or {ALL: 1.0}, config.max_bytes, by or "")
        total = sum(share.limit for share in shares.values())
        exercise_bytes = int(total * config.max_exercise_ratio / (1 - config.max_exercise_ratio)) if prompts else 0
        return cls(corpus, prompts, by, shares, exercise_bytes)

    def shortages(self) -> list[str]:
        """A line for each group that holds less than its weight asks for."""
        return [
            f"tokenizer.weights: {name} was to give {share.wanted:,} bytes and has {share.available:,}"
            for name, share in self.shares.items()
            if share.wanted > share.available and self.weights_by
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes at most."""
        return sum(share.limit for share in self.shares.values()) + self.exercise_bytes

    def texts(self, max_bytes: int | None = None) -> Iterator[Text]:
        """The texts; ``max_bytes`` makes the sample smaller, in the same proportions."""
        part = 1.0 if max_bytes is None else min(1.0, max_bytes / max(1, self.num_bytes))
        yield from take_bytes(self._documents(), {name: int(s.limit * part) for name, s in self.shares.items()})
        if self.prompts is not None:
            yield from take_bytes(_exercises(self.prompts), {EXERCISES: int(self.exercise_bytes * part)})

    def _documents(self) -> Iterator[Text]:
        for batch in read_documents(self.corpus):
            columns = (batch[name].to_pylist() for name in ("source", "language", "text"))
            groups = batch[self.weights_by].to_pylist() if self.weights_by else [ALL] * batch.num_rows
            yield from map(Text, groups, *columns)


def _exercises(directory: Path) -> Iterator[Text]:
    return (Text(EXERCISES, EXERCISES, None, text) for _, text in read_exercises(directory))


def count_bytes(corpus: Path, by: str | None) -> Counter[str]:
    """Bytes of text for each value of a column, or of all. They are read off Arrow's offsets, not off the text."""
    counts: Counter[str] = Counter({ALL: 0} if by is None else {})
    for batch in read_documents(corpus):
        lengths = pc.call_function("binary_length", [batch["text"]])
        if by is None:
            counts[ALL] += int(lengths.to_numpy().sum())
            continue
        sums = pa.table({"group": batch[by], "bytes": lengths}).group_by("group").aggregate([("bytes", "sum")])
        for group, num_bytes in zip(*(sums[name].to_pylist() for name in ("group", "bytes_sum")), strict=True):
            counts[group or ALL] += num_bytes
    return counts


def share_out(
    available: Mapping[str, int], weights: Mapping[str, float], max_bytes: int | None, by: str
) -> dict[str, TokenizerShare]:
    """Bytes to take of each group that has a weight.

    Without ``max_bytes`` the weights are met exactly, by as many bytes as the scarcest group allows. With it, a group
    that holds less than its share gives what it has, and the others give no more for that. Raises ``DataError`` for a
    weight of a group that is not there.
    """
    if missing := sorted(set(weights) - set(available)):
        raise DataError(
            f"tokenizer.weights: got {', '.join(missing)}, of which the corpus has no document by {by}, "
            f"expected names out of {', '.join(sorted(available))}; correct or remove them"
        )
    total = sum(weights.values())
    asked = {name: weight / total for name, weight in weights.items()}
    whole = max_bytes or min(available[name] / share for name, share in asked.items())
    return {name: TokenizerShare(share, round(whole * share), available[name]) for name, share in asked.items()}


def take_bytes(texts: Iterable[Text], limits: Mapping[str, int]) -> Iterator[Text]:
    """Texts in their order, of each group as many bytes of UTF-8 as its limit at most; the last one is cut to fit."""
    left = dict(limits)
    for text in texts:
        if not (allowed := left.get(text.group)):
            continue
        encoded = text.text.encode()
        if len(encoded) < allowed:
            left[text.group] = allowed - len(encoded)
            yield text
            continue
        del left[text.group]
        if cut := encoded[:allowed].decode(errors="ignore"):
            yield text._replace(text=cut)
        if not left:
            return
