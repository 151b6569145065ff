"""A small vocabulary and small models for tests."""

import torch

from lilpipe.config.model import MLAConfig, ModelConfig, MoEConfig
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.model.options import of_family

PATTERN = r" ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]+|\s+"

SMALL = ModelConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=64, rope_theta=500.0
)

MOE = MoEConfig(
    num_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24, routed_scaling_factor=1.5
)
MLA = MLAConfig(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
ARCHITECTURES = {
    "Llama with grouped heads, tied": {},
    "Llama with one key/value head": {"num_kv_heads": 1},
    "Llama with a key/value head for each query head": {"num_kv_heads": 4},
    "Llama not tied": {"tie_embeddings": False},
    "Qwen 3": {"qk_norm": True},
    "GPT-2": {**of_family("gpt2"), "num_kv_heads": 4, "intermediate_size": 80},
    "GPT-2 not tied": {**of_family("gpt2"), "num_kv_heads": 4, "tie_embeddings": False},
    "GLM-4.5": {"moe": MOE},
    "GLM-4.5 with norms on queries and keys": {"moe": MOE, "qk_norm": True, "tie_embeddings": False},
    "DeepSeek-V3": {"moe": MOE, "mla": MLA, "tie_embeddings": False},
    "DeepSeek-V2 without a latent of queries": {"mla": MLA.model_copy(update={"q_lora_rank": None})},
}
"""What the decoder shares with a class of transformers, as changes to ``SMALL``."""


def small_tokenizer():
    """The 256 bytes, a few merges and the special tokens."""
    merges = [b"th", b"the", b" a", b"in", b"ing", b" th"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    return BytePairTokenizer(ranks, PATTERN)


def small_model(config=SMALL, *, vocab_size=None, seed=0, scale=8.0):
    """A model with weights so large that its logits spread and a wrong layout shows."""
    model = Transformer(config, vocab_size or small_tokenizer().vocab_size)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms other than 1, so that a norm that is left out shows
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()
