"""NEFTune: uniform noise on the embeddings in fine-tuning (Jain et al. 2023).

Each number of a conversation of T tokens and width D gets noise within +- alpha / sqrt(T D). It is drawn for a
conversation's number in its step, so that neither packing nor the layout of the workers changes it. Where tensor
parallelism gives each worker a part of every row's embeddings, each adds its part of the same noise.

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
"""For each row of a batch its conversations: number in the step, and length."""


class EmbeddingNoise:
    """Noise on the embeddings of a model in training; the forward passes to come must be ``expect``ed."""

    def __init__(self, *, alpha: float, seed: int, part: int = 0) -> None:
        """``part``: which part of the rows' embeddings this worker has, where they are cut along T."""
        self._alpha, self._seed, self._part = alpha, seed, part
        self._step = 0
        self._coming: deque[Places] = deque()

    def install(self, model: Transformer) -> None:
        """Add noise to what the model's embedding gives; of a pipeline's stages the first alone has use for it."""
        if model.part.first:
            assert model.model.embed_tokens is not None
            model.model.embed_tokens.register_forward_hook(self._add)

    def expect(self, step: int, batches: list[Places]) -> None:
        """Say what the micro-batches of a step hold, in the order in which they go through the model."""
        self._step, self._coming = step, deque(batches)

    def _add(self, module: nn.Module, arguments: tuple[Tensor], embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        num_rows, num_tokens, size = embedded_BTD.shape
        noise_BTD = self._noise(num_rows, arguments[0].shape[1], size)
        noise_BTD = noise_BTD.narrow(1, self._part * num_tokens, num_tokens)
        return embedded_BTD + noise_BTD.to(embedded_BTD)

    def _noise(self, num_rows: int, num_tokens: int, size: int) -> Tensor:
        """What whole rows get, ``[B, T, D]``: padding gets zeros."""
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
