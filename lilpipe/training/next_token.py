"""The objective of pretraining: next-token prediction.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lilpipe.config.training import PretrainConfig
from lilpipe.model.adapter_dropout import adapter_dropout
from lilpipe.model.scores import Scores
from lilpipe.tokens.loader import IGNORED, Batch, PretrainLoader
from lilpipe.training.precision import autocast
from lilpipe.training.replica import Loss


class NextToken:
    """Batches and loss of one data rank. A thread prepares the next batch during training."""

    def __init__(
        self, config: PretrainConfig, loader: PretrainLoader, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.waited = 0.0
        """Seconds that training waited for data."""
        self._config = config
        self._loader = loader
        self._rank, self._world_size, self._device = rank, world_size, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: dict[int, Future[list[Batch]]] = {}
        self._current: tuple[int, list[Batch]] = (-1, [])

    def accumulation_steps(self, step: int) -> int:
        """Return the number of micro-batches of a step."""
        return self._config.phase_of(step).accumulation_steps

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step for this data rank."""
        if step != self._current[0]:
            begun = time.perf_counter()
            coming = self._coming.pop(step, None)
            self._current = step, (coming.result() if coming else self._read(step))
            self.waited += time.perf_counter() - begun
            self._coming.clear()
            if step + 1 < self._config.num_steps:
                self._coming[step + 1] = self._thread.submit(self._read, step + 1)
        return self._current[1]

    def _read(self, step: int) -> list[Batch]:
        num_parts = self.accumulation_steps(step)
        whole = self._loader.batch(step, rank=self._rank, world_size=self._world_size)
        if self._device.type == "cuda":
            whole = Batch(*(part.pin_memory().to(self._device, non_blocking=True) for part in whole))
        return [Batch(*parts) for parts in zip(*(part.chunk(num_parts) for part in whole), strict=True)]

    def loss(self, scores: Scores, batch: Batch) -> Loss:
        """Return the cross-entropy summed over targets, plus the z-loss (Chowdhery et al. 2022, 5)."""
        total = -scores.logprobs.sum()
        if self._config.z_loss:
            total = total + self._config.z_loss * scores.normaliser.square().sum()
        return Loss(total, count=int((batch.targets != IGNORED).sum()), num_tokens=batch.targets.numel())

    def loss_of_replica(self, model: nn.Module, step: int, micro: int) -> Loss:
        """Return the loss of a micro-batch for a model that this worker holds whole."""
        batch = self.batches(step)[micro]
        options: dict[str, Tensor] = {"targets_BT": batch.targets}
        if self._config.intra_document_masking:
            options["documents_BT"] = batch.documents
        first, num_rows = micro * len(batch.inputs), len(batch.inputs)
        rows_B = rows_of(first, num_rows, rank=self._rank, world_size=self._world_size).to(self._device)
        if self._config.model.dropout:
            options["rows_B"] = rows_B
        sequences_BT = rows_B[:, None].expand_as(batch.inputs)
        options |= adapter_dropout(self._config.lora, sequences_BT, self._config.seed or 0, step)
        with autocast(self._config.precision, self._device):
            scores = model(batch.inputs, **options)
        return self.loss(scores, batch)


def rows_of(first: int, num_rows: int, *, rank: int, world_size: int) -> Tensor:
    """Return the indices in the step's global batch of a data rank's rows from ``first`` on, as row ids for dropout."""
    return rank + world_size * torch.arange(first, first + num_rows)
