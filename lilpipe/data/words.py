"""The words of a text, split once: heuristics, MinHash, decontamination and divergence share them."""

from __future__ import annotations

import functools
import re

import numpy as np
import xxhash

_TOKEN = re.compile(r"\w+|[^\w\s]")


class Words:
    """What a text is made of.

    Attributes:
        tokens: Words and punctuation marks, in order, as they stand.
        hashes: uint64 [words]: a 64-bit hash of each token with a letter or digit, lower-cased. The same for the same
            word in every process and on every machine.
    """

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = _TOKEN.findall(text)

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        words = (token.lower() for token in self.tokens if any(map(str.isalnum, token)))
        return np.fromiter(map(_hash, words), np.uint64)


@functools.lru_cache(maxsize=2**20)
def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())
