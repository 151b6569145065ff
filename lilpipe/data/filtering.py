"""Tasks that filter a shard and write its tables."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.build_filters import build_filters
from lilpipe.data.documents import documents_table, rejected_table
from lilpipe.data.filters.chain import Document, Rejection, run_filters, score_names
from lilpipe.data.filters.decontamination import MATCHES, DecontaminationFilter
from lilpipe.data.late import CLASSIFIER_SCORE, SIMILARITY, LateVerdict, LateVerdicts, kept_file, rejected_file
from lilpipe.data.learn import Learnt
from lilpipe.data.signatures import SignatureWriter
from lilpipe.data.sorting import Selection
from lilpipe.schemas.documents import documents_schema, rejected_schema
from lilpipe.schemas.tables import ROWS_PER_BATCH, TableWriter, read_table, write_rows

BATCH_BYTES = 2 * 2**20
"""Bytes of text after which a batch of documents is written."""


class FilterShards(PipelineStep):
    """Applies the chain of filters to the documents of shard ``rank``; writes a table of kept and one of rejected
    documents.

    It also writes the MinHash signatures of the documents that passed, and the matches with evaluation sets.
    """

    type, name = "Filter", "Chain of filters"

    def __init__(self, selection: Selection, config: CorpusConfig, learnt: Learnt, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.config = config
        self.learnt = learnt
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Filter one shard. An interrupted task starts the shard again."""
        filters = build_filters(self.config, self.learnt, rank)
        names = [*score_names(filters), SIMILARITY]
        with (
            _DocumentWriter(kept_file(self.folder, rank), documents_schema(names), names) as kept,
            _DocumentWriter(rejected_file(self.folder, rank), rejected_schema(names), names) as rejected,
            SignatureWriter(self.folder / "signatures", rank, self.config.minhash) as signatures,
        ):
            for document in self.selection.documents(rank):
                text = document.text
                if verdict := run_filters(filters, document):
                    document.text = text  # the original text
                    rejected.add(document, verdict)
                else:
                    kept.add(document)
                    if self.config.minhash.enabled:
                        _sign(document, signatures)
                document.forget_words()
        matches = [row for each in filters if isinstance(each, DecontaminationFilter) for row in each.drain()]
        write_rows(matches_folder(self.folder) / f"{rank:05d}.arrow", matches, MATCHES)


class _DocumentWriter:
    """Writes documents in batches, so that memory does not grow with the size of the shard."""

    def __init__(self, path: Path, schema: pa.Schema, scores: list[str]) -> None:
        self._writer = TableWriter(path, schema)
        self._scores = scores
        self._documents: list[Document] = []
        self._verdicts: list[tuple[str, Rejection]] = []
        self._num_bytes = 0

    def add(self, document: Document, verdict: tuple[str, Rejection] | None = None) -> None:
        self._documents.append(document)
        if verdict is not None:
            self._verdicts.append(verdict)
        self._num_bytes += document.num_bytes
        if len(self._documents) >= ROWS_PER_BATCH or self._num_bytes >= BATCH_BYTES:
            self._flush()

    def __enter__(self) -> _DocumentWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._writer.__exit__(kind, error, at)

    def _flush(self) -> None:
        table = documents_table(self._documents, self._scores)
        self._writer.write(rejected_table(table, self._verdicts) if self._verdicts else table)
        self._documents, self._verdicts, self._num_bytes = [], [], 0


def _sign(document: Document, signatures: SignatureWriter) -> None:
    score = document.scores.get(CLASSIFIER_SCORE)
    signatures.add(document.words.hashes, num_bytes=len(document.text.encode()), score=score)


def matches_folder(folder: Path) -> Path:
    """Return the folder where filtering tasks write their evaluation set matches."""
    return folder / "matches"


class WriteShards(PipelineStep):
    """Writes the artifact's tables of shard ``rank``: documents kept, and documents rejected by a filter or late
    verdict.
    """

    type, name = "Writer", "Corpus"

    def __init__(self, late: LateVerdicts, output: Path) -> None:
        super().__init__()
        self.late = late
        self.output = output

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write one shard."""
        kept = read_table(kept_file(self.late.filtered, rank))
        rejected = read_table(rejected_file(self.late.filtered, rank))
        verdicts = {verdict.row: verdict for verdict in self.late.of(rank)}
        first = 0
        with (
            TableWriter(self.output / "documents" / f"{rank:05d}.arrow", kept.schema) as documents,
            TableWriter(self.output / "rejected" / f"{rank:05d}.arrow", rejected.schema) as others,
        ):
            for batch in rejected.to_batches():
                others.write_batch(batch)
            for batch in kept.to_batches():
                table = pa.Table.from_batches([batch])
                rows = [row for row in range(batch.num_rows) if first + row in verdicts]
                stays = np.ones(batch.num_rows, bool)
                stays[rows] = False
                documents.write(table.filter(pa.array(stays)))
                others.write(
                    _with_verdicts(table.take(pa.array(rows, pa.int64())), [verdicts[first + row] for row in rows])
                )
                first += batch.num_rows


def _with_verdicts(documents: pa.Table, verdicts: list[LateVerdict]) -> pa.Table:
    documents = _with_similarity(documents, [verdict.similarity for verdict in verdicts])
    return rejected_table(documents, [(verdict.stage, verdict.rejection) for verdict in verdicts])


def _with_similarity(documents: pa.Table, similarities: list[float | None]) -> pa.Table:
    """Set the similarity of documents, which is the last field of ``scores``."""
    scores = documents["scores"].combine_chunks()
    values = [*scores.flatten()[:-1], pa.array(similarities, pa.float32())]
    struct = pa.StructArray.from_arrays(values, fields=list(scores.type))
    return documents.set_column(documents.schema.get_field_index("scores"), documents.schema.field("scores"), struct)
