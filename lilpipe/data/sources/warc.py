"""WARC files (ISO 28500), as published by Common Crawl: one document per HTML response.

warcio reads the records, and ``extraction`` extracts the text of pages. Records with text that is already extracted
(Common Crawl's WET files) are used unchanged.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from lilpipe.config.sources import Source
from lilpipe.data.sources import http_response
from lilpipe.data.sources.extraction_process import ExtractionProcess
from lilpipe.data.sources.files import READ_BYTES, BrokenStream, File, open_file
from lilpipe.data.sources.raw_documents import Row, Unreadable, to_row, unreadable

MAX_PAGE_BYTES = 16 * 2**20
"""Maximum size of a page; longer ones are quarantined. Common Crawl truncates pages at 5 MiB."""

START = b"WARC/"


@dataclass(frozen=True)
class Record:
    """A record of a WARC file."""

    type: str
    id: str
    url: str
    date: str
    block: bytes
    """Content after the record's headers, truncated beyond ``MAX_PAGE_BYTES``."""


def read(files: Iterable[File], source: Source, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the rows of WARC files; responses that are not pages, and pages without text, are counted in
    ``skipped``.
    """
    with ExtractionProcess() as extraction:
        for file in files:
            yield from _read_file(file, source, extraction, skipped)


def _read_file(file: File, source: Source, extraction: ExtractionProcess, skipped: Counter[str]) -> Iterator[Row]:
    number = 0
    try:
        with open_file(file) as stream:
            for number, record in enumerate(_records(stream), 1):
                try:
                    text = _text(record, extraction, skipped)
                except ValueError as error:
                    yield unreadable(file.name, number, str(error), record.url)
                    continue
                if text is not None:
                    values = {"id": record.id, "url": record.url, "date": record.date, "text": text}
                    yield to_row(values, source, file.name, number)
    except BrokenStream as error:
        yield Unreadable(file.name, number + 1, f"cannot be read after record {number}: {error}", breaks_off=True)


def _text(record: Record, extraction: ExtractionProcess, skipped: Counter[str]) -> str | None:
    """Return the text of a record, None if it is not a document. Raises ``ValueError`` if a document has no text."""
    if record.type == "conversion":
        return record.block.decode("utf-8")
    if record.type != "response":
        return None
    response = http_response.parse(record.block, MAX_PAGE_BYTES)
    if response.status != 200:
        skipped["status is not 200"] += 1
    elif not response.is_html:
        skipped["no HTML"] += 1
    elif max(len(record.block), len(response.body)) > MAX_PAGE_BYTES:
        raise ValueError(f"page is longer than {MAX_PAGE_BYTES:,} bytes")
    elif text := extraction.extract(http_response.decode(response).replace("\0", "")):
        return text
    else:
        skipped["no text"] += 1
    return None


class _Available:
    """Reads a WARC in pieces of the available size; with larger pieces, data before damaged bytes would be lost."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.read(len(START))
        if self._start != START:
            raise BrokenStream(f"file does not start with {START.decode()}")

    def read(self, size: int) -> bytes:
        start, self._start = self._start, b""
        return start or cast(io.BufferedReader, self._stream).read1(size)


def _records(stream: BinaryIO) -> Iterator[Record]:
    """Yield the records of a file. Raises ``BrokenStream`` where the file is not a valid WARC."""
    records = iter(ArchiveIterator(_Available(stream), no_record_parse=True))
    while True:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # warcio also prints the error that it raises
                record = next(records, None)
        except ArchiveLoadFailed as error:
            raise BrokenStream(str(error)[:200]) from error
        if record is None:
            return
        body, header = record.raw_stream, record.rec_headers.get_header
        if not (header("Content-Length") or "").isdecimal():
            raise BrokenStream("record has no valid Content-Length")
        block = body.read(MAX_PAGE_BYTES + 1)
        while body.read(READ_BYTES):
            pass
        if body.limit:
            raise BrokenStream(f"record is truncated by {body.limit:,} bytes")
        record_id = (header("WARC-Record-ID") or "").removeprefix("<").removesuffix(">").removeprefix("urn:uuid:")
        url, date = header("WARC-Target-URI") or "", header("WARC-Date") or ""
        yield Record(header("WARC-Type") or "", record_id, url, date, block)
