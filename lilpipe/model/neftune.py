"""NEFTune: uniform noise on the embeddings in fine-tuning (Jain et al. 2023).

Each number of a conversation of T tokens and width D gets noise within +- alpha / sqrt(T D). It is drawn for a
conversation's number in its step, so that neither packing nor the workers' number changes it.

Dimensions: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed

Places = list[list[tuple[int, int]]]
"""For each row of a batch its conversations: number in the step, and length."""


class EmbeddingNoise:
    """Noise on the embeddings of a model in training; the forward passes to come must be ``expect``ed."""

    def __init__(self, *, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._step = 0
        self._coming: deque[Places] = deque()

    def install(self, model: Transformer) -> None:
        """Add noise to what the model's embedding gives."""
        assert model.model.embed_tokens is not None
        model.model.embed_tokens.register_forward_hook(self._add)

    def expect(self, step: int, batches: list[Places]) -> None:
        """Say what the micro-batches of a step hold, in the order in which they go through the model."""
        self._step, self._coming = step, deque(batches)

    def _add(self, module: nn.Module, arguments: Any, embedded_BTD: Tensor) -> Tensor:  # noqa: ARG002
        if not module.training:
            return embedded_BTD
        noise_BTD = torch.zeros(embedded_BTD.shape)
        for row, places in enumerate(self._coming.popleft()):
            start = 0
            for number, length in places:
                generator = torch.Generator().manual_seed(derive_seed(self._seed, "neftune", self._step, number))
                shape = (length, embedded_BTD.shape[-1])
                bound = self._alpha / math.sqrt(math.prod(shape))
                noise_BTD[row, start : start + length] = bound * (2 * torch.rand(shape, generator=generator) - 1)
                start += length
        return embedded_BTD + noise_BTD.to(embedded_BTD)
