"""Training text of the tokenizer: documents of the corpus, weighted if weights are given, and exercises.

Documents are read in the order of the corpus, which is random, until the bytes of their group are used up. So a limit
takes a random sample, which does not depend on how the corpus is split into files.
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
"""The single group of all documents if there are no weights."""
EXERCISES = "exercises"


class Text(NamedTuple):
    """A text to train on or to measure."""

    group: str
    """Value of the column that weights refer to."""
    source: str
    language: str | None
    text: str


@dataclass(frozen=True)
class TokenizerShare:
    """Requested and available bytes of a group of documents."""

    asked: float
    """Requested share of the bytes."""
    wanted: int
    """Requested bytes."""
    available: int
    """Bytes in the corpus."""

    @property
    def limit(self) -> int:
        """Bytes to read."""
        return min(self.wanted, self.available)


@dataclass(frozen=True)
class Sample:
    """Texts of the corpus and the exercises; each iteration gives the same texts."""

    corpus: Path
    prompts: Path | None
    weights_by: str | None
    shares: Mapping[str, TokenizerShare]
    """Share of each group."""
    exercise_bytes: int
    """Maximum bytes of exercises."""

    @classmethod
    def plan(cls, config: TokenizerConfig, corpus: Path, prompts: Path | None) -> Sample:
        """Decide how many bytes to read of each group. Raises ``DataError`` if a weighted group has no documents."""
        by = config.weights_by if config.weights else None
        shares = share_out(count_bytes(corpus, by), config.weights or {ALL: 1.0}, config.max_bytes, by or "")
        total = sum(share.limit for share in shares.values())
        exercise_bytes = int(total * config.max_exercise_ratio / (1 - config.max_exercise_ratio)) if prompts else 0
        return cls(corpus, prompts, by, shares, exercise_bytes)

    def shortages(self) -> list[str]:
        """Return a message for each group with fewer bytes than its weight requests."""
        return [
            f"tokenizer.weights: {name}: requested {share.wanted:,} bytes, but the corpus has {share.available:,}"
            for name, share in self.shares.items()
            if share.wanted > share.available and self.weights_by
        ]

    @property
    def num_bytes(self) -> int:
        """Maximum bytes of the sample."""
        return sum(share.limit for share in self.shares.values()) + self.exercise_bytes

    def texts(self, max_bytes: int | None = None) -> Iterator[Text]:
        """Yield the texts; ``max_bytes`` shrinks the sample in the same proportions."""
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
    """Return bytes of text per value of a column, or in total. Reads Arrow's offsets, not the text."""
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
    """Return the bytes to read of each group that has a weight.

    Without ``max_bytes``, the shares equal the weights, and the scarcest group sets the total. With it, a group with
    fewer bytes than its share contributes all of them, and other groups do not make up for it. Raises ``DataError`` if
    a weighted group has no documents.
    """
    if missing := sorted(set(weights) - set(available)):
        raise DataError(
            f"tokenizer.weights: got {', '.join(missing)}, for which the corpus has no document by {by}, "
            f"expected names out of {', '.join(sorted(available))}; correct or remove them"
        )
    total = sum(weights.values())
    asked = {name: weight / total for name, weight in weights.items()}
    whole = max_bytes or min(available[name] / share for name, share in asked.items())
    return {name: TokenizerShare(share, round(whole * share), available[name]) for name, share in asked.items()}


def take_bytes(texts: Iterable[Text], limits: Mapping[str, int]) -> Iterator[Text]:
    """Yield texts in order until each group reaches its limit in UTF-8 bytes; the last text is truncated."""
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
