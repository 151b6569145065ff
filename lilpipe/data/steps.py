"""The corpus stage's own datatrove steps: reading, sorting, filtering, and finding near-duplicates.

Reading writes *runs*: tables of at most ``RUN_BYTES`` of text, sorted by a hash of the normalised text. A filtering
task takes one range of that hash out of every run. So the tasks are of equal size whatever the sources look like,
exact duplicates meet in one task, and the corpus comes out in an order that does not depend on where documents lay.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig as DatatroveMinhashConfig,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from lilpipe.artifact import write_atomically
from lilpipe.config import MinhashConfig
from lilpipe.data.documents import DOCUMENTS, read_table, write_rows, write_table
from lilpipe.data.filters import normalise
from lilpipe.data.readers import FirstBytes, Part, RawDocument, Unreadable, read_part

RUN_BYTES = 32 * 2**20

Documents = Iterable[Document] | None
"""What datatrove hands from step to step."""

RUNS = pa.schema(
    [
        pa.field("key", pa.uint64()),  # hash of the normalised text
        pa.field("order", pa.uint64()),  # hash of the id
        pa.field("source_index", pa.int32()),
        *(field for field in DOCUMENTS if not field.name.startswith("language")),
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


class ReadParts(PipelineStep):
    """Reads part ``rank`` into sorted runs, and says in a summary what could not be read."""

    type, name = "Reader", "Sources to sorted runs"

    def __init__(self, parts: list[Part], source_names: list[str], folder: Path) -> None:
        super().__init__()
        self.parts = parts
        self.source_names = source_names
        self.folder = folder

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Read one part; it is read again as a whole if this does not end."""
        part = self.parts[rank]
        source_index = self.source_names.index(part.source.name)
        rows: list[dict[str, Any]] = []
        unreadable: list[dict[str, Any]] = []
        num_runs, num_documents, num_bytes = 0, 0, 0
        # the installed documentation keeps to its bytes by itself
        first = FirstBytes(None if part.source.kind == "installed-docs" else part.source.max_bytes)
        for row in read_part(part):
            if isinstance(row, Unreadable):
                unreadable.append({"source": part.source.name, **asdict(row)})
                continue
            num_documents += 1
            if not first.admits(row):
                continue
            rows.append(_run_row(row, part.source.name, source_index))
            num_bytes += rows[-1]["num_bytes"]
            if num_bytes >= RUN_BYTES:
                self._write_run(rank, num_runs, rows)
                rows, num_runs, num_bytes = [], num_runs + 1, 0
        self._write_run(rank, num_runs, rows)
        summary = ReadSummary(part.source.name, num_documents, max(1, len(part.files)), unreadable)
        write_atomically(self.folder / "summaries" / f"{rank:05d}.json", json.dumps(asdict(summary)))

    def _write_run(self, rank: int, number: int, rows: list[dict[str, Any]]) -> None:
        rows.sort(key=lambda row: row["key"])  # stable: equal texts stay in the order of the source
        table = pa.Table.from_pylist(rows, schema=RUNS)
        write_table(self.folder / "runs" / f"{rank:05d}-{number:05d}.arrow", table, rows_per_batch=max(1, len(rows)))


def _run_row(row: RawDocument, source: str, source_index: int) -> dict[str, Any]:
    key, num_bytes = text_key(row.text), len(row.text.encode())
    return {
        **asdict(row),
        "key": key,
        "order": row.order,
        "source": source,
        "source_index": source_index,
        "num_bytes": num_bytes,
    }


@dataclass(frozen=True)
class Selection:
    """What of the runs belongs to the corpus, and into how many shards it is cut."""

    num_shards: int
    last_order: tuple[int, ...]
    """For each source, the last document in order that its `max_bytes` admits."""
    repeated_ids: frozenset[int]
    """``order`` of ids that occur more than once."""


