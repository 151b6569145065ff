"""Token shards: documents as token ids in memory-mapped Arrow IPC files.

A ``TokenShards`` artifact holds a stream for each source (``corpus``, ``exercises``) and split (``train``,
``validation``), cut into shards ``shards/<source>/<split>/NNNNN.arrow``; ``index.json``, which counts them; and the
tokenizer that made them in ``tokenizer/``. A shard is one record batch with one row per document: ``id``,
``source`` (as the corpus names it), ``num_bytes`` of its text, and ``tokens``, uint16 where the vocabulary allows
it and uint32 otherwise. Each document ends with ``<|end_of_document|>``, so that the values of the ``tokens``
column lie in the file as one sequence that training reads without a copy.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lilpipe.artifact import write_atomically
from lilpipe.data.documents import read_table, write_table
from lilpipe.errors import ArtifactError
from lilpipe.tokenizer.encoding import Tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Document:
    """A row of a shard; ``tokens`` ends with ``<|end_of_document|>``, which ``num_bytes`` does not count."""

    id: str
    source: str
    num_bytes: int
    tokens: np.ndarray


class Shard:
    """One file of documents, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            table = read_table(path)
            tokens, self.ids, self.sources = (table[name].chunk(0) for name in ("tokens", "id", "source"))
        except (OSError, pa.ArrowInvalid, KeyError, IndexError) as error:
            raise ArtifactError(
                f"{path}: cannot be read as a token shard ({error}); run stage `tokens` again"
            ) from error
        self.tokens: np.ndarray = tokens.values.to_numpy(zero_copy_only=True)
        self.offsets: np.ndarray = tokens.offsets.to_numpy(zero_copy_only=True)  # documents + 1


class TokenStream:
    """The documents of one source and split, end to end, as one sequence of tokens."""

    def __init__(self, shards: Sequence[Shard], *, num_documents: int, num_bytes: int) -> None:
        self.shards = tuple(shards)
        self.num_documents = num_documents
        self.num_bytes = num_bytes
        self._starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])  # of each shard, and the end

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their ends included."""
        return int(self._starts[-1])

    def num_windows(self, seq_len: int) -> int:
        """Windows of ``seq_len + 1`` tokens at a stride of ``seq_len``; the rest at the end is not used."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, [stop - start]: a view into the file, or a copy where it spans shards."""
        parts = [self.shards[index].tokens[first:last] for index, first, last in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def documents(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Id and source of each document that has a token in ``start`` to ``stop``, in their order."""
        found = []
        for index, first, last in self._parts(start, stop):
            shard = self.shards[index]
            low = int(np.searchsorted(shard.offsets, first, side="right")) - 1
            high = int(np.searchsorted(shard.offsets, last, side="left"))
            found += [(shard.ids[row].as_py(), shard.sources[row].as_py()) for row in range(low, high)]
        return found

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The shards that hold the range: shard, first token and end of the part, counted within the shard."""
        assert 0 <= start < stop <= self.num_tokens, f"[{start}, {stop}) of {self.num_tokens} tokens"
        low = int(np.searchsorted(self._starts, start, side="right")) - 1
        high = int(np.searchsorted(self._starts, stop, side="left"))
        starts = [int(value) for value in self._starts[low : high + 1]]
        return [
            (low + index, max(start - begin, 0), min(stop, end) - begin)
            for index, (begin, end) in enumerate(pairwise(starts))
        ]


class TokenShards:
    """The streams of a TokenShards artifact."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_digest: str = index["tokenizer_digest"]
        self._entries: dict[str, dict[str, dict[str, Any]]] = index["streams"]
        self.sources: tuple[str, ...] = tuple(self._entries)

    @classmethod
    def open(cls, directory: Path) -> TokenShards:
        """Open an artifact's directory. Raises ``ArtifactError`` if it holds no shards that can be read."""
        path = directory / INDEX_FILE
        try:
            return cls(directory, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: cannot be read as an index of token shards ({error!r})") from error

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises ``ArtifactError`` if the one beside them is another."""
        tokenizer = Tokenizer.load(self.directory / TOKENIZER_FOLDER)
        if tokenizer.digest != self.tokenizer_digest:
            raise ArtifactError(
                f"{self.directory / TOKENIZER_FOLDER}: got tokenizer {tokenizer.digest[:12]}, expected "
                f"{self.tokenizer_digest[:12]}, which made the shards; run stage `tokens` again"
            )
        return tokenizer

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int64 [vocab_size]; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.tokenizer.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def stream(self, source: str, split: Split) -> TokenStream:
        """The tokens of one source and split."""
        entry = self._entries[source][split]
        shards = [Shard(self.directory / name) for name in entry["shards"]]
        return TokenStream(shards, num_documents=entry["num_documents"], num_bytes=entry["num_bytes"])


# --- writing ------------------------------------------------------------------------------------------------------


def token_type(vocab_size: int) -> pa.DataType:
    """The smallest of uint16 and uint32 that holds every id."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def shard_folder(source: str, split: Split) -> str:
    """Where a stream's shards lie in the artifact."""
    return f"shards/{source}/{split}"


def write_shard(path: Path, documents: Sequence[Document], *, vocab_size: int, next_document: int) -> None:
    """Write one shard atomically. ``next_document``, kept in its schema, says where in the source the next begins."""
    offsets = np.cumsum([0, *(len(document.tokens) for document in documents)])
    values = pa.array(np.concatenate([document.tokens for document in documents]), type=token_type(vocab_size))
    columns = {
        "id": pa.array([document.id for document in documents], pa.string()),
        "source": pa.array([document.source for document in documents], pa.string()),
        "num_bytes": pa.array([document.num_bytes for document in documents], pa.int64()),
        "tokens": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values),
    }
    table = pa.table(columns).replace_schema_metadata({"next_document": str(next_document)})
    write_table(path, table, rows_per_batch=len(documents))


def finished_shards(folder: Path) -> tuple[int, int]:
    """How many shards of a stream are written, and the first document of its source that is in none of them."""
    files = sorted(folder.glob("*.arrow"))
    if not files:
        return 0, 0
    with pa.memory_map(str(files[-1])) as file:
        return len(files), int(pa.ipc.open_file(file).schema.metadata[b"next_document"])


def write_index(directory: Path, tokenizer: Tokenizer, sources: Sequence[str]) -> None:
    """Count the shards of each source and write ``index.json``."""
    index = {
        "vocab_size": tokenizer.vocab_size,
        "token_type": str(token_type(tokenizer.vocab_size)),
        "tokenizer_digest": tokenizer.digest,
        "streams": {source: {split: _count(directory, source, split) for split in SPLITS} for source in sources},
    }
    write_atomically(directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def _count(directory: Path, source: str, split: Split) -> dict[str, Any]:
    files = sorted((directory / shard_folder(source, split)).glob("*.arrow"))
    tables = [read_table(file) for file in files]
    return {
        "num_documents": sum(table.num_rows for table in tables),
        "num_tokens": sum(len(table["tokens"].chunk(0).values) for table in tables),
        "num_bytes": sum(sum(table["num_bytes"].to_pylist()) for table in tables),
        "shards": [file.relative_to(directory).as_posix() for file in files],
    }
