"""Stage ``ppo``: proximal policy optimization (Schulman et al. 2017) with a reward model.

The method is that of InstructGPT (Ouyang et al. 2022). The reward of a completion is given at its last token; each
token is penalised by its contribution to the KL divergence from the initial policy. A value model assigns credit to
tokens. It is initialised from the reward model and has its own trunk, as in InstructGPT: with a shared trunk, the
initially large value errors would distort the policy, and the policy's checkpoint could not be exported as it is.

Dimensions: N completions, T tokens of prompt and completion, less 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    check_rollout_memory,
    checkpoints_between_rollouts,
    conclude,
    greedy_metrics,
    identity_of,
    reward_model_of,
    score_targets_alone,
    scratch_and_reference,
    training_prompts,
)
from lilpipe.alignment.rollout.collapse_monitor import CollapseMonitor
from lilpipe.alignment.rollout.completion_batch import (
    CompletionBatch,
    at_temperature,
    in_parts,
    measure_logprob_mismatch,
    micro_batches,
    num_parts,
    reference_logprobs,
)
from lilpipe.alignment.rollout.rollouts import (
    Group,
    MicroBatch,
    Rollout,
    Rollouts,
    Sampler,
    Sums,
    as_completion_batch,
    group_metrics,
    means,
)
from lilpipe.artifact import Inputs, one_input
from lilpipe.config.reinforcement import PPOConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.heads import HeadModel, load_head_model
from lilpipe.model.hub import read_model_config
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.vocabulary import TOKENIZER_FILE
from lilpipe.training import finetune
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.loop import train
from lilpipe.training.module_group import ModuleGroup
from lilpipe.training.replica import Loss

VALUE_DIRECTORY = "value"
"""Folder of the value model in the output."""


@dataclass(frozen=True)
class _Half:
    """Objective of one of the two models; see ``lilpipe.training.finetune.Objective``."""

    batches: Callable[[int], Sequence[TokenBatch]]
    loss: Callable[[Any, TokenBatch], Loss]


class PPO:
    """PPO objectives of policy and value model on one data rank, which share their rollouts.

    ``policy`` and ``value`` return the current full models for sampling and for values. ``reference`` is the initial
    policy; if None, it is the policy without what its adapters learned. ``sum_floats`` is an all-reduce.
    """

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        workspace: Workspace,
        *,
        policy: Callable[[], Transformer],
        value: Callable[[], HeadModel],
        reference: Transformer | None,
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
        """Return the micro-batches of an update; the first update of a rollout samples its completions."""
        if self._current[0] != step:
            rollout, number, update = self._rollouts.at(step)
            seed = derive_seed(self._sampler.seed, "ppo/minibatches", number, self._rank)
            parts = micro_batches(rollout.completions, update, self.config, seed=seed)
            metrics: list[Sums] = [rollout.metrics, *({} for _ in parts[1:])]
            extras = [MicroBatch(part, sums, number, update == 0) for part, sums in zip(parts, metrics, strict=True)]
            self._current = (
                step,
                [TokenBatch(extra.completions.inputs, extra.completions.targets, extra=extra) for extra in extras],
            )
        return self._current[1]

    def _policy_loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """Return the policy loss, summed over the tokens of a micro-batch."""
        part: MicroBatch = batch.extra
        completions, config, completion_mask_NT = part.completions, self.config, part.completions.completion_mask
        num_rows, num_tokens = completion_mask_NT.shape
        logprobs_NT = scores.logprobs[:num_rows, :num_tokens]  # parallel layouts may pad
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
        """Return the summed value loss, multiplied by ``vf_coef``."""
        part: MicroBatch = batch.extra
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
        """Return the KL coefficient of a rollout: fixed, or adapted to the KL divergence of previous rollouts."""
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
        reference_NT = reference_logprobs(policy, self.reference, completions, parts=parts, temperature=temperature)
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
        del metrics["frac_reward_zero_std"], metrics["replaced_groups"]  # meaningless for groups of one
        return Rollout(completions, metrics | self._divergence(completions, reference_NT, coefficient))

    def _scores(self, groups: Sequence[Group]) -> Tensor:
        """Return the reward of each completion, minus the penalty if it did not end ``[N]``."""
        penalty = self.config.missing_eos_penalty
        return torch.tensor([g.scored[0].total - penalty * (not g.completions[0].verdict.ended) for g in groups])

    def _divergence(self, completions: CompletionBatch, reference_NT: Tensor, coefficient: float) -> Sums:
        completion_mask_NT, num_completions = completions.completion_mask, float(len(completions.inputs))
        kl = k3(completions.old_logprobs, reference_NT)[completion_mask_NT].sum().item()
        plain = (completions.old_logprobs - reference_NT)[completion_mask_NT].sum().item()
        return {
            "kl": (kl, float(completion_mask_NT.sum())),  # per token, by the non-negative estimator k3
            "kl_per_completion": (plain, num_completions),
            "beta": (coefficient * num_completions, num_completions),
        }


# --- stage --------------------------------------------------------------------------------------------------------


def run(config: PPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train policy and value model on rollouts.

    Raises ``ArtifactError`` if the tokenizers of reward model and policy differ, and ``DataError`` if the run
    collapses; see ``lilpipe.alignment.rollout.collapse_monitor``.
    """
    source, prompts_artifact, judge = (one_input(inputs, role) for role in ("model", "prompts", "reward_model"))
    _check_same_tokens(source.path, judge.path)
    shape, tokenizer = read_model_config(source.path)[0], Tokenizer.load(source.path)
    prompts, validation = training_prompts(
        prompts_artifact,
        tokenizer,
        form=config.prompt_form,
        max_seq_len=shape.max_seq_len,
        workspace=workspace,
    )
    check_rollout_memory(
        config,
        inputs,
        prompts,
        tokenizer,
        workspace,
        stage="ppo",
        num_generations=1,
        has_reference=True,
        value_model=judge.path,
    )
    policy = finetune.load(config, source.path, stage="ppo")
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
    whole, reference = scratch_and_reference(config, source.path, policy, workers, needed=True)
    del policy  # before the trainer loads its own
    value = None if workers.mesh is None else load_head_model(judge.path)[0].to(distributed.device())
    objective = PPO(
        config,
        sampler,
        workspace,
        policy=lambda: finetune.whole_model(members["policy"], into=whole),
        value=lambda: finetune.whole_head_model(members["value"], into=value),
        reference=reference,
        workers=workers,
    )
    members = {
        "policy": finetune.build(config, source.path, objective.policy_objective, workers, stage="ppo"),
        "value": finetune.build(config, judge.path, objective.value_objective, workers, stage="ppo", head="stored"),
    }
    score_targets_alone(members["policy"], config, workers)

    def evaluate(_: Any, done: int) -> Mapping[str, float]:  # noqa: ARG001 (runs only at the end)
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
    finetune.export(members["policy"], tokenizer, workspace, source=source.path)
    finetune.export(members["value"], tokenizer, workspace, source=None, labels=["value"], folder=VALUE_DIRECTORY)
    return conclude("Proximal policy optimization", config, before, result, workspace)


def _check_same_tokens(policy: Path, reward_model: Path) -> None:
    """Raise ``ArtifactError`` if the tokenizers differ: the value model reads the policy's tokens."""
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
    optional_inputs={"adapter": "Checkpoint"},
    external=external,
    distributed=True,
    main_metric="validation_reward",
)
