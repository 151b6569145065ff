"""A small vocabulary and small models for tests."""

import torch

from lilpipe.config import ModelConfig
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer

PATTERN = r" ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]+|\s+"

SMALL = ModelConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=64, rope_theta=500.0
)


def small_tokenizer():
    """The 256 bytes, a few merges and the special tokens."""
    merges = [b"th", b"the", b" a", b"in", b"ing", b" th"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    return Tokenizer(ranks, PATTERN)


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
    return model.eval()
