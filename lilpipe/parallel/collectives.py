"""Collectives with a gradient, for sequences that lie in parts on several processes.

Dimensions: B sequences, T tokens of a part, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _GatherSequence(torch.autograd.Function):
    """Parts ``[B, T, ...]`` of all processes of a group to the whole ``[B, P x T, ...]``.

    What a process does with the whole adds to the gradient of every part, so the backward pass sums over processes
    and scatters.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        num_parts = dist.get_world_size(ctx.group)
        parts = grads[0].chunk(num_parts, dim=1)
        own = parts[0].new_empty(parts[0].shape)
        dist.reduce_scatter_tensor(own, torch.cat(parts), group=ctx.group)  # which lie one below the other, [P x B, T]
        return own, None


def gather_sequence(part: Tensor, group: ProcessGroup) -> Tensor:
    """Parts ``[B, T, ...]`` to the whole ``[B, P x T, ...]``, in the order of ranks; differentiable."""
    gathered = _GatherSequence.apply(part, group)
    assert isinstance(gathered, Tensor)
    return gathered


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """``gather_sequence`` without a gradient."""
    num_parts = dist.get_world_size(group)
    parts = part.new_empty(num_parts * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    return torch.cat(parts.chunk(num_parts), dim=1)


class _SumOfParts(torch.autograd.Function):
    """Sum over processes of what all of them go on to use alike: each part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004 (fixed signature)
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


def sum_of_parts(part: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over processes, for a computation that goes on alike on each of them; differentiable."""
    total = _SumOfParts.apply(part, group)
    assert isinstance(total, Tensor)
    return total
