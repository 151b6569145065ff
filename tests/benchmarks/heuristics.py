"""Heuristic filters beside datatrove's, with the same thresholds, in the same run, on one core: speed and agreement.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.heuristics [FOLDER] [--all]

FOLDER holds the shared data. Speed is of a 3 MB part of the English documents, each filter alone and all four in a row;
rounds alternate, and time is the processor's. Each measurement starts with empty tables of words; `warm` starts with
those of the round before, which is how a worker spends its time in a large corpus. Agreement is of one in eight English
documents and one in eighty of `tldr`, or with ``--all`` of all and one in ten. Where the decisions differ, the same
filter looks again at the words as spaCy splits them: if that settles it, splitting was the cause, and the piece of text
is shown that is split differently most often.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import split_into_parts, split_into_words
from loguru import logger

from lilpipe.config.corpus import QualityConfig
from lilpipe.data.filters import words as word_tables
from lilpipe.data.filters.chain import Document, Filter, run_filters
from lilpipe.data.filters.heuristics import C4, FineWeb, GopherQuality, GopherRepetition
from lilpipe.data.filters.outliers import DirtyWords, Divergence, DuplicateNgramCoverage, Unigrams
from lilpipe.data.filters.words import Words, split_chunk
from tests.data.prose import count_words

ENGLISH = ("python-peps", "rust-rfcs", "rust-book")
SPEED_BYTES = 3_000_000
ROUNDS = 3
PEERS: dict[str, BaseFilter] = {
    "gopher_repetition": GopherRepetitionFilter(),
    "gopher_quality": GopherQualityFilter(),
    "c4": C4QualityFilter(),
    "fineweb": FineWebQualityFilter(),
}
CONFIG = QualityConfig(
    min_words=50,
    min_alpha_word_ratio=0.8,
    min_line_punctuation_ratio=0.12,
    max_short_line_ratio=0.67,
    max_duplicate_line_char_ratio=0.01,
)
"""datatrove's thresholds."""
FILTERS: dict[str, Filter] = {
    "gopher_repetition": GopherRepetition(CONFIG),
    "gopher_quality": GopherQuality(CONFIG),
    "c4": C4(),
    "fineweb": FineWeb(CONFIG),
}


def texts_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Texts by id."""
    found = {}
    for name in names:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found |= {row["id"]: row["text"] for row in map(json.loads, file)}
    return found


def part_of(texts: Sequence[str], num_bytes: int) -> list[str]:
    """Texts drawn at random, of about so many bytes together."""
    drawn, size = [], 0
    for text in random.Random(0).sample(texts, len(texts)):
        if size + len(text.encode()) <= num_bytes:
            drawn.append(text)
            size += len(text.encode())
    return drawn


# --- speed --------------------------------------------------------------------------------------------------------


def empty_tables() -> None:
    """Forget all words, on both sides."""
    for table in (word_tables._TOKEN_FACTS, word_tables._WORD_HASHES):
        table.clear()
    word_tables._token_facts.cache_clear()
    split_into_parts.cache_clear()


def theirs(filters: Sequence[BaseFilter], text: str) -> bool:
    """Whether datatrove's filters keep a text."""
    document = DatatroveDocument(text=text, id="")
    return all(each.filter(document) is True for each in filters)


def ours(filters: Sequence[Filter], text: str) -> bool:
    """Whether ours do."""
    return run_filters(filters, Document(id="", text=text, source="")) is None


def speed(keep: Callable[[str], bool], texts: Sequence[str]) -> float:
    """Megabytes a second."""
    num_bytes = sum(len(text.encode()) for text in texts)
    start = time.process_time()
    for text in texts:
        keep(text)
    return num_bytes / 1e6 / (time.process_time() - start)


