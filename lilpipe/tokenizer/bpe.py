"""Stage ``tokenizer``: train byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with rustbpe.

It learns from the corpus and, where a Prompts artifact is an input, from its exercises as well, so that the words of
the tasks are in the vocabulary: exercises are taken in their order up to ``max_exercise_share`` of the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rustbpe import Tokenizer as RustTokenizer  # pyright: ignore[reportAttributeAccessIssue]: no stubs

from lilpipe.alignment.prompts import read_exercises
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import TokenizerConfig
from lilpipe.data.documents import read_documents
from lilpipe.errors import ConfigError, DataError
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import SPECIAL_TOKENS, Tokenizer
from lilpipe.tokenizer.patterns import resolve_pattern
from lilpipe.tokenizer.report import Usage, measure_usage, write_report

DEFAULT_PATTERN = resolve_pattern(TokenizerConfig().pattern)

MEASURED_BYTES = 4_000_000
"""Text of the corpus, and of the exercises, over which the usage of tokens is measured."""

SourcedText = tuple[str, str]
"""Name of a source, and a text of it."""


def run(config: TokenizerConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on the inputs and save. Raises ``DataError`` where there is too little text for the vocabulary."""
    corpus, prompts = _path(inputs, "corpus"), _path(inputs, "prompts")
    assert corpus is not None
    corpus_bytes = sum(len(text.encode()) for _, text in _read_corpus(corpus))
    corpus_bytes = min(corpus_bytes, config.max_bytes or corpus_bytes)
    exercise_bytes = int(corpus_bytes * config.max_exercise_share / (1 - config.max_exercise_share))

    def texts(max_bytes: int | None = None) -> Iterator[SourcedText]:
        yield from take_bytes(_read_corpus(corpus), max_bytes or corpus_bytes)
        if prompts is not None:
            yield from take_bytes(_read_exercises(prompts), min(max_bytes or exercise_bytes, exercise_bytes))

    seen: Counter[str] = Counter()
    read = counted(texts(), seen, workspace, total=corpus_bytes + (exercise_bytes if prompts else 0))
    tokenizer = train((text for _, text in read), vocab_size=config.vocab_size, pattern=config.pattern)
    tokenizer.save(workspace.output)

    usage = measure_usage(tokenizer, texts(min(corpus_bytes, MEASURED_BYTES)))
    _check_lossless(tokenizer, usage)
    write_report(tokenizer, usage, workspace.report / "report.html")
    return {
        "bytes_per_token": usage.num_bytes.total() / usage.num_tokens.total(),
        **{
            f"bytes_per_token_{name}": usage.num_bytes[name] / num_tokens
            for name, num_tokens in usage.num_tokens.items()
        },
        "share_never_used": usage.share_never_used,
        "vocab_size": tokenizer.vocab_size,
        "training_bytes": seen.total(),
    }


def train(texts: Iterable[str], *, vocab_size: int, pattern: str = DEFAULT_PATTERN) -> Tokenizer:
    """Train a tokenizer of exactly ``vocab_size`` ids: 256 bytes, merges, special tokens.

    The result depends on neither the order of the texts nor the number of threads. Raises ``DataError`` where the
    texts hold fewer pairs than there are merges to find, ``ConfigError`` for a pattern that does not compile.
    """
    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    pattern = resolve_pattern(pattern)
    trainer = RustTokenizer()
    try:
        trainer.train_from_iterator(iter(texts), num_ranks, pattern=pattern)
    except ValueError as error:
        raise ConfigError(f"tokenizer.pattern: got {pattern!r}, expected a regular expression ({error})") from error
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:
        raise DataError(
            f"tokenizer.vocab_size: got {vocab_size}, which takes {num_ranks - 256} merges beside 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens, but the text has only {len(ranks) - 256}; "
            f"add documents or set tokenizer.vocab_size to at most {len(ranks) + len(SPECIAL_TOKENS)}"
        )
    return Tokenizer(ranks, pattern)


def _check_lossless(tokenizer: Tokenizer, usage: Usage) -> None:
    """Raise ``ConfigError`` if text was dropped, which is what encoding does where the pattern matches nothing."""
    lengths = np.array([len(token) for token in tokenizer.ranks])
    got, expected = int(usage.token_counts[: len(lengths)] @ lengths), usage.num_bytes.total()
    if got != expected:
        raise ConfigError(
            f"tokenizer.pattern: got {tokenizer.pattern!r}, which matches {got:,} of {expected:,} bytes of text, "
            r"expected a pattern that matches all, or the rest is lost; add an alternative for it, such as `|[\s\S]`"
        )


# --- reading ------------------------------------------------------------------------------------------------------


def take_bytes(texts: Iterable[SourcedText], max_bytes: int) -> Iterator[SourcedText]:
    """Texts in their order, ``max_bytes`` of UTF-8 together at most; the last one is cut to fit."""
    left = max_bytes
    for source, text in texts:
        encoded = text.encode()
        if len(encoded) > left:
            if cut := encoded[:left].decode(errors="ignore"):
                yield source, cut
            return
        left -= len(encoded)
        yield source, text


def counted(
    texts: Iterable[SourcedText], seen: Counter[str], workspace: Workspace, *, total: int
) -> Iterator[SourcedText]:
    """Pass texts through, add up their bytes by source in ``seen``, and report each megabyte of them."""
    for source, text in texts:
        before = seen.total()
        seen[source] += len(text.encode())
        if seen.total() // 1_000_000 > before // 1_000_000:
            workspace.progress(seen.total(), max(seen.total(), total), "bytes")
        yield source, text


def _path(inputs: Inputs, role: str) -> Path | None:
    artifact = inputs.get(role)
    return artifact.path if isinstance(artifact, Artifact) else None


def _read_corpus(directory: Path) -> Iterator[SourcedText]:
    for batch in read_documents(directory):
        yield from zip(batch["source"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _read_exercises(directory: Path) -> Iterator[SourcedText]:
    return (("exercises", text) for _, text in read_exercises(directory))


STAGE = Stage(
    name="tokenizer",
    output="Tokenizer",
    config=TokenizerConfig,
    run=run,
    inputs={"corpus": "Corpus"},
    optional_inputs={"prompts": "Prompts"},
    main_metric="bytes_per_token",
)
