"""Sections ``tokenizer`` and ``tokens``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import NumWorkers, Section

PATTERN_NAMES = ("single_digits", "gpt2", "gpt4", "gpt4o", "llama3")
"""The patterns of ``lilpipe.tokenizer.patterns``."""


class OtherTokenizer(Section):
    """A byte-level BPE vocabulary from elsewhere."""

    path: str
    """A `.tiktoken` file, a `tokenizer.json`, or a folder with that or with GPT-2's `encoder.json` or `vocab.json`."""
    pattern: str | None = None
    """Its pattern, for a `.tiktoken` file, which does not carry it: a preset's name or a regular expression."""

    @model_validator(mode="after")
    def _pattern_is_known(self) -> OtherTokenizer:
        _refuse_misspelt(self.pattern)
        if self.path.endswith(".tiktoken") and self.pattern is None:
            raise ValueError(f"pattern: got none, expected one: {self.path} does not carry it; name it")
        return self


class TokenizerConfig(Section):
    """Byte-level BPE."""

    vocab_size: Annotated[int, Field(le=262_144)] = 32_768
    """Size with the 256 bytes, the merges and the special tokens."""
    pattern: str = "single_digits"
    """What splits text before merging: `single_digits`, `gpt2`, `gpt4`, `gpt4o`, `llama3`, or a regular expression."""
    base: str | None = None
    """Vocabulary to extend: its tokens keep their ids, and the merges learnt here come above them (Llama 3: tiktoken's
    100 k and 28 k more). A `.tiktoken` file, a `tokenizer.json` or its folder; `pattern` must be the base's own.
    Special tokens of the base are left out: this pipeline's come after the merges."""
    num_reserved: NonNegativeInt = 2
    """Special tokens without a meaning, `<|reserved_0|>` and so on, to be given one later without changing any id."""
    max_bytes: PositiveInt | None = None
    """Train on at most this many bytes of the corpus, in its order (which is random)."""
    weights: dict[str, PositiveFloat] = {}
    """Train on bytes in these proportions, what has no weight being left out: as much as is there of the scarcest, or
    `max_bytes` in all, less what is short. None: all as it comes."""
    weights_by: Literal["source", "label", "language"] = "source"
    """What the names in `weights` are."""
    max_exercise_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The exercises of the `prompts` stage, where it is an input, are at most this share of the training bytes."""
    compare: dict[str, OtherTokenizer] = {}
    """Tokenizers to stand beside this one in the report, by the name to show."""

    @model_validator(mode="after")
    def _pattern_and_size_are_possible(self) -> TokenizerConfig:
        _refuse_misspelt(self.pattern)
        least = 256 + 1 + 6 + self.num_reserved
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size: got {self.vocab_size}, expected at least {least}: 256 bytes, a merge, 6 special tokens "
                f"and {self.num_reserved} reserved ones"
            )
        return self


def _refuse_misspelt(pattern: str | None) -> None:
    """Refuse a single word, which is a misspelt name and hardly a pattern."""
    if pattern is not None and pattern not in PATTERN_NAMES and re.fullmatch(r"\w+", pattern):
        raise ValueError(
            f"pattern: got {pattern!r}, expected a regular expression or one of {', '.join(PATTERN_NAMES)}"
        )


class TokensConfig(Section):
    """Documents to token shards."""

    streams_by: Literal["none", "source", "label", "language", "licence"] = "none"
    """A stream of its own for each value of this column of the corpus, so that `pretrain.mixture` can weigh them;
    `none`: one stream, `corpus`. The exercises are a stream either way."""
    shard_tokens: PositiveInt = 10_000_000
    """A shard is closed once it holds this many tokens."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents held out for validation, by a hash of the document's text."""
    num_workers: NumWorkers = 2
    """Encoding threads."""
