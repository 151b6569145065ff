"""Context parallelism: each process holds a slice of every sequence and gathers the others' keys and values.

As in Llama 3's long-context stages (Grattafiori et al. 2024, 3.3.2). A sequence is cut into 2P chunks and process r
takes chunks r and 2P-1-r, which balances the causal attention. The mask follows from positions and document ids, which
are gathered as well, so the gathered keys need no reordering.

Dimensions: B sequences, T tokens of a slice, S tokens of all P slices, K key/value heads, E size of one head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lilpipe.model.masks import allow
from lilpipe.parallel.collectives import gather, gather_sequence

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


def head_and_tail(seq_len: int, *, part: int, num_parts: int) -> Tensor:
    """Return the positions of one slice's tokens, int64 [seq_len / num_parts]."""
    chunks = torch.arange(seq_len).chunk(2 * num_parts)
    return torch.cat([chunks[part], chunks[2 * num_parts - 1 - part]])


class GatheredSequence:
    """Keys and values of whole sequences, gathered from all processes."""

    def __init__(self, positions_BT: Tensor, documents_BT: Tensor | None, group: ProcessGroup) -> None:
        self.group = group
        self._positions = (positions_BT, gather(positions_BT, group))
        self._documents = None if documents_BT is None else (documents_BT, gather(documents_BT, group))
        self._masks: dict[int | None, Mask] = {}

    def mask(self, window: int | None) -> Mask:
        """Return the mask ``[B, 1, T, S]`` of layers with this sliding window."""
        if window not in self._masks:
            self._masks[window] = allow(*self._positions, *(self._documents or ()), window=window)
        return self._masks[window]

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Gather keys and values of all slices, ``[B, S, K, E]`` each."""
        sizes = [keys_BTKE.shape[-1], values_BTKE.shape[-1]]
        keys_BSKE, values_BSKE = gather_sequence(torch.cat([keys_BTKE, values_BTKE], dim=-1), self.group).split(
            sizes, dim=-1
        )
        return keys_BSKE, values_BSKE
