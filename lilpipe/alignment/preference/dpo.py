"""Stage ``dpo``: direct preference optimization (Rafailov et al. 2023) and variants, with two changes from Llama 3.

Llama 3 adds a negative log-likelihood (NLL) term on chosen completions (after Pang et al. 2024) and masks formatting
tokens in the log-probabilities of the preference loss (Grattafiori et al. 2024, section 4.1.4). The assistant's header
is part of the prompt and never counts. The end-of-turn token is masked in the preference loss, which would raise it in
one completion and lower it in the other. The NLL term keeps it, so that the model still ends its completions.

``losses`` defines the losses, ``objective`` the batches. Log-probabilities under the reference model are computed once,
before training, and saved as ``reference.arrow``.

Dimensions: R rows of the training data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.alignment.preference.data import (
    ROW_TOKENS,
    Packer,
    PreferenceRow,
    Skipped,
    as_examples,
    encode_examples,
    encode_pairs,
    in_rounds,
    with_mismatched,
)
from lilpipe.alignment.preference.evaluation import (
    PreferenceValidation,
    ValidationScores,
    check_fall,
    score_completions,
)
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.artifact import Inputs, one_input, optional_input, write_atomically
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import read_model_config
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.chunks import run_chunks
from lilpipe.schemas.examples import check_not_held_out
from lilpipe.schemas.order import count_steps
from lilpipe.schemas.pairs import EXAMPLES_FILE, check_examples, check_pairs, read_examples, read_pairs
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.finetune import Workers, build, export, load, whole_model
from lilpipe.training.finetune_memory import Workload, check_memory, largest_batch
from lilpipe.training.loop import train
from lilpipe.training.training_report import read_curves, write_report

ROWS_AT_ONCE = 32
EVALUATIONS = 8
"""Number of evaluations on validation completions per run."""
SKIPPED_FILE = "skipped.jsonl"
REFERENCE_FILE = "reference.arrow"


@dataclass(frozen=True)
class _Data:
    """Tokenized training and validation data."""

    train: list[PreferenceRow]
    validation: PreferenceValidation
    skipped: Skipped
    questions: list[str]
    """Questions of the training prompts."""


def run(config: DPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on preferences.

    Raises ``DataError`` if the preferences are fewer than one batch, have identical chosen and rejected completions, or
    contain held-out prompts, or if the log-probability of chosen completions falls by more than ``max_chosen_fall``.
    """
    source, preferences = one_input(inputs, "model"), one_input(inputs, "preferences")
    shape, tokenizer = read_model_config(source.path)[0], Tokenizer.load(source.path)
    data = _read(config, inputs, tokenizer, max_len=shape.max_seq_len)
    if distributed.is_main():
        _write_skipped(data, workspace)
    workers = Workers(config)
    num_steps = _num_steps(config, len(data.train), num_parts=config.layout.data * config.accumulation_steps)
    _check_memory(config, source.path, shape, data.train, workspace, num_steps=num_steps, sharded=bool(workers.mesh))
    model = load(config, source.path, stage="dpo")
    packer = make_packer(model, tokenizer, config)
    before = data.validation.score(model, packer, config)
    table, reference_R2 = [], None
    if config.uses_reference:
        table, reference_R2 = compute_reference(model, data.train, packer, config, workspace)
    objective = PreferenceObjective(
        data.train,
        config,
        packer,
        reference_R2=reference_R2,
        rank=workers.data_rank,
        world_size=workers.num_data_ranks,
    )
    whole = model if workers.mesh is not None else None
    del model  # before the trainer loads its own
    trainer_module = build(config, source.path, objective, workers, stage="dpo")
    latest = before

    def evaluate(_: object, done: int) -> Mapping[str, float]:
        nonlocal latest
        latest = data.validation.score(whole_model(trainer_module, whole), packer, config)
        metrics = data.validation.metrics(latest, before, config)
        if warning := check_fall(metrics, config):
            workspace.log(f"step {done}: {warning}")
        return metrics

    result = train(
        trainer_module,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=evaluate,
        eval_every=max(1, num_steps // EVALUATIONS),
        identity={"model": source.content_digest, "preferences": preferences.content_digest},
    )
    metrics = {
        "loss": result.final_loss(),
        "steps": float(num_steps),
        **_counts(data, config),
        **{f"{name}_before": value for name, value in data.validation.metrics(before, before, config).items()},
        **result.metrics,
        "tokens_per_second": result.tokens_per_second,
    }
    export(trainer_module, tokenizer, workspace, source=source.path)
    if distributed.is_main():
        if table:
            write_rows(workspace.output / REFERENCE_FILE, table, _reference_schema(config))
        _write_report(config, workspace, data, tokenizer, (before, latest), losses=result.losses, metrics=metrics)
    return metrics


def _check_memory(
    config: DPOConfig,
    source: Path,
    shape: ModelConfig,
    rows: Sequence[PreferenceRow],
    workspace: Workspace,
    *,
    num_steps: int,
    sharded: bool,
) -> None:
    largest = largest_batch(
        [(row.first.num_tokens - 1, row.second.num_tokens - 1) for row in rows],
        batch_size=config.batch_size,
        num_parts=config.layout.data * config.accumulation_steps,
        seed=config.seed or 0,
        num_steps=num_steps,
        packed=shape.position_embedding == "rope",
        row_len=min(ROW_TOKENS, shape.max_seq_len),
    )
    check_memory(config, Workload(source, largest, other_models=[source] * sharded), workspace, stage="dpo")


# --- data ---------------------------------------------------------------------------------------------------------


def _read(config: DPOConfig, inputs: Inputs, tokenizer: Tokenizer, *, max_len: int) -> _Data:
    """Read and check the preferences."""
    preferences, prompts = one_input(inputs, "preferences"), optional_input(inputs, "prompts")
    single = config.loss_type == "kto" and (preferences.path / EXAMPLES_FILE).exists()
    data = (_read_single if single else _read_paired)(config, preferences.path, tokenizer, max_len=max_len)
    if prompts is not None:
        check_not_held_out(data.questions, prompts.path)
    if config.max_chosen_fall is not None and not data.validation.chosen:
        raise DataError(
            "dpo.max_chosen_fall: the preferences have no validation completions to measure it on; raise "
            "preferences.num_validation, or remove max_chosen_fall"
        )
    return data


def _read_paired(config: DPOConfig, directory: Path, tokenizer: Tokenizer, *, max_len: int) -> _Data:
    train, validation = read_pairs(directory, "train"), read_pairs(directory, "validation")
    check_pairs(train, validation)
    if config.loss_type == "kto":
        examples, skipped = encode_examples(tokenizer, as_examples(train), max_len=max_len)
        rows = with_mismatched(examples, max_len=max_len)
    else:
        rows, skipped = encode_pairs(tokenizer, train, max_len=max_len)
    measured, validation_skipped = encode_pairs(tokenizer, validation, max_len=max_len)
    return _Data(
        rows,
        PreferenceValidation([row.first for row in measured], [row.second for row in measured], paired=True),
        _join(skipped, validation_skipped),
        [text for item in train for text in item.questions],
    )


def _read_single(_: DPOConfig, directory: Path, tokenizer: Tokenizer, *, max_len: int) -> _Data:
    train, validation = read_examples(directory, "train"), read_examples(directory, "validation")
    check_examples(train, validation)
    examples, skipped = encode_examples(tokenizer, in_rounds(train), max_len=max_len)
    measured, validation_skipped = encode_examples(tokenizer, validation, max_len=max_len)
    sides = ([encoded for example, encoded in measured if example.label is side] for side in (True, False))
    return _Data(
        with_mismatched(examples, max_len=max_len),
        PreferenceValidation(*sides, paired=False),
        _join(skipped, validation_skipped),
        [text for item in train for text in item.questions],
    )


def _join(first: Skipped, second: Skipped) -> Skipped:
    return {reason: first.get(reason, []) + second.get(reason, []) for reason in first | second}


def _num_steps(config: DPOConfig, num_rows: int, *, num_parts: int) -> int:
    unit, what = (config.kl_examples, "completions") if config.loss_type == "kto" else (1, "pairs")
    if config.batch_size % (num_parts * unit):
        together = f" x kl_examples {unit}" if config.loss_type == "kto" else ""
        raise ConfigError(
            f"dpo.batch_size: got {config.batch_size}, expected a multiple of {num_parts * unit}: workers x "
            f"accumulation_steps {num_parts}{together}"
        )
    return count_steps(
        num_rows,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        stage="dpo",
        rows=what,
        remedy=f"raise preferences.num_prompts; report/{SKIPPED_FILE} lists the skipped preferences",
    )


def _counts(data: _Data, config: DPOConfig) -> Metrics:
    what = "completions" if config.loss_type == "kto" else "pairs"
    return {
        what: float(len(data.train)),
        **_validation_count(data.validation),
        "too_long": float(len(data.skipped.get("too_long", []))),
        "empty_completions": float(len(data.skipped.get("empty_completion", []))),
        "rejected_by_template": float(len(data.skipped.get("rejected_by_template", []))),
    }


def _validation_count(validation: PreferenceValidation) -> Metrics:
    if validation.paired:
        return {"validation_pairs": float(len(validation.chosen))}
    return {"validation_completions": float(len(validation.chosen) + len(validation.rejected))}


def _write_skipped(data: _Data, workspace: Workspace) -> None:
    """Write the skipped prompt ids to the report and log their number."""
    lines = [json.dumps({"prompt_id": name, "reason": reason}) for reason, ids in data.skipped.items() for name in ids]
    if lines:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in data.skipped.items())
        workspace.log(f"skipped {len(lines)} of the preferences: {reasons} (report/{SKIPPED_FILE})")
        write_atomically(workspace.report / SKIPPED_FILE, "\n".join(lines) + "\n")


