"""Sampling the next token from logits: pure functions.

The result for a row does not depend on the other rows of the batch.

Dimensions: B sequences, V vocabulary, N tokens of one sequence, C candidates, W tokens of a block.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.generation.requests import SamplingParams

BLOCK = 64
"""Number of tokens whose probabilities are summed as one block."""
CANDIDATES = (64, 1024)
"""Numbers of most likely tokens to try before sorting the whole vocabulary, which takes ten times as long."""


def uniforms(seed: int, prompt: int, sample: int, num_tokens: int) -> Tensor:
    """Return the random numbers of one sequence: ``[N]`` float32, uniform on [0, 1) in steps of 2**-24.

    They are SHAKE-128 of (seed, prompt, sample), so they depend on nothing else: not on the batch, the order of
    decoding, the device or library versions.
    """
    stream = hashlib.shake_128(f"sample:{seed}:{prompt}:{sample}".encode()).digest(4 * num_tokens)
    bits = np.frombuffer(stream, dtype="<u4") >> 8
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24))


def draw(
    logits_BV: Tensor, uniforms_B: Tensor, params: SamplingParams, seen_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row.

    Returns the token ids ``[B]`` and their log-probabilities ``[B]`` at temperature 1, before the repetition penalty
    and filters. ``seen_BV`` is True for tokens that the repetition penalty applies to.
    """
    largest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - largest_B1).exp_()
    blocks_BN = _block_sums(weights_BV)
    totals_B1 = blocks_BN.sum(dim=-1, keepdim=True)
    penalized_BV = logits_BV
    if params.repetition_penalty != 1 and seen_BV is not None:
        penalized_BV = penalize(logits_BV, seen_BV, params.repetition_penalty)
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    if penalized_BV is logits_BV and params.temperature == 1 and not filtered:
        tokens_B = _invert_blocks(weights_BV, blocks_BN, uniforms_B)
    else:
        tokens_B = choose(
            penalized_BV,
            uniforms_B,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
    chosen_B1 = logits_BV.gather(-1, tokens_B[:, None])
    return tokens_B, (chosen_B1 - largest_B1 - totals_B1.log()).squeeze(-1)


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty: divide positive logits of seen tokens by it, multiply negative ones."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def choose(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Sample one token ``[B]`` for each row by inverting the cumulative distribution at the row's uniform number.

    ``temperature`` 0, or one too small to divide by, is greedy. ``top_k`` above 0 keeps that many most likely tokens.
    ``top_p`` below 1 keeps the smallest set of most likely tokens whose share of the probability reaches it (nucleus
    sampling, Holtzman et al. 2020). ``min_p`` keeps the tokens with at least that fraction of the highest probability.
    """
    if temperature < torch.finfo(logits_BV.dtype).tiny:
        return logits_BV.argmax(dim=-1)
    largest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = ((logits_BV - largest_B1) / temperature).exp_()
    if top_k == 0 and top_p == 1 and min_p == 0:
        return _invert_blocks(weights_BV, _block_sums(weights_BV), uniforms_B)
    tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    open_N = torch.arange(len(logits_BV), device=logits_BV.device)
    vocab_size = logits_BV.shape[-1]
    widths = [vocab_size if top_k == 0 else min(top_k, vocab_size)]
    widths = [width for width in CANDIDATES if width < widths[0]] + widths
    for width in widths:
        chosen_N, complete_N = _among_top_candidates(
            weights_BV[open_N], uniforms_B[open_N], width, top_p=top_p, min_p=min_p, is_last=width == widths[-1]
        )
        tokens_B[open_N[complete_N]] = chosen_N[complete_N]
        open_N = open_N[~complete_N]
        if len(open_N) == 0:
            break
    return tokens_B


def _among_top_candidates(
    weights_BV: Tensor, uniforms_B: Tensor, width: int, *, top_p: float, min_p: float, is_last: bool
) -> tuple[Tensor, Tensor]:
    """Sample among the ``width`` most likely tokens of each row.

    Returns the tokens and whether the candidates contain every token that passes the filters.
    """
    candidates_BC, order_BC = weights_BV.topk(width, dim=-1)
    cumulative_BC = candidates_BC.cumsum(dim=-1)
    total_B1 = cumulative_BC[:, -1:] if is_last else weights_BV.sum(dim=-1, keepdim=True)
    # Keep a token if the cumulative probability before it is below top_p; the first always is. The last kept token is
    # the first whose cumulative probability reaches top_p. Due to rounding there may be none.
    num_short_B1 = (cumulative_BC < top_p * total_B1).sum(dim=-1, keepdim=True)
    num_likely_B1 = (candidates_BC >= min_p).sum(dim=-1, keepdim=True)  # the most likely token has weight 1
    complete_B = is_last | ((num_short_B1 < width) | (num_likely_B1 < width)).squeeze(-1)
    last_B1 = torch.minimum(num_short_B1, num_likely_B1 - 1).clamp(0, width - 1)
    kept_BC = cumulative_BC.clamp(max=cumulative_BC.gather(-1, last_B1))
    pick_B = _invert(kept_BC, uniforms_B)
    return order_BC.gather(-1, pick_B[:, None]).squeeze(-1), complete_B


def _block_sums(weights_BV: Tensor) -> Tensor:
    """Return the sums of blocks of ``BLOCK`` tokens; the last block may be shorter."""
    vocab_size = weights_BV.shape[-1]
    whole = vocab_size // BLOCK * BLOCK
    sums_BN = weights_BV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(dim=-1) if whole else weights_BV[:, :0]
    if whole == vocab_size:
        return sums_BN
    return torch.cat([sums_BN, weights_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)


def _invert_blocks(weights_BV: Tensor, blocks_BN: Tensor, uniforms_B: Tensor) -> Tensor:
    """Sample as ``_invert`` does, block by block, because a cumulative sum over the whole vocabulary is slow."""
    cumulative_BN = blocks_BN.cumsum(dim=-1)
    target_B1 = uniforms_B[:, None] * cumulative_BN[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    before_B1 = F.pad(cumulative_BN, (1, 0)).gather(-1, block_B1)
    columns_BW = block_B1 * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    vocab_size = weights_BV.shape[-1]
    inside_BW = weights_BV.gather(-1, columns_BW.clamp(max=vocab_size - 1))
    inside_BW = inside_BW.where(columns_BW < vocab_size, 0.0).cumsum(dim=-1)
    within_B1 = torch.searchsorted(inside_BW, target_B1 - before_B1, right=True)
    # Rounding may leave the block's sum below the remaining target: take the block's last token with a weight.
    last_B1 = torch.searchsorted(inside_BW, inside_BW[:, -1:].contiguous())
    # With NaN weights there is no such token; the caller sees NaN in the log-probability.
    return (block_B1 * BLOCK + torch.minimum(within_B1, last_B1)).squeeze(-1).clamp(max=vocab_size - 1)


def _invert(cumulative_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds the uniform number times the total.

    A uniform number is at most 1 - 2**-24, so its product with the total rounds below the total: such a token always
    exists, and it never has probability 0.
    """
    target_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
