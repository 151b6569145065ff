"""Packing: how the documents of a stream fill rows of ``seq_len + 1`` tokens.

``Concat`` cuts windows out of all documents end to end, as GPT-3 did. ``BestFit`` keeps documents whole (Ding et
al. 2024, "Fewer truncations improve language modeling"): one longer than a row is cut, and the parts are put into
rows by best-fit decreasing. Both say of any row, in arrays over many rows at once, which parts of which documents it
holds, and of any document, which rows hold it.

Shapes: R rows asked for, N pieces in them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

WINDOW_DOCUMENTS = 2**16
WINDOW_ROWS = 2**16
"""Best fit packs consecutive documents that are at most so many, or fill about so many rows: what bounds its memory."""


class Pieces(NamedTuple):
    """Parts of documents, row by row in the order in which they lie there; int64 [N] each."""

    rows: np.ndarray
    """Which of the rows asked for, from 0, ascending."""
    documents: np.ndarray
    """Number of the document in the stream."""
    starts: np.ndarray
    """First token of the part, counted from the stream's start."""
    stops: np.ndarray
    follows: np.ndarray
    """bool: whether the first token is a target of what stands before it in the row, where something does."""


class Packing(Protocol):
    """The rows of one pass over a stream."""

    num_rows: int
    num_targets: int
    """Targets that count, over all rows."""

    def pieces(self, rows_R: np.ndarray) -> Pieces:
        """What the rows hold."""
        ...

    def rows_of(self, document: int) -> np.ndarray:
        """Numbers of the rows that hold a token of the document, ascending."""
        ...


