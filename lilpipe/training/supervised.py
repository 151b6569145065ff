"""The objective of supervised fine-tuning: cross-entropy of the assistant's tokens, weighted by message.

With packing, the conversations of a micro-batch fill rows as long as the longest of them by best-fit decreasing, with
little padding; attention stays within each conversation. Without packing, a row holds one conversation, and
micro-batches group similar lengths.

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
from lilpipe.training.conversation_encoding import EncodedConversation
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.replica import Loss

PADDING_DOCUMENT = -1
"""Document id of padding."""


class SupervisedTokens:
    """Batches of one data rank, and their loss."""

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
        """``watch`` is called with each step and the conversations of its micro-batches."""
        self._rows = [_shifted(example) for example in examples]
        self._weights = [None if item.weights is None else torch.tensor(item.weights[1:]) for item in examples]
        self._batch_size, self._seed, self._padding_id = batch_size, seed, padding_id
        self._rank, self._world_size, self._accumulation_steps = rank, world_size, accumulation_steps
        self._packing, self._device, self._watch = packing, device, watch

    def batches(self, step: int) -> list[TokenBatch]:
        """Return the micro-batches of a step for this data rank."""
        rows = rows_of_step(step, num_rows=len(self._rows), batch_size=self._batch_size, seed=self._seed)
        order = sorted(range(len(rows)), key=lambda number: len(self._rows[rows[number]][0]))
        mine = order[self._rank :: self._world_size]  # ranks get similar lengths
        parts = self._micro_batches(mine)
        layouts = [self._layout([(number, len(self._rows[rows[number]][0])) for number in part]) for part in parts]
        if self._watch:
            self._watch(step, layouts)
        return [self._collate(rows, layout) for layout in layouts]

    def loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """Return the cross-entropy, summed over the supervised tokens, each times its weight.

        It is averaged over the sum of the weights, as in ``torch.nn.functional.cross_entropy``.
        """
        num_tokens, weights_BT = batch.extra
        if weights_BT is None:
            return Loss(-scores.logprobs.sum(), count=int((batch.targets >= 0).sum()), num_tokens=num_tokens)
        rows, columns = weights_BT.shape  # the scores may be padded
        logprobs_BT = scores.logprobs[:rows, :columns]
        return Loss(-(logprobs_BT * weights_BT).sum(), count=weights_BT.sum().item(), num_tokens=num_tokens)

    def _micro_batches(self, numbers: list[int]) -> list[list[int]]:
        """Divide conversations, sorted by length: similar lengths together, or spread if they are packed."""
        if self._packing:
            return [numbers[part :: self._accumulation_steps] for part in range(self._accumulation_steps)]
        return [part.tolist() for part in np.array_split(np.array(numbers), self._accumulation_steps)]

    def _layout(self, conversations: list[tuple[int, int]]) -> Places:
        """Return the conversations of each row."""
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
        assert batch.documents is not None
        sequences = sequence_ids(batch.documents, [[number for number, _ in places] for places in layout])
        if all(len(places) == 1 for places in layout):  # padding is after the conversation, so nothing attends to it
            batch = batch._replace(documents=None, positions=None)
        parts = batch._replace(sequences=sequences)._asdict()
        return TokenBatch(
            **{name: part.to(self._device) for name, part in parts.items() if part is not None},
            extra=(num_tokens, self._weights_of(rows, layout, batch.targets.shape)),
        )

    def _weights_of(self, rows: Sequence[int], layout: Places, shape: torch.Size) -> Tensor | None:
        """Return the weights [B, T] of the targets, 0 without one; None if all are 1."""
        if all(self._weights[rows[number]] is None for places in layout for number, _ in places):
            return None
        weights_BT = torch.zeros(shape)
        for row, places in enumerate(layout):
            start = 0
            for number, length in places:
                given = self._weights[rows[number]]
                targets = self._rows[rows[number]][1]
                weights_BT[row, start : start + length] = (targets >= 0).float() if given is None else given
                start += length
        return weights_BT.to(self._device)


Row = tuple[Tensor, Tensor]
"""Inputs and targets of a conversation, int64 [T - 1] each."""


def _shifted(example: EncodedConversation) -> Row:
    ids, mask = torch.tensor(example.ids), torch.tensor(example.learnt)
    return ids[:-1], ids[1:].where(mask[1:], IGNORED)


def sequence_ids(documents_BT: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """Return ``TokenBatch.sequences``, given the id of each conversation of each row; -1 at padding."""
    width = max(map(len, ids))
    table = torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
    return table.gather(1, documents_BT.clamp(min=0)).where(documents_BT >= 0, -1)


def collate(rows: Sequence[Sequence[Row]], *, padding_id: int) -> TokenBatch:
    """Concatenate the conversations of each row, and pad on the right.

    The document id is the index of the conversation in its row; padding has ``PADDING_DOCUMENT``.
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
