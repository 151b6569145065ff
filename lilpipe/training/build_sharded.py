"""Construction of a model that is sharded over processes; none of them ever holds the whole model.

The order matters: build this process's stages on the meta device, then add adapters and freeze parameters, apply tensor
parallelism, context parallelism, activation checkpointing, compilation and FSDP, and only then allocate memory and
initialize weights. An initial value depends on the seed and the name, so every layout starts from the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lilpipe import distributed
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel_checks import check_vocabulary
from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError
from lilpipe.model.backend import Backend
from lilpipe.model.heads import HeadModel
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.lora import add_adapters
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
    stage: str = "",
) -> ParallelModel:
    """Return a model with initial weights, sharded over ``mesh``.

    Args:
        section: Parallel layout, precision and seed.
        model: Config of the model.
        vocab_size: Vocabulary size.
        batches: Returns the micro-batches of a step for this process's data rank.
        loss: Returns the loss of a micro-batch.
        mesh: The processes; by default all of them in the layout of ``section``.
        intra_document_masking: Whether attention stays within the documents of a row.
        compiled: Whether to compile the blocks.
        dtype: Of the weights.
        head: Outputs of a head that replaces the output layer; None keeps the output layer.
        prepare: Modifies each stage while it is whole, and on the meta device unless transformers computes it.
        stage: Name of the pipeline's stage, for messages.

    Raises:
        ConfigError: The vocabulary size is not divisible by the layout, or the model cannot have adapters.
    """
    assert section.seed is not None
    try:
        check_vocabulary(section.layout, vocab_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    mesh = mesh or Mesh(section.layout)
    compute_dtype = dtype if section.precision == "fp32" else torch.bfloat16
    is_backend = isinstance(model, BackendConfig)
    stages = []
    for part in _parts(section, model.num_layers, mesh):
        # A class of transformers computes tables in memory when it is made, so it is made whole.
        with nullcontext() if is_backend else torch.device("meta"):
            held = _stage(model, vocab_size, head, part).to(dtype)
            if section.lora is not None:
                add_adapters(held, section.lora, seed=section.seed, stage=stage)
            if prepare is not None:
                prepare(held)
        _cut(held, section, mesh)
        if compiled:
            compilation.compile_blocks(held)
        stages.append(held)
    if section.layout.shard > 1 or compute_dtype != dtype:
        for held in stages:
            _shard(held, mesh, compute_dtype, reduce_dtype=dtype)
    for held in stages:
        if isinstance(held.model, Backend):
            held.model.one_pass = True  # all workers gather the weights equally often
        else:
            _fill(held, section.seed)
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
    """Return the parts of this process's stages: every ``pipeline``-th of all."""
    pipeline, per_worker = section.layout.pipeline, section.parallel.stages_per_worker
    return split_model(num_layers, pipeline * per_worker)[mesh.coordinate.pipeline :: pipeline]


def _cut(stage: Transformer, section: ParallelSection, mesh: Mesh) -> None:
    """Apply tensor and context parallelism and activation checkpointing."""
    if mesh.layout.tensor > 1:
        divide_matrices(stage, mesh.tensor)
    if mesh.layout.context > 1:
        group = mesh.context_group
        stage.model.context = lambda positions_BT, documents_BT: GatheredSequence(positions_BT, documents_BT, group)
    activation_checkpointing.apply(stage, section.activation_checkpointing)


def _shard(stage: Transformer, mesh: Mesh, compute_dtype: torch.dtype, *, reduce_dtype: torch.dtype) -> None:
    """Apply FSDP to each block and to the stage; gradients are summed, not averaged."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    # In a pipeline all micro-batches use a stage in turn, so gathered weights are kept.
    reshard = mesh.layout.pipeline == 1
    for module in [*stage.model.layers.values(), stage]:
        fully_shard(module, mesh=mesh.sharding, mp_policy=policy, reshard_after_forward=reshard)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports no other scaled reduction


@torch.no_grad()
def _fill(stage: Transformer, seed: int) -> None:
    """Allocate memory for this process's shards, and initialize one tensor at a time."""
    stage.to_empty(device=distributed.device())
    stage.model.set_rope(stage.config.rope_theta)
    saved = stage.state_dict().keys()
    for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
        if name in saved:
            _assign(tensor, initial_value(name, tensor.shape, seed=seed, config=stage.config))


def _assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a tensor or into a shard of it."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
