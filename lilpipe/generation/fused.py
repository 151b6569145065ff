"""Decode step of a Llama on a CPU, fused into few operations.

On a CPU the call overhead of a decode step's many small operations is as large as their arithmetic. Here the query, key
and value projections are one matrix, and so are gate and up. The norms' weights are folded into them, and the matrix
products add the residuals. Other models and devices use the model's forward pass.

Dimensions: B rows, D width, H query heads, K key/value heads, E size of a head, I width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.generation.paged_attention import DecodeView
from lilpipe.model.attention import Attention
from lilpipe.model.layers import ACTIVATIONS, GatedMLP, Linear
from lilpipe.model.lora import LoRALinear
from lilpipe.model.rope import apply_rope
from lilpipe.model.transformer import Block, Transformer


class _Weights(NamedTuple):
    """Weights of one block, transposed: ``[in, out]``."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    scoring: Mapping[str, Any]
    """Options of ``DecodeView.attend``."""


def is_fusable(model: Transformer) -> bool:
    """Whether the model is on a CPU and like Llama: no experts, latent attention, other norms or biases."""
    config = model.config
    plain = config.norm == "rms" and config.norm_placement == "pre" and not config.parallel_residual
    plain = plain and config.gated_mlp and config.moe is None and config.mla is None and not config.qk_norm
    plain = plain and not (config.attention_bias or config.attention_out_bias or config.mlp_bias)
    plain = plain and config.position_embedding == "rope" and not config.nope_layers and not config.scale_embeddings
    if not plain or config.rope_local_theta is not None or model.device.type != "cpu":
        return False
    linear = [
        module for block in model.model.layers.values() for name, module in block.named_modules() if "proj" in name
    ]
    return all(type(module) in (Linear, LoRALinear) for module in linear)


class FusedDecoder:
    """Decodes with a copy of the model's weights, taken at construction, with adapters merged into it."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        blocks = [block for block in model.model.layers.values() if isinstance(block, Block)]
        with torch.no_grad():
            self.weights = [_fuse(block) for block in blocks]

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
            qkv = x_BD.mm(weights.qkv).mul_(_scale(x_BD, eps)).view(B, 1, H + 2 * K, E)
            turned = apply_rope(qkv[:, :, : H + K], cos, sin)
            y = view.attend(layer, turned[:, :, :H], turned[:, :, H:], qkv[:, :, H + K :], **weights.scoring)
            x_BD = x_BD.addmm(y.view(B, H * E), weights.out)
            gate_BI, up_BI = x_BD.mm(weights.gate_up).mul_(_scale(x_BD, eps)).chunk(2, dim=1)
            x_BD = x_BD.addmm(act(gate_BI).mul_(up_BI), weights.down)
        return self.model.logits(decoder.norm(x_BD))


def _scale(x_BD: Tensor, eps: float) -> Tensor:
    """Return 1 / RMS of each row. It commutes with the matrix product that follows."""
    return x_BD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _fuse(block: Block) -> _Weights:
    attention, mlp = block.self_attn, block.mlp
    assert isinstance(attention, Attention)
    assert isinstance(mlp, GatedMLP)
    before, between = block.input_layernorm.weight, block.post_attention_layernorm.weight
    assert isinstance(before, Tensor)
    assert isinstance(between, Tensor)
    qkv = torch.cat([_full(attention.q_proj), _full(attention.k_proj), _full(attention.v_proj)]) * before
    gate_up = torch.cat([_full(mlp.gate_proj), _full(mlp.up_proj)]) * between
    matrices = (w.t().contiguous() for w in (qkv, _full(attention.o_proj), gate_up, _full(mlp.down_proj)))
    return _Weights(*matrices, scoring=attention.scoring)


def _full(linear: Linear) -> Tensor:
    return linear.full_weight if isinstance(linear, LoRALinear) else linear.weight
