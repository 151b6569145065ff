"""PPO against its definitions, written down token by token: TRL has none since 1.0."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lilpipe.alignment.rewards import reward_functions as rewards
from lilpipe.alignment.rewards.reward_functions import Rewards
from lilpipe.alignment.rl import ppo
from lilpipe.alignment.rl.ppo import PPO, run
from lilpipe.alignment.rollout.completion_batch import at_targets
from lilpipe.alignment.rollout.rollouts import Sampler
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.reinforcement import CollapseMonitorConfig, PPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.distributed import Preempted
from lilpipe.errors import ArtifactError, DataError
from lilpipe.model.heads import load_head_model, save_head_model, with_head
from lilpipe.model.hub import load_model
from lilpipe.schemas.examples import read_prompts
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.training.finetune import Workers
from tests.alignment.conftest import as_artifact, digest_of

CONFIG = PPOConfig(
    seed=0,
    num_steps=3,
    prompts_per_step=8,
    num_iterations=2,
    num_mini_batches=2,
    accumulation_steps=2,
    checkpoint_every=1,
    log_every=1,
    rewards=(RewardConfig(kind="answer"),),
    sampling=SamplingConfig(max_new_tokens=6),
)


def changed(**settings):
    return PPOConfig(**{**dict(CONFIG), **settings})


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("lilpipe.alignment.rl.reinforcement.write_report", lambda *args, **options: None)


@pytest.fixture(autouse=True)
def even_words(monkeypatch):
    """A reward that a model of random weights meets now and then."""

    def even(config, reward_model):
        return lambda prompts, completions: [(float(len(r.text.split()) % 2 == 0), "") for r in completions]

    monkeypatch.setitem(rewards.KINDS, "answer", even)


@pytest.fixture
def make_reward_model(make_checkpoint, tokenizer, tmp_path_factory):
    def make(seed=1, *, tokenizer=tokenizer):
        model, _ = load_model(make_checkpoint(seed).path)
        head = with_head(model, 1, seed=seed)
        head.score.weight.data.mul_(20)  # as if it had been trained
        directory = tmp_path_factory.mktemp("reward_model")
        save_head_model(head, tokenizer, directory, labels=["reward"])
        return as_artifact(directory, kind="Checkpoint", stage="reward_model")

    return make


@pytest.fixture
def inputs(make_checkpoint, make_reward_model, prompts):
    return {"model": make_checkpoint(), "prompts": prompts, "reward_model": make_reward_model()}


class Models(nn.Module):
    """Both models of PPO, and the loss of both."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value

    def loss(self, objective, step, micro):
        policy, value = objective.policy_objective, objective.value_objective
        batch = policy.batches(step)[micro]
        first = policy.loss(self.policy(batch.inputs, targets_BT=batch.targets), batch)
        second = value.loss(self.value(batch.inputs), value.batches(step)[micro])
        assert first.count == second.count
        return replace(first, total=first.total + second.total)


@pytest.fixture
def make_objective(tmp_path, inputs):
    def make(config):
        policy, tokenizer = load_model(inputs["model"].path)
        reference, _ = load_model(inputs["model"].path)
        value, _ = load_head_model(inputs["reward_model"].path)
        reference.output_weight.data.mul_(1.05)  # so that there is a divergence
        sampler = Sampler(
            tokenizer,
            read_prompts(inputs["prompts"].path, "train"),
            Rewards(config.rewards),
            config,
            stage="ppo",
            num_generations=1,
            data_rank=0,
            num_data_ranks=1,
        )
        policy.token_scores = at_targets(policy.token_scores, config.sampling.temperature)
        objective = PPO(
            config,
            sampler,
            Workspace(tmp_path / "one"),
            policy=lambda: policy,
            value=lambda: value,
            reference=reference,
            workers=Workers(config),
        )
        return objective, Models(policy, value)

    return make


def steps_of(workspace):
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [event["metrics"] for event in events if "reward" in event.get("metrics", {})]


# --- against the definitions --------------------------------------------------------------------------------------


def logprobs_of(model, tokens, temperature):
    """Of each token after the first, with the softmax written out."""
    logits = model(torch.tensor([tokens[:-1]]))[0] / temperature
    return [logits[t, token] - logits[t].exp().sum().log() for t, token in enumerate(tokens[1:])]


