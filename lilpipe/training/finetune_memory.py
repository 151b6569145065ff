"""Estimate of a fine-tuning worker's peak memory before it loads the model; what cannot fit is refused.

The arithmetic is that of pretraining (``lilpipe.training.memory``) with the largest micro-batch of the first steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from lilpipe import distributed
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.reward_model import ClassifyConfig, RewardModelConfig
from lilpipe.config.training import ParallelSection, PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import read_model_config
from lilpipe.schemas.order import rows_by_micro_batch, rows_of_step
from lilpipe.stage import Workspace
from lilpipe.tokens.packing import best_fit
from lilpipe.training.budget import SPARE_MEMORY, gib
from lilpipe.training.memory import FP32, Term, peak_memory, persistent_memory, total

STEPS_LOOKED_AT = 100
TRAINED = ("gradients", "optimizer state")
"""Names of the terms that frozen parameters do not need."""


class Shape(NamedTuple):
    """Shape of a micro-batch."""

    num_rows: int
    num_tokens: int
    """Of each row, with padding."""
    packed: bool
    """Whether attention needs a mask of the sequences of a row."""


def largest_batch(
    examples: Sequence[Sequence[int]],
    *,
    batch_size: int,
    num_parts: int,
    seed: int,
    num_steps: int,
    packed: bool,
    row_len: int = 0,
) -> Shape:
    """Return the largest micro-batch of the first steps.

    ``examples``: lengths of the sequences of each example. ``num_parts``: micro-batches of a step on all data ranks,
    each with every ``num_parts``-th example by length. ``row_len``: least capacity of a packed row.
    """
    found = []
    for step in range(min(num_steps, STEPS_LOOKED_AT)):
        rows = rows_of_step(step, num_rows=len(examples), batch_size=batch_size, seed=seed)
        rows.sort(key=lambda row: sum(examples[row]))
        lengths = np.array([length for row in rows[num_parts - 1 :: num_parts] for length in examples[row]])
        width = max(int(lengths.max()), row_len if packed else 0)
        num_rows = int(best_fit(lengths, capacity=width).max()) + 1 if packed else len(lengths)
        found.append(Shape(num_rows, min(width, int(lengths.sum())), packed))
    return max(found, key=lambda shape: shape.num_rows * shape.num_tokens)


def largest_padded_batch(
    examples: Sequence[Sequence[int]], config: RewardModelConfig | ClassifyConfig, *, num_steps: int
) -> Shape:
    """Return the largest micro-batch of the first steps of a model with a head; its rows are padded.

    ``examples``: lengths of the sequences of each example.
    """
    world_size = config.layout.data
    lengths = [sum(example) for example in examples]
    found = []
    for step in range(min(num_steps, STEPS_LOOKED_AT)):
        # The last rank has the longest rows.
        for rows in rows_by_micro_batch(step, lengths, config, rank=world_size - 1, world_size=world_size):
            sequences = [length for row in rows for length in examples[row]]
            found.append(Shape(len(sequences), max(sequences), packed=False))
    return max(found, key=lambda shape: shape.num_rows * shape.num_tokens)


@dataclass(frozen=True)
class Workload:
    """What a worker trains and holds."""

    source: Path
    """Checkpoint of the trained model."""
    micro_batch: Shape
    head: int = 0
    """Number of outputs of a head in place of the output layer."""
    num_trained: int | None = None
    """Number of trainable parameters, if not all or those of adapters."""
    other_models: Sequence[Path] = ()
    """Models held whole beside the trained one: a reference, a reward model, a gathered copy."""
    value_model: Path | None = None
    """Model with a head that is trained beside it."""


def check_memory(section: ParallelSection, work: Workload, workspace: Workspace, *, stage: str) -> None:
    """Log the estimated peak memory of a worker. Raises ``ConfigError`` if the machine has less.

    Nothing is known about the activations of a class of transformers: without them the estimate is a lower bound.
    """
    terms = planned_memory(section, work)
    has = _device_bytes(section)
    parts = ", ".join(f"{term.name} {gib(term.bytes)}" for term in terms if term.bytes)
    model, shape = read_model_config(work.source)[0], work.micro_batch
    bound = f", and the activations of {model.class_name}" if isinstance(model, BackendConfig) else ""
    workspace.log(
        f"memory: {gib(total(terms))} planned of {gib(has)} per worker: {parts}{bound}; micro-batch "
        f"{shape.num_rows} x {shape.num_tokens} tokens"
    )
    if total(terms) > has * (1 - SPARE_MEMORY):
        remedies = [
            *([] if section.lora else [f"train adapters: set {stage}.lora = {{}}"]),
            f"increase {stage}.accumulation_steps from {section.accumulation_steps}",
            *([] if section.activation_checkpointing == "full" else [f"set {stage}.activation_checkpointing = 'full'"]),
            f"increase {stage}.parallel.shard from {section.layout.shard}, with more workers",
            "use a machine with more memory",
        ]
        raise ConfigError(
            f"{stage}: the estimated peak memory per worker is {gib(total(terms))} ({parts}), expected at most "
            f"{gib(has * (1 - SPARE_MEMORY))}; {'; or '.join(remedies)}"
        )


def planned_memory(section: ParallelSection, work: Workload) -> tuple[Term, ...]:
    """Return the terms of the peak memory; see ``check_memory``."""
    model, vocab_size = read_model_config(work.source)
    if isinstance(model, BackendConfig):
        terms = _persistent(section, work.source, work.micro_batch, head=work.head)
    else:
        config, on_cpu = _as_pretraining(section, model, work.micro_batch), not torch.cuda.is_available()
        terms = peak_memory(config, vocab_size, on_cpu=on_cpu, head=work.head)
    if work.num_trained is not None and section.lora is None:
        ratio = work.num_trained / num_parameters(model, vocab_size)
        terms = tuple(
            Term(term.name, term.bytes * (ratio if term.name in TRAINED else 1), term.arithmetic) for term in terms
        )
    held = sum(FP32 * num_parameters(*read_model_config(path)) for path in work.other_models)
    terms = (*terms, Term("other models", held, "4 B x parameters"))
    if work.value_model is None:
        return terms
    value = _persistent(section, work.value_model, work.micro_batch, head=1)
    return (*terms, Term("value model", total(value), "weights, gradients and optimizer state"))


def _persistent(section: ParallelSection, source: Path, shape: Shape, *, head: int) -> tuple[Term, ...]:
    """Return weights, gradients and optimizer state; those of the adapters of a class of transformers are left out."""
    model, vocab_size = read_model_config(source)
    config = _as_pretraining(section, model, shape)
    if not isinstance(model, BackendConfig):
        return persistent_memory(config, vocab_size, head=head)
    shards, moments = config.layout.shard, 1 if config.optimizer.kind == "muon" else 2
    copies = {"weights": 1} if config.lora else {"weights": 1, "gradients": 1, "optimizer state": moments}
    return tuple(
        Term(name, number * FP32 * model.num_parameters / shards, f"{number * FP32} B x parameters / shard {shards}")
        for name, number in copies.items()
    )


def _as_pretraining(section: ParallelSection, model: ModelConfig, shape: Shape) -> PretrainConfig:
    """Return pretraining of the model with this micro-batch, which takes the same memory."""
    shared = {name: getattr(section, name) for name in ParallelSection.model_fields}
    return PretrainConfig.model_construct(
        **shared,
        optimizer=section.optimizer,  # type: ignore[attr-defined]
        model=model,
        batch_size=shape.num_rows * section.layout.data * section.accumulation_steps,
        seq_len=shape.num_tokens,
        num_steps=1,
        intra_document_masking=shape.packed,
    )


def _device_bytes(section: ParallelSection) -> int:
    """Return the memory of this worker's GPU, or its part of the host's."""
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // (section.num_workers // section.launch.num_nodes)
