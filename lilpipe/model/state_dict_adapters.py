"""Conversion between our config and tensor names and those of Hugging Face's architectures.

Each ``StateDictAdapter`` represents a class of ``transformers`` that computes the same as our decoder with certain
settings. Models that no class computes, for example with logit softcapping, use a layout that only this package reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lilpipe.config.model import MLAConfig, ModelConfig, MoEConfig
from lilpipe.model import gpt2, mla, moe

Stated = Mapping[str, Any]
"""Content of a ``config.json``."""
Tensors = dict[str, Tensor]
"""Tensors of one layer, or those outside the layers."""


class StateDictAdapter:
    """Adapter for one class of ``transformers``: supported models, and conversion of config and tensors."""

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]] = {}
    """Our settings to theirs."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Required values of their settings."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the class for keys missing in ``config.json``. Fixed keys without a default may be missing."""

    def computes(self, config: ModelConfig) -> bool:
        """Return whether the class computes the same as a decoder with this config."""
        raise NotImplementedError

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the class's keys of ``config.json``."""
        return {**self.fixed, **{theirs: getattr(config, ours) for ours, theirs in self.keys.items()}}

    def read(self, stated: Stated) -> dict[str, Any]:
        """Return the values of a ``ModelConfig``. Raises ``ValueError`` naming a missing or unsupported key."""
        for key, expected in self.fixed.items():
            if (got := stated.get(key, self.defaults.get(key, expected))) != expected:
                raise ValueError(f"{key}: got {got!r}, expected {expected!r}")
        return self.values(stated, self.keys)

    def values(self, stated: Stated, keys: Mapping[str, str]) -> dict[str, Any]:
        """Return the values of ``keys``, by our names."""
        stated = {**self.defaults, **stated}
        if missing := [theirs for theirs in keys.values() if theirs not in stated]:
            raise ValueError(f"{missing[0]}: missing")
        return {ours: stated[theirs] for ours, theirs in keys.items()}

    def from_hf(self, tensors: Tensors, config: ModelConfig, stated: Stated) -> Tensors:  # noqa: ARG002
        """Rename and convert tensors from the files to the decoder's."""
        return tensors

    def to_hf(self, tensors: Tensors) -> Tensors:
        """Invert ``from_hf``."""
        return tensors


