"""Attention masks and the attention call: boolean masks on a CPU, FlexAttention on a GPU.

A query attends to keys of its own document at positions up to its own. On a CPU this is a boolean mask, built once per
forward pass. On a GPU it is a predicate inside the kernel (FlexAttention, Dong et al. 2024): a long sequence needs no T
x T mask, and fully masked blocks of keys are skipped.

Dimensions: B sequences, T queries, S keys, H query heads, K key/value heads, E size of one head.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask
    """Boolean ``[B or 1, 1, T, S]``, True where a query may attend; on a GPU, a ``BlockMask``."""


def allow(
    positions_BT: Tensor,
    positions_BS: Tensor,
    documents_BT: Tensor | None = None,
    documents_BS: Tensor | None = None,
) -> Mask:
    """Return the causal mask for queries and keys at these positions; with documents, also restricted to them."""
    if positions_BT.device.type == "cuda":
        return block_mask(positions_BT, positions_BS, documents_BT, documents_BS, compiled=True)
    allowed_BTS = positions_BS[:, None, :] <= positions_BT[:, :, None]
    if documents_BT is not None and documents_BS is not None:
        allowed_BTS = allowed_BTS & (documents_BS[:, None, :] == documents_BT[:, :, None])
    return allowed_BTS[:, None]


def document_mask(documents_BT: Tensor) -> Mask:
    """Return the causal mask within documents, for whole rows."""
    positions_1T = torch.arange(documents_BT.shape[1], device=documents_BT.device)[None]
    positions_BT = positions_1T.expand(documents_BT.shape)
    return allow(positions_BT, positions_BT, documents_BT, documents_BT)


def attend(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask: Mask | None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention outputs ``[B, H, T, E]``; without ``mask``, causal attention."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
    kernel = _compiled(flex_attention) if q_BHTE.is_cuda else flex_attention
    return kernel(q_BHTE, k_BKSE, v_BKSE, block_mask=mask, scale=scale, enable_gqa=enable_gqa)


def block_mask(
    positions_BT: Tensor,
    positions_BS: Tensor,
    documents_BT: Tensor | None,
    documents_BS: Tensor | None,
    *,
    compiled: bool,
) -> BlockMask:
    """Return the mask for FlexAttention; ``compiled`` avoids building the full mask."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001 (all heads alike)
        seen = positions_BS[b, s] <= positions_BT[b, t]
        if documents_BT is not None and documents_BS is not None:
            seen = seen & (documents_BS[b, s] == documents_BT[b, t])
        return seen

    make = _compiled(create_block_mask) if compiled else create_block_mask
    (B, T), S = positions_BT.shape, positions_BS.shape[1]
    return make(sees, B, None, T, S, device=positions_BT.device)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
