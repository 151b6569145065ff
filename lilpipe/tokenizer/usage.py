"""What a tokenizer makes of text: how far it compresses, which tokens it uses, and which of them look like glitches.

A token that was learnt and hardly ever occurs has hardly ever been trained on by the model, which then does odd things
where it meets it: a glitch token (Land and Bartolo 2024, Fishing for Magikarp). Byte-pair encoding makes such tokens as
steps towards longer ones, and from a text that one document repeats.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tiktoken

from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.sample import Text

CHUNK_BYTES = 4_000_000
NUM_NEIGHBOURS = 200
HARDLY = 0.01

SPACES = np.isin(np.arange(256), list(b" \t\n\v\f\r"))

Encodings = Mapping[str, tiktoken.Encoding]


@dataclass
class Totals:
    """Counts over some of the text."""

    num_bytes: int = 0
    """Of UTF-8."""
    num_words: int = 0
    """Runs of bytes without ASCII white space; languages that put no spaces have few."""
    num_tokens: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """Tokens by the tokenizers to compare with."""

    @property
    def bytes_per_token(self) -> float:
        """Compression."""
        return self.num_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_word(self) -> float:
        """Fertility."""
        return self.num_tokens / max(1, self.num_words)

    def bytes_per_token_of(self, other: str) -> float:
        """Compression by another tokenizer."""
        return self.num_bytes / max(1, self.others[other])


@dataclass
class Usage:
    """Counts over all of the text."""

    token_counts: np.ndarray
    """How often each id that is no special token occurs, int64 [ids]."""
    first_document: np.ndarray
    """Number of the first document with each id, int64 [ids]; -1 for none."""
    last_document: np.ndarray
    """Number of the last one."""
    num_documents: int = 0
    total: Totals = field(default_factory=Totals)
    by_source: defaultdict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))
    by_language: defaultdict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))

    @property
    def unused_ratio(self) -> float:
        """TokenizerShare of the ids that do not occur."""
        return float((self.token_counts == 0).mean())


class _Counted(NamedTuple):
    ids: np.ndarray
    num_bytes: int
    num_words: int
    others: dict[str, int]


def measure_usage(
    tokenizer: Tokenizer, texts: Iterable[Text], *, others: Encodings | None = None, num_threads: int = 2
) -> Usage:
    """Encode texts and count."""
    num_ids = len(tokenizer.ranks)
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
    usage.last_document[ids] = numbers  # of equal ids the last assignment stands
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
    """Ids of learnt tokens that a model will hardly have been trained on."""

    never: list[int]
    """Do not occur in the text."""
    hardly: list[int]
    """Occur, but less than ``HARDLY`` times as often as the tokens learnt at about the same time do in the median."""
    one_document: list[int]
    """Occur in one document alone, and more than once; those of ``hardly`` apart."""

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self.never) + len(self.hardly) + len(self.one_document)


def find_suspects(usage: Usage, first_learnt: int) -> Suspects:
    """Glitch-token suspects among ids from ``first_learnt``.

    Tokens learnt one after the other were about as frequent as each other when they were learnt. One that occurs far
    less often than its neighbours by rank (``NUM_NEIGHBOURS`` of them) has since gone into longer tokens.
    """
    counts = usage.token_counts[first_learnt:]
    usual = _running_median(counts, NUM_NEIGHBOURS)
    never = counts == 0
    hardly = ~never & (counts < HARDLY * usual)
    alone = (usage.first_document == usage.last_document)[first_learnt:] & (counts > 1) & ~hardly
    return Suspects(*((np.flatnonzero(each) + first_learnt).tolist() for each in (never, hardly, alone)))


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Median over a window of ``width`` around each value, float [values]; at both ends the window stays inside."""
    if len(values) <= width:
        return np.full(len(values), np.median(values) if len(values) else 0.0)
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    medians = np.concatenate(
        [np.median(windows[start : start + 4096], axis=1) for start in range(0, len(windows), 4096)]
    )
    return medians[np.clip(np.arange(len(values)) - width // 2, 0, len(medians) - 1)]
