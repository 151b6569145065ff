"""Several models trained by one optimizer, in any parallel layout: policy and value model of PPO.

They share no parameters and their losses are summed, so each runs its own forward and backward pass. They share steps,
counts and the gradient norm for clipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lilpipe.training.replica import Loss, TrainerModule, clip_sum


class ModuleGroup:
    """``TrainerModule`` of several trainer modules; tensor names are prefixed with the member's name."""

    def __init__(self, members: Mapping[str, TrainerModule]) -> None:
        """All members must have the same layout, micro-batches and counts."""
        self.members = dict(members)
        self.parts: list[nn.Module] = [
            nn.ModuleDict({name: part}) for name, member in self.members.items() for part in member.parts
        ]

    @property
    def replicas(self) -> ProcessGroup | None:
        """The workers that hold the same plain tensors; None means all workers."""
        return next(iter(self.members.values())).replicas

    def forward_backward(self, step: int) -> list[Loss]:
        """Accumulate gradients over this worker's micro-batches; return losses summed over members."""
        losses = [member.forward_backward(step) for member in self.members.values()]
        return [_sum(parts) for parts in zip(*losses, strict=True)]

    def zero_grad(self) -> None:
        """Reset the gradients."""
        for member in self.members.values():
            member.zero_grad()

    def sum_gradients(self) -> float:
        """Sum gradients over workers; return the global norm of the sum."""
        return math.hypot(*(member.sum_gradients() for member in self.members.values()))

    def scale_gradients(self, factor: float) -> None:
        """Multiply gradients by ``factor``."""
        for member in self.members.values():
            member.scale_gradients(factor)

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over workers, divide by ``count``, clip to ``max_norm``; return the norm before clipping."""
        return clip_sum(self, count=count, max_norm=max_norm)

    def after_update(self) -> Mapping[str, float]:
        """Call ``after_update`` of each member; metrics are prefixed with the member's name."""
        return {
            f"{name}_{metric}": value
            for name, member in self.members.items()
            for metric, value in member.after_update().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return this worker's parameters and persistent buffers by their prefixed names."""
        return {
            f"{name}.{tensor}": value
            for name, member in self.members.items()
            for tensor, value in member.tensors().items()
        }

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of all members by name. Collective; only the first worker gets them."""
        for name, member in self.members.items():
            for tensor, value in member.full_tensors():
                yield f"{name}.{tensor}", value


def _sum(parts: tuple[Loss, ...]) -> Loss:
    """Sum the losses of a micro-batch over members."""
    total = torch.stack([part.total.detach() for part in parts]).sum()
    metrics = {name: metric for part in parts for name, metric in part.metrics.items()}
    return replace(parts[0], total=total, num_tokens=sum(part.num_tokens for part in parts), metrics=metrics)
