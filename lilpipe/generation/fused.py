"""Decode step of a Llama, Mistral, Qwen or SmolLM on a CPU, fused into few operations.

On a CPU the call overhead of a decode step's many small operations is as large as their arithmetic. Here the query, key
and value projections are one matrix, and so are gate and up, and the matrix products add the residuals. Matrices are
stored as ``[in, out]``: for one row, both MKL and oneDNN read them 1.6 times faster than ``[out, in]``. Other models
and devices use the model's forward pass.

Dimensions: B rows, D width, H query heads, K key/value heads, E size of a head, I width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.generation.paged_attention import DecodeView
from lilpipe.model.attention import Attention
from lilpipe.model.block import Block
from lilpipe.model.layers import ACTIVATIONS, GatedMLP, Linear
from lilpipe.model.lora import LoRALinear
from lilpipe.model.rope import apply_rope
from lilpipe.model.transformer import Transformer


class _Weights(NamedTuple):
    """Weights of one block; matrices are transposed: ``[in, out]``."""

    input_norm: Tensor
    post_attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    bias: Tensor | None
    """Of queries, keys and values."""
    norm_HE: Tensor | None
    """Weights of the norms of query heads and key heads."""
    rotates: bool
    """Whether the layer has RoPE."""
    scoring: Mapping[str, Any]
    """Options of ``DecodeView.attend``."""


def is_fusable(model: Transformer) -> bool:
    """Whether the model is on a CPU and like Llama: no experts, latent attention, other norms or biases."""
    config = model.config
    plain = config.norm == "rms" and config.norm_placement == "pre" and not config.parallel_residual
    plain = plain and config.gated_mlp and config.moe is None and config.mla is None
    plain = plain and not (config.attention_out_bias or config.mlp_bias or config.qk_norm == "projection")
    plain = plain and config.position_embedding == "rope" and not config.scale_embeddings
    if not plain or config.rope_local_theta is not None or model.device.type != "cpu":
        return False
    linear = [
        module for block in model.model.layers.values() for name, module in block.named_modules() if "proj" in name
    ]
    return all(type(module) in (Linear, LoRALinear) for module in linear)


class FusedDecoder:
    """Decodes with the model's matrices in this layout, with adapters merged.

    A frozen model, of which no parameter requires gradients, keeps its values but as views of these matrices, so that
    no memory is needed twice, and the next decoder of the model has nothing to do. Of other models, which a step of an
    optimizer may change, the matrices are a copy, taken at construction.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        blocks = [block for block in model.model.layers.values() if isinstance(block, Block)]
        is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            self.weights = [
                _fuse(block, rotates=model.model.kind_of_rope(layer) != "none", move=is_frozen)
                for layer, block in enumerate(blocks)
            ]

    def __call__(self, tokens_B1: Tensor, positions_B1: Tensor, view: DecodeView) -> Tensor:
        """Return the logits ``[B, V]`` of the next token."""
        config, decoder = self.model.config, self.model.model
        H, K, E, eps = config.num_heads, config.num_kv_heads, config.head_size, config.norm_eps
        assert decoder.embed_tokens is not None
        assert decoder.norm is not None
        assert decoder.rope_cos is not None
        assert decoder.rope_sin is not None
        act = ACTIVATIONS[config.hidden_act]
        B = len(tokens_B1)
        x_BD = F.embedding(tokens_B1[:, 0], decoder.embed_tokens.weight)
        cos, sin = F.embedding(positions_B1, decoder.rope_cos), F.embedding(positions_B1, decoder.rope_sin)
        cos, sin = cos[:, :, None], sin[:, :, None]
        for layer, weights in enumerate(self.weights):
            qkv_BR = F.rms_norm(x_BD, weights.input_norm.shape, weights.input_norm, eps).mm(weights.qkv)
            qkv = (qkv_BR if weights.bias is None else qkv_BR.add_(weights.bias)).view(B, 1, H + 2 * K, E)
            turned = qkv[:, :, : H + K]
            if weights.norm_HE is not None:
                turned = F.rms_norm(turned, (E,), eps=eps).mul_(weights.norm_HE)
            if weights.rotates:
                turned = apply_rope(turned, cos, sin)
            y = view.attend(layer, turned[:, :, :H], turned[:, :, H:], qkv[:, :, H + K :], **weights.scoring)
            x_BD = x_BD.addmm(y.view(B, H * E), weights.out)
            normed_BD = F.rms_norm(x_BD, weights.post_attention_norm.shape, weights.post_attention_norm, eps)
            gate_BI, up_BI = normed_BD.mm(weights.gate_up).chunk(2, dim=1)
            x_BD = x_BD.addmm(act(gate_BI).mul_(up_BI), weights.down)
        return self.model.logits(decoder.norm(x_BD))


def _fuse(block: Block, *, rotates: bool, move: bool) -> _Weights:
    attention, mlp = block.self_attn, block.mlp
    assert isinstance(attention, Attention)
    assert isinstance(mlp, GatedMLP)
    projections, norm_HE = (attention.q_proj, attention.k_proj, attention.v_proj), None
    biases: list[Tensor] = [projection.bias for projection in projections if projection.bias is not None]
    if attention.q_norm is not None and attention.k_norm is not None:
        heads = (attention.num_heads, attention.num_kv_heads)
        norms = (attention.q_norm.get_parameter("weight"), attention.k_norm.get_parameter("weight"))
        norm_HE = torch.cat([norm_E.expand(num, -1) for num, norm_E in zip(heads, norms, strict=True)])
    return _Weights(
        block.input_layernorm.get_parameter("weight"),
        block.post_attention_layernorm.get_parameter("weight"),
        *(
            _join(together, move=move)
            for together in (projections, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        ),
        bias=torch.cat(biases) if biases else None,
        norm_HE=norm_HE,
        rotates=rotates,
        scoring=attention.scoring,
    )


def _join(projections: Sequence[Linear], *, move: bool) -> Tensor:
    """Return the matrices of projections of one input side by side, ``[in, out]``.

    With ``move``, the projections' weights become views of the result.
    """
    parts = [_full(projection).t() for projection in projections]
    widths = [part.shape[1] for part in parts]
    first, starts = parts[0], [0, *accumulate(widths)]
    size, stride = (first.shape[0], starts[-1]), (starts[-1], 1)
    places = [(part.untyped_storage().data_ptr(), part.storage_offset()) for part in parts]
    address, offset = places[0]
    if first.stride() == stride and places == [(address, offset + start) for start in starts[:-1]]:
        return first.as_strided(size, stride)  # an earlier decoder has moved them
    joined = torch.cat(parts, dim=1)
    for projection, part in zip(projections, joined.split(widths, dim=1), strict=True):
        if move and type(projection) is Linear:
            projection.weight.data = part.t()
    return joined


def _full(linear: Linear) -> Tensor:
    return linear.full_weight if isinstance(linear, LoRALinear) else linear.weight
