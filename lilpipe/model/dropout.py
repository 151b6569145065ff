"""Dropout (Srivastava et al. 2014) with counter-based random numbers.

Whether an element is dropped is a hash of the step's seed, layer, row, document, position and index in the vector, not
the next value of a random stream. So dropout is the same after a resume, under activation checkpointing, in compiled
and eager code, on every device and in every parallel layout.

The hash mixes 32 bits with multiplications and xor-shifts (as the finalizer of MurmurHash3, Appleby 2011).

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
    """Return a seed of 32 bits."""
    digest = hashlib.sha256(":".join(map(str, ("dropout", *parts))).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def token_numbers(seed: int, rows_B: Tensor, documents_BT: Tensor | None, positions_BT: Tensor) -> Tensor:
    """Return a random 32-bit number per token ``[B, T]``; positions may restart at each document."""
    rows_B1 = _mix((rows_B & _BITS) ^ seed)[:, None]
    documents = rows_B1 if documents_BT is None else _mix(rows_B1 ^ (documents_BT & _BITS))
    return _mix(documents ^ (positions_BT + 1))


def layer_numbers(tokens_BT: Tensor, layer: int) -> Tensor:
    """Return a layer's random numbers ``[2, B, T]``: for dropout after attention and after the feed-forward layer."""
    return torch.stack([_mix(tokens_BT ^ (2 * layer + place + 1)) for place in range(2)])


def dropout(x_BTD: Tensor, numbers_BT: Tensor, rate: float, *, first: int = 0) -> Tensor:
    """Set a fraction ``rate`` of the elements to zero and scale the others by 1 / (1 - rate).

    ``first`` is the index of the first element in the whole vector, if ``x_BTD`` is a shard.
    """
    elements_D = _mix(torch.arange(first + 1, first + x_BTD.shape[-1] + 1, device=x_BTD.device))
    bits_BTD = ((numbers_BT[..., None] ^ elements_D) * _FIRST) & _BITS
    bits_BTD = ((bits_BTD ^ (bits_BTD >> 15)) * _SECOND) & _BITS
    return (x_BTD * (1 / (1 - rate))).where(bits_BTD >= int(rate * (_BITS + 1)), 0.0)


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits to 32 bits; a bijection."""
    x = ((x ^ (x >> 16)) * _FIRST) & _BITS
    x = ((x ^ (x >> 15)) * _SECOND) & _BITS
    return x ^ (x >> 16)
