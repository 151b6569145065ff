"""Collectives with a gradient, for sequences that lie in parts on several processes.

Dimensions: B sequences, T tokens of a part, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """Parts ``[B, T, ...]`` of all processes to the whole ``[B, P x T, ...]``, in the order of ranks; no gradient."""
    num_parts = dist.get_world_size(group)
    parts = part.new_empty(num_parts * part.shape[0], *part.shape[1:])
    dist.all_gather_single(parts, part.contiguous(), group=group)
    return torch.cat(parts.chunk(num_parts), dim=1)


def scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Sum ``[B, P x T, ...]`` over processes, of which each gets its part ``[B, T, ...]``; no gradient."""
    parts = whole.chunk(dist.get_world_size(group), dim=1)
    part = whole.new_empty(parts[0].shape)
    dist.reduce_scatter_single(part, torch.cat(parts), group=group)
    return part


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter(whole, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004 (fixed signature)
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


def gather_sequence(part: Tensor, group: ProcessGroup) -> Tensor:
    """``gather`` with a gradient.

    What a process does with the whole adds to the gradient of every part: these are summed over processes.
    """
    return _Gather.apply(part, group)  # type: ignore[return-value]


def scatter_sequence(whole: Tensor, group: ProcessGroup) -> Tensor:
    """``scatter`` with a gradient: that of all parts, for each process."""
    return _Scatter.apply(whole, group)  # type: ignore[return-value]


def sum_of_parts(part: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over processes, for a computation that goes on alike on each of them; differentiable.

    Each part then has the gradient of the sum.
    """
    return _SumOfParts.apply(part, group)  # type: ignore[return-value]
