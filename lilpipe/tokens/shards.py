"""Token shards: documents as token ids in memory-mapped Arrow IPC files.

A ``TokenShards`` artifact contains streams (``corpus``, or one per source, language, ...; and ``exercises``), each in
two splits (``train``, ``validation``), as shards ``shards/<stream>/<split>/NNNNN.arrow``. ``tokenizer/`` contains the
tokenizer that encoded them. A shard is one record batch with one row per document: ``id``, ``source`` (from the
corpus), ``num_bytes`` of its text, and ``tokens``, uint16 if the vocabulary allows it, else uint32. Each document
ends with the tokenizer's end of a document (and starts with the token that an imported model expects before a text), so
training reads the values of the ``tokens`` column as one contiguous sequence, without a copy.

Each stream's folder also contains ``offsets.npy``, the start of each document, and ``ids.npy``, an index by document
id (``lilpipe.tokens.index``). With these and the counts in ``index.json``, opening an artifact reads no shard; a
shard is memory-mapped on first access.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lilpipe.artifact import write_atomically
from lilpipe.errors import ArtifactError
from lilpipe.schemas.tables import read_table, write_batches
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.index import find_id, read_index_array, write_stream_index

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

CORPUS, EXERCISES = "corpus", "exercises"
"""Names of streams: the corpus if ``streams_by`` is ``none``, and the exercises of stage ``prompts``."""

INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TokenizedDocument:
    """A row of a shard. ``tokens`` ends with ``<|end_of_document|>``, which ``num_bytes`` does not count."""

    id: str
    source: str
    num_bytes: int
    tokens: np.ndarray


class Shard:
    """One file of documents, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            table = read_table(path)
            columns = [table[name].chunk(0) for name in ("tokens", "id", "source", "num_bytes")]
        except (OSError, pa.ArrowInvalid, KeyError, IndexError) as error:
            raise ArtifactError(
                f"{path}: cannot be read as a token shard ({error}); run stage `tokens` again"
            ) from error
        tokens, self.ids, self.sources, self.num_bytes = columns
        self.tokens: np.ndarray = tokens.values.to_numpy(zero_copy_only=True)
        self.offsets: np.ndarray = tokens.offsets.to_numpy(zero_copy_only=True)  # documents + 1


class TokenStream:
    """The concatenated documents of one stream and split, as one sequence of tokens."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self.folder = folder
        self.num_bytes: int = entry["num_bytes"]
        self._names: list[str] = [shard["name"] for shard in entry["shards"]]
        # Start of each shard, and the end. Lists, because single lookups in lists are faster than in arrays.
        self._documents = list(accumulate((shard["num_documents"] for shard in entry["shards"]), initial=0))
        self._tokens = list(accumulate((shard["num_tokens"] for shard in entry["shards"]), initial=0))
        self._shards: list[Shard | None] = [None] * len(self._names)

    @property
    def num_documents(self) -> int:
        """Number of documents in all shards."""
        return self._documents[-1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, including ``<|end_of_document|>``."""
        return self._tokens[-1]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._names)

    def shard(self, index: int) -> Shard:
        """Return one shard; it is memory-mapped on the first call."""
        shard = self._shards[index]
        if shard is None:
            shard = self._shards[index] = Shard(self.folder / self._names[index])
        return shard

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First token of each document in the stream, and the end; int64 [documents + 1], memory-mapped."""
        return read_index_array(self.folder / "offsets.npy", (self.num_documents + 1,))

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        return read_index_array(self.folder / "ids.npy", (2, self.num_documents))

    # --- tokens ---------------------------------------------------------------------------------------------------

    def num_windows(self, seq_len: int) -> int:
        """Return the number of windows of ``seq_len + 1`` tokens at stride ``seq_len``; the remainder is not used."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop - 1``: a view into the file, or a copy if they span shards."""
        assert 0 <= start < stop <= self.num_tokens, f"[{start}, {stop}) of {self.num_tokens} tokens"
        index = bisect_right(self._tokens, start) - 1
        begin, end = self._tokens[index], self._tokens[index + 1]
        part = self.shard(index).tokens[start - begin : stop - begin]
        return part if stop <= end else np.concatenate([part, self.read(end, stop)])

    # --- documents ------------------------------------------------------------------------------------------------

    def document(self, number: int) -> TokenizedDocument:
        """Return a document by its number in the stream; its tokens are a view into the file."""
        assert 0 <= number < self.num_documents, f"document {number} of {self.num_documents}"
        index = bisect_right(self._documents, number) - 1
        shard, row = self.shard(index), number - self._documents[index]
        return TokenizedDocument(
            id=shard.ids[row].as_py(),
            source=shard.sources[row].as_py(),
            num_bytes=shard.num_bytes[row].as_py(),
            tokens=shard.tokens[shard.offsets[row] : shard.offsets[row + 1]],
        )

    def find(self, document_id: str) -> list[int]:
        """Return the numbers of the documents with the id, ascending; empty if there are none."""
        found = find_id(self._ids, self._documents, document_id)
        return [number for number in found if self.document(number).id == document_id]


