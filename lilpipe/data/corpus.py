"""The corpus stage: turns raw sources into clean, deduplicated documents, on datatrove's executors.

1. Read: write the sources as runs sorted by a hash of the text (``sorting``); unreadable rows are quarantined.
2. Learn: collect corpus-wide statistics for the filters, and train the quality classifier (``learn``).
3. Filter: apply the chain of filters to equal ranges of the hash, and compute MinHash signatures of what passes.
4. Judge: decide what needs all passing documents: the classifier's threshold and near-duplicates (``late``).
5. Write: the tables of the artifact, the counts and the report.

The division into tasks depends only on the data, so the output does not depend on the number of workers. A resumed run
does not repeat completed tasks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from lilpipe import page
from lilpipe.artifact import Inputs, optional_input, write_atomically
from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data.build_filters import build_filters
from lilpipe.data.corpus_report import build_report
from lilpipe.data.counts import Counts, count_documents
from lilpipe.data.executors.executor import open_executor
from lilpipe.data.filter_trace import Thresholds, write_thresholds
from lilpipe.data.filtering import FilterShards, WriteShards, matches_folder
from lilpipe.data.filters.chain import Bounds
from lilpipe.data.filters.classifier import keep_threshold
from lilpipe.data.filters.decontamination import EvaluationIndex
from lilpipe.data.filters.language import bundled_model_path
from lilpipe.data.findings import MATCHES_FILE, classifier_section, evaluation_section, gather_matches
from lilpipe.data.late import LateVerdicts
from lilpipe.data.learn import CLASSIFIER_REPORT, Learnt, learn
from lilpipe.data.minhash import MatchBands, near_duplicates
from lilpipe.data.sorting import ReadParts, ReadSummary, Selection, run_files
from lilpipe.data.sources.readers import digest_source, find_parts
from lilpipe.data.work import Work
from lilpipe.digests import digest_file
from lilpipe.errors import DataError
from lilpipe.schemas.documents import read_documents, read_rejected
from lilpipe.schemas.tables import read_table, write_table
from lilpipe.stage import Metrics, Stage, Workspace

__all__ = ["STAGE", "read_documents", "read_rejected"]

SHARD_BYTES = 2**20
MAX_SMALL_SHARDS = 64
LARGE_SHARD_BYTES = 32 * 2**20
MAX_SHARDS = 4096
"""Shards have 1 MiB each; from 64 shards on they grow to 32 MiB, then their number grows up to ``MAX_SHARDS``."""

SHOWN_ERRORS = 3


def run(config: CorpusConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Build the corpus. Raises ``DataError`` if a source is missing, empty or unreadable, or if nothing is kept."""
    prompts = optional_input(inputs, "prompts")
    with open_executor(config) as run_tasks:
        work = Work(workspace, run_tasks)
        summaries = _read(config, work)
        selection = _select(config, work.folder("read"))
        learnt = learn(config, selection, prompts.path if prompts else None, work)
        filtered = work.folder("filtered")
        work.run("filter", FilterShards(selection, config, learnt, filtered), selection.num_shards)
        late = _judge(config, selection, work)
        work.run("write", WriteShards(late, workspace.output), selection.num_shards)
    unreadable = [row for summary in summaries for row in summary.unreadable]
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in unreadable)
    write_atomically(workspace.output / "quarantine.jsonl", "".join(lines))
    thresholds = _thresholds(config, learnt, late)
    write_thresholds(workspace.output, thresholds)
    counts = count_documents([source.name for source in config.sources], workspace.output, unreadable, thresholds)
    for summary in summaries:
        counts.sources[summary.source].skipped.update(summary.skipped)
    write_atomically(workspace.output / "counts.json", counts.to_json())
    if not counts.documents_kept:
        raise DataError(_nothing_kept(counts))
    findings = _findings(config, learnt, late, workspace.output)
    html = build_report(config, counts, workspace.output, unreadable, thresholds=thresholds, findings=findings)
    write_atomically(workspace.report / "report.html", html)
    return counts.metrics()


