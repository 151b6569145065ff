"""Basic layers of a transformer block.

All have constant initial weights. ``init_weights`` or a checkpoint sets them, never the global random generator.

Dimensions: B sequences, T tokens, D width of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.gradients import rms_norm


class Linear(nn.Linear):
    """Linear layer, by default without bias, initialized to zeros."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Embedding(nn.Embedding):
    """Embedding initialized to zeros."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)


class RMSNorm(nn.Module):
    """Divide by the root mean square over D and scale each element (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return rms_norm(x, self.weight, self.eps)


def residual_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of the residual stream: LayerNorm for GPT-2, else RMSNorm."""
    if config.architecture == "gpt2":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


class SwiGLU(nn.Module):
    """Llama's gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELULayer(nn.Module):
    """GPT-2's feed-forward layer, with biases and the tanh approximation of GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=True)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
