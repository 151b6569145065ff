"""Dropout (Srivastava et al. 2014) whose draws are a hash of where they stand, not the next of a random stream.

An element is dropped by the step's seed, its layer, row, document, position and number in the vector. So a resumed
run draws what an uninterrupted one does, a recomputed block what it drew first, compiled code what eager code does,
and the draws depend neither on the device nor on which process holds the row.

The hash mixes 32 bits by multiplication and shifted exclusive or (as in MurmurHash3's finaliser, Appleby 2011).

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF
# Odd and below 2**31, so that the product with 32 bits fits in an int64.
_FIRST, _SECOND = 0x45D9F3B5, 0x6C8E9CF5


def dropout_seed(*parts: int) -> int:
    """A seed of 32 bits."""
    digest = hashlib.sha256(":".join(map(str, ("dropout", *parts))).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def token_numbers(seed: int, rows_B: Tensor, documents_BT: Tensor | None, positions_BT: Tensor) -> Tensor:
    """A random number of 32 bits for each token ``[B, T]``; positions may begin anew in each document."""
    rows_B1 = _mix((rows_B & _BITS) ^ seed)[:, None]
    documents = rows_B1 if documents_BT is None else _mix(rows_B1 ^ (documents_BT & _BITS))
    return _mix(documents ^ (positions_BT + 1))


def layer_numbers(tokens_BT: Tensor, layer: int) -> Tensor:
    """Random numbers of the tokens at a layer's two places, after attention and after feed-forward: ``[2, B, T]``."""
    return torch.stack([_mix(tokens_BT ^ (2 * layer + place + 1)) for place in range(2)])


def dropout(x_BTD: Tensor, numbers_BT: Tensor, rate: float) -> Tensor:
    """Set the share ``rate`` of the elements to zero and scale up the others."""
    elements_D = _mix(torch.arange(1, x_BTD.shape[-1] + 1, device=x_BTD.device))
    bits_BTD = ((numbers_BT[..., None] ^ elements_D) * _FIRST) & _BITS
    bits_BTD = ((bits_BTD ^ (bits_BTD >> 15)) * _SECOND) & _BITS
    return (x_BTD * (1 / (1 - rate))).where(bits_BTD >= int(rate * (_BITS + 1)), 0.0)


def _mix(x: Tensor) -> Tensor:
    """32 bits to 32 bits, one to one, each depending on all."""
    x = ((x ^ (x >> 16)) * _FIRST) & _BITS
    x = ((x ^ (x >> 15)) * _SECOND) & _BITS
    return x ^ (x >> 16)
