"""Differentiable collectives for sequences that are sharded over processes.

Dimensions: B sequences, T tokens of a shard, P shards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather shards ``[B, T, ...]`` to ``[B, P x T, ...]``, in the order of ranks; no gradient."""
    num_parts = dist.get_world_size(group)
    parts = part.new_empty(num_parts * part.shape[0], *part.shape[1:])
    dist.all_gather_single(parts, part.contiguous(), group=group)
    return torch.cat(parts.chunk(num_parts), dim=1)


def scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Reduce-scatter ``[B, P x T, ...]`` to shards ``[B, T, ...]``; no gradient."""
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
    """Differentiable ``gather``.

    The backward pass reduce-scatters: it sums the gradients that all processes have for a shard.
    """
    return _Gather.apply(part, group)  # type: ignore[return-value]


def scatter_sequence(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Differentiable ``scatter``; the backward pass all-gathers."""
    return _Scatter.apply(whole, group)  # type: ignore[return-value]


def sum_of_parts(part: Tensor, group: ProcessGroup) -> Tensor:
    """Differentiable all-reduce sum, for a computation that is replicated on all processes afterwards.

    Each summand gets the gradient of the sum.
    """
    return _SumOfParts.apply(part, group)  # type: ignore[return-value]
