"""WARC files as the Common Crawl publishes them (ISO 28500): a document for each HTML response.

Records are read by warcio, pages by ``extraction``. Records of text that somebody else has extracted (the Common
Crawl's WET files) are documents as they are.
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

from lilpipe.config.corpus import Source
from lilpipe.data.sources import http_response
from lilpipe.data.sources.extraction_process import ExtractionProcess
from lilpipe.data.sources.files import READ_BYTES, BrokenStream, File, open_file
from lilpipe.data.sources.rows import Row, Unreadable, to_row, unreadable

MAX_PAGE_BYTES = 16 * 2**20
"""Longer pages are quarantined; the Common Crawl cuts them off at 5 MiB."""

START = b"WARC/"


@dataclass(frozen=True)
class Record:
    """A record of a WARC file."""

    type: str
    id: str
    url: str
    date: str
    block: bytes
    """What follows the record's headers, cut off behind ``MAX_PAGE_BYTES``."""


def read(files: Iterable[File], source: Source, skipped: Counter[str]) -> Iterator[Row]:
    """The rows of WARC files; responses that are no pages, and pages without text, are counted in ``skipped``."""
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
        yield Unreadable(file.name, number + 1, f"file breaks off after record {number}: {error}", breaks_off=True)


def _text(record: Record, extraction: ExtractionProcess, skipped: Counter[str]) -> str | None:
    """The text of a record, None if it is no document. Raises ``ValueError`` if it is a document without a text."""
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
    """A WARC's bytes, as many at a time as there are: of a larger piece, what comes before damage would be lost."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.read(len(START))
        if self._start != START:
            raise BrokenStream(f"file does not start with {START.decode()}")

    def read(self, size: int) -> bytes:
        start, self._start = self._start, b""
        return start or cast(io.BufferedReader, self._stream).read1(size)


def _records(stream: BinaryIO) -> Iterator[Record]:
    """The records of a file. Raises ``BrokenStream`` where the file is no WARC, or stops being one."""
    records = iter(ArchiveIterator(_Available(stream), no_record_parse=True))
    while True:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # warcio says there what it raises next
                record = next(records, None)
        except ArchiveLoadFailed as error:
            raise BrokenStream(str(error)[:200]) from error
        if record is None:
            return
        body, header = record.raw_stream, record.rec_headers.get_header
        if not (header("Content-Length") or "").isdecimal():
            raise BrokenStream("record does not say its length")
        block = body.read(MAX_PAGE_BYTES + 1)
        while body.read(READ_BYTES):
            pass
        if body.limit:
            raise BrokenStream(f"record ends {body.limit:,} bytes too early")
        record_id = (header("WARC-Record-ID") or "").removeprefix("<").removesuffix(">").removeprefix("urn:uuid:")
        url, date = header("WARC-Target-URI") or "", header("WARC-Date") or ""
        yield Record(header("WARC-Type") or "", record_id, url, date, block)
