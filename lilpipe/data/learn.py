"""What filters need beyond their settings: an index of the evaluation sets, the quality classifier, and statistics of
the whole corpus: repeated lines, common n-grams, duplicate URLs, word frequencies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.artifact import write_atomically
from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data.filters.classifier import MODEL_FILE, train_classifier
from lilpipe.data.filters.decontamination import EvaluationIndex, write_index
from lilpipe.data.filters.evaluation_sets import prompt_sets, source_sets
from lilpipe.data.filters.outliers import Unigrams, WordCounter, WordCounts, merge_counts
from lilpipe.data.filters.repeated import document_line_keys
from lilpipe.data.filters.url import url_key
from lilpipe.data.sorting import Selection
from lilpipe.data.sources.readers import FirstBytes, Unreadable, find_parts, read_part
from lilpipe.data.survey import KeyCounter, MergeCounts, MergePages, MergeTask, PageList, plan_merge, shard_buckets
from lilpipe.data.work import Work
from lilpipe.schemas.tables import read_table, write_table

CLASSIFIER_REPORT = "classifier.json"

UNIGRAM_BYTES = 64 * 2**20
"""Word frequencies are estimated from the first shards, a random sample of about so many bytes of the corpus."""


@dataclass(frozen=True)
class Learnt:
    """Paths of the learnt files, None if not enabled. It holds only paths, so that any task can receive it."""

    evaluation: Path | None = None
    """Index of the evaluation sets."""
    ngrams: tuple[MergeTask, ...] = ()
    """Survey results: n-grams of evaluation sets that many documents contain."""
    lines: tuple[MergeTask, ...] | None = None
    """Survey results: lines that many documents share."""
    pages: tuple[MergeTask, ...] | None = None
    """Survey results: pages that another page with the same URL replaces."""
    words: Path | None = None
    """Word counts."""
    classifier: Path | None = None
    """Model file of the quality classifier."""

    def unigrams(self) -> Unigrams | None:
        """Return the distribution of words, or None if it was not counted."""
        if self.words is None:
            return None
        table = read_table(self.words)
        return Unigrams.from_counts(WordCounts(table["hash"].to_numpy(), table["count"].to_numpy()))


def learn(config: CorpusConfig, selection: Selection, prompts: Path | None, work: Work) -> Learnt:
    """Learn everything that the config enables; ``prompts`` is the folder of a Prompts artifact."""
    evaluation = _index_evaluation_sets(config, prompts, work)
    folder = work.folder("survey")
    with_pages = has_pages(config)
    if with_pages or evaluation is not None or config.exact_dedup.lines or config.quality.max_kl_divergence is not None:
        work.run("survey", SurveyShards(selection, config, evaluation, folder), selection.num_shards)
    return Learnt(
        evaluation=evaluation,
        ngrams=_common_ngrams(config, selection, work) if evaluation is not None else (),
        lines=_shared_lines(config, selection, work) if config.exact_dedup.lines else None,
        pages=_replaced_pages(selection, work) if with_pages else None,
        words=_words(selection, folder) if config.quality.max_kl_divergence is not None else None,
        classifier=_train_classifier(config, work),
    )


# --- evaluation sets and classifier -------------------------------------------------------------------------------


def _index_evaluation_sets(config: CorpusConfig, prompts: Path | None, work: Work) -> Path | None:
    settings, folder = config.decontamination, work.folder("evaluation")
    if not settings.enabled or (prompts is None and not settings.sets):
        return None
    if not (folder / "items.arrow").exists():  # it is written last
        sets = prompt_sets(prompts, min_item_words=settings.min_item_words) if prompts is not None else []
        write_index(folder, [*sets, *source_sets(settings.sets)], settings)
    return folder


def _train_classifier(config: CorpusConfig, work: Work) -> Path | None:
    settings, folder = config.classifier, work.folder("classifier")
    if not settings.enabled:
        return None
    report = folder / CLASSIFIER_REPORT
    if not report.exists():  # it is written last
        folder.mkdir(parents=True, exist_ok=True)
        found = train_classifier(_texts(settings.good), _texts(settings.bad), settings, folder)
        rows = [each._asdict() for each in found.at_thresholds]
        write_atomically(report, json.dumps({**asdict(found), "at_thresholds": rows}))
    return folder / MODEL_FILE


def _texts(sources: Sequence[Source]) -> Iterator[str]:
    """Yield the texts of example sources, up to their `max_bytes`; unreadable rows are skipped."""
    for source in sources:
        first = FirstBytes(source.max_bytes)
        for part in find_parts(source):
            for row in read_part(part):
                if not isinstance(row, Unreadable) and first.admits(row):
                    yield row.text


# --- the survey ---------------------------------------------------------------------------------------------------


class SurveyShards(PipelineStep):
    """Collects the statistics that the config needs from shard ``rank``."""

    type, name = "Survey", "Lines, addresses, n-grams and words"

    def __init__(self, selection: Selection, config: CorpusConfig, evaluation: Path | None, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.config = config
        self.evaluation = evaluation
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Survey one shard. An interrupted task starts the shard again."""
        counters = []
        if self.config.exact_dedup.lines:
            counters.append(KeyCounter(self.folder / "lines", rank, document_line_keys))
        if self.evaluation is not None:
            counters.append(KeyCounter(self.folder / "ngrams", rank, EvaluationIndex(self.evaluation).document_keys))
        pages = PageList(self.folder / "pages", rank, url_key)
        counts_words = self.config.quality.max_kl_divergence is not None and rank < _word_shards(self.selection)
        words = WordCounter()
        for document in self.selection.documents(rank):
            pages.add(document, document.place)
            for counter in counters:
                counter.add(document)
            if counts_words:
                words.add(document.words)
        for each in (*counters, pages):
            each.close()
        if counts_words:
            _write_counts(_words_file(self.folder, rank), words.total())


