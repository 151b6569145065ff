"""The tables of a ``Corpus`` artifact, as Arrow IPC files that can be memory-mapped.

``documents/NNNNN.arrow`` holds what was kept and ``rejected/NNNNN.arrow`` what was not, one row per document. Files
and rows are in the order of a hash of the text, so that any prefix of the corpus is a random sample of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lilpipe.artifact import sync_directory
from lilpipe.errors import ArtifactError

_ORIGIN = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("name", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("licence", pa.string(), nullable=False),
    pa.field("file", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("num_bytes", pa.int64(), nullable=False),  # of the text as read
    pa.field("language", pa.string()),  # null where rejected before it was known
    pa.field("language_score", pa.float64()),
]

DOCUMENTS = pa.schema(_ORIGIN)
REJECTED = pa.schema(
    [
        *_ORIGIN,
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),  # for duplicates the id of the document that was kept
    ]
)

ROWS_PER_BATCH = 1_000


def read_documents(directory: Path) -> Iterator[pa.RecordBatch]:
    """The kept documents of a Corpus artifact, in corpus order, as memory-mapped batches of ``DOCUMENTS``."""
    return _read(directory / "documents")


def read_rejected(directory: Path) -> Iterator[pa.RecordBatch]:
    """The rejected documents of a Corpus artifact as batches of ``REJECTED``."""
    return _read(directory / "rejected")


def _read(folder: Path) -> Iterator[pa.RecordBatch]:
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise ArtifactError(f"{folder}: holds no .arrow files; it is no Corpus artifact, or the stage must run again")
    for file in files:
        yield from read_table(file).to_batches()


def read_table(path: Path) -> pa.Table:
    """A table whose columns are memory-mapped."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as ``write_table`` does; keys that the schema lacks are left out."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table, *, rows_per_batch: int = ROWS_PER_BATCH) -> None:
    """Write an Arrow IPC file atomically. The bytes depend on the rows alone, not on how the table is chunked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            for start in range(0, table.num_rows, rows_per_batch):
                writer.write_batch(_compact(table.slice(start, rows_per_batch)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def _compact(table: pa.Table) -> pa.RecordBatch:
    """One batch with buffers of its own: a slice's offsets and padding would tell where it was cut from."""
    taken = table.take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()
    return taken.to_batches()[0]
