"""Policy gradients as pure functions: advantages, clipped surrogate losses and their aggregation.

GRPO (Shao et al. 2024) normalises advantages by group and averages the loss over each completion. DAPO (Yu et al. 2025)
averages over all tokens and clips at a higher upper bound. Dr. GRPO (Liu et al. 2025) omits the standard deviation and
divides by a constant. GSPO (Zheng et al. 2025) uses sequence-level ratios. PPO (Schulman et al. 2017) has a value per
token and generalised advantage estimation (GAE, Schulman et al. 2016).

Dimensions: P prompts, G completions per prompt, N completions, T tokens. Masks are True at sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token", "sequence", "constant"]

REWARD_STD_EPSILON = 1e-4
"""Added to the standard deviation of rewards, as in TRL, so that a group of equal rewards has advantage 0, not NaN."""
WHITENING_EPSILON = 1e-8
"""Added to the variance of advantages."""


# --- advantages ---------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG: Tensor, *, std: Tensor | float | None) -> Tensor:
    """Return rewards minus the group's mean ``[P, G]``, divided by ``std`` (``group_std`` or the batch's) if given."""
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return centred_PG if std is None else centred_PG / (std + REWARD_STD_EPSILON)


def group_std(rewards_PG: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each group ``[P, 1]``."""
    return rewards_PG.std(dim=1, keepdim=True)


def generalised_advantages(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """Return GAE advantages ``[N, T]`` (Schulman et al. 2016, equation 16), 0 outside the mask.

    ``values_NT`` are the values before each token is sampled; after the last token of a completion the value is 0. The
    tokens of a completion are contiguous. ``gamma`` is the discount.
    """
    advantages_NT = torch.zeros_like(rewards_NT)
    advantage_N = next_value_N = torch.zeros_like(rewards_NT[:, 0])
    for t in reversed(range(rewards_NT.shape[1])):
        delta_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        advantage_N = (delta_N + gamma * gae_lambda * advantage_N).where(mask_NT[:, t], 0.0)
        advantages_NT[:, t] = advantage_N
        next_value_N = values_NT[:, t].where(mask_NT[:, t], 0.0)
    return advantages_NT


def token_rewards(
    scores_N: Tensor, logprobs_NT: Tensor, reference_logprobs_NT: Tensor, mask_NT: Tensor, *, beta: float
) -> Tensor:
    """Return the reward of each token ``[N, T]``: the KL penalty, plus the score at the last token.

    See Ouyang et al. 2022, equation 2.
    """
    rewards_NT = (-beta * (logprobs_NT - reference_logprobs_NT)).where(mask_NT, 0.0)
    positions_T = torch.arange(mask_NT.shape[1], device=mask_NT.device)
    last_N1 = (positions_T * mask_NT).amax(dim=1, keepdim=True)
    return rewards_NT.scatter_add(1, last_N1, scores_N[:, None])


def whiten(values_NT: Tensor, mask_NT: Tensor, sum_floats: Callable[[list[float]], list[float]]) -> Tensor:
    """Normalise values in the mask to mean 0 and variance 1 over all workers ``[N, T]``; 0 outside.

    ``sum_floats`` is an all-reduce.
    """
    inside = values_NT[mask_NT].double()
    count, total = sum_floats([float(len(inside)), inside.sum().item()])
    mean = total / count
    (squares,) = sum_floats([(inside - mean).square().sum().item()])
    return ((values_NT - mean) / math.sqrt(squares / count + WHITENING_EPSILON)).where(mask_NT, 0.0)


# --- losses -------------------------------------------------------------------------------------------------------


def surrogate_loss(
    logprobs_NT: Tensor,
    old_logprobs_NT: Tensor,
    advantages: Tensor,
    mask_NT: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    importance_sampling_level: RatioLevel = "token",
) -> Tensor:
    """Return the clipped surrogate loss of each token ``[N, T]``.

    ``advantages`` has shape ``[N, T]``, or ``[N, 1]`` for whole completions. With ``importance_sampling_level``
    ``sequence``, every token has the ratio of its completion: the geometric mean over its tokens.
    """
    ratio_NT = policy_ratio(logprobs_NT, old_logprobs_NT, mask_NT, level=importance_sampling_level)
    clipped_NT = ratio_NT.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio_NT * advantages, clipped_NT * advantages)


def policy_ratio(logprobs_NT: Tensor, old_logprobs_NT: Tensor, mask_NT: Tensor, *, level: RatioLevel) -> Tensor:
    """Return the probability ratio of the policy to the policy that sampled ``[N, T]``."""
    log_ratio_NT = (logprobs_NT - old_logprobs_NT).where(mask_NT, 0.0)
    if level == "sequence":
        log_ratio_N1 = log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_NT = log_ratio_N1.expand_as(log_ratio_NT)
    return log_ratio_NT.exp()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return the unbiased, non-negative estimate of KL(policy || reference) from policy samples (Schulman 2020)."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> Tensor:
    """Return half the squared error of each value or of the value clipped around the old one, whichever is larger."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def aggregate(loss_NT: Tensor, mask_NT: Tensor, *, over: Aggregation, max_tokens: int) -> tuple[Tensor, float]:
    """Return the summed loss and its divisor, both to be summed over the whole batch first.

    ``token``: mean over all tokens. ``sequence``: mean over completions of the mean over their tokens. ``constant``:
    mean over completions of the sum divided by ``max_tokens``, independent of lengths.
    """
    if over == "token":
        return loss_NT[mask_NT].sum(), float(mask_NT.sum())
    sums_N = loss_NT.where(mask_NT, 0.0).sum(dim=1)
    lengths_N = mask_NT.sum(dim=1).clamp(min=1) if over == "sequence" else max_tokens
    return (sums_N / lengths_N).sum(), float(len(sums_N))


# --- coefficients -------------------------------------------------------------------------------------------------


def adapted_beta(coefficient: float, kl: float, *, target: float, rate: float) -> float:
    """Return the KL coefficient after a rollout with KL divergence ``kl``: raised above the target, lowered below.

    The relative change is at most 0.2 * ``rate`` (Ziegler et al. 2019, equation 4).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + rate * error)