def measure_speed(texts: Sequence[str], with_peers: bool) -> None:
    """Print the speed of each filter and of all in a row."""
    rows: dict[str, tuple[list[BaseFilter], list[Filter]]] = {
        name: ([PEERS[name]], [FILTERS[name]]) for name in FILTERS
    }
    rows["all four in a row"] = list(PEERS.values()), list(FILTERS.values())
    reference = Unigrams.from_counts(count_words(map(Words, texts)))
    rows |= {each.stage: ([], [each]) for each in llama_3(reference)}
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, (their_filters, our_filters) in rows.items():
            empty_tables()
            if their_filters and with_peers:
                speeds[name, "datatrove"].append(speed(lambda text, f=their_filters: theirs(f, text), texts))
            speeds[name, "lilpipe"].append(speed(lambda text, f=our_filters: ours(f, text), texts))
            speeds[name, "warm"].append(speed(lambda text, f=our_filters: ours(f, text), texts))
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB, MB/s: median of {ROUNDS} rounds (least to most)")
    for name in rows:
        cells = [
            f"{side} {spread(speeds[name, side])}" for side in ("datatrove", "lilpipe", "warm") if speeds[name, side]
        ]
        if both := list(zip(speeds[name, "datatrove"], speeds[name, "lilpipe"], strict=False)):
            cells.append(f"ratio of a round {spread([mine / peer for peer, mine in both], 1)}")
        print(f"  {name:18} " + "   ".join(cells))


def llama_3(reference: Unigrams) -> list[Filter]:
    """Filters that datatrove has no equal of."""
    return [DuplicateNgramCoverage(0.5, 10), DirtyWords(3), Divergence(8.0, reference)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- agreement ----------------------------------------------------------------------------------------------------


def with_spacys_words(text: str) -> Document:
    """A document whose words are split by spaCy."""
    document = Document(id="", text=text, source="")
    packed = b"".join(map(word_tables._token_facts, split_into_words(text)))
    document.words.__dict__["_facts"] = np.frombuffer(packed, word_tables._TOKEN)
    return document


def cause(name: str, text: str) -> str:
    """Why the decisions differ."""
    settled = (FILTERS[name](with_spacys_words(text)) is None) == theirs([PEERS[name]], text)
    differing: Counter[str] = Counter()
    for chunk in text.split():
        if split_chunk(chunk) != (as_spacy := split_into_words(chunk)):
            differing[f"spaCy splits {chunk!r} as {as_spacy}, lilpipe as {split_chunk(chunk)}"] += 1
    (example, count), *_ = differing.most_common(1) or [("no chunk by itself", 0)]
    return f"{'splitting' if settled else 'NOT SETTLED by spaCy words'}: {count} x {example}"


def measure_agreement(title: str, texts: dict[str, str]) -> None:
    """Print the share of texts on which keep or drop is the same, and each that differs."""
    differing: dict[str, list[str]] = {name: [] for name in FILTERS}
    chain = 0
    for key, text in texts.items():
        for name in FILTERS:
            if theirs([PEERS[name]], text) != ours([FILTERS[name]], text):
                differing[name].append(key)
        chain += theirs(list(PEERS.values()), text) == ours(list(FILTERS.values()), text)
    shares = {name: 1 - len(keys) / len(texts) for name, keys in differing.items()} | {"chain": chain / len(texts)}
    print(f"{title}, {len(texts)} documents: " + ", ".join(f"{name} {share:.4f}" for name, share in shares.items()))
    for name, keys in differing.items():
        for key in keys:
            print(f"  {name} {key}: {cause(name, texts[key])}")


def main(arguments: Sequence[str]) -> None:
    """Print both tables."""
    logger.disable("datatrove")
    named = [Path(each) for each in arguments if each != "--all"]
    folder = named[0] if named else Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder; name the one that holds the shared data")
    everything = "--all" in arguments
    english = texts_of(folder, ENGLISH)
    tldr = list(texts_of(folder, ["tldr"]).items())
    theirs(list(PEERS.values()), "Load spaCy.")
    measure_speed(part_of(list(english.values()), SPEED_BYTES), with_peers=True)
    print("tldr:")
    measure_speed([text for _, text in tldr[::40]], with_peers=False)
    for name in ENGLISH:
        texts = list(texts_of(folder, [name]).items())
        measure_agreement(name, dict(texts if everything else texts[::8]))
    measure_agreement("tldr", dict(tldr[:: 10 if everything else 80]))


if __name__ == "__main__":
    main(sys.argv[1:])
