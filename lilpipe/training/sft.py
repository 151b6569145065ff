"""Stage ``sft``: supervised fine-tuning on conversations, with the loss only on the assistant's tokens.

Conversations come from rejection sampling, from written demonstrations, or from both. Before training, the masks are
checked against the turns in the token ids (``conversations``).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lilpipe import distributed
from lilpipe.artifact import Inputs, all_inputs, one_input
from lilpipe.config.model import ModelConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.model.hub import check_model
from lilpipe.model.neftune import EmbeddingNoise
from lilpipe.schemas.order import count_steps
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.conversation_encoding import EncodedConversation, encode
from lilpipe.training.conversations import (
    check_export,
    check_rejected,
    gather_conversations,
    keep_checked,
    mix,
    quarantine,
    show,
    supervised_ratio,
)
from lilpipe.training.finetune_memory import Workload, check_memory, largest_batch
from lilpipe.training.loop import train
from lilpipe.training.replica import TrainerModule
from lilpipe.training.supervised import SupervisedTokens
from lilpipe.training.training_report import write_report

SHOWN = 5
"""Conversations in the report."""


def run(config: SFTConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Fine-tune the model.

    Raises ``ConfigError`` for settings that do not fit the model or the data, ``DataError`` for conversations that are
    too few, all too long, held out, or of which too many are wrongly masked.
    """
    source = one_input(inputs, "model")
    assert config.seed is not None
    conversations = gather_conversations(inputs, max_demonstrations=config.max_demonstrations)
    shape, _, tokenizer = check_model(source.path)
    conversations = mix(conversations, config.mixture, seed=config.seed)
    encoding = encode(
        tokenizer,
        conversations,
        max_len=shape.max_seq_len,
        mask_history=config.mask_history,
        strategy=config.excess_length_strategy,
    )
    examples, unfit = keep_checked(tokenizer, encoding.fitting)
    rejected = [*encoding.rejected, *unfit]
    check_rejected(rejected, len(conversations), max_ratio=config.max_malformed_ratio)
    ratio = supervised_ratio(examples, min_ratio=config.min_supervised_ratio)
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
    packed = packs(config, shape)
    largest = largest_batch(
        [(len(example.ids) - 1,) for example in examples],
        batch_size=config.batch_size,
        num_parts=config.layout.data * config.accumulation_steps,
        seed=config.seed,
        num_steps=num_steps,
        packed=packed,
    )
    check_memory(config, Workload(source.path, largest), workspace, stage="sft")
    trainer_module = _build(config, source.path, packed, tokenizer, examples)
    result = train(
        trainer_module,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        identity={role: [item.content_digest for item in all_inputs(inputs, role)] for role in sorted(inputs)},
    )
    finetune.export(trainer_module, tokenizer, workspace, source=source.path)
    metrics = {
        "train_loss": result.final_loss(),
        "conversations": float(len(examples)),
        **{f"origin/{name}": float(count) for name, count in Counter(c.origin for c in conversations).items()},
        "too_long": float(len(encoding.too_long)),
        "split": float(len(encoding.split)),
        "rejected": float(len(rejected)),
        "supervised_ratio": ratio,
        "steps": float(num_steps),
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        quarantine(encoding, rejected, workspace, max_len=shape.max_seq_len)
        write_report(
            workspace,
            title="Supervised fine-tuning",
            losses=result.losses,
            config=config,
            key_figures=metrics,
            sections={"Training conversations": [show(tokenizer, example) for example in examples[:SHOWN]]},
        )
    return metrics


def packs(config: SFTConfig, shape: ModelConfig) -> bool:
    """Return whether rows are packed.

    A sharded model uses positions in the row; only RoPE supports row-relative positions for packed documents.
    """
    sharded = config.layout.replicate < config.num_workers
    return config.packing and not (shape.position_embedding == "learned" and sharded)


def _build(
    config: SFTConfig,
    source: Path,
    packed: bool,
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
        packing=packed,
        device=distributed.device(),
        watch=noise.expect if noise else None,
    )
    return finetune.build(config, source, objective, workers, stage="sft", prepare=noise.install if noise else None)


STAGE = Stage(
    name="sft",
    output="Checkpoint",
    config=SFTConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"conversations": "Conversations", "prompts": "Prompts", "adapter": "Checkpoint"},
    several=frozenset({"conversations", "prompts"}),
    distributed=True,
    main_metric="train_loss",
)
