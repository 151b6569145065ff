"""Stage ``grpo``: group relative policy optimization (Shao et al. 2024) and variants.

A rollout samples a group of completions per prompt, computes rewards, and raises the probability of completions that
are better than their group's mean. By default there is one update per rollout, and the loss is averaged over all tokens
of the batch (DAPO, Yu et al. 2025), so that tokens of long completions do not weigh less. The old log-probabilities are
the sampler's, which equal the trainer's up to rounding: no second forward pass is needed.

Dimensions: P prompts, G completions per prompt, N = P x G completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import Rewards, external
from lilpipe.alignment.rl.policy_gradient import (
    aggregate,
    group_advantages,
    group_std,
    k3,
    policy_ratio,
    surrogate_loss,
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
    by_length,
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
from lilpipe.alignment.rollout.shared_prompts import PromptSharing, by_prompt, share_prompts, sharing_of
from lilpipe.artifact import Inputs, one_input
from lilpipe.config.backend import BackendConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.model.hub import read_model_config
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss

FEWEST_TOKENS = 1e-6
"""Count of a micro-batch whose completions are all masked: avoids division by zero and adds nothing."""


class GRPO:
    """GRPO objective of one data rank; see ``lilpipe.training.finetune.Objective``.

    ``policy`` returns the current full model for sampling. ``reference`` is the initial policy; if None, it is the
    policy without what its adapters learned. With ``sharing``, completions to a prompt share one copy of it in a row;
    None gives each completion its own row. ``sum_floats`` is an all-reduce.
    """

    def __init__(
        self,
        config: GRPOConfig,
        sampler: Sampler,
        workspace: Workspace,
        *,
        policy: Callable[[], Transformer],
        reference: Transformer | None,
        workers: Workers,
        sharing: PromptSharing | None = None,
        sum_floats: Callable[[list[float]], list[float]] = distributed.sum_floats,
    ) -> None:
        self.config, self.reference = config, reference
        self._sampler, self._policy, self._sum_floats = sampler, policy, sum_floats
        self._rank = workers.data_rank
        self._sharing = sharing
        self.collapse_monitor = CollapseMonitor(
            config.collapse_monitor,
            workspace.scratch / "rollouts.jsonl",
            writes=distributed.is_main(),
            log=workspace.log,
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

    def batches(self, step: int) -> list[TokenBatch]:
        """Return the micro-batches of an update; the first update of a rollout samples its completions."""
        rollout, number, update = self._rollouts.at(step)
        seed = derive_seed(self.config.seed or 0, "grpo/minibatches", number, self._rank)
        split = by_length if self._sharing is None else by_prompt
        parts = micro_batches(rollout.completions, update, self.config, seed=seed, split=split)
        return [
            self._batch(part, {} if index else rollout.metrics, number, is_fresh=update == 0)
            for index, part in enumerate(parts)
        ]

    def _batch(self, completions: CompletionBatch, metrics: Sums, rollout: int, *, is_fresh: bool) -> TokenBatch:
        if self._sharing is None:
            extra = MicroBatch(completions, metrics, rollout, is_fresh=is_fresh)
            return TokenBatch(completions.inputs, completions.targets, extra=extra)
        rows = share_prompts(completions, self._sharing)
        extra = MicroBatch(completions, metrics, rollout, is_fresh=is_fresh, places=rows.places)
        return TokenBatch(rows.inputs, rows.targets, positions=rows.positions, mask=rows.mask, extra=extra)

    def loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """Return the summed loss of a micro-batch."""
        part: MicroBatch = batch.extra
        completions, config = part.completions, self.config
        if part.places is None:
            num_rows, num_tokens = completions.inputs.shape
            logprobs_NT = scores.logprobs[:num_rows, :num_tokens]  # parallel layouts may pad
        else:
            logprobs_NT = scores.logprobs.flatten()[part.places].where(completions.completion_mask, 0.0)
        loss_NT = surrogate_loss(
            logprobs_NT,
            completions.old_logprobs,
            completions.advantages,
            completions.counts,
            epsilon_low=config.epsilon_low or config.epsilon,
            epsilon_high=config.epsilon_high or config.epsilon,
            importance_sampling_level=config.importance_sampling_level,
        )
        if completions.reference_logprobs is not None:
            loss_NT = loss_NT + config.beta * k3(logprobs_NT, completions.reference_logprobs)
        total, count = aggregate(
            loss_NT, completions.counts, over=config.aggregation, max_tokens=config.sampling.max_new_tokens
        )
        metrics = part.rollout_metrics | self._metrics(part, logprobs_NT.detach())
        num_tokens = int((completions.lengths + 1).sum())
        return Loss(total, max(count, FEWEST_TOKENS), num_tokens=num_tokens, metrics=metrics)

    def _metrics(self, part: MicroBatch, logprobs_NT: Tensor) -> Sums:
        completions, config = part.completions, self.config
        completion_mask_NT, num_completion_tokens = (
            completions.completion_mask,
            float(completions.completion_mask.sum()),
        )
        if part.is_fresh:
            self._logprob_mismatch = measure_logprob_mismatch(
                logprobs_NT, completions, config.collapse_monitor, rollout=part.rollout
            )
        ratio_NT = policy_ratio(
            logprobs_NT, completions.old_logprobs, completion_mask_NT, level=config.importance_sampling_level
        )
        low, high = config.epsilon_low or config.epsilon, config.epsilon_high or config.epsilon
        clipped_NT = (ratio_NT < 1 - low) | (ratio_NT > 1 + high)
        return {
            "clip_ratio": (clipped_NT[completion_mask_NT].sum().item(), num_completion_tokens),
            "logprob_mismatch": self._logprob_mismatch,  # of the rollout's first update; about 1e-6 is expected
        }

    # --- rollouts -------------------------------------------------------------------------------------------------

    def _make(self, number: int) -> Rollout:
        model = self._policy()
        was_training = model.training
        model.eval()
        groups, num_replaced = self._sampler.draw(
            model, number, dynamic_sampling_rounds=self.config.dynamic_sampling_rounds
        )
        rollout = self._as_rollout(model, groups, group_metrics(groups, num_replaced), number)
        model.train(was_training)
        self.collapse_monitor.note(number, means(rollout.metrics, self._sum_floats))
        return rollout

    def _as_rollout(self, model: Transformer, groups: Sequence[Group], metrics: Sums, number: int) -> Rollout:
        config = self.config
        completions = as_completion_batch(
            groups,
            self._sampler.tokenizer,
            mask_truncated_completions=config.mask_truncated_completions,
            device=distributed.device(),
        )
        if config.sampling.temperature != 1:
            completions = at_temperature(model, completions, config, rollout=number)
        advantages_PG = self._advantages(torch.tensor([[answer.total for answer in group.scored] for group in groups]))
        advantages_N1 = advantages_PG.flatten()[:, None].to(completions.inputs.device)
        completions = completions._replace(advantages=advantages_N1.expand_as(completions.old_logprobs))
        if config.beta:
            reference_NT = reference_logprobs(
                model,
                self.reference,
                completions,
                parts=num_parts(config),
                temperature=config.sampling.temperature,
            )
            completions = completions._replace(reference_logprobs=reference_NT)
            divergence = k3(completions.old_logprobs, reference_NT)[completions.completion_mask].sum().item()
            metrics = metrics | {"kl": (divergence, metrics["length"][0])}
        return Rollout(completions, metrics)

    def _advantages(self, rewards_PG: Tensor) -> Tensor:
        """Return the advantages of this worker's groups; a batch standard deviation is over all workers."""
        if self.config.scale_rewards == "none":
            return group_advantages(rewards_PG, std=None)
        if self.config.scale_rewards == "group":
            return group_advantages(rewards_PG, std=group_std(rewards_PG))
        totals = [float(rewards_PG.numel()), rewards_PG.sum().item(), rewards_PG.double().square().sum().item()]
        count, total, squares = self._sum_floats(totals)
        num_completions = self.config.prompts_per_step * self.config.num_generations
        variance = max(squares / count - (total / count) ** 2, 0.0) * num_completions / (num_completions - 1)
        return group_advantages(rewards_PG, std=variance**0.5)


