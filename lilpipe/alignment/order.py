"""The order of rows, a pure function of a position: to resume is to know one integer."""

from __future__ import annotations

import torch

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
