"""The corpus report: what was read, what was kept, what was rejected and why, with samples of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from lilpipe.config import CorpusConfig
from lilpipe.data.counts import Counts, Tally
from lilpipe.data.documents import read_documents, read_rejected
from lilpipe.data.filters import NEAR_DUPLICATE, STAGES
from lilpipe.report import ACCENT, COLOURS, bars, figure, heading, note, page, table, text_block

NUM_SAMPLES = 5
SAMPLES_PER_REASON = 3
MAX_ROWS = 15
REJECTED_COLOUR = COLOURS[1]

STAGE_NAMES = {
    "length": "Length",
    "exact_dedup": "Exact duplicates",
    "language": "Language",
    "c4": "C4",
    "gopher_repetition": "Gopher repetition",
    "gopher_quality": "Gopher quality",
    "fineweb": "FineWeb quality",
    NEAR_DUPLICATE: "Near-duplicates",
}


def build_report(config: CorpusConfig, counts: Counts, directory: Path, unreadable: list[dict[str, Any]]) -> str:
    """The report on the Corpus artifact in ``directory`` as one HTML page."""
    metrics = counts.metrics()
    figures = {
        "documents read": metrics["documents_read"],
        "documents kept": metrics["documents_kept"],
        "of documents kept": f"{metrics['kept_share']:.1%}",
        "text kept": f"{metrics['bytes_kept'] / 1e6:,.1f} MB of {metrics['bytes_read'] / 1e6:,.1f} MB",
        "rows quarantined": metrics["quarantined"],
    }
    sections = {
        "From read to kept": _funnel(counts, _stages(config)),
        "By source": _by_source(counts, _stages(config)),
        "Why documents were rejected": _reasons(counts),
        "Lengths and languages": _distributions(counts, directory, config.min_language_score),
        "Licences of kept documents": _licences(counts),
        "Samples of kept documents": _kept_samples(directory),
        "Samples of rejected documents": _rejected_samples(counts, directory),
        "Unreadable rows": _quarantine(unreadable),
        "Settings": text_block(json.dumps(config.identity(), indent=1, ensure_ascii=False), title="The section"),
    }
    return page("Corpus", sections, subtitle=f"Sources: {', '.join(counts.sources)}", key_figures=figures)


def _stages(config: CorpusConfig) -> list[str]:
    """The stages that were on."""
    off = {
        "exact_dedup": not config.exact_dedup,
        "c4": not config.quality.c4,
        "gopher_repetition": not config.quality.gopher_repetition,
        "gopher_quality": not config.quality.gopher_quality,
        "fineweb": not config.quality.fineweb,
        NEAR_DUPLICATE: not config.minhash.enabled,
    }
    return [stage for stage in STAGES if not off.get(stage)]


def _funnel(counts: Counts, stages: list[str]) -> list[str]:
    left = Tally()
    for source in counts.sources.values():
        left.add(source.read.documents, source.read.bytes)
    total = left.documents
    remaining: dict[str, float] = {"Read": total}
    rows = [{"after": "Read", "documents": total, "MB": left.bytes / 1e6, "rejected": None, "of those that came": ""}]
    for stage in stages:
        rejected = Tally()
        for source in counts.sources.values():
            tally = source.rejected_at(stage)
            rejected.add(tally.documents, tally.bytes)
        share = rejected.documents / max(1, left.documents)
        left.add(-rejected.documents, -rejected.bytes)
        remaining[STAGE_NAMES[stage]] = left.documents
        rows.append(
            {
                "after": STAGE_NAMES[stage],
                "documents": left.documents,
                "MB": left.bytes / 1e6,
                "rejected": rejected.documents,
                "of those that came": f"{share:.1%}",
            }
        )
    return [note("Documents left after each filter."), bars(remaining, total=total), heading("In numbers"), table(rows)]


def _by_source(counts: Counts, stages: list[str]) -> list[str]:
    totals, by_stage = [], []
    for name, source in counts.sources.items():
        share = source.kept.documents / max(1, source.read.documents)
        totals.append(
            {
                "source": name,
                "read": source.read.documents,
                "MB read": source.read.bytes / 1e6,
                "kept": source.kept.documents,
                "MB kept": source.kept.bytes / 1e6,
                "kept share": f"{share:.1%}",
                "quarantined": source.quarantined,
            }
        )
        rejected = {STAGE_NAMES[stage]: source.rejected_at(stage).documents for stage in stages}
        by_stage.append({"source": name, **rejected})
    return [table(totals), heading("Documents rejected"), table(by_stage)]


def _reasons(counts: Counts) -> list[str]:
    fragments = []
    for stage in STAGES:
        reasons: dict[str, float] = {}
        for source in counts.sources.values():
            for reason, tally in source.rejected.get(stage, {}).items():
                reasons[reason] = reasons.get(reason, 0) + tally.documents
        if reasons:
            ranked = dict(sorted(reasons.items(), key=lambda item: -item[1]))
            fragments += [heading(STAGE_NAMES[stage]), bars(ranked, total=counts.documents_read)]
    return [note("Documents by reason; shares of all documents read."), *fragments] if fragments else [note("None.")]


def _distributions(counts: Counts, directory: Path, min_score: float) -> list[str]:
    kept, rejected = _columns(read_documents(directory)), _columns(read_rejected(directory))
    picture = Figure(figsize=(10, 3.2))
    length, score = picture.subplots(1, 2)
    sizes = [np.log10(np.maximum(each["num_bytes"], 1)) for each in (kept, rejected)]
    edges = np.linspace(min(size.min() for size in sizes if len(size)), max(size.max() for size in sizes if len(size)))
    length.hist(sizes, edges, stacked=True, color=[ACCENT, REJECTED_COLOUR], label=["kept", "rejected"])
    ticks = range(int(edges[0]), int(np.ceil(edges[-1])) + 1)
    length.set_xticks(ticks, [_size(10**tick) for tick in ticks])
    length.set(xlabel="length of the text", ylabel="documents")
    length.legend(frameon=False)
    scores = [each["language_score"][~np.isnan(each["language_score"])] for each in (kept, rejected)]
    score.hist(scores, np.linspace(0, 1, 41), stacked=True, color=[ACCENT, REJECTED_COLOUR])
    score.axvline(min_score, color="#667080", linestyle=":", linewidth=1)
    score.annotate(" least", (min_score, 0.97), xycoords=("data", "axes fraction"), color="#667080", ha="right")
    score.set(xlabel="score of the language", ylabel="documents")
    picture.tight_layout()
    return [figure(picture), heading("Languages of kept documents"), bars(_first(counts.languages))]


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1_000:
            return f"{num_bytes} {unit}"
        num_bytes //= 1_000
    return f"{num_bytes} GB"


def _columns(batches: Iterator[pa.RecordBatch]) -> dict[str, np.ndarray]:
    """Lengths and scores of all rows; a score that was never taken is NaN."""
    names = ("num_bytes", "language_score")
    parts = [[batch[name].to_numpy(zero_copy_only=False) for name in names] for batch in batches]
    return {
        name: np.concatenate([np.asarray(part[i], np.float64) for part in parts] or [np.empty(0)])
        for i, name in enumerate(names)
    }


def _licences(counts: Counts) -> str:
    return bars(_first(counts.licences), total=counts.documents_kept)


def _first(counts: dict[str, int]) -> dict[str, float]:
    shown: dict[str, float] = dict(list(counts.items())[:MAX_ROWS])
    if rest := list(counts.values())[MAX_ROWS:]:
        shown[f"{len(rest)} others"] = sum(rest)
    return shown


def _kept_samples(directory: Path) -> list[str]:
    """The first documents, which are random ones: the corpus is in the order of a hash."""
    fragments = []
    for batch in read_documents(directory):
        for row in batch.slice(0, NUM_SAMPLES - len(fragments)).to_pylist():
            fragments.append(text_block(row["text"], title=row["id"], detail=_origin(row)))
        if len(fragments) >= NUM_SAMPLES:
            break
    return fragments


def _rejected_samples(counts: Counts, directory: Path) -> list[str]:
    samples: dict[str, list[str]] = {reason: [] for reason in counts.reasons()}
    for batch in read_rejected(directory):
        for index, reason in enumerate(batch["reason"].to_pylist()):
            if len(samples[reason]) < SAMPLES_PER_REASON:
                row = batch.slice(index, 1).to_pylist()[0]
                detail = f"{_origin(row)} · same as {row['detail']}" if row["detail"] else _origin(row)
                samples[reason].append(text_block(row["text"], title=row["id"], detail=detail, max_chars=800))
        if all(len(each) >= SAMPLES_PER_REASON for each in samples.values()):
            break
    fragments = []
    for reason, blocks in samples.items():
        fragments += [heading(reason.replace("_", " ")), *blocks]
    return fragments or [note("None.")]


def _origin(row: dict[str, Any]) -> str:
    parts = [f"{row['name']} {row['version']}".strip(), row["licence"]]
    if row["language"]:
        parts.append(f"{row['language']} {row['language_score']:.2f}")
    return " · ".join([*parts, f"{row['num_bytes']:,} bytes"])


def _quarantine(unreadable: list[dict[str, Any]]) -> list[str]:
    shown = [{name: row[name] for name in ("source", "file", "row", "error")} for row in unreadable[:MAX_ROWS]]
    rest = len(unreadable) - len(shown)
    return [table(shown), note(f"And {rest:,} more, all in quarantine.jsonl.") if rest > 0 else ""]