class TakeShard(PipelineStep):
    """Yields the documents whose key lies in the ``rank``-th of equal ranges, by key, then in the order of reading."""

    type, name = "Reader", "Sorted runs to shards"

    def __init__(self, folder: Path, selection: Selection) -> None:
        super().__init__()
        self.folder = folder
        self.selection = selection

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        """The documents of one shard, with unique ids."""
        slices = [_key_range(read_table(path), rank, self.selection.num_shards) for path in run_files(self.folder)]
        table = pa.concat_tables(slices)
        for index in np.argsort(table["key"].to_numpy(), kind="stable"):
            row = {name: table[name][int(index)].as_py() for name in table.schema.names}
            if row["order"] <= self.selection.last_order[row.pop("source_index")]:
                yield self._document(row)

    def _document(self, row: dict[str, Any]) -> Document:
        document_id, text = row.pop("id"), row.pop("text")
        if row.pop("order") in self.selection.repeated_ids:
            document_id = f"{document_id}#{row['source']}/{row['file']}:{row['row']}"
        return Document(text=text, id=document_id, metadata=row)


def run_files(folder: Path) -> list[Path]:
    """The runs of all parts, in the order of the parts."""
    return sorted((folder / "runs").glob("*.arrow"))


def _key_range(run: pa.Table, rank: int, num_shards: int) -> pa.Table:
    keys = run["key"].to_numpy()
    first, last = (rank << 64) // num_shards, ((rank + 1) << 64) // num_shards
    start = np.searchsorted(keys, np.uint64(first))
    end = len(keys) if last == 1 << 64 else np.searchsorted(keys, np.uint64(last))
    return run.slice(int(start), int(end - start))


class WriteShard(PipelineStep):
    """Writes what passed the filters, and hands it on."""

    type, name = "Writer", "Filtered shards"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        """Pass the documents through; the file appears when all have."""
        rows = []
        for document in data or ():
            rows.append({**document.metadata, "id": document.id, "text": document.text})
            yield document
        write_rows(self.folder / f"{rank:05d}.arrow", rows, DOCUMENTS)


# --- near-duplicates ----------------------------------------------------------------------------------------------

Place = tuple[int, int]
"""Shard, and row in the shard."""


class _Signatures(MinhashDedupSignature):
    """The stock step with the word splitter that the filters have loaded; its own loads one for each task."""

    @property
    def word_tokenizer(self) -> WordTokenizer:
        return load_word_tokenizer(self.language)

    @word_tokenizer.setter
    def word_tokenizer(self, _: WordTokenizer) -> None:
        pass


def signature_step(config: MinhashConfig, folder: Path) -> PipelineStep:
    """MinHash signatures by datatrove; ends a pipeline."""
    return _Signatures(str(folder), config=_minhash_config(config))


def bucket_step(config: MinhashConfig, signatures: Path, folder: Path) -> PipelineStep:
    """The search for equal signatures in one of `num_buckets` buckets: one task for each, by datatrove."""
    return MinhashDedupBuckets(str(signatures), str(folder), config=_minhash_config(config), lines_to_buffer=1_000)


def _minhash_config(config: MinhashConfig) -> DatatroveMinhashConfig:
    return DatatroveMinhashConfig(
        n_grams=config.ngram_size,
        num_buckets=config.num_buckets,
        hashes_per_bucket=config.hashes_per_bucket,
        seed=config.seed,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
    )


def read_pairs(folder: Path) -> Iterator[tuple[Place, Place]]:
    """The pairs of near-duplicates that the buckets found."""
    for path in sorted(folder.glob("*.dups")):
        for shard_a, row_a, shard_b, row_b in struct.iter_unpack("<4I", path.read_bytes()):
            yield (shard_a, row_a), (shard_b, row_b)


def near_duplicates(pairs: Iterable[tuple[Place, Place]]) -> dict[Place, Place]:
    """Each document to drop, and the one that is kept in its place: the first of all that pairs connect to it."""
    parents: dict[Place, Place] = {}

    def root(place: Place) -> Place:
        while (parent := parents.setdefault(place, place)) != place:
            parents[place] = parents[parent]  # path halving
            place = parent
        return place

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parents[second] = first
    return {place: root(place) for place in parents if root(place) != place}


def kept_ids(replacements: Mapping[Place, Place], shard: Callable[[int], pa.Table]) -> dict[Place, str]:
    """For each dropped place, the id of the document that is kept in its place."""
    return {place: shard(kept[0])["id"][kept[1]].as_py() for place, kept in replacements.items()}
