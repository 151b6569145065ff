"""How likely each target token is: all that any objective here needs of the output layer.

Logits of a large vocabulary are most of a step's memory. Asked for scores, the model computes them a part of the
tokens at a time, and again in the backward pass, so that they are never whole.

Dimensions: B sequences, T tokens, N tokens of all of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target that counts for nothing, as ``torch.nn.functional.cross_entropy`` has it."""
LOGITS_AT_ONCE = 2**25
"""Logits that may be in memory at once: 128 MiB in float32."""


class Scores(NamedTuple):
    """Of each target, float32 [B, T] each; 0 for a target that is ``IGNORED``."""

    logprobs: Tensor
    """Log-probability given the tokens before."""
    normaliser: Tensor
    """Logarithm of the softmax's denominator."""


def token_scores(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, softcap: float | None = None) -> Scores:
    """Scores of targets under the logits ``hidden @ weight.T``; differentiable in both."""
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    num_at_once = max(1, LOGITS_AT_ONCE // len(weight_VD))
    if len(targets_N) <= num_at_once:
        parts = [_score(hidden_ND, weight_VD, targets_N, softcap)]
    else:
        parts = [
            checkpoint(_score, hidden, weight_VD, targets, softcap, use_reentrant=False)
            for hidden, targets in zip(hidden_ND.split(num_at_once), targets_N.split(num_at_once), strict=True)
        ]
    return gather_scores(parts, targets_BT)


def gather_scores(parts: Sequence[tuple[Tensor, Tensor]], targets_BT: Tensor) -> Scores:
    """Log-probabilities and normalisers of all parts, zeros where a target does not count."""
    counts_BT = targets_BT >= 0
    logprobs, normaliser = (torch.cat(column).view(targets_BT.shape) for column in zip(*parts, strict=True))
    return Scores(logprobs.where(counts_BT, 0.0), normaliser.where(counts_BT, 0.0))


def soften(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bent into +- ``cap``."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _score(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = soften(logits_NV.float() if logits_NV.dtype != torch.float64 else logits_NV, softcap)
    normaliser_N = logits_NV.logsumexp(-1)
    chosen_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return chosen_N - normaliser_N, normaliser_N
