"""Batches of pretraining rows: a pure function of (seed, step).

``lilpipe.tokens.data_phase`` maps steps to rows of streams, ``lilpipe.tokens.packing`` maps rows to parts of
documents. The loader has no state: a run resumes from its step number, and the batch does not depend on the world
size. ``lilpipe.tokens.trace`` finds the documents of any row of any step.

Shapes: B rows of a batch, T tokens of a row (``seq_len``), N pieces of documents in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase import DataPhase, PhaseStream, RowOrigins, Steps
from lilpipe.tokens.order import stream_key
from lilpipe.tokens.packing import BestFit, Concat, Packing, Pieces
from lilpipe.tokens.shards import TokenShards, TokenStream

IGNORED = -100
"""Target without loss: the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""
PADDING_DOCUMENT = -1
"""Document id of padding."""


class Batch(NamedTuple):
    """Rows of a step; int64 [B, T] each."""

    inputs: Tensor
    targets: Tensor
    """Next tokens; ``IGNORED`` where no loss is computed."""
    documents: Tensor
    """Document id of each input within its row, from 0; ``PADDING_DOCUMENT`` for padding. With document masking, a
    query attends only to keys of the same document (Llama 3)."""
    positions: Tensor
    """Position of each input in its document's part of the row, from 0."""


class DataPhasePlan(NamedTuple):
    """Plan of a data phase."""

    steps: Sequence[Steps]
    seq_len: int
    """Input tokens per row."""
    shares: Mapping[str, float]
    """Share of the training tokens of each stream; they add up to 1."""


class PretrainLoader:
    """Batches of training rows from streams in given shares.

    A data phase continues each stream where the previous data phase of the same ``seq_len`` stopped, so no row repeats
    before all others are read. Rows of different ``seq_len`` have independent orders.
    """

    def __init__(
        self,
        shards: TokenShards,
        plans: Sequence[DataPhasePlan],
        *,
        seed: int,
        packing: Literal["concat", "best_fit"] = "concat",
        stride: int | None = None,
    ) -> None:
        """Pack the streams and check that they can fill batches.

        Args:
            shards: Token shards to read.
            plans: Data phases of the run, in order, covering all steps from 0.
            seed: Seed of the row order.
            packing: How documents fill rows; see ``lilpipe.tokens.packing``.
            stride: Tokens between window starts of ``concat``; ``None`` means ``seq_len``.

        Raises:
            ConfigError: The shares do not add up to 1 or name an unknown stream.
            DataError: A stream has fewer rows than its share of one batch.
        """
        for plan in plans:
            _check_shares(plan.shares, shards.streams)
        self.shards, self._seed = shards, seed
        names = dict.fromkeys(name for plan in plans for name, share in plan.shares.items() if share > 0)
        self.streams = {name: shards.stream(name, "train") for name in names}
        self._names = list(names)
        self.data_phases: list[DataPhase] = []
        pack = cache(lambda name, seq_len: _pack(self.streams[name], seq_len=seq_len, packing=packing, stride=stride))
        for plan in plans:
            packings = {name: pack(name, plan.seq_len) for name, share in plan.shares.items() if share > 0}
            for name, packed in packings.items():
                _check_fills_batches(name, self.streams[name], packed, plan)
            self.data_phases.append(self._data_phase(plan, packings))
        self.num_steps = self.data_phases[-1].stop

    def _data_phase(self, plan: DataPhasePlan, packings: Mapping[str, Packing]) -> DataPhase:
        """Create the data phase that follows the existing ones."""
        alike = [data_phase for data_phase in self.data_phases if data_phase.seq_len == plan.seq_len]
        is_first = not self.data_phases or self.data_phases[0].seq_len == plan.seq_len
        sources = {
            name: PhaseStream(
                number=self._names.index(name),
                packing=packed,
                key=stream_key(self._seed, name if is_first else f"{name}/{plan.seq_len}"),
                begin=sum(data_phase.count(name) for data_phase in alike),
            )
            for name, packed in packings.items()
        }
        shares = _row_shares({name: plan.shares[name] for name in packings}, packings)
        return DataPhase(plan.steps, sources, shares=shares, seq_len=plan.seq_len)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of a step for one worker; B is the step's batch size / ``world_size``.

        Worker ``rank`` gets the rows ``rank``, ``rank + world_size``, ... of the batch.
        """
        rows = self.rows(step)
        assert len(rows.rows) % world_size == 0, f"batch_size {len(rows.rows)} over {world_size} workers"
        return self._assemble(self.data_phase_of(step), RowOrigins(*(values[rank::world_size] for values in rows)))

    # --- order ----------------------------------------------------------------------------------------------------

    def data_phase_of(self, step: int) -> DataPhase:
        """Return the data phase of a step."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        return next(data_phase for data_phase in self.data_phases if step < data_phase.stop)

    def rows(self, step: int) -> RowOrigins:
        """Return where the rows of a step come from."""
        return self.data_phase_of(step).rows(step)

    # --- amounts --------------------------------------------------------------------------------------------------

    def num_targets(self, name: str) -> float:
        """Return the number of targets of the run from a stream; a partial epoch counts in proportion to its rows."""
        return sum(data_phase.num_targets(name) for data_phase in self.data_phases)

    def epochs(self, name: str) -> float:
        """Return how often the run trains on a token of a stream, on average."""
        return self.num_targets(name) / self.streams[name].num_tokens

    # --- tokens ---------------------------------------------------------------------------------------------------

    def pieces(self, data_phase: DataPhase, rows: RowOrigins) -> tuple[np.ndarray, Pieces]:
        """Return the pieces in rows of a data phase, and the stream index of each piece, int64 [N]."""
        parts, streams = [], []
        for source in data_phase.sources.values():
            chosen = np.flatnonzero(rows.streams == source.number)
            if len(chosen):
                pieces = source.packing.pieces(rows.rows[chosen])
                parts.append(pieces._replace(rows=chosen[pieces.rows]))
                streams.append(np.full(len(pieces.rows), source.number))
        if len(parts) == 1:
            return streams[0], parts[0]
        order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
        joined = Pieces(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))
        return np.concatenate(streams)[order], joined

    def _assemble(self, data_phase: DataPhase, rows: RowOrigins) -> Batch:
        streams_N, pieces = self.pieces(data_phase, rows)
        num_rows, seq_len, width = len(rows.rows), data_phase.seq_len, data_phase.seq_len + 1
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
        documents, positions = _number(pieces.rows, lengths_N, firsts_B, used_B, seq_len=seq_len)
        severed = begins_N[~pieces.follows]
        if len(severed):
            row, column = np.divmod(severed, width)
            targets[row[column > 0], column[column > 0] - 1] = IGNORED
        if used_B.min() < width:
            columns_T = np.arange(seq_len)
            padding = columns_T >= used_B[:, None]
            inputs[padding] = self.shards.tokenizer.padding_id
            documents[padding], positions[padding] = PADDING_DOCUMENT, 0
            targets[columns_T >= used_B[:, None] - 1] = IGNORED
        return Batch(*map(torch.from_numpy, (inputs, targets, documents, positions)))


