"""Keys and values in pages of a few tokens (Kwon et al. 2023, "PagedAttention").

A sequence takes a page when it needs one and gives it back when it ends, so that memory follows the tokens that are
there and not the longest that might come.

Dimensions: L layers, N pages, S places of a page, K key/value heads, E width of a key, F width of a value.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.model.transformer import Transformer

PAGE_SIZE = 16
"""Tokens of a page."""
CLOSED = -1e30
"""Added to the score of a place that holds nothing: finite, so that a page without any gives no NaN."""
GROWTH = 1.5
"""Pages are added to a pool by this factor, each time with a copy of all."""


def cache_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Heads, width of a key and width of a value that one layer's cache holds of a token."""
    if config.mla is not None:
        return 1, config.mla.kv_lora_rank + config.mla.qk_rope_head_dim, 0
    return config.num_kv_heads, config.head_size, config.head_size


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PagePool:
    """Pages of one kind, as many as were ever needed at once.

    Those in use lie close to the front: attention goes over the first ``extent`` pages, whether they are in use or
    not.
    """

    def __init__(self, model: Transformer) -> None:
        weight = next(model.parameters())
        heads, key_width, value_width = cache_widths(model.config)
        num_layers = model.config.num_layers
        # Keys lie turned: products with queries took 0.7 of the time, and writing a token costs less than that gain.
        self.keys_LNKES = weight.new_zeros(num_layers, 0, heads, key_width, PAGE_SIZE)
        self.values_LNKSF = weight.new_zeros(num_layers, 0, heads, PAGE_SIZE, value_width)
        self.closed_NS = torch.zeros(0, PAGE_SIZE, dtype=score_dtype(weight.dtype), device=weight.device)
        """What is added to scores: 0 where a place holds a token, else ``CLOSED``."""
        self._free: list[int] = []
        self._used: set[int] = set()

    @property
    def num_used(self) -> int:
        """Pages in use."""
        return len(self._used)

    @property
    def extent(self) -> int:
        """Pages from the first to the last in use."""
        return max(self._used, default=-1) + 1

    @property
    def capacity(self) -> int:
        """Pages that there is memory for."""
        return self.closed_NS.shape[0]

    def reserve(self, capacity: int) -> None:
        """Have memory for so many pages."""
        if capacity > self.capacity:
            self._grow(capacity)

    def take(self, count: int) -> list[int]:
        """Numbers of ``count`` pages, the lowest that are free; their places are closed."""
        if count > len(self._free):
            self.reserve(max(self.num_used + count, int(GROWTH * self.capacity)))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(pages)
        return pages

    def give(self, pages: Collection[int]) -> None:
        """Take pages back."""
        if not pages:
            return
        self._used.difference_update(pages)
        for page in pages:
            heapq.heappush(self._free, page)
        self.closed_NS[torch.tensor(list(pages), device=self.closed_NS.device)] = CLOSED

    def compact(self) -> dict[int, int]:
        """Move the last pages into free ones in front; gives the new number of each that was moved."""
        sources = [page for page in self._used if page >= self.num_used]
        targets = sorted(page for page in self._free if page < self.num_used)
        if not sources:
            return {}
        from_M, to_M = torch.tensor([sources, targets], device=self.closed_NS.device)
        for pool_LN in (self.keys_LNKES, self.values_LNKSF):
            pool_LN.index_copy_(1, to_M, pool_LN.index_select(1, from_M))
        self.closed_NS[to_M] = self.closed_NS[from_M]
        self.closed_NS[from_M] = CLOSED
        self._replace(sources, targets)
        return dict(zip(sources, targets, strict=True))

    def _replace(self, sources: Iterable[int], targets: Iterable[int]) -> None:
        self._used = self._used.difference(sources).union(targets)
        self._free = [page for page in range(self.capacity) if page not in self._used]

    def _grow(self, capacity: int) -> None:
        added = capacity - self.capacity
        for page in range(self.capacity, capacity):
            heapq.heappush(self._free, page)
        self.keys_LNKES = _longer(self.keys_LNKES, 1, added)
        self.values_LNKSF = _longer(self.values_LNKSF, 1, added)
        more = self.closed_NS.new_full((added, PAGE_SIZE), CLOSED)
        self.closed_NS = torch.cat([self.closed_NS, more])


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are computed in: float32, or what is wider."""
    return torch.promote_types(dtype, torch.float32)


def _longer(tensor: Tensor, dim: int, added: int) -> Tensor:
    """The tensor with zeros behind it."""
    shape = list(tensor.shape)
    shape[dim] = added
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
