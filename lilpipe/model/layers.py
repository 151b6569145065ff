"""Layers that the parts of a block are made of.

All start as constants: weights come from ``init_weights`` or from a file, never from the global random generator.

Dimensions: B sequences, T tokens, D width of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.gradients import rms_norm


class Linear(nn.Linear):
    """A matrix, without bias but where one is asked for, that starts as zeros."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Embedding(nn.Embedding):
    """A table that starts as zeros."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)


class RMSNorm(nn.Module):
    """Divide by the root mean square over D, and scale each element (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same shape."""
        return rms_norm(x, self.weight, self.eps)


def residual_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream: LayerNorm in GPT-2, else RMSNorm."""
    if config.architecture == "gpt2":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


class SwiGLU(nn.Module):
    """Llama's feed-forward layer: one product gates the other (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELULayer(nn.Module):
    """GPT-2's feed-forward layer, with biases and GELU by its tanh approximation (Hendrycks & Gimpel 2016)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=True)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same shape."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
