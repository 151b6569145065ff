"""Losses of direct preference optimisation and its family, as functions of log-probabilities of completions.

Log-probabilities of completions are sums over their tokens or, where they are normalised by length, means. A log-ratio
is that of the policy to the reference; a margin is the chosen completion's log-ratio less the rejected one's, in nats.

Dimensions: N pairs, in ``kto_loss`` completions; G groups of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CERTAIN = -1e-6
"""Log-probability above which the odds of a completion are as good as infinite: float32 rounds what it is short of
0."""


def sigmoid_loss(margin_N: Tensor, *, beta: float, label_smoothing: float = 0.0, robust: bool = False) -> Tensor:
    """Loss of each pair [N]: -log sigmoid(beta * margin) (DPO, Rafailov et al. 2023, equation 7).

    With a share e of pairs that are the wrong way round and L, L' the losses of a pair as it is and turned round:
    (1 - e) L + e L' (cDPO, Mitchell 2023; TRL's CPO), or ``robust``, ((1 - e) L - e L') / (1 - 2e) (rDPO, Chowdhury
    et al. 2024, equation 14; TRL's ``robust``).
    """
    right_N, wrong_N = -F.logsigmoid(beta * margin_N), -F.logsigmoid(-beta * margin_N)
    if robust:
        return ((1 - label_smoothing) * right_N - label_smoothing * wrong_N) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_N + label_smoothing * wrong_N


def ipo_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Squared distance [N] of the margin from 1 / (2 beta) (Azar et al. 2023, equation 17).

    TRL's margin is normalised by length, as the authors have it.
    """
    return (margin_N - 1 / (2 * beta)).square()


def simpo_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss [N] of log-probabilities that are normalised by length and compared with no reference.

    -log sigmoid(beta * (chosen - rejected) - gamma) (Meng et al. 2024, equation 6).
    """
    return sigmoid_loss(chosen_N - rejected_N - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def orpo_loss(chosen_N: Tensor, rejected_N: Tensor, *, beta: float) -> Tensor:
    """Minus log sigmoid of the log odds ratio, times ``beta`` [N] (Hong et al. 2024, equation 7; beta is lambda there).

    The odds of a completion are p / (1 - p), where log p is normalised by length.
    """
    return -beta * F.logsigmoid(log_odds(chosen_N) - log_odds(rejected_N))


def log_odds(logprobs_N: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, without cancellation at either end."""
    logprobs_N = logprobs_N.clamp(max=CERTAIN)
    likely_N = logprobs_N > -math.log(2)
    # Each branch is kept away from where the other is taken, else its gradient there could be infinite.
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
    """Loss of each completion [N] (Ethayarajh et al. 2024, equation 8, where weights are called lambda).

    weight * (1 - sigmoid(beta * (ratio - baseline))), with the signs of both turned round for undesirable completions.
    ``ratio_N`` is the log-ratio of policy to reference, ``desirable_N`` boolean.
    """
    signs_N = desirable_N.to(ratio_N.dtype) * 2 - 1
    weights_N = torch.where(desirable_N, desirable_weight, undesirable_weight)
    return weights_N * (1 - torch.sigmoid(beta * signs_N * (ratio_N - baseline_N)))


def kto_baseline(mismatched_ratio_N: Tensor, *, num_examples: int) -> Tensor:
    """The reference point [N] of the completions: an estimate of the KL divergence, at least 0 and without a gradient.

    It is the mean log-ratio of completions to other prompts than their own, over ``num_examples`` completions at a
    time.
    """
    means_G1 = mismatched_ratio_N.detach().view(-1, num_examples).mean(dim=1, keepdim=True).clamp(min=0)
    return means_G1.expand(-1, num_examples).flatten()