def _number(
    rows_N: np.ndarray, lengths_N: np.ndarray, firsts_B: np.ndarray, used_B: np.ndarray, *, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``documents`` and ``positions`` of a batch, [B, T] each; padding counts as the row's last document."""
    lengths_N = lengths_N.copy()
    lengths_N[np.append(firsts_B[1:], len(lengths_N)) - 1] += seq_len - used_B  # the last target is not an input
    documents = np.repeat(np.arange(len(lengths_N)) - firsts_B[rows_N], lengths_N)
    positions = np.arange(len(documents))
    positions -= np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)
    return documents.reshape(-1, seq_len), positions.reshape(-1, seq_len)


def _reads(streams_N: np.ndarray, pieces: Pieces, begins: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Return reads as (stream, offset in the flattened rows, first token, end); contiguous pieces are one read."""
    new = np.ones(len(begins), dtype=bool)
    new[1:] = (pieces.rows[1:] != pieces.rows[:-1]) | (pieces.starts[1:] != pieces.stops[:-1])
    last = np.append(new[1:], True)
    columns = (streams_N[new], begins[new], pieces.starts[new], pieces.stops[last])
    return zip(*(column.tolist() for column in columns), strict=True)


# --- validation ---------------------------------------------------------------------------------------------------


def validation_rows(shards: TokenShards, stream: str, *, num_rows: int, seq_len: int) -> tuple[Tensor, Tensor, int]:
    """Return validation rows for bits per byte, evenly spaced over the stream's validation split.

    Returns inputs and targets, int64 [B, T], and the number of text bytes that the targets encode. End-of-document
    targets have 0 bytes, but their loss counts. B is ``num_rows``, or the number of available windows if smaller.
    Raises ``DataError`` if the split does not fill a row.
    """
    tokens = shards.stream(stream, "validation")
    num_windows = tokens.num_windows(seq_len)
    if num_windows == 0:
        raise DataError(
            f"validation split of stream {stream!r}: got {tokens.num_tokens} tokens, expected at least {seq_len + 1} "
            "for one row; add documents, raise tokens.validation_ratio or lower the model's max_seq_len"
        )
    num_rows = min(num_rows, num_windows)
    starts = [index * num_windows // num_rows * seq_len for index in range(num_rows)]
    rows = np.stack([tokens.read(start, start + seq_len + 1) for start in starts]).astype(np.int64)  # [B, T + 1]
    inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    return torch.from_numpy(inputs), torch.from_numpy(targets), int(shards.token_bytes[targets].sum())


def corpus_validation_shares(shards: TokenShards, *, seq_len: int) -> dict[str, float]:
    """Return the weight of each corpus stream in the corpus bits per byte: its share of the bytes of validation text.

    The weights do not depend on the mixture, so runs with different mixtures are comparable. Streams that do not fill
    a row are left out. If no stream fills a row, the first one gets weight 1, and ``validation_rows`` raises
    ``DataError``.
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
    """Convert shares of tokens to shares of rows: the amount of padding per row differs between streams."""
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


def _check_fills_batches(name: str, stream: TokenStream, packing: Packing, plan: DataPhasePlan) -> None:
    for steps in plan.steps:
        share = plan.shares[name]
        got, expected = packing.num_rows, math.ceil(round(share * steps.batch_size, 6))
        if got < expected or packing.num_targets == 0:
            of = f"the phase from step {steps.first:,}" if steps.first else "pretrain"
            raise DataError(
                f"training split of stream {name!r}: got {got} rows of {plan.seq_len} tokens ({stream.num_tokens} "
                f"tokens in all), expected at least {max(expected, 1)} for one batch ({share:.0%} of batch_size "
                f"{steps.batch_size}); add documents, or lower batch_size or seq_len of {of}"
            )
