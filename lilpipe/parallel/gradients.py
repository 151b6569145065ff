"""Gradients of a model that is cut over processes: their sum and their norm.

Every process computes the gradient of a sum of losses over its own tokens; the gradients are added up, never averaged,
and divided once by the count of all targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from lilpipe.parallel.mesh import Mesh

ELEMENTS_AT_ONCE = 2**25
"""Elements of gradients that are put together for one all-reduce: 128 MiB in float32."""


def fill_in(parameters: Sequence[Tensor]) -> None:
    """Give each parameter a gradient, of zeros where none came about."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def undivided(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that tensor parallelism leaves whole, whether FSDP shards them or not."""
    return [p for p in parameters if not (isinstance(p, DTensor) and "tensor" in (p.device_mesh.mesh_dim_names or ()))]


def sum_over(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Add tensors up over the processes of a group, in place, some of them at a time."""
    if dist.get_world_size(group) == 1:
        return
    sizes = torch.tensor([tensor.numel() for tensor in tensors]).cumsum(0) // ELEMENTS_AT_ONCE
    for _, members in groupby(zip(sizes.tolist(), tensors, strict=True), key=lambda member: member[0]):
        together = [tensor for _, tensor in members]
        flat = torch.cat([tensor.flatten() for tensor in together])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
            tensor.copy_(total.view_as(tensor))


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of gradients that this process holds, sharing their memory."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm(parameters: Sequence[Tensor], mesh: Mesh) -> float:
    """Norm of the gradients of the whole model, the same bits on every process.

    A gradient that several processes hold counts for each of them with its share.
    """
    squares = torch.stack([torch.linalg.vector_norm(part) for part in local_gradients(parameters)]).double().square()
    shares = torch.tensor([1 / _num_copies(parameter, mesh) for parameter in parameters], dtype=torch.float64)
    (total,) = mesh.sum([(squares * shares.to(squares.device)).sum().item()])
    return total**0.5


def _num_copies(parameter: Tensor, mesh: Mesh) -> int:
    """Processes of this pipeline stage that hold the same part of the parameter."""
    parts = 1
    if isinstance(parameter, DTensor):
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            parts *= 1 if placement.is_replicate() else size
    return mesh.size // mesh.layout.pipeline // parts
