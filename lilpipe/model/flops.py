"""Number of parameters and FLOPs of a model.

Source: Chowdhery et al. 2022 (PaLM), appendix B. A multiply-add counts as two operations. Shapes are those of the
decoder in ``lilpipe.model`` with all its options.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from lilpipe.config.backend import BackendConfig
from lilpipe.config.lora import LoRAConfig, Projection
from lilpipe.config.model import ModelConfig, MoEConfig

Recomputed = Literal["none", "selective", "full"]


class Shape(NamedTuple):
    """Shape of a weight matrix."""

    inputs: int
    outputs: int


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of all parameters; a tied output layer adds none."""
    if isinstance(config, BackendConfig):
        return config.num_parameters
    blocks = sum(block_parameters(config, layer) for layer in range(config.num_layers))
    return embedding_parameters(config, vocab_size) + blocks + head_parameters(config, vocab_size)


def num_active_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters used per token: without the routed experts that a token is not sent to.

    The experts of a class of transformers are not known, so all count.
    """
    if isinstance(config, BackendConfig):
        return config.num_parameters
    blocks = sum(block_parameters(config, layer, active=True) for layer in range(config.num_layers))
    return embedding_parameters(config, vocab_size) + blocks + head_parameters(config, vocab_size)


def embedding_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the parameters of the token embedding and of a learned position embedding."""
    num_positions = config.max_seq_len if config.position_embedding == "learned" else 0
    return (vocab_size + num_positions) * config.hidden_size


def head_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the parameters of the final norm and of an output layer that is not tied."""
    return _norm(config) + (0 if config.tie_embeddings else vocab_size * config.hidden_size)


def block_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """Return the parameters of one block; with ``active``, only as many routed experts as a token uses."""
    norms = (4 if config.norm_placement == "both" else 2) * _norm(config) + _attention_norms(config)
    return _size(block_matrices(config, layer, active=active)) + _biases(config, layer) + norms


def _biases(config: ModelConfig, layer: int) -> int:
    """Return the number of biases of one block."""
    attention = config.attention_bias * (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    attention += config.attention_out_bias * config.hidden_size
    if not config.mlp_bias or layer >= config.first_moe_layer:
        return attention
    return attention + (1 + config.gated_mlp) * config.intermediate_size + config.hidden_size


def adapter_parameters(config: ModelConfig, lora: LoRAConfig) -> int:
    """Return the parameters of the adapters of one dense block."""
    matrices = zip(get_args(Projection), block_matrices(config, 0), strict=False)
    adapted = [matrix for name, matrix in matrices if name in lora.projections]
    return sum(lora.r * (m.inputs + m.outputs) + (m.outputs if lora.use_dora else 0) for m in adapted)


def block_matrices(config: ModelConfig, layer: int, *, active: bool = False) -> list[Shape]:
    """Return the matrices of one block; ``active`` as in ``block_parameters``."""
    if config.moe is None or layer < config.first_moe_layer:
        return attention_matrices(config) + _dense_matrices(config)
    return attention_matrices(config) + _moe_matrices(config.hidden_size, config.moe, active=active)


def training_flops_per_token(
    config: ModelConfig, vocab_size: int, *, seq_len: int | None = None, recomputed: Recomputed = "none"
) -> int:
    """Return FLOPs per token of a forward and a backward pass; the backward pass costs twice the forward.

    For dense attention this is PaLM's 6 N + 12 L H E T, where N is the number of weights that a token is multiplied by.
    ``recomputed`` adds the recomputation of activation checkpointing: `full` repeats the forward pass of the blocks,
    `selective` no matrix product. MFU excludes it by convention; HFU includes it.
    """
    forward = forward_flops_per_token(config, vocab_size, seq_len=seq_len)
    head = 2 * vocab_size * config.hidden_size
    return 3 * forward + (forward - head if recomputed == "full" else 0)


def forward_flops_per_token(config: ModelConfig, vocab_size: int, *, seq_len: int | None = None) -> int:
    """Return FLOPs per token of a forward pass over rows of ``seq_len`` (default ``max_seq_len``) tokens.

    Each weight that a token is multiplied by costs 2, including the output layer, tied or not. Attention's two products
    cost 2 H T (width of a key + width of a value) in each layer, with T at most its sliding window. Lookups, norms,
    biases and elementwise operations are excluded. As in PaLM, attention is counted without the causal mask, so that
    utilizations are comparable. For a class of transformers it is 2 for each parameter.
    """
    if isinstance(config, BackendConfig):
        return 2 * config.num_parameters
    blocks = sum(_size(block_matrices(config, layer, active=True)) for layer in range(config.num_layers))
    key, value = head_widths(config)
    num_tokens = seq_len or config.max_seq_len
    seen = sum(min(num_tokens, config.window(layer) or num_tokens) for layer in range(config.num_layers))
    attention = config.num_heads * (key + value) * seen
    return 2 * (blocks + vocab_size * config.hidden_size + attention)


def head_widths(config: ModelConfig) -> tuple[int, int]:
    """Return the width of one head of queries and keys, and of one head of values."""
    if config.mla is None:
        return config.head_size, config.head_size
    return config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim, config.mla.v_head_dim


def attention_matrices(config: ModelConfig) -> list[Shape]:
    """Return attention's matrices in the order of computation."""
    width, heads = config.hidden_size, config.num_heads
    key, value = head_widths(config)
    output = Shape(heads * value, width)
    if (mla := config.mla) is None:
        kv = Shape(width, config.num_kv_heads * config.head_size)
        return [Shape(width, heads * key), kv, kv, output]
    queries = [Shape(width, heads * key)]
    if mla.q_lora_rank is not None:
        queries = [Shape(width, mla.q_lora_rank), Shape(mla.q_lora_rank, heads * key)]
    latent = Shape(width, mla.kv_lora_rank + mla.qk_rope_head_dim)
    return [*queries, latent, Shape(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + value)), output]


def _dense_matrices(config: ModelConfig) -> list[Shape]:
    if not config.gated_mlp:
        return [
            Shape(config.hidden_size, config.intermediate_size),
            Shape(config.intermediate_size, config.hidden_size),
        ]
    return _swiglu(config.hidden_size, config.intermediate_size)


def _moe_matrices(width: int, moe: MoEConfig, *, active: bool) -> list[Shape]:
    """Return matrices of the router, the routed experts and the shared experts (one wide expert)."""
    routed = (moe.num_experts_per_tok if active else moe.num_experts) * _swiglu(width, moe.moe_intermediate_size)
    shared = _swiglu(width, moe.n_shared_experts * moe.moe_intermediate_size) if moe.n_shared_experts else []
    return [Shape(width, moe.num_experts), *routed, *shared]


def _swiglu(width: int, inner: int) -> list[Shape]:
    return [Shape(width, inner), Shape(width, inner), Shape(inner, width)]


def _norm(config: ModelConfig) -> int:
    """RMSNorm has a weight, LayerNorm a weight and a bias."""
    return (2 if config.norm == "layer" else 1) * config.hidden_size


def _attention_norms(config: ModelConfig) -> int:
    """Return parameters of the norms inside attention: MLA's latent norms, or the QK norms."""
    if config.mla is not None:
        return (config.mla.q_lora_rank or 0) + config.mla.kv_lora_rank
    if config.qk_norm == "projection":
        return (config.num_heads + config.num_kv_heads) * config.head_size
    return 2 * config.head_size if config.qk_norm else 0


def _size(matrices: Iterable[Shape]) -> int:
    return sum(matrix.inputs * matrix.outputs for matrix in matrices)
