"""Rows of a source: JSON Lines, a JSON list, CSV, Parquet, a folder of `datasets`, or a data set of the hub.

Memory does not depend on the size of a file: lines and list elements are bounded, tables are read in batches bounded by
bytes. What cannot be read is a ``Malformed`` at its place, and the rest is read where that is possible.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lilpipe.alignment.questions.turns import Malformed
from lilpipe.artifact import digest_json
from lilpipe.config.corpus import Source
from lilpipe.config.prompts import PromptSource
from lilpipe.data.sources import huggingface, parquet
from lilpipe.data.sources.files import (
    READ_BYTES,
    BrokenStream,
    Expansion,
    File,
    compression,
    digest_files,
    find_files,
    open_file,
)
from lilpipe.data.sources.jsonl import bounded_lines, numbered_lines
from lilpipe.data.sources.raw_documents import EXCERPT_CHARS, MAX_DOCUMENT_BYTES, rows_of
from lilpipe.errors import DataError

Located = tuple[str, int, Any]
"""File, line or row number from 1, and the row's values, or ``Malformed`` if they cannot be read."""
Numbered = Iterator[tuple[int, Any]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TOO_LONG = f"is longer than {MAX_DOCUMENT_BYTES:,} bytes; shorten the row"


def read_rows(source: PromptSource, *, official_test: bool = False) -> Iterator[Located]:
    """Yield the rows of a source, or of its official test split."""
    path = source.test_path if official_test else source.path
    if source.hub is not None or huggingface.is_saved(str(path)):
        yield from _dataset_rows(source, str(source.hub or path), source.test_split if official_test else source.split)
        return
    for file in find_files(_as_files(source, str(path)), SUFFIXES):
        yield from _file_rows(file)


def digest(source: PromptSource) -> str:
    """Return a digest of a source's content. Raises ``DataError`` if it does not exist."""
    if source.hub is not None:
        if source.revision and not Path(source.hub).exists():
            return f"revision {source.revision}"
        return huggingface.digest(_as_dataset(source, source.hub))
    paths = [path for path in (source.path, source.test_path) if path]
    return digest_json([_digest_path(source, path) for path in paths])


def _digest_path(source: PromptSource, path: str) -> str:
    if huggingface.is_saved(path):
        return huggingface.digest(_as_dataset(source, path))
    return digest_files(find_files(_as_files(source, path), SUFFIXES))


def _as_files(source: PromptSource, path: str) -> Source:
    return Source(kind="jsonl", name=source.name, path=path)


def _as_dataset(source: PromptSource, path: str) -> Source:
    return Source(kind="huggingface", name=source.name, path=path, subset=source.subset, split=source.split)


# --- files --------------------------------------------------------------------------------------------------------


def _file_rows(file: File) -> Iterator[Located]:
    if file.defect:
        yield file.name, 1, Malformed(file.defect)
        return
    suffix = Path(file.name.lower().removesuffix(compression(file))).suffix
    number = 0
    try:
        if suffix == ".parquet":
            for number, values in _parquet_rows(file):
                yield file.name, number, values
            return
        with open_file(file) as stream:
            for number, values in _csv_rows(stream, suffix) if suffix in (".csv", ".tsv") else _json_rows(stream):
                yield file.name, number, values
    except BrokenStream as error:
        yield file.name, number + 1, Malformed(f"cannot be read after row {number}: {error}")


def _json_rows(stream: BinaryIO) -> Numbered:
    """Yield numbered rows of a JSON array or of JSON Lines."""
    start = cast(io.BufferedReader, stream).peek(READ_BYTES)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _array_rows(stream)
        return
    for number, line in numbered_lines(stream):
        is_long = len(line) > MAX_DOCUMENT_BYTES
        yield number, Malformed(TOO_LONG, _excerpt(line)) if is_long else _parsed(line)


def _array_rows(stream: BinaryIO) -> Numbered:
    """Yield the elements of a JSON array, of which only a few are in memory."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    block = stream.read(READ_BYTES)
    text = decoder.decode(block).removeprefix("\ufeff")
    scan, number, place = json.JSONDecoder().raw_decode, 1, text.index("[") + 1
    while True:
        place = _skip(text, place)
        if text.startswith("]", place):
            return
        values, end, failure = None, len(text), ""
        try:
            values, end = scan(text, place)
        except (ValueError, RecursionError) as error:
            failure = str(error)
        size = len(text) - place
        if end == len(text) and block and size <= MAX_DOCUMENT_BYTES and not failure.startswith("maximum recursion"):
            # The element may not be complete: read on, twice as much each time.
            block = stream.read(max(READ_BYTES, size))
            text, place = text[place:] + decoder.decode(block, final=not block), 0
            continue
        if failure:
            reason = TOO_LONG if block and size > MAX_DOCUMENT_BYTES else f"invalid JSON: {failure}"
            excerpt = text[place : place + EXCERPT_CHARS]
            yield number, Malformed(f"{reason}; the rest of the list cannot be read", excerpt)
            return
        yield number, values
        place, number = end, number + 1


def _skip(text: str, place: int) -> int:
    """Return the place of the next sign that is neither white space nor a comma."""
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:
        return Malformed(f"invalid JSON: {error}", _excerpt(data))


def _excerpt(data: bytes) -> str:
    return data[:EXCERPT_CHARS].decode(errors="replace").strip()


def _csv_rows(stream: BinaryIO, suffix: str) -> Numbered:
    """Yield the rows after the header as texts, None for empty cells; a row's number is that of its first line."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = _csv_lines(stream)
    header = next(lines, "").removeprefix("\ufeff")
    delimiter = "\t" if suffix == ".tsv" else ";" if ";" in header and "," not in header else ","
    names = next(csv.reader([header], delimiter=delimiter), [])
    if len(set(names)) < len(names):
        yield 1, Malformed(f"has two columns of one name: {', '.join(names)}", header[:EXCERPT_CHARS])
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 2
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, Malformed(f"invalid CSV: {error}")
            continue
        if cells is None:
            return
        if len(cells) == len(names):
            yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}
        elif cells:
            reason = f"invalid CSV: got {len(cells)} cells, expected {len(names)}: {', '.join(names)}"
            yield number, Malformed(reason, delimiter.join(cells)[:EXCERPT_CHARS])


