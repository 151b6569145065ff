"""Stage ``tokenizer``: trains byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), or extends a vocabulary.

It trains on the corpus and, if a Prompts artifact is an input, on its exercises, so that their words are in the
vocabulary. Exercises are read in order, up to ``max_exercise_ratio`` of the bytes. rustbpe trains;
``lilpipe.tokenizer.extension`` extends the vocabulary given as ``base``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tiktoken
from rustbpe import Tokenizer as RustTokenizer  # pyright: ignore[reportAttributeAccessIssue]: no stubs

from lilpipe.artifact import Inputs, digest_json, optional_input, write_atomically
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError, ConfigError, DataError
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import (
    NUM_RESERVED,
    TOKENIZER_FILES,
    BytePairTokenizer,
    ImportedTokenizer,
    Tokenizer,
    special_tokens,
)
from lilpipe.tokenizer.extension import check_base, extend
from lilpipe.tokenizer.patterns import resolve_pattern
from lilpipe.tokenizer.sample import Sample, Text
from lilpipe.tokenizer.tokenizer_report import build_compression_report, build_report
from lilpipe.tokenizer.usage import Totals, Usage, find_suspects, measure_usage
from lilpipe.tokenizer.vocabulary import TIKTOKEN_FILE, Vocabulary, read_vocabulary, vocabulary_file

DEFAULT_PATTERN = resolve_pattern(TokenizerConfig().pattern)

MEASURED_BYTES = 32_000_000
"""Maximum bytes of training text on which token usage is measured."""

MAX_METRICS = 20
"""Maximum number of sources, and of languages, with their own metric: those with the most bytes."""


def run(config: TokenizerConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on the inputs, save the tokenizer and its report. Raises ``DataError`` if the text has too few merges."""
    corpus = _path(inputs, "corpus")
    assert corpus is not None
    base, kept = _read_base(config), _read_kept(config)
    others = _read_others(config)
    sample = Sample.plan(config, corpus, _path(inputs, "prompts"))
    for line in sample.shortages():
        workspace.log(line)
    if kept is not None:
        return _save_kept(kept, sample, others, workspace)
    taken: Counter[str] = Counter()
    texts = counted(sample.texts(), taken, workspace, total=sample.num_bytes)
    tokenizer = learn((text.text for text in texts), config, base)
    tokenizer.save(workspace.output)
    tokenizer.save_tiktoken(workspace.output / TIKTOKEN_FILE)

    usage = measure_usage(tokenizer, sample.texts(MEASURED_BYTES), others=others)
    _check_lossless(tokenizer, usage)
    num_base = len(base.ranks) if base else 256
    suspects = find_suspects(usage, num_base)
    shares = sample.shares if config.weights else {}
    html = build_report(tokenizer, usage, suspects, shares, taken, others=list(others), num_base=num_base)
    write_atomically(workspace.report / "report.html", html)
    return {
        **_compression(usage, list(others)),
        "tokens_per_word": usage.total.tokens_per_word,
        "unused_ratio": usage.unused_ratio,
        "glitch_suspects": suspects.total,
        "vocab_size": tokenizer.vocab_size,
        "training_bytes": taken.total(),
    }


def _save_kept(
    tokenizer: ImportedTokenizer, sample: Sample, others: Mapping[str, tiktoken.Encoding], workspace: Workspace
) -> Metrics:
    """Save an imported tokenizer with our special tokens, and measure its compression."""
    tokenizer.save(workspace.output)
    usage = measure_usage(tokenizer, sample.texts(MEASURED_BYTES), others=others)
    html = build_compression_report(tokenizer, usage, others=list(others))
    write_atomically(workspace.report / "report.html", html)
    return {
        **_compression(usage, list(others)),
        "tokens_per_word": usage.total.tokens_per_word,
        "vocab_size": tokenizer.vocab_size,
    }


