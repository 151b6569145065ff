"""The order of rows, a pure function of a position: to resume is to know one integer."""

from __future__ import annotations

import torch

from lilpipe.errors import ConfigError, DataError
from lilpipe.seeds import derive_seed


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the rows of one step; each epoch goes through all rows in an order of its own."""
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_rows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            orders[epoch] = torch.randperm(num_rows, generator=generator).tolist()
        rows.append(orders[epoch][offset])
    return rows


def count_steps(
    num_rows: int, *, num_epochs: int, batch_size: int, num_workers: int, stage: str, rows: str, remedy: str
) -> int:
    """Optimizer steps of all epochs together, by workers that share each batch.

    Raises ``ConfigError`` for a batch that they cannot share, ``DataError`` for fewer rows than a batch.
    """
    if batch_size % num_workers:
        raise ConfigError(f"{stage}.batch_size: got {batch_size}, expected a multiple of num_workers {num_workers}")
    if num_rows < batch_size:
        raise DataError(
            f"{stage}: got {num_rows} {rows}, expected at least one batch of {batch_size}; lower {stage}.batch_size or "
            f"{remedy}"
        )
    return num_epochs * num_rows // batch_size
