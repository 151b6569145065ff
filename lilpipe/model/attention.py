"""Causal self-attention with RoPE, grouped-query attention and a key/value cache.

Sources: Vaswani et al. 2017 (attention), Su et al. 2021 (RoPE, in Hugging Face's rotate-half form), Ainslie et al. 2023
(GQA), Henry et al. 2020 (QK norm, with Qwen 3's names), Dao 2023 (FlashAttention-2, behind
``scaled_dot_product_attention``).

Dimensions: B sequences, T tokens, S cached positions, D width of the residual stream, H query heads, K key/value heads,
E size of one head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.gradients import rotate
from lilpipe.model.layers import Linear, RMSNorm
from lilpipe.model.masks import attend

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


Angles = tuple[Tensor, Tensor]
"""RoPE cosines and sines, ``[B or 1, T, 1, E]`` each."""


def rope_table(max_seq_len: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[max_seq_len, E]`` of position times frequency, in float32.

    Elements i and i + E/2 of a head are a pair that rotates by ``position / theta**(2i/E)``. The sine of the first half
    is negated, so that ``x * cos + swap(x) * sin``, where ``swap`` exchanges the halves, rotates every pair.
    """
    if torch.get_default_device().type == "meta":  # torch would import its compiler
        return torch.empty(max_seq_len, head_size), torch.empty(max_seq_len, head_size)
    frequency = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, T, heads, E]`` by the angles of ``cos`` and ``sin [B or 1, T, 1, E]``."""
    return rotate(x, cos, sin)


class Cache(Protocol):
    """Key/value cache of a forward pass."""

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> KeysAndValues:
        """Return the layers' view of the cache for one forward pass."""
        ...


class KeysAndValues(Protocol):
    """Source of keys and values beyond those of the current tokens: a cache, or other workers."""

    mask_B1TS: Mask | None
    """What each token may attend to; None is causal."""

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that may be attended to: two tensors ``[B, S, K, E]``."""
        ...


class AttendingView(ABC):
    """Keys and values that are not gathered: the view computes the attention itself."""

    mask_B1TS: Mask | None

    @abstractmethod
    def attend(self, layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """Store new keys and values; return attention ``[B, T, H, E]`` over all that each token may attend to."""

    @abstractmethod
    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """As in ``KeysAndValues``, for other kinds of attention."""


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_size = config.head_size
        bias = config.architecture == "gpt2"
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_size, bias=bias)
        self.o_proj = Linear(config.num_heads * config.head_size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, rope: Angles | None, mask: Mask | None = None, view: KeysAndValues | None = None
    ) -> Tensor:
        """Attend within each row: causally, or as ``mask [B, 1, T, S]`` allows.

        Without ``rope``, queries and keys are not rotated: positions are already in the residual stream.
        """
        B, T, _ = x_BTD.shape
        H, K, E = -1, -1, self.head_size  # -1: the number of heads on this process
        # One fused QKV product was measured: no faster at width 96.
        q_BTHE = self.q_proj(x_BTD).view(B, T, H, E)
        k_BTKE = self.k_proj(x_BTD).view(B, T, K, E)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if rope is not None:
            q_BTHE, k_BTKE = apply_rope(q_BTHE, *rope), apply_rope(k_BTKE, *rope)
        v_BTKE = self.v_proj(x_BTD).view(B, T, K, E)
        if isinstance(view, AttendingView):
            return self.o_proj(view.attend(self.layer, q_BTHE, k_BTKE, v_BTKE).flatten(2))
        if view is not None:
            k_BTKE, v_BTKE = view.update(self.layer, k_BTKE, v_BTKE)
            mask = view.mask_B1TS
        y_BHTE = attend(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            mask,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))
