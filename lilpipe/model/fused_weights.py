"""Conversion of weights that Hugging Face stores under other names or fused: GPT-NeoX, Phi-3, Mixtral.

GPT-2 and the experts of other classes have their own modules.

Dimensions: H query heads, K key/value heads, E size of one head, D width, I width of the feed-forward layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.model import moe

Tensors = dict[str, Tensor]

_NEOX = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.final_layer_norm.": "model.norm.",
    "embed_out.": "lm_head.",  # in files of transformers before version 5.1
    "lm_head.": "lm_head.",
    "gpt_neox.layers.": "model.layers.",
}
_NEOX_INSIDE = {
    ".attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}
_NEOX_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")
"""Constant buffers in older files."""
_PARTS = ("q_proj", "k_proj", "v_proj")


def gpt_neox_from_hf(tensors: Tensors, config: ModelConfig, stated: Mapping[str, Any]) -> Tensors:  # noqa: ARG001
    """Split the matrix of queries, keys and values, whose rows are ``[H, 3, E]``."""
    result: Tensors = {}
    for given, tensor in tensors.items():
        if _NEOX_BUFFERS.search(given):
            continue
        name = _renamed(given, _NEOX, _NEOX_INSIDE)
        layer, fused, kind = name.partition(".attention.query_key_value.")
        if not fused:
            result[name] = tensor
            continue
        parts = tensor.unflatten(0, (config.num_heads, 3, -1)).unbind(1)
        for part, rows in zip(_PARTS, parts, strict=True):
            result[f"{layer}.self_attn.{part}.{kind}"] = rows.flatten(0, 1).contiguous()
    return result


def gpt_neox_to_hf(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Invert ``gpt_neox_from_hf``."""
    outside = {ours: theirs for theirs, ours in _NEOX.items()}
    inside = {ours: theirs for theirs, ours in _NEOX_INSIDE.items()}
    result: Tensors = {}
    for name, tensor in tensors.items():
        layer, first, kind = name.partition(".self_attn.q_proj.")
        if first:
            rows = [tensors[f"{layer}.self_attn.{part}.{kind}"].unflatten(0, (config.num_heads, -1)) for part in _PARTS]
            fused = torch.stack(rows, dim=1).flatten(0, 2)
            result[_renamed(f"{layer}.attention.query_key_value.{kind}", outside, inside)] = fused
        elif not name.endswith((".k_proj.weight", ".v_proj.weight", ".k_proj.bias", ".v_proj.bias")):
            result[_renamed(name, outside, inside)] = tensor
    return result


def phi3_from_hf(tensors: Tensors, config: ModelConfig, stated: Mapping[str, Any]) -> Tensors:  # noqa: ARG001
    """Split the matrices of queries, keys and values, and of gate and up."""
    result: Tensors = {}
    kv_rows = config.num_kv_heads * config.head_size
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition("_proj.")
        if layer.endswith(".qkv"):
            sizes = [len(tensor) - 2 * kv_rows, kv_rows, kv_rows]
            pieces = zip(_PARTS, tensor.split(sizes) if sizes[0] > 0 else [tensor] * 3, strict=True)
            result |= {f"{layer.removesuffix('.qkv')}.{part}.{last}": piece.contiguous() for part, piece in pieces}
        elif layer.endswith(".gate_up"):
            pieces = zip(("gate_proj", "up_proj"), tensor.tensor_split(2), strict=True)
            result |= {f"{layer.removesuffix('.gate_up')}.{part}.{last}": piece.contiguous() for part, piece in pieces}
        else:
            result[name] = tensor
    return result


def phi3_to_hf(tensors: Tensors, config: ModelConfig) -> Tensors:  # noqa: ARG001
    """Invert ``phi3_from_hf``."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition("_proj.")
        parent, _, part = layer.rpartition(".")
        if part == "q":
            result[f"{parent}.qkv_proj.{last}"] = torch.cat([tensors[f"{parent}.{each}.{last}"] for each in _PARTS])
        elif part == "gate":
            result[f"{parent}.gate_up_proj.{last}"] = torch.cat([tensor, tensors[f"{parent}.up_proj.{last}"]])
        elif part not in ("k", "v", "up"):
            result[name] = tensor
    return result


def experts_from_hf(tensors: Tensors, config: ModelConfig, stated: Mapping[str, Any]) -> Tensors:  # noqa: ARG001
    """Stack the experts' matrices."""
    return moe.from_huggingface(tensors)


def experts_to_hf(tensors: Tensors, config: ModelConfig) -> Tensors:  # noqa: ARG001
    """Invert ``experts_from_hf``."""
    return moe.to_huggingface(tensors)


_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mixtral_from_hf(tensors: Tensors, config: ModelConfig, stated: Mapping[str, Any]) -> Tensors:
    """Rename and stack the experts' matrices."""
    renamed = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    matrix = re.compile(r"(\.mlp\.experts\.\d+\.)(w[123])\.")
    renamed = {matrix.sub(lambda m: f"{m[1]}{_MIXTRAL[m[2]]}.", name): tensor for name, tensor in renamed.items()}
    return experts_from_hf(renamed, config, stated)


def mixtral_to_hf(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Invert ``mixtral_from_hf``."""
    theirs = {ours: name for name, ours in _MIXTRAL.items()}
    matrix = re.compile(r"(\.experts\.\d+\.)(gate_proj|down_proj|up_proj)\.")
    return {
        matrix.sub(lambda m: f"{m[1]}{theirs[m[2]]}.", name).replace(".mlp.", ".block_sparse_moe."): tensor
        for name, tensor in experts_to_hf(tensors, config).items()
    }


def _renamed(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """Replace a prefix and an inner part of a name. Unknown names are kept; the reader rejects them."""
    for old, new in outside.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inside.items():
        name = name.replace(old, new)
    return name
