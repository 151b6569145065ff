"""The order of pretraining rows: a pure function of (seed, step).

A row is a window of ``seq_len + 1`` tokens of one source's stream; windows lie at a stride of ``seq_len``, so that
each token but the first is a target once in an epoch. Row ``k`` of the run takes its source from a fixed
interleaving that keeps to the shares at every prefix, and its window from a permutation of that source's windows,
another one in each epoch. The loader has no state: resuming is an integer, the world size does not matter, and
``locate`` says which documents any row of any step held.

Shapes: B rows of a batch, T tokens of a row (``seq_len``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.shards import TokenShards, TokenStream


@dataclass(frozen=True)
class Row:
    """Where a row comes from: a source, and a window of its stream in one of the epochs over it."""

    source: str
    epoch: int
    window: int


class PretrainLoader:
    """Batches of training rows from the sources in given shares."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        shares: Mapping[str, float],
        seq_len: int,
        batch_size: int,
        num_steps: int,
        seed: int,
    ) -> None:
        """Check that the shards can fill a batch.

        Args:
            shards: Where tokens come from.
            shares: Share of rows of each source; they add up to 1.
            seq_len: Inputs of a row.
            batch_size: Rows of a step, over all workers.
            num_steps: Steps of the run.
            seed: Seed of the order of windows.

        Raises:
            ConfigError: The shares do not add up to 1 or name a source that is not there.
            DataError: A source has fewer windows than one batch takes of it.
        """
        self.shards = shards
        self.shares = _exact_shares(shares, shards.sources)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.streams = {source: shards.stream(source, "train") for source in self.shares}
        for source, stream in self.streams.items():
            _check_fills_batch(source, stream, share=self.shares[source], seq_len=seq_len, batch_size=batch_size)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step for one worker, int64 [B, T] each with B = batch_size / world_size.

        Worker ``rank`` holds the batch's rows ``rank``, ``rank + world_size``, ...
        """
        assert self.batch_size % world_size == 0, f"batch_size {self.batch_size} over {world_size} workers"
        windows = [self._tokens(self.row(step, index)) for index in range(rank, self.batch_size, world_size)]
        return _inputs_and_targets(windows)

    def row(self, step: int, index: int) -> Row:
        """Source, epoch and window of one row of a step."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        assert 0 <= index < self.batch_size, f"row {index} of {self.batch_size}"
        source, position = interleave(step * self.batch_size + index, self.shares)
        num_windows = self.streams[source].num_windows(self.seq_len)
        epoch, position = divmod(position, num_windows)
        return Row(source, epoch, permute(position, num_windows, key=f"{self.seed}/{source}/{epoch}"))

    def locate(self, step: int, index: int) -> list[tuple[str, str]]:
        """Id and source of the documents that one row of a step held, in their order."""
        row = self.row(step, index)
        start = row.window * self.seq_len
        return self.streams[row.source].documents(start, start + self.seq_len + 1)

    def epochs(self, source: str) -> float:
        """How often the run reads each window of a source, on average."""
        rows = self.shares[source] * self.num_steps * self.batch_size
        return float(rows / self.streams[source].num_windows(self.seq_len))

    def validation(self, source: str, num_rows: int) -> tuple[Tensor, Tensor, int]:
        """``validation_rows`` of a source at the training length."""
        return validation_rows(self.shards, source, num_rows=num_rows, seq_len=self.seq_len)

    def _tokens(self, row: Row) -> np.ndarray:
        start = row.window * self.seq_len
        return self.streams[row.source].read(start, start + self.seq_len + 1)


def validation_rows(shards: TokenShards, source: str, *, num_rows: int, seq_len: int) -> tuple[Tensor, Tensor, int]:
    """Held-out rows for bits per byte, spread evenly over the source's validation stream.

    Returns inputs and targets, int64 [B, T], and the bytes of text that the targets stand for. A document's end is
    a target of no bytes: what it costs is part of what the text costs. B is ``num_rows``, or all the windows that
    there are. Raises ``DataError`` where there is none.
    """
    stream = shards.stream(source, "validation")
    num_windows = stream.num_windows(seq_len)
    if num_windows == 0:
        raise DataError(
            f"validation split of source {source!r}: got {stream.num_tokens} tokens, expected at least {seq_len + 1} "
            "for one row; add documents, raise tokens.validation_share or lower the model's max_seq_len"
        )
    num_rows = min(num_rows, num_windows)
    starts = [index * num_windows // num_rows * seq_len for index in range(num_rows)]
    inputs_BT, targets_BT = _inputs_and_targets([stream.read(start, start + seq_len + 1) for start in starts])
    return inputs_BT, targets_BT, int(shards.token_bytes[targets_BT.numpy()].sum())


def _inputs_and_targets(windows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack(windows).astype(np.int64))  # [B, T + 1]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --- order --------------------------------------------------------------------------------------------------------


def interleave(index: int, shares: Mapping[str, Fraction]) -> tuple[str, int]:
    """Source of the ``index``-th row of all, and how many rows of that source come before it.

    With two sources, of any first n rows a source has its share of n to within half a row (Bresenham's line). Of
    more sources, the first is set apart from the rest, and then the second from what is left, and so on.
    """
    left = Fraction(1)
    *sources, last = shares
    for source in sources:
        share = shares[source] / left
        before = _rounded(index * share)
        if _rounded((index + 1) * share) > before:
            return source, before
        index -= before
        left -= shares[source]
    return last, index


def _rounded(value: Fraction) -> int:
    """The nearest integer, halves upwards."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def permute(index: int, size: int, *, key: str) -> int:
    """Image of ``index`` under a random permutation of ``range(size)`` that ``key`` picks.

    A Feistel network over the smallest square of a power of two that holds ``size``, walked until it comes out
    below ``size`` (Black and Rogaway 2002). It takes constant memory; a shuffled list of the windows of a large
    corpus would take gigabytes on each worker.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for step in range(6):
            digest = hashlib.blake2b(f"{key}/{step}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


# --- checks -------------------------------------------------------------------------------------------------------


def _exact_shares(shares: Mapping[str, float], sources: Sequence[str]) -> dict[str, Fraction]:
    """Shares as fractions, to a millionth, without the sources that have none."""
    exact = {name: Fraction(share).limit_denominator(1_000_000) for name, share in shares.items() if share > 0}
    if missing := sorted(exact.keys() - set(sources)):
        raise ConfigError(
            f"shares: got {', '.join(map(repr, missing))}, expected sources of the tokens: {', '.join(sources)}; "
            "set the share to 0 or rerun stage `tokens` with that source"
        )
    if abs(sum(exact.values()) - 1) > Fraction(1, 10_000):
        raise ConfigError(f"shares: got {dict(shares)}, expected shares that add up to 1")
    *first, last = exact
    exact[last] = 1 - sum((exact[name] for name in first), Fraction(0))
    return exact


def _check_fills_batch(source: str, stream: TokenStream, *, share: Fraction, seq_len: int, batch_size: int) -> None:
    got, expected = stream.num_windows(seq_len), -(-share * batch_size // 1)
    if got < expected:
        raise DataError(
            f"training split of source {source!r}: got {got} rows of {seq_len + 1} tokens ({stream.num_tokens} tokens "
            f"in all), expected at least {expected} for one batch ({float(share):.0%} of batch_size {batch_size}); "
            "add documents, or lower pretrain.batch_size or pretrain.model.max_seq_len"
        )
