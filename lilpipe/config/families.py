"""Families of decoders, as options of ``ModelConfig``: what differs from Llama in all models of a family.

Names are transformers' ``model_type``. Sizes, RoPE bases, windows and caps are settings of each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "smollm3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "glm4_moe",
    "deepseek_v3",
]

_GEMMA: Mapping[str, Any] = {"norm": "rms_plus_one", "hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True}
_GPT: Mapping[str, Any] = {
    "norm": "layer",
    "gated_mlp": False,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}

FAMILY_OPTIONS: Mapping[Any, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "norm_placement": "both"},
    "gemma3_text": {**_GEMMA, "norm_placement": "both", "qk_norm": True},
    "olmo2": {"norm_placement": "post", "qk_norm": "projection"},
    "olmo3": {"norm_placement": "post", "qk_norm": "projection"},
    "smollm3": {},
    "phi3": {},
    "gpt2": {**_GPT, "hidden_act": "gelu_pytorch_tanh", "position_embedding": "learned"},
    "gpt_neox": {**_GPT, "hidden_act": "gelu", "parallel_residual": True},
    "mixtral": {},
    "qwen3_moe": {"qk_norm": True},
    "glm4_moe": {},
    "deepseek_v3": {},
}
"""Options of each family; those not named have their defaults."""

FAMILY_FIELDS = frozenset(name for options in FAMILY_OPTIONS.values() for name in options)
"""Options that some family sets."""
