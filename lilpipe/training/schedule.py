"""The learning rate as a pure function of the step, so that resuming needs nothing but an integer."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def lr_scale(step: int, *, num_steps: int, warmup_steps: int, shape: Shape, min_ratio: float) -> float:
    """Learning rate of a step as a share of the peak.

    Rises linearly over steps 0 to ``warmup_steps - 1``, is 1 at step ``warmup_steps``, and then falls along
    ``shape`` towards ``min_ratio``, which it would reach at step ``num_steps``, the first that is not taken.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[shape]
    return min_ratio + (1 - min_ratio) * remaining
