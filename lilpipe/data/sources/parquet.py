"""Parquet: a document for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lilpipe.config.corpus import Source
from lilpipe.data.sources.files import File, Span, open_file
from lilpipe.data.sources.rows import Row, Unreadable, to_row

ROWS_PER_BATCH = 256


def divide(file: File, span_bytes: int) -> list[Span]:
    """The row groups in spans of at most ``span_bytes`` (uncompressed), or of one group; none if they are unknown."""
    try:
        with open_file(file) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last, where a column's name is damaged
        _check_is_damage(error)
        return []
    spans: list[Span] = []
    start, row, num_bytes, num_rows = 0, 1, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if index > start and num_bytes + group.total_byte_size > span_bytes:
            spans.append(Span(start, index, row))
            start, row, num_bytes, num_rows = index, row + num_rows, 0, 0
        num_bytes, num_rows = num_bytes + group.total_byte_size, num_rows + group.num_rows
    return [*spans, Span(start, metadata.num_row_groups, row)]


def _check_is_damage(error: Exception) -> None:
    """Arrow reports damage as an ``OSError`` without a number; those with one are the disk's, and are raised."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def read(file: File, span: Span | None, source: Source) -> Iterator[Row]:
    """The rows of a file, or of a span of it."""
    number = span.first_row - 1 if span else 0
    try:
        with open_file(file) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True)
            groups = range(span.start, span.stop) if span else range(table.num_row_groups)
            if missing := _missing(table, source.columns.text):
                yield Unreadable(file.name, 1, missing, breaks_off=True)
                return
            columns = sorted({*source.columns.model_dump().values(), "name", "version", "license"})
            for group in groups:  # one by one: of all at once, none would come if one is damaged
                for batch in table.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                    for values in _rows(batch):
                        number += 1
                        yield to_row(values, source, file.name, number)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last, where a column's name is damaged
        _check_is_damage(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Unreadable(file.name, number + 1, f"file breaks off after row {number}: {reason}", breaks_off=True)


def _missing(table: pq.ParquetFile, column: str) -> str | None:
    """The complaint about a file without a column of that name, dotted or not."""
    paths = [table.schema.column(index).path for index in range(len(table.schema))]
    if any(path == column or path.startswith(f"{column}.") for path in paths):
        return None
    return f"has no {column!r}; it has {', '.join(paths)}"


def _rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    """The rows of a batch; a value that is no UTF-8 comes as bytes, and is refused as such further on."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [{name: _value(batch.column(name)[index]) for name in batch.schema.names} for index in range(len(batch))]
    yield from rows


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""
