"""Stage ``grpo``: group relative policy optimisation (Shao et al. 2024) with the verifier as reward.

Each step samples a group of answers to each of a few prompts, rewards those that are correct and ended, and raises
the probability of what did better than its group. The loss is averaged over all tokens of the step (DAPO, Yu et al.
2025), so that a long answer does not weigh less per token. There is one update per batch of answers: the ratio to
the sampler's own probabilities is 1 but for the difference between cached and full computation, and clipping guards
against that.

A rollout is a pure function of weights, seed, step and rank: a killed run continues from its last checkpoint to the
same bytes.

Dimensions: P prompts, G answers to a prompt, N = P x G answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.alignment.completions import Completion, complete, pad_completions
from lilpipe.alignment.order import rows_of_step
from lilpipe.alignment.prompts import Prompt, assert_not_held_out, read_prompts
from lilpipe.alignment.rewards import reward
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import GRPOConfig
from lilpipe.errors import ConfigError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer, token_logprobs
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Loss, train

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL: a group of equal rewards has no advantage, not an infinite one."""

NUM_DEV_PROMPTS = 200
"""Prompts of the dev split behind the accuracy before and after."""


# --- mathematics --------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG: Tensor, *, normalize_std: bool) -> Tensor:
    """Reward above the group's mean, over the group's standard deviation (unbiased) if ``normalize_std`` [P, G]."""
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not normalize_std:
        return centred_PG
    return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + STD_EPSILON)


def grpo_token_loss(
    logprobs_NT: Tensor,
    old_logprobs_NT: Tensor,
    advantages_N: Tensor,
    *,
    clip_range: float,
    reference_logprobs_NT: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> Tensor:
    """Loss of each token [N, T]: the clipped surrogate (Schulman et al. 2017), plus the k3 estimate of the KL
    divergence to the reference (Schulman 2020) where one is given.
    """
    ratio_NT = (logprobs_NT - old_logprobs_NT).exp()
    clipped_NT = ratio_NT.clamp(1 - clip_range, 1 + clip_range)
    advantages_N1 = advantages_N[:, None]
    loss_NT = -torch.minimum(ratio_NT * advantages_N1, clipped_NT * advantages_N1)
    if reference_logprobs_NT is not None:
        loss_NT = loss_NT + kl_coefficient * k3(logprobs_NT, reference_logprobs_NT)
    return loss_NT


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) for samples of the policy."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


