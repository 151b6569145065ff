"""Packing: how the documents of a stream fill rows of ``seq_len + 1`` tokens.

``Concat`` cuts windows from the concatenated documents, as GPT-3 did. ``BestFit`` keeps documents whole (Ding et al.
2024, "Fewer truncations improve language modeling"): it cuts documents longer than a row, and packs the parts into
rows by best-fit decreasing. Both map rows to the parts of documents that they hold, vectorized over rows, and a
document to the rows that hold it.

Shapes: R requested rows, N pieces in them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

WINDOW_DOCUMENTS = 2**16
WINDOW_ROWS = 2**16
"""Best fit packs consecutive documents together up to either limit, which bounds its memory."""


class Pieces(NamedTuple):
    """Parts of documents in row order; int64 [N] each, but ``follows``."""

    rows: np.ndarray
    """Index into the requested rows, ascending."""
    documents: np.ndarray
    """Number of the document in the stream."""
    starts: np.ndarray
    """First token of the part, counted from the start of the stream."""
    stops: np.ndarray
    """End of the part (exclusive)."""
    follows: np.ndarray
    """bool: whether the part's first token is a valid target of the token before it in the row, if any."""


class Packing(Protocol):
    """The rows of one epoch over a stream."""

    num_rows: int
    num_targets: int
    """Targets with a loss, over all rows."""

    def pieces(self, rows_R: np.ndarray) -> Pieces:
        """Return the parts of documents in the rows."""
        ...

    def rows_of(self, document: int) -> np.ndarray:
        """Return the numbers of the rows that hold a token of the document, ascending."""
        ...


class Concat:
    """Windows at a stride. With stride ``seq_len``, each token but the first is a target once.

    With a smaller stride windows overlap, and a token in several windows is a target in each. Tokens after the last
    full window are not used.
    """

    def __init__(self, offsets: np.ndarray, *, seq_len: int, stride: int) -> None:
        """``offsets``, int64 [documents + 1]: the first token of each document, and the end."""
        self._offsets, self._width, self._stride = offsets, seq_len + 1, stride
        self.num_rows = max(0, (int(offsets[-1]) - 1 - seq_len) // stride + 1)
        self.num_targets = self.num_rows * seq_len

    def pieces(self, rows_R: np.ndarray) -> Pieces:
        """Return the parts of documents in the windows; takes a binary search per window."""
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
        """Return the windows that overlap the document."""
        start, stop = int(self._offsets[document]), int(self._offsets[document + 1])
        first = max(0, (start - self._width) // self._stride + 1)
        last = min(self.num_rows - 1, (stop - 1) // self._stride)
        return np.arange(first, last + 1)


class BestFit:
    """Whole documents, and parts of longer ones.

    Each part repeats the last token of the previous part, so that each token of a document but the first is a target
    once. The first token is a target only if it follows the end of another document in its row, as with ``Concat``. It
    is not a target after a document that was cut, and the first token of a later part never is: the tokens before it do
    not predict it. The plan is in memory-mapped temporary files (12 bytes per part) and in memory (8 bytes per row).
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
        """Return the parts in the rows, longest first within a row."""
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
        """Return the rows that hold a part of the document; scans the whole plan."""
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
    """Cut documents into parts of at most ``seq_len + 1`` tokens; return their starts (int64) and lengths (int32)."""
    num_pairs = np.diff(offsets) - 1  # pairs of a token and its predecessor
    counts = np.maximum(1, -(-num_pairs // seq_len))
    within = _ranges(np.zeros_like(counts), counts) * seq_len
    starts = np.repeat(offsets[:-1], counts) + within
    lengths = np.minimum(np.repeat(num_pairs, counts) - within, seq_len) + 1
    return starts, lengths.astype(np.int32)


def best_fit(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Return the row of each piece, int64 [N], by best-fit decreasing (Johnson 1974); equal lengths keep their order.

    A piece goes into the row with the least sufficient space; among equal rows, into the one filled last. Rows are
    grouped by free space, and a bitmask of ``capacity`` bits marks the spaces in use: finding a row takes a few
    integer operations, independent of the number of rows.
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
    """Yield (first, last + 1) of consecutive documents that are packed together."""
    first, end = 0, len(offsets) - 1
    while first < end:
        full = int(np.searchsorted(offsets, offsets[first] + WINDOW_ROWS * seq_len))
        last = min(max(full, first + 1), first + WINDOW_DOCUMENTS, end)
        yield first, last
        first = last


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the concatenation of ``range(first, first + count)`` for each first and count."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - (ends - counts), counts)


class _Spool:
    """An array that grows in a temporary file."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._file, self._dtype = tempfile.TemporaryFile(), dtype  # noqa: SIM115 (the memory map outlives it)

    def append(self, values: np.ndarray) -> None:
        """Append values."""
        self._file.write(values.astype(self._dtype, copy=False).tobytes())

    def array(self) -> np.ndarray:
        """Return all appended values, memory-mapped."""
        size = self._file.tell()
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, mode="r")) if size else np.empty(0, self._dtype)
