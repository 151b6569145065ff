"""Row order as a pure function of the step: resuming needs only the step number."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lilpipe.config.reward_model import ClassifyConfig, RewardModelConfig
from lilpipe.errors import DataError
from lilpipe.seeds import derive_seed


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Return the row indices of one optimizer step; each epoch shuffles all rows with its own seed."""
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_rows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            orders[epoch] = torch.randperm(num_rows, generator=generator).tolist()
        rows.append(orders[epoch][offset])
    return rows


def rows_by_micro_batch(
    step: int, lengths: Sequence[int], config: RewardModelConfig | ClassifyConfig, *, rank: int, world_size: int
) -> list[list[int]]:
    """Return the row indices of each micro-batch of an optimizer step, for one of ``world_size`` data ranks.

    Rows are sorted by length, so ranks get similar lengths, and each micro-batch has rows of similar length.
    """
    rows = rows_of_step(step, num_rows=len(lengths), batch_size=config.batch_size, seed=config.seed or 0)
    rows.sort(key=lengths.__getitem__)
    mine = rows[rank::world_size]
    size = len(mine) // config.accumulation_steps
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def count_steps(num_rows: int, *, num_epochs: int, batch_size: int, stage: str, rows: str, remedy: str) -> int:
    """Return the number of optimizer steps of all epochs. Raises ``DataError`` if there are fewer rows than a batch."""
    if num_rows < batch_size:
        raise DataError(
            f"{stage}: got {num_rows} {rows}, expected at least one batch of {batch_size}; lower {stage}.batch_size or "
            f"{remedy}"
        )
    return num_epochs * num_rows // batch_size
