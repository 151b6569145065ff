"""Architecture of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.families import FAMILY_FIELDS, FAMILY_OPTIONS, Family
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
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token to an expert: `sigmoid` with a routing bias (DeepSeek-V3), or `softmax` over the experts
    (Mixtral, Qwen 3 MoE), which has no bias."""
    norm_topk_prob: bool = True
    """Divide the affinities of a token's experts by their sum."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Update of an expert's routing bias after each optimizer step: up if it received too few tokens, down if too
    many. Must be 0 for `softmax`."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be at most num_experts {self.num_experts}"
            )
        if self.scoring_func == "softmax" and self.bias_update_rate:
            raise ValueError(
                f"bias_update_rate {self.bias_update_rate} would be ignored: scoring_func softmax has no routing bias; "
                "set bias_update_rate to 0"
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


ROPE_KEYS = {
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
"""Settings that each kind of RoPE scaling needs."""
ROPE_OPTIONAL = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
}
"""Settings that a kind of RoPE scaling may have."""


class RopeScalingConfig(Section):
    """Scaling of RoPE's frequencies for sequences longer than those of pretraining, with transformers' names."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    """`linear`: all frequencies are divided by `factor`. `dynamic`: as without scaling up to max_seq_len. `yarn`: Peng
    et al. 2023. `llama3`: Llama 3.1."""
    factor: PositiveFloat
    """Ratio of the longest sequences to those of pretraining."""
    original_max_position_embeddings: PositiveInt | None = None
    """Length of the sequences of pretraining (`yarn`, `llama3`)."""
    low_freq_factor: PositiveFloat | None = None
    """Wavelengths above the original length divided by this are scaled by `factor` (`llama3`)."""
    high_freq_factor: PositiveFloat | None = None
    """Wavelengths below the original length divided by this are not scaled (`llama3`)."""
    attention_factor: PositiveFloat | None = None
    """Factor of the rotated queries and keys (`yarn`); if None, 0.1 ln(factor) + 1, or from `mscale`."""
    beta_fast: PositiveFloat | None = None
    """Number of rotations from which frequencies are not scaled (`yarn`); if None, 32."""
    beta_slow: PositiveFloat | None = None
    """Number of rotations up to which frequencies are scaled by `factor` (`yarn`); if None, 1."""
    mscale: PositiveFloat | None = None
    """Numerator's factor of ln(factor) in the attention factor (`yarn`, together with `mscale_all_dim`)."""
    mscale_all_dim: PositiveFloat | None = None
    """Denominator's factor of ln(factor) in the attention factor (`yarn`, together with `mscale`)."""
    truncate: bool | None = None
    """Round the bounds of the ramp between scaled and unscaled frequencies (`yarn`); if None, they are rounded."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> RopeScalingConfig:
        given = {name for name, value in self if value is not None and name != "rope_type"}
        needed = ROPE_KEYS[self.rope_type]
        if missing := sorted(needed - given):
            raise ValueError(f"{missing[0]}: missing, expected a number for rope_type {self.rope_type}")
        if unused := sorted(given - needed - ROPE_OPTIONAL.get(self.rope_type, frozenset())):
            raise ValueError(f"{unused[0]} would be ignored by rope_type {self.rope_type}; remove it")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be less than high_freq_factor {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """Decoder: one block with options. The defaults are Llama 3's (Grattafiori et al. 2024)."""

    architecture: Family = "llama"
    """Family of models, by transformers' `model_type`. It sets the defaults of the options below (see the guide), and a
    checkpoint is written as its class if that class computes the model."""
    hidden_size: PositiveInt = 256
    """Size of the hidden states."""
    num_layers: PositiveInt = 6
    """Number of decoder layers."""
    num_heads: PositiveInt = 4
    """Number of attention heads."""
    num_kv_heads: PositiveInt = 2
    """Number of key and value heads (GQA, Ainslie et al. 2023); must divide num_heads. Not used by multi-head latent
    attention."""
    head_dim: PositiveInt | None = None
    """Size of an attention head; if None, hidden_size / num_heads."""
    intermediate_size: PositiveInt = 704
    """Intermediate size of the feed-forward layer."""
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    """Activation function of the feed-forward layer; `gelu_pytorch_tanh` is GELU's tanh approximation."""
    gated_mlp: bool = True
    """Feed-forward layer with a gate (SwiGLU with `silu`, GeGLU with GELU; Shazeer 2020); otherwise two matrices."""
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    attention_out_bias: bool = False
    """Bias of attention's output projection."""
    mlp_bias: bool = False
    """Biases of the feed-forward layer."""
    max_seq_len: PositiveInt = 256
    """Maximum sequence length, in tokens."""
    position_embedding: Literal["rope", "learned"] = "rope"
    """RoPE (Su et al. 2021), or learned position embeddings (GPT-2)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base frequency of RoPE (Llama 3: 500,000)."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of RoPE's frequencies; if None, they are not scaled."""
    rope_local_theta: PositiveFloat | None = None
    """Base frequency of RoPE in layers with a sliding window, which are then not scaled (Gemma 3: 10,000); if None, as
    in the other layers."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each head that RoPE rotates, the first elements (GPT-NeoX: 0.25)."""
    nope_layers: tuple[NonNegativeInt, ...] = ()
    """Indices of layers without RoPE (SmolLM 3: every fourth)."""
    sliding_window: PositiveInt | None = None
    """Number of tokens, including itself, that a token attends to (Mistral: 4,096); if None, all before it."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """For each layer, whether it has the sliding window; if None and sliding_window is set, all have it."""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """RMSNorm, RMSNorm that multiplies by 1 + weight (Gemma), or LayerNorm with bias."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the norms."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms of the input of attention and of the feed-forward layer (`pre`), of their output before it is added to the
    residual stream (`post`, OLMo 2), or both (Gemma 2)."""
    parallel_residual: bool = False
    """Attention and feed-forward layer both read the block's input (GPT-NeoX)."""
    tie_embeddings: bool = True
    """Share the weights of the input embedding with the output layer."""
    scale_embeddings: bool = False
    """Multiply the input embeddings by the square root of hidden_size (Gemma)."""
    qk_norm: bool | Literal["projection"] = False
    """Apply RMSNorm to each query and key head before RoPE (Henry et al. 2020; Qwen 3), or to all query heads and all
    key heads together (`projection`, OLMo 2)."""
    query_pre_attn_scalar: PositiveFloat | None = None
    """Attention scores are divided by the square root of this (Gemma 2); if None, of the size of a head."""
    attn_logit_softcap: PositiveFloat | None = None
    """Soft cap of attention scores, `cap * tanh(scores / cap)` (Gemma 2: 50); if None, scores are not capped."""
    logit_softcap: PositiveFloat | None = None
    """Soft cap of the logits, `cap * tanh(logits / cap)` (Gemma 2: 30); if None, logits are not capped."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability after attention and after the feed-forward layer, in training."""
    moe: MoEConfig | None = None
    """Mixture of experts; if None, every layer is dense."""
    mla: MLAConfig | None = None
    """Multi-head latent attention; if None, grouped-query attention."""

    @model_validator(mode="before")
    @classmethod
    def _family_sets_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**FAMILY_OPTIONS.get(values.get("architecture"), {}), **values}  # type: ignore[arg-type]

    @classmethod
    def implied(cls, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of another family, if the architecture changes."""
        family = changes.get("architecture")
        if family not in FAMILY_OPTIONS or family == values.get("architecture"):
            return {}
        return {name: cls.model_fields[name].default for name in FAMILY_FIELDS} | dict(FAMILY_OPTIONS[family])

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.position_embedding == "rope" and self.rotary_size % 2:
            name = "head_dim" if self.head_dim else "hidden_size / num_heads"
            part = f" x partial_rotary_factor {self.partial_rotary_factor}" if self.partial_rotary_factor < 1 else ""
            raise ValueError(f"head size {name} = {self.head_size}{part} must be even for RoPE")
        if self.position_embedding == "rope" and self.rotary_size == 0:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} x head size {self.head_size} must be at least 2"
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

    @model_validator(mode="after")
    def _options_combine(self) -> ModelConfig:
        """Raise ``ValueError`` for options that others would ignore."""
        default = ModelConfig.model_fields
        ignored_by = {
            "position_embedding learned": self.position_embedding == "learned" and _ROPE_ONLY,
            "mla": self.mla is not None and _HEADS_ONLY,
            "moe": self.moe is not None and ("hidden_act", "gated_mlp", "mlp_bias"),
            "sliding_window null": self.sliding_window is None and ("layer_types", "rope_local_theta"),
        }
        for reason, names in ignored_by.items():
            for name in names or ():
                if getattr(self, name) != default[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} would be ignored by {reason}; remove one of them")
        if self.rope_scaling and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta {self.rope_theta} must be greater than 1 for rope_type yarn")
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError(f"norm_placement {self.norm_placement} must be pre for parallel_residual")
        return self

    @model_validator(mode="after")
    def _layers_are_named(self) -> ModelConfig:
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(f"layer_types: got {len(self.layer_types)} layers, expected num_layers {self.num_layers}")
        if self.nope_layers != tuple(sorted(set(self.nope_layers))) or max(self.nope_layers, default=0) >= max(
            self.num_layers, 1
        ):
            raise ValueError(
                f"nope_layers: got {self.nope_layers}, expected increasing numbers below num_layers {self.num_layers}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Number of elements of a head that RoPE rotates."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def first_moe_layer(self) -> int:
        """Index of the first layer with experts; num_layers if there is none."""
        return self.num_layers if self.moe is None else self.moe.first_k_dense_replace

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, in tokens; None if it attends to all tokens before."""
        full = self.layer_types is not None and self.layer_types[layer] == "full_attention"
        return None if full else self.sliding_window


_ROPE_ONLY = ("rope_scaling", "rope_local_theta", "partial_rotary_factor", "nope_layers")
_HEADS_ONLY = (
    *("head_dim", "partial_rotary_factor", "attention_bias", "attention_out_bias", "query_pre_attn_scalar"),
    *("attn_logit_softcap", "sliding_window", "nope_layers", "rope_scaling"),
)
"""Options of grouped-query attention that multi-head latent attention does not have."""


class ImportModelConfig(Section):
    """An open model as the input of a step. Set `path` or `repo_id`."""

    path: str = ""
    """Directory in Hugging Face format, or a GGUF file (extra `hf`)."""
    repo_id: str = ""
    """Repository of the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M`. Downloads need `HF_HUB_OFFLINE=0`."""
    revision: str = "main"
    """Branch, tag or commit of `repo_id`. The commit that it names is part of the fingerprint."""
    chat_template: Literal["own", "chatml"] = "own"
    """Chat template: the model's own, or `chatml` (`<|im_start|>role`, the message, `<|im_end|>`) for a base that has
    none. Its two tokens are added if the vocabulary lacks them, with the mean of the other tokens' embeddings."""

    @model_validator(mode="after")
    def _one_source(self) -> ImportModelConfig:
        if self.path and self.repo_id:
            raise ValueError(f"path {self.path} and repo_id {self.repo_id}: expected one of them; remove the other")
        if self.revision != "main" and not self.repo_id:
            raise ValueError(f"revision {self.revision} would be ignored without repo_id; remove it, or set repo_id")
        return self