class Llama(StateDictAdapter):
    """Llama (Touvron et al. 2023, Grattafiori et al. 2024). Files of Llama 1 and 2 omit some settings."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    keys: ClassVar = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    }
    fixed: ClassVar = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    defaults: ClassVar = {"tie_word_embeddings": False, "rope_theta": 10_000.0, "head_dim": None}

    def computes(self, config: ModelConfig) -> bool:
        """Dense decoders without options."""
        return _is_dense(config) and not config.qk_norm

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the RoPE base twice: for transformers before version 5, and since."""
        return {
            **super().write(config),
            "head_dim": config.head_size,
            "attention_dropout": 0.0,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            # Read by later stages only; transformers has no such dropout.
            **({"dropout": config.dropout} if config.dropout else {}),
        }

    def read(self, stated: Stated) -> dict[str, Any]:
        """Raise ``ValueError`` for RoPE scaling (Llama 3.1 and later) or if head_dim is not hidden_size / num_heads."""
        stated = {"num_key_value_heads": stated.get("num_attention_heads"), **self.defaults, **stated}
        values = super().read(stated)
        rope = stated.get("rope_parameters") or {}
        scaling = stated.get("rope_scaling") or rope
        if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
            raise ValueError(f"rope_type: got {kind!r}, expected 'default'; RoPE scaling is not supported")
        self.check_heads(stated, values)
        theta = rope.get("rope_theta", stated["rope_theta"])
        return {**values, "rope_theta": theta, "dropout": stated.get("dropout", 0.0)}

    def check_heads(self, stated: Stated, values: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for an unsupported head size."""
        expected = values["hidden_size"] // values["num_heads"]
        if stated["head_dim"] not in (None, expected):
            raise ValueError(f"head_dim: got {stated['head_dim']}, expected {expected}")


class Qwen3(Llama):
    """Llama with RMSNorm on queries and keys (Yang et al. 2025)."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    fixed: ClassVar = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    defaults: ClassVar = {**Llama.defaults, "head_dim": 128}

    def computes(self, config: ModelConfig) -> bool:
        """Dense decoders with ``qk_norm``."""
        return _is_dense(config) and config.qk_norm

    def read(self, stated: Stated) -> dict[str, Any]:
        """As in Llama."""
        return {**super().read(stated), "qk_norm": True}


class GPT2(StateDictAdapter):
    """GPT-2 (Radford et al. 2019)."""

    model_type = "gpt2"
    class_name = "GPT2LMHeadModel"
    keys: ClassVar = {
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "num_kv_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
    }
    fixed: ClassVar = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    defaults: ClassVar = {"tie_word_embeddings": True, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5}

    def computes(self, config: ModelConfig) -> bool:
        """GPT-2 without options."""
        return config.architecture == "gpt2" and config.logit_softcap is None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Dropout applies only to the outputs of attention and feed-forward layers."""
        return {**super().write(config), "attn_pdrop": 0.0, "embd_pdrop": 0.0}

    def read(self, stated: Stated) -> dict[str, Any]:
        """The default of ``n_inner`` is 4 * ``n_embd``."""
        inner = stated.get("n_inner") or 4 * stated.get("n_embd", 0)
        return {**super().read({**stated, "n_inner": inner}), "architecture": "gpt2"}

    def from_hf(self, tensors: Tensors, config: ModelConfig, stated: Stated) -> Tensors:  # noqa: ARG002
        """Split the fused matrix of queries, keys and values."""
        return gpt2.from_huggingface(tensors)

    def to_hf(self, tensors: Tensors) -> Tensors:
        """Invert ``from_hf``."""
        return gpt2.to_huggingface(tensors)


class Glm4Moe(Llama):
    """DeepSeek-V3's mixture of experts with grouped-query attention (GLM-4.5 Team 2025)."""

    model_type = "glm4_moe"
    class_name = "Glm4MoeForCausalLM"
    fixed: ClassVar = {
        "hidden_act": "silu",
        "attention_bias": False,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": 1.0,
    }
    defaults: ClassVar = {**Llama.defaults, "head_dim": 128, "partial_rotary_factor": 0.5}
    moe_keys: ClassVar[Mapping[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "n_shared_experts": "n_shared_experts",
        "moe_intermediate_size": "moe_intermediate_size",
        "first_k_dense_replace": "first_k_dense_replace",
        "routed_scaling_factor": "routed_scaling_factor",
    }

    def computes(self, config: ModelConfig) -> bool:
        """Mixture of experts with a shared expert and grouped-query attention."""
        return config.mla is None and config.moe is not None and _is_plain_moe(config)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Without a mixture of experts (possible with MLA), ``first_k_dense_replace`` covers all blocks."""
        experts = config.moe or MoEConfig(first_k_dense_replace=config.num_layers)
        stated = super().write(config) | {theirs: getattr(experts, ours) for ours, theirs in self.moe_keys.items()}
        stated["rope_parameters"]["partial_rotary_factor"] = 1.0
        if config.moe is not None:
            stated["bias_update_rate"] = config.moe.bias_update_rate  # read by later stages only
        return {**stated, "use_qk_norm": config.qk_norm, "num_nextn_predict_layers": 0}

    def read(self, stated: Stated) -> dict[str, Any]:
        """If all blocks are dense, ``moe`` is None."""
        values = super().read({**(stated.get("rope_parameters") or {}), **stated})
        experts = self.values(stated, self.moe_keys)
        if "bias_update_rate" in stated:
            experts["bias_update_rate"] = stated["bias_update_rate"]
        mixes = experts["first_k_dense_replace"] < values["num_layers"]
        return {**values, "moe": experts if mixes else None, "qk_norm": stated.get("use_qk_norm", False)}

    def from_hf(self, tensors: Tensors, config: ModelConfig, stated: Stated) -> Tensors:  # noqa: ARG002
        """Stack the experts' matrices."""
        return moe.from_huggingface(tensors)

    def to_hf(self, tensors: Tensors) -> Tensors:
        """Invert ``from_hf``."""
        return moe.to_huggingface(tensors)


class DeepseekV3(Glm4Moe):
    """Multi-head latent attention (DeepSeek-V2, 2024), optionally with a mixture of experts (DeepSeek-V3, 2024)."""

    model_type = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"
    fixed: ClassVar = {name: value for name, value in Glm4Moe.fixed.items() if name != "partial_rotary_factor"}
    defaults: ClassVar = {**Llama.defaults, "n_group": 8, "topk_group": 4}
    mla_keys: ClassVar[Mapping[str, str]] = {name: name for name in MLAConfig.model_fields}

    def computes(self, config: ModelConfig) -> bool:
        """Multi-head latent attention; a mixture of experts must have a shared expert."""
        return config.mla is not None and _is_plain_moe(config)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """MLA has no ``head_dim``. RoPE pairs halves as everywhere here, unlike DeepSeek's own files."""
        assert config.mla is not None
        stated = super().write(config) | {theirs: getattr(config.mla, ours) for ours, theirs in self.mla_keys.items()}
        for key in ("head_dim", "use_qk_norm"):
            del stated[key]
        return {**stated, "num_key_value_heads": config.num_heads, "rope_interleave": False}

    def read(self, stated: Stated) -> dict[str, Any]:
        """Also reads the settings of MLA."""
        return {**super().read(stated), "mla": self.values(stated, self.mla_keys)}

    def check_heads(self, stated: Stated, values: Mapping[str, Any]) -> None:
        """MLA's config states its own head sizes."""

    def from_hf(self, tensors: Tensors, config: ModelConfig, stated: Stated) -> Tensors:
        """Reorder the RoPE rows if the file's pairs are interleaved."""
        tensors = super().from_hf(tensors, config, stated)
        return mla.from_interleaved(tensors, config) if stated.get("rope_interleave", True) else tensors


class Lilpipe(StateDictAdapter):
    """Models that no class of ``transformers`` computes, with the decoder's own names."""

    model_type = "lilpipe"
    class_name = "Transformer"

    def computes(self, config: ModelConfig) -> bool:  # noqa: ARG002
        """All models."""
        return True

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the config as it is."""
        return {"model": config.model_dump(mode="json")}

    def read(self, stated: Stated) -> dict[str, Any]:
        """Read the config as it is."""
        if not isinstance(stated.get("model"), dict):
            raise ValueError("model: missing")
        return stated["model"]


LAYOUTS: tuple[StateDictAdapter, ...] = (Llama(), Qwen3(), GPT2(), DeepseekV3(), Glm4Moe(), Lilpipe())
"""In order of preference: the first that computes a model is used."""


def adapter_for(config: ModelConfig) -> StateDictAdapter:
    """Return the adapter for a model with this config."""
    return next(layout for layout in LAYOUTS if layout.computes(config))


def _is_dense(config: ModelConfig) -> bool:
    """Return whether a decoder is Llama, with or without ``qk_norm``."""
    plain = config.architecture == "llama" and config.logit_softcap is None
    return plain and config.moe is None and config.mla is None


def _is_plain_moe(config: ModelConfig) -> bool:
    """Return whether transformers supports the mixture of experts: several routed experts and a shared one."""
    experts = config.moe
    counted = experts is None or (experts.num_experts > 1 and experts.n_shared_experts > 0)
    return config.logit_softcap is None and counted