# --- the stage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """The answers of one step on one worker, as a batch."""

    tokens_NT: Tensor
    mask_NT: Tensor
    """True where the next token is one that the policy drew [N, T-1]."""
    old_logprobs_NT: Tensor
    """What the sampler gave it [N, T-1]."""
    rewards_PG: Tensor
    groups: list[list[Completion]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and answers, without padding."""
        return sum(len(c.prompt_ids) + len(c.sample.logprobs) for group in self.groups for c in group)


class _Sampler:
    """What a rollout needs beside the weights."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[Prompt], config: GRPOConfig) -> None:
        assert config.seed is not None
        self.tokenizer, self.prompts, self.config, self.seed = tokenizer, prompts, config, config.seed

    def rollout(self, model: Transformer, step: int) -> Rollout:
        """Sample this worker's answers of one step."""
        config, rank = self.config, distributed.rank()
        rows = rows_of_step(
            step, num_rows=len(self.prompts), batch_size=config.prompts_per_step, seed=derive_seed(self.seed, "grpo")
        )
        groups = complete(
            model,
            self.tokenizer,
            [self.prompts[row] for row in rows[rank :: distributed.world_size()]],
            form="chat",
            sampling=config.sampling,
            seed=derive_seed(self.seed, "grpo/rollout", step, rank),
            num_samples=config.group_size,
        )
        return as_rollout(groups, self.tokenizer, device=model.device)


def as_rollout(groups: list[list[Completion]], tokenizer: Tokenizer, *, device: torch.device) -> Rollout:
    """Groups of answers as padded tensors; the end of an answer that ended is a token that the policy drew."""
    flat = [completion for group in groups for completion in group]
    drawn = [c.sample.tokens + [tokenizer.turn_end_id] * c.sample.finished for c in flat]
    tokens_NT, mask_NT = pad_completions([c.prompt_ids for c in flat], drawn, padding_id=tokenizer.padding_id)
    old_NT = torch.zeros(mask_NT.shape)
    old_NT[mask_NT] = torch.tensor([logprob for c in flat for logprob in c.sample.logprobs])
    rewards_PG = torch.tensor([[reward(c.verdict) for c in group] for group in groups])
    return Rollout(tokens_NT.to(device), mask_NT.to(device), old_NT.to(device), rewards_PG.to(device), groups)


def rollout_loss(policy: _Sampler, model: Transformer, reference: Transformer | None, rollout: Rollout) -> Loss:
    """Token losses of a rollout, summed."""
    config, mask_NT = policy.config, rollout.mask_NT
    advantages_PG = group_advantages(rollout.rewards_PG, normalize_std=config.normalize_std)
    logprobs_NT = token_logprobs(model, rollout.tokens_NT)
    reference_NT = None
    if reference is not None:
        with torch.no_grad():
            reference_NT = token_logprobs(reference, rollout.tokens_NT)
    loss_NT = grpo_token_loss(
        logprobs_NT,
        rollout.old_logprobs_NT,
        advantages_PG.flatten(),
        clip_range=config.clip_range,
        reference_logprobs_NT=reference_NT,
        kl_coefficient=config.kl_coefficient,
    )
    count = float(mask_NT.sum())
    metrics = _metrics(rollout, logprobs_NT.detach(), clip_range=config.clip_range)
    if reference_NT is not None:
        metrics["kl"] = (k3(logprobs_NT.detach(), reference_NT)[mask_NT].sum().item(), count)
    return Loss(loss_NT[mask_NT].sum(), count, num_tokens=rollout.num_tokens, metrics=metrics)


def _metrics(rollout: Rollout, logprobs_NT: Tensor, *, clip_range: float) -> dict[str, tuple[float, float]]:
    verdicts = [completion.verdict for group in rollout.groups for completion in group]
    mask_NT, rewards_PG = rollout.mask_NT, rollout.rewards_PG
    num_answers, num_tokens = float(len(verdicts)), float(mask_NT.sum())
    difference = (logprobs_NT - rollout.old_logprobs_NT)[mask_NT]
    flat = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
    return {
        "reward": (rewards_PG.sum().item(), num_answers),
        "flat_groups": (flat.sum().item(), float(len(flat))),  # groups of equal rewards teach nothing
        "entropy": (-logprobs_NT[mask_NT].sum().item(), num_tokens),  # its estimate from the drawn tokens, in nats
        "length": (num_tokens, num_answers),
        "words": (float(sum(verdict.num_words for verdict in verdicts)), num_answers),
        "ended": (float(sum(verdict.ended for verdict in verdicts)), num_answers),
        "clipped": (((difference.exp() - 1).abs() > clip_range).sum().item(), num_tokens),
        "sampler_gap": (difference.abs().sum().item(), num_tokens),  # sampler against trainer, should be about 1e-6
    }


def run(config: GRPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on rollouts. Raises ``ConfigError`` for settings that do not fit each other."""
    source, prompts_artifact = inputs["model"], inputs["prompts"]
    assert isinstance(source, Artifact)
    assert isinstance(prompts_artifact, Artifact)
    _check(config)
    prompts = read_prompts(prompts_artifact.path, "train")
    assert_not_held_out((prompt.question for prompt in prompts), prompts_artifact.path)
    dev = read_prompts(prompts_artifact.path, "dev")[:NUM_DEV_PROMPTS]
    model, tokenizer = load_model(source.path)
    model = model.to(distributed.device())
    reference = load_model(source.path)[0].to(distributed.device()) if config.kl_coefficient else None
    policy = _Sampler(tokenizer, prompts, config)

    def loss(model: nn.Module, step: int, micro: int) -> Loss:  # noqa: ARG001 (one micro-batch)
        assert isinstance(model, Transformer)
        return rollout_loss(policy, model, reference, policy.rollout(model, step))

    def evaluate(model: nn.Module, done: int) -> Mapping[str, float]:  # noqa: ARG001 (at the end alone)
        assert isinstance(model, Transformer)
        return {"dev_accuracy": greedy_accuracy(model, tokenizer, dev, config)}

    before = greedy_accuracy(model, tokenizer, dev, config)
    result = train(
        model,
        loss=loss,
        num_steps=config.num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=evaluate,
        identity={"model": source.content_digest, "prompts": prompts_artifact.content_digest},
    )
    metrics = {
        "steps": float(config.num_steps),
        "dev_accuracy_before": before,
        **result.metrics,
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        save_model(model, tokenizer, workspace.output)
        title = "Group relative policy optimisation"
        write_report(workspace, title=title, losses=result.losses, config=config, key_figures=metrics)
    return metrics


def greedy_accuracy(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: GRPOConfig) -> float:
    """Share of the prompts that the model's likeliest answer solves."""
    sampling = config.sampling.model_copy(update={"temperature": 0.0})
    groups = complete(model, tokenizer, prompts, form="chat", sampling=sampling, seed=0)
    return sum(reward(group[0].verdict) for group in groups) / len(groups)


def _check(config: GRPOConfig) -> None:
    if config.prompts_per_step % config.num_workers:
        raise ConfigError(
            f"grpo.prompts_per_step: got {config.prompts_per_step}, expected a multiple of num_workers "
            f"{config.num_workers}"
        )
    for name in ("temperature", "top_p"):
        if (value := getattr(config.sampling, name)) != 1:
            raise ConfigError(
                f"grpo.sampling.{name}: got {value}, expected 1: the loss takes the answers as drawn from the policy "
                "itself"
            )


STAGE = Stage(
    name="grpo",
    output="Checkpoint",
    config=GRPOConfig,
    run=run,
    inputs={"model": "Checkpoint", "prompts": "Prompts"},
    distributed=True,
    main_metric="dev_accuracy",
)
