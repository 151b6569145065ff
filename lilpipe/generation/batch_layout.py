"""Which rows of a batch attend to which pages, for ``lilpipe.generation.paged_attention``.

Dimensions: B rows, N pages, K key/value heads, G query heads of a key/value head (H = K x G), R rows that share a
prompt, C blocks of G queries, M pages of a row, Q rows and heads (B x H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.generation.pages import PAGE_SIZE


@dataclass
class BatchLayout:
    """Which rows attend to which pages. It is valid while no row enters, leaves or starts a page."""

    num_rows: int
    num_answer_pages: int
    num_prompt_pages: int
    sharing: int
    """Maximum number of rows that share a prompt (R), rounded."""
    blocks_C: Tensor
    """For each block of queries (completions' pages first), its index among the rows' [B x K] blocks."""
    partials_QM: Tensor
    """For each row and head [Q = B x H], the indices of the partial results [C x G] to merge.

    The last index refers to an empty result.
    """
    tables_BM: tuple[Tensor, Tensor]
    """Pages of each row, of completions and of prompts; 0 where a row has fewer."""
    seen_BM: tuple[Tensor, Tensor]
    """Where the tables contain a page."""
    readers_NR: tuple[Tensor, Tensor]
    """Rows that attend to each page, of completions (R = 1) and of prompts."""
    starts_N: tuple[Tensor, Tensor]
    """Position of the first slot of each page."""


def layout(
    answers_BM: np.ndarray,
    prompts_BM: np.ndarray,
    config: ModelConfig,
    device: torch.device,
    round_up: Callable[[int], int] = int,
    *,
    prompt_lengths_B: np.ndarray | None = None,
) -> BatchLayout:
    """Return the layout of rows with these pages; the tables contain -1 where a row has fewer.

    ``round_up`` rounds the counts; the pools must have that many pages. Sliding windows require ``prompt_lengths_B``.
    """
    num_rows, heads = len(answers_BM), config.num_heads
    kv_heads = 1 if config.mla is not None else config.num_kv_heads
    tables = (answers_BM, prompts_BM)
    num_answer_pages, num_prompt_pages = (round_up(int(table.max(initial=-1)) + 1) for table in tables)
    member_B, sharing = _members(prompts_BM[:, 0])
    sharing = round_up(sharing)
    owner_N, answer_start_N = np.zeros((2, num_answer_pages), dtype=np.int64)
    rows, columns = np.nonzero(answers_BM >= 0)
    owner_N[answers_BM[rows, columns]] = rows
    lengths_B = np.zeros(num_rows, dtype=np.int64) if prompt_lengths_B is None else prompt_lengths_B
    answer_start_N[answers_BM[rows, columns]] = lengths_B[rows] + columns * PAGE_SIZE
    sharer_NR = np.zeros((num_prompt_pages, sharing), dtype=np.int64)
    prompt_start_N = np.zeros(num_prompt_pages, dtype=np.int64)
    rows, columns = np.nonzero(prompts_BM >= 0)
    sharer_NR[prompts_BM[rows, columns], member_B[rows]] = rows
    prompt_start_N[prompts_BM[rows, columns]] = columns * PAGE_SIZE
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

    return BatchLayout(
        num_rows=num_rows,
        num_answer_pages=num_answer_pages,
        num_prompt_pages=num_prompt_pages,
        sharing=sharing,
        blocks_C=put(blocks_C),
        partials_QM=put(partials_BHM.reshape(num_rows * heads, -1)),
        tables_BM=(put(np.maximum(tables[0], 0)), put(np.maximum(tables[1], 0))),
        seen_BM=(put(tables[0] >= 0), put(tables[1] >= 0)),
        readers_NR=(put(owner_N[:, None]), put(sharer_NR)),
        starts_N=(put(answer_start_N), put(prompt_start_N)),
    )


def _members(prompt_B: np.ndarray) -> tuple[np.ndarray, int]:
    """Return each row's number among the rows of its prompt, and the maximum number of rows per prompt."""
    order = np.argsort(prompt_B, kind="stable")
    ordered = prompt_B[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(ordered)])
    members = np.empty(len(prompt_B), dtype=np.int64)
    members[order] = np.arange(len(ordered)) - np.repeat(starts, counts)
    return members, int(counts[ordered[starts] >= 0].max(initial=1))