# --- stage --------------------------------------------------------------------------------------------------------


def run(config: GRPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on rollouts. Raises ``DataError`` if the run collapses; see ``rollout/collapse_monitor.py``."""
    source, prompts_artifact = one_input(inputs, "model"), one_input(inputs, "prompts")
    shape, tokenizer = read_model_config(source.path)[0], Tokenizer.load(source.path)
    prompts, validation = training_prompts(
        prompts_artifact,
        tokenizer,
        form=config.prompt_form,
        max_seq_len=shape.max_seq_len,
        workspace=workspace,
    )
    workers = Workers(config)
    check_rollout_memory(
        config,
        inputs,
        prompts,
        tokenizer,
        workspace,
        stage="grpo",
        num_generations=config.num_generations,
        has_reference=config.beta > 0,
    )
    model = finetune.load(config, source.path, stage="grpo")
    rewards = Rewards(config.rewards, reward_model=reward_model_of(inputs))
    rewards.log_sandbox(prompts, workspace)
    before = greedy_metrics(model, tokenizer, validation, rewards, config)
    whole, reference = scratch_and_reference(config, source.path, model, workers, needed=config.beta > 0)
    sharing = _sharing(model, workers)
    del model  # before the trainer loads its own
    sampler = Sampler(
        tokenizer,
        prompts,
        rewards,
        config,
        stage="grpo",
        num_generations=config.num_generations,
        data_rank=workers.data_rank,
        num_data_ranks=workers.num_data_ranks,
    )
    objective = GRPO(
        config,
        sampler,
        workspace,
        policy=lambda: finetune.whole_model(trainer_module, into=whole),
        reference=reference,
        workers=workers,
        sharing=sharing,
    )
    trainer_module = finetune.build(config, source.path, objective, workers, stage="grpo")
    score_targets_alone(trainer_module, config, workers)

    def evaluate(_: Any, done: int) -> Mapping[str, float]:  # noqa: ARG001 (runs only at the end)
        return greedy_metrics(finetune.whole_model(trainer_module, into=whole), tokenizer, validation, rewards, config)

    result = train(
        trainer_module,
        num_steps=config.num_steps * config.updates_per_rollout,
        workspace=workspace,
        section=checkpoints_between_rollouts(config),
        optimizer=config.optimizer,
        evaluate=evaluate,
        identity=identity_of(inputs),
    )
    finetune.export(trainer_module, tokenizer, workspace, source=source.path)
    return conclude("Group relative policy optimization", config, before, result, workspace)


def _sharing(model: Transformer, workers: Workers) -> PromptSharing | None:
    """Return how prompts are shared, or None to disable it.

    On a GPU, attention without a mask is faster than what sharing saves. Dropout depends on row and position. A
    class of transformers takes no masks.
    """
    shares = workers.mesh is None and model.device.type == "cpu" and not model.config.dropout
    return sharing_of(model.config) if shares and not isinstance(model.config, BackendConfig) else None


STAGE = Stage(
    name="grpo",
    output="Checkpoint",
    config=GRPOConfig,
    run=run,
    inputs={"model": "Checkpoint", "prompts": "Prompts"},
    optional_inputs={"reward_model": "Checkpoint", "adapter": "Checkpoint"},
    external=external,
    distributed=True,
    main_metric="validation_accuracy",
)
