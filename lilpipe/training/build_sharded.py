"""Building a model that is cut over processes, none of which ever holds the whole of it.

The order matters: the stages of this process without memory (on the meta device), then adapters and what is frozen,
tensor parallelism, context parallelism, activation checkpointing, compilation, sharding, and only then memory and
weights. A weight's value is a function of the seed and of its name, so every layout starts from the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lilpipe import distributed
from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel_checks import check_vocabulary
from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError
from lilpipe.model.heads import HeadModel
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.parallel.context import GatheredSequence
from lilpipe.parallel.mesh import Mesh
from lilpipe.parallel.pipeline_parallel import split_model
from lilpipe.parallel.tensor import divide_matrices
from lilpipe.training import activation_checkpointing, compilation
from lilpipe.training.sharded import Batches, Objective, ParallelModel


def parallelize(
    section: ParallelSection,
    model: ModelConfig,
    vocab_size: int,
    *,
    batches: Batches,
    loss: Objective,
    mesh: Mesh | None = None,
    intra_document_masking: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    head: int | None = None,
    prepare: Callable[[Transformer], None] | None = None,
) -> ParallelModel:
    """A model with fresh weights, cut over ``mesh``.

    Args:
        section: ParallelDims, precision and seed.
        model: Its shape.
        vocab_size: Words of the embedding.
        batches: The micro-batches of a step for this process's data rank.
        loss: Their loss.
        mesh: The processes; all of them in the layout of ``section`` if none is given.
        intra_document_masking: Whether attention stays inside the documents of a row.
        compiled: Whether blocks are compiled.
        dtype: Of the weights.
        head: Outputs of a head in place of the output layer; none keeps that.
        prepare: Changes each stage while it is whole and on the meta device.

    Raises:
        ConfigError: The vocabulary cannot be divided.
    """
    assert section.seed is not None
    try:
        check_vocabulary(section.layout, vocab_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    mesh = mesh or Mesh(section.layout)
    compute_dtype = dtype if section.precision == "fp32" else torch.bfloat16
    stages = []
    for part in _parts(section, model.num_layers, mesh):
        with torch.device("meta"):
            stage = _stage(model, vocab_size, head, part).to(dtype)
            if prepare is not None:
                prepare(stage)
        _cut(stage, section, mesh)
        if compiled:
            compilation.compile_blocks(stage)
        stages.append(stage)
    if section.layout.shard > 1 or compute_dtype != dtype:
        for stage in stages:
            _shard(stage, mesh, compute_dtype, reduce_dtype=dtype)
    for stage in stages:
        _fill(stage, section.seed)
    return ParallelModel(
        stages,
        mesh,
        section,
        batches=batches,
        loss=loss,
        intra_document_masking=intra_document_masking,
        dtype=compute_dtype,
    )


def _stage(model: ModelConfig, vocab_size: int, head: int | None, part: ModelPart) -> Transformer:
    return Transformer(model, vocab_size, part) if head is None else HeadModel(model, vocab_size, head, part)


def _parts(section: ParallelSection, num_layers: int, mesh: Mesh) -> Sequence[ModelPart]:
    """What the stages of this process hold: every ``pipeline``-th of all."""
    pipeline, per_worker = section.layout.pipeline, section.parallel.stages_per_worker
    return split_model(num_layers, pipeline * per_worker)[mesh.coordinate.pipeline :: pipeline]


def _cut(stage: Transformer, section: ParallelSection, mesh: Mesh) -> None:
    """Divide matrices and sequences, and mark what is computed again."""
    if mesh.layout.tensor > 1:
        divide_matrices(stage, mesh.tensor)
    if mesh.layout.context > 1:
        group = mesh.context_group
        stage.model.context = lambda positions_BT, documents_BT: GatheredSequence(positions_BT, documents_BT, group)
    activation_checkpointing.apply(stage, section.activation_checkpointing)


def _shard(stage: Transformer, mesh: Mesh, compute_dtype: torch.dtype, *, reduce_dtype: torch.dtype) -> None:
    """Shard parameters over the mesh, each block by itself; gradients are summed, not averaged."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    # In a pipeline a stage is used by one micro-batch after the other, so what is gathered stays.
    reshard = mesh.layout.pipeline == 1
    for module in [*stage.model.layers.values(), stage]:
        fully_shard(module, mesh=mesh.sharding, mp_policy=policy, reshard_after_forward=reshard)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor


@torch.no_grad()
def _fill(stage: Transformer, seed: int) -> None:
    """Give a stage memory for what this process holds, and fill it one tensor at a time."""
    stage.to_empty(device=distributed.device())
    stage.model.set_rope(stage.config.rope_theta)
    saved = stage.state_dict().keys()
    for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
        if name in saved:
            _assign(tensor, initial_value(name, tensor.shape, seed=seed, config=stage.config))


def _assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be a part of it."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
