"""Conversion of documents to tables; the schemas are in ``lilpipe.schemas.documents``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lilpipe.data.filters.chain import Document, Rejection
from lilpipe.schemas.documents import documents_schema


def documents_table(documents: Sequence[Document], scores: Sequence[str]) -> pa.Table:
    """Return documents as a table of ``documents_schema``.

    The table is built by column: building it from a dictionary per row takes ten times as long with many scores.
    """
    schema = documents_schema(scores)
    columns = [
        pa.array([getattr(each, name) for each in documents], schema.field(name).type) for name in schema.names[:-1]
    ]
    nan = float("nan")
    values = [
        pa.array(np.array([each.scores.get(name, nan) for each in documents], np.float32), from_pandas=True)
        for name in scores
    ]
    columns.append(pa.StructArray.from_arrays(values, fields=list(schema.field("scores").type)))
    return pa.Table.from_arrays(columns, schema=schema)


def rejected_table(documents: pa.Table, verdicts: Sequence[tuple[str, Rejection]]) -> pa.Table:
    """Return the documents with columns for the stage that rejected each one, the reason and the detail."""
    columns = {
        "stage": [stage for stage, _ in verdicts],
        "reason": [rejection.reason for _, rejection in verdicts],
        "detail": [rejection.detail for _, rejection in verdicts],
    }
    for name, values in columns.items():
        documents = documents.append_column(pa.field(name, pa.string(), nullable=False), pa.array(values, pa.string()))
    return documents
