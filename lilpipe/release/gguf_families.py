"""How llama.cpp stores the families of ``lilpipe.model.families``: names, fixed settings, and conversions of weights.

To add a family, add a row and a case to ``tests/release/test_gguf_file.py``, which compares it with llama.cpp.

Dimensions of weights: O outputs, I inputs, H heads, E size of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Stated = Mapping[str, Any]
"""Content of a ``config.json``, with the class's defaults for missing keys."""
Convert = Callable[[str, Tensor, Stated], Tensor]
"""Converts a tensor of this name to llama.cpp's order or values."""


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores the models of one ``model_type``."""

    name: str
    """Architecture name in GGUF."""
    convert: Convert = lambda name, tensor, stated: tensor  # noqa: ARG005
    required: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``config.json`` that llama.cpp fixes for this architecture; a function returns it for a config."""
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    windows: bool = False
    """Whether llama.cpp has sliding windows for it. Without, the context is cut to the window, where they are equal."""


def interleaved(name: str, tensor: Tensor, stated: Stated) -> Tensor:
    """Reorder the rows of queries and keys for an architecture that rotates neighbouring dimensions."""
    if not (match := re.search(r"\.([qk])_proj\.(?:weight|bias)$", name)):
        return tensor
    kind = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
    return interleave(tensor, stated.get(kind) or stated["num_attention_heads"])


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head: Hugging Face pairs dimension i with i + E / 2, llama.cpp 2 i with 2 i + 1."""
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def norms_plus_one(name: str, tensor: Tensor, stated: Stated) -> Tensor:  # noqa: ARG001
    """Add the 1 that Gemma's norms add to their weights."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def transposed(name: str, tensor: Tensor, stated: Stated) -> Tensor:  # noqa: ARG001
    """Transpose GPT-2's matrices, which are stored [I, O]."""
    return tensor.T.contiguous() if re.search(r"\.c_\w+\.weight$", name) else tensor


def parts_first(name: str, tensor: Tensor, stated: Stated) -> Tensor:
    """Reorder GPT-NeoX's rows of queries, keys and values from [H, 3, E] to [3, H, E]."""
    if ".query_key_value." not in name:
        return tensor
    return tensor.unflatten(0, (stated["num_attention_heads"], 3, -1)).swapaxes(0, 1).flatten(0, 2).contiguous()


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def stack_experts(tensors: Iterable[tuple[str, Tensor]], stated: Stated) -> Iterator[tuple[str, Tensor]]:
    """Yield the experts' matrices of a layer as one tensor [num_experts, O, I], and other tensors unchanged."""
    num_experts = stated.get("num_local_experts") or stated.get("num_experts") or 0
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        if not (match := _EXPERT.search(name)):
            yield name, tensor
            continue
        merged = name.replace(match[0], ".experts.")
        experts = waiting.setdefault(merged, {})
        experts[int(match[1])] = tensor
        if len(experts) == num_experts:
            yield merged, torch.stack([waiting[merged][number] for number in range(num_experts)])
            del waiting[merged]


def _rope_except_every_fourth(stated: Stated) -> list[int]:
    return [int((layer + 1) % 4 != 0) for layer in range(int(stated["num_hidden_layers"]))]


def _one_rope(stated: Stated) -> Any:
    """Require the same RoPE for full and for sliding attention."""
    found = stated.get("rope_parameters")
    return dict.fromkeys(found, found["full_attention"]) if found and "full_attention" in found else found


def _number(key: str, usual: float) -> Callable[[Stated], float]:
    """Require a number, of any value."""
    return lambda stated: stated.get(key) or usual


def _scalar(largest: int) -> Callable[[Stated], int]:
    """Require the scale of Gemma's queries that llama.cpp derives; it takes a model of ``largest`` layers for 27B."""
    return lambda stated: (
        stated["hidden_size"] // stated["num_attention_heads"]
        if stated["num_hidden_layers"] == largest
        else stated["head_dim"]
    )


_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_LLAMA = Family("llama", interleaved, _SILU, rope_types=("default", "linear", "yarn", "llama3"))
_DEFAULT = ("default",)

FAMILIES: Mapping[Any, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": Family(
        "smollm3",
        interleaved,
        _SILU | _NO_BIAS | _NO_WINDOW | {"no_rope_layers": _rope_except_every_fourth},
        _DEFAULT,
    ),
    "qwen2": Family("qwen2", required=_SILU | _NO_WINDOW),
    "qwen3": Family("qwen3", required=_SILU | _NO_WINDOW | _NO_BIAS),
    "qwen3_moe": Family(
        "qwen3moe",
        required=_SILU
        | _NO_WINDOW
        | _NO_BIAS
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "phi3": Family("phi3", required=_SILU | _NO_BIAS, rope_types=_DEFAULT),
    "olmo2": Family("olmo2", required=_SILU | _NO_BIAS | _UNTIED, rope_types=_DEFAULT),
    "olmo3": Family(
        "olmo2",
        required=_SILU | _NO_BIAS | _UNTIED | {"rope_parameters": _one_rope},
        rope_types=_DEFAULT,
        windows=True,
    ),
    "gemma": Family("gemma", norms_plus_one, _NO_BIAS | _TIED, _DEFAULT),
    "gemma2": Family(
        "gemma2",
        norms_plus_one,
        _NO_BIAS
        | _TIED
        | {
            "query_pre_attn_scalar": _scalar(46),
            "attn_logit_softcapping": _number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": _number("final_logit_softcapping", 30.0),
        },
        _DEFAULT,
        windows=True,
    ),
    "gemma3_text": Family(
        "gemma3",
        norms_plus_one,
        _NO_BIAS | {"query_pre_attn_scalar": _scalar(62)},
        ("default", "linear"),
        windows=True,
    ),
    "gpt2": Family("gpt2", transposed),
    "gpt_neox": Family("gptneox", parts_first, {"attention_bias": True} | _UNTIED, _DEFAULT),
}
"""Families by ``model_type``."""
