"""Speed of the tokenizer stage beside rustbpe called bare and Hugging Face tokenizers, and its ids beside theirs.

``python -m tests.benchmarks.tokenizer [FOLDER] [BASE.tiktoken PATTERN]``, with the folder of the shared documents
(default ``../shared/data``) and, to extend it and compare with it, a vocabulary. All learn 32 k tokens from the same
English documents (25 MB) by the same pattern, in turn; the stage reads them from its artifact, the others have them as
strings in memory. Ids are compared on all of the shared documents, under every preset.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import tiktoken
import tokenizers
from rustbpe import Tokenizer as RustTokenizer  # pyright: ignore[reportAttributeAccessIssue]: no stubs

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.schemas.tables import write_table
from lilpipe.stage import Workspace
from lilpipe.tokenizer import bpe
from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer, special_tokens
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.sample import Sample
from lilpipe.tokenizer.vocabulary import read_vocabulary
from tests import artifacts
from tests.benchmarks.english import english_documents

PATTERN = "gpt4"
VOCAB_SIZE = 32_768
ROUNDS = 5


def main() -> None:
    """Print the figures."""
    folder, rows = english_documents()
    texts = [row["text"] for row in rows]
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB; {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as root:
        columns = {"source": [row["source"] for row in rows], "language": ["en"] * len(rows), "text": texts}
        write_table(Path(root, "corpus/documents/00000.arrow"), pa.table(columns))
        trained = compare_training(Path(root), texts, num_bytes)
        compare_encoding(trained, texts, num_bytes)
        if len(sys.argv) > 3:
            measure_extension(Path(root), sys.argv[2], sys.argv[3], num_bytes)
        compare_ids(folder, texts, Path(root))


# --- speed --------------------------------------------------------------------------------------------------------


def compare_training(root: Path, texts: list[str], num_bytes: int) -> BytePairTokenizer:
    """Learn a vocabulary each, in turn."""
    config = TokenizerConfig(vocab_size=VOCAB_SIZE, pattern=PATTERN)
    measure(
        f"BPE training, {VOCAB_SIZE} tokens, all cores",
        {
            "rustbpe, bare": lambda: train_rustbpe(texts),
            "the stage's training": lambda: learn(root, config),
            "the whole stage, with report": partial(run_stage, root, config),
            "Hugging Face tokenizers": lambda: train_hugging_face(texts),
        },
        num_bytes,
        unit="MB/s",
    )
    trained = Tokenizer.load(root / "work" / "output")
    assert isinstance(trained, BytePairTokenizer)
    return trained


def train_rustbpe(texts: list[str]) -> None:
    """As its own documentation says."""
    RustTokenizer().train_from_iterator(iter(texts), VOCAB_SIZE - len(special_tokens()), pattern=PATTERNS[PATTERN])


def learn(root: Path, config: TokenizerConfig) -> BytePairTokenizer:
    """All that the stage does until it has a tokenizer that encodes: reading, counting, training."""
    sample = Sample.plan(config, root / "corpus", None)
    texts = bpe.counted(sample.texts(), Counter(), Workspace(root / "work"), total=sample.num_bytes)
    return bpe.learn((text.text for text in texts), config, None)


def run_stage(root: Path, config: TokenizerConfig) -> dict[str, float]:
    """Training, measuring and the report."""
    return bpe.STAGE.run(config, {"corpus": artifacts.artifact(root / "corpus")}, Workspace(root / "work"))


def train_hugging_face(texts: list[str]) -> None:
    """With the same pattern and size."""
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[PATTERN]), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])  # pyright: ignore
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]: its stubs name no arguments
        vocab_size=VOCAB_SIZE - len(special_tokens()), initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator(texts, trainer)


def compare_encoding(trained: BytePairTokenizer, texts: list[str], num_bytes: int) -> None:
    """Encode one document after the other."""
    bare = tiktoken.Encoding("bare", pat_str=trained.pattern, mergeable_ranks=trained.ranks, special_tokens={})
    measure(
        "Encoding, one thread",
        {
            "tiktoken's encode_ordinary": lambda: [bare.encode_ordinary(text) for text in texts],
            "Tokenizer.encode_array": lambda: [trained.encode_array(text) for text in texts],
        },
        num_bytes,
        unit="MB/s",
    )


def measure_extension(root: Path, base: str, pattern: str, num_bytes: int) -> None:
    """Learn 28 k tokens above a vocabulary, as Llama 3 did, and compare with it."""
    size = len(read_vocabulary(Path(base)).ranks) + 28_000
    config = TokenizerConfig.model_validate(
        {"base": base, "pattern": pattern, "vocab_size": size, "compare": {"base": {"path": base, "pattern": pattern}}}
    )
    vocabulary = read_vocabulary(Path(base))
    texts = (text.text for text in Sample.plan(config, root / "corpus", None).texts())
    start = time.perf_counter()
    bpe.learn(texts, config, vocabulary)
    print(f"Extension by 28,000 tokens: {num_bytes / (time.perf_counter() - start) / 1e6:.2f} MB/s, one core")
    start = time.perf_counter()
    metrics = run_stage(root, config)
    print(f"  the whole stage: {num_bytes / (time.perf_counter() - start) / 1e6:.2f} MB/s")
    names = ("bytes_per_token", "bytes_per_token_of_base", "unused_ratio", "glitch_suspects")
    print("  " + ", ".join(f"{name} {metrics[name]:,.3f}" for name in names))


def measure(title: str, works: dict[str, Callable[[], object]], num_bytes: int, *, unit: str) -> None:
    """Wall time, in turn, the first round being for warming up: the median, and the range."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    print(f"{title} ({unit}, median and range of {ROUNDS})")
    for name, values in seconds.items():
        speeds = sorted(num_bytes / value / 1e6 for value in values)
        print(f"  {name:30} {statistics.median(speeds):6.2f}  {speeds[0]:.2f}-{speeds[-1]:.2f}")


# --- ids ----------------------------------------------------------------------------------------------------------


def compare_ids(folder: Path, texts: list[str], root: Path) -> None:
    """Count the texts of the folder on which ids differ from those of Hugging Face tokenizers, under every preset."""
    everything = all_texts(folder)
    print(f"Ids beside Hugging Face tokenizers' on {len(everything):,} texts")
    for preset in PATTERNS:
        ours = bpe.train_tokenizer(texts[::20], vocab_size=2_048, pattern=preset)
        ours.save(root / preset)
        peer = tokenizers.Tokenizer.from_file(str(root / preset / "tokenizer.json"))
        peer.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue]
        differ = 0
        for start in range(0, len(everything), 1_000):
            batch = everything[start : start + 1_000]
            theirs = peer.encode_batch(batch, add_special_tokens=False)
            differ += sum(ours.encode(text) != each.ids for text, each in zip(batch, theirs, strict=True))
        print(f"  {preset:15} {differ} differ")


def all_texts(folder: Path) -> list[str]:
    """Every string of every row of the folder's files."""
    lines = [
        line for path in sorted(folder.glob("*.jsonl.gz")) for line in gzip.decompress(path.read_bytes()).split(b"\n")
    ]
    rows = [row for row in map(_row, lines) if row]
    for path in sorted(folder.glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def _row(line: bytes) -> dict[str, object]:
    try:
        return json.loads(line)
    except ValueError:  # one of the files breaks off
        return {}


if __name__ == "__main__":
    main()
