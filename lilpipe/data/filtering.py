"""The tasks that filter a shard and write the artifact's tables of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep

from lilpipe.config import CorpusConfig
from lilpipe.data.chain import Document, Filter, Rejection, run_filters, score_names
from lilpipe.data.decontamination import MATCHES, DecontaminationFilter
from lilpipe.data.documents import documents_table, read_table, rejected_table, write_rows, write_table
from lilpipe.data.filters import build_filters
from lilpipe.data.late import CLASSIFIER_SCORE, SIMILARITY, LateVerdicts, kept_file, rejected_file
from lilpipe.data.learn import Learnt
from lilpipe.data.minhash import SignatureWriter
from lilpipe.data.sorting import Selection


class FilterShards(PipelineStep):
    """Passes the documents of shard ``rank`` through the chain of filters; a table of each side comes out.

    Beside them lie the signatures of the documents that passed, and what was found of evaluation sets.
    """

    type, name = "Filter", "Chain of filters"

    def __init__(self, selection: Selection, config: CorpusConfig, learnt: Learnt, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.config = config
        self.learnt = learnt
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Filter one shard; it is filtered again as a whole if this does not end."""
        filters = build_filters(self.config, self.learnt, rank)
        kept: list[Document] = []
        rejected: list[tuple[Document, tuple[str, Rejection]]] = []
        with SignatureWriter(self.folder / "signatures", rank, self.config.minhash) as signatures:
            for document in self.selection.documents(rank):
                text = document.text
                if verdict := run_filters(filters, document):
                    document.text = text  # as read
                    rejected.append((document, verdict))
                else:
                    kept.append(document)
                    if self.config.minhash.enabled:
                        _sign(document, signatures)
                document.forget_words()  # a shard's are ten times its text
        matches = [row for each in filters if isinstance(each, DecontaminationFilter) for row in each.drain()]
        write_rows(matches_folder(self.folder) / f"{rank:05d}.arrow", matches, MATCHES)
        names = all_scores(filters)
        table = documents_table([document for document, _ in rejected], names)
        write_table(rejected_file(self.folder, rank), rejected_table(table, [verdict for _, verdict in rejected]))
        write_table(kept_file(self.folder, rank), documents_table(kept, names))


def _sign(document: Document, signatures: SignatureWriter) -> None:
    score = document.scores.get(CLASSIFIER_SCORE)
    signatures.add(document.words.hashes, num_bytes=len(document.text.encode()), score=score)


def all_scores(filters: list[Filter]) -> list[str]:
    """The scores of the chain, and that of the late verdicts."""
    return [*score_names(filters), SIMILARITY]


def matches_folder(folder: Path) -> Path:
    """Where filtering tasks tell what they found of evaluation sets."""
    return folder / "matches"


class WriteShards(PipelineStep):
    """Writes the artifact's tables of shard ``rank``: what is kept, and what any filter or late verdict rejected."""

    type, name = "Writer", "Corpus"

    def __init__(self, late: LateVerdicts, output: Path) -> None:
        super().__init__()
        self.late = late
        self.output = output

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write one shard."""
        kept, verdicts = read_table(kept_file(self.late.filtered, rank)), self.late.of(rank)
        rows = [verdict.row for verdict in verdicts]
        keep = np.ones(kept.num_rows, bool)
        keep[rows] = False
        late = _with_similarity(kept.take(pa.array(rows, pa.int64())), [verdict.similarity for verdict in verdicts])
        late = rejected_table(late, [(verdict.stage, verdict.rejection) for verdict in verdicts])
        rejected = pa.concat_tables([read_table(rejected_file(self.late.filtered, rank)), late])
        write_table(self.output / "documents" / f"{rank:05d}.arrow", kept.filter(pa.array(keep)))
        write_table(self.output / "rejected" / f"{rank:05d}.arrow", rejected)


def _with_similarity(documents: pa.Table, similarities: list[float | None]) -> pa.Table:
    """The documents with the similarity among their scores, where it is the last."""
    scores = documents["scores"].combine_chunks()
    values = [*scores.flatten()[:-1], pa.array(similarities, pa.float32())]
    struct = pa.StructArray.from_arrays(values, fields=list(scores.type))
    return documents.set_column(documents.schema.get_field_index("scores"), documents.schema.field("scores"), struct)
