"""Attention masks and the attention call: boolean masks on a CPU, FlexAttention on a GPU.

A query attends to keys of its own document at positions up to its own, with a sliding window (Beltagy et al. 2020) to
the nearest of them. On a CPU this is a boolean mask, built once per
forward pass. On a GPU it is a predicate inside the kernel (FlexAttention, Dong et al. 2024): a long sequence needs no T
x T mask, and fully masked blocks of keys are skipped.

Dimensions: B sequences, T queries, S keys, H query heads, K key/value heads, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable
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


class RowMasks:
    """Masks of one forward pass over whole rows, one for each sliding window, built when first asked for.

    ``given`` is a boolean mask ``[B or 1, 1, T, T]`` instead of the causal one; windows then go by ``positions_BT``.
    """

    def __init__(
        self,
        num_tokens: int,
        device: torch.device,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        given: Mask | None = None,
    ) -> None:
        self.num_tokens, self.device = num_tokens, device
        self.positions_BT, self.documents_BT, self.given = positions_BT, documents_BT, given
        self._held: dict[int | None, Mask | None] = {}

    def mask(self, window: int | None) -> Mask | None:
        """Return the mask of layers with this sliding window; None is causal attention."""
        if window not in self._held:
            self._held[window] = self._build(window)
        return self._held[window]

    def _build(self, window: int | None) -> Mask | None:
        if self.documents_BT is not None:
            return document_mask(self.documents_BT, window)
        if window is None or (window >= self.num_tokens and self.given is None):
            return self.given
        positions_BT = torch.arange(self.num_tokens, device=self.device)[None]
        if self.given is None:
            return allow(positions_BT, positions_BT, window=window)
        assert isinstance(self.given, Tensor), "a sliding window requires a boolean mask"
        positions_BT = positions_BT if self.positions_BT is None else self.positions_BT
        return self.given & near(positions_BT, positions_BT, window)[:, None]


def near(positions_BT: Tensor, positions_BS: Tensor, window: int) -> Tensor:
    """Return where a key is less than ``window`` positions before the query, boolean ``[B, T, S]``."""
    return positions_BT[:, :, None] - positions_BS[:, None, :] < window


def allow(
    positions_BT: Tensor,
    positions_BS: Tensor,
    documents_BT: Tensor | None = None,
    documents_BS: Tensor | None = None,
    *,
    window: int | None = None,
) -> Mask:
    """Return the causal mask for queries and keys at these positions; with documents, also restricted to them.

    With a sliding ``window``, a query attends to that many positions, including its own.
    """
    if positions_BT.device.type == "cuda":
        return block_mask(positions_BT, positions_BS, documents_BT, documents_BS, window=window, compiled=True)
    allowed_BTS = positions_BS[:, None, :] <= positions_BT[:, :, None]
    if documents_BT is not None and documents_BS is not None:
        allowed_BTS = allowed_BTS & (documents_BS[:, None, :] == documents_BT[:, :, None])
    if window is not None:
        allowed_BTS = allowed_BTS & near(positions_BT, positions_BS, window)
    return allowed_BTS[:, None]


def document_mask(documents_BT: Tensor, window: int | None = None) -> Mask:
    """Return the causal mask within documents, for whole rows."""
    positions_1T = torch.arange(documents_BT.shape[1], device=documents_BT.device)[None]
    positions_BT = positions_1T.expand(documents_BT.shape)
    return allow(positions_BT, positions_BT, documents_BT, documents_BT, window=window)


def attend(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask: Mask | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention outputs ``[B, H, T, E]``; without ``mask``, causal attention.

    Scores are multiplied by ``scale`` (default ``E**-0.5``), then bounded to +- ``softcap``.
    """
    if softcap is not None and (mask is None or isinstance(mask, Tensor)):
        return _attend_capped(q_BHTE, k_BKSE, v_BKSE, mask, scale=scale, softcap=softcap)
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
    kernel = _compiled(flex_attention) if q_BHTE.is_cuda else flex_attention
    bend = None if softcap is None else _softcap_of(softcap)
    return kernel(q_BHTE, k_BKSE, v_BKSE, score_mod=bend, block_mask=mask, scale=scale, enable_gqa=enable_gqa)


def _attend_capped(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, *, scale: float | None, softcap: float
) -> Tensor:
    """Return attention with soft-capped scores, which PyTorch's fused kernels do not compute."""
    q_BKGTE = q_BHTE.unflatten(1, (k_BKSE.shape[1], -1))
    scaled_BKGTE = q_BKGTE * (q_BHTE.shape[-1] ** -0.5 if scale is None else scale)
    scores_BKGTS = softcap * torch.tanh(scaled_BKGTE @ k_BKSE[:, :, None].transpose(-1, -2) / softcap)
    if mask is None:
        T, S = scores_BKGTS.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril()[None, None]
    scores_BKGTS = scores_BKGTS.masked_fill(~mask[:, :, None], -torch.inf)
    exact = torch.promote_types(q_BHTE.dtype, torch.float32)
    weights_BKGTS = scores_BKGTS.softmax(-1, dtype=exact).to(q_BHTE.dtype)
    return (weights_BKGTS @ v_BKSE[:, :, None]).flatten(1, 2)


@cache
def _softcap_of(cap: float) -> Callable[..., Tensor]:
    """Return the change of scores for FlexAttention; the same object for equal caps, so that it compiles once."""

    def bend(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001 (all alike)
        return cap * torch.tanh(score / cap)

    return bend


def block_mask(
    positions_BT: Tensor,
    positions_BS: Tensor,
    documents_BT: Tensor | None,
    documents_BS: Tensor | None,
    *,
    window: int | None = None,
    compiled: bool,
) -> BlockMask:
    """Return the mask for FlexAttention; ``compiled`` avoids building the full mask."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001 (all heads alike)
        seen = positions_BS[b, s] <= positions_BT[b, t]
        if documents_BT is not None and documents_BS is not None:
            seen = seen & (documents_BS[b, s] == documents_BT[b, t])
        if window is not None:
            seen = seen & (positions_BT[b, t] - positions_BS[b, s] < window)
        return seen

    make = _compiled(create_block_mask) if compiled else create_block_mask
    (B, T), S = positions_BT.shape, positions_BS.shape[1]
    return make(sees, B, None, T, S, device=positions_BT.device)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
