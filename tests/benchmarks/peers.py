"""transformers' Llama in the shape of a model of ours."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from lilpipe.config.model import ModelConfig


def llama(shape: ModelConfig, vocab_size: int, *, attention: str = "sdpa", **settings: Any) -> LlamaForCausalLM:
    """A model with weights of its own; ``settings`` are further ones of its configuration."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        **settings,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config)
