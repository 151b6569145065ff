"""The tables of a ``Corpus`` artifact, as Arrow IPC files that can be memory-mapped.

``documents/NNNNN.arrow`` holds what was kept and ``rejected/NNNNN.arrow`` what was not, one row per document. Files
and rows are in the order of a hash of the text, so that any prefix of the corpus is a random sample of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.artifact import sync_directory
from lilpipe.data.filters.chain import Document, Rejection
from lilpipe.errors import ArtifactError

ORIGIN = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("date", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),  # of the text as read
    ]
)
"""What a document brings along. ``text`` is as the filters left it where it was kept, and as read where not."""


def documents_schema(scores: Sequence[str]) -> pa.Schema:
    """The columns of kept documents; ``scores`` are the scores that the filters note, null where not taken."""
    schema = ORIGIN.append(pa.field("language", pa.string()))  # null where rejected before it was known
    schema = schema.append(pa.field("language_score", pa.float64()))
    return schema.append(pa.field("scores", pa.struct([pa.field(name, pa.float32()) for name in scores])))


def rejected_schema(scores: Sequence[str]) -> pa.Schema:
    """The columns of rejected documents; ``detail`` is for duplicates the id of the document that was kept."""
    schema = documents_schema(scores)
    for name in ("stage", "reason", "detail"):
        schema = schema.append(pa.field(name, pa.string(), nullable=False))
    return schema


ROWS_PER_BATCH = 1_000


def read_documents(directory: Path) -> Iterator[pa.RecordBatch]:
    """The kept documents of a Corpus artifact, in corpus order, as memory-mapped batches of ``documents_schema``."""
    return _read(directory / "documents")


def read_rejected(directory: Path) -> Iterator[pa.RecordBatch]:
    """The rejected documents of a Corpus artifact as batches of ``rejected_schema``."""
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


def score_values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """One score (``<stage>.<score>``) of the documents of a batch that have it, float32."""
    return batch["scores"].field(name).drop_null().to_numpy(zero_copy_only=False)


def documents_table(documents: Sequence[Document], scores: Sequence[str]) -> pa.Table:
    """Documents as a table of ``documents_schema``, column by column: a dictionary for each row takes ten times as
    long where there are many scores.
    """
    schema = documents_schema(scores)
    columns = [
        pa.array([getattr(each, name) for each in documents], schema.field(name).type) for name in schema.names[:-1]
    ]
    nan = float("nan")
    values = [
        pa.array(np.array([each.scores.get(name, nan) for each in documents], np.float32), from_pandas=True)
        for name in scores
    ]
    columns.append(pa.StructArray.from_arrays(values, fields=list(schema.field("scores").type)))
    return pa.Table.from_arrays(columns, schema=schema)


def rejected_table(documents: pa.Table, verdicts: Sequence[tuple[str, Rejection]]) -> pa.Table:
    """A table of documents with the stage that rejected each, and why."""
    columns = {
        "stage": [stage for stage, _ in verdicts],
        "reason": [rejection.reason for _, rejection in verdicts],
        "detail": [rejection.detail for _, rejection in verdicts],
    }
    for name, values in columns.items():
        documents = documents.append_column(pa.field(name, pa.string(), nullable=False), pa.array(values, pa.string()))
    return documents


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as ``write_table`` does; keys that the schema lacks are left out."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table, *, rows_per_batch: int = ROWS_PER_BATCH) -> None:
    """Write an Arrow IPC file atomically. The bytes depend on the rows alone, not on how the table is chunked."""
    starts = range(0, table.num_rows, rows_per_batch)
    write_batches(path, table.schema, (_compact(table.slice(start, rows_per_batch)) for start in starts))


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow IPC file of these batches atomically."""
    with TableWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


class TableWriter:
    """Writes an Arrow IPC file batch by batch; it appears when the context ends, and not where it ends in an error."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Write a batch as it is."""
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
    """One batch with buffers of its own: a slice's offsets and padding would tell where it was cut from."""
    taken = table.take(pa.array(np.arange(table.num_rows))).combine_chunks()
    return taken.to_batches()[0]
