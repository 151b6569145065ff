"""Confusion matrix of a classifier, and metrics derived from it."""

from __future__ import annotations

from collections.abc import Sequence

from lilpipe import page
from lilpipe.metrics.pass_at_k import ratio_estimate

Confusion = list[list[int]]
"""Row i, column j: texts of label i predicted as label j."""


def precision_recall_f1(matrix: Confusion, label: int) -> tuple[float, float, float]:
    """Return precision, recall and F1 of one label; 0 where the denominator is 0."""
    right, taken, there = matrix[label][label], sum(row[label] for row in matrix), sum(matrix[label])
    precision, recall = right / taken if taken else 0.0, right / there if there else 0.0
    return precision, recall, 2 * right / (taken + there) if taken + there else 0.0


def confusion_metrics(matrix: Confusion) -> dict[str, float]:
    """Return accuracy with its standard error, and macro F1."""
    accuracy = ratio_estimate(sum(matrix[i][i] for i in range(len(matrix))), sum(map(sum, matrix)))
    scores = [precision_recall_f1(matrix, label)[2] for label in range(len(matrix))]
    return {
        "validation_accuracy": accuracy.value,
        "validation_accuracy_stderr": accuracy.stderr,
        "validation_macro_f1": sum(scores) / len(scores),
    }


def confusion_table(labels: Sequence[str], matrix: Confusion) -> list[dict[str, page.Cell]]:
    """Return a row per true class with a column per predicted class."""
    return [
        {"class": label, **{f"predicted {other}": count for other, count in zip(labels, row, strict=True)}}
        for label, row in zip(labels, matrix, strict=True)
    ]
