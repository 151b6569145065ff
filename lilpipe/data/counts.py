"""Documents and bytes of each source: read, rejected by stage and reason, and kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lilpipe.data.filter_trace import Thresholds
from lilpipe.data.filters.chain import Bounds
from lilpipe.schemas.documents import read_documents, read_rejected, score_values


@dataclass
class Tally:
    """A number of documents and the bytes of their original text."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, num_bytes: int) -> None:
        """Add documents and bytes."""
        self.documents += documents
        self.bytes += num_bytes


@dataclass
class SourceCounts:
    """Counts of one source."""

    read: Tally = field(default_factory=Tally)
    kept: Tally = field(default_factory=Tally)
    quarantined: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Records that are not documents, such as images in a WARC file, by kind."""
    rejected: dict[str, dict[str, Tally]] = field(default_factory=dict)
    """By stage, then by reason."""

    def rejected_at(self, stage: str) -> Tally:
        """Return the documents that a stage rejected, for all reasons."""
        tally = Tally()
        for each in self.rejected.get(stage, {}).values():
            tally.add(each.documents, each.bytes)
        return tally


@dataclass
class Counts:
    """Counts of all sources."""

    sources: dict[str, SourceCounts]
    stages: tuple[str, ...]
    """Active stages, in order of application."""
    languages: dict[str, Tally]
    """Kept documents by language."""
    licences: dict[str, Tally]
    """Kept documents by licence."""
    labels: dict[str, Tally]
    """Kept documents by label."""
    changes: dict[str, float]
    """Sums over kept documents of the scores without threshold, which count what was removed or replaced."""

    @property
    def documents_read(self) -> int:
        """Number of documents read from all sources."""
        return sum(each.read.documents for each in self.sources.values())

    @property
    def documents_kept(self) -> int:
        """Number of documents that no filter rejected."""
        return sum(each.kept.documents for each in self.sources.values())

    def total(self) -> SourceCounts:
        """Return the sum over all sources."""
        total = SourceCounts()
        for source in self.sources.values():
            total.quarantined += source.quarantined
            total.skipped.update(source.skipped)
            for mine, theirs in ((total.read, source.read), (total.kept, source.kept)):
                mine.add(theirs.documents, theirs.bytes)
            for stage, reasons in source.rejected.items():
                for reason, tally in reasons.items():
                    total.rejected.setdefault(stage, {}).setdefault(reason, Tally()).add(tally.documents, tally.bytes)
        return total

    def reasons(self) -> dict[str, int]:
        """Return the number of rejected documents by reason, most frequent first."""
        counter: Counter[str] = Counter()
        for source in self.sources.values():
            for stage in source.rejected.values():
                counter.update({reason: tally.documents for reason, tally in stage.items()})
        return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))

    def metrics(self) -> dict[str, float]:
        """Return the stage's metrics; bytes are of the original text."""
        total = self.total()
        return {
            "documents_read": total.read.documents,
            "documents_kept": total.kept.documents,
            "bytes_read": total.read.bytes,
            "bytes_kept": total.kept.bytes,
            "kept_ratio": total.kept.documents / max(1, total.read.documents),
            "quarantined": total.quarantined,
            "skipped": total.skipped.total(),
            **{f"rejected_{reason}": count for reason, count in self.reasons().items()},
            **{f"rejected_bytes_{stage}": total.rejected_at(stage).bytes for stage in self.stages},
            **{f"kept_documents_{name}": source.kept.documents for name, source in self.sources.items()},
            **{f"kept_bytes_{name}": source.kept.bytes for name, source in self.sources.items()},
            **{name.replace(".", "_"): value for name, value in self.changes.items()},
        }

    def to_json(self) -> str:
        """Return the counts as JSON, in a fixed order."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def count_documents(
    sources: list[str], directory: Path, unreadable: list[dict[str, Any]], thresholds: Thresholds
) -> Counts:
    """Count the rows of a Corpus artifact."""
    counts = {name: SourceCounts() for name in sources}
    for (source, stage, reason), tally in sorted(_tallies(read_rejected(directory), "stage", "reason").items()):
        counts[source].rejected.setdefault(stage, {})[reason] = tally
        counts[source].read.add(tally.documents, tally.bytes)
    kinds: tuple[dict[str, Tally], ...] = ({}, {}, {})
    for (source, *values), tally in _tallies(read_documents(directory), "language", "licence", "label").items():
        counts[source].kept.add(tally.documents, tally.bytes)
        counts[source].read.add(tally.documents, tally.bytes)
        for kind, value in zip(kinds, values, strict=True):
            kind.setdefault(value, Tally()).add(tally.documents, tally.bytes)
    for row in unreadable:
        counts[row["source"]].quarantined += 1
    return Counts(counts, tuple(thresholds), *map(_ranked, kinds), changes=_changes(directory, thresholds))


def _changes(directory: Path, thresholds: Thresholds) -> dict[str, float]:
    counting = [
        f"{stage}.{name}"
        for stage, scores in thresholds.items()
        for name, bounds in scores.items()
        if bounds == Bounds() and not name.endswith(("_share", "_chars"))
    ]
    sums = dict.fromkeys(counting, 0.0)
    for batch in read_documents(directory):
        for name in counting:
            sums[name] += float(score_values(batch, name).sum())
    return sums


def _tallies(batches: Iterator[pa.RecordBatch], *columns: str) -> dict[tuple[str, ...], Tally]:
    """Return documents and bytes by source and by the values of ``columns``."""
    tallies: dict[tuple[str, ...], Tally] = {}
    for batch in batches:
        groups = pa.Table.from_batches([batch]).group_by(["source", *columns])
        for row in groups.aggregate([("num_bytes", "count"), ("num_bytes", "sum")]).to_pylist():
            key = tuple(row[name] for name in ("source", *columns))
            tallies.setdefault(key, Tally()).add(row["num_bytes_count"], row["num_bytes_sum"])
    return tallies


def _ranked(tallies: dict[str, Tally]) -> dict[str, Tally]:
    return dict(sorted(tallies.items(), key=lambda item: (-item[1].bytes, item[0])))
