"""Batches of pretraining rows: a pure function of (seed, step).

``lilpipe.tokens.order`` says which row of which stream stands where, ``lilpipe.tokens.packing`` which parts of
documents a row holds. The loader has no state: resuming is an integer, the world size does not matter, and
``lilpipe.tokens.trace`` says which documents any row of any step held.

Shapes: B rows of a batch, T tokens of a row (``seq_len``), R rows asked for, N pieces of documents in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.order import Interleaving, permute, stream_key, unpermute
from lilpipe.tokens.packing import BestFit, Concat, Packing, Pieces
from lilpipe.tokens.shards import TokenShards, TokenStream

IGNORED = -100
"""Target that counts for nothing, as ``torch.nn.functional.cross_entropy`` has it."""
PADDING_DOCUMENT = -1
STEPS_AT_ONCE = 16
"""Steps whose order is computed together: of a small batch numpy takes about as long for one as for these."""


class Batch(NamedTuple):
    """Rows of a step; int64 [B, T] each."""

    inputs: Tensor
    targets: Tensor
    """The tokens one on; ``IGNORED`` where there is nothing to predict."""
    documents: Tensor
    """Which document of its row an input belongs to, from 0; ``PADDING_DOCUMENT`` for padding. Attention stays inside
    a document where a query and a key have the same number (Llama 3)."""
    positions: Tensor
    """Place of an input in what the row holds of its document, from 0."""


class Rows(NamedTuple):
    """Where rows come from; int64 [R] each."""

    streams: np.ndarray
    """Number of the stream in ``PretrainLoader.streams``."""
    epochs: np.ndarray
    """How many passes over the stream come before."""
    rows: np.ndarray
    """Number of the row in its stream's packing."""


