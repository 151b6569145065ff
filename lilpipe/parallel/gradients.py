"""Sum and norm of the gradients of a sharded model.

Every process computes the gradient of a sum of losses over its own tokens. Gradients are summed, never averaged, and
divided once by the count of all targets.
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
"""Elements of gradients per all-reduce bucket: 128 MiB in float32."""


def fill_in(parameters: Sequence[Tensor]) -> None:
    """Set missing gradients to zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def undivided(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that tensor parallelism does not shard, whether FSDP shards them or not."""
    return [p for p in parameters if not (isinstance(p, DTensor) and "tensor" in (p.device_mesh.mesh_dim_names or ()))]


def sum_over(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """All-reduce tensors over a group, in place, in buckets."""
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
    """Return the local shards of gradients, sharing their memory."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm(parameters: Sequence[Tensor], mesh: Mesh) -> float:
    """Return the gradient norm of the whole model, bitwise equal on every process.

    Each copy of a gradient counts with weight 1 / number of copies.
    """
    squares = torch.stack([torch.linalg.vector_norm(part) for part in local_gradients(parameters)]).double().square()
    shares = torch.tensor([1 / _num_copies(parameter, mesh) for parameter in parameters], dtype=torch.float64)
    (total,) = mesh.sum([(squares * shares.to(squares.device)).sum().item()])
    return total**0.5


def _num_copies(parameter: Tensor, mesh: Mesh) -> int:
    """Return the number of processes of this pipeline stage that hold the same shard of the parameter."""
    parts = 1
    if isinstance(parameter, DTensor):
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            parts *= 1 if placement.is_replicate() else size
    return mesh.size // mesh.layout.pipeline // parts
