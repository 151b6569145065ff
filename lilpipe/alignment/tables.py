"""Small tables as Arrow IPC files: written whole, atomically, with bytes that depend on the rows alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lilpipe.artifact import sync_directory
from lilpipe.errors import DataError


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Arrow IPC file; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of an Arrow IPC file. Raises ``DataError`` if it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all().to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: cannot be read as an Arrow file ({error}); run the stage that wrote it again"
        ) from error
