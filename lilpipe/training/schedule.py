"""Learning-rate schedules as pure functions of the step, so that resuming needs only the step."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "wsd"]


def lr_scale(
    step: int, *, num_steps: int, warmup_steps: int, shape: Shape, min_ratio: float, decay_ratio: float = 0.0
) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    It increases linearly over steps 0 to ``warmup_steps - 1``, is 1 at step ``warmup_steps``, and then decays with
    ``shape`` towards ``min_ratio``, which it would reach at step ``num_steps`` (after the last step).

    ``wsd`` (warmup, stable, decay; Hu et al. 2024, "MiniCPM") stays at 1 until the last ``decay_ratio`` of all steps
    and decays there as 1 - sqrt, the best shape in the comparison of Hägele et al. 2024 ("Scaling laws and
    compute-optimal training beyond fixed training durations"). Until the decay starts, a run does not depend on its
    total length. The other shapes ignore ``decay_ratio``.
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