def has_pages(config: CorpusConfig) -> bool:
    """Return whether documents may have URLs to deduplicate."""
    return config.url.deduplicate and any(source.kind not in ("installed-docs", "text") for source in config.sources)


def _common_ngrams(config: CorpusConfig, selection: Selection, work: Work) -> tuple[MergeTask, ...]:
    whole = [range(selection.num_shards)]
    tasks = plan_merge(work.folder("survey") / "ngrams", whole)
    work.run("common n-grams", MergeCounts(tasks, config.decontamination.max_ngram_documents), len(tasks))
    return tuple(tasks)


def _shared_lines(config: CorpusConfig, selection: Selection, work: Work) -> tuple[MergeTask, ...]:
    folder, settings = work.folder("survey") / "lines", config.exact_dedup
    tasks = plan_merge(folder, shard_buckets(folder, selection.num_shards, settings.bucket_documents))
    work.run("shared lines", MergeCounts(tasks, settings.max_line_occurrences), len(tasks))
    return tuple(tasks)


def _replaced_pages(selection: Selection, work: Work) -> tuple[MergeTask, ...]:
    tasks = plan_merge(work.folder("survey") / "pages", [range(selection.num_shards)])
    work.run("addresses", MergePages(tasks), len(tasks))
    return tuple(tasks)


def _word_shards(selection: Selection) -> int:
    """Return the number of shards in the sample for word frequencies."""
    return max(1, min(selection.num_shards, selection.num_shards * UNIGRAM_BYTES // max(1, selection.num_bytes)))


def _words_file(folder: Path, rank: int) -> Path:
    return folder / "words" / f"{rank:05d}.arrow"


def _words(selection: Selection, folder: Path) -> Path:
    """Merge the word counts of the sample's shards into one file."""
    path = folder / "words.arrow"
    tables = [read_table(_words_file(folder, rank)) for rank in range(_word_shards(selection))]
    counts = merge_counts(WordCounts(table["hash"].to_numpy(), table["count"].to_numpy()) for table in tables)
    _write_counts(path, counts)
    return path


def _write_counts(path: Path, counts: WordCounts) -> None:
    table = pa.table({"hash": counts.hashes, "count": counts.counts})
    write_table(path, table, rows_per_batch=max(1, table.num_rows))
