"""The corpus stage: raw sources to clean, deduplicated documents, by datatrove.

1. read: sources into runs sorted by a hash of the text (``steps``); what is unreadable is quarantined.
2. filter: the chain of ``filters`` on equal ranges of that hash, and MinHash signatures of what passes.
3. match: equal signatures, a task for each bucket.
4. write: the tables of the artifact, its counts and its report.

How the work is cut into tasks depends on the data alone, so the output does not depend on the number of workers;
a task that is through is not done again by a resumed run.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lilpipe.artifact import Inputs, digest_file, write_atomically
from lilpipe.config import CorpusConfig
from lilpipe.data.counts import Counts, count_documents
from lilpipe.data.documents import REJECTED, read_documents, read_rejected, read_table, write_table
from lilpipe.data.executor import run_tasks, worker_pool
from lilpipe.data.filters import NEAR_DUPLICATE, STAGES, build_filters, language_model_path, rejections_file
from lilpipe.data.readers import Part, digest_source, find_parts
from lilpipe.data.report import build_report
from lilpipe.data.steps import (
    ReadParts,
    ReadSummary,
    Selection,
    TakeShard,
    WriteShard,
    bucket_step,
    kept_ids,
    near_duplicates,
    read_pairs,
    run_files,
    signature_step,
)
from lilpipe.errors import DataError
from lilpipe.stage import Metrics, Stage, Workspace

__all__ = ["STAGE", "read_documents", "read_rejected"]

SHARD_BYTES = 2**18
MAX_SMALL_SHARDS = 64
LARGE_SHARD_BYTES = 32 * 2**20
MAX_SHARDS = 512
"""Shards are of 256 KiB, then up to 64 grow to 32 MiB, then their number grows, up to the files one may open."""

SHOWN_ERRORS = 3


def run(config: CorpusConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001
    """Build the corpus. Raises ``DataError`` if a source is missing, empty or unreadable, or if nothing is kept."""
    parts = [part for source in config.sources for part in find_parts(source)]
    with worker_pool(config.num_workers) as pool:
        work = _Work(workspace, pool, len(parts), config.minhash.num_buckets if config.minhash.enabled else 0)
        summaries = _read(config, parts, work)
        selection = _select(config, work.folder("read"))
        work.num_shards = selection.num_shards
        _filter(config, selection, work)
        replacements = _match(config, work)
    _write(selection.num_shards, replacements, work)
    unreadable = [row for summary in summaries for row in summary.unreadable]
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in unreadable)
    write_atomically(workspace.output / "quarantine.jsonl", "".join(lines))
    counts = count_documents([source.name for source in config.sources], workspace.output, unreadable)
    write_atomically(workspace.output / "counts.json", counts.to_json())
    if not counts.documents_kept:
        raise DataError(_nothing_kept(counts))
    write_atomically(workspace.report / "report.html", build_report(config, counts, workspace.output, unreadable))
    return counts.metrics()


def external(config: CorpusConfig) -> dict[str, str]:
    """Digests of the sources' content and of the language model. Raises ``DataError`` if a source is missing."""
    return {
        "language model": digest_file(language_model_path()),
        **{f"source {source.name}": digest_source(source) for source in config.sources},
    }


@dataclass
class _Work:
    """The stage's folders, processes and progress."""

    workspace: Workspace
    pool: ProcessPoolExecutor | None
    num_parts: int
    num_buckets: int
    num_shards: int = 8
    """A guess until the sources have been read."""

    def folder(self, name: str) -> Path:
        return self.workspace.scratch / name

    def progress(self, before: int) -> Callable[[int], None]:
        """Tells of tasks that are done, on top of those of earlier steps."""

        def tell(done: int) -> None:
            total = self.num_parts + 2 * self.num_shards + self.num_buckets
            self.workspace.progress(before + done, total, "tasks")

        return tell


def _read(config: CorpusConfig, parts: list[Part], work: _Work) -> list[ReadSummary]:
    """Read all parts. Raises ``DataError`` for a source without documents, or with too many that are unreadable."""
    folder = work.folder("read")
    step = ReadParts(parts, [source.name for source in config.sources], folder)
    run_tasks([step], num_tasks=len(parts), folder=folder, pool=work.pool, on_done=work.progress(0))
    summaries = [ReadSummary(**json.loads(path.read_text())) for path in sorted((folder / "summaries").glob("*.json"))]
    for source in config.sources:
        _check_source(source.name, [each for each in summaries if each.source == source.name], config)
    return summaries


def _check_source(name: str, summaries: list[ReadSummary], config: CorpusConfig) -> None:
    unreadable = [row for summary in summaries for row in summary.unreadable]
    num_documents = sum(summary.num_documents for summary in summaries)
    examples = "; ".join(f"{row['file']}:{row['row']} {row['error']}" for row in unreadable[:SHOWN_ERRORS])
    row_share = len(unreadable) / max(1, len(unreadable) + num_documents)
    file_share = sum(row["breaks_off"] for row in unreadable) / sum(summary.num_files for summary in summaries)
    if max(row_share, file_share) > config.max_malformed_share:
        raise DataError(
            f"source {name!r}: {len(unreadable)} of {len(unreadable) + num_documents} rows cannot be read "
            f"({max(row_share, file_share):.1%} of its {'rows' if row_share >= file_share else 'files'}; at most "
            f"{config.max_malformed_share:.1%} is allowed): {examples}; mend the source, correct `text_column` or "
            f"`kind`, or raise corpus.max_malformed_share"
        )
    if not num_documents:
        source = next(source for source in config.sources if source.name == name)
        raise DataError(
            f"source {name!r}: path {source.path or 'of this environment'} holds no documents"
            + (f" within max_bytes = {source.max_bytes}" if source.max_bytes else "")
            + "; correct `path`, or remove the source"
        )


