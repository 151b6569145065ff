"""Tensor parallelism: each process holds a part of every matrix (Shoeybi et al. 2019).

Between the matrices, where norms and residuals work on single tokens, each process holds a part of the sequence
(Korthikanti et al. 2022): what was an all-reduce becomes a reduce-scatter and an all-gather, and no activation is
held twice.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lilpipe.model.transformer import Transformer
from lilpipe.parallel.vocabulary import VocabularyScores

NORMS_BEFORE_MATRICES = ("input_layernorm", "post_attention_layernorm")


def divide_matrices(stage: Transformer, mesh: DeviceMesh) -> None:
    """Cut the matrices of a pipeline stage, or of the whole model, over ``mesh``, in place."""
    styles: dict[str, ParallelStyle] = {}
    if stage.model.embed_tokens is not None:
        styles["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if stage.model.norm is not None:
        styles["model.norm"] = SequenceParallel(use_local_output=True)
    if stage.lm_head is not None:
        styles["lm_head"] = ColwiseParallel()
    for layer, block in stage.model.layers.items():
        styles |= {f"model.layers.{layer}.{name}": style for name, style in _styles_of_block().items()}
    parallelize_module(stage, mesh, styles)
    for block in stage.model.layers.values():
        for norm in NORMS_BEFORE_MATRICES:
            block.get_submodule(norm).register_forward_hook(_gather_sequence)
    stage.token_scores = VocabularyScores(mesh.get_group()).score


def _styles_of_block() -> dict[str, ParallelStyle]:
    """Divided by columns is what leads into heads and hidden units, by rows what leads out of them."""
    return {
        **{name: SequenceParallel() for name in NORMS_BEFORE_MATRICES},
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def _gather_sequence(module: nn.Module, args: Any, output: DTensor) -> DTensor:  # noqa: ARG001 (fixed signature)
    """After a norm, once for all matrices that follow it."""
    return output.redistribute(placements=[Replicate()])
