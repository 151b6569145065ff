"""NEFTune: uniform noise on the embeddings in fine-tuning (Jain et al. 2023).

Each embedding element of a conversation of T tokens and width D gets uniform noise within +- alpha / sqrt(T D). The
noise is seeded by the conversation's index in its step, so packing and the parallel layout do not change it. Where
tensor parallelism shards the embeddings along T, each worker adds its shard of the same noise.

Dimensions: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, nn

from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed

Places = list[list[tuple[int, int]]]
"""Per row of a batch: the index in the step and the length of each conversation."""


class EmbeddingNoise:
    """Forward hook that adds noise to embeddings in training. Announce each step's forward passes with ``expect``."""

    def __init__(self, *, alpha: float, seed: int, part: int = 0) -> None:
        """``part`` is the index of this worker's shard of the embeddings along T."""
        self._alpha, self._seed, self._part = alpha, seed, part
        self._step = 0
        self._coming: deque[Places] = deque()

    def install(self, model: Transformer) -> None:
        """Add the hook to the embedding; only a pipeline's first stage has one."""
        if model.part.first:
            assert model.model.embed_tokens is not None
            model.model.embed_tokens.register_forward_hook(self._add)

    def expect(self, step: int, batches: list[Places]) -> None:
        """Set the conversations of the step's micro-batches, in the order of their forward passes."""
        self._step, self._coming = step, deque(batches)

    def _add(self, module: nn.Module, arguments: tuple[Tensor], embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        num_rows, num_tokens, size = embedded_BTD.shape
        noise_BTD = self._noise(num_rows, arguments[0].shape[1], size)
        noise_BTD = noise_BTD.narrow(1, self._part * num_tokens, num_tokens)
        return embedded_BTD + noise_BTD.to(embedded_BTD)

    def _noise(self, num_rows: int, num_tokens: int, size: int) -> Tensor:
        """Return noise for whole rows, ``[B, T, D]``; 0 at padding."""
        noise_BTD = torch.zeros(num_rows, num_tokens, size)
        for row, places in enumerate(self._coming.popleft()):
            start = 0
            for number, length in places:
                generator = torch.Generator().manual_seed(derive_seed(self._seed, "neftune", self._step, number))
                shape = (length, size)
                bound = self._alpha / math.sqrt(math.prod(shape))
                noise_BTD[row, start : start + length] = bound * (2 * torch.rand(shape, generator=generator) - 1)
                start += length
        return noise_BTD
