import pytest
import torch

from lilpipe.alignment.rollout.completion_batch import at_targets, by_length, completion_logprobs, micro_batches
from lilpipe.config.model import ModelConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.errors import ConfigError
from lilpipe.model.scores import IGNORED, token_scores
from lilpipe.model.transformer import Transformer, token_logprobs
from tests.alignment.rollout.random_completions import random_completions

CONFIG = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)


@pytest.fixture
def model():
    model = Transformer(CONFIG, 32)
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data.mul_(8) if parameter.dim() > 1 else None
    return model


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_goes_through_every_answer_once_and_short_ones_are_not_padded_much(minibatches, epoch):
    answers = random_completions()
    config = GRPOConfig(seed=0, num_mini_batches=minibatches, accumulation_steps=2, prompts_per_step=3)
    updates = [micro_batches(answers, epoch * minibatches + part, config, seed=1) for part in range(minibatches)]
    assert all(len(parts) == 2 for parts in updates)
    parts = [part for update in updates for part in update]
    assert sum(part.old_logprobs.sum().item() for part in parts) == pytest.approx(answers.old_logprobs.sum().item())
    assert sum(len(part.inputs) for part in parts) == 6
    assert all(part.inputs.shape[1] == part.lengths.max() for part in parts)
    for shorter, longer in updates:
        assert shorter.lengths.max() <= longer.lengths.min()


def test_each_epoch_has_an_order_of_its_own():
    answers = random_completions()
    config = GRPOConfig(seed=0, num_mini_batches=3, prompts_per_step=3)
    first, second, again = (micro_batches(answers, update, config, seed=1)[0] for update in (0, 3, 0))
    assert not torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.inputs, again.inputs)


def test_scores_of_targets_alone_are_those_of_all_with_their_gradients(model):
    answers = random_completions()
    weights = torch.randn(answers.targets.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for scores in (token_scores, at_targets(token_scores)):
        model.zero_grad()
        model.token_scores = scores
        found = model(answers.inputs, targets_BT=answers.targets)
        (found.logprobs * weights + 0.1 * found.normaliser).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert found.logprobs[~answers.completion_mask].eq(0).all()
    for whole, alone in zip(*gradients, strict=True):
        assert torch.allclose(whole, alone, atol=1e-5)


def test_scores_of_no_target_at_all_are_zeros_with_a_gradient(model):
    model.token_scores = at_targets(token_scores)
    found = model(torch.ones(2, 3, dtype=torch.int64), targets_BT=torch.full((2, 3), IGNORED)).logprobs
    found.sum().backward()
    assert found.eq(0).all()
    assert model.output_weight.grad.eq(0).all()


def test_log_probabilities_in_parts_are_those_of_the_whole(model):
    answers = random_completions()
    tokens = torch.cat([answers.inputs, answers.targets[:, -1:].clamp(min=0)], dim=1)
    expected = token_logprobs(model, tokens).where(answers.completion_mask, 0.0)
    for parts in (1, 4):
        assert torch.allclose(completion_logprobs(model, answers, parts=parts), expected, atol=1e-5)
    hot = model(answers.inputs).div(1.7).log_softmax(-1).gather(-1, answers.targets.clamp(min=0)[..., None])[..., 0]
    got = completion_logprobs(model, answers, parts=2, temperature=1.7)
    assert torch.allclose(got, hot.where(answers.completion_mask, 0.0), atol=1e-5)


def test_another_temperature_is_refused_for_logits_that_are_capped():
    targets = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"sampling.temperature: got 0.5, expected 1 for a model with logit_softcap"):
        at_targets(token_scores, 0.5)(torch.zeros(1, 2, 4), torch.zeros(8, 4), targets, softcap=30.0)


def test_rows_are_cut_into_parts_by_length():
    answers = random_completions()
    parts = by_length(answers, 3)
    assert sorted(torch.cat(parts).tolist()) == list(range(6))
    assert answers.lengths[torch.cat(parts)].diff().ge(0).all()
