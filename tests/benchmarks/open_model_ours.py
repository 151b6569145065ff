"""lilpipe in the jobs of ``open_model``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lilpipe.alignment.preference.dpo import compute_reference, make_packer
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.alignment.rl import grpo, reinforcement
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.generation.engine import generate
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.training import finetune, loop
from lilpipe.training.supervised import SupervisedTokens
from tests.alignment.conftest import as_artifact
from tests.benchmarks.open_model_jobs import (
    BATCH,
    GROUP,
    MICRO_BATCHES,
    MOST_STEPS,
    NEW_TOKENS,
    NUM_PROMPTS,
    REWARD,
    Tell,
    batch,
    grpo_prompts,
    instructions,
    lora_of,
    optimizer,
    preferences,
    problems,
    repeat,
)
from tests.benchmarks.turns import Turns


def train_ours(module: Any, config: Any, turns: Turns, tell: Tell, before: Callable[[int], None] | None = None) -> None:
    def before_step(step: int) -> None:
        turns(step)
        if before:
            before(step)

    with tempfile.TemporaryDirectory() as work:
        workspace = Workspace(Path(work))
        try:
            loop.train(
                module,
                num_steps=MOST_STEPS,
                workspace=workspace,
                section=config,
                optimizer=config.optimizer,
                before_step=before_step,
            )
        finally:
            tell["losses"] = losses_of(workspace)


def losses_of(workspace: Workspace) -> list[float]:
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})]


def sft_ours(job: str, model: Path, data: Path, turns: Turns, tell: Tell) -> None:
    config = SFTConfig(
        seed=0, batch_size=BATCH, optimizer=optimizer(job), lora=lora_of(job), log_every=1, checkpoint_every=10**6
    )
    tokenizer, examples = instructions(model, data)
    tell["tokens"] = [sum(len(examples[row].ids) for row in batch(step, len(examples))) for step in range(MOST_STEPS)]
    objective = SupervisedTokens(examples, batch_size=BATCH, seed=0, padding_id=tokenizer.padding_id)
    module = finetune.build(config, model, objective, finetune.Workers(config), stage="sft")
    train_ours(module, config, turns, tell)


def dpo_ours(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    config = DPOConfig(
        seed=0,
        batch_size=BATCH,
        optimizer=optimizer(job),
        lora=lora_of(job),
        rpo_alpha=0.0,
        mask_formatting_tokens=False,
        log_every=1,
        checkpoint_every=10**6,
    )
    _, rows = preferences(source, data)
    model, tokenizer = load_model(source)
    packer = make_packer(model, tokenizer, config)
    with tempfile.TemporaryDirectory() as work:
        _, reference_R2 = compute_reference(model, rows, packer, config, Workspace(Path(work)))
    objective = PreferenceObjective(rows, config, packer, reference_R2=reference_R2, rank=0, world_size=1)
    tell["tokens"] = [
        sum(rows[row].first.num_tokens + rows[row].second.num_tokens for row in batch(step, len(rows)))
        for step in range(MOST_STEPS)
    ]
    del model
    module = finetune.build(config, source, objective, finetune.Workers(config), stage="dpo")

    policy = module.parts[0]
    assert isinstance(policy, Transformer)

    def reference_pass(step: int) -> None:
        with tempfile.TemporaryDirectory() as work:
            chosen = [rows[row] for row in batch(step, len(rows))]
            compute_reference(policy, chosen, packer, config, Workspace(Path(work)))

    train_ours(module, config, turns, tell, before=reference_pass)


def grpo_ours(_: str, model: Path, data: Path, turns: Turns, tell: Tell) -> None:
    """The stage itself, without its validation before and after."""
    config = GRPOConfig(
        seed=0,
        optimizer=optimizer("grpo"),
        num_steps=MOST_STEPS,
        prompts_per_step=NUM_PROMPTS,
        num_generations=GROUP,
        accumulation_steps=MICRO_BATCHES,
        rewards=(RewardConfig(kind="regex", pattern=REWARD),),
        log_every=1,
        checkpoint_every=10**6,
        num_workers=1,
        threads_per_worker=torch.get_num_threads(),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS),
    )
    reinforcement.NUM_VALIDATION_PROMPTS = 1
    grpo.train = partial(loop.train, before_step=turns)  # pyright: ignore[reportPrivateImportUsage]
    tell["tokens"] = [NUM_PROMPTS * GROUP] * MOST_STEPS
    with tempfile.TemporaryDirectory() as work:
        prompts = grpo_prompts(data, Path(work) / "prompts")
        inputs = {"model": as_artifact(model, kind="Checkpoint"), "prompts": as_artifact(prompts, kind="Prompts")}
        workspace = Workspace(Path(work) / "grpo")
        try:
            grpo.run(config, inputs, workspace)
        finally:
            tell["losses"] = losses_of(workspace)


def sample_ours(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    count = 1 if job == "answer" else 64
    model, _ = load_model(source)
    model.requires_grad_(False)
    _, prompts = problems(source, data, count)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=64, temperature=0.0 if count == 1 else 1.0)

    def sample(step: int) -> None:
        with torch.inference_mode():
            groups = generate(model.eval(), prompts, sampling=sampling, stop_ids=(), seed=step)
        assert all(len(found.tokens) == NEW_TOKENS for [found] in groups)

    repeat(sample, count * NEW_TOKENS, turns, tell)
