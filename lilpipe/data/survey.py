"""Corpus-wide statistics: keys that many documents share, and pages with the same URL.

A key is a 64-bit hash of a line, an n-gram or a URL. Each shard writes its keys sorted, in files of bounded size. A
merge task reads one hash range from every file, so its memory does not grow with the corpus: a larger corpus has more
tasks. The merge outputs only frequent keys and duplicate pages. The division into tasks depends only on the data.
"""

from __future__ import annotations

import datetime
import email.utils
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.artifact import write_atomically
from lilpipe.data.filters.chain import Document
from lilpipe.schemas.tables import read_table, write_table

FILE_KEYS = 2**20
"""Number of keys from which a shard starts a new file."""

MERGE_KEYS = 2**22
"""Approximate number of keys that a merge task reads, 16 bytes each."""

COUNTS = pa.schema([("key", pa.uint64()), ("count", pa.uint32())])
PAGES = pa.schema([("key", pa.uint64()), ("date", pa.int64()), ("row", pa.uint32()), ("id", pa.string())])
DROPPED = pa.schema([("shard", pa.uint32()), ("row", pa.uint32()), ("kept", pa.string())])

DocumentKeys = Callable[[Document], np.ndarray]
"""Function that returns the keys of a document, uint64, in any order."""

NO_DATE = -(2**63)
EPOCH = re.compile(r"(\d{9,10}|\d{13}|\d{16})(?:\.\d*)?", re.ASCII)
"""Unix time in seconds, milliseconds or microseconds, from 1973 on; fewer digits are years and days."""

# --- one shard ----------------------------------------------------------------------------------------------------


class KeyCounter:
    """Counts, for each key, the documents of a shard that contain it.

    Exact duplicates, which are adjacent in a shard, count once; otherwise a document with many copies would make all
    its lines frequent.
    """

    def __init__(self, folder: Path, rank: int, keys_of: DocumentKeys) -> None:
        self.folder = folder
        self.rank = rank
        self.keys_of = keys_of
        self._key: int | None = None
        self._num_documents = 0
        self._num_files = 0
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, document: Document) -> None:
        """Count the next document of the shard."""
        if document.key == self._key:
            return
        self._key = document.key
        self._num_documents += 1
        keys = np.unique(self.keys_of(document))
        self._pending.append(keys)
        self._num_pending += len(keys)
        if self._num_pending >= FILE_KEYS:
            self._write()

    def close(self) -> None:
        """Write the remaining counts and the number of documents, which marks the shard as surveyed."""
        self._write()
        summary = {"documents": self._num_documents}
        write_atomically(self.folder / f"{self.rank:05d}.json", json.dumps(summary))

    def _write(self) -> None:
        if self._pending:
            keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            table = pa.table([keys, counts.astype(np.uint32)], schema=COUNTS)
            _write_sorted(_shard_file(self.folder, self.rank, self._num_files), table)
            self._pending, self._num_pending, self._num_files = [], 0, self._num_files + 1


class PageList:
    """Lists the pages of a shard that have a URL: key, date, row and id."""

    def __init__(self, folder: Path, rank: int, url_key: Callable[[str], int]) -> None:
        """``url_key`` returns 0 for what is no URL of its own, such as `/index.html`."""
        self.folder = folder
        self.rank = rank
        self.url_key = url_key
        self._rows: list[tuple[int, int, int, str]] = []
        self._num_files = 0

    def add(self, document: Document, row: int) -> None:
        """Add a document; ``row`` is its position in the shard, ascending."""
        key = self.url_key(document.url) if document.url else 0
        if key:
            self._rows.append((key, parse_date(document.date), row, document.id))
        if len(self._rows) >= FILE_KEYS:
            self._write()

    def close(self) -> None:
        """Write the remaining pages."""
        self._write()

    def _write(self) -> None:
        if self._rows:
            self._rows.sort(key=lambda each: each[0])  # stable: rows with the same key keep their order
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, PAGES, strict=True)]
            _write_sorted(
                _shard_file(self.folder, self.rank, self._num_files), pa.Table.from_arrays(arrays, schema=PAGES)
            )
            self._rows, self._num_files = [], self._num_files + 1


