"""Code that the reinforcement learning stages share: prompts, metrics, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import RewardModel, Rewards, reward
from lilpipe.alignment.rollout.completion_batch import at_targets
from lilpipe.alignment.rollout.completions import PromptForm, complete, encode_question
from lilpipe.artifact import Artifact, Inputs, all_inputs, one_input, optional_input
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.errors import DataError
from lilpipe.model.hub import read_model_config
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Prompt, check_not_held_out, read_prompts
from lilpipe.stage import Metrics, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.finetune import Workers, load
from lilpipe.training.finetune_memory import Shape, Workload, check_memory
from lilpipe.training.replica import TrainerModule
from lilpipe.training.training_report import write_report
from lilpipe.training.training_state import TrainingResult

Section = TypeVar("Section", GRPOConfig, PPOConfig)

NUM_VALIDATION_PROMPTS = 200
"""Maximum number of validation prompts to measure accuracy on, before and after training."""


def training_prompts(
    artifact: Artifact, tokenizer: Tokenizer, *, form: PromptForm, max_seq_len: int, workspace: Workspace
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the training prompts, none of them held out, and validation prompts.

    Skips and logs prompts that leave no room for a completion. Raises ``DataError`` if none remain.
    """
    train, validation = read_prompts(artifact.path, "train"), read_prompts(artifact.path, "validation")
    check_not_held_out((prompt.question for prompt in train), artifact.path)
    # A text has at most as many tokens as bytes, so most prompts fit without being tokenized.
    fits_surely = max_seq_len - len(encode_question(tokenizer, "?", form))
    found: list[list[Prompt]] = []
    if not train:
        raise DataError(
            f"{artifact.path}: no prompts to sample from; all rows are demonstrations or preferences without a prompt. "
            "Set demonstrations_ratio of a source in prompts.sources below 1, or add prompts"
        )
    for split, prompts in (("train", train), ("validation", validation)):
        kept = [
            prompt
            for prompt in prompts
            if len(prompt.question.encode()) < fits_surely
            or len(encode_question(tokenizer, prompt.question, form)) < max_seq_len
        ]
        if skipped := len(prompts) - len(kept):
            workspace.log(
                f"skipped {skipped} of {len(prompts)} {split} prompts: the model's {max_seq_len} tokens leave no room "
                "for a completion"
            )
        if not kept:
            raise DataError(
                f"{artifact.path}: no {split} prompt has fewer than the model's {max_seq_len} tokens; use shorter "
                "prompts or a model with a longer context"
            )
        found.append(kept)
    return found[0], found[1][:NUM_VALIDATION_PROMPTS]


def _longest_prompt(prompts: Sequence[Prompt], tokenizer: Tokenizer, form: PromptForm) -> int:
    """Return the tokens of the prompt with the longest text."""
    longest = max(prompts, key=lambda prompt: len(prompt.question.encode()))
    return len(encode_question(tokenizer, longest.question, form))


def check_rollout_memory(
    config: GRPOConfig | PPOConfig,
    inputs: Inputs,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    workspace: Workspace,
    *,
    stage: str,
    num_generations: int,
    has_reference: bool,
    value_model: Path | None = None,
) -> None:
    """Check the memory of the largest possible micro-batch: the longest prompt, and completions as long as allowed.

    A sharded policy is gathered for sampling. With adapters there is no separate reference.
    """
    source = one_input(inputs, "model").path
    num_completions = config.prompts_per_step // config.layout.data * num_generations
    prompt_len = _longest_prompt(prompts, tokenizer, config.prompt_form)
    largest = Shape(
        num_rows=-(-num_completions // (config.num_mini_batches * config.accumulation_steps)),
        num_tokens=min(read_model_config(source)[0].max_seq_len, prompt_len + config.sampling.max_new_tokens),
        packed=False,
    )
    sharded = config.layout.replicate < config.num_workers
    others = [source] * (sharded + (has_reference and config.lora is None))
    others += [model.path for model in all_inputs(inputs, "reward_model")]
    others += [value_model] * sharded if value_model else []
    work = Workload(source, largest, other_models=others, value_model=value_model)
    check_memory(config, work, workspace, stage=stage)


def reward_model_of(inputs: Inputs) -> RewardModel | None:
    """Load the reward model among the inputs, if any."""
    source = optional_input(inputs, "reward_model")
    if source is None:
        return None
    from lilpipe.alignment.rewards.reward_model import load_reward_model

    return load_reward_model(source.path, distributed.device())


def identity_of(inputs: Inputs) -> dict[str, str]:
    """Return the input digests that identify the checkpoints of a run."""
    return {role: one_input(inputs, role).content_digest for role in inputs}


def checkpoints_between_rollouts(config: Section) -> Section:
    """Round ``checkpoint_every`` up to whole rollouts; a signal may still cause a checkpoint in between."""
    updates = config.updates_per_rollout
    return config.model_copy(update={"checkpoint_every": -(-config.checkpoint_every // updates) * updates})


def scratch_and_reference(
    config: GRPOConfig | PPOConfig, source: Path, model: Transformer, workers: Workers, *, needed: bool
) -> tuple[Transformer | None, Transformer | None]:
    """Return what receives the gathered weights of a sharded policy, and the reference model if it is ``needed``.

    ``model`` is the policy as training starts from it, in memory already. With adapters there is no separate reference:
    it is the policy without what they learned.
    """
    scratch = None if workers.mesh is None else model
    if not needed or config.lora is not None:
        return scratch, None
    return scratch, model if scratch is None else load(config, source, stage="")


def score_targets_alone(policy: TrainerModule, config: GRPOConfig | PPOConfig, workers: Workers) -> None:
    """Apply the policy's output layer only to completion tokens; a sharded model needs full rows."""
    if workers.mesh is None or config.sampling.temperature != 1:
        for part in policy.parts:
            assert isinstance(part, Transformer)
            part.token_scores = at_targets(part.token_scores, config.sampling.temperature)


def greedy_metrics(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    config: GRPOConfig | PPOConfig,
) -> dict[str, float]:
    """Return accuracy and mean reward of greedy completions."""
    sampling = config.sampling.model_copy(update={"temperature": 0.0})
    groups = complete(model, tokenizer, prompts, form=config.prompt_form, sampling=sampling, seed=0)
    answers = [group[0] for group in groups]
    scored = rewards(prompts, [answer.as_completion_text for answer in answers])
    return {
        "validation_accuracy": sum(reward(answer.verdict) for answer in answers) / len(answers),
        "validation_reward": sum(answer.total for answer in scored) / len(answers),
    }


def conclude(
    title: str,
    config: GRPOConfig | PPOConfig,
    before: Mapping[str, float],
    result: TrainingResult,
    workspace: Workspace,
) -> Metrics:
    """Write the report and return a run's metrics; ``before`` are the greedy metrics of the initial model."""
    metrics = {
        "steps": float(config.num_steps),
        **{f"{name}_before": figure for name, figure in before.items()},
        **result.metrics,
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        write_report(workspace, title=title, losses=result.losses, config=config, key_figures=metrics)
    return metrics
