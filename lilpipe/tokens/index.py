"""Index of a stream: two memory-mapped arrays next to its shards.

``offsets.npy``, int64 [documents + 1], holds the first token of each document, counted from the start of the stream.
It maps a document to its tokens by one lookup, and a token to its document by binary search.

``ids.npy``, uint64 [2, documents], finds documents by id. The columns are grouped by shard: row 0 holds the hashes of
the shard's ids in ascending order, row 1 the document numbers. A lookup searches each shard's columns. A single order
over the whole stream would avoid this loop, but would need a sort of all ids, which may not fit in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from lilpipe.artifact import sync_directory
from lilpipe.errors import ArtifactError


def id_hash(document_id: str) -> int:
    """Return the 64-bit hash of a document id."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


def find_id(ids: np.ndarray, shard_starts: Sequence[int], document_id: str) -> list[int]:
    """Return the numbers of the documents whose id has the same hash; collisions are rare.

    Args:
        ids: Array of ``ids.npy``.
        shard_starts: Number of each shard's first document, and the total number of documents.
        document_id: Id to find.
    """
    wanted = np.uint64(id_hash(document_id))
    found: list[int] = []
    for start, stop in pairwise(shard_starts):
        hashes = ids[0, start:stop]
        first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        found += ids[1, start + first : start + last].tolist()
    return sorted(found)


def read_index_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an array of the index. Raises ``ArtifactError`` if it is missing or has another shape."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as an index ({error}); run stage `tokens` again") from error
    if array.shape != shape:
        raise ArtifactError(f"{path}: got shape {array.shape}, expected {shape}; run stage `tokens` again")
    return np.asarray(array)  # a plain array view: numpy handles it faster than a memmap


def write_stream_index(folder: Path, shards: Sequence[tuple[np.ndarray, pa.Array]]) -> None:
    """Write ``offsets.npy`` and ``ids.npy`` to ``folder``; ``shards`` holds the offsets and ids of each shard."""
    num_documents = sum(len(ids) for _, ids in shards)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _writing(folder / "offsets.npy", np.dtype("<i8"), (num_documents + 1,)) as all_offsets,
        _writing(folder / "ids.npy", np.dtype("<u8"), (2, num_documents)) as all_ids,
    ):
        first = 0
        all_offsets[0] = 0
        for offsets, ids in shards:
            last = first + len(ids)
            all_offsets[first + 1 : last + 1] = offsets[1:] + all_offsets[first]
            hashes = np.fromiter((id_hash(document_id) for document_id in ids.to_pylist()), np.uint64, len(ids))
            order = np.argsort(hashes, kind="stable")
            all_ids[0, first:last] = hashes[order]
            all_ids[1, first:last] = order + first
            first = last


@contextmanager
def _writing(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield an array on disk to fill; rename the file to ``path`` when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
    yield array
    array.flush()
    del array
    temporary.replace(path)
    sync_directory(path.parent)
