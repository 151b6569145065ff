"""Histograms of the filters' scores for kept and rejected documents, with the thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from lilpipe.charts import Histogram
from lilpipe.data.filters.chain import Bounds
from lilpipe.schemas.documents import read_documents, read_rejected, score_values

NUM_BINS = 40
LOGARITHMIC_FROM = 300.0
"""Ratio of the largest to the smallest score from which the axis is logarithmic."""


def score_histograms(directory: Path, bounds: Mapping[str, Bounds]) -> list[Histogram]:
    """Return a histogram for each score of ``bounds`` (``<stage>.<score>``) that any document has."""
    edges = {name: _edges(*span) for name, span in _spans(directory, list(bounds)).items()}
    counts = _counts(directory, edges) if edges else {}
    return [
        Histogram(
            title=name.replace("_", " ").replace(".", " · "),
            edges=bins.tolist(),
            counts={"kept": counts[name][0].tolist(), "rejected": counts[name][1].tolist()},
            marks=[mark for mark in bounds[name] if mark is not None and bins[0] <= mark <= bins[-1]],
        )
        for name, bins in edges.items()
    ]


def _batches(directory: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield all batches: 0 with those of kept documents, 1 with those of rejected documents."""
    for side, read in enumerate((read_documents, read_rejected)):
        for batch in read(directory):
            yield side, batch


def _spans(directory: Path, names: list[str]) -> dict[str, tuple[float, float]]:
    """Return the minimum and maximum of each score that any document has."""
    spans: dict[str, tuple[float, float]] = {}
    for _, batch in _batches(directory):
        for name in names:
            values = score_values(batch, name)
            if len(values) and np.isfinite(values).all():
                least, most = spans.get(name, (np.inf, -np.inf))
                spans[name] = min(least, float(values.min())), max(most, float(values.max()))
    return {name: spans[name] for name in names if name in spans}


def _edges(least: float, most: float) -> np.ndarray:
    if least > 0 and most / least > LOGARITHMIC_FROM:
        return np.geomspace(least, most, NUM_BINS + 1)
    if least == 0 and most > LOGARITHMIC_FROM:  # a count: zeros get their own bin
        return np.concatenate([[0.5], np.geomspace(1, most, NUM_BINS)])
    return np.linspace(least, most if most > least else least + 1, NUM_BINS + 1)


def _counts(directory: Path, edges: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the number of documents by bin, [2, bins]: kept and rejected."""
    counts = {name: np.zeros((2, len(bins) - 1), np.int64) for name, bins in edges.items()}
    for side, batch in _batches(directory):
        for name, bins in edges.items():
            values = score_values(batch, name)
            counts[name][side] += np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0]
    return counts
