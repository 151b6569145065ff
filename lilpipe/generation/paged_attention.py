"""Attention over pages, each read once however many sequences share it.

Queries go to pages rather than pages to queries: one batched product gives the scores of every page in use with the
queries of the rows that see it, so nothing is gathered or padded. The prompt's pages meet the queries of all samples
of the prompt in one product (Juravsky et al. 2024, "Hydragen"). A row then merges what its pages gave by their
largest scores and sums, as FlashDecoding does (Dao et al. 2023).

Dimensions: B rows, T tokens, P prompts, N pages, S places of a page, H query heads, K key/value heads, G query heads
of a key/value head (H = K x G), E size of a head, R rows that share a prompt, C blocks of G queries, M pages of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.config import ModelConfig
from lilpipe.generation.pages import CLOSED, PAGE_SIZE, PagePool, score_dtype
from lilpipe.model.attention import AttendingView


class Scratch:
    """Memory that is used again from step to step: fresh memory of this size costs more than what is done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of that shape, with anything in it."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)


@dataclass
class Layout:
    """Which rows see which pages. It stays while no row enters, leaves or begins a page."""

    num_rows: int
    num_answer_pages: int
    num_prompt_pages: int
    sharing: int
    """R."""
    blocks_C: Tensor
    """Of each block of queries, answers' first, its number among the rows' [B x K]."""
    partials_QM: Tensor
    """Of each row and head [Q = B x H], the results [C x G] that it merges; the number after the last is of none."""
    tables_BM: tuple[Tensor, Tensor]
    """Pages of each row, of answers and of prompts; 0 where there are fewer."""
    seen_BM: tuple[Tensor, Tensor]
    """Where the tables hold a page."""


def layout(
    answers_BM: np.ndarray,
    prompts_BM: np.ndarray,
    config: ModelConfig,
    device: torch.device,
    round_up: Callable[[int], int] = int,
) -> Layout:
    """The layout of rows with these pages; -1 stands where a row has fewer. Counts are rounded as ``round_up`` says,
    and there must be as many pages.
    """
    num_rows, heads = len(answers_BM), config.num_heads
    kv_heads = 1 if config.mla is not None else config.num_kv_heads
    tables = (answers_BM, prompts_BM)
    num_answer_pages, num_prompt_pages = (round_up(int(table.max(initial=-1)) + 1) for table in tables)
    member_B, sharing = _members(prompts_BM[:, 0])
    sharing = round_up(sharing)
    owner_N = np.zeros(num_answer_pages, dtype=np.int64)
    rows, columns = np.nonzero(answers_BM >= 0)
    owner_N[answers_BM[rows, columns]] = rows
    sharer_NR = np.zeros((num_prompt_pages, sharing), dtype=np.int64)
    rows, columns = np.nonzero(prompts_BM >= 0)
    sharer_NR[prompts_BM[rows, columns], member_B[rows]] = rows
    kv_K = np.arange(kv_heads)
    blocks_C = np.concatenate(
        [
            (owner_N[:, None] * kv_heads + kv_K).ravel(),
            (sharer_NR[:, None, :] * kv_heads + kv_K[:, None]).ravel(),
        ]
    )
    group = heads // kv_heads
    kv_H, in_group_H = np.divmod(np.arange(heads), group)
    answer_BHM = answers_BM[:, None, :] * heads + np.arange(heads)[:, None]
    prompt_BHM = (prompts_BM[:, None, :] * kv_heads + kv_H[:, None]) * sharing + member_B[:, None, None]
    prompt_BHM = num_answer_pages * heads + prompt_BHM * group + in_group_H[:, None]
    none = len(blocks_C) * group
    partials_BHM = np.concatenate(
        [
            np.where(answers_BM[:, None] >= 0, answer_BHM, none),
            np.where(prompts_BM[:, None] >= 0, prompt_BHM, none),
        ],
        axis=-1,
    )

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Layout(
        num_rows=num_rows,
        num_answer_pages=num_answer_pages,
        num_prompt_pages=num_prompt_pages,
        sharing=sharing,
        blocks_C=put(blocks_C),
        partials_QM=put(partials_BHM.reshape(num_rows * heads, -1)),
        tables_BM=(put(np.maximum(tables[0], 0)), put(np.maximum(tables[1], 0))),
        seen_BM=(put(tables[0] >= 0), put(tables[1] >= 0)),
    )