class PretrainLoader:
    """Batches of training rows from streams in given shares."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        shares: Mapping[str, float],
        seq_len: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        packing: Literal["concat", "best_fit"] = "concat",
        stride: int | None = None,
    ) -> None:
        """Pack the streams, and check that they can fill a batch.

        Args:
            shards: Where tokens come from.
            shares: Share of the training tokens of each stream; they add up to 1.
            seq_len: Inputs of a row.
            batch_size: Rows of a step, over all workers.
            num_steps: Steps of the run.
            seed: Seed of the order of rows.
            packing: How documents fill rows; see ``lilpipe.tokens.packing``.
            stride: Tokens between windows of ``concat``; ``seq_len`` where none is given.

        Raises:
            ConfigError: The shares do not add up to 1 or name a stream that is not there.
            DataError: A stream has fewer rows than one batch takes of it.
        """
        _check_shares(shares, shards.streams)
        names = [name for name, share in shares.items() if share > 0]
        self.shards = shards
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.streams = {name: shards.stream(name, "train") for name in names}
        self.packings: dict[str, Packing] = {
            name: _pack(stream, seq_len=seq_len, packing=packing, stride=stride)
            for name, stream in self.streams.items()
        }
        for name, packed in self.packings.items():
            _check_fills_batch(name, self.streams[name], packed, share=shares[name], batch_size=batch_size)
        self.interleaving = Interleaving(_row_shares({name: shares[name] for name in names}, self.packings))
        self.streams = {name: self.streams[name] for name in self.interleaving.names}
        self._names = list(self.streams)
        self._num_rows = np.array([self.packings[name].num_rows for name in self._names])
        self._keys = np.array([stream_key(seed, name) for name in self._names], dtype=np.uint64)
        self._rows_of_block = lru_cache(maxsize=2)(self._compute_rows_of_block)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a step for one worker, B = batch_size / world_size.

        Worker ``rank`` holds the batch's rows ``rank``, ``rank + world_size``, ...
        """
        assert self.batch_size % world_size == 0, f"batch_size {self.batch_size} over {world_size} workers"
        rows = self.rows(step)
        return self._assemble(Rows(*(values[rank::world_size] for values in rows)))

    # --- order ----------------------------------------------------------------------------------------------------

    def rows(self, step: int) -> Rows:
        """Where the rows of a step come from, R = batch_size."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        block, within = divmod(step, STEPS_AT_ONCE)
        first = within * self.batch_size
        return Rows(*(values[first : first + self.batch_size] for values in self._rows_of_block(block)))

    def _compute_rows_of_block(self, block: int) -> Rows:
        num_places = STEPS_AT_ONCE * self.batch_size
        streams, before = self.interleaving.at(np.arange(block * num_places, (block + 1) * num_places))
        sizes = self._num_rows[streams]
        epochs, indices = np.divmod(before, sizes)
        return Rows(streams, epochs, permute(indices, sizes, self._keys[streams], epochs))

    def sightings(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When rows of a stream are read: places of the run (step x batch_size + row), ascending, and at each the
        epoch and which of ``rows`` it is, int64 [sightings] each.
        """
        number, size = self._names.index(name), self.packings[name].num_rows
        num_places = self.num_steps * self.batch_size
        num_epochs = -(-self.interleaving.count(name, num_places) // size)
        epochs, images = np.repeat(np.arange(num_epochs), len(rows)), np.tile(rows, num_epochs)
        indices = unpermute(images, np.full_like(images, size), np.full(len(images), self._keys[number]), epochs)
        places = self.interleaving.places(name, epochs * size + indices)
        order = np.argsort(places)
        order = order[places[order] < num_places]
        return places[order], epochs[order], images[order]

    # --- amounts --------------------------------------------------------------------------------------------------

    def num_targets(self, name: str) -> float:
        """Targets of the run that come from a stream: those of its rows, and of a pass that is cut off its share."""
        packed = self.packings[name]
        num_rows = self.interleaving.count(name, self.num_steps * self.batch_size)
        return num_rows * packed.num_targets / packed.num_rows

    def epochs(self, name: str) -> float:
        """How often the run trains on a token of a stream, on average."""
        return self.num_targets(name) / self.streams[name].num_tokens

    # --- tokens ---------------------------------------------------------------------------------------------------

    def pieces(self, rows: Rows) -> tuple[np.ndarray, Pieces]:
        """What rows hold: of each piece the number of its stream, int64 [N], and where it lies."""
        parts, streams = [], []
        for number, name in enumerate(self._names):
            chosen = np.flatnonzero(rows.streams == number)
            if len(chosen):
                pieces = self.packings[name].pieces(rows.rows[chosen])
                parts.append(pieces._replace(rows=chosen[pieces.rows]))
                streams.append(np.full(len(pieces.rows), number))
        if len(parts) == 1:
            return streams[0], parts[0]
        order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
        joined = Pieces(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))
        return np.concatenate(streams)[order], joined

    def _assemble(self, rows: Rows) -> Batch:
        streams_N, pieces = self.pieces(rows)
        num_rows, width = len(rows.rows), self.seq_len + 1
        lengths_N = pieces.stops - pieces.starts
        firsts_B = np.searchsorted(pieces.rows, np.arange(num_rows))  # first piece of each row
        used_B = np.add.reduceat(lengths_N, firsts_B)  # tokens of each row
        before_N = np.cumsum(lengths_N) - lengths_N
        begins_N = before_N - (before_N[firsts_B] - np.arange(num_rows) * width)[pieces.rows]
        tokens = np.empty((num_rows, width), dtype=np.int64)
        flat = tokens.reshape(-1)
        for stream, begin, start, stop in _reads(streams_N, pieces, begins_N):
            flat[begin : begin + stop - start] = self.streams[self._names[stream]].read(start, stop)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        documents, positions = _number(pieces.rows, lengths_N, firsts_B, used_B, seq_len=self.seq_len)
        severed = begins_N[~pieces.follows]
        if len(severed):
            row, column = np.divmod(severed, width)
            targets[row[column > 0], column[column > 0] - 1] = IGNORED
        if used_B.min() < width:
            columns_T = np.arange(self.seq_len)
            padding = columns_T >= used_B[:, None]
            inputs[padding] = self.shards.tokenizer.padding_id
            documents[padding], positions[padding] = PADDING_DOCUMENT, 0
            targets[columns_T >= used_B[:, None] - 1] = IGNORED
        return Batch(*map(torch.from_numpy, (inputs, targets, documents, positions)))


def _number(
    rows_N: np.ndarray, lengths_N: np.ndarray, firsts_B: np.ndarray, used_B: np.ndarray, *, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """``documents`` and ``positions`` of a batch, [B, T] each, padding counted with the last document of its row."""
    lengths_N = lengths_N.copy()
    lengths_N[np.append(firsts_B[1:], len(lengths_N)) - 1] += seq_len - used_B  # the last target is no input
    documents = np.repeat(np.arange(len(lengths_N)) - firsts_B[rows_N], lengths_N)
    positions = np.arange(len(documents))
    positions -= np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)
    return documents.reshape(-1, seq_len), positions.reshape(-1, seq_len)


