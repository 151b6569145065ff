"""Token shards for benchmarks of training."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from lilpipe.artifact import Artifact
from lilpipe.tokenizer.bpe import train_tokenizer
from tests.training.conftest import write_tokens

VALIDATION_EVERY = 20


def standard_library(max_bytes: int = 4_000_000) -> list[str]:
    """Python's own modules: text that is on every machine."""
    texts, num_bytes = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or num_bytes > max_bytes:
            continue
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        num_bytes += len(texts[-1])
    return texts


def token_shards(directory: Path, texts: list[str], *, vocab_size: int) -> Artifact:
    """Shards of these texts with a vocabulary learnt from them; each twentieth is for validation."""
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    held_out = texts[::VALIDATION_EVERY]
    rest = [text for index, text in enumerate(texts) if index % VALIDATION_EVERY]
    return write_tokens(directory, tokenizer, {"corpus": {"train": rest, "validation": held_out}})
