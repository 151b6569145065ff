"""External sort of sources into runs, and of runs into shards.

Reading writes *runs*: tables of at most ``RUN_BYTES`` of text, sorted by a hash of the normalised text. A filtering
task reads one range of the hash from every run. So tasks have equal size whatever the sources look like, exact
duplicates meet in one task, and the corpus order does not depend on the location of documents in the sources.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.artifact import write_atomically
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.normalise import normalise
from lilpipe.data.sources.readers import FirstBytes, RawDocument, SourcePart, Unreadable, read_part
from lilpipe.schemas.documents import ORIGIN
from lilpipe.schemas.tables import read_table, write_table

RUN_BYTES = 8 * 2**20
ROWS_AT_A_TIME = 256

RUNS = pa.schema(
    [
        pa.field("key", pa.uint64()),  # hash of the normalised text
        pa.field("order", pa.uint64()),  # hash of the id
        pa.field("source_index", pa.int32()),
        *ORIGIN,
    ]
)


def text_key(text: str) -> int:
    """Return the 64-bit hash of the normalised text, which determines the order of documents in the corpus."""
    digest = hashlib.blake2b(normalise(text).encode(), digest_size=8, person=b"lilpipe-text")
    return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class ReadSummary:
    """Result of reading one part."""

    source: str
    num_documents: int
    """Number of readable documents, including those beyond `max_bytes`."""
    num_files: int
    unreadable: list[dict[str, Any]]
    skipped: dict[str, int]
    """Records that are not documents, such as images in a WARC file, by kind."""


class ReadParts(PipelineStep):
    """Reads part ``rank`` into sorted runs, and writes a summary with the unreadable rows."""

    type, name = "Reader", "Sources to sorted runs"

    def __init__(self, parts: list[SourcePart], source_names: list[str], folder: Path) -> None:
        super().__init__()
        self.parts = parts
        self.source_names = source_names
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Read one part. An interrupted task starts the part again."""
        part = self.parts[rank]
        rows: list[_Row] = []
        unreadable: list[dict[str, Any]] = []
        skipped: Counter[str] = Counter()
        num_runs, num_documents, num_bytes = 0, 0, 0
        # the reader of installed documentation applies max_bytes itself
        first = FirstBytes(None if part.source.kind == "installed-docs" else part.source.max_bytes)
        for document in read_part(part, skipped):
            if isinstance(document, Unreadable):
                unreadable.append({"source": part.source.name, **asdict(document)})
                continue
            num_documents += 1
            if not first.admits(document):
                continue
            rows.append(_Row(text_key(document.text), len(document.text.encode()), document))
            num_bytes += rows[-1].num_bytes
            if num_bytes >= RUN_BYTES:
                self._write_run(rank, num_runs, rows)
                rows, num_runs, num_bytes = [], num_runs + 1, 0
        self._write_run(rank, num_runs, rows)
        summary = ReadSummary(part.source.name, num_documents, max(1, len(part.files)), unreadable, dict(skipped))
        write_atomically(self.folder / "summaries" / f"{rank:05d}.json", json.dumps(asdict(summary)))

    def _write_run(self, rank: int, number: int, rows: list[_Row]) -> None:
        rows.sort(key=lambda row: row.key)  # stable: equal texts keep their order in the source
        source = self.parts[rank].source.name
        columns: dict[str, list[Any]] = {
            "key": [row.key for row in rows],
            "order": [row.document.order for row in rows],
            "source_index": [self.source_names.index(source)] * len(rows),
            "source": [source] * len(rows),
            "num_bytes": [row.num_bytes for row in rows],
        }
        for name in set(RUNS.names) - set(columns):
            columns[name] = [getattr(row.document, name) for row in rows]
        table = pa.table(columns, schema=RUNS)
        write_table(self.folder / "runs" / f"{rank:05d}-{number:05d}.arrow", table, rows_per_batch=max(1, len(rows)))


class _Row(NamedTuple):
    """A document and its sort key."""

    key: int
    num_bytes: int
    document: RawDocument


@dataclass(frozen=True)
class Selection:
    """The documents of the runs that belong to the corpus, and their division into shards."""

    folder: Path
    """Folder of the runs."""
    num_shards: int
    num_bytes: int
    """Bytes of text in all shards."""
    last_order: tuple[int, ...]
    """For each source, ``order`` of the last document within its `max_bytes`."""
    repeated_ids: frozenset[int]
    """``order`` of duplicate ids."""

    def documents(self, rank: int) -> Iterator[Document]:
        """Yield the documents of shard ``rank``, the ``rank``-th of equal key ranges, with unique ids.

        They are sorted by key, then by reading order.
        """
        table = pa.concat_tables(_key_range(read_table(path), rank, self.num_shards) for path in run_files(self.folder))
        num_documents = 0
        order = np.argsort(table["key"].to_numpy(), kind="stable")
        for start in range(0, len(order), ROWS_AT_A_TIME):
            for row in table.take(pa.array(order[start : start + ROWS_AT_A_TIME])).to_pylist():
                place, source_index = row.pop("order"), row.pop("source_index")
                if place > self.last_order[source_index]:
                    continue
                if place in self.repeated_ids:
                    row["id"] = f"{row['id']}#{row['source']}/{row['file']}:{row['row']}"
                yield Document(**row, place=num_documents)
                num_documents += 1


def run_files(folder: Path) -> list[Path]:
    """Return the runs of all parts, in the order of the parts."""
    return sorted((folder / "runs").glob("*.arrow"))


def _key_range(run: pa.Table, rank: int, num_shards: int) -> pa.Table:
    keys = run["key"].to_numpy()
    first, last = (rank << 64) // num_shards, ((rank + 1) << 64) // num_shards
    start = np.searchsorted(keys, np.uint64(first))
    end = len(keys) if last == 1 << 64 else np.searchsorted(keys, np.uint64(last))
    return run.slice(int(start), int(end - start))
