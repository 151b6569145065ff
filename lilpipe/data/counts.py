"""How many documents and bytes of each source were read, rejected at each stage and by each reason, and kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lilpipe.data.documents import read_documents, read_rejected
from lilpipe.data.filters import STAGES


@dataclass
class Tally:
    """Documents, and bytes of their text as read."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, num_bytes: int) -> None:
        """Count further documents."""
        self.documents += documents
        self.bytes += num_bytes


@dataclass
class SourceCounts:
    """What became of one source."""

    read: Tally = field(default_factory=Tally)
    kept: Tally = field(default_factory=Tally)
    quarantined: int = 0
    rejected: dict[str, dict[str, Tally]] = field(default_factory=dict)
    """Stage, then reason."""

    def rejected_at(self, stage: str) -> Tally:
        """Everything that a stage rejected."""
        tally = Tally()
        for each in self.rejected.get(stage, {}).values():
            tally.add(each.documents, each.bytes)
        return tally


@dataclass
class Counts:
    """What became of all sources."""

    sources: dict[str, SourceCounts]
    languages: dict[str, int]
    """Kept documents by language."""
    licences: dict[str, int]
    """Kept documents by licence."""

    @property
    def documents_read(self) -> int:
        """Documents of all sources."""
        return sum(each.read.documents for each in self.sources.values())

    @property
    def documents_kept(self) -> int:
        """Documents that no filter rejected."""
        return sum(each.kept.documents for each in self.sources.values())

    def reasons(self) -> dict[str, int]:
        """Rejected documents by reason, most frequent first."""
        counter: Counter[str] = Counter()
        for source in self.sources.values():
            for stage in source.rejected.values():
                counter.update({reason: tally.documents for reason, tally in stage.items()})
        return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))

    def metrics(self) -> dict[str, float]:
        """The stage's metrics; bytes are of the text as read."""
        bytes_read = sum(each.read.bytes for each in self.sources.values())
        bytes_kept = sum(each.kept.bytes for each in self.sources.values())
        return {
            "documents_read": self.documents_read,
            "documents_kept": self.documents_kept,
            "bytes_read": bytes_read,
            "bytes_kept": bytes_kept,
            "kept_share": self.documents_kept / max(1, self.documents_read),
            "quarantined": sum(each.quarantined for each in self.sources.values()),
            **{f"rejected_{reason}": count for reason, count in self.reasons().items()},
        }

    def to_json(self) -> str:
        """The counts as JSON, in a fixed order."""
        return json.dumps({"stages": STAGES, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def count_documents(sources: list[str], directory: Path, unreadable: list[dict[str, Any]]) -> Counts:
    """Count the rows of a Corpus artifact."""
    counts = {name: SourceCounts() for name in sources}
    for (source, stage, reason), tally in sorted(_tallies(read_rejected(directory), "stage", "reason").items()):
        counts[source].rejected.setdefault(stage, {})[reason] = tally
        counts[source].read.add(tally.documents, tally.bytes)
    languages: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for (source, language, licence), tally in _tallies(read_documents(directory), "language", "licence").items():
        counts[source].kept.add(tally.documents, tally.bytes)
        counts[source].read.add(tally.documents, tally.bytes)
        languages[language] += tally.documents
        licences[licence] += tally.documents
    for row in unreadable:
        counts[row["source"]].quarantined += 1
    return Counts(counts, _ranked(languages), _ranked(licences))


def _tallies(batches: Any, *columns: str) -> dict[tuple[str, ...], Tally]:
    tallies: dict[tuple[str, ...], Tally] = {}
    for batch in batches:
        groups = pa.Table.from_batches([batch]).group_by(["source", *columns])
        for row in groups.aggregate([("num_bytes", "count"), ("num_bytes", "sum")]).to_pylist():
            key = tuple(row[name] for name in ("source", *columns))
            tallies.setdefault(key, Tally()).add(row["num_bytes_count"], row["num_bytes_sum"])
    return tallies


def _ranked(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