def _select(config: CorpusConfig, folder: Path) -> Selection:
    """Apply each source's `max_bytes` to what was read, find ids that are not unique, and count the shards."""
    runs = [read_table(path) for path in run_files(folder)]
    order, source, num_bytes = (
        np.concatenate([run[name].to_numpy() for run in runs]) for name in ("order", "source_index", "num_bytes")
    )
    last_order = []
    admitted = np.zeros(len(order), bool)
    for index, each in enumerate(config.sources):
        mine = np.flatnonzero(source == index)
        mine = mine[np.argsort(order[mine], kind="stable")]
        if each.max_bytes is not None and each.kind != "installed-docs":  # whose parts have their share each
            mine = mine[: np.searchsorted(np.cumsum(num_bytes[mine]), each.max_bytes, side="right")]
        if not len(mine):
            raise DataError(
                f"source {each.name!r}: max_bytes = {each.max_bytes} is less than its first document; raise it"
            )
        admitted[mine] = True
        last_order.append(int(order[mine[-1]]))
    unique, occurrences = np.unique(order[admitted], return_counts=True)
    return Selection(
        num_shards=num_shards(int(num_bytes[admitted].sum())),
        last_order=tuple(last_order),
        repeated_ids=frozenset(unique[occurrences > 1].tolist()),
    )


def num_shards(num_bytes: int) -> int:
    """Into how many shards a corpus of that many bytes is cut."""
    small = min(math.ceil(num_bytes / SHARD_BYTES), MAX_SMALL_SHARDS)
    return max(1, min(max(small, math.ceil(num_bytes / LARGE_SHARD_BYTES)), MAX_SHARDS))


def _filter(config: CorpusConfig, selection: Selection, work: _Work) -> None:
    """Run the filters, and where it is asked for the MinHash signatures, on every shard."""
    pipeline = [
        TakeShard(work.folder("read"), selection),
        *build_filters(config, work.folder("rejected")),
        WriteShard(work.folder("filtered")),
    ]
    if config.minhash.enabled:
        pipeline.append(signature_step(config.minhash, work.folder("signatures")))
    run_tasks(
        pipeline,
        num_tasks=selection.num_shards,
        folder=work.folder("filter"),
        pool=work.pool,
        on_done=work.progress(work.num_parts),
    )


def _match(config: CorpusConfig, work: _Work) -> dict[tuple[int, int], tuple[int, int]]:
    """Find near-duplicates: the place of each one to drop, and of the one that is kept for it."""
    if not config.minhash.enabled:
        return {}
    run_tasks(
        [bucket_step(config.minhash, work.folder("signatures"), work.folder("pairs"))],
        num_tasks=config.minhash.num_buckets,
        folder=work.folder("match"),
        pool=work.pool,
        on_done=work.progress(work.num_parts + work.num_shards),
    )
    return near_duplicates(read_pairs(work.folder("pairs")))


def _write(shards: int, replacements: dict[tuple[int, int], tuple[int, int]], work: _Work) -> None:
    """Write the artifact's tables: what is kept, and what any filter rejected."""

    @functools.lru_cache(maxsize=MAX_SHARDS)
    def filtered(shard: int) -> pa.Table:
        return read_table(work.folder("filtered") / f"{shard:05d}.arrow")

    kept_for = kept_ids(replacements, filtered)
    dropped: dict[int, list[int]] = {}
    for shard, row in sorted(replacements):
        dropped.setdefault(shard, []).append(row)
    output = work.workspace.output
    tell = work.progress(work.num_parts + work.num_shards + work.num_buckets)
    for shard in range(shards):
        rows = dropped.get(shard, [])
        duplicates = _near_duplicate_table(filtered(shard), rows, [kept_for[shard, row] for row in rows])
        keep = np.ones(filtered(shard).num_rows, bool)
        keep[rows] = False
        write_table(output / "documents" / f"{shard:05d}.arrow", filtered(shard).filter(pa.array(keep)))
        rejected = [read_table(path) for stage in STAGES if (path := _rejections(work, stage, shard)).exists()]
        write_table(output / "rejected" / f"{shard:05d}.arrow", pa.concat_tables([*rejected, duplicates]))
        tell(shard + 1)


def _rejections(work: _Work, stage: str, shard: int) -> Path:
    return rejections_file(work.folder("rejected"), stage, shard)


def _near_duplicate_table(shard: pa.Table, rows: list[int], kept: list[str]) -> pa.Table:
    columns: dict[str, Any] = {name: shard[name].take(pa.array(rows, pa.int64())) for name in shard.schema.names}
    columns |= {"stage": [NEAR_DUPLICATE] * len(rows), "reason": ["near_duplicate"] * len(rows), "detail": kept}
    return pa.table(columns, schema=REJECTED)


def _nothing_kept(counts: Counts) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.reasons().items())[:5])
    return (
        f"corpus: all {counts.documents_read:,} documents were rejected ({reasons}); look at the sources, or relax "
        f"the settings of the corpus section that these reasons belong to"
    )


STAGE = Stage(
    name="corpus",
    output="Corpus",
    config=CorpusConfig,
    run=run,
    external=external,
    main_metric="documents_kept",
)
