"""Near-duplicate removal beside datatrove's four MinHash steps in the same run, on one core: speed, recall, precision.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.minhash [FOLDER] [--all]

FOLDER holds the shared data. Rounds alternate, each with another seed, and time is the processor's, from texts to texts
that stay. The documents are the Rust book's editions, full of near-duplicates, and every eighth other one in English,
about 4 MB; ``--all`` takes all 25 MB, in one round. Recall: of pairs whose exact Jaccard similarity over 5-grams of
words is at least so much, those of which one goes. Precision: of what goes, the share that is so similar to a document
that stays.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig as DatatroveConfig,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from loguru import logger

from lilpipe.config.corpus import MinhashConfig
from lilpipe.data.filters.words import Words
from lilpipe.data.minhash import MatchBands, near_duplicates
from lilpipe.data.signatures import SignatureWriter
from tests.data.prose import prose

ROUNDS = 3
EVERY = 8
NGRAM_SIZE = 5
SIMILARITIES = (0.5, 0.6, 0.7)
STOCK = MinhashConfig(num_buckets=14, hashes_per_bucket=8, min_similarity=0)
CONFIGS = {
    "lilpipe, 14 x 8": STOCK,
    "lilpipe, as by default": MinhashConfig(),
    "lilpipe, at least 0.55": MinhashConfig(min_similarity=0.55),
}

Remove = Callable[[list[str], int, Path], list[int]]
"""Texts, seed and an empty folder to the numbers of the texts that stay."""


def texts_of(folder: Path, name: str) -> list[str]:
    """The texts of one of the shared files."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def with_datatrove(texts: list[str], seed: int, folder: Path) -> list[int]:
    """FineWeb's settings, 64-bit hashes."""
    config = DatatroveConfig(
        n_grams=NGRAM_SIZE,
        num_buckets=STOCK.num_buckets,
        hashes_per_bucket=STOCK.hashes_per_bucket,
        seed=seed,
        hash_config=HashConfig(precision=64),
    )
    signatures, buckets, removed = (str(folder / name) for name in ("signatures", "buckets", "removed"))
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    MinhashDedupSignature(signatures, config=config).run(documents, 0, 1)
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(signatures, buckets, config=config).run(None, rank, config.num_buckets)
    MinhashDedupCluster(buckets, removed, config=config).run(None, 0, 1)
    return [int(document.id) for document in MinhashDedupFilter(removed).run(documents, 0, 1)]


def with_lilpipe(config: MinhashConfig) -> Remove:
    """Ours, the words split as in the corpus stage."""

    def remove(texts: list[str], seed: int, folder: Path) -> list[int]:
        seeded = config.model_copy(update={"seed": seed})
        signatures, pairs = folder / "signatures", folder / "pairs"
        with SignatureWriter(signatures, 0, seeded) as writer:
            for text in texts:
                writer.add(Words(text).hashes, num_bytes=len(text.encode()))
        for rank in range(seeded.num_buckets):
            MatchBands(seeded, signatures, pairs).run(None, rank, seeded.num_buckets)
        gone = set(near_duplicates(signatures, pairs, seeded)["row"].to_pylist())
        return [number for number in range(len(texts)) if number not in gone]

    return remove


def exact_jaccard(texts: list[str]) -> np.ndarray:
    """float32 [texts, texts]: Jaccard similarity of the sets of word 5-grams, itself and texts without any as 0."""
    sets = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        sets.append({hash(tuple(words[start : start + NGRAM_SIZE])) for start in range(len(words) - NGRAM_SIZE + 1)})
    sizes = np.array([len(each) for each in sets])
    holders = np.repeat(np.arange(len(texts)), sizes)
    distinct, grams = np.unique(np.array([gram for each in sets for gram in each]), return_inverse=True)
    held = np.zeros(len(distinct), bool)
    similarity = np.zeros((len(texts), len(texts)), np.float32)
    for number in range(len(texts)):
        held[:] = False
        held[grams[holders == number]] = True
        common = np.bincount(holders[held[grams]], minlength=len(texts))
        similarity[number] = common / np.maximum(1, sizes + sizes[number] - common)
    np.fill_diagonal(similarity, 0)
    return similarity


