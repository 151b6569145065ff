"""Sections `tokenizer` and `tokens`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import NumWorkers, Section

PATTERN_NAMES = ("single_digits", "gpt2", "gpt4", "gpt4o", "llama3")
"""Names of the patterns in ``lilpipe.tokenizer.patterns``."""


class OtherTokenizer(Section):
    """A byte-level BPE tokenizer from another source."""

    path: str
    """A `.tiktoken` file, a `tokenizer.json`, or a folder that contains `tokenizer.json`, or GPT-2's `encoder.json` or
    `vocab.json`."""
    pattern: str | None = None
    """Pre-tokenization pattern (a preset's name or a regular expression); required for a `.tiktoken` file, which does
    not contain it."""

    @model_validator(mode="after")
    def _pattern_is_known(self) -> OtherTokenizer:
        _refuse_misspelt(self.pattern)
        if self.path.endswith(".tiktoken") and self.pattern is None:
            raise ValueError(f"pattern: got none, but {self.path} does not contain it; set pattern")
        return self


class TokenizerConfig(Section):
    """Byte-level BPE tokenizer."""

    vocab_size: Annotated[int, Field(le=262_144)] = 32_768
    """Vocabulary size, including the 256 bytes and the special tokens."""
    pattern: str = "single_digits"
    """Pre-tokenization pattern: `single_digits`, `gpt2`, `gpt4`, `gpt4o`, `llama3`, or a regular expression."""
    base: str | None = None
    """Tokenizer to extend: its tokens keep their ids, and new merges get the ids above (Llama 3: tiktoken's 100 k plus
    28 k new tokens). A `.tiktoken` file, a `tokenizer.json` or its folder; `pattern` must be the base's pattern.
    Special tokens of the base are not kept: this pipeline's own follow the merges. If the base is an imported tokenizer
    and `vocab_size` is its size plus these special tokens (one less, since it keeps its end of a document), nothing is
    trained: it is kept whole, and the special tokens are added."""
    num_reserved: NonNegativeInt = 2
    """Number of reserved special tokens, `<|reserved_0|>` and so on. They can get a meaning later without changing any
    id."""
    max_bytes: PositiveInt | None = None
    """Maximum bytes of the corpus to train on, taken in its (random) order; if None, the whole corpus."""
    weights: dict[str, PositiveFloat] = {}
    """Proportions of bytes to train on; documents without a weight are not used. Without `max_bytes`, the scarcest
    group limits the total. With `max_bytes`, a group with too few bytes gives all it has and the total gets smaller. If
    empty, the whole corpus is used."""
    weights_by: Literal["source", "label", "language"] = "source"
    """Corpus column that the names in `weights` refer to."""
    max_exercise_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Maximum fraction of training bytes from the exercises of the `prompts` stage (if that is an input)."""
    compare: dict[str, OtherTokenizer] = {}
    """Tokenizers to compare with in the report, by display name."""

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
    """Raise ``ValueError`` for a single word that is not a known name: probably a misspelt name and not a regular
    expression.
    """
    if pattern is not None and pattern not in PATTERN_NAMES and re.fullmatch(r"\w+", pattern):
        raise ValueError(
            f"pattern: got {pattern!r}, expected a regular expression or one of {', '.join(PATTERN_NAMES)}"
        )


class TokensConfig(Section):
    """Tokenization of documents into token shards."""

    streams_by: Literal["none", "source", "label", "language", "licence"] = "none"
    """Corpus column by which documents are divided into streams, so that `pretrain.mixture` can weight them. `none`: a
    single stream, `corpus`. Exercises are always a separate stream."""
    shard_tokens: PositiveInt = 10_000_000
    """Minimum tokens of a shard before the next one starts."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Fraction of documents in the validation split, chosen by a hash of the document's text."""
    num_workers: NumWorkers = 2
    """Number of encoding threads. An imported tokenizer uses all cores in each."""
