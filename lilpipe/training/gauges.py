"""What a training run is watched by beside its loss: utilisation, memory, and how long it waited for data."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import torch

from lilpipe.model.devices import mfu
from lilpipe.training.budget import Budget
from lilpipe.training.next_token import NextToken

KIBI, GIBI = 2**10, 2**30


class Gauges:
    """Numbers of the steps since the last report."""

    def __init__(self, plan: Budget | None, objective: NextToken) -> None:
        self._plan = plan
        self._objective = objective
        self._waited = 0.0

    def __call__(self, num_tokens: int, seconds: float) -> Mapping[str, float]:
        """`mfu`, `memory_gib` (the most of this process so far: of its GPU, or resident) and `data_wait_ratio`."""
        waited = self._objective.waited - self._waited
        self._waited = self._objective.waited
        return {
            "mfu": self.mfu(num_tokens / seconds),
            "memory_gib": peak_memory() / GIBI,
            "data_wait_ratio": waited / seconds,
        }

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation of all workers together (Chowdhery et al. 2022), attention counted.

        0 where the device's peak is not known.
        """
        if self._plan is None:
            return 0.0
        flops = self._plan.flops / self._plan.tokens
        return mfu(tokens_per_second, flops_per_token=flops, num_devices=self._plan.num_devices, peak=self._plan.peak)


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or without one, the largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBI
