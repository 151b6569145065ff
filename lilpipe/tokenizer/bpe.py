"""Stage ``tokenizer``: train byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with rustbpe."""

from __future__ import annotations

from collections.abc import Iterable

from rustbpe import Tokenizer as RustTokenizer  # pyright: ignore[reportAttributeAccessIssue]: no stubs

from lilpipe.config import TokenizerConfig
from lilpipe.errors import DataError
from lilpipe.tokenizer.encoding import SPECIAL_TOKENS, Tokenizer

DEFAULT_PATTERN: str = TokenizerConfig().pattern


def train(texts: Iterable[str], *, vocab_size: int, pattern: str = DEFAULT_PATTERN) -> Tokenizer:
    """Train a tokenizer of exactly ``vocab_size`` ids: 256 bytes, merges, special tokens.

    The result depends on neither the order of the texts nor the number of threads. Raises ``DataError`` where the
    texts hold fewer pairs than there are merges to find.
    """
    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    trainer = RustTokenizer()
    trainer.train_from_iterator(iter(texts), num_ranks, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:
        raise DataError(
            f"tokenizer.vocab_size: got text for {len(ranks) - 256} merges, expected {num_ranks - 256} "
            f"(vocab_size {vocab_size} less 256 bytes and {len(SPECIAL_TOKENS)} special tokens); "
            f"add documents or set tokenizer.vocab_size to at most {len(ranks) + len(SPECIAL_TOKENS)}"
        )
    return Tokenizer(ranks, pattern)
