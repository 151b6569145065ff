import math

import pytest
import torch

from lilpipe.alignment.rl.policy_gradient import (
    adapted_beta,
    aggregate,
    clipped_value_loss,
    generalised_advantages,
    group_advantages,
    group_std,
    k3,
    policy_ratio,
    surrogate_loss,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])


def test_advantages_are_rewards_above_the_groups_mean_over_its_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards, std=None).tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]
    # mean 1/4; unbiased variance (9/16 + 3/16) / 3 = 1/4
    scaled = group_advantages(rewards, std=group_std(rewards))
    assert scaled[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)
    assert scaled[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards, std=0.5)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)


def test_the_ratio_is_clipped_only_where_that_lowers_the_gain():
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
    advantages = torch.tensor([[1.0], [-1.0]])
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    loss = surrogate_loss(ratio.log(), torch.zeros(2, 2), advantages, everywhere, epsilon_low=0.2, epsilon_high=0.2)
    assert loss.flatten().tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    higher = surrogate_loss(ratio.log(), torch.zeros(2, 2), advantages, everywhere, epsilon_low=0.2, epsilon_high=0.4)
    assert higher.flatten().tolist() == pytest.approx([-1.4, -0.5, 1.5, 0.8])


def test_the_ratio_of_an_answer_is_the_geometric_mean_of_those_of_its_tokens():
    logprobs = torch.tensor([[9.0, 0.3, -0.1, 0.4], [0.1, 0.3, 9.0, 9.0]])
    ratio = policy_ratio(logprobs, torch.zeros(2, 4), MASK, level="sequence")
    assert ratio.flatten().tolist() == pytest.approx([math.exp(0.2)] * 8)
    assert policy_ratio(logprobs, torch.zeros(2, 4), MASK, level="token")[0].tolist() == pytest.approx(
        [1.0, math.exp(0.3), math.exp(-0.1), math.exp(0.4)]
    )


def test_k3_is_zero_for_equal_policies_and_positive_elsewhere():
    assert k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0])).tolist() == pytest.approx([0, math.exp(-1)])


@pytest.mark.parametrize(
    ("over", "total", "count"),
    [
        ("token", 2 + 3 + 4 + 5 + 6, 5),
        ("sequence", (2 + 3 + 4) / 3 + (5 + 6) / 2, 2),
        ("constant", (2 + 3 + 4 + 5 + 6) / 10, 2),
    ],
)
def test_a_loss_is_a_mean_over_tokens_over_answers_or_by_a_constant(over, total, count):
    loss = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    got, divisor = aggregate(loss, MASK, over=over, max_tokens=10)
    assert (got.item(), divisor) == (pytest.approx(total), count)


def test_an_answer_that_is_masked_adds_nothing_to_any_loss():
    loss, nothing = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for over in ("token", "sequence", "constant"):
        assert aggregate(loss, nothing, over=over, max_tokens=5)[0].item() == 0


def naive_advantages(rewards, values, gamma, gae_lambda):
    """The definition: the sum over all later steps of (gamma lambda)^k delta_{t+k}."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(rewards))]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_generalised_advantages_are_their_definition(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    got = generalised_advantages(rewards, values, MASK, gamma=gamma, gae_lambda=gae_lambda)
    for row in range(2):
        mask = MASK[row]
        expected = naive_advantages(rewards[row][mask].tolist(), values[row][mask].tolist(), gamma, gae_lambda)
        assert got[row][mask].tolist() == pytest.approx(expected, abs=1e-12)
        assert got[row][~mask].eq(0).all()


def test_without_discount_or_decay_advantage_and_value_are_what_is_still_to_come():
    rewards, values = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1))
    got = generalised_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    to_come = (rewards * MASK).flip(1).cumsum(1).flip(1)
    assert torch.allclose((got + values)[MASK], to_come[MASK], atol=1e-6)


def test_the_score_comes_with_the_last_token_and_the_divergence_with_each():
    logprobs, reference = torch.zeros(2, 4), torch.full((2, 4), -0.5)
    rewards = token_rewards(torch.tensor([3.0, -1.0]), logprobs, reference, MASK, beta=0.2)
    assert rewards.tolist() == [pytest.approx([0, -0.1, -0.1, 2.9]), pytest.approx([-0.1, -1.1, 0, 0])]


def test_a_value_that_moves_too_far_is_paid_for_by_the_clipped_one():
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.9, 0.9], requires_grad=True)
    loss = clipped_value_loss(values, old, returns, clip_range=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 1.9**2])
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([-0.9, 0.0, 1.9])


def test_whitened_advantages_have_mean_zero_and_deviation_one():
    values = torch.tensor([[9.0, 1.0, 2.0, 6.0], [3.0, 8.0, 9.0, 9.0]])
    white = whiten(values, MASK, lambda sums: sums)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[MASK].std(correction=0).item() == pytest.approx(1)
    assert white[~MASK].eq(0).all()
    # Two workers that hold the same rows see the same mean and deviation as one.
    assert torch.allclose(whiten(values, MASK, lambda sums: [2 * value for value in sums]), white)


def test_the_kl_coefficient_follows_the_divergence_by_at_most_a_fifth_of_the_rate():
    adapted = [adapted_beta(0.5, kl, target=2.0, rate=0.1) for kl in (2.0, 2.2, 9.0, 0.0)]
    assert adapted == pytest.approx([0.5, 0.505, 0.51, 0.49])