def _members(prompt_B: np.ndarray) -> tuple[np.ndarray, int]:
    """Each row's number among those of its prompt, and the most rows that one prompt has."""
    order = np.argsort(prompt_B, kind="stable")
    ordered = prompt_B[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(ordered)])
    members = np.empty(len(prompt_B), dtype=np.int64)
    members[order] = np.arange(len(ordered)) - np.repeat(starts, counts)
    return members, int(counts[ordered[starts] >= 0].max(initial=1))


class DecodeView(AttendingView):
    """One step of decoding: each row's newest token is written to its page and attends to the row's pages."""

    def __init__(
        self, answers: PagePool, prompts: PagePool, layout: Layout, page_B: Tensor, place_B: Tensor, scratch: Scratch
    ) -> None:
        self.answers, self.prompts = answers, prompts
        self.layout = layout
        self.page_B, self.place_B = page_B, place_B
        self.scratch = scratch
        answers.closed_NS[page_B, place_B] = 0.0
        self.mask_B1TS = None

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> DecodeView:  # noqa: ARG002 (made for these tokens)
        """Itself: a view is made for one forward pass."""
        return self

    def attend(self, layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """Write one token of each row and attend: ``[B, 1, H, E]``."""
        self._write(layer, k_BTKE, v_BTKE)
        B, _, H, E = q_BTHE.shape
        kv_heads = k_BTKE.shape[2]
        group, layout, take = H // kv_heads, self.layout, self.scratch.take
        num_blocks, exact = len(layout.blocks_C), score_dtype(q_BTHE.dtype)
        rows = (q_BTHE * E**-0.5).view(B * kv_heads, group * E)
        queries = take("queries", (num_blocks, group * E), rows, rows.dtype)
        torch.index_select(rows, 0, layout.blocks_C, out=queries)
        scores = take("scores", (num_blocks * group, PAGE_SIZE), rows, exact)
        sums = take("sums", (num_blocks * group + 1,), rows, exact)
        values = take("values", (num_blocks * group + 1, E), rows, exact)
        sums[-1], values[-1] = 0.0, 0.0
        parts = self._parts(layer, kv_heads, group)
        for first, last, keys, _, closed_NS, per_page in parts:
            part = scores[first * group : last * group].view(len(keys), -1, PAGE_SIZE)
            _product(queries[first:last].view(len(keys), -1, E), keys, part)
            part.view(-1, per_page, PAGE_SIZE).add_(closed_NS[:, None])
        largest = take("largest", (num_blocks * group + 1,), rows, exact)
        torch.amax(scores, dim=-1, out=largest[:-1])
        largest[-1] = CLOSED
        _exp(scores.sub_(largest[:-1, None]))
        torch.sum(scores, dim=-1, out=sums[:-1])
        for first, last, keys, values_NSE, _, _ in parts:
            part = scores[first * group : last * group].view(len(keys), -1, PAGE_SIZE)
            into = values[first * group : last * group].view(len(keys), -1, E)
            _product(part.to(values_NSE.dtype), values_NSE, into)
        return self._merge(largest, sums, values).view(B, 1, H, E).to(q_BTHE.dtype)

    def _parts(self, layer: int, kv_heads: int, group: int) -> list[tuple[int, int, Tensor, Tensor, Tensor, int]]:
        """Of answers and of prompts: their blocks, keys, values, closed places and queries that see one page."""
        layout, start, parts = self.layout, 0, []
        for pool, count, sharing in (
            (self.answers, layout.num_answer_pages, 1),
            (self.prompts, layout.num_prompt_pages, layout.sharing),
        ):
            stop = start + count * kv_heads * sharing
            if count:
                keys = pool.keys_LNKES[layer, :count].flatten(0, 1)
                values = pool.values_LNKSF[layer, :count].flatten(0, 1)
                parts.append((start, stop, keys, values, pool.closed_NS[:count], kv_heads * sharing * group))
            start = stop
        return parts

    def _merge(self, largest: Tensor, sums: Tensor, values: Tensor) -> Tensor:
        """Results of pages to results of rows and heads ``[Q, E]``."""
        partials_QM = self.layout.partials_QM
        flat = partials_QM.view(-1)
        weight_QM = largest.index_select(0, flat).view(partials_QM.shape)
        _exp(weight_QM.sub_(weight_QM.amax(-1, keepdim=True)))
        sums_QM = sums.index_select(0, flat).view(partials_QM.shape)
        weight_QM.div_((weight_QM * sums_QM).sum(-1, keepdim=True))
        return F.embedding_bag(partials_QM, values, mode="sum", per_sample_weights=weight_QM)

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token of each row, and gather all that the rows may attend to: two tensors ``[B, S, K, E]``."""
        self._write(layer, keys_BTKE, values_BTKE)
        if self.mask_B1TS is None:
            self.mask_B1TS = torch.cat(
                [
                    ((pool.closed_NS[table_BM] == 0) & seen_BM[..., None]).flatten(1)
                    for pool, table_BM, seen_BM in self._tables()
                ],
                dim=1,
            )[:, None, None]
        keys = [pool.keys_LNKES[layer, table].permute(0, 1, 4, 2, 3).flatten(1, 2) for pool, table, _ in self._tables()]
        values = [pool.values_LNKSF[layer, table].transpose(2, 3).flatten(1, 2) for pool, table, _ in self._tables()]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _tables(self) -> list[tuple[PagePool, Tensor, Tensor]]:
        return list(zip((self.answers, self.prompts), self.layout.tables_BM, self.layout.seen_BM, strict=True))

    def _write(self, layer: int, k_BTKE: Tensor, v_BTKE: Tensor) -> None:
        self.answers.keys_LNKES[layer][self.page_B, :, :, self.place_B] = k_BTKE[:, 0]
        self.answers.values_LNKSF[layer][self.page_B, :, self.place_B] = v_BTKE[:, 0]


class PromptView:
    """Reading prompts, padded on the right: keys and values go to the prompts' pages, and attention is causal."""

    def __init__(self, pool: PagePool, pages_PM: np.ndarray, lengths_P: np.ndarray) -> None:
        self.pool = pool
        self.mask_B1TS = None
        device = pool.closed_NS.device
        rows, columns = np.nonzero(pages_PM >= 0)
        self._slots_N = torch.from_numpy(rows * pages_PM.shape[1] + columns).to(device)
        self._pages_N = torch.from_numpy(pages_PM[rows, columns]).to(device)
        left_N = (lengths_P[rows] - columns * PAGE_SIZE)[:, None]
        closed_NS = np.where(np.arange(PAGE_SIZE) < left_N, 0.0, CLOSED)
        pool.closed_NS[self._pages_N] = torch.from_numpy(closed_NS).to(pool.closed_NS)
        self._width = pages_PM.shape[1] * PAGE_SIZE

    def view(self, num_tokens: int, positions_BT: Tensor | None) -> PromptView:  # noqa: ARG002 (made for these tokens)
        """Itself: a view is made for one forward pass."""
        return self

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the prompts, and give back what came."""
        self.pool.keys_LNKES[layer][self._pages_N] = self._paged(keys_BTKE).permute(0, 2, 3, 1)
        self.pool.values_LNKSF[layer][self._pages_N] = self._paged(values_BTKE).transpose(1, 2)
        return keys_BTKE, values_BTKE

    def _paged(self, x_PTKE: Tensor) -> Tensor:
        """Pages ``[N, S, K, E]`` of the prompts."""
        padded = F.pad(x_PTKE, (0, 0, 0, 0, 0, self._width - x_PTKE.shape[1]))
        return padded.unflatten(1, (-1, PAGE_SIZE)).flatten(0, 1)[self._slots_N]


def _exp(scores: Tensor) -> None:
    """Exponentials, in place, of scores less the largest.

    What would vanish beside it becomes 1e-35 in place of 0: a CPU takes thirty times as long where results underflow.
    """
    scores.clamp_(min=-80.0).exp_()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` into ``out``, which may be of a wider type."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
