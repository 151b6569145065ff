"""Sections ``tokenizer`` and ``tokens``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lilpipe.config.section import NumWorkers, Section


class TokenizerConfig(Section):
    """Byte-level BPE."""

    vocab_size: Annotated[int, Field(ge=257 + 8)] = 32_768
    """Size with the 256 bytes and the special tokens."""
    pattern: str = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    """Regular expression that splits text before merging; the default takes digits one by one."""
    max_bytes: PositiveInt | None = None
    """Train on at most this many bytes of the corpus, in its order (which is random)."""
    max_exercise_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The exercises of the `prompts` stage, where it is an input, are at most this share of the training bytes."""


class TokensConfig(Section):
    """Documents to token shards."""

    streams_by: Literal["none", "source", "label", "language", "licence"] = "none"
    """A stream of its own for each value of this column of the corpus, so that `pretrain.mixture` can weigh them;
    `none`: one stream, `corpus`. The exercises are a stream either way."""
    shard_tokens: PositiveInt = 10_000_000
    """A shard is closed once it holds this many tokens."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents held out for validation, by a hash of the document's text."""
    num_workers: NumWorkers = 2
    """Encoding threads."""