def learn(texts: Iterable[str], config: TokenizerConfig, base: Vocabulary | None) -> BytePairTokenizer:
    """Train a tokenizer with the section's settings; extend ``base`` if given."""
    if base is None:
        return train_tokenizer(
            texts, vocab_size=config.vocab_size, pattern=config.pattern, num_reserved=config.num_reserved
        )
    return train_extension(texts, base, config)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, pattern: str = DEFAULT_PATTERN, num_reserved: int = NUM_RESERVED
) -> BytePairTokenizer:
    """Train a tokenizer of exactly ``vocab_size`` ids: 256 bytes, merges, special tokens.

    The result depends on neither the order of the texts nor the number of threads. Raises ``DataError`` if the texts
    have too few pairs to merge, ``ConfigError`` if the pattern does not compile.
    """
    num_ranks = vocab_size - len(special_tokens(num_reserved))
    trainer = RustTokenizer()
    try:
        trainer.train_from_iterator(iter(texts), num_ranks, pattern=resolve_pattern(pattern))
    except ValueError as error:
        raise ConfigError(f"tokenizer.pattern: got {pattern!r}, expected a regular expression ({error})") from error
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    _check_size(len(ranks), vocab_size, num_reserved=num_reserved, num_base=256)
    return BytePairTokenizer(ranks, pattern, num_reserved=num_reserved)


def train_extension(texts: Iterable[str], base: Vocabulary, config: TokenizerConfig) -> BytePairTokenizer:
    """Extend ``base`` to exactly ``config.vocab_size`` ids; raises the errors of ``train_tokenizer``."""
    num_merges = config.vocab_size - len(special_tokens(config.num_reserved)) - len(base.ranks)
    ranks = extend(texts, base.ranks, num_merges, pattern=config.pattern)
    _check_size(len(ranks), config.vocab_size, num_reserved=config.num_reserved, num_base=len(base.ranks))
    return BytePairTokenizer(ranks, config.pattern, num_reserved=config.num_reserved)


def _check_size(num_ranks: int, vocab_size: int, *, num_reserved: int, num_base: int) -> None:
    num_special = len(special_tokens(num_reserved))
    if num_ranks + num_special < vocab_size:
        of_base = "256 bytes" if num_base == 256 else f"{num_base:,} tokens of the base"
        raise DataError(
            f"tokenizer.vocab_size: got {vocab_size}, which takes {vocab_size - num_special - num_base} merges beside "
            f"{of_base} and {num_special} special tokens, but the text has only {num_ranks - num_base}; "
            f"add documents or set tokenizer.vocab_size to at most {num_ranks + num_special}"
        )


def _check_lossless(tokenizer: BytePairTokenizer, usage: Usage) -> None:
    """Raise ``ConfigError`` if encoding dropped text, which happens where the pattern does not match."""
    lengths = np.array([len(token) for token in tokenizer.ranks])
    got, expected = int(usage.token_counts @ lengths), usage.total.num_bytes
    if got != expected:
        raise ConfigError(
            f"tokenizer.pattern: got {tokenizer.pattern!r}, which matches {got:,} of {expected:,} bytes of text, "
            r"expected a pattern that matches all text; add an alternative for the rest, such as `|[\s\S]`"
        )


def _compression(usage: Usage, others: list[str]) -> Metrics:
    """Return bytes per token: in total, by source, by language, and of the tokenizers in ``compare``."""
    named = {
        **{f"bytes_per_token_{name}": totals for name, totals in _largest(usage.by_source)},
        **{f"bytes_per_token_language_{name}": totals for name, totals in _largest(usage.by_language)},
    }
    return {
        "bytes_per_token": usage.total.bytes_per_token,
        **{f"bytes_per_token_of_{other}": usage.total.bytes_per_token_of(other) for other in others},
        **{name: totals.bytes_per_token for name, totals in named.items()},
    }


def _largest(totals: Mapping[str, Totals]) -> list[tuple[str, Totals]]:
    return sorted(totals.items(), key=lambda item: (-item[1].num_bytes, item[0]))[:MAX_METRICS]


# --- reading ------------------------------------------------------------------------------------------------------


def counted(texts: Iterable[Text], taken: Counter[str], workspace: Workspace, *, total: int) -> Iterator[Text]:
    """Yield the texts, add their bytes by group to ``taken``, and report progress each megabyte."""
    done = 0
    for text in texts:
        num_bytes = len(text.text.encode())
        taken[text.group] += num_bytes
        before, done = done, done + num_bytes
        if done // 1_000_000 > before // 1_000_000:
            workspace.progress(done, max(done, total), "bytes")
        yield text


