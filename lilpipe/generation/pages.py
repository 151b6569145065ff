"""Paged KV cache (Kwon et al. 2023, "PagedAttention").

A sequence allocates a page when it needs one and frees its pages when it ends, so memory use depends on the number of
cached tokens, not on the maximum sequence length.

Dimensions: L layers, N pages, S slots of a page, K key/value heads, E width of a key, F width of a value.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.model.transformer import Transformer

PAGE_SIZE = 16
"""Number of tokens per page."""
CLOSED = -1e30
"""Added to the attention score of an empty slot. Finite, so that a page with only empty slots gives no NaN."""
GROWTH = 1.5
"""Growth factor of a pool. Growing copies all pages."""


def cache_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return the number of heads, key width and value width that one layer caches per token."""
    if config.mla is not None:
        return 1, config.mla.kv_lora_rank + config.mla.qk_rope_head_dim, 0
    return config.num_kv_heads, config.head_size, config.head_size


def pages_for(num_tokens: int) -> int:
    """Return the number of pages for ``num_tokens`` tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PagePool:
    """Pages of one kind (prompts' or completions'); the pool grows and never shrinks.

    Used pages are kept close to the front, because attention runs over the first ``extent`` pages, used or free.
    """

    def __init__(self, model: Transformer) -> None:
        weight = next(model.parameters())
        heads, key_width, value_width = cache_widths(model.config)
        num_layers = model.config.num_layers
        # Keys are stored transposed: products with queries take 0.7 of the time, which saves more than writing costs.
        self.keys_LNKES = weight.new_zeros(num_layers, 0, heads, key_width, PAGE_SIZE)
        self.values_LNKSF = weight.new_zeros(num_layers, 0, heads, PAGE_SIZE, value_width)
        self.closed_NS = torch.zeros(0, PAGE_SIZE, dtype=score_dtype(weight.dtype), device=weight.device)
        """Attention mask that is added to scores: 0 for a slot with a token, ``CLOSED`` for an empty slot."""
        self._free: list[int] = []
        self._used: set[int] = set()

    @property
    def num_used(self) -> int:
        """Number of pages in use."""
        return len(self._used)

    @property
    def extent(self) -> int:
        """Number of pages up to the last one in use."""
        return max(self._used, default=-1) + 1

    @property
    def capacity(self) -> int:
        """Number of allocated pages, used or free."""
        return self.closed_NS.shape[0]

    def reserve(self, capacity: int) -> None:
        """Allocate memory for at least ``capacity`` pages."""
        if capacity > self.capacity:
            self._grow(capacity)

    def take(self, count: int) -> list[int]:
        """Allocate ``count`` empty pages and return their numbers, the lowest free ones."""
        if count > len(self._free):
            self.reserve(max(self.num_used + count, int(GROWTH * self.capacity)))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(pages)
        return pages

    def give(self, pages: Collection[int]) -> None:
        """Free pages."""
        if not pages:
            return
        self._used.difference_update(pages)
        for page in pages:
            heapq.heappush(self._free, page)
        self.closed_NS[torch.tensor(list(pages), device=self.closed_NS.device)] = CLOSED

    def compact(self) -> dict[int, int]:
        """Move the last pages to free ones in front; returns old number → new number."""
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
    """Return the dtype of attention scores and sums: float32, or ``dtype`` if wider."""
    return torch.promote_types(dtype, torch.float32)


def _longer(tensor: Tensor, dim: int, added: int) -> Tensor:
    """Return the tensor with ``added`` zeros appended along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = added
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
