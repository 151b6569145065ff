"""Stage ``classify``: fine-tuning for text classification, with a head of one output per label.

The label is predicted at the last token, the only one that attends to the whole text.

Dimensions: B texts, T tokens, O labels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe import charts, distributed, page
from lilpipe.artifact import Inputs, one_input
from lilpipe.config.model import ModelConfig
from lilpipe.config.reward_model import ClassifyConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.heads import HeadModel, last_outputs, outputs_of_rows, pad_rows
from lilpipe.model.hub import check_model
from lilpipe.model.lora import add_adapters
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.order import count_steps, rows_by_micro_batch
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.training import finetune
from lilpipe.training.confusion import Confusion, confusion_metrics, confusion_table, precision_recall_f1
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.finetune_memory import Workload, check_memory, largest_padded_batch
from lilpipe.training.labelled_texts import LabelledText, distinct_texts, is_validation, read_texts
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, TrainerModule
from lilpipe.training.training_report import write_report

SHOWN = 30
"""Misclassified texts in the report."""


@dataclass(frozen=True)
class ClassifierExample:
    """A text as token ids, and the index of its label."""

    text: str
    ids: list[int]
    label: int


def check_classes(
    labels: Sequence[str], train: Sequence[ClassifierExample], validation: Sequence[ClassifierExample]
) -> None:
    """Raise ``DataError`` if a label has no training text or no validation text."""
    for name, part in (("training", train), ("validation", validation)):
        missing = set(range(len(labels))) - {example.label for example in part}
        if missing:
            raise DataError(
                f"classify: none of {len(part)} {name} texts has the label {labels[min(missing)]!r}, expected at least "
                "one per label; add texts with it, remove it, or change classify.validation_ratio"
            )


# --- the stage ----------------------------------------------------------------------------------------------------


def run(config: ClassifyConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train a classification head and measure it on the validation split.

    Raises ``DataError`` for too few texts, contradictory labels or a label without texts, ``ConfigError`` for settings
    that do not fit the model or the workers.
    """
    source = one_input(inputs, "model")
    assert config.seed is not None
    texts = distinct_texts(read_texts(config, inputs))
    labels = sorted({item.label for item in texts})
    shape, vocab_size, tokenizer = check_model(source.path)
    start = tokenizer.document_start_ids
    examples = [
        ClassifierExample(item.text, [*start, *tokenizer.encode(item.text)], labels.index(item.label)) for item in texts
    ]
    fitting = [example for example in examples if len(example.ids) <= shape.max_seq_len]
    if skipped := len(examples) - len(fitting):
        workspace.log(f"skipped {skipped} of {len(examples)} texts of more than {shape.max_seq_len} tokens")
    validation = [example for example in fitting if is_validation(example.text, config.validation_ratio)]
    training = [example for example in fitting if not is_validation(example.text, config.validation_ratio)]
    check_classes(labels, training, validation)
    num_steps = _num_steps(config, len(training))
    freeze = None
    if config.lora is None:
        freeze = partial(_freeze, num_layers=config.frozen_layers, embedding=config.freeze_embedding)
    workers = finetune.Workers(config)
    trained = count_trained(config, shape, vocab_size, len(labels))
    largest_batch = largest_padded_batch([(len(example.ids),) for example in training], config, num_steps=num_steps)
    work = Workload(source.path, largest_batch, head=len(labels), num_trained=trained)
    check_memory(config, work, workspace, stage="classify")
    objective = LabelObjective(training, config, padding_id=tokenizer.padding_id, workers=workers)
    trainer_module = finetune.build(
        config, source.path, objective, workers, stage="classify", head=len(labels), prepare=freeze
    )

    def evaluate(trainer_module: TrainerModule, done: int) -> Mapping[str, float]:  # noqa: ARG001
        model = finetune.whole_head_model(trainer_module)
        return confusion_metrics(confusion(model, validation, padding_id=tokenizer.padding_id))

    result = train(
        trainer_module,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=evaluate,
        eval_every=max(1, num_steps // 4),
        identity={"model": source.content_digest, "texts": _digest(texts)},
    )
    largest = max(Counter(example.label for example in validation).values())
    metrics = {
        "loss": result.final_loss(),
        "steps": float(num_steps),
        "texts": float(len(training)),
        "validation_texts": float(len(validation)),
        "trained_parameters": float(trained),
        **result.metrics,
        "largest_class_ratio": largest / len(validation),
        "tokens_per_second": result.tokens_per_second,
    }
    finetune.export(trainer_module, tokenizer, workspace, source=source.path, labels=labels)
    model = finetune.whole_head_model(trainer_module)
    if distributed.is_main():
        write_report(
            workspace,
            title="Classification",
            losses=result.losses,
            config=config,
            key_figures=metrics,
            sections=_sections(model, labels, training, validation, padding_id=tokenizer.padding_id),
        )
    return metrics


def _freeze(stage: Transformer, *, num_layers: int, embedding: bool) -> None:
    """Freeze the first blocks and the embedding, as far as this pipeline stage holds them."""
    if num_layers > stage.config.num_layers:
        raise ConfigError(
            f"classify.frozen_layers: got {num_layers}, the model has {stage.config.num_layers} blocks; reduce it"
        )
    for layer, block in stage.model.layers.items():
        block.requires_grad_(int(layer) >= num_layers)
    if embedding:
        for part in (stage.model.embed_tokens, stage.model.embed_positions):
            if part is not None:
                part.requires_grad_(False)


def count_trained(config: ClassifyConfig, shape: ModelConfig, vocab_size: int, num_labels: int) -> int:
    """Return the number of trainable parameters of the whole model."""
    with torch.device("meta"):
        model = HeadModel(shape, vocab_size, num_labels)
        if config.lora is None:
            _freeze(model, num_layers=config.frozen_layers, embedding=config.freeze_embedding)
        else:
            add_adapters(model, config.lora, seed=0, stage="classify")
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _num_steps(config: ClassifyConfig, num_texts: int) -> int:
    return count_steps(
        num_texts,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        stage="classify",
        rows="texts",
        remedy="add texts",
    )


def _digest(texts: Sequence[LabelledText]) -> str:
    """Digest of the training data, so that a checkpoint of other texts is rejected."""
    return hashlib.sha256(json.dumps([[item.text, item.label] for item in texts]).encode()).hexdigest()


class _Labels(NamedTuple):
    """Inputs of the loss of a micro-batch besides the outputs."""

    lengths_B: Tensor
    labels_B: Tensor
    num_tokens: int


class LabelObjective:
    """Batches and loss of one data rank; see ``lilpipe.training.finetune.Objective``."""

    def __init__(
        self, examples: Sequence[ClassifierExample], config: ClassifyConfig, *, padding_id: int, workers: Workers
    ) -> None:
        self._examples, self._config, self._padding_id, self._workers = examples, config, padding_id, workers
        self._lengths = [len(example.ids) for example in examples]

    def batches(self, step: int) -> list[TokenBatch]:
        """Return the micro-batches of a step."""
        rank, world_size = self._workers.data_rank, self._workers.num_data_ranks
        parts = rows_by_micro_batch(step, self._lengths, self._config, rank=rank, world_size=world_size)
        return [self._batch(part) for part in parts]

    def _batch(self, rows: Sequence[int]) -> TokenBatch:
        device, examples = distributed.device(), [self._examples[row] for row in rows]
        tokens_BT, lengths_B = pad_rows([example.ids for example in examples], padding_id=self._padding_id)
        labels_B = torch.tensor([example.label for example in examples], device=device)
        extra = _Labels(lengths_B.to(device), labels_B, num_tokens=int(lengths_B.sum()))
        tokens_BT = tokens_BT.to(device)
        sequences_BT = torch.tensor(rows, device=device)[:, None].expand_as(tokens_BT)
        return TokenBatch(tokens_BT, torch.full_like(tokens_BT, IGNORED), extra=extra, sequences=sequences_BT)

    def loss(self, outputs_BTO: Tensor, batch: TokenBatch) -> Loss:
        """Return the cross-entropy, summed over texts."""
        lengths_B, labels_B, num_tokens = batch.extra
        outputs_BO = last_outputs(outputs_BTO, lengths_B)
        right, count = float((outputs_BO.argmax(-1) == labels_B).sum()), float(len(labels_B))
        return Loss(
            total=F.cross_entropy(outputs_BO, labels_B, reduction="sum"),
            count=count,
            num_tokens=num_tokens,
            metrics={"accuracy": (right, count)},
        )


# --- evaluation ---------------------------------------------------------------------------------------------------


def predictions(model: HeadModel, examples: Sequence[ClassifierExample], *, padding_id: int) -> list[int]:
    """Return the predicted label index of each text."""
    return outputs_of_rows(model, [example.ids for example in examples], padding_id=padding_id).argmax(-1).tolist()


def confusion(model: HeadModel, examples: Sequence[ClassifierExample], *, padding_id: int) -> Confusion:
    """Return the confusion matrix: counts by true and predicted label."""
    matrix = [[0] * model.num_outputs for _ in range(model.num_outputs)]
    for example, label in zip(examples, predictions(model, examples, padding_id=padding_id), strict=True):
        matrix[example.label][label] += 1
    return matrix


# --- report -------------------------------------------------------------------------------------------------------


def _sections(
    model: HeadModel,
    labels: Sequence[str],
    training: Sequence[ClassifierExample],
    validation: Sequence[ClassifierExample],
    *,
    padding_id: int,
) -> page.Sections:
    matrix = confusion(model, validation, padding_id=padding_id)
    return {
        "Classes": page.table(class_table(labels, training, matrix)),
        "Confusion matrix": [
            page.table(confusion_table(labels, matrix)),
            charts.svg(charts.matrix(labels, matrix, rows="class", columns="predicted")),
        ],
        "Misclassified texts": page.table(_mistakes(model, labels, validation, padding_id=padding_id)),
    }


def class_table(
    labels: Sequence[str], training: Sequence[ClassifierExample], matrix: Confusion
) -> list[dict[str, page.Cell]]:
    """Return a table of counts, precision, recall and F1 per class."""
    counts = Counter(example.label for example in training)
    rows: list[dict[str, page.Cell]] = []
    for index, label in enumerate(labels):
        precision, recall, f1 = precision_recall_f1(matrix, index)
        rows.append(
            {
                "class": label,
                "training texts": counts[index],
                "share": f"{counts[index] / len(training):.1%}",
                "validation texts": sum(matrix[index]),
                "precision": precision,
                "recall": recall,
                "F1": f1,
            }
        )
    return rows


def _mistakes(
    model: HeadModel, labels: Sequence[str], validation: Sequence[ClassifierExample], *, padding_id: int
) -> list[dict[str, page.Cell]]:
    found = zip(validation, predictions(model, validation, padding_id=padding_id), strict=True)
    wrong = [(example, label) for example, label in found if example.label != label]
    return [
        {"text": example.text[:200], "class": labels[example.label], "predicted": labels[label]}
        for example, label in wrong[:SHOWN]
    ]


def external(config: ClassifyConfig) -> dict[str, str]:
    """Return the digest of the texts' file. Raises ``DataError`` if it cannot be read."""
    if config.path is None:
        return {}
    try:
        return {"texts": digest_file(Path(config.path))}
    except OSError as error:
        raise DataError(f"classify.path: {config.path} cannot be read ({error.strerror}); check the path") from error


STAGE = Stage(
    name="classify",
    output="Checkpoint",
    config=ClassifyConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"prompts": "Prompts", "adapter": "Checkpoint"},
    external=external,
    distributed=True,
    main_metric="validation_accuracy",
)
