"""Paged attention that reads each page once, however many sequences share it.

Queries are gathered per page, not pages per query: one batched product computes the scores of every page in use with
the queries of its rows, so no keys are gathered or padded. A prompt's pages are multiplied with the queries of all its
completions at once (Juravsky et al. 2024, "Hydragen"). The partial results of a row's pages are merged by their maximum
scores and sums, as in FlashDecoding (Dao et al. 2023).

Dimensions: B rows, T tokens, P prompts, N pages, S slots of a page, H query heads, K key/value heads, G query heads of
a key/value head (H = K x G), E size of a head, R rows that share a prompt, C blocks of G queries, M pages of a row, Q
rows and heads (B x H).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.generation.batch_layout import BatchLayout
from lilpipe.generation.pages import CLOSED, PAGE_SIZE, PagePool, score_dtype
from lilpipe.model.attention import AttendingView
from lilpipe.model.masks import RowMasks

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


class Scratch:
    """Buffers reused by every step: allocating memory of this size costs more than the operations on it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor of that shape."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)


@dataclass
class _Pages:
    """Pages of one kind (completions' or prompts') and their parts of a step's tensors."""

    pool: PagePool
    count: int
    keys: list[Tensor]
    """Keys of each layer ``[N x K, E, S]``."""
    values: list[Tensor]
    queries: Tensor
    """``[N x K, R x G, E]``; for completions R is 1."""
    scores: Tensor
    results: Tensor
    readers_NR: Tensor
    starts_N: Tensor
    closed: dict[int | None, Tensor]
    """Attention mask of each sliding window, in the shape of the scores."""

    def see(self, window: int | None, positions_B: Tensor) -> Tensor:
        """Return the attention mask for rows at these positions."""
        if window not in self.closed:
            closed_NRS = self.pool.closed_NS[: self.count, None]
            if window is not None:
                slots_NS = self.starts_N[:, None] + torch.arange(PAGE_SIZE, device=self.starts_N.device)
                passed_NRS = positions_B[self.readers_NR][..., None] - slots_NS[:, None] >= window
                closed_NRS = closed_NRS.masked_fill(passed_NRS, CLOSED)
            kv_heads, sharing = len(self.scores) // self.count, self.readers_NR.shape[1]
            per_head = closed_NRS[:, None, :, None]
            shape = (-1, kv_heads, sharing, self.scores.shape[1] // sharing, -1)
            self.closed[window] = per_head.expand(shape).reshape(self.scores.shape)
        return self.closed[window]


class _Work:
    """Views of a decode step's tensors, made once for all steps and layers of a layout."""

    def __init__(self, view: DecodeView, rows: Tensor, kv_heads: int, group: int) -> None:
        layout, take = view.layout, view.scratch.take
        num_blocks, size = len(layout.blocks_C), rows.shape[1] // group
        exact = score_dtype(rows.dtype)
        self.queries = take("queries", (num_blocks, group * size), rows, rows.dtype)
        self.scores = take("scores", (num_blocks * group, PAGE_SIZE), rows, exact)
        # The entry after the last is for pages that a row does not have.
        self.all_largest = take("largest", (num_blocks * group + 1,), rows, exact)
        self.all_sums = take("sums", (num_blocks * group + 1,), rows, exact)
        self.all_results = take("results", (num_blocks * group + 1, size), rows, exact)
        self.all_largest[-1], self.all_sums[-1], self.all_results[-1] = CLOSED, 0.0, 0.0
        self.largest, self.sums = self.all_largest[:-1], self.all_sums[:-1]
        self.largest_column = self.largest[:, None]
        self.partials = layout.partials_QM.view(-1)
        self.pages: list[_Pages] = []
        start = 0
        for kind, (pool, count, sharing) in enumerate(
            (
                (view.answers, layout.num_answer_pages, 1),
                (view.prompts, layout.num_prompt_pages, layout.sharing),
            )
        ):
            stop = start + count * kv_heads * sharing
            if count:
                of_pages = slice(start * group, stop * group)
                scores = self.scores[of_pages].view(count * kv_heads, -1, PAGE_SIZE)
                pages = _Pages(
                    pool,
                    count,
                    keys=[keys_NKES[:count].flatten(0, 1) for keys_NKES in pool.keys_LNKES],
                    values=[values_NKSF[:count].flatten(0, 1) for values_NKSF in pool.values_LNKSF],
                    queries=self.queries[start:stop].view(count * kv_heads, -1, size),
                    scores=scores,
                    results=self.all_results[of_pages].view(count * kv_heads, -1, size),
                    readers_NR=layout.readers_NR[kind],
                    starts_N=layout.starts_N[kind],
                    closed={},
                )
                self.pages.append(pages)
            start = stop


class DecodeView(AttendingView):
    """Decode steps in one layout: writes the newest token of each row to its page and attends to the row's pages.

    ``advance`` moves to the next slot of each row's page.
    """

    def __init__(
        self,
        answers: PagePool,
        prompts: PagePool,
        layout: BatchLayout,
        page_B: Tensor,
        place_B: Tensor,
        scratch: Scratch,
    ) -> None:
        self.answers, self.prompts = answers, prompts
        self.layout = layout
        self.page_B, self.place_B = page_B, place_B
        self.scratch = scratch
        self._work: _Work | None = None
        self._slots: tuple[Tensor, Tensor] | None = None
        self._open()

    def advance(self) -> None:
        """Move each row to the next slot of its page."""
        self.place_B += 1
        for slots in self._slots or ():
            slots += 1
        self._open()

    def refresh(self) -> None:
        """Update after a change of ``page_B`` and ``place_B`` from outside."""
        self._slots = None
        self._see()

    def _open(self) -> None:
        self.answers.closed_NS[self.page_B, self.place_B] = 0.0
        self._see()

    def _see(self) -> None:
        self._gathered_B1TS: Tensor | None = None
        for pages in self._work.pages if self._work else ():
            pages.closed.clear()

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> DecodeView:  # noqa: ARG002 (made for these tokens)
        """Return itself: it is made for forward passes of one token."""
        return self

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
        """Cache one token of each row and attend; returns ``[B, 1, H, E]``."""
        self._write(layer, k_BTKE, v_BTKE)
        B, _, H, E = q_BTHE.shape
        kv_heads = k_BTKE.shape[2]
        rows = (q_BTHE * (E**-0.5 if scale is None else scale)).view(B * kv_heads, H // kv_heads * E)
        if self._work is None:
            self._work = _Work(self, rows, kv_heads, H // kv_heads)
        work = self._work
        torch.index_select(rows, 0, self.layout.blocks_C, out=work.queries)
        for pages in work.pages:
            closed = pages.see(window, self._positions(window))
            _product(pages.queries, pages.keys[layer], pages.scores, added=closed if softcap is None else None)
            if softcap is not None:
                pages.scores.div_(softcap).tanh_().mul_(softcap).add_(closed)
        torch.amax(work.scores, dim=-1, out=work.largest)
        _exp(work.scores.sub_(work.largest_column))
        torch.sum(work.scores, dim=-1, out=work.sums)
        for pages in work.pages:
            _product(pages.scores.to(pages.values[layer].dtype), pages.values[layer], pages.results)
        return self._merge(work).view(B, 1, H, E).to(q_BTHE.dtype)

    def _merge(self, work: _Work) -> Tensor:
        """Merge the results of pages to results of rows and heads ``[Q, E]``."""
        partials_QM = self.layout.partials_QM
        weight_QM = work.all_largest.index_select(0, work.partials).view(partials_QM.shape)
        _exp(weight_QM.sub_(weight_QM.amax(-1, keepdim=True)))
        sums_QM = work.all_sums.index_select(0, work.partials).view(partials_QM.shape)
        weight_QM.div_((weight_QM * sums_QM).sum(-1, keepdim=True))
        return F.embedding_bag(partials_QM, work.all_results, mode="sum", per_sample_weights=weight_QM)

    def _positions(self, window: int | None) -> Tensor:
        """Return the position of each row's token, ``[B]``; only sliding windows need it."""
        if window is None:
            return self.place_B
        return self.layout.starts_N[0][self.page_B] + self.place_B

    def mask(self, window: int | None) -> Tensor:
        """Return where the rows' gathered pages hold a token, ``[B, 1, 1, S]``."""
        assert window is None, "gathered pages have no sliding window"
        if self._gathered_B1TS is None:
            self._gathered_B1TS = torch.cat(
                [
                    ((pool.closed_NS[table_BM] == 0) & seen_BM[..., None]).flatten(1)
                    for pool, table_BM, seen_BM in self._tables()
                ],
                dim=1,
            )[:, None, None]
        return self._gathered_B1TS

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Cache one token of each row and return the keys and values that rows may attend to, ``[B, S, K, E]`` each."""
        self._write(layer, keys_BTKE, values_BTKE)
        keys = [pool.keys_LNKES[layer, table].permute(0, 1, 4, 2, 3).flatten(1, 2) for pool, table, _ in self._tables()]
        values = [pool.values_LNKSF[layer, table].transpose(2, 3).flatten(1, 2) for pool, table, _ in self._tables()]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _tables(self) -> list[tuple[PagePool, Tensor, Tensor]]:
        return list(zip((self.answers, self.prompts), self.layout.tables_BM, self.layout.seen_BM, strict=True))

    def _write(self, layer: int, k_BTKE: Tensor, v_BTKE: Tensor) -> None:
        if self._slots is None:
            self._slots = self._places_to_write(k_BTKE.shape[2])
        keys, values = self._slots
        self.answers.keys_LNKES[layer].view(-1).index_copy_(0, keys, k_BTKE.reshape(-1))
        width = v_BTKE.shape[-1]
        if width:
            self.answers.values_LNKSF[layer].view(-1, width).index_copy_(0, values, v_BTKE.reshape(-1, width))

    def _places_to_write(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return the flat indices of the rows' keys and of the rows' values in a layer's cache."""
        device = self.page_B.device
        heads_BK = self.page_B[:, None] * kv_heads + torch.arange(kv_heads, device=device)
        width = self.answers.keys_LNKES.shape[3]
        keys_BKE = (heads_BK[..., None] * width + torch.arange(width, device=device)) * PAGE_SIZE
        place_B1 = self.place_B[:, None]
        return (keys_BKE + place_B1[..., None]).view(-1), (heads_BK * PAGE_SIZE + place_B1).view(-1)


class PromptView:
    """Prefill of right-padded prompts: caches keys and values in the prompts' pages."""

    def __init__(self, pool: PagePool, pages_PM: np.ndarray, lengths_P: np.ndarray) -> None:
        self.pool = pool
        device = pool.closed_NS.device
        self._rows = RowMasks(int(lengths_P.max()), device)
        rows, columns = np.nonzero(pages_PM >= 0)
        self._slots_N = torch.from_numpy(rows * pages_PM.shape[1] + columns).to(device)
        self._pages_N = torch.from_numpy(pages_PM[rows, columns]).to(device)
        left_N = (lengths_P[rows] - columns * PAGE_SIZE)[:, None]
        closed_NS = np.where(np.arange(PAGE_SIZE) < left_N, 0.0, CLOSED)
        pool.closed_NS[self._pages_N] = torch.from_numpy(closed_NS).to(pool.closed_NS)
        self._width = pages_PM.shape[1] * PAGE_SIZE

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> PromptView:  # noqa: ARG002 (made for these tokens)
        """Return itself: it is made for one forward pass."""
        return self

    def mask(self, window: int | None) -> Mask | None:
        """Return the causal mask with a sliding window; None without one."""
        return self._rows.mask(window)

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Cache the prompts' keys and values, and return them unchanged."""
        self.pool.keys_LNKES[layer][self._pages_N] = self._paged(keys_BTKE).permute(0, 2, 3, 1)
        self.pool.values_LNKSF[layer][self._pages_N] = self._paged(values_BTKE).transpose(1, 2)
        return keys_BTKE, values_BTKE

    def _paged(self, x_PTKE: Tensor) -> Tensor:
        """Split the prompts into pages ``[N, S, K, E]``."""
        padded = F.pad(x_PTKE, (0, 0, 0, 0, 0, self._width - x_PTKE.shape[1]))
        return padded.unflatten(1, (-1, PAGE_SIZE)).flatten(0, 1)[self._slots_N]


def _exp(scores: Tensor) -> None:
    """Replace scores (minus their maximum) by their exponentials, in place.

    Results that would underflow become 1e-35 instead of 0: a CPU takes thirty times as long where results underflow.
    """
    scores.clamp_(min=-80.0).exp_()


def _product(a: Tensor, b: Tensor, out: Tensor, *, added: Tensor | None = None) -> None:
    """Write ``a @ b + added`` to ``out``, which may have a wider dtype."""
    if a.dtype == out.dtype and added is not None:
        torch.baddbmm(added, a, b, out=out)
    elif a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
        if added is not None:
            out.add_(added)
