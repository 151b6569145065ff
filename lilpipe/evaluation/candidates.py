"""Each model's completions for the held-out prompts, with their rewards.

A model trained on questions in plain text (pretraining, or reinforcement learning of a base model) gets prompts in this
form; any other gets them as user messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import torch

from lilpipe.alignment.rewards.reward_functions import CompletionText, Rewards
from lilpipe.alignment.rollout.completion_rows import SAMPLE_SCHEMA, sample_rows
from lilpipe.alignment.rollout.completions import PromptForm, complete
from lilpipe.artifact import Artifact
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.errors import ConfigError
from lilpipe.generation.frozen import load_frozen
from lilpipe.metrics.bits_per_byte import bits_per_byte
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.chunks import Row, run_chunks
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.messages import Message
from lilpipe.seeds import derive_seed
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.loader import corpus_validation_shares, validation_rows
from lilpipe.tokens.shards import TokenShards

EVALUATION_SCHEMA = SAMPLE_SCHEMA.append(pa.field("greedy", pa.bool_())).append(
    pa.field("reference_bits", pa.float64())
)
REWARD_SCHEMA = pa.schema([("total", pa.float64()), ("parts", pa.list_(pa.float64()))])
BITS_SCHEMA = pa.schema([("bits_per_byte", pa.float64())])
BASE_STAGE = "pretrain"
COMPLETIONS_PER_CHUNK = 512
"""Completions scored per chunk; a killed run resumes after its finished chunks."""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    artifact: Artifact
    form: PromptForm
    """Form of its prompts: plain text or chat."""

    @property
    def is_base(self) -> bool:
        """Whether the model is only pretrained; base models take no part in games."""
        return self.artifact.manifest.stage == BASE_STAGE


def as_candidate(artifact: Artifact) -> Candidate:
    """Return a checkpoint as a candidate, named after the step that made it."""
    manifest = artifact.manifest
    in_text = manifest.stage == BASE_STAGE or manifest.config.get("prompt_form") == "text"
    return Candidate(manifest.step, artifact, "text" if in_text else "chat")


@lru_cache(maxsize=1)
def _load(directory: Path) -> tuple[Transformer, Tokenizer]:
    return load_frozen(directory)


def sample_all(
    candidates: Sequence[Candidate], prompts: Sequence[Prompt], config: EvaluateConfig, workspace: Workspace
) -> dict[str, list[Row]]:
    """Return for each model one greedy and ``num_generations`` sampled completions per prompt, as rows."""
    assert config.seed is not None
    seed, size = config.seed, config.prompts_per_chunk
    num_parts = -(-len(prompts) // size)
    greedy = config.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})

    def work(index: int) -> list[Row]:
        which, part = divmod(index, num_parts)
        model, tokenizer = _load(candidates[which].artifact.path)
        asked = prompts[part * size : (part + 1) * size]
        bits: dict[str, float] = {}
        if candidates[which].form == "chat":
            bits = {prompt.id: found for prompt in asked if (found := reference_bits(model, tokenizer, prompt))}
        rows = []
        for sampling, num_generations in ((greedy, 1), (config.sampling, config.num_generations)):
            groups = complete(
                model,
                tokenizer,
                asked,
                form=candidates[which].form,
                sampling=sampling,
                seed=derive_seed(seed, "evaluate", part),
                num_generations=num_generations,
            )
            for row in sample_rows(groups):
                bits_of_row = bits.get(row["prompt_id"]) if sampling is greedy else None
                rows.append({**row, "greedy": sampling is greedy, "reference_bits": bits_of_row})
        return rows

    num_chunks = len(candidates) * num_parts
    rows = run_chunks(work, num_chunks, name="samples", schema=EVALUATION_SCHEMA, workspace=workspace)
    each = len(rows) // len(candidates)
    return {c.name: rows[index * each : (index + 1) * each] for index, c in enumerate(candidates)}


def reference_bits(model: Transformer, tokenizer: Tokenizer, prompt: Prompt) -> float | None:
    """Return the bits per byte of the reference completion after its prompt, the end of its turn included.

    None if there is no reference, or if prompt and reference exceed the context.
    """
    if not prompt.reference:
        return None
    question: Message = {"role": "user", "content": prompt.question}
    answer: Message = {"role": "assistant", "content": prompt.reference}
    before, after = render_completion(tokenizer, [question, answer])
    if len(before) + len(after) > model.config.max_seq_len:
        return None
    tokens_BT = torch.tensor([before + after], device=model.device)
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[:, : len(before) - 1] = IGNORED
    return bits_per_byte(model, tokens_BT[:, :-1], targets_BT, len(prompt.reference.encode()))


def add_rewards(
    rows: Mapping[str, Sequence[Row]], prompts: Sequence[Prompt], rewards: Rewards, workspace: Workspace
) -> dict[str, list[Row]]:
    """Return the rows with ``rewards``, ``difficulty`` and ``verifiable``.

    ``rewards`` maps the name of each reward to its value; if several have a weight, ``total`` is their weighted sum.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    flat = [row for model_rows in rows.values() for row in model_rows]

    def work(index: int) -> list[Row]:
        part = flat[index * COMPLETIONS_PER_CHUNK : (index + 1) * COMPLETIONS_PER_CHUNK]
        texts = [CompletionText(row["completion"], row["ended"], row["num_tokens"]) for row in part]
        scored = rewards([by_id[row["prompt_id"]] for row in part], texts)
        return [{"total": item.total, "parts": [item.parts[name] for name in rewards.names]} for item in scored]

    num_chunks = -(-len(flat) // COMPLETIONS_PER_CHUNK)
    table = iter(run_chunks(work, num_chunks, name="rewards", schema=REWARD_SCHEMA, workspace=workspace))

    has_sum = sum(config.weight != 0 for config in rewards.configs) > 1

    def named(scored: Row) -> dict[str, float]:
        total = {"total": scored["total"]} if has_sum else {}
        return dict(zip(rewards.names, scored["parts"], strict=True)) | total

    def known(row: Row) -> Row:
        prompt = by_id[row["prompt_id"]]
        return {"difficulty": prompt.difficulty, "verifiable": prompt.verifier != "none"}

    return {
        model: [{**row, **known(row), "rewards": named(next(table))} for row in part] for model, part in rows.items()
    }


def validation_bits(
    candidates: Sequence[Candidate], tokens: Artifact, config: EvaluateConfig, workspace: Workspace
) -> dict[str, float]:
    """Return each model's bits per byte on ``validation_rows`` rows of the corpus's validation split."""
    shards = TokenShards.open(tokens.path)

    def work(index: int) -> list[Row]:
        model, tokenizer = _load(candidates[index].artifact.path)
        if tokenizer.digest != shards.tokenizer_digest:
            raise ConfigError(
                f"evaluate: model {candidates[index].name!r} and the tokens were made with different tokenizers, "
                "expected the same; check the step's inputs"
            )
        return [{"bits_per_byte": _bits(model, shards, config.validation_rows)}]

    rows = run_chunks(work, len(candidates), name="bits", schema=BITS_SCHEMA, workspace=workspace)
    return {candidate.name: row["bits_per_byte"] for candidate, row in zip(candidates, rows, strict=True)}


def _bits(model: Transformer, shards: TokenShards, num_rows: int) -> float:
    seq_len = model.config.max_seq_len
    bits = 0.0
    for stream, share in corpus_validation_shares(shards, seq_len=seq_len).items():
        rows = max(1, round(share * num_rows))
        inputs_BT, targets_BT, num_bytes = validation_rows(shards, stream, num_rows=rows, seq_len=seq_len)
        bits += share * bits_per_byte(model, inputs_BT.to(model.device), targets_BT.to(model.device), num_bytes)
    return bits