def recall(similarity: np.ndarray, stays: list[int], least: float) -> float:
    """Of the pairs that are at least so similar, the share of which one goes."""
    return 1 - (similarity[stays][:, stays] >= least).sum() / (similarity >= least).sum()


def precision(similarity: np.ndarray, stays: list[int], least: float) -> float:
    """Of the documents that go, the share that is so similar to one that stays."""
    goes = np.setdiff1d(np.arange(len(similarity)), stays)
    return float((similarity[goes][:, stays].max(axis=1) >= least).mean())


def timed(remove: Remove, texts: list[str], seed: int) -> tuple[list[int], float]:
    """What stays, and the seconds of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        stays = remove(texts, seed, Path(folder))
        return stays, time.process_time() - start


def compare(texts: list[str], rounds: int) -> None:
    """Speed, recall and precision of all."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    similarity = exact_jaccard(texts)
    contestants = {"datatrove, 14 x 8": with_datatrove} | {name: with_lilpipe(each) for name, each in CONFIGS.items()}
    found: dict[str, list[tuple[list[int], float]]] = {name: [] for name in contestants}
    for seed in range(1, rounds + 1):
        for name, remove in contestants.items():
            found[name].append(timed(remove, texts, seed))
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {rounds} rounds: best and median; recall, precision (mean)")
    print(", ".join(f"{(similarity >= least).sum() // 2:,} pairs of {least} and more" for least in SIMILARITIES))
    print(f"{'':24}{'MB/s':>7}{'':7}{'gone':>6}" + "".join(f"{f'at {least}':>16}" for least in SIMILARITIES))
    for name, results in found.items():
        speeds = [megabytes / seconds for _, seconds in results]
        gone = len(texts) - statistics.mean(len(stays) for stays, _ in results)
        scores = "".join(
            f"{statistics.mean(recall(similarity, stays, least) for stays, _ in results):8.3f}"
            f"{statistics.mean(precision(similarity, stays, least) for stays, _ in results):8.3f}"
            for least in SIMILARITIES
        )
        print(f"{name:24}{max(speeds):7.2f}{statistics.median(speeds):7.2f}{gone:6.0f}{scores}")


def planted(name: str, texts: list[str]) -> None:
    """Recall and precision on copies with 5 % of the words changed, of texts that are no near-duplicates themselves."""
    remove = with_lilpipe(MinhashConfig())
    texts = [text for text in texts if len(re.findall(r"\w+", text)) >= 30]
    texts = [texts[number] for number in timed(remove, texts, 1)[0]]
    vocabulary = re.findall(r"\w+", " ".join(texts[:300]))
    draw = random.Random(0)
    copies = []
    for text in texts:
        parts = re.split(r"(\w+)", text)
        for word in draw.sample(range(len(parts) // 2), round(0.05 * (len(parts) // 2))):
            parts[2 * word + 1] = draw.choice(vocabulary)
        copies.append("".join(parts))
    everything = [*texts, *copies]
    gone = np.setdiff1d(np.arange(len(everything)), timed(remove, everything, 1)[0])
    families = len(np.unique(gone % len(texts)))
    print(f"{name:16}{len(texts):6,} copies: recall {families / len(texts):.4f}, precision {families / len(gone):.4f}")


def main(arguments: list[str]) -> None:
    """Print both tables."""
    logger.disable("datatrove")
    named = [Path(each) for each in arguments if each != "--all"]
    folder = named[0] if named else Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder; name the one that holds the shared data")
    book = texts_of(folder, "rust-book")
    others = [text for name in ("python-peps", "rust-rfcs", "shakespeare") for text in texts_of(folder, name)]
    if "--all" in arguments:
        compare([*book, *others], 1)
    else:
        compare([*book, *others[::EVERY]], ROUNDS)
    print("copies with 5 % of the words changed, as by default:")
    english = [text for text in texts_of(folder, "tldr")[::EVERY] if len(text) > 200]
    for name, texts in {
        "prose": [prose(seed, 12) for seed in range(2_000)],
        "rust-book": book,
        "tldr": english,
    }.items():
        planted(name, texts)
    planted("peps, rfcs", others[::EVERY])


if __name__ == "__main__":
    main(sys.argv[1:])
