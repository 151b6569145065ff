"""The trace of one document: each filter's decision, with its scores and thresholds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lilpipe.artifact import write_atomically
from lilpipe.data.filters.chain import Bounds
from lilpipe.errors import DataError
from lilpipe.schemas.documents import read_documents, read_rejected

FILTERS_FILE = "filters.json"
MAX_SUGGESTIONS = 5

Thresholds = dict[str, dict[str, Bounds]]
"""Stage, in the order of the chain, to its scores and their allowed values."""


@dataclass(frozen=True)
class FilterDecision:
    """One score of one stage. A stage without scores has one decision without a score."""

    stage: str
    score: str
    value: float | None
    bounds: Bounds
    passed: bool
    """Whether the stage kept the document."""


@dataclass(frozen=True)
class FilterTrace:
    """What happened to a document in the corpus stage."""

    row: dict[str, Any]
    """Its row of the Corpus artifact, of ``documents_schema`` or, if rejected, of ``rejected_schema``."""
    decisions: list[FilterDecision]
    """Decisions of the stages that it reached, in order."""
    not_reached: list[str]
    """Stages after the one that rejected it."""
    kept: dict[str, Any] | None
    """Row of the document that was kept instead, if this one is a duplicate."""

    @property
    def rejected_by(self) -> str | None:
        """The stage that rejected the document, or None."""
        return self.row.get("stage")


def write_thresholds(directory: Path, thresholds: Thresholds) -> None:
    """Write the thresholds of a Corpus artifact."""
    content = {
        stage: {name: bounds._asdict() for name, bounds in scores.items()} for stage, scores in thresholds.items()
    }
    write_atomically(directory / FILTERS_FILE, json.dumps(content, indent=1) + "\n")


def read_thresholds(directory: Path) -> Thresholds:
    """Read the thresholds of a Corpus artifact."""
    content = json.loads((directory / FILTERS_FILE).read_text(encoding="utf-8"))
    return {stage: {name: Bounds(**bounds) for name, bounds in scores.items()} for stage, scores in content.items()}


def trace_filters(directory: Path, document_id: str) -> FilterTrace:
    """Return the trace of a document of a Corpus artifact. Raises ``DataError`` if the id is not found."""
    row = find_document(directory, document_id)
    if row is None:
        known = _like(directory, document_id)
        raise DataError(
            f"document {document_id!r}: id not found among kept or rejected documents; "
            + (f"ids that contain it: {', '.join(known)}" if known else "unreadable rows are in quarantine.jsonl")
        )
    thresholds = read_thresholds(directory)
    stages = list(thresholds)
    end = stages.index(row["stage"]) + 1 if "stage" in row else len(stages)
    decisions = [each for stage in stages[:end] for each in _decisions(row, stage, thresholds[stage])]
    duplicate = row.get("stage", "").endswith("_dedup") and row["detail"]
    kept = find_document(directory, row["detail"]) if duplicate else None
    return FilterTrace(row=row, decisions=decisions, not_reached=stages[end:], kept=kept)


def _decisions(row: dict[str, Any], stage: str, scores: dict[str, Bounds]) -> Iterator[FilterDecision]:
    passed = row.get("stage") != stage
    if not scores:
        yield FilterDecision(stage, "", None, Bounds(), passed)
    for name, bounds in scores.items():
        yield FilterDecision(stage, name, row["scores"].get(f"{stage}.{name}"), bounds, passed)


def find_document(directory: Path, document_id: str) -> dict[str, Any] | None:
    """Return the row with that id from the kept documents, else from the rejected ones, else None."""
    for batches in (read_documents(directory), read_rejected(directory)):
        for batch in batches:
            index = pc.index(batch["id"], pa.scalar(document_id)).as_py()
            if index >= 0:
                return batch.slice(index, 1).to_pylist()[0]
    return None


def _like(directory: Path, document_id: str) -> list[str]:
    found: list[str] = []
    for batches in (read_documents(directory), read_rejected(directory)):
        for batch in batches:
            found += [each for each in batch["id"].to_pylist() if document_id in each]
            if len(found) >= MAX_SUGGESTIONS:
                return found[:MAX_SUGGESTIONS]
    return found
