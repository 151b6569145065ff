"""The corpus report: what was read, kept and rejected, and why, with samples of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lilpipe import charts, page
from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.counts import Counts, SourceCounts, Tally
from lilpipe.data.filter_trace import Thresholds
from lilpipe.data.filters.chain import Bounds
from lilpipe.data.histograms import score_histograms
from lilpipe.schemas.documents import read_documents, read_rejected

NUM_SAMPLES = 10
SAMPLES_PER_REASON = 10
MAX_ROWS = 15
MAX_FUNNEL_SOURCES = len(charts.COLOURS)

STAGE_NAMES = {
    "url": "Blocked addresses",
    "length": "Length",
    "exact_dedup": "Exact duplicates",
    "language": "Language",
    "line_dedup": "Repeated lines",
    "paragraph_dedup": "Repeated paragraphs",
    "c4": "C4",
    "gopher_repetition": "Gopher repetition",
    "gopher_quality": "Gopher quality",
    "fineweb": "FineWeb quality",
    "ngram_coverage": "Repeated n-grams",
    "dirty_words": "Dirty words",
    "divergence": "Outlier tokens",
    "pii": "Personal data",
    "decontamination": "Evaluation sets",
    "classifier": "Quality classifier",
    "url_dedup": "Duplicate addresses",
    "near_dedup": "Near-duplicates",
}


def build_report(
    config: CorpusConfig,
    counts: Counts,
    directory: Path,
    unreadable: Sequence[Mapping[str, Any]],
    *,
    thresholds: Thresholds,
    findings: page.Sections,
) -> str:
    """Return the report on the Corpus artifact in ``directory`` as one HTML page.

    ``findings`` are additional sections by heading: quality classifier and evaluation sets.
    """
    total, settings = counts.total(), json.dumps(config.identity(), indent=1, ensure_ascii=False)
    figures = {
        "documents read": total.read.documents,
        "documents kept": total.kept.documents,
        "of documents kept": f"{total.kept.documents / max(1, total.read.documents):.1%}",
        "text kept": f"{total.kept.bytes / 1e6:,.1f} MB of {total.read.bytes / 1e6:,.1f} MB",
        "rows quarantined": total.quarantined,
    }
    sections: dict[str, page.Body] = {
        "From read to kept": _funnel(counts, total),
        "By source": _by_source(counts),
        "Why documents were rejected": _reasons(counts, total),
        "What was changed in the documents kept": _changes(counts),
        "Scores and thresholds": _scores(directory, thresholds),
        **findings,
        "Languages": _kinds(counts.languages, "language"),
        "Licences": _kinds(counts.licences, "licence"),
        **({"Labels": _kinds(counts.labels, "label")} if set(counts.labels) != {""} else {}),
        "Samples of kept documents": _kept_samples(directory),
        "Samples of rejected documents": _rejected_samples(counts, directory),
        "Unreadable rows": _quarantine(unreadable, total.skipped),
        "Settings": page.text_block(settings, title="The section", max_chars=len(settings)),
    }
    return page.render("Corpus", sections, subtitle=f"Sources: {', '.join(counts.sources)}", key_figures=figures)


def _stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage.replace("_", " "))


# --- counts -------------------------------------------------------------------------------------------------------


def _funnel(counts: Counts, total: SourceCounts) -> list[page.Fragment]:
    """Return the documents and bytes left after each filter, as a chart by source and as a table."""
    left = Tally(total.read.documents, total.read.bytes)
    rows = [
        {
            "after": "Read",
            "documents": left.documents,
            "rejected": None,
            "MB": round(left.bytes / 1e6, 3),
            "MB rejected": None,
        }
    ]
    for stage in counts.stages:
        rejected = total.rejected_at(stage)
        left.add(-rejected.documents, -rejected.bytes)
        rows.append(
            {
                "after": _stage_name(stage),
                "documents": left.documents,
                "rejected": rejected.documents,
                "MB": round(left.bytes / 1e6, 3),
                "MB rejected": round(rejected.bytes / 1e6, 3),
            }
        )
    return [_funnel_chart(counts), page.heading("In numbers"), page.table(rows)]


def _funnel_chart(counts: Counts) -> page.Fragment:
    """Return a chart of the documents and megabytes left of each source, after each filter that rejected any."""
    total = counts.total()
    stages = [stage for stage in counts.stages if total.rejected_at(stage).documents]
    panels: dict[str, dict[str, np.ndarray]] = {"documents left": {}, "MB of text left": {}}
    for name, source in _largest_sources(counts).items():
        rejected = [Tally(), *(source.rejected_at(stage) for stage in stages)]
        documents, size = (np.cumsum([getattr(each, unit) for each in rejected]) for unit in ("documents", "bytes"))
        panels["documents left"][name] = source.read.documents - documents
        panels["MB of text left"][name] = (source.read.bytes - size) / 1e6
    return charts.svg(charts.bars(["Read", *map(_stage_name, stages)], panels, stacked=True))


def _largest_sources(counts: Counts) -> dict[str, SourceCounts]:
    """Return the sources, largest first; if there are more than colours, the smallest are merged into one."""
    ranked = sorted(counts.sources.items(), key=lambda item: -item[1].read.bytes)
    if len(ranked) <= MAX_FUNNEL_SOURCES:
        return dict(ranked)
    first, rest = ranked[: MAX_FUNNEL_SOURCES - 1], ranked[MAX_FUNNEL_SOURCES - 1 :]
    others = Counts(dict(rest), counts.stages, {}, {}, {}, {}).total()
    return {**dict(first), f"{len(rest)} others": others}


def _by_source(counts: Counts) -> list[page.Fragment]:
    totals, documents, megabytes = [], [], []
    stages = [stage for stage in counts.stages if counts.total().rejected_at(stage).documents]
    for name, source in counts.sources.items():
        totals.append(
            {
                "source": name,
                "read": source.read.documents,
                "MB read": round(source.read.bytes / 1e6, 3),
                "kept": source.kept.documents,
                "MB kept": round(source.kept.bytes / 1e6, 3),
                "kept share": f"{source.kept.documents / max(1, source.read.documents):.1%}",
                "quarantined": source.quarantined,
            }
        )
        rejected = {_stage_name(stage): source.rejected_at(stage) for stage in stages}
        documents.append({"source": name, **{stage: each.documents for stage, each in rejected.items()}})
        megabytes.append({"source": name, **{stage: round(each.bytes / 1e6, 3) for stage, each in rejected.items()}})
    return [
        page.table(totals),
        page.heading("Documents rejected"),
        page.table(documents),
        page.heading("MB rejected"),
        page.table(megabytes),
    ]


def _reasons(counts: Counts, total: SourceCounts) -> list[page.Fragment]:
    fragments: list[page.Fragment] = []
    for stage in counts.stages:
        if reasons := total.rejected.get(stage):
            ranked: dict[str, float] = {
                reason: tally.documents
                for reason, tally in sorted(reasons.items(), key=lambda item: -item[1].documents)
            }
            fragments += [page.heading(_stage_name(stage)), page.bar_table(ranked, total=total.read.documents)]
    return (
        [page.note("Documents by reason; shares of all documents read."), *fragments]
        if fragments
        else [page.note("None.")]
    )


def _changes(counts: Counts) -> page.Fragment:
    """Return a table of the summed scores that count what a filter removed or replaced."""
    rows = []
    for name, value in counts.changes.items():
        stage, score = name.split(".")
        if value:
            rows.append({"filter": _stage_name(stage), "what": score.replace("_", " "), "in all documents": value})
    return page.table(rows)


def _kinds(tallies: Mapping[str, Tally], name: str) -> list[page.Fragment]:
    shown: dict[str, float] = {
        (kind or "none given"): tally.bytes / 1e6 for kind, tally in list(tallies.items())[:MAX_ROWS]
    }
    rest = list(tallies.values())[MAX_ROWS:]
    if rest:
        shown[f"{len(rest)} others"] = sum(tally.bytes for tally in rest) / 1e6
    rows = [
        {name: kind or "none given", "documents": tally.documents, "MB": round(tally.bytes / 1e6, 3)}
        for kind, tally in tallies.items()
    ]
    numbers = [] if len(rows) <= 1 else [page.heading("In numbers"), page.table(rows)]
    return [
        page.note("MB of original text of the kept documents."),
        page.bar_table(shown, total=sum(shown.values())),
        *numbers,
    ]


# --- scores and samples -------------------------------------------------------------------------------------------


def _scores(directory: Path, thresholds: Thresholds) -> list[page.Fragment]:
    bounds = {
        f"{stage}.{name}": each
        for stage, scores in thresholds.items()
        for name, each in scores.items()
        if each != Bounds()
    }
    panels = score_histograms(directory, bounds)
    if not panels:
        return [page.note("No filter computed a score.")]
    return [
        page.note(
            "Number of documents by score; the dotted line is the threshold. Rejected means by any filter, not only by "
            "this one. A document has no scores from the filters after the one that rejected it."
        ),
        charts.svg(charts.histograms(panels)),
    ]


def _kept_samples(directory: Path) -> list[page.Fragment]:
    """Return the first documents; they are a random sample, because the corpus is sorted by a hash."""
    fragments: list[page.Fragment] = []
    for batch in read_documents(directory):
        for row in batch.slice(0, NUM_SAMPLES - len(fragments)).to_pylist():
            fragments.append(page.text_block(row["text"], title=row["id"], detail=_origin(row)))
        if len(fragments) >= NUM_SAMPLES:
            break
    return fragments


def _rejected_samples(counts: Counts, directory: Path) -> list[page.Fragment]:
    samples: dict[str, list[page.Fragment]] = {reason: [] for reason in counts.reasons()}
    for batch in read_rejected(directory):
        for index, reason in enumerate(batch["reason"].to_pylist()):
            if len(samples[reason]) < SAMPLES_PER_REASON:
                row = batch.slice(index, 1).to_pylist()[0]
                detail = f"{_origin(row)} · {row['detail']}" if row["detail"] else _origin(row)
                samples[reason].append(page.text_block(row["text"], title=row["id"], detail=detail, max_chars=800))
        if all(len(each) >= SAMPLES_PER_REASON for each in samples.values()):
            break
    fragments: list[page.Fragment] = []
    for reason, blocks in samples.items():
        fragments += [page.heading(reason.replace("_", " ")), *blocks]
    return fragments or [page.note("None.")]


def _origin(row: dict[str, Any]) -> str:
    parts = [f"{row['name']} {row['version']}".strip(), row["licence"]]
    if row["language"]:
        parts.append(f"{row['language']} {row['language_score']:.2f}")
    return " · ".join([*parts, f"{row['num_bytes']:,} bytes"])


def _quarantine(unreadable: Sequence[Mapping[str, Any]], skipped: Mapping[str, int]) -> list[page.Fragment]:
    shown = [{name: row[name] for name in ("source", "file", "row", "error")} for row in unreadable[:MAX_ROWS]]
    rest = len(unreadable) - len(shown)
    left_out = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(skipped.items()))
    notes = [f"And {rest:,} more, all in quarantine.jsonl."] if rest > 0 else []
    notes += [f"Skipped, not documents: {left_out}."] if left_out else []
    return [page.table(shown), *map(page.note, notes)]
