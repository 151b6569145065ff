"""What a model costs: parameters, and the operations that training takes.

Source: Chowdhery et al. 2022 (PaLM), appendix B. One multiplication with one addition counts as two operations.
"""

from __future__ import annotations

from lilpipe.config import ModelConfig


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """All weights; the output layer counts only where it has weights of its own."""
    num_tables = 1 if config.tie_embeddings else 2
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return num_tables * vocab_size * config.hidden_size + _block_matrices(config) + norms


def training_flops_per_token(config: ModelConfig, vocab_size: int, *, seq_len: int | None = None) -> int:
    """Floating-point operations per token of a forward and backward pass without recomputation: 6 N + 12 L H E T.

    N is the number of weights that a token is multiplied by: those of the blocks and of the output layer, tied or
    not; the embedding's look-up and the norms are left out. L layers, H heads of size E and T = ``seq_len`` tokens
    (``max_seq_len`` where none is given) give the attention's two products. As in PaLM, attention counts in full,
    though half of it is masked, so that utilisations can be compared.
    """
    multiplied = _block_matrices(config) + vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_size * (seq_len or config.max_seq_len)
    return 6 * multiplied + 12 * attention


def _block_matrices(config: ModelConfig) -> int:
    """Weights of the blocks' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q, o and k, v
    mlp = 3 * config.intermediate_size
    return config.num_layers * config.hidden_size * (heads * config.head_size + mlp)
