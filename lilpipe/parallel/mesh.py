"""Device mesh of five dimensions: pipeline, replicate, shard, context, tensor (outermost first).

Neighboring ranks, which are on one host, share the innermost dimensions, whose collectives are the largest.
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
"""Groups of ranks; each rank is in one group."""


class Mesh:
    """Coordinates of this process in a parallel layout, and its process groups."""

    def __init__(self, layout: ParallelDims) -> None:
        """Create the mesh. Collective over all processes.

        A world of a multiple of the layout's processes forms several independent meshes.
        """
        self.layout = layout
        self.size = math.prod(layout)
        num_meshes, left_over = divmod(distributed.world_size(), self.size)
        assert num_meshes > 0 == left_over, f"{distributed.world_size()} processes for {layout} = {self.size}"
        pipeline, replicate, shard, context, tensor = layout
        self._ranks = torch.arange(distributed.world_size()).view(num_meshes, *layout)
        place = (self._ranks == distributed.rank()).nonzero()[0].tolist()
        self._mesh, self.coordinate = place[0], ParallelDims(*place[1:])
        """Coordinates of this process."""
        # Context ranks also shard parameters: each has its own gradients to sum.
        parameters = init_device_mesh(
            distributed.device().type,
            (num_meshes * pipeline, replicate, shard * context, tensor),
            mesh_dim_names=("pipelines", "replicate", "shard", "tensor"),
        )
        self.sharding: DeviceMesh = parameters["replicate", "shard"] if replicate > 1 else parameters["shard"]
        """FSDP shards parameters over it; with a first dimension for replicas (HSDP)."""
        self.tensor: DeviceMesh = parameters["tensor"]
        """Tensor parallelism shards matrices over it."""
        self._groups: dict[Partition, ProcessGroup] = {}
        self.data_group = self._group("replicate", "shard")
        """The processes with the other rows of a batch."""
        self.context_group = self._group("context")
        """The processes with the other slices of the same rows."""
        self.tensor_group = self._group("tensor")
        """The processes with the other shards of the same matrices."""
        self.pipeline_group = self._group("pipeline")
        """The processes with the other stages."""
        self.summing_group = self._group("replicate", "shard", "context")
        """The processes that compute parts of the same gradients."""
        self.stage_group = self._group("replicate", "shard", "context", "tensor")
        """The processes that hold the same stages."""
        self._whole = self._group(*layout._fields)
        self._ends = self._group_of_ends()

    @property
    def data_rank(self) -> int:
        """Index of this process's rows of a batch, of ``layout.data``."""
        return self.coordinate.replicate * self.layout.shard + self.coordinate.shard

    @property
    def holds_first_stage(self) -> bool:
        """Whether this process holds the first stage."""
        return self.coordinate.pipeline == 0

    @property
    def holds_last_stage(self) -> bool:
        """Whether this process holds the last stage."""
        return self.coordinate.pipeline == self.layout.pipeline - 1

    @property
    def ends_group(self) -> ProcessGroup | None:
        """The first and last process of this pipeline, if this is one of them and they differ."""
        at_an_end = self.holds_first_stage or self.holds_last_stage
        return self._ends if at_an_end and self.layout.pipeline > 1 else None

    def rank_of(self, *, pipeline: int) -> int:
        """Return the global rank of the first process that holds that part of the pipeline."""
        return int(self._ranks[self._mesh, pipeline].flatten()[0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over all processes of the mesh in float64; all get the same bits."""
        summed = torch.tensor(values, dtype=torch.float64, device=distributed.device())
        dist.all_reduce(summed, group=self._whole)
        return summed.tolist()

    def _group(self, *dimensions: str) -> ProcessGroup:
        """Return the group of processes that differ from this one only along these dimensions."""
        axes = [1 + ParallelDims._fields.index(name) for name in dimensions]
        rows = self._ranks.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
        return self._own_group(_partition(rows))

    def _group_of_ends(self) -> ProcessGroup:
        """Return pairs of the first and last stages' processes, and for each pair those in between."""
        stages = self._ranks.flatten(2).transpose(1, 2)  # [meshes, processes of a stage, pipeline]
        pairs, between = stages[..., [0, -1]], stages[..., 1:-1]
        if self.layout.pipeline == 1:
            pairs = stages
        return self._own_group(_partition(pairs) + (_partition(between) if between.numel() else ()))

    def _own_group(self, partition: Partition) -> ProcessGroup:
        """Return this process's group of ``partition``. Cached: each group has its own threads and connections."""
        if partition not in self._groups:
            group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition])
            assert isinstance(group, ProcessGroup)
            self._groups[partition] = group
        return self._groups[partition]


def _partition(ranks: torch.Tensor) -> Partition:
    return tuple(tuple(row) for row in ranks.flatten(0, -2).tolist())