class TokenShards:
    """The streams of a TokenShards artifact."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_digest: str = index["tokenizer_digest"]
        self._entries: dict[str, dict[str, dict[str, Any]]] = index["streams"]
        self.streams: tuple[str, ...] = tuple(self._entries)

    @classmethod
    def open(cls, directory: Path) -> TokenShards:
        """Open an artifact's directory. Raises ``ArtifactError`` if its index cannot be read."""
        path = directory / INDEX_FILE
        try:
            return cls(directory, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: cannot be read as an index of token shards ({error!r})") from error

    @property
    def corpus_streams(self) -> tuple[str, ...]:
        """Streams of the corpus: all but the exercises."""
        return tuple(name for name in self.streams if name != EXERCISES)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encoded the shards. Raises ``ArtifactError`` if its digest is not that of the index."""
        tokenizer = Tokenizer.load(self.directory / TOKENIZER_FOLDER)
        if tokenizer.digest != self.tokenizer_digest:
            raise ArtifactError(
                f"{self.directory / TOKENIZER_FOLDER}: got tokenizer {tokenizer.digest[:12]}, expected "
                f"{self.tokenizer_digest[:12]}, which encoded the shards; run stage `tokens` again"
            )
        return tokenizer

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Text bytes of each token, int64 [vocab_size]; 0 for special tokens."""
        lengths = np.array([len(token) for token in self.tokenizer.vocabulary], dtype=np.int64)
        lengths[list(self.tokenizer.special_ids.values())] = 0
        return lengths

    def stream(self, name: str, split: Split) -> TokenStream:
        """Return the tokens of one stream and split."""
        return TokenStream(self.directory / shard_folder(name, split), self._entries[name][split])


# --- writing ------------------------------------------------------------------------------------------------------


def token_type(vocab_size: int) -> pa.DataType:
    """Return the smaller of uint16 and uint32 that holds all token ids."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def shard_folder(stream: str, split: Split) -> str:
    """Return the path of a stream's shards in the artifact."""
    return f"shards/{stream}/{split}"


def write_shard(path: Path, documents: Sequence[TokenizedDocument], *, vocab_size: int, next_document: int) -> None:
    """Write one shard atomically. Its schema stores ``next_document``: where in the source the next shard starts."""
    offsets = np.cumsum([0, *(len(document.tokens) for document in documents)])
    values = pa.array(np.concatenate([document.tokens for document in documents]), type=token_type(vocab_size))
    columns = {
        "id": pa.array([document.id for document in documents], pa.string()),
        "source": pa.array([document.source for document in documents], pa.string()),
        "num_bytes": pa.array([document.num_bytes for document in documents], pa.int64()),
        "tokens": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values),
    }
    batch = pa.record_batch(columns).replace_schema_metadata({"next_document": str(next_document)})
    write_batches(path, batch.schema, [batch])


def finished_shards(folder: Path) -> tuple[int, int]:
    """Return the number of finished shards of a stream, and the first source document after them."""
    files = sorted(folder.glob("*.arrow"))
    if not files:
        return 0, 0
    with pa.memory_map(str(files[-1])) as file:
        return len(files), int(pa.ipc.open_file(file).schema.metadata[b"next_document"])


def write_index(directory: Path, tokenizer: Tokenizer, streams: Sequence[str]) -> None:
    """Write ``offsets.npy`` and ``ids.npy`` of each stream, and then ``index.json`` with the counts."""
    index = {
        "vocab_size": tokenizer.vocab_size,
        "token_type": str(token_type(tokenizer.vocab_size)),
        "tokenizer_digest": tokenizer.digest,
        "streams": {
            stream: {split: _index_stream(directory / shard_folder(stream, split)) for split in SPLITS}
            for stream in streams
        },
    }
    write_atomically(directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def _index_stream(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.arrow"))
    shards = [Shard(file) for file in files]
    write_stream_index(folder, [(shard.offsets, shard.ids) for shard in shards])
    return {
        "num_bytes": sum(int(shard.num_bytes.to_numpy().sum()) for shard in shards),
        "shards": [
            {"name": file.name, "num_documents": len(shard.ids), "num_tokens": len(shard.tokens)}
            for file, shard in zip(files, shards, strict=True)
        ],
    }
