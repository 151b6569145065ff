"""Work in chunks: divided among processes, each chunk a file, so that a killed run continues where it was.

Chunk i is worked by rank i modulo the world size and depends on i alone, so the result does not depend on how many
processes there were, nor on how often they were killed.
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
    """The rows of all chunks in order, on every rank; a chunk whose file is in scratch is not worked again."""
    paths = [workspace.scratch / name / f"{index:06d}.arrow" for index in range(num_chunks)]
    for index in range(distributed.rank(), num_chunks, distributed.world_size()):
        if not paths[index].exists():
            write_rows(paths[index], work(index), schema)
        # The last chunk of rank 0 speaks for its peers', which end at about the same time.
        done = min(index + distributed.world_size(), num_chunks)
        workspace.progress(done, num_chunks, unit=f"chunks of {name}")
    distributed.barrier()
    return [row for path in paths for row in read_rows(path)]
