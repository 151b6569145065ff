"""The mathematics of policy gradients: advantages, clipped surrogates and their aggregation, as pure functions.

GRPO (Shao et al. 2024) is the group-normalised advantage with the mean over each completion; DAPO (Yu et al. 2025)
takes the mean over all tokens and clips higher above than below; Dr.GRPO (Liu et al. 2025) leaves out the deviation and
divides by a constant; GSPO (Zheng et al. 2025) takes the ratio of whole completions. PPO (Schulman et al. 2017) has a
value of each token, and generalised advantage estimation (Schulman et al. 2016).

Dimensions: P prompts, G completions to a prompt, N completions, T tokens. Masks are True at tokens that the policy
drew.
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
"""Added to the standard deviation of rewards, as in TRL: a group of equal rewards has no advantage, not an infinite
one."""
WHITENING_EPSILON = 1e-8
"""Added to the variance of advantages."""


# --- advantages ---------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG: Tensor, *, std: Tensor | float | None) -> Tensor:
    """Reward above the group's mean ``[P, G]``, over ``std`` where one is given: ``group_std``, or one of all."""
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return centred_PG if std is None else centred_PG / (std + REWARD_STD_EPSILON)


def group_std(rewards_PG: Tensor) -> Tensor:
    """Standard deviation (unbiased) of each group ``[P, 1]``."""
    return rewards_PG.std(dim=1, keepdim=True)


def generalised_advantages(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates ``[N, T]`` (their equation 16), 0 outside the mask.

    ``values_NT`` are those before each token is drawn; after a completion's last token the value is 0. The tokens of
    a completion lie side by side. ``gamma`` is the discount, ``gae_lambda`` lambda.
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
    """Reward of each token ``[N, T]``: less what it adds to the KL divergence from the reference, and at the last one
    the completion's score (Ouyang et al. 2022, equation 2).
    """
    rewards_NT = (-beta * (logprobs_NT - reference_logprobs_NT)).where(mask_NT, 0.0)
    positions_T = torch.arange(mask_NT.shape[1], device=mask_NT.device)
    last_N1 = (positions_T * mask_NT).amax(dim=1, keepdim=True)
    return rewards_NT.scatter_add(1, last_N1, scores_N[:, None])


def whiten(values_NT: Tensor, mask_NT: Tensor, sum_floats: Callable[[list[float]], list[float]]) -> Tensor:
    """Values of mean 0 and variance 1 over the mask of all workers ``[N, T]``, 0 outside; ``sum_floats`` adds numbers
    up over them.
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
    """The clipped surrogate of each token ``[N, T]``.

    ``advantages`` are ``[N, T]``, or ``[N, 1]`` of whole completions. At ``importance_sampling_level`` sequence every
    token has the ratio of its completion, the geometric mean of those of its tokens.
    """
    ratio_NT = policy_ratio(logprobs_NT, old_logprobs_NT, mask_NT, level=importance_sampling_level)
    clipped_NT = ratio_NT.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio_NT * advantages, clipped_NT * advantages)


def policy_ratio(logprobs_NT: Tensor, old_logprobs_NT: Tensor, mask_NT: Tensor, *, level: RatioLevel) -> Tensor:
    """Probability under the policy over that under the one that drew ``[N, T]``."""
    log_ratio_NT = (logprobs_NT - old_logprobs_NT).where(mask_NT, 0.0)
    if level == "sequence":
        log_ratio_N1 = log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_NT = log_ratio_N1.expand_as(log_ratio_NT)
    return log_ratio_NT.exp()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) for samples of the policy (Schulman 2020)."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> Tensor:
    """Half the squared error of each value, or that of the value clipped around the old one where it is larger."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def aggregate(loss_NT: Tensor, mask_NT: Tensor, *, over: Aggregation, max_tokens: int) -> tuple[Tensor, float]:
    """The sum of the loss, and the count that it is to be divided by once both are added up over the whole batch.

    ``token``: each token weighs the same. ``sequence``: each completion does, by the mean over its tokens.
    ``constant``: each completion is divided by ``max_tokens``, so that neither its length nor that of others matters.
    """
    if over == "token":
        return loss_NT[mask_NT].sum(), float(mask_NT.sum())
    sums_N = loss_NT.where(mask_NT, 0.0).sum(dim=1)
    lengths_N = mask_NT.sum(dim=1).clamp(min=1) if over == "sequence" else max_tokens
    return (sums_N / lengths_N).sum(), float(len(sums_N))


# --- coefficients -------------------------------------------------------------------------------------------------


def adapted_beta(coefficient: float, kl: float, *, target: float, rate: float) -> float:
    """The KL coefficient after a rollout with divergence ``kl``: up where it is above the target, down where it is
    below, by at most a fifth of ``rate`` (Ziegler et al. 2019, equation 4).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + rate * error)