def naive_rollout(objective, models, groups):
    """Advantages (not whitened), returns, values and old log-probabilities of each answer, token by token."""
    config, answers = objective.config, []
    for group in groups:
        completion, scored = group.completions[0], group.scored[0]
        tokens, start = [*completion.prompt_ids, *completion.completion_ids], len(completion.prompt_ids) - 1
        with torch.no_grad():
            old = [x.item() for x in logprobs_of(models.policy, tokens, config.sampling.temperature)][start:]
            first = [x.item() for x in logprobs_of(objective.reference, tokens, config.sampling.temperature)][start:]
            values = models.value(torch.tensor([tokens[:-1]]))[0, start:, 0].tolist()
        gains = [-config.beta * (a - b) for a, b in zip(old, first, strict=True)]
        gains[-1] += scored.total - config.missing_eos_penalty * (not completion.verdict.ended)
        advantages = []
        for t in range(len(gains)):
            total, factor = 0.0, 1.0
            for later in range(t, len(gains)):
                after = values[later + 1] if later + 1 < len(gains) else 0.0
                total += factor * (gains[later] + config.gamma * after - values[later])
                factor *= config.gamma * config.gae_lambda
            advantages.append(total)
        returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        answers.append((tokens, start, advantages, returns, values, old))
    return answers


def naive_loss(objective, answers, models):
    """Mean over all tokens of clipped surrogate and clipped value loss."""
    config = objective.config
    flat = [advantage for answer in answers for advantage in answer[2]]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    losses = []
    for tokens, start, advantages, returns, old_values, old in answers:
        new = logprobs_of(models.policy, tokens, config.sampling.temperature)[start:]
        values = models.value(torch.tensor([tokens[:-1]]))[0, start:, 0]
        for t, advantage in enumerate(advantages):
            white, ratio = (advantage - mean) / deviation, (new[t] - old[t]).exp()
            gain = torch.min(ratio * white, ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * white)
            low, high = old_values[t] - config.cliprange_value, old_values[t] + config.cliprange_value
            error = torch.max((values[t] - returns[t]) ** 2, (values[t].clamp(low, high) - returns[t]) ** 2)
            losses.append(-gain + config.vf_coef * 0.5 * error)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.9, "gae_lambda": 0.5, "vf_coef": 1.0, "missing_eos_penalty": 0.0},
        {"sampling": SamplingConfig(max_new_tokens=6, temperature=0.8)},
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_definitions(make_objective, monkeypatch, settings):
    config = changed(num_mini_batches=1, prompts_per_step=4, **settings)
    objective, models = make_objective(config)
    groups, _ = objective._sampler.draw(models.policy, 0)
    monkeypatch.setattr(objective._sampler, "draw", lambda *_: (groups, 0))
    expected_answers = naive_rollout(objective, models, groups)
    fresh = [models.loss(objective, 0, micro) for micro in range(2)]
    assert sum(len(answer[2]) for answer in expected_answers) == sum(loss.count for loss in fresh)
    generator = torch.Generator().manual_seed(0)
    for parameter in models.parameters():  # as if an update had been made: clipping is at work
        parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))

    expected = naive_loss(objective, expected_answers, models)
    wanted = torch.autograd.grad(expected, list(models.parameters()), allow_unused=True)
    parts = [models.loss(objective, 1, micro) for micro in range(2)]
    loss = torch.stack([part.total for part in parts]).sum() / sum(part.count for part in parts)
    got = torch.autograd.grad(loss, list(models.parameters()), allow_unused=True)
    assert parts[0].metrics["clip_ratio"][0] > 0
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_an_answer_without_end_is_worth_less_by_the_penalty(make_objective):
    objective, models = make_objective(changed(missing_eos_penalty=3.0))
    groups, _ = objective._sampler.draw(models.policy, 0)
    for score, group in zip(objective._scores(groups).tolist(), groups, strict=True):
        assert score == group.scored[0].total - 3.0 * (not group.completions[0].verdict.ended)


