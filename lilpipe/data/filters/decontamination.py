"""Decontamination: finds documents that contain text of evaluation sets by n-gram overlap (Brown et al. 2020, appendix
C; Llama 3, Grattafiori et al. 2024, 5.1.4).

Every n-gram of n words (13 by default) of an evaluation item is searched; shorter items are searched as a whole, and
very short items not at all. Words are compared without case, punctuation and white space. N-grams that many documents
of the corpus contain, such as a licence or a proverb, do not count as contamination.

Matches are stored with the surrounding text for manual review: n-grams alone cannot tell a leaked question from a
quotation that both texts took from elsewhere.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.config.corpus import DecontaminationConfig
from lilpipe.data.filters.chain import Bounds, Document, Rejection
from lilpipe.data.filters.frequent_keys import contains, frequent_keys
from lilpipe.data.filters.ngrams import ngram_hashes
from lilpipe.data.filters.words import Words
from lilpipe.schemas.tables import read_table, write_table

CONTEXT_CHARS = 120
MAX_OVERLAP_CHARS = 600
MAX_DETAIL_CHARS = 200

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class EvaluationSet:
    """Items of one evaluation set, as id and text."""

    name: str
    items: Sequence[tuple[str, str]]


# --- the index ----------------------------------------------------------------------------------------------------

ITEMS = pa.schema([("set", pa.string()), ("item", pa.string()), ("num_ngrams", pa.int64())])  # 0: too short
NGRAMS = pa.schema([("key", pa.uint64()), ("start", pa.uint64()), ("words", pa.uint16()), ("item", pa.uint32())])
MAX_TABLE_BITS = 24


def write_index(folder: Path, sets: Iterable[EvaluationSet], config: DecontaminationConfig) -> None:
    """Write the index for ``EvaluationIndex``: the items, and their n-grams sorted by hash."""
    items: list[dict[str, Any]] = []
    found: list[tuple[np.ndarray, np.ndarray]] = []  # words of an indexed item, and its n-grams
    numbers: list[int] = []
    for each in sets:
        for item, text in each.items:
            hashes = Words(text).hashes
            long_enough = len(hashes) >= min(config.min_item_words, config.ngram_size)
            ngrams = ngram_hashes(hashes, min(len(hashes), config.ngram_size)) if long_enough else hashes[:0]
            if long_enough:
                found.append((hashes, ngrams))
                numbers.append(len(items))
            items.append({"set": each.name, "item": item, "num_ngrams": len(ngrams)})
    start_words = min((min(len(hashes), config.ngram_size) for hashes, _ in found), default=0)
    counts = [len(ngrams) for _, ngrams in found]
    columns = {
        "key": _joined([ngrams for _, ngrams in found]),
        "start": _joined([ngram_hashes(hashes, start_words)[: len(ngrams)] for hashes, ngrams in found]),
        "words": np.repeat([min(len(hashes), config.ngram_size) for hashes, _ in found], counts).astype(np.uint16),
        "item": np.repeat(numbers, counts).astype(np.uint32),
    }
    order = np.argsort(columns["key"], kind="stable")
    table = pa.table({name: column[order] for name, column in columns.items()}, schema=NGRAMS)
    write_table(folder / "ngrams.arrow", table, rows_per_batch=max(1, len(table)))  # one batch: searched memory-mapped
    write_table(folder / "items.arrow", pa.Table.from_pylist(items, schema=ITEMS))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *parts])


class EvaluationIndex:
    """Index of the n-grams of the evaluation sets, as written by ``write_index``.

    A document is searched in two steps. A bit table of hashes finds candidates by the first words of n-grams, as many
    words as the shortest n-gram has. Only candidates are compared with the full n-grams.
    """

    def __init__(self, folder: Path) -> None:
        self.items = read_table(folder / "items.arrow")
        ngrams = read_table(folder / "ngrams.arrow")
        self.keys = ngrams["key"].to_numpy()
        self._item = ngrams["item"].to_numpy()
        self._lengths = np.unique(ngrams["words"].to_numpy()).tolist()
        self._starts = np.unique(ngrams["start"].to_numpy())
        bits = min((16 * len(self._starts)).bit_length(), MAX_TABLE_BITS)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[self._starts >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the n-grams of the index among a document's words.

        Args:
            hashes: uint64 [words].

        Returns:
            For each n-gram found: the index of its first word, its number of words, and its key (uint64).
        """
        places, lengths, keys = [_NONE], [_NONE], [_NONE.astype(np.uint64)]
        starts = ngram_hashes(hashes, self._lengths[0]) if self._lengths else hashes[:0]
        near = self._table[starts >> self._shift].nonzero()[0]
        if len(near):
            near = near[contains(self._starts, starts[near])]
        if not len(near):  # nearly always
            return places[0], lengths[0], keys[0]
        for length in self._lengths:
            here = near[near <= len(hashes) - length]
            ngrams = ngram_hashes(hashes, length)[here]
            hit = contains(self.keys, ngrams)
            places.append(here[hit])
            keys.append(ngrams[hit])
            lengths.append(np.full(int(hit.sum()), length))
        return np.concatenate(places), np.concatenate(lengths), np.concatenate(keys)

    def document_keys(self, document: Document) -> np.ndarray:
        """Return the keys of n-grams found, uint64, which the survey counts to find frequent n-grams."""
        return self.find(document.words.hashes)[2]

    def items_with(self, key: np.uint64) -> list[int]:
        """Return the items that contain an n-gram, by row in ``items``."""
        first, end = np.searchsorted(self.keys, key), np.searchsorted(self.keys, key, side="right")
        return np.unique(self._item[first:end]).tolist()

    def coverage(self) -> dict[str, dict[str, int]]:
        """Return for each set the number of items, and the number of items that are too short to match."""
        counts: dict[str, dict[str, int]] = {}
        for name, num_ngrams in zip(self.items["set"].to_pylist(), self.items["num_ngrams"].to_pylist(), strict=True):
            count = counts.setdefault(name, {"items": 0, "too_short": 0})
            count["items"] += 1
            count["too_short"] += not num_ngrams
        return counts


