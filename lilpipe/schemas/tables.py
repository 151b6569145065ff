"""Tables as Arrow IPC files: read memory-mapped, written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.artifact import sync_directory
from lilpipe.errors import DataError

ROWS_PER_BATCH = 1_000


def read_table(path: Path) -> pa.Table:
    """Read an Arrow IPC file as a memory-mapped table."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an Arrow IPC file. Raises ``DataError`` if the file is missing or damaged."""
    try:
        return read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: cannot be read as an Arrow file ({error}); run the stage that wrote it again"
        ) from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows with ``write_table``; keys that are not in the schema are ignored."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table, *, rows_per_batch: int = ROWS_PER_BATCH) -> None:
    """Write an Arrow IPC file atomically. The bytes depend only on the rows, not on the table's chunks."""
    starts = range(0, table.num_rows, rows_per_batch)
    write_batches(path, table.schema, (_compact(table.slice(start, rows_per_batch)) for start in starts))


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to an Arrow IPC file atomically."""
    with TableWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


class TableWriter:
    """Context manager that writes an Arrow IPC file batch by batch. The file appears only on exit without an error."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Write a batch unchanged."""
        self._writer.write_batch(batch)

    def write(self, table: pa.Table) -> None:
        """Write a table as one batch, if it has rows."""
        if table.num_rows:
            self._writer.write_batch(_compact(table))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
        if kind is not None:
            self._file.close()
            self._temporary.unlink()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        sync_directory(self._path.parent)


def _compact(table: pa.Table) -> pa.RecordBatch:
    """Copy the table into one batch with its own buffers; a slice's offsets and padding would depend on its origin."""
    taken = table.take(pa.array(np.arange(table.num_rows))).combine_chunks()
    return taken.to_batches()[0]
