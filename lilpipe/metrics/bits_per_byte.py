"""Bits per byte: a loss that does not depend on the tokenizer.

It is the negative log-likelihood of the validation tokens in bits, divided by the number of bytes of their text. It
compares models with different vocabularies; perplexity per token does not.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 32


def bits_per_byte(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, num_bytes: int) -> float:
    """Return the bits per byte of ``targets_BT`` given ``inputs_BT``; targets below 0 are ignored.

    ``num_bytes`` is the number of bytes of text of the targets that are not ignored. Without rows the result is 0: a
    worker may have no rows, and the results of all workers are summed.
    """
    return nats(model, inputs_BT, targets_BT) / math.log(2) / num_bytes


@torch.no_grad()
def nats(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> float:
    """Return the summed negative log-likelihood of the targets in nats; targets below 0 are ignored."""
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in zip(inputs_BT.split(ROWS_AT_ONCE), targets_BT.split(ROWS_AT_ONCE), strict=True):
        if len(inputs):
            total -= model(inputs, targets_BT=targets).logprobs.double().sum().cpu()
    return total.item()