class Concat:
    """Windows at a stride; at one of ``seq_len`` each token but the first is a target once.

    With a smaller stride windows overlap, and a token that lies in several is a target in each. What is left at the
    end is in no row.
    """

    def __init__(self, offsets: np.ndarray, *, seq_len: int, stride: int) -> None:
        """``offsets``, int64 [documents + 1]: the first token of each document, and the end."""
        self._offsets, self._width, self._stride = offsets, seq_len + 1, stride
        self.num_rows = max(0, (int(offsets[-1]) - 1 - seq_len) // stride + 1)
        self.num_targets = self.num_rows * seq_len

    def pieces(self, rows_R: np.ndarray) -> Pieces:
        """What the windows hold, by a binary search for each."""
        first_R = rows_R * self._stride
        last_R = first_R + self._width
        low_R = np.searchsorted(self._offsets, first_R, side="right") - 1
        counts_R = np.searchsorted(self._offsets, last_R, side="left") - low_R
        rows = np.repeat(np.arange(len(rows_R)), counts_R)
        documents = _ranges(low_R, counts_R)
        starts = np.maximum(self._offsets[documents], first_R[rows])
        stops = np.minimum(self._offsets[documents + 1], last_R[rows])
        return Pieces(rows, documents, starts, stops, follows=np.ones(len(rows), dtype=bool))

    def rows_of(self, document: int) -> np.ndarray:
        """The windows that reach into the document."""
        start, stop = int(self._offsets[document]), int(self._offsets[document + 1])
        first = max(0, (start - self._width) // self._stride + 1)
        last = min(self.num_rows - 1, (stop - 1) // self._stride)
        return np.arange(first, last + 1)


class BestFit:
    """Whole documents, and parts of longer ones.

    A part begins with the last token of the part before it, so that each token of a document but the first is a
    target once. The first is one where a document's beginning follows another one's end in a row, as it does in
    windows of documents end to end; after a document that was cut, or at the head of a later part, what stands before
    it says nothing of it. The plan lies in temporary files, memory-mapped, 12 bytes a part; 8 a row are in memory.
    """

    def __init__(self, offsets: np.ndarray, *, seq_len: int) -> None:
        """``offsets``, int64 [documents + 1]: the first token of each document, and the end."""
        self._offsets = offsets
        starts, lengths, counts = _Spool(np.int64), _Spool(np.int32), _Spool(np.int64)
        self.num_rows = self.num_targets = 0
        for first, last in _windows(offsets, seq_len):
            piece_starts, piece_lengths = cut(offsets[first : last + 1], seq_len)
            row_of_piece = best_fit(piece_lengths, capacity=seq_len + 1)
            order = np.argsort(row_of_piece, kind="stable")
            starts.append(piece_starts[order])
            lengths.append(piece_lengths[order])
            counts.append(np.bincount(row_of_piece))
        self._starts, self._lengths = starts.array(), lengths.array()
        self._firsts = np.concatenate([[0], np.cumsum(counts.array())])  # first piece of each row, and the end
        self.num_rows = len(self._firsts) - 1
        self.num_targets = self._count_targets()

    def pieces(self, rows_R: np.ndarray) -> Pieces:
        """What the rows hold, the longest part first."""
        counts_R = self._firsts[rows_R + 1] - self._firsts[rows_R]
        chosen = _ranges(self._firsts[rows_R], counts_R)
        rows = np.repeat(np.arange(len(rows_R)), counts_R)
        starts = self._starts[chosen]
        stops = starts + self._lengths[chosen]
        documents = np.searchsorted(self._offsets, starts, side="right") - 1
        follows = np.zeros(len(rows), dtype=bool)
        follows[1:] = (
            (rows[1:] == rows[:-1])
            & (starts[1:] == self._offsets[documents[1:]])
            & (stops[:-1] == self._offsets[documents[:-1] + 1])
        )
        return Pieces(rows, documents, starts, stops, follows)

    def rows_of(self, document: int) -> np.ndarray:
        """The rows that hold a part of the document, by a pass over the plan."""
        start, stop = self._offsets[document], self._offsets[document + 1]
        found = np.flatnonzero((self._starts >= start) & (self._starts < stop))
        return np.unique(np.searchsorted(self._firsts, found, side="right") - 1)

    def _count_targets(self, rows_at_once: int = WINDOW_ROWS) -> int:
        total = 0
        for first in range(0, self.num_rows, rows_at_once):
            pieces = self.pieces(np.arange(first, min(first + rows_at_once, self.num_rows)))
            total += int((pieces.stops - pieces.starts - 1 + pieces.follows).sum())
        return total


# --- best fit -----------------------------------------------------------------------------------------------------


def cut(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts int64 and lengths int32 of the parts of at most ``seq_len + 1`` tokens that documents are cut into."""
    num_pairs = np.diff(offsets) - 1  # of a token and the one before it
    counts = np.maximum(1, -(-num_pairs // seq_len))
    within = _ranges(np.zeros_like(counts), counts) * seq_len
    starts = np.repeat(offsets[:-1], counts) + within
    lengths = np.minimum(np.repeat(num_pairs, counts) - within, seq_len) + 1
    return starts, lengths.astype(np.int32)


def best_fit(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Row of each piece, int64 [N], by best-fit decreasing (Johnson 1974), equal lengths in their order.

    A piece goes into the row with the least space that holds it, of several into the one filled last. Rows are kept
    by their space, and a bit for each space that some row has: finding one takes a few operations on an integer of
    ``capacity`` bits, whatever the number of rows.
    """
    row_of_piece = np.empty(len(lengths), dtype=np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    num_rows = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            row, space, num_rows = num_rows, capacity, num_rows + 1
        if left := space - length:
            rows_by_space[left].append(row)
            spaces |= 1 << left
        row_of_piece[piece] = row
    return row_of_piece


def _windows(offsets: np.ndarray, seq_len: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of consecutive documents that are packed together."""
    first, end = 0, len(offsets) - 1
    while first < end:
        full = int(np.searchsorted(offsets, offsets[first] + WINDOW_ROWS * seq_len))
        last = min(max(full, first + 1), first + WINDOW_DOCUMENTS, end)
        yield first, last
        first = last


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``first, first + 1, ...`` of each count, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - (ends - counts), counts)


class _Spool:
    """An array that grows in a temporary file."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._file, self._dtype = tempfile.TemporaryFile(), dtype  # noqa: SIM115 (the memory map outlives it)

    def append(self, values: np.ndarray) -> None:
        """Add values at the end."""
        self._file.write(values.astype(self._dtype, copy=False).tobytes())

    def array(self) -> np.ndarray:
        """All that was added, memory-mapped."""
        size = self._file.tell()
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, mode="r")) if size else np.empty(0, self._dtype)
