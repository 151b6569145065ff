"""The mixture: each corpus stream's share of the training tokens.

Weights set the requested shares; a limit on epochs bounds how many tokens a stream can contribute. The other streams
take over the tokens above a stream's limit in proportion to their weights. Llama 3 (Grattafiori et al. 2024, 3.1.2)
used 50 % general, 25 % mathematics and reasoning, 17 % code and 8 % multilingual tokens. Up to 4 epochs, repeated
tokens are worth nearly as much as new ones (Muennighoff et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lilpipe.config.phases import MixtureConfig
from lilpipe.errors import ConfigError


@dataclass(frozen=True)
class MixtureComponent:
    """Requested and actual share of a stream."""

    tokens: int
    """Tokens in the stream."""
    asked: float
    """Requested share of the training tokens, from the weight."""
    reached: float
    """Actual share of the training tokens."""
    epochs: float
    """Epochs over the stream, in all phases up to this one."""
    max_epochs: float
    """Limit on ``epochs``."""
    reason: str = ""
    """Why the actual share differs from the requested one; empty if it does not."""


def mixture(
    weights: Mapping[str, float],
    tokens: Mapping[str, int],
    *,
    total_tokens: float,
    max_epochs: Mapping[str, float],
    used: Mapping[str, float] | None = None,
) -> dict[str, MixtureComponent]:
    """Return the share of each stream of ``total_tokens`` training tokens; the shares add up to 1.

    If the streams together cannot provide ``total_tokens`` within their limits, each exceeds its limit by the same
    factor, and ``reason`` says so. The caller must check limits that must hold.

    Args:
        weights: Weight of each stream; they need not add up to 1.
        tokens: Tokens of each stream in ``weights``.
        total_tokens: Training tokens to distribute.
        max_epochs: Limit on epochs of each stream in ``weights``.
        used: Tokens of each stream trained on in earlier phases; they count towards its limit.
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
    """Return shares that add up to 1 and exceed all limits by one factor; streams already above that get 0."""
    names = [name for name in names if limits[name] > 0]
    while names:
        total, limit = 1 + sum(before[name] for name in names), sum(limits[name] for name in names)
        shares = {name: limits[name] * total / limit - before[name] for name in names}
        if min(shares.values()) >= 0:
            return shares
        names = [name for name in names if shares[name] > 0]
    return {}


def _fill(asked: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """Return shares in proportion to ``asked``, each at most ``most``; ``most`` adds up to more than 1."""
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
        return "all streams together hold too few tokens: each exceeds its limit by the same factor"
    if is_empty:
        return "holds too few tokens for a row"
    return "at its limit of epochs" if reached >= most - 1e-9 else "takes tokens that other streams cannot provide"


def largest_total(weights: Mapping[str, float], tokens: Mapping[str, int], max_epochs: Mapping[str, float]) -> int:
    """Return the largest number of training tokens for which the weights stay within the limits on epochs."""
    total = sum(weights.values())
    return int(min(tokens[name] * max_epochs[name] * total / weight for name, weight in weights.items() if weight > 0))


def resolve(
    config: MixtureConfig, tokens: Mapping[str, int], *, setting: str = "mixture"
) -> tuple[dict[str, float], dict[str, float]]:
    """Return weights and limits on epochs of all streams.

    ``setting`` is the path of the mixture in section ``pretrain``, for error messages. Raises ``ConfigError`` if the
    mixture names an unknown stream or has no weight above 0.
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
