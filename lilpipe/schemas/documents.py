"""The tables of a ``Corpus`` artifact.

``documents/NNNNN.arrow`` holds the kept documents and ``rejected/NNNNN.arrow`` the rejected ones, one row per
document. Files and rows are sorted by a hash of the text, so any prefix of the corpus is a random sample of it.
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
        pa.field("num_bytes", pa.int64(), nullable=False),  # of the text as read
    ]
)
"""What a document brings along. ``text`` is as the filters left it where it was kept, and as read where not."""


def documents_schema(scores: Sequence[str]) -> pa.Schema:
    """The columns of kept documents; ``scores`` are the scores that the filters note, null where not taken."""
    schema = ORIGIN.append(pa.field("language", pa.string()))  # null where rejected before it was known
    schema = schema.append(pa.field("language_score", pa.float64()))
    return schema.append(pa.field("scores", pa.struct([pa.field(name, pa.float32()) for name in scores])))


def rejected_schema(scores: Sequence[str]) -> pa.Schema:
    """The columns of rejected documents; ``detail`` is for duplicates the id of the document that was kept."""
    schema = documents_schema(scores)
    for name in ("stage", "reason", "detail"):
        schema = schema.append(pa.field(name, pa.string(), nullable=False))
    return schema


def read_documents(directory: Path) -> Iterator[pa.RecordBatch]:
    """The kept documents of a Corpus artifact, in corpus order, as memory-mapped batches of ``documents_schema``."""
    return _read(directory / "documents")


def read_rejected(directory: Path) -> Iterator[pa.RecordBatch]:
    """The rejected documents of a Corpus artifact as batches of ``rejected_schema``."""
    return _read(directory / "rejected")


def _read(folder: Path) -> Iterator[pa.RecordBatch]:
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise ArtifactError(f"{folder}: holds no .arrow files; it is no Corpus artifact, or the stage must run again")
    for file in files:
        yield from read_table(file).to_batches()


def score_values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """One score (``<stage>.<score>``) of the documents of a batch that have it, float32."""
    return batch["scores"].field(name).drop_null().to_numpy(zero_copy_only=False)