# --- reference ----------------------------------------------------------------------------------------------------


def _reference_schema(config: DPOConfig) -> pa.Schema:
    names = ("completion", "mismatched_completion") if config.loss_type == "kto" else ("chosen", "rejected")
    return pa.schema([("prompt_id", pa.string()), *((name, pa.float32()) for name in names)])


def make_packer(model: Transformer, tokenizer: Tokenizer, config: DPOConfig) -> Packer:
    """Return the packer for a model."""
    return Packer(
        padding_id=tokenizer.padding_id,
        max_len=model.config.max_seq_len,
        packed=model.config.position_embedding == "rope",  # learned positions are absolute
        mask_formatting=config.mask_formatting_tokens,
        device=model.device,
    )


def compute_reference(
    model: Transformer, rows: Sequence[PreferenceRow], packer: Packer, config: DPOConfig, workspace: Workspace
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return log-probabilities of the rows under the reference model, as a table and as a tensor [R, 2].

    Chunks are cached in the workspace's scratch directory for resuming.
    """
    schema = _reference_schema(config)

    def work(index: int) -> list[dict[str, Any]]:
        part = rows[index * ROWS_AT_ONCE : (index + 1) * ROWS_AT_ONCE]
        sums, _ = score_completions(model, [row.first for row in part] + [row.second for row in part], packer, config)
        columns = ([row.prompt_id for row in part], *(half.tolist() for half in sums.chunk(2)))
        return [dict(zip(schema.names, values, strict=True)) for values in zip(*columns, strict=True)]

    num_chunks = -(-len(rows) // ROWS_AT_ONCE)
    table = run_chunks(work, num_chunks, name="reference", schema=schema, workspace=workspace)
    return table, torch.tensor([[row[name] for name in schema.names[1:]] for row in table])


# --- report -------------------------------------------------------------------------------------------------------


def _write_report(
    config: DPOConfig,
    workspace: Workspace,
    data: _Data,
    tokenizer: Tokenizer,
    scores: tuple[ValidationScores, ValidationScores],
    *,
    losses: list[float],
    metrics: Metrics,
) -> None:
    before, after = scores
    sections = data.validation.sections(tokenizer, read_curves(workspace), before=before, after=after, config=config)
    shown = ("loss", "steps", "pairs", "completions", "validation_preference_accuracy", "validation_margin")
    shown += ("validation_chosen_change", "chosen_fall_alarm", "too_long", "empty_completions")
    write_report(
        workspace,
        title=f"Preference optimization: {config.loss_type}",
        losses=losses,
        config=config,
        key_figures={name.replace("_", " "): metrics[name] for name in shown if name in metrics},
        sections=sections,
    )


STAGE = Stage(
    name="dpo",
    output="Checkpoint",
    config=DPOConfig,
    run=run,
    inputs={"model": "Checkpoint", "preferences": "Preferences"},
    optional_inputs={"prompts": "Prompts", "adapter": "Checkpoint"},
    distributed=True,
    main_metric="validation_preference_accuracy",
)
