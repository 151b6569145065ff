"""Repeated elements and n-grams of a document, for the repetition filters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C17)
"""Multiplier of the n-gram hash; it is 3 modulo 4, so swapping two words loses at most one of 64 bits."""
_BLOCK_CELLS = 2**14
"""N-grams sorted at a time. For short texts it covers several sizes, because numpy calls cost more than the work."""


class Repeats(NamedTuple):
    """N-grams of a text that have occurred before in it."""

    size: int
    """n."""
    positions: np.ndarray
    """int64 [repeats], ascending: word index of the start."""
    origins: np.ndarray
    """int64 [repeats]: word index of the first occurrence."""


def duplicates(elements: Sequence[str]) -> tuple[int, int]:
    """Return the number of elements that have occurred before, and their number of characters."""
    unique = set(elements)
    num_duplicates = len(elements) - len(unique)
    if not num_duplicates:
        return 0, 0
    return num_duplicates, sum(map(len, elements)) - sum(map(len, unique))


def split_paragraphs(text: str) -> list[str]:
    """Split a text at two or more line breaks; surrounding white space is no paragraph."""
    paragraphs = [paragraph.lstrip("\n") for paragraph in text.strip().split("\n\n")]
    return list(filter(None, paragraphs)) or [""]


def split_lines(text: str) -> list[str]:
    """Split a text at one or more line breaks; a line break at the start or end gives an empty line there."""
    lines = list(filter(None, text.split("\n")))
    return [""] * (text[:1] == "\n") + lines + [""] * (text[-1:] == "\n" or not text)


def repeated_ngrams(hashes: np.ndarray, sizes: Sequence[int]) -> Iterator[Repeats]:
    """Yield the repeated n-grams of each size, lazily.

    An n-gram can only be repeated at positions where the shorter n-gram is repeated or is repeated later. So each block
    of sizes searches only the positions left by the previous block.

    Args:
        hashes: uint64 [words].
        sizes: n of the n-grams, ascending.
    """
    num_words = len(hashes)
    padded = np.zeros(num_words + max(sizes, default=0), np.uint64)  # n-grams beyond the end equal no other
    padded[:num_words] = hashes
    positions = np.arange(num_words)
    ngrams, size, done = hashes, 1, 0
    while done < len(sizes) and len(positions):
        block = sizes[done : done + max(1, _BLOCK_CELLS // len(positions))]
        rows = np.empty((len(block), len(positions)), np.uint64)
        for row, n in enumerate(block):
            for next_word in range(size, n):
                following = padded[positions + next_word] if done else padded[next_word : next_word + num_words]
                ngrams = ngrams * _BASE + following
            rows[row], size = ngrams, n
        found = [
            (positions[places], positions[origins]) if done else (places, origins) for places, origins in _repeats(rows)
        ]
        yield from map(Repeats, block, *zip(*found, strict=True))
        done += len(block)
        if done < len(sizes):
            is_left = np.zeros(num_words, bool)
            for indices in found[-1]:
                is_left[indices] = True
            is_left = is_left[positions]
            positions, ngrams = positions[is_left], ngrams[is_left]
    yield from (Repeats(n, positions, positions) for n in sizes[done:])


def _repeats(numbers_RN: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each row, the positions of numbers that have occurred before, ascending, and their first occurrence.

    A number and its position are packed into 64 bits and sorted, so a run of equal numbers starts with the first. With
    2^p numbers, 64 - p bits are compared: for a million numbers, the probability of any collision is 1 in 32.
    """
    num_rows, num_places = numbers_RN.shape
    bits = num_places.bit_length()
    mask = np.uint64((1 << bits) - 1)
    numbers_RN &= ~mask
    numbers_RN |= np.arange(num_places, dtype=np.uint64)
    numbers_RN.sort(axis=1)
    keys = numbers_RN.ravel()
    equal = (keys[1:] ^ keys[:-1]) <= mask
    equal[num_places - 1 :: num_places] = False  # neighbours in different rows
    found = equal.nonzero()[0] + 1
    if not len(found):
        return [(found, found)] * num_rows
    opens_run = np.ones(len(found), bool)
    np.not_equal(found[1:], found[:-1] + 1, out=opens_run[1:])
    origins = (keys[found[opens_run] - 1] & mask)[opens_run.cumsum() - 1]
    places = (found // num_places * num_places).astype(np.uint64) + (keys[found] & mask)
    pairs = places << np.uint64(bits) | origins
    pairs.sort()
    places, origins = (pairs >> np.uint64(bits)).astype(np.int64), (pairs & mask).astype(np.int64)
    starts = np.arange(num_rows) * num_places
    ends = [*places.searchsorted(starts).tolist(), len(places)]
    places %= num_places
    return [(places[a:b], origins[a:b]) for a, b in itertools.pairwise(ends)]


def top_ngram_chars(repeats: Repeats, offsets: Sequence[int]) -> int:
    """Return the characters of all occurrences of the most frequent n-gram, with the spaces between its words.

    Args:
        repeats: The repeated n-grams. Among equally frequent n-grams, the first counts.
        offsets: Number of characters before each word, and of all words; there are at least n words.
    """
    top, count = 0, 1
    if len(repeats.origins):
        counts = np.bincount(repeats.origins)
        top = int(counts.argmax())
        count += int(counts[top])
    return count * (offsets[top + repeats.size] - offsets[top] + repeats.size - 1)


def duplicate_ngram_chars(repeats: Repeats, offsets: Sequence[int]) -> int:
    """Return the characters in repeated n-grams, without spaces; no character counts twice.

    Args:
        repeats: The repeated n-grams. Those that start inside a counted one are skipped, and do not make later
            occurrences count as repeated.
        offsets: Number of characters before each word, and of all words.
    """
    if not len(repeats.positions):
        return 0
    num_chars, resume = 0, 0
    is_skipped = bytearray(len(offsets))
    known_later: set[int] = set()
    skips = b"\1" * (repeats.size - 1)
    for position, origin in zip(repeats.positions.tolist(), repeats.origins.tolist(), strict=True):
        if position < resume:
            continue
        if is_skipped[origin] and origin not in known_later:
            known_later.add(origin)
            continue
        resume = position + repeats.size
        num_chars += offsets[resume] - offsets[position]
        is_skipped[position + 1 : resume] = skips
    return num_chars


def ngram_coverage(repeats: Repeats, num_words: int) -> float:
    """Return the share of a text's words in a repeated n-gram."""
    if not len(repeats.positions):
        return 0.0
    steps = np.zeros(num_words + 1, np.int64)
    steps[repeats.positions] += 1
    steps[repeats.positions + repeats.size] -= 1
    return int(np.count_nonzero(np.cumsum(steps))) / num_words
