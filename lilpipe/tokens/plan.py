"""What a pretraining run trains on: the shares of its streams, and the loader, from config and shards alone.

Training and ``lilpipe.tokens.trace`` both start here, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping

from lilpipe.config import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.mixture import Part, mixture, resolve
from lilpipe.tokens.shards import CORPUS, EXERCISES, TokenShards


def open_loader(config: PretrainConfig, shards: TokenShards) -> PretrainLoader:
    """The loader of a run. Raises ``ConfigError`` for shares of what is not there, ``DataError`` for too few tokens."""
    assert config.seed is not None
    return PretrainLoader(
        shards,
        shares=stream_shares(config, shards),
        seq_len=config.model.max_seq_len,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        seed=config.seed,
        packing=config.packing,
        stride=config.stride,
    )


def corpus_mixture(config: PretrainConfig, shards: TokenShards) -> dict[str, Part]:
    """What each stream of the corpus is asked for and gives; shares are of the corpus's part of the tokens.

    A row counts as full of tokens, so with padding (``best_fit``) epochs come out a little below what stands here.
    """
    total = config.num_steps * config.batch_size * config.model.max_seq_len * (1 - config.exercise_share)
    tokens = usable_tokens(config, shards)
    if not total or not any(tokens.values()):
        return {}
    weights, limits = resolve(config.mixture, tokens)
    return mixture(weights, tokens, total_tokens=total, max_epochs=limits)


def usable_tokens(config: PretrainConfig, shards: TokenShards) -> dict[str, int]:
    """Training tokens of each stream of the corpus; 0 where they do not fill a row."""
    counts = {name: shards.stream(name, "train").num_tokens for name in shards.corpus_streams}
    return {name: count if count > config.model.max_seq_len else 0 for name, count in counts.items()}


def stream_shares(config: PretrainConfig, shards: TokenShards) -> dict[str, float]:
    """Share of training tokens of each stream that gives any. Raises ``ConfigError`` for a part that is not there."""
    there = {CORPUS: bool(shards.corpus_streams), EXERCISES: EXERCISES in shards.streams}
    wanted = {CORPUS: config.exercise_share < 1, EXERCISES: config.exercise_share > 0}
    for part in (CORPUS, EXERCISES):
        if wanted[part] and not there[part]:
            _refuse(part, config, shards)
    reached: Mapping[str, float] = {name: part.reached for name, part in corpus_mixture(config, shards).items()}
    if not reached and wanted[CORPUS]:  # no stream fills a row: the loader says of the first what it lacks
        reached = {shards.corpus_streams[0]: 1.0}
    shares = {name: share * (1 - config.exercise_share) for name, share in reached.items()}
    return {name: share for name, share in (shares | {EXERCISES: config.exercise_share}).items() if share > 0}


def _refuse(part: str, config: PretrainConfig, shards: TokenShards) -> None:
    remedy = {
        CORPUS: "set it below 1 only where the tokens hold a corpus",
        EXERCISES: "set it to 0, or give the step `tokens` an input `prompts`",
    }[part]
    raise ConfigError(
        f"pretrain.exercise_share: got {config.exercise_share}, which takes rows from {part!r}, but the tokens hold "
        f"{', '.join(shards.streams) or 'nothing'} alone; {remedy}"
    )