_NONE = np.empty(0, np.int64)

# --- the filter ---------------------------------------------------------------------------------------------------

MATCHES = pa.schema(
    [
        *((name, pa.string()) for name in ("document", "source", "set", "item")),
        ("matched_ngrams", pa.int64()),  # distinct n-grams of the item
        ("item_ratio", pa.float64()),  # share of the item's n-grams
        *((name, pa.string()) for name in ("before", "overlap", "after")),  # longest overlap, as in the document
    ]
)


@dataclass(frozen=True)
class Match:
    """Overlap of a document with an item; a row of ``MATCHES``."""

    document: str
    source: str
    set: str
    item: str
    matched_ngrams: int
    item_ratio: float
    before: str
    overlap: str
    after: str


class DecontaminationFilter:
    """Rejects or reports documents that contain an n-gram of an evaluation item.

    ``matched_ratio`` is the share of the document's words in such n-grams.
    """

    stage = "decontamination"

    def __init__(self, config: DecontaminationConfig, index: Path, frequent_ngrams: Sequence[Path] = ()) -> None:
        """``index`` is a folder written by ``write_index``; ``frequent_ngrams`` are results of the survey."""
        self.config = config
        self.index = index
        self.frequent_ngrams = frequent_ngrams
        most = 0 if config.action == "reject" else None
        self.bounds = {"matched_ngrams": Bounds(most=most), "matched_ratio": Bounds()}
        self._matches: list[Match] = []
        self._loaded: tuple[EvaluationIndex, np.ndarray] | None = None

    def __call__(self, document: Document) -> Rejection | None:
        """Return None, or a rejection that names the item with the most matches."""
        if self._loaded is None:  # loaded in the worker process
            self._loaded = EvaluationIndex(self.index), frequent_keys(self.frequent_ngrams)
        index, frequent = self._loaded
        hashes = document.words.hashes
        places, lengths, keys = index.find(hashes)
        if len(keys):
            sign = ~contains(frequent, keys)
            places, lengths, keys = places[sign], lengths[sign], keys[sign]
        document.scores["decontamination.matched_ngrams"] = len(keys)
        document.scores["decontamination.matched_ratio"] = _covered(places, lengths) / len(hashes) if len(keys) else 0.0
        if not len(keys):
            return None
        matches = list(self._describe(document, index, places, lengths, keys))
        self._matches += matches
        if self.config.action == "report":
            return None
        most = max(matches, key=lambda match: match.matched_ngrams)
        words = " ".join(most.overlap.split())
        return Rejection("evaluation_text", f"{most.set}/{most.item}: {_shortened(words, MAX_DETAIL_CHARS)}")

    def drain(self) -> list[dict[str, Any]]:
        """Return the matches since the last call, as rows of ``MATCHES``, and clear them."""
        rows = [asdict(match) for match in self._matches]
        self._matches.clear()
        return rows

    def _describe(
        self, document: Document, index: EvaluationIndex, places: np.ndarray, lengths: np.ndarray, keys: np.ndarray
    ) -> Iterator[Match]:
        """Yield a match for each item, in the order of the sets."""
        found: dict[int, list[int]] = defaultdict(list)  # item to indices of its n-grams
        items_with = {key: index.items_with(key) for key in np.unique(keys)}
        for number, key in enumerate(keys):
            for item in items_with[key]:
                found[item].append(number)
        spans = word_spans(document.text)
        for item, numbers in sorted(found.items()):
            row = index.items.slice(item, 1).to_pylist()[0]
            first, last = _longest_run(places[numbers], int(lengths[numbers[0]]))
            start, end = spans[first][0], spans[last][1]
            distinct = len(np.unique(keys[numbers]))
            yield Match(
                document=document.id,
                source=document.source,
                set=row["set"],
                item=row["item"],
                matched_ngrams=distinct,
                item_ratio=distinct / row["num_ngrams"],
                before=document.text[max(0, start - CONTEXT_CHARS) : start],
                overlap=_shortened(document.text[start:end], MAX_OVERLAP_CHARS),
                after=document.text[end : end + CONTEXT_CHARS],
            )


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the start and end in a text of each word in ``Words.hashes``."""
    return [found.span() for found in _WORD.finditer(text) if found[0].strip("_")]


def _covered(places: np.ndarray, lengths: np.ndarray) -> int:
    """Return the number of words covered by n-grams."""
    order = np.argsort(places, kind="stable")
    places, ends = places[order], np.maximum.accumulate((places + lengths)[order])
    return int((ends - np.maximum(places, np.append(0, ends[:-1]))).clip(0).sum())


def _longest_run(places: np.ndarray, length: int) -> tuple[int, int]:
    """Return the first and last word of the longest run of overlapping n-grams of ``length`` words."""
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1]) + length - 1


def _shortened(text: str, chars: int) -> str:
    """Return the text, with the middle replaced by an ellipsis if it is too long."""
    return text if len(text) <= chars else f"{text[: chars // 2]} … {text[-chars // 2 :]}"
