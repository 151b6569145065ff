"""Table of the families that the decoder computes: for each, its class in ``transformers`` and its keys.

The options that a family's models share are in ``lilpipe.config.families``. To add a family, add a row to both tables
and a case to ``tests/model/test_families.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.model import fused_weights as fused
from lilpipe.model import gpt2, mla
from lilpipe.model.family import Family, Stated
from lilpipe.model.family_parts import (
    Activation,
    DenseLayers,
    Experts,
    HeadDim,
    InnerSize,
    Latents,
    LayerWindows,
    QueryScalar,
    Window,
    every,
    nope_windows,
    qwen_windows,
)
from lilpipe.model.family_positions import NopeLayers, Rope, RopeByLayerType

LLAMA_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
BIASES = {"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"}
GEMMA_KEYS = LLAMA_KEYS | BIASES
CAPS = {"attn_logit_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
TIED = UNTIED | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
NO_BIAS = {"attention_bias": False}
NO_DROPOUT = {"attention_dropout": 0.0}
CAUSAL = {"use_bidirectional_attention": False}
SOFTMAX = {"scoring_func": "softmax", "n_shared_experts": 0, "bias_update_rate": 0.0}
SIGMOID_KEYS = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor",
}
SIGMOID = {"hidden_act": "silu", "n_group": 1, "topk_group": 1, "norm_topk_prob": True}


def _gpt2_from_hf(tensors: dict[str, Tensor], config: ModelConfig, stated: Stated) -> dict[str, Tensor]:  # noqa: ARG001
    return gpt2.from_huggingface(tensors)


def _gpt2_to_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:  # noqa: ARG001
    return gpt2.to_huggingface(tensors)


def _deepseek_from_hf(tensors: dict[str, Tensor], config: ModelConfig, stated: Stated) -> dict[str, Tensor]:
    """Stack the experts, and reorder the RoPE rows if the file's pairs are interleaved."""
    tensors = fused.experts_from_hf(tensors, config, stated)
    return mla.from_interleaved(tensors, config) if stated.get("rope_interleave", True) else tensors


