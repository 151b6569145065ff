"""Against the papers' formulas, written with probabilities in plain Python. ``test_trl`` holds them against TRL."""

import math

import pytest
import torch

from lilpipe.alignment.preference.losses import (
    ipo_loss,
    kto_baseline,
    kto_loss,
    log_odds,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_sigmoid_loss_is_minus_log_sigmoid_of_beta_times_the_margin():
    losses = sigmoid_loss(torch.tensor([0.0, 10.0, -10.0]), beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))])


def test_conservative_smoothing_expects_a_share_of_pairs_to_be_the_wrong_way_round():
    (loss,) = sigmoid_loss(torch.tensor([3.0]), beta=0.5, label_smoothing=0.2).tolist()
    assert loss == pytest.approx(-0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5)))


def test_robust_smoothing_is_unbiased_by_pairs_that_are_the_wrong_way_round():
    noise, margin = 0.2, torch.tensor([1.7])
    right = sigmoid_loss(margin, beta=1.0, label_smoothing=noise, robust=True)
    turned = sigmoid_loss(-margin, beta=1.0, label_smoothing=noise, robust=True)
    clean = sigmoid_loss(margin, beta=1.0)
    assert ((1 - noise) * right + noise * turned).item() == pytest.approx(clean.item(), rel=1e-6)


def test_ipo_draws_the_margin_to_half_the_inverse_of_beta():
    assert ipo_loss(torch.tensor([2.5, 0.0]), beta=0.2).tolist() == pytest.approx([0.0, 6.25])


def test_simpo_wants_the_reward_of_the_chosen_completion_ahead_by_gamma():
    (loss,) = simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=1.2).tolist()
    assert loss == pytest.approx(-math.log(sigmoid(2.0 * 1.0 - 1.2)))


def test_orpo_compares_odds():
    (loss,) = orpo_loss(torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.3)]), beta=0.1).tolist()
    assert loss == pytest.approx(-0.1 * math.log(sigmoid(math.log((0.8 / 0.2) / (0.3 / 0.7)))), rel=1e-5)


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-4, -0.5, -math.log(2), -0.7, -5.0, -90.0, -1e4])
def test_log_odds_and_their_gradient_are_finite_and_exact_at_both_ends(logprob):
    values = torch.tensor([logprob], dtype=torch.float32, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(values).sum(), values)
    assert gradient.isfinite().all()
    exact = logprob - math.log(-math.expm1(min(logprob, -1e-6)))
    assert log_odds(values).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_kto_pulls_desirable_completions_above_the_baseline_and_pushes_others_below():
    ratios, baseline = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])
    losses = kto_loss(
        ratios, torch.tensor([True, False]), baseline, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5
    )
    assert losses.tolist() == pytest.approx([1.5 * (1 - sigmoid(0.6)), 0.5 * (1 - sigmoid(-0.6))])


def test_the_baseline_of_kto_is_the_mean_of_each_group_and_never_negative():
    mismatched = torch.tensor([1.0, 2.0, -5.0, 1.0], requires_grad=True)
    baseline = kto_baseline(mismatched, num_examples=2)
    assert baseline.tolist() == [1.5, 1.5, 0.0, 0.0]
    assert not baseline.requires_grad
