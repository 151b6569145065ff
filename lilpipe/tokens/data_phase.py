"""A data phase: consecutive training steps that read rows from the same packings in the same shares.

A run without phases is a single data phase. So is a batch ramp: the order of rows is the same as without the ramp,
and only the number of rows per step changes. A data phase maps a position in this order to a row, and a row to its
positions; both are pure functions.

Shapes: R rows of a step, N positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from lilpipe.tokens.order import Interleaving, permute, unpermute
from lilpipe.tokens.packing import Packing

STEPS_AT_ONCE = 16
"""Steps whose row order is computed together: for small batches, numpy takes about as long for one step as for 16."""


class Steps(NamedTuple):
    """The steps ``first`` to ``stop - 1`` of a run, with one batch size."""

    first: int
    stop: int
    batch_size: int
    """Rows of a step, over all workers."""


class RowOrigins(NamedTuple):
    """Where rows come from; int64 [R] each."""

    streams: np.ndarray
    """Index of the stream in ``PretrainLoader.streams``."""
    epochs: np.ndarray
    """Number of earlier epochs over the stream, in the data phase's packing."""
    rows: np.ndarray
    """Index of the row in the stream's packing."""


class PhaseStream(NamedTuple):
    """A stream as a data phase reads it."""

    number: int
    """Index of the stream in ``PretrainLoader.streams``."""
    packing: Packing
    key: int
    """64-bit key of the permutation of its rows."""
    begin: int
    """Number of rows of this order that earlier data phases read."""


class DataPhase:
    """Rows from several sources in given shares, step by step."""

    def __init__(
        self, steps: Sequence[Steps], sources: Mapping[str, PhaseStream], *, shares: Mapping[str, float], seq_len: int
    ) -> None:
        """Create the order of rows.

        Args:
            steps: Consecutive groups of steps.
            sources: Sources by stream name.
            shares: Share of rows of each source; they add up to 1.
            seq_len: Input tokens per row.
        """
        self.steps, self.seq_len = tuple(steps), seq_len
        self.interleaving = Interleaving(shares)
        self.sources = {name: sources[name] for name in self.interleaving.names}
        self._numbers, self._sizes, self._begins = (
            np.array(values)
            for values in zip(*((s.number, s.packing.num_rows, s.begin) for s in self.sources.values()), strict=True)
        )
        self._keys = np.array([source.key for source in self.sources.values()], dtype=np.uint64)
        # Position of the first row of each of `steps`, and the end.
        self._places = list(accumulate(((s.stop - s.first) * s.batch_size for s in steps), initial=0))
        self._rows_of_block = lru_cache(maxsize=2)(self._compute_rows_of_block)

    @property
    def stop(self) -> int:
        """The first step after the data phase."""
        return self.steps[-1].stop

    def count(self, name: str) -> int:
        """Return the number of rows that a stream contributes."""
        return self.interleaving.count(name, self._places[-1])

    def num_targets(self, name: str) -> float:
        """Return the number of targets from a stream; a partial epoch counts in proportion to its rows."""
        if name not in self.sources:
            return 0.0
        packing = self.sources[name].packing
        return self.count(name) * packing.num_targets / packing.num_rows

    def rows(self, step: int) -> RowOrigins:
        """Return where the rows of a step come from; R is the step's batch size."""
        part = next(index for index, steps in enumerate(self.steps) if step < steps.stop)
        block, within = divmod(step - self.steps[part].first, STEPS_AT_ONCE)
        size = self.steps[part].batch_size
        return RowOrigins(*(values[within * size : (within + 1) * size] for values in self._rows_of_block(part, block)))

    def _compute_rows_of_block(self, part: int, block: int) -> RowOrigins:
        num_places = STEPS_AT_ONCE * self.steps[part].batch_size
        first = self._places[part] + block * num_places
        chosen, before = self.interleaving.at(np.arange(first, first + num_places))
        sizes = self._sizes[chosen]
        epochs, indices = np.divmod(before + self._begins[chosen], sizes)
        return RowOrigins(self._numbers[chosen], epochs, permute(indices, sizes, self._keys[chosen], epochs))

    def sightings(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return when rows of a stream's packing are read.

        Returns four int64 [sightings] arrays, sorted by step and row: step, row in its batch, epoch, and row of the
        packing (one of ``rows``).
        """
        source, count = self.sources[name], self.count(name)
        size, begin = source.packing.num_rows, source.begin
        touched = np.arange(begin // size, -(-(begin + count) // size))
        epochs, images = np.repeat(touched, len(rows)), np.tile(rows, len(touched))
        keys = np.full(len(images), source.key, dtype=np.uint64)
        before = epochs * size + unpermute(images, np.full_like(images, size), keys, epochs) - begin
        here = (before >= 0) & (before < count)
        places = self.interleaving.places(name, before[here])
        order = np.argsort(places)
        return *self._steps_at(places[order]), epochs[here][order], images[here][order]

    def _steps_at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return step and row in its batch of each position, int64 [N] each."""
        parts = np.searchsorted(self._places, places, side="right") - 1
        firsts, _, sizes = (np.array(column)[parts] for column in zip(*self.steps, strict=True))
        steps, rows = np.divmod(places - np.array(self._places)[parts], sizes)
        return firsts + steps, rows
