"""The processes as a mesh of five dimensions: pipeline, replicate, shard, context, tensor (outermost first).

Neighbouring ranks, which lie on one host, share the innermost dimensions, whose collectives are the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lilpipe import distributed
from lilpipe.config.parallel import ParallelDims

Partition = tuple[tuple[int, ...], ...]
"""Ranks in groups, each rank in one of them."""


class Mesh:
    """Where this process stands in a layout, and the groups that it talks to."""

    def __init__(self, layout: ParallelDims) -> None:
        """Make the mesh; every process of the world must take part.

        A world of several times the processes of the layout makes as many meshes, which know nothing of each other.
        """
        self.layout = layout
        self.size = math.prod(layout)
        num_meshes, left_over = divmod(distributed.world_size(), self.size)
        assert num_meshes > 0 == left_over, f"{distributed.world_size()} processes for {layout} = {self.size}"
        pipeline, replicate, shard, context, tensor = layout
        self._ranks = torch.arange(distributed.world_size()).view(num_meshes, *layout)
        place = (self._ranks == distributed.rank()).nonzero()[0].tolist()
        self._mesh, self.coordinate = place[0], ParallelDims(*place[1:])
        """Place of this process along each dimension."""
        # Parameters are sharded over the parts of a sequence as well: each has gradients of its own to add.
        parameters = init_device_mesh(
            distributed.device().type,
            (num_meshes * pipeline, replicate, shard * context, tensor),
            mesh_dim_names=("pipelines", "replicate", "shard", "tensor"),
        )
        self.sharding: DeviceMesh = parameters["replicate", "shard"] if replicate > 1 else parameters["shard"]
        """Over which FSDP divides parameters; with a first dimension over which it copies them (HSDP)."""
        self.tensor: DeviceMesh = parameters["tensor"]
        """Over which matrices are divided."""
        self._groups: dict[Partition, ProcessGroup] = {}
        self.data_group = self._group("replicate", "shard")
        """The processes that hold the other rows of a batch."""
        self.context_group = self._group("context")
        """The processes that hold the other parts of the same rows."""
        self.tensor_group = self._group("tensor")
        """The processes that hold the other parts of the same matrices."""
        self.pipeline_group = self._group("pipeline")
        """The processes that hold the other stages."""
        self.summing_group = self._group("replicate", "shard", "context")
        """The processes that compute parts of the same gradients."""
        self.stage_group = self._group("replicate", "shard", "context", "tensor")
        """The processes that hold the same stages."""
        self._whole = self._group(*layout._fields)
        self._ends = self._group_of_ends()

    @property
    def data_rank(self) -> int:
        """Which part of a batch's rows this process has, of ``layout.data``."""
        return self.coordinate.replicate * self.layout.shard + self.coordinate.shard

    @property
    def holds_first_stage(self) -> bool:
        """Whether this process begins the pipeline."""
        return self.coordinate.pipeline == 0

    @property
    def holds_last_stage(self) -> bool:
        """Whether this process ends the pipeline."""
        return self.coordinate.pipeline == self.layout.pipeline - 1

    @property
    def ends_group(self) -> ProcessGroup | None:
        """The first and the last process of this pipeline, for one of the two, if they are two."""
        at_an_end = self.holds_first_stage or self.holds_last_stage
        return self._ends if at_an_end and self.layout.pipeline > 1 else None

    def rank_of(self, *, pipeline: int) -> int:
        """The rank in the world of the first process that holds that part of the pipeline."""
        return int(self._ranks[self._mesh, pipeline].flatten()[0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over all processes of the mesh in float64; every one gets the same bits."""
        summed = torch.tensor(values, dtype=torch.float64, device=distributed.device())
        dist.all_reduce(summed, group=self._whole)
        return summed.tolist()

    def _group(self, *dimensions: str) -> ProcessGroup:
        """The group of this process and those that differ from it along these dimensions alone."""
        axes = [1 + ParallelDims._fields.index(name) for name in dimensions]
        rows = self._ranks.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
        return self._own_group(_partition(rows))

    def _group_of_ends(self) -> ProcessGroup:
        """Pairs of the first and last stages' processes, and for each pair those in between."""
        stages = self._ranks.flatten(2).transpose(1, 2)  # [meshes, processes of a stage, pipeline]
        pairs, between = stages[..., [0, -1]], stages[..., 1:-1]
        if self.layout.pipeline == 1:
            pairs = stages
        return self._own_group(_partition(pairs) + (_partition(between) if between.numel() else ()))

    def _own_group(self, partition: Partition) -> ProcessGroup:
        """The group of ``partition`` that this process belongs to, made once: each has threads and connections."""
        if partition not in self._groups:
            group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition])
            assert isinstance(group, ProcessGroup)
            self._groups[partition] = group
        return self._groups[partition]


def _partition(ranks: torch.Tensor) -> Partition:
    return tuple(tuple(row) for row in ranks.flatten(0, -2).tolist())
