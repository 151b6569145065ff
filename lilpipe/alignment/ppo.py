"""Stage ``ppo``: proximal policy optimisation (Schulman et al. 2017) against a reward model, as InstructGPT has it
(Ouyang et al. 2022).

The reward of an answer comes with its last token; each token costs what it adds to the KL divergence from the first
policy. A value model tells how much of the reward each token is to be credited with. It starts as the reward model
and has a trunk of its own, as InstructGPT's: sharing the policy's would let errors of the value, large at first, bend
the policy, and the policy's checkpoint could not be exported as it stands.

Dimensions: N answers, T tokens of prompt and answer but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.alignment.grpo import (
    checkpoints_between_rollouts,
    greedy_metrics,
    identity_of,
    reward_model_of,
    training_prompts,
)
from lilpipe.alignment.policy_gradient import (
    adapted_kl_coefficient,
    clipped_value_loss,
    generalised_advantages,
    k3,
    surrogate_loss,
    token_rewards,
    whiten,
)
from lilpipe.alignment.rewards import Rewards, external
from lilpipe.alignment.rollouts import (
    Answers,
    Group,
    Rollout,
    Rollouts,
    Sampler,
    Sums,
    answer_logprobs,
    as_answers,
    at_targets,
    at_temperature,
    check_gap,
    group_metrics,
    in_parts,
    means,
    micro_batches,
    num_parts,
)
from lilpipe.alignment.watch import Watch
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import PPOConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.heads import HeadModel, load_head_model, save_head_model
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.vocabulary import TOKENIZER_FILE
from lilpipe.training.curves import write_report
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, Replica

VALUE_DIRECTORY = "value"
"""Of the value model, in the output."""


class ActorCritic(nn.Module):
    """Policy and value model, which one optimizer trains."""

    def __init__(self, policy: Transformer, value: HeadModel) -> None:
        super().__init__()
        self.policy, self.value = policy, value

    def seed_dropout(self, *parts: int) -> None:
        """Let what is dropped follow from these numbers."""
        for model in (self.policy, self.value):
            model.set_dropout_seed(*parts)


class _Part(NamedTuple):
    answers: Answers
    rollout_metrics: Sums
    """Those of the whole rollout, with its first micro-batch alone."""
    rollout: int
    is_fresh: bool
    """Whether the weights are still those that drew the answers."""


class PPO:
    """The objective on one worker. ``sum_floats`` adds numbers up over all of them."""

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        workspace: Workspace,
        models: ActorCritic,
        *,
        reference: Transformer,
        rank: int,
        num_ranks: int,
        sum_floats: Callable[[list[float]], list[float]] = distributed.sum_floats,
    ) -> None:
        self.config, self.models, self.reference = config, models, reference
        self._sampler, self._sum_floats, self._rank = sampler, sum_floats, rank
        path = workspace.scratch / "rollouts.jsonl"
        self.watch = Watch(config.watch, path, writes=distributed.is_main(), log=workspace.log)
        self._rollouts = Rollouts(
            self._make,
            workspace.scratch / "rollouts",
            updates=config.updates_per_rollout,
            data_rank=rank,
            num_data_ranks=num_ranks,
            device=distributed.device(),
        )
        self._sampler_gap = (0.0, 0.0)
        self._current: tuple[int, list[_Part]] = (-1, [])

    def loss(self, models: nn.Module, step: int, micro: int) -> Loss:
        """The loss of a micro-batch of an update, summed over its tokens."""
        assert isinstance(models, ActorCritic)
        models.seed_dropout(self._sampler.seed, step, self._rank, micro)
        part = self._parts(step)[micro]
        logprobs_NT = models.policy(part.answers.inputs, targets_BT=part.answers.targets).logprobs
        return self._loss(logprobs_NT, models.value(part.answers.inputs)[..., 0], part)

    def _parts(self, step: int) -> list[_Part]:
        """The micro-batches of an update; the first of a rollout draws its answers."""
        if self._current[0] != step:
            rollout, number, update = self._rollouts.at(step)
            seed = derive_seed(self._sampler.seed, "ppo/minibatches", number, self._rank)
            parts = micro_batches(rollout.answers, update, self.config, seed=seed)
            metrics: list[Sums] = [rollout.metrics, *({} for _ in parts[1:])]
            self._current = (
                step,
                [_Part(part, sums, number, update == 0) for part, sums in zip(parts, metrics, strict=True)],
            )
        return self._current[1]

    def _loss(self, logprobs_NT: Tensor, values_NT: Tensor, part: _Part) -> Loss:
        answers, config, drawn_NT = part.answers, self.config, part.answers.drawn
        assert answers.old_values is not None
        assert answers.returns is not None
        policy_NT = surrogate_loss(
            logprobs_NT,
            answers.old_logprobs,
            answers.advantages,
            drawn_NT,
            clip_low=config.clip_range,
            clip_high=config.clip_range,
        )
        value_NT = clipped_value_loss(
            values_NT, answers.old_values, answers.returns, clip_range=config.value_clip_range
        )
        count = float(drawn_NT.sum())
        if part.is_fresh:
            self._sampler_gap = check_gap(logprobs_NT.detach(), answers, config.watch, rollout=part.rollout)
        ratio = (logprobs_NT.detach() - answers.old_logprobs)[drawn_NT].exp()
        metrics = part.rollout_metrics | {
            "policy_loss": (policy_NT[drawn_NT].sum().item(), count),
            "value_loss": (value_NT[drawn_NT].sum().item(), count),
            "clipped": (((ratio - 1).abs() > config.clip_range).sum().item(), count),
            "sampler_gap": self._sampler_gap,
        }
        total = (policy_NT + config.value_coefficient * value_NT)[drawn_NT].sum()
        return Loss(total, count, num_tokens=int((answers.lengths + 1).sum()), metrics=metrics)

    # --- rollouts -------------------------------------------------------------------------------------------------

    def kl_coefficient(self, rollout: int) -> float:
        """The coefficient of a rollout: fixed, or adapted to the divergence of those before it."""
        coefficient, config = self.config.kl_coefficient, self.config
        if config.kl_target is None:
            return coefficient
        for values in self.watch.before(rollout):
            coefficient = adapted_kl_coefficient(
                coefficient, values["kl_per_answer"], target=config.kl_target, rate=config.kl_rate
            )
        return coefficient

    def _make(self, number: int) -> Rollout:
        self.models.eval()
        groups, _ = self._sampler.draw(self.models.policy, number)
        rollout = self._as_rollout(groups, number)
        self.models.train()
        self.watch.note(number, means(rollout.metrics, self._sum_floats))
        return rollout

    def _as_rollout(self, groups: Sequence[Group], number: int) -> Rollout:
        config, parts, temperature = self.config, num_parts(self.config), self.config.sampling.temperature
        device, coefficient = distributed.device(), self.kl_coefficient(number)
        answers = as_answers(groups, self._sampler.tokenizer, mask_truncated=False, device=device)
        if temperature != 1:
            answers = at_temperature(self.models.policy, answers, config, rollout=number)
        reference_NT = answer_logprobs(self.reference, answers, parts=parts, temperature=temperature)
        values_NT = in_parts(lambda part: self.models.value(part.inputs)[..., 0], answers, parts)
        rewards_NT = token_rewards(
            self._scores(groups).to(device),
            answers.old_logprobs,
            reference_NT,
            answers.drawn,
            kl_coefficient=coefficient,
        )
        advantages_NT = generalised_advantages(
            rewards_NT, values_NT, answers.drawn, discount=config.discount, trace_decay=config.trace_decay
        )
        answers = answers._replace(
            advantages=whiten(advantages_NT, answers.drawn, self._sum_floats),
            old_values=values_NT,
            returns=advantages_NT + values_NT,
        )
        metrics = group_metrics(groups, 0)
        del metrics["flat_groups"], metrics["replaced_groups"]  # of groups of one
        return Rollout(answers, metrics | self._divergence(answers, reference_NT, coefficient))

    def _scores(self, groups: Sequence[Group]) -> Tensor:
        """What each answer is worth, less the penalty of one without an end ``[N]``."""
        penalty = self.config.missing_end_penalty
        return torch.tensor([g.scored[0].total - penalty * (not g.completions[0].verdict.ended) for g in groups])

    def _divergence(self, answers: Answers, reference_NT: Tensor, coefficient: float) -> Sums:
        drawn_NT, num_answers = answers.drawn, float(len(answers.inputs))
        kl = k3(answers.old_logprobs, reference_NT)[drawn_NT].sum().item()
        plain = (answers.old_logprobs - reference_NT)[drawn_NT].sum().item()
        return {
            "kl": (kl, float(drawn_NT.sum())),  # per token, by the estimator that is never negative
            "kl_per_answer": (plain, num_answers),
            "kl_coefficient": (coefficient * num_answers, num_answers),
        }


# --- the stage ----------------------------------------------------------------------------------------------------


def run(config: PPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train policy and value model on rollouts.

    Raises ``ArtifactError`` if the reward model reads other tokens than the policy writes, and ``DataError`` if the
    run collapses; see ``lilpipe.alignment.watch``.
    """
    source, prompts_artifact, judge = (inputs[role] for role in ("model", "prompts", "reward_model"))
    assert isinstance(source, Artifact)
    assert isinstance(prompts_artifact, Artifact)
    assert isinstance(judge, Artifact)
    _check_same_tokens(source.path, judge.path)
    prompts, dev = training_prompts(prompts_artifact)
    device, rank, num_ranks = distributed.device(), distributed.rank(), distributed.world_size()
    (policy, tokenizer), (reference, _), (value, _) = (
        load_model(source.path),
        load_model(source.path),
        load_head_model(judge.path),
    )
    models = ActorCritic(policy, value).to(device)
    rewards = Rewards(config.rewards, reward_model=reward_model_of(inputs))
    rewards.log_sandbox(prompts, workspace)
    sampler = Sampler(
        tokenizer,
        prompts,
        rewards,
        config,
        stage="ppo",
        group_size=1,
        data_rank=rank,
        num_data_ranks=num_ranks,
    )
    objective = PPO(config, sampler, workspace, models, reference=reference.to(device), rank=rank, num_ranks=num_ranks)
    policy.token_scores = at_targets(policy.token_scores, config.sampling.temperature)

    def evaluate(_: Any, done: int) -> Mapping[str, float]:  # noqa: ARG001 (at the end alone)
        return greedy_metrics(policy, tokenizer, dev, rewards, config)

    before = greedy_metrics(policy, tokenizer, dev, rewards, config)
    result = train(
        Replica(models, objective.loss, accumulation_steps=lambda _: config.accumulation_steps),
        num_steps=config.num_steps * config.updates_per_rollout,
        workspace=workspace,
        section=checkpoints_between_rollouts(config),
        optimizer=config.optimizer,
        evaluate=evaluate,
        identity=identity_of(inputs),
    )
    metrics = {
        "steps": float(config.num_steps),
        **{f"{name}_before": figure for name, figure in before.items()},
        **result.metrics,
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        save_model(policy, tokenizer, workspace.output)
        save_head_model(value, tokenizer, workspace.output / VALUE_DIRECTORY, labels=["value"])
        title = "Proximal policy optimisation"
        write_report(workspace, title=title, losses=result.losses, config=config, key_figures=metrics)
    return metrics


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
    main_metric="dev_reward",
)
