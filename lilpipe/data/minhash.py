"""Near-duplicate removal by MinHash and locality-sensitive hashing (LSH), with every match verified.

1. ``lilpipe.data.signatures.SignatureWriter`` writes, for each shard, the MinHash signatures of its documents and a
   hash of each band.
2. ``MatchBands`` takes documents with the same band hash as candidates (Indyk and Motwani 1998). Candidates are a pair
   if at least ``min_similarity`` of their signature values agree. A task handles several bands.
3. ``near_duplicates`` visits documents by rank, best first, and rejects each one that pairs with a document kept so
   far. So no two kept documents are a pair, and each rejected document is similar to a kept one. Single linkage
   (FineWeb's rule) does not guarantee the latter: from a chain A ~ B ~ C it rejects C for A.

Documents rank by classifier score if there is a classifier, highest first; then by text length in bytes, longest first;
then by corpus order.

Everything but the pairs is read from memory-mapped files: band hashes in ranges of bounded size, signatures by index.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.config.corpus import MinhashConfig
from lilpipe.data.signatures import Signatures, num_hashes, save_array

NUM_LEADERS = 32
"""Maximum number of comparison rounds in a bucket; see ``compare_buckets``."""

PAIRS_AT_ONCE = 2**16
"""Number of pairs that are converted to Python integers at a time."""

PAIR = np.dtype([("better", np.int64), ("worse", np.int64), ("agreeing", np.uint32)])
"""Two documents by their index in ``Signatures``, and the number of agreeing values in their signatures."""

MATCHES = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("kept_shard", pa.int64(), nullable=False),
        pa.field("kept_row", pa.int64(), nullable=False),
        pa.field("similarity", pa.float64(), nullable=False),
    ]
)
"""Each document to reject, the kept document, and the estimated Jaccard similarity of the two."""


# --- pairs --------------------------------------------------------------------------------------------------------


class MatchBands(PipelineStep):
    """Finds the verified pairs of bands ``rank``, ``rank + world_size``, ...; writes a file for each band."""

    type, name = "Dedup", "Near-duplicates in bands"

    def __init__(self, config: MinhashConfig, signatures: Path, pairs: Path) -> None:
        super().__init__()
        self.config = config
        self.signatures = signatures
        self.pairs = pairs

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Process the bands without an output file."""
        found = Signatures(self.signatures, self.config)
        for band in range(rank, self.config.num_buckets, world_size):
            path = self.pairs / f"{band:05d}.npy"
            if not path.exists():
                pairs = [compare_buckets(found, *_buckets(*each), self.config) for each in found.bands(band)]
                save_array(path, np.concatenate([np.zeros(0, PAIR), *pairs]))


def _buckets(hashes: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket, ascending, and the index of documents that share their hash with another document."""
    order = np.argsort(hashes)
    hashes = hashes[order]
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    shared = ~(new & np.append(new[1:], True))[: len(hashes)]
    return np.cumsum(new)[shared], index[order][shared]


def compare_buckets(found: Signatures, bucket: np.ndarray, index: np.ndarray, config: MinhashConfig) -> np.ndarray:
    """Return the pairs, ``PAIR`` [pairs], among documents (by index) of the same bucket (ascending).

    Comparison works in rounds. In each round, the best remaining document of a bucket is the leader, and all others are
    compared with it. In buckets of at most ``NUM_LEADERS`` + 1 documents, all pairs are compared. In larger buckets,
    documents similar to the leader are removed with it, so a million equal documents take one round. The number of
    rounds is limited to ``NUM_LEADERS``, which makes the work linear in the number of documents; documents similar to
    none of the leaders are left to other bands.
    """
    order = found.by_rank(index, within=bucket)
    bucket, index = bucket[order], index[order]
    _, number, size = np.unique(bucket, return_inverse=True, return_counts=True)
    small = (size <= NUM_LEADERS + 1)[number]
    pairs = [np.zeros(0, PAIR)]
    for _ in range(NUM_LEADERS):
        other = np.append(False, bucket[1:] == bucket[:-1])[: len(bucket)]
        if not other.any():
            break
        leader = index[~other][np.cumsum(~other) - 1][other]
        bucket, index, small = bucket[other], index[other], small[other]
        agreeing = found.agreeing(leader, index)
        similar = agreeing / num_hashes(config) >= config.min_similarity
        pairs.append(_pairs(leader[similar], index[similar], agreeing[similar]))
        stays = small | ~similar
        bucket, index, small = bucket[stays], index[stays], small[stays]
    return np.concatenate(pairs)


def _pairs(better: np.ndarray, worse: np.ndarray, agreeing: np.ndarray) -> np.ndarray:
    pairs = np.empty(len(better), PAIR)
    pairs["better"], pairs["worse"], pairs["agreeing"] = better, worse, agreeing
    return pairs


# --- what stays ---------------------------------------------------------------------------------------------------


def near_duplicates(
    signatures: Path, pairs: Path, config: MinhashConfig, *, min_score: float | None = None
) -> pa.Table:
    """Return the documents to reject, with the kept document, by the rule above: ``MATCHES``, sorted by shard and row.

    If several kept documents pair with a rejected one, the most similar is named, then the best by rank. Documents with
    a classifier score below ``min_score`` are excluded.
    """
    found = Signatures(signatures, config)
    edges = _distinct(np.load(path) for path in sorted(pairs.glob("*.npy")))
    if min_score is not None:  # the better document of a pair has no lower score
        edges = edges[found.take("score", edges["worse"]) >= np.float32(min_score)]
    index, positions = np.unique(np.concatenate([edges["better"], edges["worse"]]), return_inverse=True)
    order = found.by_rank(index)
    position = np.argsort(order)[positions]
    better, worse = position[: len(edges)], position[len(edges) :]
    kept = _greedy(better, worse, len(index))
    decisive = kept[better] & ~kept[worse]
    edges, better, worse = edges[decisive], better[decisive], worse[decisive]
    closest = np.lexsort((better, -edges["agreeing"].astype(np.int64), edges["worse"]))
    _, first = np.unique(edges["worse"][closest], return_index=True)
    matches = edges[closest[first]]
    columns = (*found.places(matches["worse"]), *found.places(matches["better"]))
    return pa.table([*columns, matches["agreeing"] / num_hashes(config)], schema=MATCHES)


def _distinct(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Return each pair once; most pairs are found in several bands."""
    edges = np.zeros(0, PAIR)
    for band in bands:
        edges = np.concatenate([edges, band])
        order = np.lexsort((edges["better"], edges["worse"]))
        edges = edges[order]
        same = (edges["better"][1:] == edges["better"][:-1]) & (edges["worse"][1:] == edges["worse"][:-1])
        edges = edges[np.append(True, ~same)[: len(edges)]]
    return edges


def _greedy(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
    """Return whether each of ``count`` documents is kept, bool; documents are numbered by rank."""
    kept = bytearray(b"\1") * count
    order = np.argsort(worse, kind="stable")  # so the better document of a pair is already decided
    for start in range(0, len(order), PAIRS_AT_ONCE):  # Python integers take four times the memory
        part = order[start : start + PAIRS_AT_ONCE]
        for a, b in zip(better[part].tolist(), worse[part].tolist(), strict=True):
            if kept[a]:
                kept[b] = 0
    return np.frombuffer(bytes(kept), np.uint8).astype(bool)
