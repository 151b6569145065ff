"""Losses and gradients against TRL 1.16, whose methods used here are private: pyproject.toml pins the version.

TRL has no PPO since 1.0: its policy loss is that of TRL's GRPO with an advantage of each token, its reward that of
TRL's RLOO, and ``test_ppo`` holds the values to the definitions.
"""

from typing import Any, cast

import datasets
import pytest
import torch

from lilpipe.alignment.rewards.reward_functions import overlong_penalty
from lilpipe.alignment.rl.grpo import GRPO
from lilpipe.alignment.rl.policy_gradient import (
    generalised_advantages,
    group_advantages,
    group_std,
    surrogate_loss,
    token_rewards,
)
from lilpipe.alignment.rollout.completion_batch import CompletionBatch, at_targets
from lilpipe.alignment.rollout.rollouts import Rollout
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.model.scores import IGNORED, token_scores
from lilpipe.model.transformer import token_logprobs
from lilpipe.stage import Workspace
from tests.alignment.twins import VOCAB_SIZE, our_model, their_model

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

MAX_NEW_TOKENS = 7

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def make_trainer(tmp_path, word_tokenizer):
    def make(model, **values):
        args = {"num_generations": 2, "per_device_train_batch_size": 4, "use_bias_correction_kl": False, "beta": 0.0}
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, **{**args, **values}),
            train_dataset=datasets.Dataset.from_list([{"prompt": "w2"}]),
            processing_class=word_tokenizer,
        )
        trainer.model.eval()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def assert_same_gradients(ours, theirs, *, tolerance=1e-6):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() < tolerance, name


class OneData:
    """The place of the only worker."""

    data_rank, num_data_ranks, mesh = 0, 1, None


class TwoPrompts:
    """Four answers of up to 6 tokens to prompts of 3."""

    def __init__(self, ours, reference, *, temperature=1.0):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(2, VOCAB_SIZE, (4, 9), generator=generator)
        self.mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
        self.advantages = torch.tensor([1.2, -0.7, 0.4, -1.5])
        with torch.no_grad():
            current = ours(self.tokens[:, :-1])[:, 2:].div(temperature).log_softmax(-1)
            current = current.gather(-1, self.tokens[:, 3:, None])[..., 0]
            self.reference = token_logprobs(reference, self.tokens)[:, 2:]
        self.old = current + 0.4 * torch.randn(4, 6, generator=generator)  # so that clipping is at work
        assert ((current - self.old).exp() - 1).abs()[self.mask].gt(0.3).any()

    def theirs(self):
        return {
            "prompt_ids": self.tokens[:, :3],
            "prompt_mask": torch.ones(4, 3, dtype=torch.long),
            "completion_ids": self.tokens[:, 3:],
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.reference,
            "num_items_in_batch": self.mask.sum(),
        }

    def ours(self, *, with_reference):
        drawn = torch.cat([torch.zeros(4, 2, dtype=torch.bool), self.mask], dim=1)
        wide = [torch.zeros(4, 8).masked_scatter(drawn, values[self.mask]) for values in (self.old, self.reference)]
        return CompletionBatch(
            inputs=self.tokens[:, :-1],
            targets=self.tokens[:, 1:].where(drawn, IGNORED),
            counts=drawn,
            old_logprobs=wide[0],
            advantages=self.advantages[:, None].expand(4, 8),
            reference_logprobs=wide[1] if with_reference else None,
        )


def our_loss(tmp_path, model, answers, **settings):
    """Loss of the objective's micro-batches, two of them, with its gradient in the model."""
    config = GRPOConfig(
        seed=0, accumulation_steps=2, sampling=SamplingConfig(max_new_tokens=MAX_NEW_TOKENS), **settings
    )
    nothing, workspace, workers = cast("Any", None), Workspace(tmp_path / "ours"), cast("Any", OneData())
    objective = GRPO(config, nothing, workspace, policy=nothing, reference=None, workers=workers, sum_floats=list)
    objective._rollouts._current = (0, Rollout(answers, {}))
    objective._rollouts._updates = 2  # step 1 is the second update of rollout 0: the weights are no longer those
    batches = objective.batches(1)
    model.token_scores = at_targets(token_scores)
    parts = [objective.loss(model(batch.inputs, targets_BT=batch.targets), batch) for batch in batches]
    assert len(parts) == 2
    loss = torch.stack([part.total for part in parts]).sum() / sum(part.count for part in parts)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "dapo"}, {"aggregation": "token"}),
        ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
        ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
        ({"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3}, {"epsilon_low": 0.1, "epsilon_high": 0.3}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.05},
            {
                "aggregation": "sequence",
                "importance_sampling_level": "sequence",
                "epsilon_low": 0.02,
                "epsilon_high": 0.05,
            },
        ),
    ],
    ids=["dapo", "grpo", "dr_grpo", "clip-higher", "gspo"],
)
def test_the_loss_of_the_family_and_its_gradient_are_trls(tmp_path, make_trainer, theirs, ours, beta):
    model, reference = our_model(0), our_model(1)
    trainer = make_trainer(their_model(model), max_completion_length=MAX_NEW_TOKENS, **theirs)
    trainer.beta = beta
    batch = TwoPrompts(model, reference)
    expected = trainer._compute_loss(trainer.model, batch.theirs())
    expected.backward()
    answers = batch.ours(with_reference=beta > 0)
    got = our_loss(tmp_path, model, answers, beta=beta, **ours)
    assert got == pytest.approx(expected.item(), abs=1e-6)
    assert_same_gradients(model, trainer.model)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("dapo", "token"), ("grpo", "sequence"), ("dr_grpo", "constant")], ids=lambda name: name
)
def test_answers_that_are_left_out_for_their_length_leave_trls_loss_and_gradient(tmp_path, make_trainer, theirs, ours):
    model = our_model(0)
    trainer = make_trainer(their_model(model), max_completion_length=MAX_NEW_TOKENS, loss_type=theirs)
    batch = TwoPrompts(model, model)
    answers = batch.ours(with_reference=False)
    answers = answers._replace(counts=answers.completion_mask & torch.tensor([False, True, True, True])[:, None])
    batch.mask[0] = False  # as TRL's mask_truncated_completions does
    expected = trainer._compute_loss(trainer.model, batch.theirs())
    expected.backward()
    assert our_loss(tmp_path, model, answers, aggregation=ours) == pytest.approx(expected.item(), abs=1e-6)
    assert_same_gradients(model, trainer.model)


