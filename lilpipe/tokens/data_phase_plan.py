"""The training data of a pretraining run: stream shares and the loader, derived from config and shards alone.

Training and ``lilpipe.tokens.trace`` both use this module, so they cannot disagree. Consecutive phases with the same
``seq_len`` and mixture form one data phase: their tokens are distributed together. Tokens that earlier data phases
took from a stream count towards its limit on epochs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from lilpipe.config.phases import Phase
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.tokens.data_phase import Steps
from lilpipe.tokens.loader import DataPhasePlan, PretrainLoader
from lilpipe.tokens.mixture import MixtureComponent, mixture, resolve
from lilpipe.tokens.shards import CORPUS, EXERCISES, TokenShards


@dataclass(frozen=True)
class PlannedDataPhase:
    """Consecutive phases with the same ``seq_len`` and mixture, and the streams that they read."""

    phases: tuple[Phase, ...]
    parts: Mapping[str, MixtureComponent]
    """Requested and actual share of each corpus stream; shares of the corpus's part of the tokens."""
    shares: Mapping[str, float]
    """Share of the training tokens of each stream with a share above 0, including the exercises."""

    @property
    def exercise_ratio(self) -> float:
        """Share of the training tokens from exercises."""
        return self.phases[0].exercise_ratio

    @property
    def seq_len(self) -> int:
        """Input tokens per row."""
        return self.phases[0].seq_len

    @property
    def steps(self) -> tuple[Steps, ...]:
        """First step, end and batch size of each phase."""
        return tuple(Steps(phase.first, phase.stop, phase.batch_size) for phase in self.phases)


def open_loader(config: PretrainConfig, shards: TokenShards) -> PretrainLoader:
    """Return the loader. Raises ``ConfigError`` for shares of unknown streams, ``DataError`` for too few tokens."""
    assert config.seed is not None
    plans = [DataPhasePlan(each.steps, each.seq_len, each.shares) for each in plan_data_phases(config, shards)]
    return PretrainLoader(shards, plans, seed=config.seed, packing=config.packing, stride=config.stride)


def plan_data_phases(config: PretrainConfig, shards: TokenShards) -> list[PlannedDataPhase]:
    """Return the data phases of a run, in order.

    Rows are assumed to be full, so with padding (``best_fit``) the actual epochs are slightly below the planned ones.
    Raises ``ConfigError`` for shares of unknown streams.
    """
    used: Counter[str] = Counter()
    planned = []
    for _, group in groupby(config.resolved_phases, key=lambda each: (each.seq_len, each.exercise_ratio, each.mixture)):
        phases = tuple(group)
        total = sum((phase.stop - phase.first) * phase.batch_size * phase.seq_len for phase in phases)
        total *= 1 - phases[0].exercise_ratio
        parts = _corpus_mixture(phases[0], shards, total_tokens=total, used=used)
        used.update({name: part.reached * total for name, part in parts.items()})
        planned.append(PlannedDataPhase(phases, parts, _stream_shares(phases[0], parts, shards)))
    return planned


def _corpus_mixture(
    phase: Phase, shards: TokenShards, *, total_tokens: float, used: Mapping[str, float]
) -> dict[str, MixtureComponent]:
    tokens = usable_tokens(shards, seq_len=phase.seq_len)
    if not total_tokens or not any(tokens.values()):
        return {}
    weights, limits = resolve(phase.mixture, tokens, setting=phase.setting("mixture"))
    return mixture(weights, tokens, total_tokens=total_tokens, max_epochs=limits, used=used)


def usable_tokens(shards: TokenShards, *, seq_len: int) -> dict[str, int]:
    """Return the training tokens of each corpus stream; 0 if they do not fill a row."""
    counts = {name: shards.stream(name, "train").num_tokens for name in shards.corpus_streams}
    return {name: count if count > seq_len else 0 for name, count in counts.items()}


def _stream_shares(phase: Phase, parts: Mapping[str, MixtureComponent], shards: TokenShards) -> dict[str, float]:
    there = {CORPUS: bool(shards.corpus_streams), EXERCISES: EXERCISES in shards.streams}
    wanted = {CORPUS: phase.exercise_ratio < 1, EXERCISES: phase.exercise_ratio > 0}
    for part in (CORPUS, EXERCISES):
        if wanted[part] and not there[part]:
            _refuse(part, phase, shards)
    reached: Mapping[str, float] = {name: part.reached for name, part in parts.items()}
    if wanted[CORPUS] and not any(reached.values()):  # none fills a row: the loader raises DataError for the first
        asked = [name for name, part in parts.items() if part.asked > 0] or shards.corpus_streams
        reached = {asked[0]: 1.0}
    shares = {name: share * (1 - phase.exercise_ratio) for name, share in reached.items()}
    return {name: share for name, share in (shares | {EXERCISES: phase.exercise_ratio}).items() if share > 0}


def _refuse(part: str, phase: Phase, shards: TokenShards) -> None:
    remedy = {
        CORPUS: "set it below 1 only if the tokens contain a corpus",
        EXERCISES: "set it to 0, or add an input `prompts` to the step `tokens`",
    }[part]
    raise ConfigError(
        f"pretrain.{phase.setting('exercise_ratio')}: got {phase.exercise_ratio}, which takes rows from {part!r}, but "
        f"the tokens contain only {', '.join(shards.streams) or 'nothing'}; {remedy}"
    )
