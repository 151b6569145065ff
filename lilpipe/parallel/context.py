"""Context parallelism: each process holds a part of every sequence and gathers the keys and values of the others.

So do Llama 3's long stages (Grattafiori et al. 2024, 3.3.2). A sequence is cut into 2P chunks and process r takes
chunks r and 2P-1-r, so that all have about the same causal attention to compute. What a token may attend to follows
from positions and documents, which are gathered as well, so the gathered keys need not be put in order.

Dimensions: B sequences, T tokens of a part, S tokens of all P parts, K key/value heads, E size of one head.
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
    """Positions in the sequence of the tokens of one part, int64 [seq_len / num_parts]."""
    chunks = torch.arange(seq_len).chunk(2 * num_parts)
    return torch.cat([chunks[part], chunks[2 * num_parts - 1 - part]])


class GatheredSequence:
    """The keys and values of whole sequences, of which this process makes a part."""

    def __init__(self, positions_BT: Tensor, documents_BT: Tensor | None, group: ProcessGroup) -> None:
        self.group = group
        documents_BS = None if documents_BT is None else gather(documents_BT, group)
        self.mask_B1TS: Mask | None = allow(positions_BT, gather(positions_BT, group), documents_BT, documents_BS)

    def update(self, layer: int, keys_BTKE: Tensor, values_BTKE: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Keys and values of this part to those of all parts, ``[B, S, K, E]`` each."""
        sizes = [keys_BTKE.shape[-1], values_BTKE.shape[-1]]
        keys_BSKE, values_BSKE = gather_sequence(torch.cat([keys_BTKE, values_BTKE], dim=-1), self.group).split(
            sizes, dim=-1
        )
        return keys_BSKE, values_BSKE
