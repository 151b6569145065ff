"""The tables of a ``Corpus`` artifact.

``documents/NNNNN.arrow`` holds the kept documents and ``rejected/NNNNN.arrow`` the rejected ones, one row per
document. Kept documents are sorted by a hash of their text, so any prefix of the corpus is a random sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from lilpipe.errors import ArtifactError
from lilpipe.schemas.tables import read_table

ORIGIN = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("date", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),  # size of the original text
    ]
)
"""Provenance columns. ``text`` is the filtered text of a kept document, and the original text of a rejected one."""


def documents_schema(scores: Sequence[str]) -> pa.Schema:
    """Return the schema of kept documents; ``scores`` are the filters' scores, null if not computed."""
    schema = ORIGIN.append(pa.field("language", pa.string()))  # null if rejected before language identification
    schema = schema.append(pa.field("language_score", pa.float64()))
    return schema.append(pa.field("scores", pa.struct([pa.field(name, pa.float32()) for name in scores])))


def rejected_schema(scores: Sequence[str]) -> pa.Schema:
    """Return the schema of rejected documents; for a duplicate, ``detail`` is the id of the kept document."""
    schema = documents_schema(scores)
    for name in ("stage", "reason", "detail"):
        schema = schema.append(pa.field(name, pa.string(), nullable=False))
    return schema


def read_documents(directory: Path) -> Iterator[pa.RecordBatch]:
    """Read the kept documents of a Corpus artifact, in corpus order, as memory-mapped ``documents_schema`` batches."""
    return _read(directory / "documents")


def read_rejected(directory: Path) -> Iterator[pa.RecordBatch]:
    """Read the rejected documents of a Corpus artifact as batches of ``rejected_schema``."""
    return _read(directory / "rejected")


def _read(folder: Path) -> Iterator[pa.RecordBatch]:
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise ArtifactError(f"{folder}: no .arrow files found, expected a Corpus artifact; run the corpus stage again")
    for file in files:
        yield from read_table(file).to_batches()


def score_values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Return the non-null values of one score (``<stage>.<score>``) in a batch, float32."""
    return batch["scores"].field(name).drop_null().to_numpy(zero_copy_only=False)