@pytest.mark.parametrize("buffer", [1, 20, 100])
def test_the_penalty_of_over_long_answers_is_trls(buffer):
    from trl.rewards.other_rewards import get_soft_overlong_punishment

    lengths = [0, 1, 79, 80, 81, 90, 99, 100, 101, 300]
    expected = get_soft_overlong_punishment(100, buffer)([[1] * length for length in lengths])
    assert [overlong_penalty(length, limit=100, buffer=buffer) for length in lengths] == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(make_trainer, monkeypatch, scale):
    rewards = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.9, 0.9]])
    trainer = make_trainer(
        their_model(our_model(0)),
        scale_rewards=scale,
        num_generations=3,
        per_device_train_batch_size=6,
        max_completion_length=3,
    )
    trainer.model.train()
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: rewards.reshape(6, 1))
    theirs = trainer._generate_and_score_completions([{"prompt": word} for word in ("w2", "w3") for _ in range(3)])
    std = {"group": group_std(rewards), "batch": rewards.std().item(), "none": None}[scale]
    assert torch.allclose(group_advantages(rewards, std=std).flatten(), theirs["advantages"], atol=1e-6)


def test_scores_at_another_temperature_are_trls(make_trainer):
    model = our_model(0)
    trainer = make_trainer(their_model(model), temperature=0.7)
    batch = TwoPrompts(model, model, temperature=0.7)
    whole = torch.ones(4, 9, dtype=torch.long)
    theirs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, batch.tokens, whole, 6)
    targets = batch.tokens[:, 1:].clone()
    targets[:, :2] = IGNORED
    hidden = model.model(batch.tokens[:, :-1])
    ours = at_targets(token_scores, 0.7)(hidden, model.output_weight, targets).logprobs
    assert (ours[:, 2:] - theirs).abs().max() < 1e-5
    assert ours[:, :2].eq(0).all()


# --- PPO ----------------------------------------------------------------------------------------------------------


def test_the_policy_loss_of_ppo_and_its_gradient_are_trls_with_an_advantage_of_each_token(make_trainer):
    model = our_model(0)
    trainer = make_trainer(their_model(model), loss_type="dapo", epsilon=0.15, max_completion_length=MAX_NEW_TOKENS)
    batch = TwoPrompts(model, model)
    advantages = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = trainer._compute_loss(trainer.model, {**batch.theirs(), "advantages": advantages})
    expected.backward()

    answers = batch.ours(with_reference=False)
    wide = torch.zeros(4, 8).masked_scatter(answers.completion_mask, advantages[batch.mask])
    logprobs = model(answers.inputs, targets_BT=answers.targets).logprobs
    got = surrogate_loss(
        logprobs, answers.old_logprobs, wide, answers.completion_mask, epsilon_low=0.15, epsilon_high=0.15
    )
    got = got[answers.completion_mask].mean()
    got.backward()
    assert got.item() == pytest.approx(expected.item(), abs=1e-6)
    assert_same_gradients(model, trainer.model)


def test_the_reward_of_ppo_less_the_divergence_is_that_of_trls_rloo(tmp_path, word_tokenizer, monkeypatch):
    model, reference, beta = our_model(0), our_model(1), 0.3
    scores = torch.tensor([1.0, 0.0, 0.3, 2.0])
    args = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 5, "beta": 0.0}
    trainer = trl.RLOOTrainer(
        model=their_model(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.RLOOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, **args),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w2"}]),
        processing_class=word_tokenizer,
    )
    trainer.beta, trainer.ref_model = beta, their_model(reference).eval()
    trl.trainer.rloo_trainer.add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: scores[:, None])
    theirs = trainer._generate_and_score_completions([{"prompt": word} for word in ("w2", "w2", "w3", "w3")])

    tokens = torch.cat([theirs["prompt_ids"], theirs["completion_ids"]], dim=1)
    drawn = torch.cat([torch.zeros_like(theirs["prompt_ids"]), theirs["completion_mask"]], dim=1)[:, 1:].bool()
    with torch.no_grad():
        logprobs, first = token_logprobs(model, tokens), token_logprobs(reference, tokens)
    rewards = token_rewards(scores, logprobs, first, drawn, beta=beta)
    # Without values and discount the advantage of an answer's first token is the whole of its reward.
    advantages = generalised_advantages(rewards, torch.zeros_like(rewards), drawn, gamma=1.0, gae_lambda=1.0)
    whole = advantages.gather(1, drawn.int().argmax(dim=1, keepdim=True)).view(2, 2)
    expected = theirs["advantages"].view(2, 2)
    assert (whole - scores.view(2, 2)).abs().max() > 0.1
    assert torch.allclose(whole - whole.flip(1), expected, atol=1e-5)
