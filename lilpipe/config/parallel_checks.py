"""Checks that a device mesh can divide a model and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import ParallelConfig, ParallelDims
from lilpipe.config.phases import Phase


def check_phases(parallel: ParallelConfig, layout: ParallelDims, phases: Sequence[Phase]) -> None:
    """Raise ``ValueError`` if the sequences or batches of a phase are not divisible."""
    for problem in _phase_problems(parallel, layout, phases):
        raise ValueError(problem)


def check_vocabulary(layout: ParallelDims, vocab_size: int) -> None:
    """Raise ``ValueError`` if tensor parallelism cannot divide the vocabulary."""
    if vocab_size % layout.tensor:
        raise ValueError(
            f"parallel.tensor {layout.tensor} must divide the vocabulary size {vocab_size}, remainder "
            f"{vocab_size % layout.tensor}; set tokenizer.vocab_size to "
            f"{vocab_size - vocab_size % layout.tensor} or {vocab_size - vocab_size % layout.tensor + layout.tensor}"
        )


def check_model(
    parallel: ParallelConfig, layout: ParallelDims, model: ModelConfig, *, activation_checkpointing: str
) -> None:
    """Raise ``ValueError`` if the model is not divisible."""
    for problem in _model_problems(parallel, layout, model, activation_checkpointing):
        raise ValueError(problem)


def check_micro_batches(parallel: ParallelConfig, accumulation_steps: int) -> None:
    """Raise ``ValueError`` if the pipeline schedule cannot run this number of micro-batches."""
    for problem in _schedule_problems(parallel, "accumulation_steps", accumulation_steps):
        raise ValueError(problem)


def _model_problems(
    parallel: ParallelConfig, layout: ParallelDims, model: ModelConfig, activation_checkpointing: str
) -> Iterator[str]:
    if parallel.schedule == "zero_bubble" and activation_checkpointing == "selective":
        yield (
            "activation_checkpointing selective is not supported with parallel.schedule zero_bubble, which runs the "
            "backward of a layer's graph twice; use full or none, or the schedule interleaved"
        )
    if layout.tensor > 1 and model.qk_norm == "projection":
        yield (
            f"parallel.tensor {layout.tensor} is not supported with model.qk_norm projection, whose norm is over all "
            "heads; use parallel.shard, context or pipeline"
        )
    yield from _stage_problems(parallel, model.num_layers)
    for name, size in _divided_by_tensor(model).items():
        if size % layout.tensor:
            yield f"parallel.tensor {layout.tensor} must divide model.{name} {size}"


def _phase_problems(parallel: ParallelConfig, layout: ParallelDims, phases: Sequence[Phase]) -> Iterator[str]:
    for phase in phases:
        if phase.seq_len % layout.seq_len_multiple:
            yield (
                f"{phase.setting('seq_len')} {phase.seq_len} must be a multiple of {layout.seq_len_multiple}: it is "
                f"divided into 2 x parallel.context {layout.context} chunks, and each context part over "
                f"parallel.tensor {layout.tensor}"
            )
        yield from _schedule_problems(parallel, phase.setting("accumulation_steps"), phase.accumulation_steps)


def _stage_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    per_worker, schedule = parallel.stages_per_worker, parallel.schedule
    num_stages = parallel.pipeline * per_worker
    if parallel.pipeline == 1 and (per_worker > 1 or schedule != "1f1b"):
        yield (
            f"parallel.schedule {schedule} and stages_per_worker {per_worker} would be ignored by pipeline 1; "
            "remove them, or set pipeline to 2 or more"
        )
    if schedule == "1f1b" and per_worker > 1:
        yield f"parallel.stages_per_worker {per_worker} must be 1 for schedule 1f1b; or use interleaved"
    if schedule != "1f1b" and per_worker < 2:
        yield f"parallel.stages_per_worker {per_worker} must be 2 or more for schedule {schedule}; or use 1f1b"
    if num_layers < num_stages:
        yield (
            f"model.num_layers {num_layers} must be at least parallel.pipeline x stages_per_worker = "
            f"{parallel.pipeline} x {per_worker} = {num_stages} stages"
        )


def _schedule_problems(parallel: ParallelConfig, setting: str, micro_batches: int) -> Iterator[str]:
    if parallel.schedule == "1f1b" and micro_batches < parallel.pipeline:
        yield (
            f"{setting} {micro_batches} must be at least parallel.pipeline {parallel.pipeline}: with fewer "
            "micro-batches than stages, some stages are always idle"
        )
    if parallel.schedule != "1f1b" and micro_batches % parallel.pipeline:
        yield (
            f"{setting} {micro_batches} must be a multiple of parallel.pipeline {parallel.pipeline} for schedule "
            f"{parallel.schedule}"
        )


def _divided_by_tensor(model: ModelConfig) -> dict[str, int]:
    """Return the sizes of the model that tensor parallelism divides."""
    sizes = {"num_heads": model.num_heads}
    if model.mla is None:
        sizes["num_kv_heads"] = model.num_kv_heads
    if model.moe is None or model.moe.first_k_dense_replace > 0:
        sizes["intermediate_size"] = model.intermediate_size
    return sizes
