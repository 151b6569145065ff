"""Tensor parallelism: each process holds a shard of every matrix (Shoeybi et al. 2019).

With sequence parallelism (Korthikanti et al. 2022): where norms and residuals act on single tokens, each process holds
a slice of the sequence. It is gathered before the matrices of attention and of the feed-forward layer, and their
outputs are reduce-scattered. In between, activations are whole on each process and their gradients are partial sums. So
are the gradients of unsharded parameters (norms, latents, experts), which ``ParallelModel.reduce`` sums at the end of a
step.

A sharded parameter is a DTensor, so that optimizer and checkpoints know its shard; the arithmetic uses plain tensors.
Experts are not sharded: each process sends its slice of the sequence through all of them.

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lilpipe.model.heads import HeadModel
from lilpipe.model.lora import Adapter, LoRALinear
from lilpipe.model.moe import MoE
from lilpipe.model.transformer import Transformer
from lilpipe.parallel.collectives import gather_sequence, scatter_sequence, sum_of_parts
from lilpipe.parallel.gradients import local
from lilpipe.parallel.vocabulary import VocabularyScores

BY_OUTPUTS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj"),
    *("mlp.gate_proj", "mlp.up_proj"),
)
"""Column-parallel matrices: their outputs are heads or hidden units, divided among the processes."""
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")
"""Row-parallel matrices."""


def divide_matrices(stage: Transformer, mesh: DeviceMesh) -> None:
    """Shard the matrices of a pipeline stage, or of the whole model, over ``mesh``, in place."""
    group, decoder = mesh.get_group(), stage.model
    if decoder.embed_tokens is not None:
        _divide(decoder.embed_tokens, "weight", 0, mesh)
        decoder.embed_tokens.forward = partial(_embed, decoder.embed_tokens, group)  # type: ignore[assignment]
    if decoder.embed_positions is not None:
        decoder.embed_positions.register_forward_pre_hook(partial(_take_part_of_positions, group))
    if stage.lm_head is not None:
        _divide(stage.lm_head, "weight", 0, mesh)
    if isinstance(stage, HeadModel) and stage.part.last:
        stage.score.register_forward_hook(partial(_whole_rows, group))
    for block in decoder.layers.values():
        _divide_block(block, mesh)
    stage.token_scores = VocabularyScores(group).score


def _divide_block(block: nn.Module, mesh: DeviceMesh) -> None:
    group, modules = mesh.get_group(), dict(block.named_modules())
    block.register_forward_pre_hook(partial(_take_part_of_draws, group))
    modules["self_attn"].register_forward_pre_hook(partial(_gather_input, group))
    if not isinstance(modules["mlp"], MoE):
        modules["mlp"].register_forward_pre_hook(partial(_gather_input, group))
    for name in BY_OUTPUTS:
        if isinstance(linear := modules.get(name), nn.Linear):
            _divide(linear, "weight", 0, mesh)
            _divide(linear, "bias", 0, mesh)
            _divide(linear, "lora_B", 0, mesh)
            _divide(linear, "lora_magnitude_vector", 0, mesh)
            linear.forward = partial(_to_own_outputs, linear)  # type: ignore[assignment]
    for name in BY_INPUTS:
        if isinstance(linear := modules.get(name), nn.Linear):
            _divide(linear, "weight", 1, mesh)
            _divide(linear, "lora_A", 1, mesh)
            linear.forward = partial(_from_own_inputs, linear, group)  # type: ignore[assignment]


def _divide(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    parameter = getattr(module, name, None)
    if parameter is not None:
        part = distribute_tensor(parameter, mesh, [Shard(dim)], src_data_rank=None)
        setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


# --- forward passes with shards ---------------------------------------------------------------------------------------


def _to_own_outputs(linear: nn.Linear, x_BTD: Tensor) -> Tensor:
    bias = None if linear.bias is None else _own(linear.bias)
    y_BTD = F.linear(x_BTD, _own(linear.weight), bias)
    if isinstance(linear, LoRALinear):
        return linear.add_output(y_BTD, x_BTD, _own_adapter(linear), _own(linear.weight), bias)
    return y_BTD


def _from_own_inputs(linear: nn.Linear, group: ProcessGroup, x_BTD: Tensor) -> Tensor:
    """Reduce-scatter the product over the sequence; a bias is added once."""
    weight = _own(linear.weight)
    y_BTD = F.linear(x_BTD, weight)
    if isinstance(linear, LoRALinear):
        first = dist.get_rank(group) * x_BTD.shape[-1]
        sum_shards = partial(dist.all_reduce, group=group)
        y_BTD = linear.add_output(
            y_BTD, x_BTD, _own_adapter(linear), weight, None, first_input=first, sum_shards=sum_shards
        )
    y_BTD = scatter_sequence(y_BTD, group)
    return y_BTD if linear.bias is None else y_BTD + linear.bias


def _own_adapter(linear: LoRALinear) -> Adapter:
    """Return this process's shards of the adapter.

    One of the matrices is sharded like the layer's. The other is whole, and its gradient is a partial sum; so is that
    of a row-parallel layer's norms.
    """
    adapter = linear.adapter
    assert adapter is not None
    first_RI, second_OR, magnitude_O = adapter
    return Adapter(local(first_RI), local(second_OR), None if magnitude_O is None else local(magnitude_O))


def _embed(embedding: nn.Embedding, group: ProcessGroup, tokens_BT: Tensor) -> Tensor:
    """Embed the tokens in this process's vocabulary shard, zeros for others, and reduce-scatter over the sequence."""
    words = _own(embedding.weight)
    numbers_BT = tokens_BT - dist.get_rank(group) * len(words)
    own_BT = (numbers_BT >= 0) & (numbers_BT < len(words))
    return scatter_sequence(F.embedding(numbers_BT.where(own_BT, 0), words) * own_BT[..., None], group)


def _own(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


# --- sequence parallelism ---------------------------------------------------------------------------------------------


def _gather_input(group: ProcessGroup, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
    return gather_sequence(args[0], group), *args[1:]


def _whole_rows(group: ProcessGroup, module: nn.Module, args: Any, output_BTO: Tensor) -> Tensor:  # noqa: ARG001
    """Gather a head's outputs at all tokens; the loss is computed on each process."""
    before, after = dist.get_rank(group), dist.get_world_size(group) - dist.get_rank(group) - 1
    num_tokens = output_BTO.shape[1]
    return sum_of_parts(F.pad(output_BTO, (0, 0, before * num_tokens, after * num_tokens)), group)


def _take_part_of_positions(group: ProcessGroup, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:  # noqa: ARG001
    return (_part(args[0], 1, group),)


def _take_part_of_draws(group: ProcessGroup, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG001
    """Slice the random numbers of dropout: the last argument of a block, ``[2, B, T]`` or None."""
    return None if args[-1] is None else (*args[:-1], _part(args[-1], 2, group))


def _part(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
