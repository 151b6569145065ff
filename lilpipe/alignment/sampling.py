"""Answers to many prompts as rows of a table: what rejection sampling, preferences and evaluation start from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from lilpipe import distributed
from lilpipe.alignment.chunks import Row, run_chunks
from lilpipe.alignment.completions import Completion, PromptForm, complete
from lilpipe.alignment.prompts import Prompt
from lilpipe.artifact import Artifact
from lilpipe.config import PreferencesConfig, RejectionSamplingConfig
from lilpipe.model.hub import load_model
from lilpipe.seeds import derive_seed
from lilpipe.stage import Workspace

SAMPLE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("family", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_words", pa.int32()),
        ("ended", pa.bool_()),
        ("well_formed", pa.bool_()),
        ("correct", pa.bool_()),
    ]
)
"""One row for each sampled response."""


def sample_rows(groups: Sequence[Sequence[Completion]]) -> list[dict[str, Any]]:
    """A row of ``SAMPLE_SCHEMA`` for each completion."""
    return [
        {
            "prompt_id": completion.prompt.id,
            "family": completion.prompt.family,
            "question": completion.prompt.question,
            "answer": completion.prompt.answer,
            "sample": index,
            "response": completion.response,
            "num_tokens": len(completion.sample.tokens),
            **vars(completion.verdict),
        }
        for group in groups
        for index, completion in enumerate(group)
    ]


def sample_in_chunks(
    model: Artifact,
    prompts: Sequence[Prompt],
    config: RejectionSamplingConfig | PreferencesConfig,
    *,
    form: PromptForm,
    purpose: str,
    workspace: Workspace,
) -> list[Row]:
    """``config.samples_per_prompt`` answers to each prompt, as rows; resumable by chunk, shared among processes."""
    assert config.seed is not None
    seed, size = config.seed, config.prompts_per_chunk
    network, tokenizer = load_model(model.path)
    network = network.to(distributed.device())

    def work(index: int) -> list[dict[str, Any]]:
        groups = complete(
            network,
            tokenizer,
            prompts[index * size : (index + 1) * size],
            form=form,
            sampling=config.sampling,
            seed=derive_seed(seed, purpose, index),
            num_samples=config.samples_per_prompt,
        )
        return sample_rows(groups)

    return run_chunks(work, -(-len(prompts) // size), name="samples", schema=SAMPLE_SCHEMA, workspace=workspace)


def by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each prompt, in order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]
