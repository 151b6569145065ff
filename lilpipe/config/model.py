"""Architecture of the decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import Section


class MoEConfig(Section):
    """Mixture of experts instead of the dense SwiGLU layer, load-balanced without an auxiliary loss (DeepSeek-V3,
    2024).
    """

    num_experts: PositiveInt = 8
    """Number of routed experts."""
    num_experts_per_tok: PositiveInt = 2
    """Routed experts per token (top-k)."""
    n_shared_experts: NonNegativeInt = 1
    """Shared experts, which process every token."""
    moe_intermediate_size: PositiveInt = 176
    """Intermediate size of each expert's SwiGLU layer."""
    first_k_dense_replace: NonNegativeInt = 1
    """Number of first layers that keep the dense SwiGLU layer."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Scaling factor of the routed experts' output (DeepSeek-V3: 2.5)."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Update of an expert's routing bias after each optimizer step: up if it received too few tokens, down if too
    many."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be at most num_experts {self.num_experts}"
            )
        return self


class MLAConfig(Section):
    """Multi-head latent attention: keys and values of all heads are projected from one small latent (DeepSeek-V2,
    2024).
    """

    q_lora_rank: PositiveInt | None = None
    """Size of the query latent; if None, queries are projected from the hidden states directly."""
    kv_lora_rank: PositiveInt = 64
    """Size of the latent of keys and values."""
    qk_nope_head_dim: PositiveInt = 32
    """Size of the part of each query and key head without position embedding."""
    qk_rope_head_dim: PositiveInt = 16
    """Size of the part of each query and key head with RoPE; all heads share this part of the key."""
    v_head_dim: PositiveInt = 32
    """Size of each value head."""

    @model_validator(mode="after")
    def _even(self) -> MLAConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even for RoPE")
        return self


class ModelConfig(Section):
    """Decoder of Llama 3 (Grattafiori et al. 2024) or GPT-2 (Radford et al. 2019), with options of later models."""

    architecture: Literal["llama", "gpt2"] = "llama"
    """`llama`: RMSNorm, RoPE, SwiGLU, no biases. `gpt2`: LayerNorm, learned position embeddings, GELU, biases; of the
    options below it supports only `logit_softcap` and `dropout`, and no grouped-query attention."""
    hidden_size: PositiveInt = 256
    """Size of the hidden states."""
    num_layers: PositiveInt = 6
    """Number of decoder layers."""
    num_heads: PositiveInt = 4
    """Number of attention heads; the size of a head is hidden_size / num_heads."""
    num_kv_heads: PositiveInt = 2
    """Number of key and value heads (GQA, Ainslie et al. 2023); must divide num_heads. Not used by multi-head latent
    attention."""
    intermediate_size: PositiveInt = 704
    """Intermediate size of the feed-forward layer (SwiGLU, or GPT-2's MLP)."""
    max_seq_len: PositiveInt = 256
    """Maximum sequence length, in tokens."""
    rope_theta: PositiveFloat = 10_000.0
    """Base frequency of RoPE (Llama 3: 500,000)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Share the weights of the input embedding with the output layer."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head before RoPE (Henry et al. 2020; Qwen 3)."""
    logit_softcap: PositiveFloat | None = None
    """Soft cap of the logits, `cap * tanh(logits / cap)` (Gemma 2: 30); if None, logits are not capped."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability after attention and after the feed-forward layer, in training."""
    moe: MoEConfig | None = None
    """Mixture of experts; if None, every layer is dense."""
    mla: MLAConfig | None = None
    """Multi-head latent attention; if None, grouped-query attention."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.architecture == "llama" and self.head_size % 2:
            raise ValueError(
                f"head size hidden_size / num_heads = {self.hidden_size // self.num_heads} must be even for RoPE"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @model_validator(mode="after")
    def _gpt2_is_plain(self) -> ModelConfig:
        if self.architecture != "gpt2":
            return self
        if self.num_kv_heads != self.num_heads:
            raise ValueError(f"gpt2: num_kv_heads {self.num_kv_heads} must equal num_heads {self.num_heads}")
        for name in ("moe", "mla", "qk_norm"):
            if getattr(self, name):
                raise ValueError(f"gpt2: {name} would be ignored; remove it, or set architecture to llama")
        return self

    @model_validator(mode="after")
    def _options_are_used(self) -> ModelConfig:
        if self.mla and self.qk_norm:
            raise ValueError("qk_norm would be ignored: mla normalises its latents instead; remove qk_norm or mla")
        if self.moe and self.moe.first_k_dense_replace >= self.num_layers:
            raise ValueError(
                f"moe.first_k_dense_replace {self.moe.first_k_dense_replace} must be less than num_layers "
                f"{self.num_layers}: no layer would have experts"
            )
        return self

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads


class ImportModelConfig(Section):
    """A Hugging Face model as the input of a step."""

    path: str = ""
    """Directory in Hugging Face format: Llama, Qwen 3, GPT-2, or a small GLM-4.5 or DeepSeek-V3 model."""
