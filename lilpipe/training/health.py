"""Detection of bad steps (non-finite values, loss and gradient spikes), and what to do about them.

A decision depends only on the losses and norms so far, so a resumed run makes the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lilpipe.config.training import HealthConfig

Action = Literal["ignore", "stop", "skip", "rollback"]


class Finding(NamedTuple):
    """A bad step: the action to take and the reason."""

    action: Action
    reason: str


def examine(
    loss: float, grad_norm: float, *, losses: Sequence[float], grad_norms: Sequence[float], config: HealthConfig
) -> Finding | None:
    """Check the loss and gradient norm of a step against those of the steps before it; None if it is healthy."""
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
                f"{name} {value:.4g} is a spike: the last {config.window} steps had a mean of {window.mean():.4g} "
                f"+- {window.std():.2g}, the limit at {config.spike_deviations:g} standard deviations is {limit:.4g}",
            )
    return None
