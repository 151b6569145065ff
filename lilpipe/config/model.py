"""Shape of the decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import Section


class MoEConfig(Section):
    """Mixture of experts in place of the SwiGLU layer, balanced without an auxiliary loss (DeepSeek-V3, 2024)."""

    num_experts: PositiveInt = 8
    """Experts among which a token is routed."""
    num_experts_per_tok: PositiveInt = 2
    """Experts that a token goes to."""
    n_shared_experts: NonNegativeInt = 1
    """Experts that every token goes to as well."""
    moe_intermediate_size: PositiveInt = 176
    """Width of one expert's SwiGLU layer."""
    first_k_dense_replace: NonNegativeInt = 1
    """Blocks at the bottom that keep the dense layer."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor on the sum of the routed experts (DeepSeek-V3: 2.5)."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Step of an expert's bias after each optimizer step, up where it got too few tokens, down where too many."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be at most num_experts {self.num_experts}"
            )
        return self


class MLAConfig(Section):
    """Multi-head latent attention: keys and values of all heads from one small latent (DeepSeek-V2, 2024)."""

    q_lora_rank: PositiveInt | None = None
    """Width of the queries' latent; none makes queries straight from the residual stream."""
    kv_lora_rank: PositiveInt = 64
    """Width of the latent of keys and values."""
    qk_nope_head_dim: PositiveInt = 32
    """Part of a head of queries and keys without position."""
    qk_rope_head_dim: PositiveInt = 16
    """Part of a head of queries and keys with rotary position; its key is shared by all heads."""
    v_head_dim: PositiveInt = 32
    """Width of a head of values."""

    @model_validator(mode="after")
    def _even(self) -> MLAConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even for RoPE")
        return self


class ModelConfig(Section):
    """Decoder of Llama 3 (Grattafiori et al. 2024) or of GPT-2 (Radford et al. 2019), with options of later models."""

    architecture: Literal["llama", "gpt2"] = "llama"
    """`llama`: RMSNorm, rotary positions, SwiGLU, no biases. `gpt2`: LayerNorm, learned positions, GELU, biases; it
    takes neither grouped heads nor the options below except `logit_softcap` and `dropout`."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Decoder blocks."""
    num_heads: PositiveInt = 4
    """Query heads; hidden_size is divided among them."""
    num_kv_heads: PositiveInt = 2
    """Key and value heads (GQA, Ainslie et al. 2023); divides num_heads. Multi-head latent attention has none."""
    intermediate_size: PositiveInt = 704
    """Width of the SwiGLU layer, or of GPT-2's."""
    max_seq_len: PositiveInt = 256
    """Longest sequence."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding (Llama 3: 500,000)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    qk_norm: bool = False
    """RMSNorm on each head of queries and keys, before rotation (Henry et al. 2020; Qwen 3)."""
    logit_softcap: PositiveFloat | None = None
    """Logits are bent into +- this, `cap * tanh(logits / cap)` (Gemma 2: 30)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of elements dropped after attention and after the feed-forward layer while training."""
    moe: MoEConfig | None = None
    """Mixture of experts; none is the dense layer everywhere."""
    mla: MLAConfig | None = None
    """Multi-head latent attention; none is grouped-query attention."""

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
                raise ValueError(f"gpt2: {name} would be ignored; leave it out, or take architecture llama")
        return self

    @model_validator(mode="after")
    def _options_are_used(self) -> ModelConfig:
        if self.mla and self.qk_norm:
            raise ValueError("qk_norm would be ignored: mla normalises its latents instead; leave one of them out")
        if self.moe and self.moe.first_k_dense_replace >= self.num_layers:
            raise ValueError(
                f"moe.first_k_dense_replace {self.moe.first_k_dense_replace} must be less than num_layers "
                f"{self.num_layers}: no layer would have experts"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ImportModelConfig(Section):
    """A model from elsewhere, as the input of a step here."""

    path: str = ""
    """Directory in Hugging Face's layout: Llama, Qwen 3, GPT-2, or a small GLM-4.5 or DeepSeek-V3."""
