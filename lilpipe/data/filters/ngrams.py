"""Rolling hashes of word n-grams, for decontamination."""

from __future__ import annotations

import functools

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it loses bits
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64 (Steele et al. 2014)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a 64-bit hash of each n-gram of words; it depends on the word order.

    It is the polynomial ``sum(hashes[i + j] * base ** (n - 1 - j))`` modulo 2^64 (Karp and Rabin 1987), with mixed
    bits.

    Args:
        hashes: uint64 [words].
        n: Number of words in an n-gram.

    Returns:
        uint64 [max(0, words - n + 1)].
    """
    num_ngrams = max(0, len(hashes) - n + 1)
    if not num_ngrams:
        return np.empty(0, np.uint64)
    rolled, length = hashes, 1  # polynomials of `length` words; doubling takes log2(n) passes instead of n
    for bit in f"{n:b}"[1:]:
        rolled = rolled[:-length] * _power(length) + rolled[length:]
        length *= 2
        if bit == "1":
            rolled = rolled[:-1] * _power(1) + hashes[length : length + len(rolled) - 1]
            length += 1
    return _mixed(rolled)


@functools.cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX[1])
    return values ^ (values >> np.uint64(31))
