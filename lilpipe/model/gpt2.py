"""Conversion of GPT-2 weights (Radford et al. 2019) between Hugging Face's names and ours.

Hugging Face keeps OpenAI's layout: queries, keys and values are one fused matrix, and matrices are [inputs, outputs].
Here they are three matrices of [outputs, inputs], as in the other decoders, so that the same parallelism plans apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_OUTSIDE = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.wpe.": "model.embed_positions.",
    "transformer.ln_f.": "model.norm.",
    "lm_head.": "lm_head.",
}
_NORMS = {"ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm."}
_MATRICES = {"attn.c_proj.": "self_attn.o_proj.", "mlp.c_fc.": "mlp.up_proj.", "mlp.c_proj.": "mlp.down_proj."}
_QKV = "attn.c_attn."
_QKV_PARTS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_MASKS = ("attn.bias", "attn.masked_bias")
"""Constant buffers in older files."""


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of ``GPT2LMHeadModel``, or of ``GPT2Model`` (without ``transformer.``), to ours."""
    result: dict[str, Tensor] = {}
    for given, tensor in state.items():
        name = given if given.startswith(("transformer.", "lm_head.")) else f"transformer.{given}"
        block, inside = _split(name, "transformer.h.")
        if inside in _MASKS:
            continue
        if block is None:
            result[_renamed(name, _OUTSIDE)] = tensor
        elif inside.startswith(_QKV):
            kind = inside.removeprefix(_QKV)
            for part, piece in zip(_QKV_PARTS, tensor.chunk(3, dim=-1), strict=True):
                result[f"model.layers.{block}.{part}{kind}"] = _turned(piece)
        elif inside.startswith(tuple(_MATRICES)):
            result[f"model.layers.{block}.{_renamed(inside, _MATRICES)}"] = _turned(tensor)
        else:
            result[f"model.layers.{block}.{_renamed(inside, _NORMS)}"] = tensor
    return result


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert ``from_huggingface``: the state dict of ``GPT2LMHeadModel`` without a tied output layer."""
    result: dict[str, Tensor] = {}
    outside, norms, matrices = (
        {ours: theirs for theirs, ours in names.items()} for names in (_OUTSIDE, _NORMS, _MATRICES)
    )
    for name, tensor in state.items():
        block, inside = _split(name, "model.layers.")
        if block is None:
            result[_renamed(name, outside)] = tensor
        elif inside.startswith(_QKV_PARTS[0]):
            kind = inside.removeprefix(_QKV_PARTS[0])
            parts = [_turned(state[f"model.layers.{block}.{part}{kind}"]) for part in _QKV_PARTS]
            result[f"transformer.h.{block}.{_QKV}{kind}"] = torch.cat(parts, dim=-1)
        elif inside.startswith(_QKV_PARTS):
            continue  # fused with the queries
        elif inside.startswith(tuple(matrices)):
            result[f"transformer.h.{block}.{_renamed(inside, matrices)}"] = _turned(tensor)
        else:
            result[f"transformer.h.{block}.{_renamed(inside, norms)}"] = tensor
    return result


def _split(name: str, prefix: str) -> tuple[str | None, str]:
    """Return the block's index and the rest of the name."""
    match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else (None, name)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the prefix of a name. Unknown names are kept; the reader rejects them."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _turned(tensor: Tensor) -> Tensor:
    """Transpose a matrix; a bias is unchanged."""
    return tensor.T.contiguous() if tensor.dim() == 2 else tensor.contiguous()
