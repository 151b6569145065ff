"""Steps that would spoil the weights: what counts as one, and what is to be done about it.

A decision depends on the losses and norms so far alone, so a run that is killed and resumed decides the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lilpipe.config.training import HealthConfig

Action = Literal["ignore", "stop", "skip", "rollback"]


class Finding(NamedTuple):
    """What is wrong with a step."""

    action: Action
    reason: str


def examine(
    loss: float, grad_norm: float, *, losses: Sequence[float], grad_norms: Sequence[float], config: HealthConfig
) -> Finding | None:
    """What is wrong with a step of this loss and norm, after steps of those; none if nothing is."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Finding(config.on_nan, f"loss {loss}, gradient norm {grad_norm}: not finite")
    if config.on_spike == "ignore":
        return None
    for name, value, before in (("loss", loss, losses), ("gradient norm", grad_norm, grad_norms)):
        window = np.asarray(before[-config.window :], dtype=np.float64)
        if len(window) < config.window:
            return None
        limit = window.mean() + config.spike_deviations * window.std()
        if value > limit:
            return Finding(
                config.on_spike,
                f"{name} {value:.4g} is a spike: the last {config.window} steps had {window.mean():.4g} "
                f"+- {window.std():.2g}, {config.spike_deviations:g} deviations end at {limit:.4g}",
            )
    return None