def _reads(streams_N: np.ndarray, pieces: Pieces, begins: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Stream, place in the rows end to end, first token and end of each read; pieces that lie end to end are one."""
    new = np.ones(len(begins), dtype=bool)
    new[1:] = (pieces.rows[1:] != pieces.rows[:-1]) | (pieces.starts[1:] != pieces.stops[:-1])
    last = np.append(new[1:], True)
    columns = (streams_N[new], begins[new], pieces.starts[new], pieces.stops[last])
    return zip(*(column.tolist() for column in columns), strict=True)


# --- validation ---------------------------------------------------------------------------------------------------


def validation_rows(shards: TokenShards, stream: str, *, num_rows: int, seq_len: int) -> tuple[Tensor, Tensor, int]:
    """Held-out rows for bits per byte, spread evenly over the stream's validation split.

    Returns inputs and targets, int64 [B, T], and the bytes of text that the targets stand for. A document's end is
    a target of no bytes: what it costs is part of what the text costs. B is ``num_rows``, or all the windows that
    there are. Raises ``DataError`` where there is none.
    """
    tokens = shards.stream(stream, "validation")
    num_windows = tokens.num_windows(seq_len)
    if num_windows == 0:
        raise DataError(
            f"validation split of stream {stream!r}: got {tokens.num_tokens} tokens, expected at least {seq_len + 1} "
            "for one row; add documents, raise tokens.validation_share or lower the model's max_seq_len"
        )
    num_rows = min(num_rows, num_windows)
    starts = [index * num_windows // num_rows * seq_len for index in range(num_rows)]
    rows = np.stack([tokens.read(start, start + seq_len + 1) for start in starts]).astype(np.int64)  # [B, T + 1]
    inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    return torch.from_numpy(inputs), torch.from_numpy(targets), int(shards.token_bytes[targets].sum())


def corpus_validation_shares(shards: TokenShards, *, seq_len: int) -> dict[str, float]:
    """Weights of the corpus's streams in its bits per byte: their shares of the bytes of validation text.

    The mixture has no part in it, so that runs with different ones can be compared. A stream that does not fill a
    row is left out; where none does, the first stands for all, and ``validation_rows`` says what it lacks.
    """
    streams = {name: shards.stream(name, "validation") for name in shards.corpus_streams}
    num_bytes = {name: stream.num_bytes for name, stream in streams.items() if stream.num_windows(seq_len)}
    num_bytes = num_bytes or dict.fromkeys(shards.corpus_streams[:1], 1)
    return {name: count / sum(num_bytes.values()) for name, count in num_bytes.items()}


# --- set-up -------------------------------------------------------------------------------------------------------


def _pack(stream: TokenStream, *, seq_len: int, packing: str, stride: int | None) -> Packing:
    if packing == "best_fit":
        return BestFit(stream.offsets, seq_len=seq_len)
    return Concat(stream.offsets, seq_len=seq_len, stride=stride or seq_len)


def _row_shares(shares: Mapping[str, float], packings: Mapping[str, Packing]) -> dict[str, float]:
    """Shares of rows for shares of tokens: rows of some streams hold more padding than those of others."""
    rows = {name: share * packings[name].num_rows / packings[name].num_targets for name, share in shares.items()}
    return {name: count / sum(rows.values()) for name, count in rows.items()}


def _check_shares(shares: Mapping[str, float], streams: Sequence[str]) -> None:
    if missing := sorted(name for name, share in shares.items() if share > 0 and name not in streams):
        raise ConfigError(
            f"shares: got {', '.join(map(repr, missing))}, expected streams of the tokens: {', '.join(streams)}; "
            "set the share to 0 or rerun stage `tokens` with that stream"
        )
    if abs(sum(shares.values()) - 1) > 1e-4:
        raise ConfigError(f"shares: got {dict(shares)}, expected shares that add up to 1")


def _check_fills_batch(name: str, stream: TokenStream, packing: Packing, *, share: float, batch_size: int) -> None:
    got, expected = packing.num_rows, math.ceil(round(share * batch_size, 6))
    if got < expected or packing.num_targets == 0:
        raise DataError(
            f"training split of stream {name!r}: got {got} rows ({stream.num_tokens} tokens in all), expected at "
            f"least {max(expected, 1)} for one batch ({share:.0%} of batch_size {batch_size}); add documents, or lower "
            "pretrain.batch_size or pretrain.model.max_seq_len"
        )
