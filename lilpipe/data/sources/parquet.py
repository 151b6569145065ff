"""Parquet: one document per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lilpipe.config.sources import Source
from lilpipe.data.sources.files import BrokenStream, Expansion, File, FilePart, open_file
from lilpipe.data.sources.raw_documents import RawDocument, Row, Unreadable, rows_of, to_row, unreadable

ROWS_PER_BATCH = 256
BATCH_BYTES = 128 * 2**20
"""Bytes of a batch above which it has fewer rows, but at least one."""
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""Errors of a damaged file; the last if a column name is damaged."""
DICTIONARY_PAGE = b"\x15\x04\x15"
"""First bytes of a dictionary page header: field 1, the page type, is 2; then field 2, the uncompressed size."""


def divide(file: File, span_bytes: int) -> list[FilePart]:
    """Divide the row groups into spans of at most ``span_bytes`` (uncompressed) or one group; none if damaged."""
    try:
        with open_file(file) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except DAMAGE as error:
        _check_is_damage(error)
        return []
    spans: list[FilePart] = []
    start, row, num_bytes, num_rows = 0, 1, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if index > start and num_bytes + group.total_byte_size > span_bytes:
            spans.append(FilePart(start, index, row))
            start, row, num_bytes, num_rows = index, row + num_rows, 0, 0
        num_bytes, num_rows = num_bytes + group.total_byte_size, num_rows + group.num_rows
    return [*spans, FilePart(start, metadata.num_row_groups, row)]


def _check_is_damage(error: Exception) -> None:
    """Raise errors of the disk, which have an errno; Arrow reports damage as an ``OSError`` without one."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def read(file: File, span: FilePart | None, source: Source) -> Iterator[Row]:
    """Yield the rows of a file or span."""
    number = span.first_row - 1 if span else 0
    expansion = Expansion(file.size)
    columns = sorted({*source.columns.model_dump().values(), "name", "version", "license"})
    try:
        with open_file(file) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True)
            if missing := _missing(table, source.columns.text):
                yield Unreadable(file.name, 1, missing, breaks_off=True)
                return
            groups = range(span.start, span.stop) if span else range(table.num_row_groups)
            for batch in batches(file, table, groups, columns):
                for values in rows_of(batch):
                    number += 1
                    if isinstance(values, ValueError):
                        yield unreadable(file.name, number, str(values), "")
                        continue
                    row = to_row(values, source, file.name, number)
                    yield row
                    expansion.add(len(row.text) if isinstance(row, RawDocument) else 0)
    except (*DAMAGE, BrokenStream) as error:
        yield Unreadable(
            file.name, number + 1, f"cannot be read after row {number}: {reason_of(error)}", breaks_off=True
        )


def batches(
    file: File, table: pq.ParquetFile, groups: Iterable[int], columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield batches of about ``BATCH_BYTES`` at most. Row groups are read one by one: a damaged one loses no others."""
    for group in groups:
        rows = _rows_per_batch(file, table.metadata.row_group(group), columns)
        yield from table.iter_batches(rows, row_groups=[group], columns=columns)


def reason_of(error: Exception) -> str:
    """Return the reason of damage in one line. Raises errors of the disk."""
    _check_is_damage(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _rows_per_batch(file: File, group: pq.RowGroupMetaData, names: list[str] | None) -> int:
    """Return the number of rows that take about ``BATCH_BYTES``, even if each has all values of its dictionary."""
    columns = [group.column(index) for index in range(group.num_columns)]
    if names is not None:
        columns = [each for each in columns if any(f"{each.path_in_schema}.".startswith(f"{name}.") for name in names)]
    mean_bytes = sum(each.total_uncompressed_size for each in columns) // max(1, group.num_rows)
    if mean_bytes * ROWS_PER_BATCH < BATCH_BYTES:
        with open_file(file) as stream:
            mean_bytes += sum(_dictionary_bytes(stream, each) for each in columns)
    return max(1, min(ROWS_PER_BATCH, BATCH_BYTES // max(1, mean_bytes)))


def _dictionary_bytes(stream: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """Return the uncompressed size of a column chunk's dictionary; a large value in it takes one bit per row."""
    if column.total_uncompressed_size * ROWS_PER_BATCH < BATCH_BYTES:
        return 0
    stream.seek(column.dictionary_page_offset or column.data_page_offset)
    header = stream.read(16)
    if not header.startswith(DICTIONARY_PAGE):
        return 0
    size = 0
    for index, byte in enumerate(header[len(DICTIONARY_PAGE) :]):  # a varint of Thrift's compact protocol
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            break
    return size >> 1


def _missing(table: pq.ParquetFile, column: str) -> str | None:
    """Return an error message if the file has no such column, dotted or not."""
    paths = [table.schema.column(index).path for index in range(len(table.schema))]
    if any(path == column or path.startswith(f"{column}.") for path in paths):
        return None
    return f"has no {column!r}; it has {', '.join(paths)}"
