"""Raw sources as rows: a ``RawDocument`` for each document, an ``Unreadable`` for what is none.

A source is divided into ``Part``s, the units in which reading is spread over processes and resumed. The division
depends on the source alone.
"""

from __future__ import annotations

import datetime
import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lilpipe.config import Source
from lilpipe.data import installed_docs
from lilpipe.data.files import BROKEN_STREAM, File, digest_files, find_files, open_file
from lilpipe.errors import DataError

PART_BYTES = 32 * 2**20
INSTALLED_DOCS_PARTS = 8
DATASET_ROWS_PER_PART = 50_000
EXCERPT_CHARS = 200


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A document as its source gives it."""

    id: str
    text: str
    name: str
    version: str
    licence: str
    label: str
    """The document's own, else its source's."""
    url: str
    date: str
    file: str
    row: int
    """Counted from 1."""

    @property
    def order(self) -> int:
        """Hash of the id, 64 bits: the order in which `max_bytes` takes documents."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=8, person=b"lilpipe-id").digest())


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is no document, or a file that breaks off there."""

    file: str
    row: int
    error: str
    excerpt: str = ""
    breaks_off: bool = False
    """Whether the rest of the file is lost."""


Row = RawDocument | Unreadable


@dataclass(frozen=True)
class Part:
    """What one reading task reads: some files, or one of ``count`` equal shares of the source."""

    source: Source
    files: tuple[File, ...] = ()
    index: int = 0
    count: int = 1


def find_parts(source: Source) -> list[Part]:
    """The parts of a source. Raises ``DataError`` if its path does not exist or holds nothing of its kind."""
    if source.kind == "installed-docs":
        return [Part(source, index=index, count=INSTALLED_DOCS_PARTS) for index in range(INSTALLED_DOCS_PARTS)]
    if source.kind == "huggingface":
        count = _dataset_parts(_load_dataset(source))
        return [Part(source, index=index, count=count) for index in range(count)]
    return [Part(source, files=files) for files in _grouped(find_files(source))]


def _grouped(files: Iterable[File]) -> Iterator[tuple[File, ...]]:
    """Neighbouring files together up to ``PART_BYTES``, so that a million small files are no million tasks."""
    group: list[File] = []
    for file in files:
        if group and sum(each.size for each in group) + file.size > PART_BYTES:
            yield tuple(group)
            group = []
        group.append(file)
    yield tuple(group)


def digest_source(source: Source) -> str:
    """Digest of the content that ``find_parts`` and ``read_part`` would read. Raises ``DataError`` like the former."""
    if source.kind == "installed-docs":
        return installed_docs.digest()
    if source.kind == "huggingface":
        return _digest_dataset(source)
    return digest_files(find_files(source))


def read_part(part: Part) -> Iterator[Row]:
    """All rows of a part; of the installed documentation no more than `max_bytes` needs."""
    if part.source.kind == "installed-docs":
        return _read_installed_docs(part)
    return _read_dataset(part) if part.source.kind == "huggingface" else _read_files(part)


class FirstBytes:
    """Tells which documents may be among the first ``max_bytes`` in order, judging by those seen so far.

    It admits all that are, and some that those seen later push out.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self._heap: list[tuple[int, int]] = []  # (-order, bytes): the last in order on top
        self._total = 0
        self._cutoff = 2**64

    def admits(self, document: RawDocument) -> bool:
        """Whether to take the document."""
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


def _read_files(part: Part) -> Iterator[Row]:
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    for file in part.files:
        yield from readers[part.source.kind](file, part.source)


# --- rows ---------------------------------------------------------------------------------------------------------


_ABSENT = object()
_STRINGS = ("id", "text", "name", "version", "licence", "label", "url", "date")


