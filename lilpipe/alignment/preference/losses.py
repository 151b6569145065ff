"""Losses of direct preference optimization and variants, as functions of the log-probabilities of completions.

The log-probability of a completion is the sum over its tokens or, if length-normalised, the mean. A log-ratio is policy
minus reference. A margin is the log-ratio of the chosen minus that of the rejected completion, in nats.

Dimensions: N pairs (completions in ``kto_loss``), G groups of completions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CERTAIN = -1e-6
"""Maximum log-probability in ``log_odds``; closer to 0, float32 rounding makes the odds infinite."""


def sigmoid_loss(margin_N: Tensor, *, beta: float, label_smoothing: float = 0.0, robust: bool = False) -> Tensor:
    """Return -log sigmoid(beta * margin) for each pair [N] (DPO, Rafailov et al. 2023, equation 7).

    With label smoothing e, the loss L of a pair and the loss L' of the swapped pair, returns (1 - e) L + e L' (cDPO,
    Mitchell 2023; TRL's CPO) or, if ``robust``, ((1 - e) L - e L') / (1 - 2e) (rDPO, Chowdhury et al. 2024, equation
    14; TRL's ``robust``).
    """
    right_N, wrong_N = -F.logsigmoid(beta * margin_N), -F.logsigmoid(-beta * margin_N)
    if robust:
        return ((1 - label_smoothing) * right_N - label_smoothing * wrong_N) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_N + label_smoothing * wrong_N


def ipo_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Return the squared difference [N] of the margin and 1 / (2 beta) (IPO, Azar et al. 2023, equation 17).

    TRL length-normalises the margin, as the authors do.
    """
    return (margin_N - 1 / (2 * beta)).square()


def simpo_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Return -log sigmoid(beta * (chosen - rejected) - gamma) [N] (SimPO, Meng et al. 2024, equation 6).

    The log-probabilities are length-normalised; there is no reference model.
    """
    return sigmoid_loss(chosen_N - rejected_N - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def orpo_loss(chosen_N: Tensor, rejected_N: Tensor, *, beta: float) -> Tensor:
    """Return -beta * log sigmoid(log odds ratio) [N] (ORPO, Hong et al. 2024, equation 7, where beta is lambda).

    The odds of a completion are p / (1 - p); log p is length-normalised.
    """
    return -beta * F.logsigmoid(log_odds(chosen_N) - log_odds(rejected_N))


def log_odds(logprobs_N: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p, without cancellation near p = 0 or p = 1."""
    logprobs_N = logprobs_N.clamp(max=CERTAIN)
    likely_N = logprobs_N > -math.log(2)
    # Clamp the input of each branch where the other is taken; otherwise its gradient there could be infinite.
    complement_N = torch.where(
        likely_N,
        torch.log(-torch.expm1(logprobs_N)),
        torch.log1p(-torch.exp(logprobs_N.clamp(max=-math.log(2)))),
    )
    return logprobs_N - complement_N


def kto_loss(
    ratio_N: Tensor,
    desirable_N: Tensor,
    baseline_N: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each completion [N] (KTO, Ethayarajh et al. 2024, equation 8, where weights are lambda).

    The loss is weight * (1 - sigmoid(beta * (ratio - baseline))), with ratio - baseline negated for undesirable
    completions. ``ratio_N`` is the log-ratio of policy to reference, ``desirable_N`` is boolean.
    """
    signs_N = desirable_N.to(ratio_N.dtype) * 2 - 1
    weights_N = torch.where(desirable_N, desirable_weight, undesirable_weight)
    return weights_N * (1 - torch.sigmoid(beta * signs_N * (ratio_N - baseline_N)))


def kto_baseline(mismatched_ratio_N: Tensor, *, num_examples: int) -> Tensor:
    """Return the reference point [N] of KTO: an estimate of the KL divergence, clamped at 0, without gradient.

    The estimate is the mean log-ratio of mismatched completions over groups of ``num_examples``.
    """
    means_G1 = mismatched_ratio_N.detach().view(-1, num_examples).mean(dim=1, keepdim=True).clamp(min=0)
    return means_G1.expand(-1, num_examples).flatten()