def parse_date(date: str) -> int:
    """Return a date as microseconds since 1970 in UTC, or ``NO_DATE`` if it cannot be parsed.

    Supported are ISO 8601, also with slashes; a year or a month; 14 digits, as in the Internet Archive; RFC 2822; and
    Unix time in seconds, milliseconds or microseconds.
    """
    date = date.strip()
    if match := EPOCH.fullmatch(date):
        return int(match[1]) * {9: 1_000_000, 10: 1_000_000, 13: 1_000, 16: 1}[len(match[1])]
    try:
        moment = _moment(date)
    except (ValueError, IndexError, OverflowError):  # the last two come from malformed RFC 2822 dates
        return NO_DATE
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return ((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - epoch) // datetime.timedelta.resolution


def _moment(date: str) -> datetime.datetime:
    """Parse a date. Raises ``ValueError`` if it is not one."""
    if date.isascii() and date.isdigit() and len(date) == len("20240501123456"):
        return datetime.datetime.strptime(date, "%Y%m%d%H%M%S")
    if date[:1].isalpha() or " " in date[:3]:  # "Tue, 14 Nov 2023" or "4 Nov 2023"
        return email.utils.parsedate_to_datetime(date)
    if re.match(r"\d{4}/\d\d/\d\d", date):
        date = date.replace("/", "-", 2)
    if date.replace("-", "").isdigit() and len(date) in (len("2024"), len("2024-05")):
        date += "-01-01" if len(date) == len("2024") else "-01"
    return datetime.datetime.fromisoformat(date)


def _shard_file(folder: Path, rank: int, number: int) -> Path:
    return folder / f"{rank:05d}-{number:05d}.arrow"


def _write_sorted(path: Path, table: pa.Table) -> None:
    """Write one batch, so that memory-mapped columns can be searched."""
    write_table(path, table, rows_per_batch=max(1, table.num_rows))


# --- the plan of the merge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeTask:
    """One of ``num_parts`` equal ranges of the hash, in the files of several shards."""

    folder: Path
    first_shard: int
    end_shard: int
    """One past the last shard."""
    part: int
    num_parts: int

    @property
    def output(self) -> Path:
        """Path of the result."""
        return self.folder / "merged" / f"{self.first_shard:05d}-{self.part:05d}.arrow"

    def slices(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield the shard and the rows in the hash range of each file, in corpus order."""
        for shard, path in _shard_files(self.folder, self.first_shard, self.end_shard):
            table = read_table(path)
            yield shard, _hash_range(table, self.part, self.num_parts)


def shard_buckets(folder: Path, num_shards: int, bucket_documents: int) -> list[range]:
    """Divide the shards into consecutive buckets of about ``bucket_documents`` documents each.

    Shards are ordered by a hash of the text, so a bucket is a random sample of the corpus.
    """
    sizes = [json.loads((folder / f"{rank:05d}.json").read_text())["documents"] for rank in range(num_shards)]
    ends = np.cumsum(sizes)
    num_buckets = max(1, min(round(int(ends[-1]) / bucket_documents), num_shards))
    wanted = ends[-1] * np.arange(1, num_buckets) / num_buckets
    cuts = np.unique([0, *(np.searchsorted(ends, wanted) + 1).tolist(), num_shards]).tolist()
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def plan_merge(folder: Path, buckets: Sequence[range]) -> list[MergeTask]:
    """Return the tasks that merge the files of each bucket of shards, of about ``MERGE_KEYS`` keys each."""
    tasks = []
    for bucket in buckets:
        num_keys = sum(read_table(path).num_rows for _, path in _shard_files(folder, bucket.start, bucket.stop))
        num_parts = max(1, math.ceil(num_keys / MERGE_KEYS))
        tasks += [MergeTask(folder, bucket.start, bucket.stop, part, num_parts) for part in range(num_parts)]
    return tasks


def merged_files(tasks: Sequence[MergeTask], shard: int) -> list[Path]:
    """Return the merge results for a shard: the files of its bucket, in hash order."""
    return [task.output for task in tasks if task.first_shard <= shard < task.end_shard]


def _shard_files(folder: Path, first: int, end: int) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("*.arrow")):
        shard = int(path.name.partition("-")[0])
        if first <= shard < end:
            yield shard, path


def _hash_range(table: pa.Table, part: int, num_parts: int) -> pa.Table:
    keys = table["key"].to_numpy()
    start, end = (
        len(keys) if bound == 1 << 64 else int(np.searchsorted(keys, np.uint64(bound)))
        for bound in ((part << 64) // num_parts, ((part + 1) << 64) // num_parts)
    )
    return table.slice(start, end - start)


# --- the merge ----------------------------------------------------------------------------------------------------


class MergeCounts(PipelineStep):
    """Finds, in hash range ``rank``, the keys that more than ``most`` documents of a bucket contain."""

    type, name = "Survey", "Frequent keys"

    def __init__(self, tasks: Sequence[MergeTask], most: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.most = most

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write the keys, sorted."""
        keys, counts = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
        for _, rows in self.tasks[rank].slices():
            keys.append(np.array(rows["key"]))
            counts.append(np.array(rows["count"]))
        frequent = _frequent(np.concatenate(keys), np.concatenate(counts), self.most)
        _write_sorted(self.tasks[rank].output, pa.table({"key": frequent}))


def _frequent(keys: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = _group_starts(keys)
    totals = np.add.reduceat(counts[order], starts, dtype=np.int64) if len(keys) else np.empty(0, np.int64)
    return keys[starts][totals > most]


def _group_starts(keys: np.ndarray) -> np.ndarray:
    """Return the index of the first occurrence of each key in sorted keys."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))


class MergePages(PipelineStep):
    """Selects one page per URL: the most recent (Llama 3, Grattafiori et al. 2024, 3.1.1), else the first in corpus
    order.

    It writes the rows of the other pages, with the id of the kept page.
    """

    type, name = "Survey", "Pages with one address"

    def __init__(self, tasks: Sequence[MergeTask]) -> None:
        super().__init__()
        self.tasks = tasks

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write the replaced pages, sorted by shard and row."""
        slices = list(self.tasks[rank].slices())
        table = pa.concat_tables([PAGES.empty_table(), *(rows for _, rows in slices)])  # zero-copy
        key, date, row = (table[name].to_numpy() for name in ("key", "date", "row"))
        shard = np.repeat(np.array([each for each, _ in slices], np.uint32), [len(rows) for _, rows in slices])
        order = np.lexsort((~date, key))  # stable; ~ reverses the order of dates, -date would overflow
        starts = _group_starts(key[order])
        kept = np.repeat(order[starts], np.diff(np.append(starts, len(order))))  # for each element of `order`
        drop = np.flatnonzero(kept != order)
        drop = drop[np.lexsort((row[order[drop]], shard[order[drop]]))]
        dropped, kept = order[drop], kept[drop]
        columns = [shard[dropped], row[dropped], _take_ids([rows["id"] for _, rows in slices], kept)]
        _write_sorted(self.tasks[rank].output, pa.table(columns, schema=DROPPED))


def _take_ids(slices: Sequence[pa.ChunkedArray], places: np.ndarray) -> pa.Array:
    """Return the ids at positions in the concatenated slices; only these ids are copied."""
    wanted, back = np.unique(places, return_inverse=True)
    ids: list[str] = []
    start = 0
    for rows in slices:
        first, end = np.searchsorted(wanted, (start, start + len(rows)))
        ids += rows.take(pa.array(wanted[first:end] - start)).to_pylist()
        start += len(rows)
    return pa.array(ids, pa.string()).take(pa.array(back))


def dropped_pages(tasks: Sequence[MergeTask], shard: int) -> dict[int, str]:
    """Return the rows of a shard that another page replaces, with the id of that page."""
    dropped: dict[int, str] = {}
    for path in merged_files(tasks, shard):
        table = read_table(path)
        first, end = np.searchsorted(table["shard"].to_numpy(), (shard, shard + 1))
        rows = table.slice(int(first), int(end - first))
        dropped |= dict(zip(rows["row"].to_pylist(), rows["kept"].to_pylist(), strict=True))
    return dropped
