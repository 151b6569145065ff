"""A data phase of a run: consecutive steps that take their rows from the same packings in the same shares.

A run without phases is one, and a batch ramp is too: its rows come in the order that they would have without the
ramp, each step a longer piece of it. A data phase says which row stands at which place, and where any row stands;
both are pure functions.

Shapes: R rows of a step, N places.
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
"""Steps whose order is computed together: of a small batch numpy takes about as long for one as for these."""


class Steps(NamedTuple):
    """The steps ``first`` to ``stop - 1`` of a run, with batches of one size."""

    first: int
    stop: int
    batch_size: int
    """Rows of a step, over all workers."""


class Rows(NamedTuple):
    """Where rows come from; int64 [R] each."""

    streams: np.ndarray
    """Number of the stream in ``PretrainLoader.streams``."""
    epochs: np.ndarray
    """How many passes over the stream come before, in the data phase's packing."""
    rows: np.ndarray
    """Number of the row in the stream's packing."""


class Source(NamedTuple):
    """A stream as a data phase reads it."""

    number: int
    """Of the stream in ``PretrainLoader.streams``."""
    packing: Packing
    key: int
    """64-bit key of the order of its rows."""
    begin: int
    """Rows of this order that earlier data phases took."""


class DataPhase:
    """Rows from sources in given shares, step by step."""

    def __init__(
        self, steps: Sequence[Steps], sources: Mapping[str, Source], *, shares: Mapping[str, float], seq_len: int
    ) -> None:
        """``shares`` of rows add up to 1; ``steps`` follow each other. Sources by the name of their stream."""
        self.steps, self.seq_len = tuple(steps), seq_len
        self.interleaving = Interleaving(shares)
        self.sources = {name: sources[name] for name in self.interleaving.names}
        self._numbers, self._sizes, self._begins = (
            np.array(values)
            for values in zip(*((s.number, s.packing.num_rows, s.begin) for s in self.sources.values()), strict=True)
        )
        self._keys = np.array([source.key for source in self.sources.values()], dtype=np.uint64)
        # The place of the first row of each of `steps`, and the end.
        self._places = list(accumulate(((s.stop - s.first) * s.batch_size for s in steps), initial=0))
        self._rows_of_block = lru_cache(maxsize=2)(self._compute_rows_of_block)

    @property
    def stop(self) -> int:
        """The first step after it."""
        return self.steps[-1].stop

    def count(self, name: str) -> int:
        """How many of its rows a stream gives."""
        return self.interleaving.count(name, self._places[-1])

    def num_targets(self, name: str) -> float:
        """Targets that come from a stream: those of its rows, and of a pass that is cut off its share."""
        if name not in self.sources:
            return 0.0
        packing = self.sources[name].packing
        return self.count(name) * packing.num_targets / packing.num_rows

    def rows(self, step: int) -> Rows:
        """Where the rows of a step come from, R = its batch size."""
        part = next(index for index, steps in enumerate(self.steps) if step < steps.stop)
        block, within = divmod(step - self.steps[part].first, STEPS_AT_ONCE)
        size = self.steps[part].batch_size
        return Rows(*(values[within * size : (within + 1) * size] for values in self._rows_of_block(part, block)))

    def _compute_rows_of_block(self, part: int, block: int) -> Rows:
        num_places = STEPS_AT_ONCE * self.steps[part].batch_size
        first = self._places[part] + block * num_places
        chosen, before = self.interleaving.at(np.arange(first, first + num_places))
        sizes = self._sizes[chosen]
        epochs, indices = np.divmod(before + self._begins[chosen], sizes)
        return Rows(self._numbers[chosen], epochs, permute(indices, sizes, self._keys[chosen], epochs))

    def sightings(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """When rows of a stream's packing are read, int64 [sightings] each: step and row in its batch, in that order,
        and at each the epoch and which of ``rows`` it is.
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
        """Step and row in its batch of each place, int64 [N] each."""
        parts = np.searchsorted(self._places, places, side="right") - 1
        firsts, _, sizes = (np.array(column)[parts] for column in zip(*self.steps, strict=True))
        steps, rows = np.divmod(places - np.array(self._places)[parts], sizes)
        return firsts + steps, rows
