"""What only the whole corpus can tell: keys that many documents share, and pages with one address.

A key is a 64-bit hash, of a line or of an n-gram or of a URL. Each shard writes its keys sorted, in files of bounded
size; a merge task then reads one range of the hash out of every file, so that what it holds does not grow with the
corpus: a larger one has more tasks. Only what was asked for comes out of the merge. How the work is cut depends on the
data alone.
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
"""Most keys that a file of a shard is made from."""

MERGE_KEYS = 2**22
"""About how many keys a merge task reads, of 16 bytes each."""

COUNTS = pa.schema([("key", pa.uint64()), ("count", pa.uint32())])
PAGES = pa.schema([("key", pa.uint64()), ("date", pa.int64()), ("row", pa.uint32()), ("id", pa.string())])
DROPPED = pa.schema([("shard", pa.uint32()), ("row", pa.uint32()), ("kept", pa.string())])

DocumentKeys = Callable[[Document], np.ndarray]
"""The keys of a document, uint64, in any order."""

NO_DATE = -(2**63)
EPOCH = re.compile(r"(\d{9,10}|\d{13}|\d{16})(?:\.\d*)?", re.ASCII)
"""Seconds, milliseconds or microseconds since 1970, from 1973 on; fewer digits are years and days."""

# --- one shard ----------------------------------------------------------------------------------------------------


class KeyCounter:
    """Counts, for each key, the documents of a shard that hold it.

    Exact duplicates, which come one after the other in a shard, count once: otherwise a document that is there many
    times would make all its own lines frequent.
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
        """Write what is left, and how many documents there were; a shard counts as surveyed from here on."""
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
    """Lists those pages of a shard that have an address: its key, the date and the id."""

    def __init__(self, folder: Path, rank: int, url_key: Callable[[str], int]) -> None:
        """``url_key`` is 0 for what is no address of its own, such as `/index.html`."""
        self.folder = folder
        self.rank = rank
        self.url_key = url_key
        self._rows: list[tuple[int, int, int, str]] = []
        self._num_files = 0

    def add(self, document: Document, row: int) -> None:
        """List a document; ``row`` is its place in the shard, and grows."""
        key = self.url_key(document.url) if document.url else 0
        if key:
            self._rows.append((key, parse_date(document.date), row, document.id))
        if len(self._rows) >= FILE_KEYS:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        self._write()

    def _write(self) -> None:
        if self._rows:
            self._rows.sort(key=lambda each: each[0])  # stable: rows of one key stay in their order
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, PAGES, strict=True)]
            _write_sorted(
                _shard_file(self.folder, self.rank, self._num_files), pa.Table.from_arrays(arrays, schema=PAGES)
            )
            self._rows, self._num_files = [], self._num_files + 1


