"""JSON Lines: one document per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO, cast

from lilpipe.config.sources import Source
from lilpipe.data.sources.files import READ_BYTES, BrokenStream, File, FilePart, compression, local_path, open_file
from lilpipe.data.sources.raw_documents import EXCERPT_CHARS, MAX_DOCUMENT_BYTES, Row, Unreadable, to_row, unreadable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def divide(file: File, span_bytes: int) -> list[FilePart]:
    """Divide an uncompressed local file into spans of whole lines, of about ``span_bytes`` each; none for other files.

    The file is read once to number the first line of each span, so row numbers do not depend on the span size.
    """
    path = local_path(file)
    if path is None or compression(file):
        return []
    spans: list[FilePart] = []
    start, row = 0, 1
    with path.open("rb", buffering=READ_BYTES) as stream:
        while start < file.size:
            num_bytes, num_lines = _skip(stream, span_bytes)
            spans.append(FilePart(start, start + num_bytes, row))
            start, row = start + max(1, num_bytes), row + num_lines
    return spans


def _skip(stream: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """Read ``num_bytes`` bytes and the rest of the line; return the number of bytes and of line ends read."""
    position = num_lines = 0
    block = b""
    while position < num_bytes and (block := stream.read(min(READ_BYTES, num_bytes - position))):
        position += len(block)
        num_lines += block.count(b"\n")
    while not block.endswith(b"\n") and (block := stream.readline(READ_BYTES)):
        position += len(block)
        num_lines += block.endswith(b"\n")
    return position, num_lines


def read(file: File, span: FilePart | None, source: Source) -> Iterator[Row]:
    """Yield the rows of a file or span."""
    first = span.first_row if span else 1
    number = first - 1
    try:
        with open_file(file) as stream:
            for number, line in numbered_lines(stream, span, first=first):
                yield _parse(line, source, file.name, number)
    except BrokenStream as error:
        yield Unreadable(file.name, number + 1, f"cannot be read after line {number}: {error}", breaks_off=True)


def numbered_lines(stream: BinaryIO, span: FilePart | None = None, *, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers; those that are too long as ``bounded_lines`` does."""
    number = first
    for line in bounded_lines(stream, span):
        if line.strip():
            yield number, line
        elif span is None:
            number += _skip_blank_lines(cast(BufferedReader, stream))
        number += 1


def _skip_blank_lines(stream: BufferedReader) -> int:
    """Read blank lines, of which a compressed file may hold millions, and return their number."""
    num_lines = 0
    while block := stream.peek(READ_BYTES):
        num_blank = len(block) - len(block.lstrip())
        end = block.rfind(b"\n", 0, num_blank) + 1
        if not end:
            break
        num_lines += block.count(b"\n", 0, end)
        stream.read(end)
    return num_lines


def bounded_lines(stream: BinaryIO, span: FilePart | None = None) -> Iterator[bytes]:
    """Yield lines with their ends; a line that is too long is truncated to one byte more than the limit."""
    left = math.inf
    if span:
        stream.seek(span.start)
        left = span.stop - span.start
    while left > 0 and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        left -= len(line)
        rest = line
        while len(line) > MAX_DOCUMENT_BYTES and rest and not rest.endswith(b"\n"):
            rest = stream.readline(READ_BYTES)
            left -= len(rest)
        yield line


def _parse(line: bytes, source: Source, file: str, number: int) -> Row:
    if len(line) > MAX_DOCUMENT_BYTES:
        error = f"is longer than {MAX_DOCUMENT_BYTES:,} bytes; divide the document"
        return unreadable(file, number, error, _excerpt(line))
    try:
        values = json.loads((line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode())
    except UnicodeDecodeError as error:
        return unreadable(file, number, f"is not UTF-8: {error.reason} at byte {error.start}", _excerpt(line))
    except (ValueError, RecursionError) as error:
        return unreadable(file, number, f"is not JSON: {error}", _excerpt(line))
    return to_row(values, source, file, number)


def _excerpt(line: bytes) -> str:
    return line[:EXCERPT_CHARS].decode(errors="replace").strip()
