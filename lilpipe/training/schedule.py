"""The learning rate as a pure function of the step, so that resuming needs nothing but an integer."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "wsd"]


def lr_scale(
    step: int, *, num_steps: int, warmup_steps: int, shape: Shape, min_ratio: float, decay_ratio: float = 0.0
) -> float:
    """Learning rate of a step as a share of the peak.

    Rises linearly over steps 0 to ``warmup_steps - 1``, is 1 at step ``warmup_steps``, and then falls along
    ``shape`` towards ``min_ratio``, which it would reach at step ``num_steps``, the first that is not taken.

    ``wsd`` (warmup, stable, decay; Hu et al. 2024, "MiniCPM") stays at 1 until the last ``decay_ratio`` of all steps,
    which the other shapes do not use, and falls there as 1 - sqrt, the best of the shapes that Hägele et al. 2024
    ("Scaling laws and compute-optimal training beyond fixed training durations") set side by side. Up to its fall a
    run does not depend on how long it is to be.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    first = max(warmup_steps, (1 - decay_ratio) * num_steps) if shape == "wsd" else warmup_steps
    progress = max(0.0, (step - first) / (num_steps - first)) if first < num_steps else 0.0
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "wsd": 1 - math.sqrt(progress),
    }[shape]
    return min_ratio + (1 - min_ratio) * remaining
