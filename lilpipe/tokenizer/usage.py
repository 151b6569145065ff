"""Token usage: compression, token counts, and glitch-token suspects.

A learnt token that almost never occurs is almost never trained on, and a model behaves erratically when it meets one:
a glitch token (Land and Bartolo 2024, Fishing for Magikarp). Byte-pair encoding creates such tokens as intermediate
merges of longer ones, and from text that one document repeats.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tiktoken

from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer
from lilpipe.tokenizer.sample import Text

CHUNK_BYTES = 4_000_000
NUM_NEIGHBOURS = 200
HARDLY = 0.01
"""A token is a suspect below this fraction of the median count of its neighbours by rank."""

SPACES = np.isin(np.arange(256), list(b" \t\n\v\f\r"))

Encodings = Mapping[str, tiktoken.Encoding]


@dataclass
class Totals:
    """Counts over some of the text."""

    num_bytes: int = 0
    """Bytes of UTF-8."""
    num_words: int = 0
    """Runs of bytes without ASCII white space; languages that do not separate words by spaces have few."""
    num_tokens: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """Tokens by each tokenizer to compare with."""

    @property
    def bytes_per_token(self) -> float:
        """Compression: bytes per token."""
        return self.num_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_word(self) -> float:
        """Fertility: tokens per word."""
        return self.num_tokens / max(1, self.num_words)

    def bytes_per_token_of(self, other: str) -> float:
        """Return the compression of another tokenizer."""
        return self.num_bytes / max(1, self.others[other])


@dataclass
class Usage:
    """Counts over all of the text."""

    token_counts: np.ndarray
    """Occurrences of each id, without our special tokens; int64 [ids]."""
    first_document: np.ndarray
    """Number of the first document with each id, int64 [ids]; -1 if there is none."""
    last_document: np.ndarray
    """Number of the last document with each id, int64 [ids]; -1 if there is none."""
    num_documents: int = 0
    total: Totals = field(default_factory=Totals)
    by_source: defaultdict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))
    by_language: defaultdict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))

    @property
    def unused_ratio(self) -> float:
        """Share of the ids that do not occur."""
        return float((self.token_counts == 0).mean())


class _Counted(NamedTuple):
    ids: np.ndarray
    num_bytes: int
    num_words: int
    others: dict[str, int]


def measure_usage(
    tokenizer: Tokenizer, texts: Iterable[Text], *, others: Encodings | None = None, num_threads: int = 2
) -> Usage:
    """Encode texts and count tokens."""
    num_ids = len(tokenizer.ranks) if isinstance(tokenizer, BytePairTokenizer) else tokenizer.vocab_size
    none = np.full(num_ids, -1, dtype=np.int64)
    usage = Usage(np.zeros(num_ids, dtype=np.int64), first_document=none, last_document=none.copy())
    with ThreadPoolExecutor(num_threads) as pool:
        for chunk in _chunks(texts):
            counted = list(pool.map(lambda text: _count(text.text, tokenizer, others or {}), chunk))
            _add_ids(usage, [each.ids for each in counted])
            for text, each in zip(chunk, counted, strict=True):
                _add_totals(usage, text, each)
    return usage


def _chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    chunk, num_chars = [], 0
    for text in texts:
        chunk.append(text)
        num_chars += len(text.text)
        if num_chars >= CHUNK_BYTES:
            yield chunk
            chunk, num_chars = [], 0
    yield chunk


def _count(text: str, tokenizer: Tokenizer, others: Encodings) -> _Counted:
    encoded = text.encode()
    space = SPACES[np.frombuffer(encoded, dtype=np.uint8)]
    num_words = int((space[:-1] & ~space[1:]).sum()) + int(bool(encoded) and not space[0])
    tokens = {name: len(other.encode_ordinary(text)) for name, other in others.items()}
    return _Counted(tokenizer.encode_array(text), len(encoded), num_words, tokens)


def _add_ids(usage: Usage, documents: list[np.ndarray]) -> None:
    if not documents:
        return
    ids = np.concatenate(documents)
    numbers = np.repeat(np.arange(len(documents)) + usage.num_documents, [len(each) for each in documents])
    usage.token_counts += np.bincount(ids, minlength=len(usage.token_counts))
    usage.last_document[ids] = numbers  # for repeated ids the last assignment wins
    first = np.full_like(usage.first_document, -1)
    first[ids[::-1]] = numbers[::-1]
    usage.first_document = np.where(usage.first_document < 0, first, usage.first_document)
    usage.num_documents += len(documents)


def _add_totals(usage: Usage, text: Text, counted: _Counted) -> None:
    totals = [usage.total, usage.by_source[text.source]]
    if text.language:
        totals.append(usage.by_language[text.language])
    for each in totals:
        each.num_bytes += counted.num_bytes
        each.num_words += counted.num_words
        each.num_tokens += len(counted.ids)
        each.others.update(counted.others)


# --- glitch tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suspects:
    """Ids of learnt tokens that a model will rarely be trained on."""

    never: list[int]
    """Ids that do not occur in the text."""
    hardly: list[int]
    """Ids that occur, but less than ``HARDLY`` times the median count of their neighbours by rank."""
    one_document: list[int]
    """Ids that occur more than once, but only in one document; without those of ``hardly``."""

    @property
    def total(self) -> int:
        """Number of suspects."""
        return len(self.never) + len(self.hardly) + len(self.one_document)


def find_suspects(usage: Usage, first_learnt: int) -> Suspects:
    """Return glitch-token suspects among ids from ``first_learnt``.

    Tokens that were learnt consecutively had similar frequencies at the time. One that occurs far less often than its
    ``NUM_NEIGHBOURS`` neighbours by rank has since been merged into longer tokens.
    """
    counts = usage.token_counts[first_learnt:]
    usual = _running_median(counts, NUM_NEIGHBOURS)
    never = counts == 0
    hardly = ~never & (counts < HARDLY * usual)
    alone = (usage.first_document == usage.last_document)[first_learnt:] & (counts > 1) & ~hardly
    return Suspects(*((np.flatnonzero(each) + first_learnt).tolist() for each in (never, hardly, alone)))


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Return the median of ``width`` values around each value, float [values]; windows stay inside at both ends."""
    if len(values) <= width:
        return np.full(len(values), np.median(values) if len(values) else 0.0)
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    medians = np.concatenate(
        [np.median(windows[start : start + 4096], axis=1) for start in range(0, len(windows), 4096)]
    )
    return medians[np.clip(np.arange(len(values)) - width // 2, 0, len(medians) - 1)]
