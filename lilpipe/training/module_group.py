"""Several models that one optimizer trains, however each lies over the workers: policy and value model of PPO.

They share no parameter and their losses are added up, so each does its own forward and backward pass. What they have
in common are steps, counts and the norm that gradients are clipped to.
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
    """A trainer module of trainer modules, whose tensors have the names of the members in front; see
    ``TrainerModule``.
    """

    def __init__(self, members: Mapping[str, TrainerModule]) -> None:
        """All members must have the same layout, and as many micro-batches in a step; they count alike."""
        self.members = dict(members)
        self.parts: list[nn.Module] = [
            nn.ModuleDict({name: part}) for name, member in self.members.items() for part in member.parts
        ]

    @property
    def replicas(self) -> ProcessGroup | None:
        """The workers that hold the same plain tensors; none is all of them."""
        return next(iter(self.members.values())).replicas

    def forward_backward(self, step: int) -> list[Loss]:
        """Add the gradients of this worker's micro-batches up, and give their losses, which are sums over members."""
        losses = [member.forward_backward(step) for member in self.members.values()]
        return [_sum(parts) for parts in zip(*losses, strict=True)]

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        for member in self.members.values():
            member.zero_grad()

    def sum_gradients(self) -> float:
        """Sum gradients over workers; gives the global norm of the sum."""
        return math.hypot(*(member.sum_gradients() for member in self.members.values()))

    def scale_gradients(self, factor: float) -> None:
        """Multiply gradients by ``factor``."""
        for member in self.members.values():
            member.scale_gradients(factor)

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over workers, divide by ``count``, clip to ``max_norm``; the global norm before clipping."""
        return clip_sum(self, count=count, max_norm=max_norm)

    def after_update(self) -> Mapping[str, float]:
        """What follows an optimizer step, of each member; metrics with its name in front."""
        return {
            f"{name}_{metric}": value
            for name, member in self.members.items()
            for metric, value in member.after_update().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of this worker by their names in the whole."""
        return {
            f"{name}.{tensor}": value
            for name, member in self.members.items()
            for tensor, value in member.tensors().items()
        }

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of all members by name, one at a time; all workers run through it, the first gets them."""
        for name, member in self.members.items():
            for tensor, value in member.full_tensors():
                yield f"{name}.{tensor}", value


def _sum(parts: tuple[Loss, ...]) -> Loss:
    """The loss of a micro-batch, of whose tokens each part is a sum."""
    total = torch.stack([part.total.detach() for part in parts]).sum()
    metrics = {name: metric for part in parts for name, metric in part.metrics.items()}
    return replace(parts[0], total=total, num_tokens=sum(part.num_tokens for part in parts), metrics=metrics)
