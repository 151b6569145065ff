"""Basic layers of a transformer block.

All have constant initial weights. ``init_weights`` or a checkpoint sets them, never the global random generator.

Dimensions: B sequences, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model import gradients


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
        return gradients.rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(nn.Module):
    """RMSNorm that scales by 1 + weight (Gemma Team 2024)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape; computed in float32, as in transformers."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return gradients.rms_norm(x.to(exact), 1 + self.weight.to(exact), self.eps).to(x.dtype)


def rms_norm(config: ModelConfig, size: int) -> nn.Module:
    """Return an RMSNorm over ``size`` elements."""
    return (RMSNormPlusOne if config.norm == "rms_plus_one" else RMSNorm)(size, config.norm_eps)


def residual_norm(config: ModelConfig) -> nn.Module:
    """Return a norm of the width of the residual stream."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return rms_norm(config, config.hidden_size)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
"""Functions of ``hidden_act``."""


class GatedMLP(nn.Module):
    """Feed-forward layer with a gate: SwiGLU, or GeGLU with GELU (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str = "silu", *, bias: bool = False) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """Feed-forward layer of two matrices (Radford et al. 2019, with GELU of Hendrycks & Gimpel 2016)."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, *, bias: bool) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return self.down_proj(self.act(self.up_proj(x)))