def _path(inputs: Inputs, role: str) -> Path | None:
    artifact = optional_input(inputs, role)
    return artifact.path if artifact else None


def _read_kept(config: TokenizerConfig) -> ImportedTokenizer | None:
    """Return ``base`` with our special tokens if it is an imported tokenizer and ``vocab_size`` leaves no merges."""
    if config.base is None or not (tokenizer := _imported_base(config.base)):
        return None
    names = added_names(tokenizer, config.num_reserved)
    return tokenizer.extended(names) if config.vocab_size == tokenizer.vocab_size + len(names) else None


def _imported_base(base: str) -> ImportedTokenizer | None:
    path = vocabulary_file(Path(base))
    if path.suffix == ".tiktoken" or path.name not in TOKENIZER_FILES:
        return None
    try:
        tokenizer = Tokenizer.load(path.parent)
    except ArtifactError as error:
        raise ConfigError(f"tokenizer.base: {error}") from error
    return tokenizer if isinstance(tokenizer, ImportedTokenizer) else None


def added_names(tokenizer: Tokenizer, num_reserved: int) -> list[str]:
    """Return our special tokens that an imported tokenizer lacks; its own token ends a document."""
    return [name for name in special_tokens(num_reserved)[1:] if name not in tokenizer.special_ids]


def _read_base(config: TokenizerConfig) -> Vocabulary | None:
    """Return the vocabulary that is extended by merges. Raises ``ConfigError`` if that is impossible."""
    if config.base is None or _read_kept(config) is not None:
        return None
    try:
        base = read_vocabulary(Path(config.base))
    except DataError as error:
        if (tokenizer := _imported_base(config.base)) is None:
            raise
        size = tokenizer.vocab_size + len(added_names(tokenizer, config.num_reserved))
        raise ConfigError(
            f"tokenizer.vocab_size: got {config.vocab_size}, expected {size}: {config.base} cannot be extended by "
            f"merges, but by our special tokens alone ({error})"
        ) from error
    check_base(base, config.pattern, where=config.base)
    num_special = len(special_tokens(config.num_reserved))
    if len(base.ranks) + num_special > config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: got {config.vocab_size}, expected at least {len(base.ranks) + num_special}: the "
            f"{len(base.ranks):,} tokens of {config.base} and {num_special} special tokens"
        )
    return base


def _read_others(config: TokenizerConfig) -> dict[str, tiktoken.Encoding]:
    """Return the tokenizers in ``compare``. Raises ``ConfigError`` if one has no pattern."""
    encodings = {}
    for name, other in config.compare.items():
        vocabulary = read_vocabulary(Path(other.path))
        pattern = other.pattern or vocabulary.pattern
        if pattern is None:
            raise ConfigError(
                f"tokenizer.compare.{name}.pattern: got none, expected one: {other.path} has no pattern; set it"
            )
        encodings[name] = tiktoken.Encoding(
            name, pat_str=resolve_pattern(pattern), mergeable_ranks=vocabulary.ranks, special_tokens={}
        )
    return encodings


def external(config: TokenizerConfig) -> dict[str, str]:
    """Return digests of the vocabularies read from outside the store. Raises ``DataError`` if one is missing."""
    named = {f"compare {name}": digest_file(vocabulary_file(Path(path.path))) for name, path in config.compare.items()}
    if config.base is not None:
        file = vocabulary_file(Path(config.base))
        beside = [file.with_name(name) for name in TOKENIZER_FILES if file.name in TOKENIZER_FILES]
        named["base"] = digest_json([digest_file(path) for path in (file, *beside) if path.is_file()])
    return named


STAGE = Stage(
    name="tokenizer",
    output="Tokenizer",
    config=TokenizerConfig,
    run=run,
    inputs={"corpus": "Corpus"},
    optional_inputs={"prompts": "Prompts"},
    external=external,
    main_metric="bytes_per_token",
)
