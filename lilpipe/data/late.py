"""Verdicts that need all documents that passed the chain.

The quality classifier's comes first: a share of documents to keep becomes a score threshold only when all scores are
known. Then near-duplicates among the remaining documents are rejected (``minhash``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lilpipe.data.filters.chain import Rejection
from lilpipe.schemas.documents import score_values
from lilpipe.schemas.tables import read_table

CLASSIFIER_SCORE = "classifier.score"
SIMILARITY = "near_dedup.similarity"


class LateVerdict(NamedTuple):
    """Rejection of a document that passed the chain."""

    row: int
    """Row among the documents of the shard that passed the chain."""
    stage: str
    rejection: Rejection
    similarity: float | None = None
    """For near-duplicates: similarity to the kept document."""


class LateVerdicts(NamedTuple):
    """Data for the verdicts on documents that passed the chain; ``filtered`` is their folder."""

    filtered: Path
    min_score: float | None
    """Minimum classifier score."""
    matches: Path | None
    """The table of ``minhash.near_duplicates``, sorted by shard and row."""

    def of(self, shard: int) -> list[LateVerdict]:
        """Return the verdicts on a shard, by row."""
        low = [LateVerdict(row, "classifier", Rejection("low_quality")) for row in self.low_quality(shard)]
        return sorted([*low, *self._near_duplicates(shard)])

    def low_quality(self, shard: int) -> list[int]:
        """Return the rows of a shard whose score is too low."""
        if self.min_score is None:
            return []
        return np.flatnonzero(self.scores(shard) < np.float32(self.min_score)).tolist()

    def scores(self, shard: int) -> np.ndarray:
        """Return the classifier scores of a shard, float32."""
        batches = read_table(kept_file(self.filtered, shard)).to_batches()
        return np.concatenate([np.empty(0, np.float32), *(score_values(batch, CLASSIFIER_SCORE) for batch in batches)])

    def _near_duplicates(self, shard: int) -> Iterator[LateVerdict]:
        if self.matches is None:
            return
        table = read_table(self.matches)
        first, end = np.searchsorted(table["shard"].to_numpy(), (shard, shard + 1))
        mine = table.slice(int(first), int(end - first))
        ids = self._ids(mine["kept_shard"].to_numpy(), mine["kept_row"].to_numpy())
        for row, kept, similarity in zip(mine["row"].to_pylist(), ids, mine["similarity"].to_pylist(), strict=True):
            yield LateVerdict(row, "near_dedup", Rejection("near_duplicate", kept), similarity)

    def _ids(self, shards: np.ndarray, rows: np.ndarray) -> list[str]:
        ids = np.empty(len(shards), object)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            ids[mine] = read_table(kept_file(self.filtered, shard))["id"].take(pa.array(rows[mine])).to_pylist()
        return ids.tolist()


def kept_file(folder: Path, rank: int) -> Path:
    """Return the file of documents that passed the chain in filtering task ``rank``."""
    return folder / "kept" / f"{rank:05d}.arrow"


def rejected_file(folder: Path, rank: int) -> Path:
    """Return the file of documents that filtering task ``rank`` rejected."""
    return folder / "rejected" / f"{rank:05d}.arrow"
