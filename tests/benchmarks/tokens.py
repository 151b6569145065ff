"""Speed of the tokens stage beside tiktoken called bare, and of the pretraining loader.

``python -m tests.benchmarks.tokens [FOLDER]``, with the folder of the shared documents (default ``../shared/data``).
Both sides encode the same English documents (25 MB) with the same 32 k vocabulary on as many threads, in turn.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import tiktoken

from lilpipe.config.tokens import TokensConfig
from lilpipe.schemas.tables import write_table
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokens import build
from lilpipe.tokens.data_phase import Steps
from lilpipe.tokens.loader import DataPhasePlan, PretrainLoader
from lilpipe.tokens.shards import TokenShards, write_index
from lilpipe.tokens.tokens_report import write_tokens_report
from tests.benchmarks.english import english_documents

NUM_THREADS = len(os.sched_getaffinity(0))
REPEATS = 5
ROUNDS_OF_LOADER = 2_000


def main() -> None:
    """Print the figures as lines of Markdown."""
    _, rows = english_documents()
    texts = [row["text"] for row in rows]
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB; {NUM_THREADS} threads\n")
    tokenizer = train_tokenizer(texts, vocab_size=32_768)
    with tempfile.TemporaryDirectory() as root:
        corpus = pa.table({name: [row[name] for row in rows] for name in ("id", "source", "text")})
        write_table(Path(root, "corpus/documents/00000.arrow"), corpus)
        tokenizer.save(Path(root, "tokenizer"))
        compare_encoding(Path(root), tokenizer, texts)
        measure_loader(TokenShards.open(Path(root, "shards/output")))


# --- encoding -----------------------------------------------------------------------------------------------------


def compare_encoding(root: Path, tokenizer: BytePairTokenizer, texts: list[str]) -> None:
    """Bare tiktoken and the stage, run in turn; the last shards stay in ``root/shards``."""
    bare = tiktoken.Encoding(
        "bare", pat_str=tokenizer.pattern, mergeable_ranks=dict(tokenizer.ranks), special_tokens=tokenizer.special_ids
    )
    num_bytes = sum(len(text.encode()) for text in texts)
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(REPEATS):
        workspace = Workspace(root / ("shards" if number == REPEATS - 1 else f"shards{number}"))
        works: dict[str, Callable[[], object]] = {
            "tiktoken encode_ordinary_batch": lambda: bare.encode_ordinary_batch(texts, num_threads=NUM_THREADS),
            "tiktoken encode_to_numpy, threads": lambda: _encode_to_numpy(bare, texts),
            "tokens stage: read, split, encode, write": partial(_write_shards, root, tokenizer, workspace),
            "tokens stage: report": lambda w=workspace: write_tokens_report(
                TokenShards.open(w.output), w.root / "report.html"
            ),
        }
        for name, work in works.items():
            times.setdefault(name, []).append(_time(work))
    print("| work | wall s | CPU s | spread of CPU | MB/s a core |\n| --- | --- | --- | --- | --- |")
    for name, runs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        spread = max(cpu for _, cpu in runs) - min(cpu for _, cpu in runs)
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {spread:.2f} | {num_bytes / 1e6 / cpu:.2f} |")


def _encode_to_numpy(bare: tiktoken.Encoding, texts: list[str]) -> list[np.ndarray]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda text: bare.encode_to_numpy(text, disallowed_special=()), texts))


def _write_shards(root: Path, tokenizer: BytePairTokenizer, workspace: Workspace) -> None:
    config = TokensConfig(num_workers=NUM_THREADS, shard_tokens=1_000_000)
    progress = build.Progress(workspace, total=0)
    texts = build.read_corpus(root / "corpus", "none")
    build.write_streams(workspace.output, texts, tokenizer, config, progress)
    tokenizer.save(workspace.output / "tokenizer")
    write_index(workspace.output, tokenizer, ["corpus"])


def _write_report(workspace: Workspace) -> None:
    write_tokens_report(TokenShards.open(workspace.output), workspace.root / "report.html")


def _time(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


# --- loader -------------------------------------------------------------------------------------------------------


def measure_loader(shards: TokenShards) -> None:
    """Microseconds of a batch: its order alone, and whole, for steps in turn and anywhere."""
    print("\n| packing | batch x tokens | order us | next batch us | any batch us | rows/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    anywhere = np.random.default_rng(0).integers(0, 1_000_000, size=ROUNDS_OF_LOADER).tolist()
    for packing in ("concat", "best_fit"):
        for batch_size, seq_len in ((16, 128), (16, 1024), (64, 1024), (64, 4096)):
            plan = DataPhasePlan([Steps(0, 1_000_000, batch_size)], seq_len, {"corpus": 1.0})
            loader = PretrainLoader(shards, [plan], seed=0, packing=packing)
            in_turn = range(ROUNDS_OF_LOADER)
            order, following, any_step = (
                _microseconds(loader.rows, in_turn),
                _microseconds(loader.batch, in_turn),
                _microseconds(loader.batch, anywhere),
            )
            print(
                f"| {packing} | {batch_size} x {seq_len} | {order:.1f} | {following:.0f} | {any_step:.0f} "
                f"| {1e6 * batch_size / following:,.0f} |"
            )


def _microseconds(work: Callable[[int], object], steps: range | list[int]) -> float:
    """CPU microseconds of a call; the least of the means over slices, as others use the machine too."""
    means = []
    for first in range(0, len(steps), 200):
        started = time.process_time()
        for step in steps[first : first + 200]:
            work(step)
        means.append((time.process_time() - started) / 200 * 1e6)
    return min(means)


if __name__ == "__main__":
    main()