def _has_shared_expert(config: ModelConfig) -> bool:
    """Return whether transformers supports the mixture of experts: several routed experts and a shared one."""
    experts = config.moe
    return experts is None or (experts.num_experts > 1 and experts.n_shared_experts > 0)


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        keys=LLAMA_KEYS | BIASES | {"mlp_bias": "mlp_bias"},
        parts=(Activation(), HeadDim(), Rope()),
        constants=NO_DROPOUT,
        defaults=UNTIED | NO_BIAS | {"mlp_bias": False},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        keys=LLAMA_KEYS,
        parts=(Activation(), HeadDim(), Rope(), Window()),
        defaults=UNTIED | {"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        keys=LLAMA_KEYS,
        parts=(Activation(), HeadDim(always=False), Rope(), LayerWindows(qwen_windows, switch="use_sliding_window")),
        defaults=UNTIED | {"sliding_window": 4096},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        keys=LLAMA_KEYS | BIASES,
        parts=(Activation(), HeadDim(), Rope(), LayerWindows(qwen_windows, switch="use_sliding_window")),
        constants=NO_DROPOUT,
        defaults=UNTIED | NO_BIAS | {"head_dim": 128, "sliding_window": 4096},
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        keys=GEMMA_KEYS,
        # Google's first files say gelu and mean its tanh approximation.
        parts=(Activation(names=dict.fromkeys(("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")), HeadDim(), Rope()),
        expected=CAUSAL,
        defaults=TIED | NO_BIAS | {"hidden_act": "gelu_pytorch_tanh"},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        keys=GEMMA_KEYS | CAPS,
        parts=(Activation("hidden_activation"), HeadDim(), QueryScalar(), Rope(), LayerWindows(every(2))),
        expected=CAUSAL,
        defaults=TIED
        | NO_BIAS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"sliding_window": 4096, "query_pre_attn_scalar": 256},
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        keys=GEMMA_KEYS | {"logit_softcap": "final_logit_softcapping"},
        parts=(
            *(Activation("hidden_activation"), HeadDim(), QueryScalar()),
            LayerWindows(every(6, "sliding_window_pattern")),
            RopeByLayerType(1_000_000.0, 10_000.0, "rope_local_base_freq"),
        ),
        expected=CAUSAL | {"attn_logit_softcapping": None},
        defaults=TIED
        | NO_BIAS
        | {"final_logit_softcapping": None, "sliding_window": 4096, "query_pre_attn_scalar": 256},
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        keys=LLAMA_KEYS | BIASES,
        parts=(Activation(), HeadDim(always=False), Rope()),
        defaults=UNTIED | NO_BIAS | {"rms_norm_eps": 1e-5},
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        keys=LLAMA_KEYS | BIASES,
        parts=(
            *(Activation(), HeadDim(always=False), LayerWindows(every(4))),
            RopeByLayerType(500_000.0, 500_000.0, "rope_theta"),
        ),
        defaults=UNTIED | NO_BIAS | {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        keys=LLAMA_KEYS | BIASES | {"mlp_bias": "mlp_bias"},
        parts=(
            *(Activation(), HeadDim(always=False), NopeLayers(), Rope(2_000_000.0)),
            LayerWindows(nope_windows, switch="use_sliding_window"),
        ),
        defaults=TIED | NO_BIAS | {"mlp_bias": False, "num_key_value_heads": 4, "head_dim": None},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        keys=LLAMA_KEYS | {"dropout": "resid_pdrop"},
        # Its only scaling, longrope, changes the frequencies of all positions with the length of the sequence.
        parts=(Activation(), HeadDim(always=False), Rope(partial=1.0, scales=False), Window()),
        expected=NO_BIAS,
        defaults=UNTIED | {"rms_norm_eps": 1e-5, "resid_pdrop": 0.0, "sliding_window": None},
        from_hf=fused.phi3_from_hf,
        to_hf=fused.phi3_to_hf,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        keys={
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "num_kv_heads": "n_head",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "resid_pdrop",
        },
        parts=(InnerSize(),),
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        constants={"attn_pdrop": 0.0, "embd_pdrop": 0.0},
        defaults={"tie_word_embeddings": True, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5},
        from_hf=_gpt2_from_hf,
        to_hf=_gpt2_to_hf,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        keys=LLAMA_KEYS
        | BIASES
        | {"num_kv_heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "dropout": "hidden_dropout"}
        | {"parallel_residual": "use_parallel_residual"},
        parts=(Activation(), Rope(theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct")),
        defaults={"tie_word_embeddings": False, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
        | {"attention_bias": True, "hidden_dropout": 0.0, "use_parallel_residual": True},
        from_hf=fused.gpt_neox_from_hf,
        to_hf=fused.gpt_neox_to_hf,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        keys=LLAMA_KEYS,
        parts=(
            *(HeadDim(always=False), Rope(1_000_000.0), Window()),
            Experts(
                {
                    "num_experts": "num_local_experts",
                    "num_experts_per_tok": "num_experts_per_tok",
                    "moe_intermediate_size": "intermediate_size",
                },
                SOFTMAX | {"first_k_dense_replace": 0},
            ),
        ),
        fixed={"hidden_act": "silu"},
        defaults=UNTIED
        | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"sliding_window": None, "num_key_value_heads": 8},
        from_hf=fused.mixtral_from_hf,
        to_hf=fused.mixtral_to_hf,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        keys=LLAMA_KEYS | BIASES,
        parts=(
            *(HeadDim(always=False), Rope(), Window("use_sliding_window")),
            Experts(
                {
                    "num_experts": "num_experts",
                    "num_experts_per_tok": "num_experts_per_tok",
                    "moe_intermediate_size": "moe_intermediate_size",
                    "norm_topk_prob": "norm_topk_prob",
                },
                SOFTMAX | {"first_k_dense_replace": 0},
                renamed={"num_experts": "num_local_experts"},
            ),
            DenseLayers(),
        ),
        fixed={"hidden_act": "silu", "decoder_sparse_step": 1},
        defaults=UNTIED
        | NO_BIAS
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}
        | {"sliding_window": 4096, "num_key_value_heads": 4},
        from_hf=fused.experts_from_hf,
        to_hf=fused.experts_to_hf,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        keys=LLAMA_KEYS,
        parts=(Rope(), Experts(SIGMOID_KEYS, trained_bias=True), Latents()),
        fixed=SIGMOID | NO_BIAS,
        constants=NO_DROPOUT | {"num_nextn_predict_layers": 0},
        defaults=UNTIED | {"n_group": 8, "topk_group": 4},
        from_hf=_deepseek_from_hf,
        to_hf=fused.experts_to_hf,
        accepts=_has_shared_expert,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        keys=LLAMA_KEYS | {"qk_norm": "use_qk_norm", "attention_bias": "attention_bias"},
        parts=(HeadDim(), Rope(partial=0.5), Experts(SIGMOID_KEYS, trained_bias=True)),
        fixed=SIGMOID,
        constants=NO_DROPOUT | {"num_nextn_predict_layers": 0},
        defaults=UNTIED | NO_BIAS | {"head_dim": 128, "use_qk_norm": False},
        from_hf=fused.experts_from_hf,
        to_hf=fused.experts_to_hf,
        accepts=_has_shared_expert,
    ),
)
"""In order of preference, after the family that ``architecture`` names: the first that computes a model is used."""
