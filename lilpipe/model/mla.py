"""Multi-head latent attention (MLA): one small latent per token holds the keys and values of all heads.

Source: DeepSeek-V2 (2024, section 2.1), with DeepSeek-V3's parameter names. A head of queries and keys has a part
without RoPE and a part with it; all heads share the key's RoPE part. The cache holds the latent and that RoPE part of
each token, ``kv_lora_rank + qk_rope_head_dim`` numbers per layer.

RoPE pairs elements i and i + half, as elsewhere here; DeepSeek's weights pair 2i and 2i + 1, and ``from_interleaved``
reorders them.

Dimensions: B sequences, T tokens, S keys, D width, H heads, N head size without RoPE, P head size with RoPE, V head
size of values, R width of the latent, C = R + P cached numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.attention import KeysAndValues
from lilpipe.model.layers import Linear, RMSNorm
from lilpipe.model.masks import attend
from lilpipe.model.rope import Angles, apply_rope

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask

LATENT_NORM_EPS = 1e-6
"""As in DeepSeek's code; the config's epsilon applies only to the residual stream's norms."""


class LatentAttention(nn.Module):
    """Multi-head latent attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mla is not None
        mla = config.mla
        self.layer = layer
        self.nope_size, self.rope_size = mla.qk_nope_head_dim, mla.qk_rope_head_dim
        self.value_size, self.latent_size = mla.v_head_dim, mla.kv_lora_rank
        self.scale = (self.nope_size + self.rope_size) ** -0.5
        query_size = config.num_heads * (self.nope_size + self.rope_size)
        if mla.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, query_size)
        else:
            self.q_a_proj = Linear(config.hidden_size, mla.q_lora_rank)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, query_size)
        self.has_query_latent = mla.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent_size + self.rope_size)
        self.kv_a_layernorm = RMSNorm(self.latent_size, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent_size, config.num_heads * (self.nope_size + self.value_size))
        self.o_proj = Linear(config.num_heads * self.value_size, config.hidden_size)

    def forward(
        self, x_BTD: Tensor, rope: Angles | None, mask: Mask | None = None, view: KeysAndValues | None = None
    ) -> Tensor:
        """Attend within each row: causally, or as ``mask [B, 1, T, S]`` allows."""
        assert rope is not None
        q_BTHE = self._queries(x_BTD).unflatten(-1, (-1, self.nope_size + self.rope_size))
        q_BTHN, q_BTHP = q_BTHE.split([self.nope_size, self.rope_size], dim=-1)
        latent_BTR, k_BTP = self.kv_a_proj_with_mqa(x_BTD).split([self.latent_size, self.rope_size], dim=-1)
        k_BT1P = apply_rope(k_BTP[:, :, None], *rope)
        kv_BS1C = torch.cat([self.kv_a_layernorm(latent_BTR)[:, :, None], k_BT1P], dim=-1)
        if view is not None:  # the cache stores one key head; the values (the latent) are part of it
            kv_BS1C, _ = view.update(self.layer, kv_BS1C, kv_BS1C[..., :0])
            mask = view.mask(None) if mask is None else mask
        q_BTHP = apply_rope(q_BTHP, *rope)
        heads_of = self._attend_to_latents if x_BTD.shape[1] == 1 else self._attend_to_heads
        return self.o_proj(heads_of(q_BTHN, q_BTHP, kv_BS1C, mask).flatten(2))

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if self.has_query_latent:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        return self.q_proj(x_BTD)

    def _attend_to_heads(self, q_BTHN: Tensor, q_BTHP: Tensor, kv_BS1C: Tensor, mask: Mask | None) -> Tensor:
        """Return values ``[B, T, H, V]`` from expanded keys and values: the fewest operations for many tokens."""
        latent_BS1R, k_BS1P = kv_BS1C.split([self.latent_size, self.rope_size], dim=-1)
        kv_BSHE = self.kv_b_proj(latent_BS1R[:, :, 0]).unflatten(-1, (-1, self.nope_size + self.value_size))
        k_BSHN, v_BSHV = kv_BSHE.split([self.nope_size, self.value_size], dim=-1)
        k_BSHE = torch.cat([k_BSHN, k_BS1P.expand(-1, -1, k_BSHN.shape[2], -1)], dim=-1)
        # The fused kernel needs values as wide as keys: with zero padding, both passes took half the time on a CPU.
        padding = max(0, self.nope_size + self.rope_size - self.value_size)
        y_BHTV = attend(
            torch.cat([q_BTHN, q_BTHP], dim=-1).transpose(1, 2),
            k_BSHE.transpose(1, 2),
            F.pad(v_BSHV, (0, padding)).transpose(1, 2),
            mask,
            scale=self.scale,
        )
        return y_BHTV[..., : self.value_size].transpose(1, 2)

    def _attend_to_latents(self, q_B1HN: Tensor, q_B1HP: Tensor, kv_BS1C: Tensor, mask: Mask | None) -> Tensor:
        """Return values ``[B, 1, H, V]`` of one token, from the latents directly (DeepSeek-V2, section 2.1.2).

        The key projection is absorbed into the query and the value projection into the output: multi-query attention
        with H queries and one head of keys.
        """
        assert mask is None or isinstance(mask, Tensor), "attention to a cache requires a boolean mask"
        weight_HER = self.kv_b_proj.weight.unflatten(0, (-1, self.nope_size + self.value_size))
        to_key_HNR, to_value_HVR = weight_HER.split([self.nope_size, self.value_size], dim=1)
        q_B1HR = torch.einsum("bthn,hnr->bthr", q_B1HN, to_key_HNR)
        kv_B1SC = kv_BS1C.transpose(1, 2)
        y_B1HR = F.scaled_dot_product_attention(
            torch.cat([q_B1HR, q_B1HP], dim=-1),
            kv_B1SC,
            kv_B1SC[..., : self.latent_size],
            attn_mask=mask,
            scale=self.scale,
        )
        return torch.einsum("bthr,hvr->bthv", y_B1HR, to_value_HVR)


def from_interleaved(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert weights whose RoPE pairs elements 2i and 2i + 1 (Hugging Face's ``rope_interleave``) to our pairs.

    Only the rows of the RoPE parts of queries and keys move.
    """
    assert config.mla is not None
    nope_size, rope_size, latent_size = (
        config.mla.qk_nope_head_dim,
        config.mla.qk_rope_head_dim,
        config.mla.kv_lora_rank,
    )
    halves = torch.cat([torch.arange(0, rope_size, 2), torch.arange(1, rope_size, 2)])
    in_head = torch.cat([torch.arange(nope_size), nope_size + halves])
    result = dict(state)
    for name, tensor in state.items():
        if name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
            result[name] = tensor.unflatten(0, (config.num_heads, -1))[:, in_head].flatten(0, 1)
        elif name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
            result[name] = tensor[torch.cat([torch.arange(latent_size), latent_size + halves])]
    return result
