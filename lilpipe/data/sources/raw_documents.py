"""Rows of sources: a ``RawDocument`` for each document, an ``Unreadable`` for each unreadable row."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lilpipe.config.sources import Source

MAX_DOCUMENT_BYTES = 32 * 2**20
"""Maximum size of a document; longer ones are quarantined, so that a worker's memory does not depend on the source."""

EXCERPT_CHARS = 200


@dataclass(slots=True)
class RawDocument:
    """A document as read from its source. It is not frozen, because that would double the time to create it."""

    id: str
    text: str
    name: str
    version: str
    licence: str
    label: str
    """Label of the document, else of its source."""
    url: str
    date: str
    file: str
    row: int
    """Line, row or record number, counted from 1."""

    @property
    def order(self) -> int:
        """64-bit hash of the id: the order in which `max_bytes` selects documents."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=8, person=b"lilpipe-id").digest())


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is not a document, or the point where a file becomes unreadable."""

    file: str
    row: int
    error: str
    excerpt: str = ""
    breaks_off: bool = False
    """Whether the rest of the file is unreadable."""


Row = RawDocument | Unreadable

_ABSENT = object()
_STRINGS = ("id", "text", "name", "version", "licence", "label", "url", "date")


def to_row(values: Any, source: Source, file: str, row: int) -> Row:
    """Return a row's values as a document, or as an unreadable row with its error."""
    if not isinstance(values, Mapping):
        return unreadable(file, row, f"is {_type(values)}, expected an object", values)
    columns = source.columns
    text = _get(values, columns.text)
    if text is _ABSENT:
        return unreadable(file, row, f"has no {columns.text!r}; it has {', '.join(map(str, values))}", values)
    if not isinstance(text, str):
        return unreadable(file, row, f"{columns.text!r} is {_type(text)}, expected a string", values)
    if not text.strip():
        return unreadable(file, row, f"{columns.text!r} is empty", values)
    given = _get(values, columns.id)
    document = RawDocument(
        id=f"{file}:{row}" if given is _ABSENT or given is None or given == "" else str(given),
        text=text,
        name=_string(values.get("name")) or source.name,
        version=_string(values.get("version")),
        licence=_string(_get(values, columns.licence)) or _string(values.get("license")) or source.licence,
        label=_string(_get(values, columns.label)) or source.label,
        url=_string(_get(values, columns.url)),
        date=_string(_get(values, columns.date)),
        file=file,
        row=row,
    )
    error = _defect(document)
    return document if error is None else unreadable(file, row, error, text)


def _defect(document: RawDocument) -> str | None:
    """Return why the document cannot be stored, or None."""
    for name in ("text",) if _metadata(document).isascii() else _STRINGS:
        try:
            size = len(getattr(document, name).encode())
        except UnicodeEncodeError:
            return f"{name} contains a lone surrogate, which is not valid Unicode"
        if size > MAX_DOCUMENT_BYTES:
            return f"{name} has {size:,} bytes, expected at most {MAX_DOCUMENT_BYTES:,}; divide the document"
    if "\0" in document.text or "\0" in document.id:
        # Text has no NUL; it is binary data, or UTF-16 read as UTF-8. C libraries would end the string there.
        return "contains a NUL character: binary data, or text in another encoding"
    return None


def _metadata(document: RawDocument) -> str:
    """Return all strings but the text, concatenated for a fast check."""
    name, version, licence, label = document.name, document.version, document.licence, document.label
    return f"{document.id}{name}{version}{licence}{label}{document.url}{document.date}"


def unreadable(file: str, row: int, error: str, values: Any) -> Unreadable:
    """Return an unreadable row with its error and an excerpt of its values."""
    excerpt = values if isinstance(values, str) else _shown(values)
    return Unreadable(file, row, _printable(error), _printable(excerpt[:EXCERPT_CHARS]))


def _shown(values: Any) -> str:
    try:
        return json.dumps(values, default=str, ensure_ascii=True)
    except (ValueError, RecursionError):  # integers with more digits than Python prints
        return repr(type(values))


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _get(values: Mapping[str, Any], name: str) -> Any:
    """Return a value by its name, or by a dotted path into objects."""
    value = values.get(name, _ABSENT)
    if value is not _ABSENT or "." not in name:
        return value
    first, _, rest = name.partition(".")
    inner = values.get(first)
    return _get(inner, rest) if isinstance(inner, Mapping) else _ABSENT


def _string(value: Any) -> str:
    """Return metadata as text: numbers and booleans as JSON, dates as ISO 8601, other types as an empty string."""
    if isinstance(value, str):
        return value
    if isinstance(value, datetime.date):  # or a datetime, its subclass
        return value.isoformat()
    return json.dumps(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else ""


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")


def rows_of(batch: Any) -> Iterator[Mapping[str, Any] | ValueError]:
    """Yield the rows of an Arrow record batch, or the error of an unreadable row. Invalid UTF-8 is returned as
    bytes.
    """
    try:
        rows = batch.to_pylist()
    except Exception:  # not representable in Python: invalid UTF-8, a year after 9999, an unknown time zone
        rows = (_arrow_row(batch, index) for index in range(len(batch)))
    yield from rows


def _arrow_row(batch: Any, index: int) -> Mapping[str, Any] | ValueError:
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = _arrow_value(column[index])
        except Exception as error:
            return ValueError(f"{name!r} cannot be read as {column.type}: {type(error).__name__}: {error}")
    return values


def _arrow_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""
