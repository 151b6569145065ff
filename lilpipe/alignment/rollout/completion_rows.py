"""Sampling of completions as table rows, for rejection sampling, preferences and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import pyarrow as pa

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import CompletionText, Rewards
from lilpipe.alignment.rewards.scoring import load_reward_model
from lilpipe.alignment.rollout.completions import Completion, PromptForm, complete
from lilpipe.artifact import Artifact, Inputs, optional_input
from lilpipe.config.preferences import PreferencesConfig, RejectionSamplingConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.generation.frozen import load_frozen
from lilpipe.metrics.pass_at_k import mean_estimate
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.chunks import Row, run_chunks
from lilpipe.schemas.examples import Prompt
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Workspace
from lilpipe.tokenizer.encoding import Tokenizer

SAMPLE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("family", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("sample", pa.int32()),
        ("completion", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_words", pa.int32()),
        ("ended", pa.bool_()),
        ("well_formed", pa.bool_()),
        ("correct", pa.bool_()),
    ]
)
"""One row per sampled completion."""


def sample_rows(groups: Sequence[Sequence[Completion]]) -> list[dict[str, Any]]:
    """Return a row of ``SAMPLE_SCHEMA`` for each completion."""
    return [
        {
            "prompt_id": completion.prompt.id,
            "family": completion.prompt.family,
            "question": completion.prompt.question,
            "answer": completion.prompt.answer,
            "sample": index,
            "completion": completion.text,
            "num_tokens": len(completion.sample.tokens),
            **vars(completion.verdict),
        }
        for group in groups
        for index, completion in enumerate(group)
    ]


def scored_schema(rewards: Rewards) -> pa.Schema:
    """Return ``SAMPLE_SCHEMA`` with the prompt's difficulty, the total reward and each reward."""
    columns = [pa.field("difficulty", pa.int32()), pa.field("reward", pa.float64())]
    return pa.schema([*SAMPLE_SCHEMA, *columns, *(pa.field(_column(name), pa.float64()) for name in rewards.names)])


def scored_rows(groups: Sequence[Sequence[Completion]], rewards: Rewards) -> list[Row]:
    """Return a row of ``scored_schema`` for each completion."""
    completions = [completion for group in groups for completion in group]
    texts = [CompletionText(item.text, item.verdict.ended, len(item.sample.tokens)) for item in completions]
    scored = rewards([item.prompt for item in completions], texts)
    return [
        {
            **row,
            "difficulty": completion.prompt.difficulty,
            "reward": worth.total,
            **{_column(name): value for name, value in worth.parts.items()},
        }
        for row, completion, worth in zip(sample_rows(groups), completions, scored, strict=True)
    ]


def _column(name: str) -> str:
    return f"reward/{name}"


def load_rewards(configs: Sequence[RewardConfig], inputs: Inputs) -> Rewards:
    """Load the rewards of a stage, with the reward model of the optional input ``reward_model``."""
    source = optional_input(inputs, "reward_model")
    if source is None:
        return Rewards(configs)
    return Rewards(configs, reward_model=load_reward_model(source.path, distributed.device()))


def reward_metrics(groups: Sequence[Sequence[Row]], rewards: Rewards) -> Metrics:
    """Return the mean of each reward and of their sum, with standard errors over prompts."""
    metrics: Metrics = {}
    for column in ("reward", *map(_column, rewards.names)):
        estimate = mean_estimate([sum(row[column] for row in group) / len(group) for group in groups])
        metrics |= {column: estimate.value, column.replace("reward", "reward_stderr", 1): estimate.stderr}
    return metrics


def sample_in_chunks(
    model: Artifact,
    prompts: Sequence[Prompt],
    config: RejectionSamplingConfig | PreferencesConfig,
    *,
    form: PromptForm,
    purpose: str,
    rewards: Rewards,
    workspace: Workspace,
    name: str = "samples",
) -> list[Row]:
    """Sample ``config.num_generations`` completions per prompt; return rows of ``scored_schema``.

    Chunks of prompts are distributed over processes. A killed run resumes with the first unfinished chunk. A chunk
    depends only on its prompts and its index, so resuming does not change the rows.
    """
    assert config.seed is not None
    seed, size = config.seed, config.prompts_per_chunk

    @cache
    def load() -> tuple[Transformer, Tokenizer]:
        return load_frozen(model.path)

    def work(index: int) -> list[Row]:
        network, tokenizer = load()
        groups = complete(
            network,
            tokenizer,
            prompts[index * size : (index + 1) * size],
            form=form,
            sampling=config.sampling,
            seed=derive_seed(seed, purpose, index),
            num_generations=config.num_generations,
        )
        return scored_rows(groups, rewards)

    num_chunks = -(-len(prompts) // size)
    return run_chunks(work, num_chunks, name=name, schema=scored_schema(rewards), workspace=workspace)


def by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows by prompt, in order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]