def _csv_lines(stream: BinaryIO) -> Iterator[str]:
    for line in bounded_lines(stream):
        if len(line) > MAX_DOCUMENT_BYTES:
            raise BrokenStream(f"the next line {TOO_LONG}")
        yield line.decode(errors="surrogateescape")  # a row with invalid UTF-8 is malformed, not the file


# --- tables -------------------------------------------------------------------------------------------------------


def _parquet_rows(file: File) -> Numbered:
    number = 0
    expansion = Expansion(file.size)
    try:
        with open_file(file) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True)
            for batch in parquet.batches(file, table, range(table.num_row_groups)):
                expansion.add(batch.nbytes)
                for values in _arrow_rows(batch):
                    number += 1
                    yield number, values
    except parquet.DAMAGE as error:
        yield number + 1, Malformed(f"cannot be read after row {number}: {parquet.reason_of(error)}")


def _dataset_rows(source: PromptSource, place: str, split: str | None) -> Iterator[Located]:
    number = 0
    try:
        for table in _load(source, place, str(split)).with_format("arrow").iter(huggingface.ROWS_PER_BATCH):
            for batch in table.to_batches():
                for values in _arrow_rows(batch):
                    number += 1
                    yield str(split), number, values
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"source {source.name!r}: dataset {place}, subset {source.subset!r}, split {split!r}, cannot be "
            f"read: {error}; correct `hub`, `subset`, `split` or `revision`, or download it and set `hub` to its folder"
        ) from error


def _load(source: PromptSource, place: str, split: str) -> Any:
    if huggingface.is_saved(place):
        return huggingface.load_saved(place, split)
    import datasets  # imported lazily: it takes a second

    return datasets.load_dataset(place, source.subset, split=split, revision=source.revision, streaming=True)


def _arrow_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """Yield the rows of a batch without the keys that Arrow adds to structs, and with JSON columns parsed."""
    types = dict(zip(batch.schema.names, batch.schema.types, strict=True))
    for values in rows_of(batch):
        try:
            if isinstance(values, ValueError):
                raise values
            yield {name: _plain(value, types[name]) for name, value in values.items()}
        except (ValueError, RecursionError) as error:
            yield Malformed(str(error))


def _plain(value: Any, kind: pa.DataType) -> Any:
    """Return a Python value. Structs of one Arrow column have all keys; those that are None were absent."""
    if isinstance(kind, pa.JsonType) and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, list) and isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return [_plain(item, kind.value_type) for item in value]
    if isinstance(value, Mapping) and isinstance(kind, pa.StructType):
        return {name: _plain(item, kind.field(name).type) for name, item in value.items() if item is not None}
    return value