def to_row(values: Any, source: Source, file: str, row: int) -> Row:
    """A row's values as a document, or what is wrong with them."""
    if not isinstance(values, Mapping):
        return _unreadable(file, row, f"is {_json_type(values)}, expected an object", values)
    columns = source.columns
    text = _get(values, columns.text)
    if text is _ABSENT:
        return _unreadable(file, row, f"has no {columns.text!r}; it has {', '.join(map(str, values))}", values)
    if not isinstance(text, str):
        return _unreadable(file, row, f"{columns.text!r} is {_json_type(text)}, expected a string", values)
    if not text.strip():
        return _unreadable(file, row, f"{columns.text!r} is empty", values)
    given = _get(values, columns.id)
    document = RawDocument(
        id=f"{file}:{row}" if given in (_ABSENT, None, "") else str(given),
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
    for name in _STRINGS:
        if not _is_unicode(getattr(document, name)):
            return _unreadable(file, row, f"{name} holds half a surrogate pair, which is no valid Unicode", "")
    return document


def _get(values: Mapping[str, Any], name: str) -> Any:
    """A value by its name, or by a dotted path into objects."""
    if name in values:
        return values[name]
    first, _, rest = name.partition(".")
    inner = values.get(first)
    return _get(inner, rest) if rest and isinstance(inner, Mapping) else _ABSENT


def _unreadable(file: str, row: int, error: str, values: Any) -> Unreadable:
    excerpt = values if isinstance(values, str) else json.dumps(values, default=str, ensure_ascii=True)
    return Unreadable(file, row, _printable(error), _printable(excerpt[:EXCERPT_CHARS]))


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _string(value: Any) -> str:
    if isinstance(value, datetime.date):  # which datetime is
        return value.isoformat()
    return value if isinstance(value, str) else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --- jsonl, text, parquet -----------------------------------------------------------------------------------------


def _read_jsonl(file: File, source: Source) -> Iterator[Row]:
    number = 0
    try:
        with open_file(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse_line(line, source, file.name, number)
    except BROKEN_STREAM as error:
        yield Unreadable(file.name, number + 1, f"file breaks off after line {number}: {error}", breaks_off=True)


def _parse_line(line: bytes, source: Source, file: str, number: int) -> Row:
    try:
        values = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except UnicodeDecodeError as error:
        return _unreadable(file, number, f"is no UTF-8: {error.reason} at byte {error.start}", _excerpt(line))
    except (ValueError, RecursionError) as error:
        return _unreadable(file, number, f"is no JSON: {error}", _excerpt(line))
    return to_row(values, source, file, number)


def _excerpt(line: bytes) -> str:
    return line[:EXCERPT_CHARS].decode(errors="replace").strip()


def _read_text(file: File, source: Source) -> Iterator[Row]:
    """One document for a file, whose id is the file's name."""
    try:
        with open_file(file) as stream:
            text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Unreadable(file.name, 1, f"is no UTF-8: {error.reason} at byte {error.start}", breaks_off=True)
    except BROKEN_STREAM as error:
        yield Unreadable(file.name, 1, f"file breaks off: {error}", breaks_off=True)
    else:
        yield to_row({"text": text, "id": file.name}, source, file.name, 1)


def _read_parquet(file: File, source: Source) -> Iterator[Row]:
    number = 0
    try:
        with open_file(file) as stream:
            table = pq.ParquetFile(stream)
            wanted = {*source.columns.model_dump().values(), "name", "version", "license"}
            for batch in table.iter_batches(1_000, columns=sorted(wanted)):  # those that are absent are left out
                for values in _batch_rows(batch):
                    number += 1
                    yield values if isinstance(values, Unreadable) else to_row(values, source, file.name, number)
    except (pa.ArrowException, OSError) as error:
        reason = f"file breaks off after row {number}: {str(error).splitlines()[0]}"
        yield Unreadable(file.name, number + 1, reason, breaks_off=True)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    """The rows of a batch; a value that is no UTF-8 comes as bytes, and is refused as such further on."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            yield {name: _value(batch.column(name)[index]) for name in batch.schema.names}


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


# --- installed-docs -----------------------------------------------------------------------------------------------


_INSTALLED_DOCS = Source(kind="installed-docs", name="installed-docs")


def _read_installed_docs(part: Part) -> Iterator[Row]:
    """Every ``count``-th document in order, up to an equal share of `max_bytes`, without reading the others."""
    left = None if part.source.max_bytes is None else part.source.max_bytes // part.count
    for item in installed_docs.items()[part.index :: part.count]:
        try:
            texts = installed_docs.texts_of(item)
        except (SyntaxError, ValueError, RecursionError) as error:
            yield Unreadable(item.id, getattr(error, "lineno", None) or 1, f"is no Python: {error.args[0]}")
            continue
        for number, text in enumerate(texts, 1):
            if left is not None:
                left -= len(text.encode(errors="replace"))
                if left < 0:
                    return
            values = {"text": text, "id": item.id if len(texts) == 1 else f"{item.id}#{number}"}
            values |= {"name": item.name, "version": item.version, "licence": item.licence}
            yield to_row(values, _INSTALLED_DOCS, item.id, number)


# --- Hugging Face datasets ----------------------------------------------------------------------------------------


def _load_dataset(source: Source) -> Any:
    """A saved data set folder memory-mapped; anything else streamed, so that nothing is copied to a cache."""
    import datasets  # takes a second to import

    path = Path(str(source.path))
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        revision = None if path.exists() else _hub_revision(source)
        return datasets.load_dataset(
            str(source.path), source.subset, split=source.split, revision=revision, streaming=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"source {source.name!r}: data set {source.path}, split {source.split!r}, cannot be loaded: {error}; "
            f"correct `path` or `split`"
        ) from error


def _hub_revision(source: Source) -> str:
    """The commit that the hub's data set is at."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.path)).sha or ""
    except OSError as error:  # requests' errors and the hub's own are of this kind
        raise DataError(
            f"source {source.name!r}: {source.path} is no local folder, and the Hugging Face hub did not give a data "
            f"set of that name: {error}; correct `path`, or download the data set and name its folder"
        ) from error


def _digest_dataset(source: Source) -> str:
    path = Path(str(source.path))
    if not path.exists():
        return f"revision {_hub_revision(source)}"
    names = sorted(each for each in path.rglob("*") if each.is_file())
    found = [File(str(each), each.relative_to(path).as_posix(), each.stat().st_size) for each in names]
    return digest_files(found)


def _dataset_parts(dataset: Any) -> int:
    if hasattr(dataset, "num_rows"):
        return max(1, -(-dataset.num_rows // DATASET_ROWS_PER_PART))
    return max(1, dataset.num_shards)


def _read_dataset(part: Part) -> Iterator[Row]:
    dataset = _load_dataset(part.source).shard(num_shards=part.count, index=part.index)
    name = f"{part.source.split}-{part.index:05d}-of-{part.count:05d}"
    for number, values in enumerate(dataset, 1):
        yield to_row(values, part.source, name, number)
