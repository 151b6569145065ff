"""What a classifier takes for what: a matrix of counts, and what is read from it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lilpipe import report
from lilpipe.metrics.pass_at_k import ratio_estimate

Confusion = list[list[int]]
"""Row i, column j: texts of label i that are taken for label j."""


def precision_recall_f1(matrix: Confusion, label: int) -> tuple[float, float, float]:
    """Of one label; 0 where a share is of nothing."""
    right, taken, there = matrix[label][label], sum(row[label] for row in matrix), sum(matrix[label])
    precision, recall = right / taken if taken else 0.0, right / there if there else 0.0
    return precision, recall, 2 * right / (taken + there) if taken + there else 0.0


def confusion_metrics(matrix: Confusion) -> dict[str, float]:
    """Accuracy with its standard error, and F1 averaged over labels, each the same weight."""
    accuracy = ratio_estimate(sum(matrix[i][i] for i in range(len(matrix))), sum(map(sum, matrix)))
    scores = [precision_recall_f1(matrix, label)[2] for label in range(len(matrix))]
    return {
        "validation_accuracy": accuracy.value,
        "validation_accuracy_stderr": accuracy.stderr,
        "validation_macro_f1": sum(scores) / len(scores),
    }


def confusion_table(labels: Sequence[str], matrix: Confusion) -> list[dict[str, report.Cell]]:
    """A row for each class, a column for what it is taken for."""
    return [
        {"class": label, **{f"taken for {other}": count for other, count in zip(labels, row, strict=True)}}
        for label, row in zip(labels, matrix, strict=True)
    ]


def picture(labels: Sequence[str], matrix: Confusion) -> Figure:
    """Shares of each class, darker for more."""
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    size = 1.6 + 0.5 * len(labels)
    picture = Figure(figsize=(size, size))
    axes = picture.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="taken for", ylabel="class")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            colour = "white" if share > 0.5 else report.INK
            axes.text(column, row, str(matrix[row][column]), ha="center", va="center", color=colour, fontsize=9)
    return picture
