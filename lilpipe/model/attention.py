"""Causal self-attention with RoPE, grouped-query attention and a key/value cache.

Sources: Vaswani et al. 2017 (attention), Ainslie et al. 2023 (GQA), Henry et al. 2020 (QK norm, with Qwen 3's names),
Gemma Team 2024 (soft cap of scores), Dao 2023 (FlashAttention-2, behind ``scaled_dot_product_attention``).

Dimensions: B sequences, T tokens, S cached positions, D width of the residual stream, H query heads, K key/value heads,
E size of one head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.layers import Linear, rms_norm
from lilpipe.model.masks import attend
from lilpipe.model.rope import Angles, apply_rope

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


class Cache(Protocol):
    """Key/value cache of a forward pass."""

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> KeysAndValues:
        """Return the layers' view of the cache for one forward pass."""
        ...


class KeysAndValues(Protocol):
    """Source of keys and values beyond those of the current tokens: a cache, or other workers."""

    def mask(self, window: int | None) -> Mask | None:
        """Return what each token may attend to in layers with this sliding window; None is causal."""
        ...

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that may be attended to: two tensors ``[B, S, K, E]``."""
        ...


class AttendingView(ABC):
    """Keys and values that are not gathered: the view computes the attention itself."""

    @abstractmethod
    def mask(self, window: int | None) -> Mask | None:
        """As in ``KeysAndValues``, for ``update``."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q_BTHE: Tensor,
        k_BTKE: Tensor,
        v_BTKE: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
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
        self.head_size = size = config.head_size
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5
        self.softcap = config.attn_logit_softcap
        self.window = config.window(layer)
        width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        self.q_proj = Linear(width, heads * size, bias=config.attention_bias)
        self.k_proj = Linear(width, kv_heads * size, bias=config.attention_bias)
        self.v_proj = Linear(width, kv_heads * size, bias=config.attention_bias)
        self.o_proj = Linear(heads * size, width, bias=config.attention_out_bias)
        self.norms_projection = config.qk_norm == "projection"
        normed = (heads * size, kv_heads * size) if self.norms_projection else (size, size)
        self.q_norm = rms_norm(config, normed[0]) if config.qk_norm else None
        self.k_norm = rms_norm(config, normed[1]) if config.qk_norm else None

    @property
    def scoring(self) -> Mapping[str, Any]:
        """Options of ``AttendingView.attend``."""
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}

    def forward(
        self, x_BTD: Tensor, rope: Angles | None, mask: Mask | None = None, view: KeysAndValues | None = None
    ) -> Tensor:
        """Attend within each row: causally, or as ``mask [B, 1, T, S]`` allows.

        Without ``rope``, queries and keys are not rotated.
        """
        B, T, _ = x_BTD.shape
        H, K, E = -1, -1, self.head_size  # -1: the number of heads on this process
        # One fused QKV product was measured: no faster at width 96.
        q, k = self.q_proj(x_BTD), self.k_proj(x_BTD)
        if self.q_norm is not None and self.k_norm is not None and self.norms_projection:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTHE, k_BTKE = q.view(B, T, H, E), k.view(B, T, K, E)
        if self.q_norm is not None and self.k_norm is not None and not self.norms_projection:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if rope is not None:
            q_BTHE, k_BTKE = apply_rope(q_BTHE, *rope), apply_rope(k_BTKE, *rope)
        v_BTKE = self.v_proj(x_BTD).view(B, T, K, E)
        if isinstance(view, AttendingView):
            return self.o_proj(view.attend(self.layer, q_BTHE, k_BTKE, v_BTKE, **self.scoring).flatten(2))
        if view is not None:
            k_BTKE, v_BTKE = view.update(self.layer, k_BTKE, v_BTKE)
            mask = view.mask(self.window) if mask is None else mask
        y_BHTE = attend(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            mask,
            scale=self.scale,
            softcap=self.softcap,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))
