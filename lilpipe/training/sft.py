"""Stage ``sft``: supervised fine-tuning on conversations, with the loss only on the assistant's tokens.

Conversations come from rejection sampling, from written demonstrations, or from both. Before training, the masks are
checked against the turns in the token ids (``conversations``). All weights are trained, or LoRA adapters, which are
merged into the weights and also written to ``output/adapter/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.artifact import Inputs, all_inputs, one_input
from lilpipe.config.model import ModelConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.model.hub import check_model
from lilpipe.model.lora import add_adapters, merge, save_adapters
from lilpipe.model.neftune import EmbeddingNoise
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.order import count_steps
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.conversations import (
    EncodedConversation,
    check_answers,
    check_export,
    check_masks,
    encode,
    gather_conversations,
    mix,
    quarantine,
    show,
)
from lilpipe.training.loop import train
from lilpipe.training.replica import TrainerModule
from lilpipe.training.supervised import SupervisedTokens
from lilpipe.training.training_report import write_report

SHOWN = 5
"""Conversations in the report."""


def run(config: SFTConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Fine-tune the model.

    Raises ``ConfigError`` for settings that do not fit the model or the data, ``DataError`` for conversations that are
    too few, all too long, wrongly masked, or held out.
    """
    source = one_input(inputs, "model")
    assert config.seed is not None
    conversations = gather_conversations(inputs, max_demonstrations=config.max_demonstrations)
    shape, _, tokenizer = check_model(source.path)
    conversations = mix(conversations, config.mixture, seed=config.seed)
    examples, too_long = encode(tokenizer, conversations, max_len=shape.max_seq_len)
    supervised_ratio = check_masks(tokenizer, examples, min_ratio=config.min_supervised_ratio)
    check_answers(tokenizer, examples)
    if distributed.is_main():
        check_export(tokenizer, examples, workspace.scratch / "tokenizer")
    num_steps = count_steps(
        len(examples),
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        stage="sft",
        rows="conversations",
        remedy="add conversations",
    )
    trainer_module = _build(config, source.path, shape, tokenizer, examples)
    result = train(
        trainer_module,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        identity={role: [item.content_digest for item in all_inputs(inputs, role)] for role in sorted(inputs)},
        before_step=_seed_dropout(config),
    )
    _export(config, trainer_module, tokenizer, workspace)
    metrics = {
        "train_loss": result.final_loss(),
        "conversations": float(len(examples)),
        **{f"origin/{name}": float(count) for name, count in Counter(c.origin for c in conversations).items()},
        "too_long": float(len(too_long)),
        "supervised_ratio": supervised_ratio,
        "steps": float(num_steps),
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        quarantine(too_long, workspace, max_len=shape.max_seq_len)
        write_report(
            workspace,
            title="Supervised fine-tuning",
            losses=result.losses,
            config=config,
            key_figures=metrics,
            sections={"Training conversations": [show(tokenizer, example) for example in examples[:SHOWN]]},
        )
    return metrics


def _build(
    config: SFTConfig,
    source: Path,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    examples: list[EncodedConversation],
) -> TrainerModule:
    """Return the model as this worker trains it, with its objective."""
    assert config.seed is not None
    workers = finetune.Workers(config)
    noise = None
    if config.neftune_noise_alpha:
        part = workers.mesh.coordinate.tensor if workers.mesh else 0
        noise = EmbeddingNoise(alpha=config.neftune_noise_alpha, seed=config.seed, part=part)
    objective = SupervisedTokens(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        padding_id=tokenizer.padding_id,
        rank=workers.data_rank,
        world_size=workers.num_data_ranks,
        accumulation_steps=config.accumulation_steps,
        # A sharded model uses positions in the row; only RoPE supports row-relative positions for packed documents.
        packing=config.packing and not (shape.position_embedding == "learned" and workers.mesh),
        device=distributed.device(),
        watch=noise.expect if noise else None,
    )
    prepare = _prepare(config, noise) if noise or config.lora else None
    return finetune.build(config, source, objective, workers, stage="sft", prepare=prepare)


def _prepare(config: SFTConfig, noise: EmbeddingNoise | None) -> Callable[[Transformer], None]:
    """Return a function that adds adapters and noise to the model."""

    def prepare(model: Transformer) -> None:
        assert config.seed is not None
        if config.lora:
            add_adapters(model, config.lora, seed=config.seed)
        if noise:
            noise.install(model)

    return prepare


def _seed_dropout(config: SFTConfig) -> Callable[[int], None] | None:
    """Return a function that seeds the adapters' dropout from the seed, the step and the worker."""
    if config.lora is None or not config.lora.dropout:
        return None
    assert config.seed is not None
    seed, rank = config.seed, distributed.rank()
    return lambda step: torch.manual_seed(derive_seed(seed, "lora dropout", step, rank)) and None


def _export(config: SFTConfig, trainer_module: TrainerModule, tokenizer: Tokenizer, workspace: Workspace) -> None:
    """Write the model, with merged adapters, and the adapters."""
    if config.lora is None:
        finetune.export(trainer_module, tokenizer, workspace)
        return
    adapters: dict[str, Tensor] = {}
    merged = partial(merge, config=config.lora, adapters=adapters)
    finetune.export(trainer_module, tokenizer, workspace, change=merged)
    if distributed.is_main():
        save_adapters(adapters, config.lora, workspace.output / "adapter")


STAGE = Stage(
    name="sft",
    output="Checkpoint",
    config=SFTConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"conversations": "Conversations", "prompts": "Prompts"},
    several=frozenset({"conversations", "prompts"}),
    distributed=True,
    main_metric="train_loss",
)
