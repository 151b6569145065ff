"""Sources to sorted runs, and runs to shards.

Reading writes *runs*: tables of at most ``RUN_BYTES`` of text, sorted by a hash of the normalised text. A filtering
task takes one range of that hash out of every run. So the tasks are of equal size whatever the sources look like,
exact duplicates meet in one task, and the corpus comes out in an order that does not depend on where documents lay.
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
    """Hash of the normalised text, 64 bits: a document's place in the corpus."""
    digest = hashlib.blake2b(normalise(text).encode(), digest_size=8, person=b"lilpipe-text")
    return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class ReadSummary:
    """What reading one part came to."""

    source: str
    num_documents: int
    """Documents that could be read, whether or not `max_bytes` admits them."""
    num_files: int
    unreadable: list[dict[str, Any]]
    skipped: dict[str, int]
    """What was left out as no document at all, such as a picture in a WARC, by kind."""


class ReadParts(PipelineStep):
    """Reads part ``rank`` into sorted runs, and says in a summary what could not be read."""

    type, name = "Reader", "Sources to sorted runs"

    def __init__(self, parts: list[SourcePart], source_names: list[str], folder: Path) -> None:
        super().__init__()
        self.parts = parts
        self.source_names = source_names
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Read one part; it is read again as a whole if this does not end."""
        part = self.parts[rank]
        rows: list[_Row] = []
        unreadable: list[dict[str, Any]] = []
        skipped: Counter[str] = Counter()
        num_runs, num_documents, num_bytes = 0, 0, 0
        # the installed documentation keeps to its bytes by itself
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
        rows.sort(key=lambda row: row.key)  # stable: equal texts stay in the order of the source
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
    """A document before it is sorted."""

    key: int
    num_bytes: int
    document: RawDocument


@dataclass(frozen=True)
class Selection:
    """What of the runs belongs to the corpus, and into how many shards it is cut."""

    folder: Path
    """Where the runs are."""
    num_shards: int
    num_bytes: int
    """Of text, in all shards."""
    last_order: tuple[int, ...]
    """For each source, the last document in order that its `max_bytes` admits."""
    repeated_ids: frozenset[int]
    """``order`` of ids that occur more than once."""

    def documents(self, rank: int) -> Iterator[Document]:
        """The documents of one shard, whose key lies in the ``rank``-th of equal ranges, with unique ids.

        They come by key, then in the order of reading.
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
    """The runs of all parts, in the order of the parts."""
    return sorted((folder / "runs").glob("*.arrow"))


def _key_range(run: pa.Table, rank: int, num_shards: int) -> pa.Table:
    keys = run["key"].to_numpy()
    first, last = (rank << 64) // num_shards, ((rank + 1) << 64) // num_shards
    start = np.searchsorted(keys, np.uint64(first))
    end = len(keys) if last == 1 << 64 else np.searchsorted(keys, np.uint64(last))
    return run.slice(int(start), int(end - start))