def test_the_kl_coefficient_is_fixed_or_follows_the_rollouts_before(make_objective):
    (fixed, _), (adapted, _) = make_objective(CONFIG), make_objective(changed(kl_target=1.0, kl_rate=0.5))
    for objective in (fixed, adapted):
        objective.collapse_monitor.history = [
            {"kl_per_completion": 9.0},
            {"kl_per_completion": 1.0},
            {"kl_per_completion": 0.0},
        ]
    assert [fixed.beta(rollout) for rollout in range(4)] == [0.05] * 4
    expected = [0.05, 0.05 * 1.1, 0.05 * 1.1, 0.05 * 1.1 * 0.9]
    assert [adapted.beta(rollout) for rollout in range(4)] == pytest.approx(expected)


# --- the stage ----------------------------------------------------------------------------------------------------


def test_policy_and_value_are_trained_and_saved_apart(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    metrics = run(CONFIG, inputs, workspace)
    steps = steps_of(workspace)
    assert len(steps) == 12
    assert all(step["logprob_mismatch"] < 1e-5 for step in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert {"validation_reward", "validation_reward_before", "validation_accuracy"} < metrics.keys()
    policy, value = load_model(workspace.output)[0], load_head_model(workspace.output / "value")[0]
    for model, first in (
        (policy, load_model(inputs["model"].path)),
        (value, load_head_model(inputs["reward_model"].path)),
    ):
        assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), first[0].parameters(), strict=True))


def test_the_reward_model_judges_by_default(tmp_path, inputs):
    assert PPOConfig().rewards == (RewardConfig(kind="reward_model"),)
    workspace = Workspace(tmp_path)
    run(changed(num_steps=1, rewards=PPOConfig().rewards), inputs, workspace)
    step = steps_of(workspace)[0]
    assert step["reward"] == step["reward/reward_model"] != 0


@pytest.mark.slow
def test_the_reward_rises(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 1e-2})
    settings = {"num_steps": 30, "prompts_per_step": 32, "num_iterations": 2, "num_mini_batches": 1}
    run(changed(**settings, optimizer=optimizer, beta=0.0), inputs, workspace)
    rewards = [step["reward"] for step in steps_of(workspace)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.15


@pytest.mark.parametrize("stopped_at", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_run_stopped_between_two_updates_of_a_rollout_ends_in_the_bytes_of_an_uninterrupted_one(
    tmp_path, inputs, monkeypatch, stopped_at
):
    config = changed(kl_target=0.1)
    run(config, inputs, Workspace(tmp_path / "whole"))
    updates = iter(range(1, 100))
    monkeypatch.setattr("lilpipe.distributed.stop_requested", lambda: next(updates) == stopped_at)
    with pytest.raises(Preempted):
        run(config, inputs, Workspace(tmp_path / "killed"))
    monkeypatch.setattr("lilpipe.distributed.stop_requested", lambda: False)
    run(config, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(Workspace(tmp_path / "killed")) == digest_of(Workspace(tmp_path / "whole"))


def test_a_policy_that_leaves_its_reference_stops_the_run(tmp_path, inputs):
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 0.1})
    collapse_monitor = CollapseMonitorConfig(patience=2, max_kl=0.05, max_truncated_ratio=1)
    with pytest.raises(
        DataError, match=r"kl .* for 2 rollouts in a row, expected at most collapse_monitor.max_kl 0.05"
    ):
        run(changed(num_steps=6, optimizer=optimizer, collapse_monitor=collapse_monitor), inputs, Workspace(tmp_path))


def test_a_reward_model_of_other_tokens_is_refused(tmp_path, inputs, make_reward_model):
    ranks = {bytes([byte]): byte for byte in range(256)}
    other = BytePairTokenizer({**ranks, b"ab": 256}, TokenizerConfig().pattern)
    foreign = make_reward_model(tokenizer=other)
    with pytest.raises(ArtifactError, match="expected the same: the value model starts as the reward model"):
        run(CONFIG, {**inputs, "reward_model": foreign}, Workspace(tmp_path))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_mini_batches 3 must divide the 8 completions of a worker"):
        changed(num_mini_batches=3)
    assert ppo.STAGE.inputs.keys() == {"model", "prompts", "reward_model"}
