"""Log-probabilities of target tokens, without materializing the logits: a chunked linear cross-entropy.

For a large vocabulary, logits take most of a step's memory. The scores are computed for chunks of tokens, so that the
logits of all tokens never exist at once; for a large batch the backward pass recomputes them. The gradient is written
by hand (softmax minus one-hot target), so that all passes but one over a chunk's logits are in place.

Dimensions: B sequences, T tokens, N tokens (all or a chunk), K tokens with a target, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Ignore index, as in ``torch.nn.functional.cross_entropy``: targets without a loss."""
LOGITS_AT_ONCE = 2**25
"""Most logits in memory at once: 128 MiB in float32. Exceeded if ``LEAST_TOKENS`` requires it."""
LOGITS_IN_CACHE = 2**20
"""Logits of a chunk on a CPU, 4 MiB in float32. With a quarter of it the matrix products took 15 % longer; with four
times as much the elementwise operations did."""
LEAST_TOKENS = {"cpu": 128, "cuda": 2048}
"""Minimum tokens of a chunk for any vocabulary; smaller chunks spend the time reading the weights."""


class Scores(NamedTuple):
    """Scores of each target, float32 [B, T]; 0 where the target is ``IGNORED``."""

    logprobs: Tensor
    """Log-probability given the tokens before."""
    normaliser: Tensor
    """Log of the softmax denominator (log-sum-exp of the logits)."""


def token_scores(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    softcap: float | None = None,
    compiled: bool = False,
) -> Scores:
    """Return scores of targets under the logits ``hidden @ weight.T``; differentiable once.

    Scores are float64 if the hidden states are. ``compiled`` fuses the passes over a chunk's logits. Without it, tokens
    without a target, such as prompts and padding, skip the output layer.
    """
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_BTD, weight_VD = hidden_BTD.to(dtype), weight_VD.to(dtype)
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    if not compiled and len(scored_K := (targets_N >= 0).nonzero()[:, 0]) < len(targets_N):
        parts = _Scores.apply(hidden_ND[scored_K], weight_VD, targets_N[scored_K], softcap, compiled)
        whole = (part.new_zeros(targets_N.shape).index_copy(0, scored_K, part) for part in parts)
        return Scores(*(column.view(targets_BT.shape) for column in whole))
    return gather_scores([_Scores.apply(hidden_ND, weight_VD, targets_N.clamp(min=0), softcap, compiled)], targets_BT)


def gather_scores(parts: Sequence[tuple[Tensor, Tensor]], targets_BT: Tensor) -> Scores:
    """Concatenate the scores of all chunks; 0 where the target is ignored."""
    counts_BT = targets_BT >= 0
    logprobs, normaliser = (torch.cat(column).view(targets_BT.shape) for column in zip(*parts, strict=True))
    return Scores(logprobs.where(counts_BT, 0.0), normaliser.where(counts_BT, 0.0))


def soften(logits: Tensor, cap: float | None) -> Tensor:
    """Softcap logits to +- ``cap``."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class PartScores(NamedTuple):
    """Softmax of a chunk of tokens, as needed for its gradient."""

    logprobs_N: Tensor
    normaliser_N: Tensor
    exponentials_NV: Tensor
    """Exponentials of the softcapped logits minus their maximum, times the derivative of the softcap."""
    sums_N: Tensor
    """Sum of the exponentials, without that derivative."""
    target_slopes_N: Tensor
    """Derivative of the softcap at the target."""


def score_part(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None) -> PartScores:
    """Score a chunk of targets, with logits and sums in float32 (float64 if the hidden states are)."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = soften(logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float(), softcap)
    chosen_N = _at(logits_NV, targets_N)
    slopes_NV = None if softcap is None else 1 - (logits_NV / softcap).square()
    largest_N = logits_NV.amax(-1)
    exponentials_NV = logits_NV.sub_(largest_N[:, None]).exp_()
    sums_N = exponentials_NV.sum(-1)
    normaliser_N = sums_N.log() + largest_N
    if slopes_NV is None:
        target_slopes_N = torch.ones_like(sums_N)
    else:
        target_slopes_N = _at(slopes_NV, targets_N)
        exponentials_NV.mul_(slopes_NV)
    return PartScores(chosen_N - normaliser_N, normaliser_N, exponentials_NV, sums_N, target_slopes_N)


def logits_gradient(part: PartScores, targets_N: Tensor, logprob_grad_N: Tensor, normaliser_grad_N: Tensor) -> Tensor:
    """Return the gradient ``[N, V]`` with respect to the logits before the softcap."""
    factor_N = (normaliser_grad_N - logprob_grad_N) / part.sums_N
    gradient_NV = part.exponentials_NV * factor_N[:, None]
    at_target_N = logprob_grad_N * part.target_slopes_N
    return gradient_NV.scatter_add_(1, targets_N[:, None], at_target_N[:, None])


class _Scores(torch.autograd.Function):
    """Scores by chunks. Chunks are kept for the backward pass if all logits fit in ``LOGITS_AT_ONCE``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocab_size = len(targets_N), len(weight_VD)
        ctx.num_at_once, ctx.softcap, ctx.compiled = tokens_at_once(vocab_size, hidden_ND.device), softcap, compiled
        keep = any(ctx.needs_input_grad) and num_tokens * vocab_size <= LOGITS_AT_ONCE
        score = _compiled(score_part) if compiled else score_part
        ctx.parts, columns = [], []
        for hidden, targets in zip(hidden_ND.split(ctx.num_at_once), targets_N.split(ctx.num_at_once), strict=True):
            part = score(hidden, weight_VD, targets, softcap)
            columns.append((part.logprobs_N, part.normaliser_N))
            if keep:
                ctx.parts.append(part)
            del part
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        logprobs, normalisers = zip(*columns, strict=True)
        return torch.cat(logprobs), torch.cat(normalisers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logprob_grad_N, normaliser_grad_N = grads_N
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        score = _compiled(score_part) if ctx.compiled else score_part
        gradient = _compiled(logits_gradient) if ctx.compiled else logits_gradient
        hidden_grad_ND = torch.empty_like(hidden_ND)
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=logprob_grad_N.dtype)  # chunks are summed in float32
        by_token = (hidden_ND, targets_N, logprob_grad_N, normaliser_grad_N, hidden_grad_ND)
        rows = zip(*(tensor.split(ctx.num_at_once) for tensor in by_token), strict=True)
        for number, (hidden, targets, logprob_grad, normaliser_grad, hidden_grad) in enumerate(rows):
            part = ctx.parts[number] if ctx.parts else score(hidden, weight_VD, targets, ctx.softcap)
            gradient_NV = gradient(part, targets, logprob_grad, normaliser_grad).to(hidden.dtype)
            torch.mm(gradient_NV, weight_VD, out=hidden_grad)
            if weight_grad_VD.dtype == hidden.dtype:
                weight_grad_VD.addmm_(gradient_NV.t(), hidden)
            else:
                weight_grad_VD.add_(gradient_NV.t() @ hidden)
        return hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype), None, None, None


def tokens_at_once(vocab_size: int, device: torch.device) -> int:
    """Return tokens per chunk: on a CPU as many as fit in its caches, elsewhere limited by memory."""
    if device.type == "cpu":
        return max(LEAST_TOKENS["cpu"], LOGITS_IN_CACHE // vocab_size)
    return max(LEAST_TOKENS["cuda"], LOGITS_AT_ONCE // vocab_size)


def _at(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.gather(1, targets_N[:, None])[:, 0]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
