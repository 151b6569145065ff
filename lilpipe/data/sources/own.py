"""Custom sources: a function that yields rows, called with the source's settings and read as one part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from lilpipe.config.sources import Source
from lilpipe.data.sources.raw_documents import Row, to_row
from lilpipe.errors import DataError
from lilpipe.extensions import load


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of a custom source; malformed rows are quarantined."""
    for number, values in enumerate(_rows(source), 1):
        yield to_row(values, source, source.name, number)


def digest(source: Source) -> str:
    """Return the digest of all rows. Each plan reads the whole source to compute it."""
    rows = hashlib.sha256()
    for values in _rows(source):
        rows.update(
            json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode(errors="replace") + b"\n"
        )
    return rows.hexdigest()


def _rows(source: Source) -> Iterator[object]:
    extension = source.extension()
    assert extension is not None
    try:
        yield from load(extension)(source, **source.options)
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"source {source.name!r}: {extension.kind} {source.kind!r} fails: {type(error).__name__}: {error}; correct "
            "the function or its settings"
        ) from error