def parse_date(date: str) -> int:
    """A date as microseconds since 1970 in UTC; ``NO_DATE`` if it is none.

    Read are ISO 8601, also with slashes; a year or a month; 14 digits, as the Internet Archive writes; RFC 2822; and
    seconds, milliseconds or microseconds since 1970.
    """
    date = date.strip()
    if match := EPOCH.fullmatch(date):
        return int(match[1]) * {9: 1_000_000, 10: 1_000_000, 13: 1_000, 16: 1}[len(match[1])]
    try:
        moment = _moment(date)
    except (ValueError, IndexError, OverflowError):  # the last two are of malformed RFC 2822
        return NO_DATE
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return ((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - epoch) // datetime.timedelta.resolution


def _moment(date: str) -> datetime.datetime:
    """Raises ``ValueError`` if it is none."""
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
    """In one batch, so that its columns can be searched where they are mapped."""
    write_table(path, table, rows_per_batch=max(1, table.num_rows))


# --- the plan of the merge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeTask:
    """One of ``num_parts`` equal ranges of the hash, in the files of some shards."""

    folder: Path
    first_shard: int
    end_shard: int
    """The shard behind the last."""
    part: int
    num_parts: int

    @property
    def output(self) -> Path:
        """Where the result goes."""
        return self.folder / "merged" / f"{self.first_shard:05d}-{self.part:05d}.arrow"

    def slices(self) -> Iterator[tuple[int, pa.Table]]:
        """Shard and rows of the range, from each file in the order of the corpus."""
        for shard, path in _shard_files(self.folder, self.first_shard, self.end_shard):
            table = read_table(path)
            yield shard, _hash_range(table, self.part, self.num_parts)


def shard_buckets(folder: Path, num_shards: int, bucket_documents: int) -> list[range]:
    """Cut the shards into runs of about as many documents each, as near to ``bucket_documents`` as whole shards allow.

    Shards are in the order of a hash of the text, so a bucket is a random part of the corpus.
    """
    sizes = [json.loads((folder / f"{rank:05d}.json").read_text())["documents"] for rank in range(num_shards)]
    ends = np.cumsum(sizes)
    num_buckets = max(1, min(round(int(ends[-1]) / bucket_documents), num_shards))
    wanted = ends[-1] * np.arange(1, num_buckets) / num_buckets
    cuts = np.unique([0, *(np.searchsorted(ends, wanted) + 1).tolist(), num_shards]).tolist()
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def plan_merge(folder: Path, buckets: Sequence[range]) -> list[MergeTask]:
    """The tasks that merge the files of each bucket of shards, of about ``MERGE_KEYS`` keys each."""
    tasks = []
    for bucket in buckets:
        num_keys = sum(read_table(path).num_rows for _, path in _shard_files(folder, bucket.start, bucket.stop))
        num_parts = max(1, math.ceil(num_keys / MERGE_KEYS))
        tasks += [MergeTask(folder, bucket.start, bucket.stop, part, num_parts) for part in range(num_parts)]
    return tasks


def merged_files(tasks: Sequence[MergeTask], shard: int) -> list[Path]:
    """What the merge has to say about a shard: its bucket's results, in the order of the hash."""
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
    """Finds, in range ``rank`` of the hash, the keys that more than ``most`` documents of a bucket hold."""

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
    """Where in sorted keys each key occurs first."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))


class MergePages(PipelineStep):
    """Of the pages with one address the most recent stays (Llama 3, Grattafiori et al. 2024, 3.1.1), then the first in
    the corpus's order; writes the places of the others, and the id of the one that stays.
    """

    type, name = "Survey", "Pages with one address"

    def __init__(self, tasks: Sequence[MergeTask]) -> None:
        super().__init__()
        self.tasks = tasks

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write the pages to drop, by shard and row."""
        slices = list(self.tasks[rank].slices())
        table = pa.concat_tables([PAGES.empty_table(), *(rows for _, rows in slices)])  # nothing is copied yet
        key, date, row = (table[name].to_numpy() for name in ("key", "date", "row"))
        shard = np.repeat(np.array([each for each, _ in slices], np.uint32), [len(rows) for _, rows in slices])
        order = np.lexsort((~date, key))  # stable; ~ turns the order of dates round, -date would overflow
        starts = _group_starts(key[order])
        kept = np.repeat(order[starts], np.diff(np.append(starts, len(order))))  # for each of `order`
        drop = np.flatnonzero(kept != order)
        drop = drop[np.lexsort((row[order[drop]], shard[order[drop]]))]
        dropped, kept = order[drop], kept[drop]
        columns = [shard[dropped], row[dropped], _take_ids([rows["id"] for _, rows in slices], kept)]
        _write_sorted(self.tasks[rank].output, pa.table(columns, schema=DROPPED))


def _take_ids(slices: Sequence[pa.ChunkedArray], places: np.ndarray) -> pa.Array:
    """The ids at places counted over all slices; no more of them are copied."""
    wanted, back = np.unique(places, return_inverse=True)
    ids: list[str] = []
    start = 0
    for rows in slices:
        first, end = np.searchsorted(wanted, (start, start + len(rows)))
        ids += rows.take(pa.array(wanted[first:end] - start)).to_pylist()
        start += len(rows)
    return pa.array(ids, pa.string()).take(pa.array(back))


def dropped_pages(tasks: Sequence[MergeTask], shard: int) -> dict[int, str]:
    """The rows of a shard whose page another one replaces, and that one's id."""
    dropped: dict[int, str] = {}
    for path in merged_files(tasks, shard):
        table = read_table(path)
        first, end = np.searchsorted(table["shard"].to_numpy(), (shard, shard + 1))
        rows = table.slice(int(first), int(end - first))
        dropped |= dict(zip(rows["row"].to_pylist(), rows["kept"].to_pylist(), strict=True))
    return dropped
