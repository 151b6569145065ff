"""The mixture: what share of the training tokens each stream of the corpus gives.

Weights are what is asked for; a limit on epochs bounds what a stream can give. What one cannot give is shared out
among the others in proportion to their weights, so that those stay as they were to each other. Llama 3 (Grattafiori
et al. 2024, 3.1.2) took 50 % general, 25 % mathematics and reasoning, 17 % code and 8 % multilingual tokens; up to
4 epochs, repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lilpipe.config.phases import MixtureConfig
from lilpipe.errors import ConfigError


@dataclass(frozen=True)
class MixtureComponent:
    """What was asked of a stream, and what it gives."""

    tokens: int
    """Tokens that there are."""
    asked: float
    """Share of the training tokens by its weight."""
    reached: float
    """Share that it gives."""
    epochs: float
    """How often each of its tokens is trained on, in all phases up to this one."""
    max_epochs: float
    """Most that ``epochs`` should come to."""
    reason: str = ""
    """Why the share is not the one asked for; empty where it is."""


def mixture(
    weights: Mapping[str, float],
    tokens: Mapping[str, int],
    *,
    total_tokens: float,
    max_epochs: Mapping[str, float],
    used: Mapping[str, float] | None = None,
) -> dict[str, MixtureComponent]:
    """Shares of ``total_tokens`` training tokens by stream, which add up to 1.

    ``weights``, ``tokens`` and ``max_epochs`` have the same streams; weights need not add up to 1. ``used`` is how many
    tokens of a stream were trained on before: they count towards its limit. Where all streams together cannot give
    the tokens within their limits, each passes its limit by the same factor, and the reason says so: a limit that
    must hold is for the caller to check.
    """
    used = used or {}
    asked = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    limits = {name: max_epochs[name] * tokens[name] / total_tokens for name in weights}  # as shares
    before = {name: used.get(name, 0.0) / total_tokens for name in weights}
    most = {name: max(0.0, limits[name] - before[name]) for name in weights}
    if sum(most[name] for name in weights if asked[name] > 0) <= 1:
        reached = _exceed([name for name in weights if asked[name] > 0], limits, before)
        reached = dict.fromkeys(weights, 0.0) | reached
    else:
        reached = _fill(asked, most)
    return {
        name: MixtureComponent(
            tokens=tokens[name],
            asked=asked[name],
            reached=reached[name],
            epochs=(reached[name] + before[name]) * total_tokens / tokens[name] if tokens[name] else 0.0,
            max_epochs=max_epochs[name],
            reason=_reason(asked[name], reached[name], most[name], is_empty=tokens[name] == 0),
        )
        for name in weights
    }


def _exceed(names: Sequence[str], limits: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Shares that add up to 1 with which all pass their limits by one factor, but for those that are past it."""
    names = [name for name in names if limits[name] > 0]
    while names:
        total, limit = 1 + sum(before[name] for name in names), sum(limits[name] for name in names)
        shares = {name: limits[name] * total / limit - before[name] for name in names}
        if min(shares.values()) >= 0:
            return shares
        names = [name for name in names if shares[name] > 0]
    return {}


def _fill(asked: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """Shares in proportion to those asked for, but none over its most; the most add up to more than 1."""
    reached = dict.fromkeys(asked, 0.0)
    free = [name for name, share in asked.items() if share > 0]
    while free:
        scale = (1 - sum(reached.values())) / sum(asked[name] for name in free)
        over = [name for name in free if asked[name] * scale > most[name]]
        reached |= {name: min(asked[name] * scale, most[name]) for name in over or free}
        free = [name for name in free if name not in over] if over else []
    return reached


def _reason(asked: float, reached: float, most: float, *, is_empty: bool) -> str:
    if abs(reached - asked) < 1e-9 and reached <= most + 1e-9:
        return ""
    if reached > most + 1e-9:
        return "all streams together hold too few tokens: each passes its limit by the same factor"
    if is_empty:
        return "holds too few tokens for a row"
    return "at its limit of epochs" if reached >= most - 1e-9 else "takes what others cannot give"


def largest_total(weights: Mapping[str, float], tokens: Mapping[str, int], max_epochs: Mapping[str, float]) -> int:
    """The most training tokens at which the weights can be kept within the limits."""
    total = sum(weights.values())
    return int(min(tokens[name] * max_epochs[name] * total / weight for name, weight in weights.items() if weight > 0))


def resolve(
    config: MixtureConfig, tokens: Mapping[str, int], *, setting: str = "mixture"
) -> tuple[dict[str, float], dict[str, float]]:
    """Weights and limits of all streams that there are; ``setting`` is where they stand in the section.

    Raises ``ConfigError`` for a stream that is not there.
    """
    for field, names in (("weights", config.weights), ("max_epochs_of", config.max_epochs_of)):
        if missing := sorted(names.keys() - tokens.keys()):
            raise ConfigError(
                f"pretrain.{setting}.{field}: got {', '.join(map(repr, missing))}, expected streams of the tokens: "
                f"{', '.join(tokens)}; they are set by tokens.streams_by"
            )
    if config.weights and not any(config.weights.values()):
        raise ConfigError(f"pretrain.{setting}.weights: got no weight above 0, expected at least one")
    weights = {name: config.weights.get(name, 0.0) if config.weights else float(tokens[name]) for name in tokens}
    limits = {name: config.max_epochs_of.get(name, config.max_epochs) for name in tokens}
    return weights, limits
