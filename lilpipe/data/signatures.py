"""MinHash signatures of documents: their computation and their files.

A signature holds, for each of a family of hash functions, the minimum over the hashes of the document's word n-grams
(Broder 1997). The ratio of agreeing values of two signatures estimates the Jaccard similarity of their n-grams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from lilpipe.artifact import sync_directory
from lilpipe.config.corpus import MinhashConfig
from lilpipe.errors import DataError

NONE_SEEN = np.uint32(2**32 - 1)
"""Minimum over an empty set of shingles."""

SLICE_WORDS = 2**16
"""Number of shingles hashed at a time; their hashes fit into the L2 cache."""

BAND_DOCUMENTS = 2**22
"""Number of documents of a band that are sorted at a time."""

COMPARED_AT_ONCE = 2**12
"""Number of signature pairs held in memory."""


def num_hashes(config: MinhashConfig) -> int:
    """Return the number of values in a signature."""
    return config.num_buckets * config.hashes_per_bucket


def signatures(documents: Sequence[np.ndarray], config: MinhashConfig) -> np.ndarray:
    """Return MinHash signatures, uint32 [documents, hashes].

    Each document is given by its word hashes, uint64 [words]. A document with fewer words than ``ngram_size`` is one
    shingle; one without words gets ``NONE_SEEN`` everywhere. Besides the words, memory is bounded by ``SLICE_WORDS``.
    """
    multiplier, filler, salts, factors = _hash_family(config)
    minima = np.full((num_hashes(config), len(documents)), NONE_SEEN)
    filled = [index for index, words in enumerate(documents) if len(words)]
    padded = [_pad(documents[index], config.ngram_size, filler) for index in filled]
    words = np.concatenate([np.zeros(0, np.uint64), *padded])
    owners = np.repeat(np.array(filled, np.int64), [len(each) for each in padded])
    for start in range(0, len(words) - config.ngram_size + 1, SLICE_WORDS):
        stop = start + SLICE_WORDS + config.ngram_size - 1
        shingles = _roll(words[start:stop], config.ngram_size, multiplier)
        first, last = owners[start:stop][: len(shingles)], owners[start:stop][-len(shingles) :]
        inside = first == last  # exclude shingles that span two documents
        _take_minima(minima, shingles[inside], first[inside], salts, factors)
    return np.ascontiguousarray(minima.T)


def _hash_family(config: MinhashConfig) -> tuple[np.uint64, np.uint64, np.ndarray, np.ndarray]:
    """Return random numbers determined by the seed: multiplier and filler of shingles; and, for each hash function, its
    salt and odd factor, uint32 [hashes].
    """
    draws = np.random.PCG64(config.seed).random_raw(2 + num_hashes(config))  # the same on every machine
    salts, factors = draws[2:] >> np.uint64(32), draws[2:] | np.uint64(1)
    return draws[0] | np.uint64(1), draws[1], salts.astype(np.uint32), factors.astype(np.uint32)


def _pad(words: np.ndarray, length: int, filler: np.uint64) -> np.ndarray:
    return words if len(words) >= length else np.append(words, np.full(length - len(words), filler))


def _roll(words: np.ndarray, ngram_size: int, multiplier: np.uint64) -> np.ndarray:
    """Return a hash of each n-gram, uint32 [words - ngram_size + 1]: the high bits of a polynomial in the word
    hashes.
    """
    count = len(words) - ngram_size + 1
    rolled = words[:count].copy()
    for offset in range(1, ngram_size):
        rolled *= multiplier
        rolled += words[offset : offset + count]
    return (rolled >> np.uint64(32)).astype(np.uint32)


def _take_minima(
    minima: np.ndarray, shingles: np.ndarray, owners: np.ndarray, salts: np.ndarray, factors: np.ndarray
) -> None:
    """Update ``minima`` [hashes, documents] with the hashes of shingles; ``owners`` is each one's document, ascending.

    The hash functions are permutations x -> (x ^ salt) * factor of 32-bit numbers.
    """
    if not len(shingles):
        return
    starts = np.append(0, np.flatnonzero(owners[1:] != owners[:-1]) + 1)
    columns = owners[starts]
    hashed = np.empty_like(shingles)
    for row, salt, factor in zip(minima, salts, factors, strict=True):
        np.bitwise_xor(shingles, salt, out=hashed)
        np.multiply(hashed, factor, out=hashed)
        row[columns] = np.minimum(row[columns], np.minimum.reduceat(hashed, starts))


def band_hashes(values: np.ndarray, config: MinhashConfig) -> np.ndarray:
    """Return a hash of each band, uint64 [bands, documents], for signatures, uint32 [documents, hashes]."""
    factors = np.random.PCG64([config.seed, 1]).random_raw(config.hashes_per_bucket) | np.uint64(1)
    rows = values.T.reshape(config.num_buckets, config.hashes_per_bucket, len(values))
    hashes = np.zeros((config.num_buckets, len(values)), np.uint64)
    for row, factor in enumerate(factors):
        hashes += rows[:, row] * factor
    return hashes


# --- files --------------------------------------------------------------------------------------------------------


def _record(config: MinhashConfig) -> np.dtype:
    return np.dtype(
        [("values", np.uint32, num_hashes(config)), ("row", np.int64), ("num_bytes", np.int64), ("score", np.float32)]
    )


class SignatureWriter:
    """Writes the signatures of one shard in batches. Use it as a context manager, or call ``close``.

    ``NNNNN.signatures`` has a record for each document with words; ``NNNNN.bands.npy`` has the band hashes, uint64
    [bands, documents]. Both files appear on close; a context that ends with an error writes none.
    """

    def __init__(self, folder: Path, rank: int, config: MinhashConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._path = folder / f"{rank:05d}.signatures"
        self._temporary = folder / f".{rank:05d}.{os.getpid()}.tmp"
        self._file = self._temporary.open("wb")
        self._words: list[np.ndarray] = []
        self._columns: list[tuple[int, float, int]] = []
        self._num_words = 0
        self._num_rows = 0
        self._bands: list[np.ndarray] = [np.zeros((config.num_buckets, 0), np.uint64)]

    def add(self, words: np.ndarray, *, num_bytes: int, score: float | None = None) -> None:
        """Add the shard's next row: the document's word hashes, uint64 [words], its size in bytes, and the classifier
        score, if there is a classifier.
        """
        if self._num_words + len(words) > SLICE_WORDS:
            self._flush()
        if len(words):
            self._words.append(words)
            self._columns.append((self._num_rows, -math.inf if score is None else score, num_bytes))
            self._num_words += len(words)
        self._num_rows += 1

    def close(self) -> None:
        """Write the remaining rows and move the files into place."""
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        save_array(_bands_path(self._path), np.concatenate(self._bands, axis=1))
        self._temporary.replace(self._path)
        sync_directory(self._path.parent)

    def __enter__(self) -> SignatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._temporary.unlink()

    def _flush(self) -> None:
        records = np.empty(len(self._words), _record(self._config))
        values = signatures(self._words, self._config)
        records["values"] = values
        for number, name in enumerate(("row", "score", "num_bytes")):
            records[name] = [column[number] for column in self._columns]
        self._bands.append(band_hashes(values, self._config))
        self._file.write(records.tobytes())
        self._words, self._columns, self._num_words = [], [], 0


def _bands_path(signatures_path: Path) -> Path:
    return signatures_path.with_suffix(".bands.npy")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a NumPy file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


class Signatures:
    """Memory-mapped signatures of all shards. A document's index counts through the shards in order.

    Raises ``DataError`` if a file size does not match this configuration.
    """

    def __init__(self, folder: Path, config: MinhashConfig) -> None:
        self._config = config
        self._record = _record(config)
        self._paths = sorted(folder.glob("*.signatures"))
        self._shards = [self._map(path) for path in self._paths]
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _map(self, path: Path) -> np.ndarray:
        size = path.stat().st_size
        if size % self._record.itemsize:
            raise DataError(
                f"{path}: got {size} bytes, expected a multiple of {self._record.itemsize}, for "
                f"{num_hashes(self._config)} hashes; it is damaged or from other corpus.minhash settings; remove it, "
                f"run again"
            )
        return np.memmap(path, self._record, mode="r") if size else np.zeros(0, self._record)

    def places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row of documents, int64 [documents] each."""
        ranks = np.array([int(path.stem) for path in self._paths], np.int64)
        return ranks[self._shard(index)], self.take("row", index)

    def take(self, name: str, index: np.ndarray) -> np.ndarray:
        """Return one field of the documents' records."""
        kind = self._record[name]
        taken = np.empty((len(index), *kind.shape), kind.base)
        shard = self._shard(index)
        order = np.argsort(shard, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            if len(mine):
                number = shard[mine[0]]
                taken[mine] = self._shards[number][name][index[mine] - self._starts[number]]
        return taken

    def agreeing(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the number of agreeing signature values of documents ``a`` and ``b``, uint32 [pairs]."""
        counts = np.empty(len(a), np.uint32)
        for start in range(0, len(a), COMPARED_AT_ONCE):
            part = slice(start, start + COMPARED_AT_ONCE)
            equal = self.take("values", a[part]) == self.take("values", b[part])
            counts[part] = equal.sum(axis=1, dtype=np.uint32)
        return counts

    def by_rank(self, index: np.ndarray, *, within: np.ndarray | None = None) -> np.ndarray:
        """Return the order that sorts documents by rank, best first, within groups if ``within`` is given."""
        keys = (index, -self.take("num_bytes", index), -self.take("score", index))
        return np.lexsort(keys if within is None else (*keys, within))

    def bands(self, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield hash and index of the documents of one band, in hash ranges of about ``BAND_DOCUMENTS`` documents."""
        files = [np.load(_bands_path(path), mmap_mode="r") for path in self._paths]
        num_ranges = -(-len(self) // BAND_DOCUMENTS)
        for number in range(num_ranges):
            first, last = (number << 64) // num_ranges, ((number + 1) << 64) // num_ranges - 1
            hashes, index = [], []
            for file, start in zip(files, self._starts[:-1], strict=True):
                mine = np.flatnonzero((file[band] >= np.uint64(first)) & (file[band] <= np.uint64(last)))
                hashes.append(file[band][mine])
                index.append(mine + start)
            yield np.concatenate(hashes), np.concatenate(index)

    def _shard(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, index, side="right") - 1
