"""The objective of supervised fine-tuning: the likelihood of the assistant's tokens.

In a micro-batch whole conversations fill rows as wide as the longest of them by best-fit decreasing, so that little is
padding; attention stays inside each. Without packing a row holds one, and a micro-batch those of like lengths.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lilpipe.model.neftune import Places
from lilpipe.model.scores import IGNORED, Scores
from lilpipe.schemas.order import rows_of_step
from lilpipe.tokens.packing import best_fit
from lilpipe.training.conversations import EncodedConversation
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.replica import Loss

PADDING_DOCUMENT = -1
"""Number of what is no conversation."""


class SupervisedTokens:
    """The conversations of one data rank, step by step, and their loss."""

    def __init__(
        self,
        examples: Sequence[EncodedConversation],
        *,
        batch_size: int,
        seed: int,
        padding_id: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        packing: bool = True,
        device: torch.device | None = None,
        watch: Callable[[int, list[Places]], None] | None = None,
    ) -> None:
        """``watch`` is told what a step's micro-batches hold."""
        self._rows = [_shifted(example) for example in examples]
        self._batch_size, self._seed, self._padding_id = batch_size, seed, padding_id
        self._rank, self._world_size, self._accumulation_steps = rank, world_size, accumulation_steps
        self._packing, self._device, self._watch = packing, device, watch

    def batches(self, step: int) -> list[TokenBatch]:
        """The micro-batches of a step for this data rank."""
        rows = rows_of_step(step, num_rows=len(self._rows), batch_size=self._batch_size, seed=self._seed)
        order = sorted(range(len(rows)), key=lambda number: len(self._rows[rows[number]][0]))
        mine = order[self._rank :: self._world_size]  # ranks get rows of like lengths
        parts = self._micro_batches(mine)
        layouts = [self._layout([(number, len(self._rows[rows[number]][0])) for number in part]) for part in parts]
        if self._watch:
            self._watch(step, layouts)
        return [self._collate(rows, layout) for layout in layouts]

    def loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """Cross-entropy, summed over the supervised tokens."""
        return Loss(-scores.logprobs.sum(), count=int((batch.targets >= 0).sum()), num_tokens=batch.extra)

    def _micro_batches(self, numbers: list[int]) -> list[list[int]]:
        """Conversations in order of length divided: like lengths together, or apart where they are packed."""
        if self._packing:
            return [numbers[part :: self._accumulation_steps] for part in range(self._accumulation_steps)]
        return [part.tolist() for part in np.array_split(np.array(numbers), self._accumulation_steps)]

    def _layout(self, conversations: list[tuple[int, int]]) -> Places:
        """Which conversations each row holds."""
        if not self._packing:
            return [[item] for item in conversations]
        lengths = np.array([length for _, length in conversations])
        row_of = best_fit(lengths, capacity=int(lengths.max()))
        rows: Places = [[] for _ in range(int(row_of.max()) + 1)]
        for item, row in zip(conversations, row_of.tolist(), strict=True):
            rows[row].append(item)
        return rows

    def _collate(self, rows: Sequence[int], layout: Places) -> TokenBatch:
        batch = collate([[self._rows[rows[n]] for n, _ in places] for places in layout], padding_id=self._padding_id)
        num_tokens = sum(length + 1 for places in layout for _, length in places)
        if all(len(places) == 1 for places in layout):  # what pads a row stands behind all that could see it
            batch = batch._replace(documents=None, positions=None)
        documents, positions = (
            None if part is None else part.to(self._device) for part in (batch.documents, batch.positions)
        )
        return TokenBatch(
            batch.inputs.to(self._device), batch.targets.to(self._device), documents, positions, extra=num_tokens
        )


Row = tuple[Tensor, Tensor]
"""A conversation's inputs and targets, int64 [T - 1] each."""


def _shifted(example: EncodedConversation) -> Row:
    ids, mask = torch.tensor(example.ids), torch.tensor(example.mask)
    return ids[:-1], ids[1:].where(mask[1:], IGNORED)


def collate(rows: Sequence[Sequence[Row]], *, padding_id: int) -> TokenBatch:
    """Rows of conversations one after the other, padded on the right.

    A conversation's number in its row is its document, and that of padding ``PADDING_DOCUMENT``.
    """
    num_tokens = max(sum(len(inputs) for inputs, _ in row) for row in rows)
    shape = (len(rows), num_tokens)
    inputs_BT, targets_BT = torch.full(shape, padding_id), torch.full(shape, IGNORED)
    documents_BT, positions_BT = torch.full(shape, PADDING_DOCUMENT), torch.zeros(shape, dtype=torch.long)
    places = torch.arange(num_tokens)
    for number, row in enumerate(rows):
        start = 0
        for document, (inputs, targets) in enumerate(row):
            part = slice(start, start + len(inputs))
            inputs_BT[number, part], targets_BT[number, part] = inputs, targets
            documents_BT[number, part], positions_BT[number, part] = document, places[: len(inputs)]
            start = part.stop
    return TokenBatch(inputs_BT, targets_BT, documents_BT, positions_BT)
