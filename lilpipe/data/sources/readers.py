"""Reading of raw sources of any kind as rows.

A source is divided into ``SourcePart``s, the units of parallel and resumable reading. The division depends only on the
source, and row numbers do not depend on the division.
"""

from __future__ import annotations

import codecs
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lilpipe.config.sources import Source
from lilpipe.data.sources import huggingface, installed_docs, jsonl, own, parquet, warc
from lilpipe.data.sources.files import BrokenStream, File, FilePart, digest_files, find_files, open_file
from lilpipe.data.sources.raw_documents import MAX_DOCUMENT_BYTES, RawDocument, Row, Unreadable, to_row

__all__ = ["FirstBytes", "RawDocument", "SourcePart", "Unreadable", "digest_source", "find_parts", "read_part"]

PART_BYTES = 32 * 2**20
INSTALLED_DOCS_PARTS = 8


@dataclass(frozen=True)
class SourcePart:
    """Input of one reading task: some files, a span of one file, or one of ``count`` equal shares of the source."""

    source: Source
    files: tuple[File, ...] = ()
    span: FilePart | None = None
    """Part of the only file."""
    index: int = 0
    count: int = 1


def find_parts(source: Source) -> list[SourcePart]:
    """Return the parts of a source. Raises ``DataError`` if its path does not exist or has no files of its kind."""
    if source.kind == "installed-docs":
        return [SourcePart(source, index=index, count=INSTALLED_DOCS_PARTS) for index in range(INSTALLED_DOCS_PARTS)]
    if source.kind == "huggingface":
        count = huggingface.num_parts(source)
        return [SourcePart(source, index=index, count=count) for index in range(count)]
    if source.extension() is not None:
        return [SourcePart(source)]
    return [part for files in _grouped(find_files(source)) for part in _divided(source, files)]


def _grouped(files: Iterable[File]) -> Iterator[tuple[File, ...]]:
    """Group consecutive files up to ``PART_BYTES``, so that many small files do not become many tasks."""
    group: list[File] = []
    num_bytes = 0
    for file in files:
        if group and num_bytes + file.size > PART_BYTES:
            yield tuple(group)
            group, num_bytes = [], 0
        group.append(file)
        num_bytes += file.size
    yield tuple(group)


def _divided(source: Source, files: tuple[File, ...]) -> list[SourcePart]:
    """Return one part for a group of files, or several for a large file that can be divided."""
    spans: list[FilePart] = []
    if files[0].size > PART_BYTES and source.kind in ("jsonl", "parquet"):
        divide = jsonl.divide if source.kind == "jsonl" else parquet.divide
        spans = divide(files[0], PART_BYTES)
    return [SourcePart(source, files, span) for span in spans] or [SourcePart(source, files)]


def digest_source(source: Source) -> str:
    """Return a digest of the content that would be read. Raises ``DataError`` like ``find_parts``."""
    if source.kind == "installed-docs":
        return installed_docs.digest()
    if source.kind == "huggingface":
        return huggingface.digest(source)
    if source.extension() is not None:
        return own.digest(source)
    return digest_files(find_files(source))


def read_part(part: SourcePart, skipped: Counter[str] | None = None) -> Iterator[Row]:
    """Yield all rows of a part; for the installed documentation, only as many as `max_bytes` needs.

    Records that are not documents, such as images in a WARC file, are counted in ``skipped`` by kind.
    """
    source = part.source
    files = [file for file in part.files if not file.defect]
    for file in part.files:
        if file.defect:
            yield Unreadable(file.name, 1, file.defect, breaks_off=True)
    if source.kind == "installed-docs":
        yield from _read_installed_docs(part)
    elif source.kind == "huggingface":
        yield from huggingface.read(source, part.index, part.count)
    elif source.extension() is not None:
        yield from own.read(source)
    elif source.kind == "warc":
        yield from warc.read(files, source, Counter() if skipped is None else skipped)
    else:
        for file in files:
            if source.kind == "text":
                yield from _read_text(file, source)
            else:
                yield from (jsonl if source.kind == "jsonl" else parquet).read(file, part.span, source)


class FirstBytes:
    """Selects documents that may be among the first ``max_bytes`` in order, given those seen so far.

    It admits all of these, and some that later documents displace.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self._heap: list[tuple[int, int]] = []  # (-order, bytes): the last in order on top
        self._total = 0
        self._cutoff = 2**64

    def admits(self, document: RawDocument) -> bool:
        """Return whether to keep the document."""
        if self.max_bytes is None:
            return True
        if document.order >= self._cutoff:
            return False
        size = len(document.text.encode())
        heapq.heappush(self._heap, (-document.order, size))
        self._total += size
        while self._total > self.max_bytes:
            negative, size = heapq.heappop(self._heap)
            self._total, self._cutoff = self._total - size, -negative
        return document.order < self._cutoff


# --- text ---------------------------------------------------------------------------------------------------------


def _read_text(file: File, source: Source) -> Iterator[Row]:
    """Yield the file as one document, with the file name as its id."""
    try:
        with open_file(file) as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
        text = content.decode(_encoding(content)) if len(content) <= MAX_DOCUMENT_BYTES else None
    except UnicodeDecodeError as error:
        reason = f"is not {error.encoding.upper()}: {error.reason} at byte {error.start}"
        yield Unreadable(file.name, 1, reason, breaks_off=True)
    except BrokenStream as error:
        yield Unreadable(file.name, 1, f"cannot be read: {error}", breaks_off=True)
    else:
        if text is None:
            yield Unreadable(file.name, 1, f"is longer than {MAX_DOCUMENT_BYTES:,} bytes; divide the file")
        else:
            yield to_row({"text": text, "id": file.name}, source, file.name, 1)


def _encoding(content: bytes) -> str:
    """Return UTF-16 if there is a byte order mark, else UTF-8."""
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


# --- installed-docs -----------------------------------------------------------------------------------------------


def _read_installed_docs(part: SourcePart) -> Iterator[Row]:
    """Yield every ``count``-th document in order, up to an equal share of `max_bytes`, without reading the others."""
    left = None if part.source.max_bytes is None else part.source.max_bytes // part.count
    for item in installed_docs.items()[part.index :: part.count]:
        try:
            texts = installed_docs.texts_of(item)
        except (SyntaxError, ValueError, RecursionError) as error:
            yield Unreadable(item.id, getattr(error, "lineno", None) or 1, f"is not valid Python: {error.args[0]}")
            continue
        for number, text in enumerate(texts, 1):
            if left is not None:
                left -= len(text.encode(errors="replace"))
                if left < 0:
                    return
            values = {"text": text, "id": item.id if len(texts) == 1 else f"{item.id}#{number}"}
            values |= {"name": item.name, "version": item.version, "licence": item.licence}
            yield to_row(values, part.source, item.id, number)
