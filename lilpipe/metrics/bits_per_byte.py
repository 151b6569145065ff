"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

The negative log-likelihood of the validation tokens in bits, over the bytes of text that they stand for. Two models
with different vocabularies can be compared by it; perplexities per token cannot.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 32


def bits_per_byte(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, num_bytes: int) -> float:
    """Bits per byte of ``targets_BT`` given ``inputs_BT``; targets below 0 do not count.

    ``num_bytes`` is the number of bytes of text behind the targets that count. No rows are 0 bits: a
    worker's share may be empty, and the shares of all add up.
    """
    return nats(model, inputs_BT, targets_BT) / math.log(2) / num_bytes


@torch.no_grad()
def nats(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> float:
    """Negative log-likelihood of all targets in nats; targets below 0 do not count."""
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in zip(inputs_BT.split(ROWS_AT_ONCE), targets_BT.split(ROWS_AT_ONCE), strict=True):
        if len(inputs):
            total -= model(inputs, targets_BT=targets).logprobs.double().sum().cpu()
    return total.item()