def external(config: CorpusConfig) -> dict[str, str]:
    """Return digests of the sources, the examples, the evaluation sets and the files that the config names.

    Raises ``DataError`` if one is missing.
    """
    model = Path(config.language.model) if config.language.model else bundled_model_path()
    lists = {
        "corpus.url.blocked_domains": config.url.blocked_domains,
        "corpus.url.blocked_words": config.url.blocked_words,
        "corpus.quality.dirty_words": config.quality.dirty_words,
    }
    sources: dict[str, tuple[Source, ...]] = {
        "source": config.sources,
        "good example": config.classifier.good,
        "bad example": config.classifier.bad,
        "evaluation set": config.decontamination.sets if config.decontamination.enabled else (),
    }
    return {
        "language model": _digest_named("corpus.language.model", str(model)),
        **{field: _digest_named(field, path) for field, path in lists.items() if path},
        **{f"{kind} {source.name}": digest_source(source) for kind, each in sources.items() for source in each},
    }


def _digest_named(field: str, path: str) -> str:
    try:
        return digest_file(Path(path))
    except OSError as error:
        raise DataError(f"{field}: {path} cannot be read ({error.strerror}); correct the path") from error


def _read(config: CorpusConfig, work: Work) -> list[ReadSummary]:
    """Read all parts. Raises ``DataError`` if a source has no documents or too many unreadable rows."""
    parts = [part for source in config.sources for part in find_parts(source)]
    folder = work.folder("read")
    work.run("read", ReadParts(parts, [source.name for source in config.sources], folder), len(parts))
    summaries = [ReadSummary(**json.loads(path.read_text())) for path in sorted((folder / "summaries").glob("*.json"))]
    for source in config.sources:
        _check_source(source.name, [each for each in summaries if each.source == source.name], config)
    return summaries


def _check_source(name: str, summaries: list[ReadSummary], config: CorpusConfig) -> None:
    unreadable = [row for summary in summaries for row in summary.unreadable]
    num_documents = sum(summary.num_documents for summary in summaries)
    examples = "; ".join(f"{row['file']}:{row['row']} {row['error']}" for row in unreadable[:SHOWN_ERRORS])
    row_ratio = len(unreadable) / max(1, len(unreadable) + num_documents)
    file_ratio = sum(row["breaks_off"] for row in unreadable) / sum(summary.num_files for summary in summaries)
    if max(row_ratio, file_ratio) > config.max_malformed_ratio:
        raise DataError(
            f"source {name!r}: {len(unreadable)} of {len(unreadable) + num_documents} rows cannot be read "
            f"({max(row_ratio, file_ratio):.1%} of its {'rows' if row_ratio >= file_ratio else 'files'}; at most "
            f"{config.max_malformed_ratio:.1%} is allowed): {examples}; repair the source, correct `columns.text` or "
            f"`kind`, or raise corpus.max_malformed_ratio"
        )
    if not num_documents:
        source = next(source for source in config.sources if source.name == name)
        raise DataError(
            f"source {name!r}: got no documents in path {source.path or 'of this environment'}"
            + (f" within max_bytes = {source.max_bytes}" if source.max_bytes else "")
            + "; correct `path`, or remove the source"
        )


