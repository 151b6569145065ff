"""Choosing the next token from logits: pure functions.

Dimensions: B sequences, V vocabulary, N tokens of one sequence.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, prompt: int, sample: int, num_tokens: int) -> Tensor:
    """The random stream of one sequence: ``[N]`` float32, uniform on [0, 1) in steps of 2**-24.

    SHAKE-128 of (seed, prompt, sample), so that a sequence's draws depend on nothing else: not on the batch it
    shares, the order of decoding, the device, nor the version of a library.
    """
    stream = hashlib.shake_128(f"sample:{seed}:{prompt}:{sample}".encode()).digest(4 * num_tokens)
    bits = np.frombuffer(stream, dtype="<u4") >> 8
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24))


def choose(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token ``[B]`` for each row, by inverting the cumulative distribution at the row's uniform number.

    ``temperature`` 0 takes the likeliest token. ``top_p`` below 1 keeps the fewest likeliest tokens whose
    probability reaches it (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if top_p == 1:
        return _invert(probs_BV.cumsum(dim=-1), uniforms_B)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    cumulative_BV = sorted_BV.cumsum(dim=-1)
    # A token stays if those before it fall short of top_p; the first always does. The last that stays is the first
    # whose cumulative probability reaches top_p, and rounding may leave none.
    num_short_B1 = (cumulative_BV < top_p).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    nucleus_B1 = cumulative_BV.gather(-1, num_short_B1)
    pick_B = _invert(cumulative_BV.clamp(max=nucleus_B1), uniforms_B)
    return order_BV.gather(-1, pick_B[:, None]).squeeze(-1)


def _invert(cumulative_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform's share of the total.

    A uniform of at most 1 - 2**-24 times the total rounds below the total, so there always is such a token, and a
    token of probability 0 is never it.
    """
    target_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
