"""The processes as a mesh of five dimensions: pipeline, replicate, shard, context, tensor (outermost first).

Neighbouring ranks, which lie on one host, share the innermost dimensions, whose collectives are the largest.

``_unflatten`` and ``_flatten`` of ``DeviceMesh`` are private in torch 2.13 and used nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lilpipe import distributed
from lilpipe.config.parallel import Layout


class Mesh:
    """Where this process stands in a layout, and the groups that it talks to."""

    def __init__(self, layout: Layout) -> None:
        """Make the mesh; every process of the world must take part.

        A world of several times the processes of the layout makes as many meshes, which know nothing of each other.
        """
        self.layout = layout
        self.size = math.prod(layout)
        num_meshes, left_over = divmod(distributed.world_size(), self.size)
        assert num_meshes > 0 == left_over, f"{distributed.world_size()} processes for {layout} = {self.size}"
        world = init_device_mesh(distributed.device().type, (distributed.world_size(),), mesh_dim_names=("world",))
        self.dimensions = world._unflatten(0, (num_meshes, *layout), ("mesh", *layout._fields))[layout._fields]
        # Parameters are sharded over the parts of a sequence as well: each has gradients of its own to add.
        pipeline, replicate, shard, context, tensor = layout
        folded = world._unflatten(
            0,
            (num_meshes * pipeline, replicate, shard * context, tensor),
            ("pipelines", "replicate", "sharding", "tensor"),
        )
        self.sharding: DeviceMesh = folded["replicate", "sharding"] if replicate > 1 else folded["sharding"]
        """Over which FSDP divides parameters; with a first dimension over which it copies them (HSDP)."""
        self.tensor: DeviceMesh = folded["tensor"]
        """Over which matrices are divided."""
        self._whole = self.dimensions._flatten("whole").get_group()
        self._data = self.dimensions["replicate", "shard"]._flatten("data").get_group()
        self._summing = self.dimensions["replicate", "shard", "context"]._flatten("summing").get_group()
        self._stage = self.dimensions["replicate", "shard", "context", "tensor"]._flatten("stage").get_group()
        self._ends = _pair_up_ends(torch.arange(distributed.world_size()).view(num_meshes, pipeline, -1))

    @cached_property
    def coordinate(self) -> Layout:
        """Place of this process along each dimension."""
        coordinate = self.dimensions.get_coordinate()
        assert coordinate is not None
        return Layout(*coordinate)

    @property
    def data_rank(self) -> int:
        """Which part of a batch's rows this process has, of ``layout.data``."""
        return self.coordinate.replicate * self.layout.shard + self.coordinate.shard

    @property
    def data_group(self) -> ProcessGroup:
        """The processes that hold the other rows of a batch: replicate x shard."""
        return self._data

    @property
    def context_group(self) -> ProcessGroup:
        """The processes that hold the other parts of the same rows."""
        return self.dimensions.get_group("context")

    @property
    def tensor_group(self) -> ProcessGroup:
        """The processes that hold the other parts of the same matrices."""
        return self.tensor.get_group()

    @property
    def pipeline_group(self) -> ProcessGroup:
        """The processes that hold the other stages."""
        return self.dimensions.get_group("pipeline")

    @property
    def summing_group(self) -> ProcessGroup:
        """The processes that compute parts of the same gradients: replicate x shard x context."""
        return self._summing

    @property
    def stage_group(self) -> ProcessGroup:
        """The processes that hold the same stages: all dimensions but the pipeline's."""
        return self._stage

    @property
    def ends_group(self) -> ProcessGroup | None:
        """The first and the last process of this pipeline, for one of the two."""
        return self._ends

    @property
    def holds_first_stage(self) -> bool:
        """Whether this process begins the pipeline."""
        return self.coordinate.pipeline == 0

    @property
    def holds_last_stage(self) -> bool:
        """Whether this process ends the pipeline."""
        return self.coordinate.pipeline == self.layout.pipeline - 1

    def rank_of(self, *, pipeline: int) -> int:
        """The rank in the world of the first process that holds that part of the pipeline."""
        return dist.get_process_group_ranks(self._whole)[pipeline * (self.size // self.layout.pipeline)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over all processes of the mesh in float64; every one gets the same bits."""
        summed = torch.tensor(values, dtype=torch.float64, device=distributed.device())
        dist.all_reduce(summed, group=self._whole)
        return summed.tolist()


def _pair_up_ends(ranks: torch.Tensor) -> ProcessGroup | None:
    """The group of the first and the last process of each pipeline: of this process's own, if it is one of them.

    ``ranks`` is [meshes, pipeline, processes of each stage].
    """
    mine = None
    if ranks.shape[1] > 1:
        for pair in torch.stack([ranks[:, 0].flatten(), ranks[:, -1].flatten()], dim=1).tolist():
            group = dist.new_group(pair)
            if distributed.rank() in pair and isinstance(group, ProcessGroup):
                mine = group
    return mine
