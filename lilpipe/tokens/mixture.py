"""The mixture: what share of the training tokens each stream of the corpus gives.

Weights are what is asked for; a limit on epochs bounds what a stream can give. What one cannot give is shared out
among the others in proportion to their weights, so that those stay as they were to each other. Llama 3 (Grattafiori
et al. 2024, 3.1.2) took 50 % general, 25 % mathematics and reasoning, 17 % code and 8 % multilingual tokens; up to
4 epochs, repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lilpipe.config import MixtureConfig
from lilpipe.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """What was asked of a stream, and what it gives."""

    tokens: int
    """Tokens that there are."""
    asked: float
    """Share of the training tokens by its weight."""
    reached: float
    """Share that it gives."""
    epochs: float
    """How often each of its tokens is trained on."""
    max_epochs: float
    reason: str = ""
    """Why the share is not the one asked for; empty where it is."""


def mixture(
    weights: Mapping[str, float], tokens: Mapping[str, int], *, total_tokens: float, max_epochs: Mapping[str, float]
) -> dict[str, Part]:
    """Shares of ``total_tokens`` training tokens by stream, which add up to 1.

    ``weights``, ``tokens`` and ``max_epochs`` have the same streams; weights need not add up to 1. Where all streams
    together cannot give the tokens within their limits, each passes its limit by the same factor, and the reason
    says so: a limit that must hold is for the caller to check.
    """
    asked = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    most = {name: max_epochs[name] * tokens[name] / total_tokens for name in weights}  # as shares
    available = sum(most[name] for name in weights if asked[name] > 0)
    if available <= 1:
        reached = {name: most[name] / available if asked[name] > 0 and available else 0.0 for name in weights}
    else:
        reached = _fill(asked, most)
    return {
        name: Part(
            tokens=tokens[name],
            asked=asked[name],
            reached=reached[name],
            epochs=reached[name] * total_tokens / tokens[name] if tokens[name] else 0.0,
            max_epochs=max_epochs[name],
            reason=_reason(asked[name], reached[name], most[name]),
        )
        for name in weights
    }


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


def _reason(asked: float, reached: float, most: float) -> str:
    if abs(reached - asked) < 1e-9 and reached <= most + 1e-9:
        return ""
    if reached > most + 1e-9:
        return "all streams together hold too few tokens: each passes its limit by the same factor"
    if most == 0:
        return "holds too few tokens for a row"
    return "at its limit of epochs" if reached >= most - 1e-9 else "takes what others cannot give"


def largest_total(weights: Mapping[str, float], tokens: Mapping[str, int], max_epochs: Mapping[str, float]) -> int:
    """The most training tokens at which the weights can be kept within the limits."""
    total = sum(weights.values())
    return int(min(tokens[name] * max_epochs[name] * total / weight for name, weight in weights.items() if weight > 0))


def resolve(config: MixtureConfig, tokens: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Weights and limits of all streams that there are. Raises ``ConfigError`` for one that is not."""
    for field, names in (("weights", config.weights), ("max_epochs_of", config.max_epochs_of)):
        if missing := sorted(names.keys() - tokens.keys()):
            raise ConfigError(
                f"pretrain.mixture.{field}: got {', '.join(map(repr, missing))}, expected streams of the tokens: "
                f"{', '.join(tokens)}; they are set by tokens.streams_by"
            )
    if config.weights and not any(config.weights.values()):
        raise ConfigError("pretrain.mixture.weights: got no weight above 0, expected at least one")
    weights = {name: config.weights.get(name, 0.0) if config.weights else float(tokens[name]) for name in tokens}
    limits = {name: config.max_epochs_of.get(name, config.max_epochs) for name in tokens}
    return weights, limits
