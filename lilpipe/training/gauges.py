"""Metrics of a training run besides its loss: MFU, memory, and time waiting for data."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import torch

from lilpipe.model.devices import mfu
from lilpipe.training.budget import Budget
from lilpipe.training.next_token import NextToken

KIBI, GIBI = 2**10, 2**30


class Gauges:
    """Metrics of the steps since the last report."""

    def __init__(self, plan: Budget | None, objective: NextToken) -> None:
        self._plan = plan
        self._objective = objective
        self._waited = 0.0

    def __call__(self, num_tokens: int, seconds: float) -> Mapping[str, float]:
        """Return `mfu`, `memory_gib` (peak so far, on the GPU or resident) and `data_wait_ratio`."""
        waited = self._objective.waited - self._waited
        self._waited = self._objective.waited
        return {
            "mfu": self.mfu(num_tokens / seconds),
            "memory_gib": peak_memory() / GIBI,
            "data_wait_ratio": waited / seconds,
        }

    def mfu(self, tokens_per_second: float) -> float:
        """Return the model FLOPs utilization of all workers, attention included (Chowdhery et al. 2022).

        0 if the device's peak is unknown.
        """
        if self._plan is None:
            return 0.0
        flops = self._plan.flops / self._plan.tokens
        return mfu(tokens_per_second, flops_per_token=flops, num_devices=self._plan.num_devices, peak=self._plan.peak)


def peak_memory() -> int:
    """Return peak memory in bytes: allocated on the GPU, or without one, the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBI
