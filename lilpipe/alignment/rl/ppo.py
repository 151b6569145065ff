"""Stage ``ppo``: proximal policy optimisation (Schulman et al. 2017) against a reward model, as InstructGPT has it
(Ouyang et al. 2022).

The reward of a completion comes with its last token; each token costs what it adds to the KL divergence from the first
policy. A value model tells how much of the reward each token is to be credited with. It starts as the reward model
and has a trunk of its own, as InstructGPT's: sharing the policy's would let errors of the value, large at first, bend
the policy, and the policy's checkpoint could not be exported as it stands.

Dimensions: N completions, T tokens of prompt and completion but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import Rewards, external
from lilpipe.alignment.rl.policy_gradient import (
    adapted_beta,
    clipped_value_loss,
    generalised_advantages,
    k3,
    surrogate_loss,
    token_rewards,
    whiten,
)
from lilpipe.alignment.rl.reinforcement import (
    checkpoints_between_rollouts,
    conclude,
    greedy_metrics,
    identity_of,
    reward_model_of,
    score_targets_alone,
    training_prompts,
)
from lilpipe.alignment.rollout.collapse_monitor import CollapseMonitor
from lilpipe.alignment.rollout.rollouts import (
    CompletionBatch,
    Group,
    Rollout,
    Rollouts,
    Sampler,
    Sums,
    as_completion_batch,
    at_temperature,
    completion_logprobs,
    group_metrics,
    in_parts,
    means,
    measure_logprob_mismatch,
    micro_batches,
    num_parts,
)
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config.reinforcement import PPOConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.heads import HeadModel, load_head_model
from lilpipe.model.hub import load_model
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.vocabulary import TOKENIZER_FILE
from lilpipe.training import finetune
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.loop import train
from lilpipe.training.module_group import ModuleGroup
from lilpipe.training.replica import Loss

VALUE_DIRECTORY = "value"
"""Of the value model, in the output."""


class _Part(NamedTuple):
    completions: CompletionBatch
    rollout_metrics: Sums
    """Those of the whole rollout, with its first micro-batch alone."""
    rollout: int
    is_fresh: bool
    """Whether the weights are still those that drew the completions."""


@dataclass(frozen=True)
class _Half:
    """What one of the two models trains on: an ``Objective`` of ``lilpipe.training.finetune``."""

    batches: Callable[[int], Sequence[TokenBatch]]
    loss: Callable[[Any, TokenBatch], Loss]


class PPO:
    """The objectives of policy and value model on one data rank, which share their rollouts.

    ``policy`` and ``value`` give the models of the moment, whole, to sample from and to ask for values. ``sum_floats``
    adds numbers up over all workers.
    """

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        workspace: Workspace,
        *,
        policy: Callable[[], Transformer],
        value: Callable[[], HeadModel],
        reference: Transformer,
        workers: Workers,
        sum_floats: Callable[[list[float]], list[float]] = distributed.sum_floats,
    ) -> None:
        self.config, self.reference = config, reference
        self.policy_objective = _Half(self._batches, self._policy_loss)
        self.value_objective = _Half(self._batches, self._value_loss)
        self._policy, self._value = policy, value
        self._sampler, self._sum_floats, self._rank = sampler, sum_floats, workers.data_rank
        path = workspace.scratch / "rollouts.jsonl"
        self.collapse_monitor = CollapseMonitor(
            config.collapse_monitor, path, writes=distributed.is_main(), log=workspace.log
        )
        self._rollouts = Rollouts(
            self._make,
            workspace.scratch / "rollouts",
            updates=config.updates_per_rollout,
            data_rank=workers.data_rank,
            num_data_ranks=workers.num_data_ranks,
            device=distributed.device(),
        )
        self._logprob_mismatch = (0.0, 0.0)
        self._current: tuple[int, list[TokenBatch]] = (-1, [])

    def _batches(self, step: int) -> list[TokenBatch]:
        """The micro-batches of an update; the first of a rollout draws its completions."""
        if self._current[0] != step:
            rollout, number, update = self._rollouts.at(step)
            seed = derive_seed(self._sampler.seed, "ppo/minibatches", number, self._rank)
            parts = micro_batches(rollout.completions, update, self.config, seed=seed)
            metrics: list[Sums] = [rollout.metrics, *({} for _ in parts[1:])]
            extras = [_Part(part, sums, number, update == 0) for part, sums in zip(parts, metrics, strict=True)]
            self._current = (
                step,
                [TokenBatch(extra.completions.inputs, extra.completions.targets, extra=extra) for extra in extras],
            )
        return self._current[1]

    def _policy_loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """The policy's part of the loss, summed over the tokens of a micro-batch."""
        part: _Part = batch.extra
        completions, config, completion_mask_NT = part.completions, self.config, part.completions.completion_mask
        num_rows, num_tokens = completion_mask_NT.shape
        logprobs_NT = scores.logprobs[:num_rows, :num_tokens]  # layouts may pad
        loss_NT = surrogate_loss(
            logprobs_NT,
            completions.old_logprobs,
            completions.advantages,
            completion_mask_NT,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon,
        )
        count = float(completion_mask_NT.sum())
        if part.is_fresh:
            self._logprob_mismatch = measure_logprob_mismatch(
                logprobs_NT.detach(), completions, config.collapse_monitor, rollout=part.rollout
            )
        ratio = (logprobs_NT.detach() - completions.old_logprobs)[completion_mask_NT].exp()
        total = loss_NT[completion_mask_NT].sum()
        metrics = part.rollout_metrics | {
            "policy_loss": (total.item(), count),
            "clip_ratio": (((ratio - 1).abs() > config.epsilon).sum().item(), count),
            "logprob_mismatch": self._logprob_mismatch,
        }
        return Loss(total, count, num_tokens=int((completions.lengths + 1).sum()), metrics=metrics)

    def _value_loss(self, outputs_NTO: Tensor, batch: TokenBatch) -> Loss:
        """The value model's part, by its coefficient."""
        part: _Part = batch.extra
        completions, config, completion_mask_NT = part.completions, self.config, part.completions.completion_mask
        assert completions.old_values is not None
        assert completions.returns is not None
        num_rows, num_tokens = completion_mask_NT.shape
        loss_NT = clipped_value_loss(
            outputs_NTO[:num_rows, :num_tokens, 0],
            completions.old_values,
            completions.returns,
            clip_range=config.cliprange_value,
        )
        count, total = float(completion_mask_NT.sum()), loss_NT[completion_mask_NT].sum()
        return Loss(config.vf_coef * total, count, num_tokens=0, metrics={"value_loss": (total.item(), count)})

    # --- rollouts -------------------------------------------------------------------------------------------------

    def beta(self, rollout: int) -> float:
        """The coefficient of a rollout: fixed, or adapted to the divergence of those before it."""
        coefficient, config = self.config.beta, self.config
        if config.kl_target is None:
            return coefficient
        for values in self.collapse_monitor.before(rollout):
            coefficient = adapted_beta(
                coefficient, values["kl_per_completion"], target=config.kl_target, rate=config.kl_rate
            )
        return coefficient

    def _make(self, number: int) -> Rollout:
        policy, value = self._policy(), self._value()
        was_training = policy.training
        policy.eval()
        value.eval()
        groups, _ = self._sampler.draw(policy, number)
        rollout = self._as_rollout(policy, value, groups, number)
        policy.train(was_training)
        value.train(was_training)
        self.collapse_monitor.note(number, means(rollout.metrics, self._sum_floats))
        return rollout

    def _as_rollout(self, policy: Transformer, value: HeadModel, groups: Sequence[Group], number: int) -> Rollout:
        config, parts, temperature = self.config, num_parts(self.config), self.config.sampling.temperature
        device, coefficient = distributed.device(), self.beta(number)
        completions = as_completion_batch(
            groups, self._sampler.tokenizer, mask_truncated_completions=False, device=device
        )
        if temperature != 1:
            completions = at_temperature(policy, completions, config, rollout=number)
        reference_NT = completion_logprobs(self.reference, completions, parts=parts, temperature=temperature)
        values_NT = in_parts(lambda part: value(part.inputs)[..., 0], completions, parts)
        rewards_NT = token_rewards(
            self._scores(groups).to(device),
            completions.old_logprobs,
            reference_NT,
            completions.completion_mask,
            beta=coefficient,
        )
        advantages_NT = generalised_advantages(
            rewards_NT, values_NT, completions.completion_mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        completions = completions._replace(
            advantages=whiten(advantages_NT, completions.completion_mask, self._sum_floats),
            old_values=values_NT,
            returns=advantages_NT + values_NT,
        )
        metrics = group_metrics(groups, 0)
        del metrics["frac_reward_zero_std"], metrics["replaced_groups"]  # of groups of one
        return Rollout(completions, metrics | self._divergence(completions, reference_NT, coefficient))

    def _scores(self, groups: Sequence[Group]) -> Tensor:
        """What each completion is worth, less the penalty of one without an end ``[N]``."""
        penalty = self.config.missing_eos_penalty
        return torch.tensor([g.scored[0].total - penalty * (not g.completions[0].verdict.ended) for g in groups])

    def _divergence(self, completions: CompletionBatch, reference_NT: Tensor, coefficient: float) -> Sums:
        completion_mask_NT, num_completions = completions.completion_mask, float(len(completions.inputs))
        kl = k3(completions.old_logprobs, reference_NT)[completion_mask_NT].sum().item()
        plain = (completions.old_logprobs - reference_NT)[completion_mask_NT].sum().item()
        return {
            "kl": (kl, float(completion_mask_NT.sum())),  # per token, by the estimator that is never negative
            "kl_per_completion": (plain, num_completions),
            "beta": (coefficient * num_completions, num_completions),
        }


# --- the stage ----------------------------------------------------------------------------------------------------


def run(config: PPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train policy and value model on rollouts.

    Raises ``ArtifactError`` if the reward model reads other tokens than the policy writes, and ``DataError`` if the
    run collapses; see ``lilpipe.alignment.rollout.collapse_monitor``.
    """
    source, prompts_artifact, judge = (inputs[role] for role in ("model", "prompts", "reward_model"))
    assert isinstance(source, Artifact)
    assert isinstance(prompts_artifact, Artifact)
    assert isinstance(judge, Artifact)
    _check_same_tokens(source.path, judge.path)
    policy, tokenizer = load_model(source.path)
    prompts, validation = training_prompts(
        prompts_artifact,
        tokenizer,
        form=config.prompt_form,
        max_seq_len=policy.config.max_seq_len,
        workspace=workspace,
    )
    policy = policy.to(distributed.device())
    rewards = Rewards(config.rewards, reward_model=reward_model_of(inputs))
    before = greedy_metrics(policy, tokenizer, validation, rewards, config)
    workers = Workers(config)
    sampler = Sampler(
        tokenizer,
        prompts,
        rewards,
        config,
        stage="ppo",
        num_generations=1,
        data_rank=workers.data_rank,
        num_data_ranks=workers.num_data_ranks,
    )
    # What is filled from the others where the models are cut.
    whole = None if workers.mesh is None else policy
    value = None if workers.mesh is None else load_head_model(judge.path)[0].to(distributed.device())
    objective = PPO(
        config,
        sampler,
        workspace,
        policy=lambda: finetune.whole_model(members["policy"], into=whole),
        value=lambda: finetune.whole_head_model(members["value"], into=value),
        reference=load_model(source.path)[0].to(distributed.device()),
        workers=workers,
    )
    members = {
        "policy": finetune.build(config, source.path, objective.policy_objective, workers, stage="ppo"),
        "value": finetune.build(config, judge.path, objective.value_objective, workers, stage="ppo", head="stored"),
    }
    score_targets_alone(members["policy"], config, workers)

    def evaluate(_: Any, done: int) -> Mapping[str, float]:  # noqa: ARG001 (at the end alone)
        return greedy_metrics(
            finetune.whole_model(members["policy"], into=whole), tokenizer, validation, rewards, config
        )

    result = train(
        ModuleGroup(members),
        num_steps=config.num_steps * config.updates_per_rollout,
        workspace=workspace,
        section=checkpoints_between_rollouts(config),
        optimizer=config.optimizer,
        evaluate=evaluate,
        identity=identity_of(inputs),
    )
    finetune.export(members["policy"], tokenizer, workspace)
    finetune.export(members["value"], tokenizer, workspace, labels=["value"], folder=VALUE_DIRECTORY)
    return conclude("Proximal policy optimisation", config, before, result, workspace)


def _check_same_tokens(policy: Path, reward_model: Path) -> None:
    """The value model, which starts as the reward model, reads the policy's tokens as they are."""
    first, second = policy / TOKENIZER_FILE, reward_model / TOKENIZER_FILE
    if first.read_bytes() != second.read_bytes():
        raise ArtifactError(
            f"{second}: differs from {first}, expected the same: the value model starts as the reward model and reads "
            "the policy's tokens; train a reward model from a checkpoint with the policy's tokenizer"
        )


STAGE = Stage(
    name="ppo",
    output="Checkpoint",
    config=PPOConfig,
    run=run,
    inputs={"model": "Checkpoint", "prompts": "Prompts", "reward_model": "Checkpoint"},
    external=external,
    distributed=True,
    main_metric="validation_reward",
)