def _select(config: CorpusConfig, folder: Path) -> Selection:
    """Apply `max_bytes` of each source, find duplicate ids, and compute the number of shards."""
    runs = [read_table(path) for path in run_files(folder)]
    order, source, num_bytes = (
        np.concatenate([run[name].to_numpy() for run in runs]) for name in ("order", "source_index", "num_bytes")
    )
    last_order = []
    admitted = np.zeros(len(order), bool)
    for index, each in enumerate(config.sources):
        mine = np.flatnonzero(source == index)
        mine = mine[np.argsort(order[mine], kind="stable")]
        if each.max_bytes is not None and each.kind != "installed-docs":  # its parts apply their own share
            mine = mine[: np.searchsorted(np.cumsum(num_bytes[mine]), each.max_bytes, side="right")]
        if not len(mine):
            raise DataError(
                f"source {each.name!r}: max_bytes = {each.max_bytes} is smaller than its first document; raise it"
            )
        admitted[mine] = True
        last_order.append(int(order[mine[-1]]))
    unique, occurrences = np.unique(order[admitted], return_counts=True)
    return Selection(
        folder=folder,
        num_shards=num_shards(int(num_bytes[admitted].sum())),
        num_bytes=int(num_bytes[admitted].sum()),
        last_order=tuple(last_order),
        repeated_ids=frozenset(unique[occurrences > 1].tolist()),
    )


def num_shards(num_bytes: int) -> int:
    """Return the number of shards for a corpus of ``num_bytes`` bytes of text."""
    small = min(math.ceil(num_bytes / SHARD_BYTES), MAX_SMALL_SHARDS)
    return max(1, min(max(small, math.ceil(num_bytes / LARGE_SHARD_BYTES)), MAX_SHARDS))


def _judge(config: CorpusConfig, selection: Selection, work: Work) -> LateVerdicts:
    """Return the verdicts that need all documents that passed the chain."""
    filtered, settings = work.folder("filtered"), config.classifier
    min_score = settings.min_score
    if settings.keep_ratio is not None:
        scores = [LateVerdicts(filtered, None, None).scores(shard) for shard in range(selection.num_shards)]
        min_score = keep_threshold(np.concatenate(scores), settings.keep_ratio)
    late = LateVerdicts(filtered, min_score, matches=None)
    if not config.minhash.enabled:
        return late
    signatures, pairs, matches = filtered / "signatures", work.folder("pairs"), work.folder("matches") / "all.arrow"
    work.run(
        "match", MatchBands(config.minhash, signatures, pairs), min(config.minhash.num_buckets, selection.num_shards)
    )
    table = near_duplicates(signatures, pairs, config.minhash, min_score=min_score)
    write_table(matches, table, rows_per_batch=max(1, table.num_rows))
    return late._replace(matches=matches)


def _thresholds(config: CorpusConfig, learnt: Learnt, late: LateVerdicts) -> Thresholds:
    """Return the thresholds of each stage in order, for the report and ``lilpipe trace``."""
    thresholds = {each.stage: dict(each.bounds) for each in build_filters(config, learnt, 0)}
    if late.min_score is not None:
        thresholds["classifier"] = {"score": Bounds(least=late.min_score)}
    if late.matches is not None:
        thresholds["near_dedup"] = {"similarity": Bounds(most=config.minhash.min_similarity)}
    return thresholds


def _findings(config: CorpusConfig, learnt: Learnt, late: LateVerdicts, output: Path) -> page.Sections:
    """Return additional report sections, and write the table of evaluation set matches."""
    sections: dict[str, page.Body] = {}
    if learnt.evaluation is not None:
        matches = gather_matches(matches_folder(late.filtered))
        write_table(output / MATCHES_FILE, matches)
        sections["Evaluation sets"] = evaluation_section(
            EvaluationIndex(learnt.evaluation), matches, config.decontamination
        )
    if learnt.classifier is not None:
        report = json.loads((learnt.classifier.parent / CLASSIFIER_REPORT).read_text())
        sections["Quality classifier"] = classifier_section(report, late.min_score or 0.0)
    return sections


def _nothing_kept(counts: Counts) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.reasons().items())[:5])
    return (
        f"corpus: all {counts.documents_read:,} documents were rejected ({reasons}); check the sources, or relax "
        f"the settings of the corpus section that belong to these reasons"
    )


STAGE = Stage(
    name="corpus",
    output="Corpus",
    config=CorpusConfig,
    run=run,
    optional_inputs={"prompts": "Prompts"},
    external=external,
    main_metric="documents_kept",
)
