"""Resumable work in chunks: chunks are divided among workers, and each chunk is saved as a file.

Rank r computes the chunks i with i modulo the world size = r. Chunk i depends on i alone, so the result depends neither
on the world size nor on the number of restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from lilpipe import distributed
from lilpipe.schemas.tables import read_rows, write_rows
from lilpipe.stage import Workspace

Row = dict[str, Any]


def run_chunks(
    work: Callable[[int], Sequence[Mapping[str, Any]]],
    num_chunks: int,
    *,
    name: str,
    schema: pa.Schema,
    workspace: Workspace,
) -> list[Row]:
    """Return the rows of all chunks in order, on every rank. A chunk whose file exists in scratch is not recomputed."""
    paths = [workspace.scratch / name / f"{index:06d}.arrow" for index in range(num_chunks)]
    for index in range(distributed.rank(), num_chunks, distributed.world_size()):
        if not paths[index].exists():
            write_rows(paths[index], work(index), schema)
        # Rank 0 reports for all ranks: they finish a round of chunks at about the same time.
        done = min(index + distributed.world_size(), num_chunks)
        workspace.progress(done, num_chunks, unit=f"chunks of {name}")
    distributed.barrier()
    return [row for path in paths for row in read_rows(path)]
