"""Muon: momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024).

The update is that of ``torch.optim.Muon`` with its default learning-rate adjustment. torch processes the matrices one
by one in bfloat16, which on a CPU without bfloat16 arithmetic is slower than the whole backward pass of a small model
(184 ms against 11 ms a step for 21 matrices of about 96 x 256, one core with AVX2). Here matrices of one shape are
batched, in float32 on a CPU, and each worker orthogonalizes its share of them.

A sharded matrix (a DTensor) must be whole to be orthogonalized: matrices of one layout are stacked, redistributed so
that each worker has some of them whole, and redistributed back (two all-to-alls).

Dimensions: M matrices of one shape, R rows, C columns, R <= C; E experts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import ParamsT

from lilpipe import distributed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic, with the steepest slope at zero; singular values end in about 0.7 to 1.2, not at 1."""
NUM_ITERATIONS = 5
EPSILON = 1e-7
ELEMENTS_AT_ONCE = 2**26
"""Maximum elements of sharded matrices that a worker gathers at a time, but at least one matrix."""


def orthogonalize(x_MRC: Tensor) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices: moves singular values towards 1. R <= C."""
    a, b, c = COEFFICIENTS
    x_MRC = x_MRC / x_MRC.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC


class Muon(torch.optim.Optimizer):
    """Optimizer for the matrices of hidden layers, ``[O, I]``, and of experts, ``[E, O, I]``, each on its own.

    ``lr`` follows Jordan et al.: the update is scaled by sqrt(max(1, outputs / inputs)), and 0.02 is the usual value.
    Weight decay is decoupled, ``lr * weight_decay`` per step. ``replicas`` is the group of processes that hold the same
    plain tensors; None means all processes.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self._replicas = replicas
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices, with initial state."""
        super().add_param_group(param_group)
        for matrix in self.param_groups[-1]["params"]:
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the matrices that have gradients. Returns the loss of ``closure``, which recomputes gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        momenta = [self._nesterov(matrix, group["momentum"]) for matrix in matrices]
        whole = [index for index, matrix in enumerate(matrices) if not isinstance(matrix, DTensor)]
        updates = dict(zip(whole, _orthogonalize_all([momenta[index] for index in whole], self._replicas), strict=True))
        for indices in _by_layout(matrices).values():
            parts = _orthogonalize_parts([matrices[i] for i in indices], [momenta[i] for i in indices])
            updates |= dict(zip(indices, parts, strict=True))
        for index, matrix in enumerate(matrices):
            scale = math.sqrt(max(1.0, matrix.shape[-2] / matrix.shape[-1]))
            part = _local(matrix).mul_(1 - group["lr"] * group["weight_decay"])
            part.add_(updates[index], alpha=-group["lr"] * scale)

    def _nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        """Update the momentum buffer; return the local shard of the Nesterov momentum."""
        gradient = matrix.grad
        assert gradient is not None
        if isinstance(matrix, DTensor) and isinstance(gradient, DTensor):
            gradient = gradient.redistribute(placements=matrix.placements)
        gradient, buffer = _local(gradient), _local(self.state[matrix]["momentum_buffer"])
        return gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum)


def _orthogonalize_all(matrices: Sequence[Tensor], replicas: dist.ProcessGroup | None) -> list[Tensor]:
    """Orthogonalize matrices, batched by shape and divided among the replicas."""
    if not matrices:
        return []
    sizes = [matrix.numel() for matrix in matrices]
    buffer = matrices[0].new_zeros(sum(sizes))
    results = [part.view_as(matrix) for part, matrix in zip(buffer.split(sizes), matrices, strict=True)]
    sources, targets = _single(matrices), _single(results)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(sources):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(index)
    rank, world_size = distributed.rank(), distributed.world_size()
    if replicas is not None:
        rank, world_size = dist.get_rank(replicas), dist.get_world_size(replicas)
    for indices in by_shape.values():
        mine = indices[rank::world_size]
        if mine:
            wide = orthogonalize(torch.stack([_wide(sources[index]) for index in mine]).to(_dtype(buffer)))
            for index, result in zip(mine, wide, strict=True):
                _wide(targets[index]).copy_(result)
    if dist.is_initialized():
        dist.all_reduce(buffer, group=replicas)  # the other workers' slices are zeros here, so the sum gathers exactly
    return results


def _by_layout(matrices: Sequence[Tensor]) -> dict[tuple[object, ...], list[int]]:
    """Group indices of sharded matrices by layout, with a limited number of elements per group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    counts: dict[tuple[object, ...], int] = {}
    for index, matrix in enumerate(matrices):
        if isinstance(matrix, DTensor):
            layout = (matrix.shape, matrix.device_mesh, matrix.placements)
            number = counts[layout] = counts.get(layout, -1) + 1
            at_once = max(1, ELEMENTS_AT_ONCE // matrix.numel()) * matrix.device_mesh.size()
            groups.setdefault((*layout, number // at_once), []).append(index)
    return groups


def _orthogonalize_parts(matrices: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize sharded matrices of one layout; takes and returns this worker's shards.

    Matrices are stacked along a new last dimension, so that the sharded dimensions keep their indices.
    """
    like = matrices[0]
    assert isinstance(like, DTensor)
    mesh, shape = like.device_mesh, torch.Size((*like.shape, len(matrices)))
    stride = torch.empty(shape, device="meta").stride()
    parts = torch.stack(list(momenta), dim=-1)
    stacked = DTensor.from_local(parts.to(_dtype(parts)), mesh, like.placements, shape=shape, stride=stride)
    apart = [Shard(0 if like.ndim == 3 else 2)] * mesh.ndim  # by expert, or by matrix
    x_RCM = stacked.redistribute(placements=apart).to_local().movedim(-1, 0)
    if x_RCM.numel():
        wide = _wide(x_RCM)
        _wide(x_RCM).copy_(orthogonalize(wide.reshape(-1, *wide.shape[-2:])).view(wide.shape))
    result = DTensor.from_local(x_RCM.movedim(0, -1).contiguous(), mesh, apart, shape=shape, stride=stride)
    return list(result.redistribute(placements=like.placements).to_local().to(parts.dtype).unbind(-1))


def _local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for orthogonalization."""
    return torch.bfloat16 if tensor.is_cuda else tensor.dtype


def _single(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices as they are, and views of each expert's matrix."""
    return [matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else [tensor])]


def _wide(matrix: Tensor) -> Tensor:
    """Return a view with no more rows than columns."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
