"""Corpus artifacts made by hand: what was kept, what was rejected and why, with the scores of each document."""

from lilpipe.data.documents import documents_table, rejected_table
from lilpipe.data.filter_trace import write_thresholds
from lilpipe.data.filters.chain import Bounds, Document, Rejection
from lilpipe.schemas.tables import write_table

THRESHOLDS = {
    "url": {},
    "length": {"chars": Bounds(least=200)},
    "exact_dedup": {},
    "language": {"score": Bounds(least=0.65)},
    "line_dedup": {"removed_lines": Bounds(), "removed_chars": Bounds()},
    "c4": {"lorem_ipsum": Bounds(most=0), "curly_bracket": Bounds(most=0), "num_sentences": Bounds(least=5)},
    "pii": {"emails": Bounds()},
    "decontamination": {"matched_ngrams": Bounds(most=0), "matched_ratio": Bounds()},
    "near_dedup": {"similarity": Bounds(most=0.4)},
}
SCORES = [f"{stage}.{name}" for stage, scores in THRESHOLDS.items() for name in scores]


def document(document_id, text="Some text.", **fields):
    """A document of source `books`; its bytes are those of its text unless they are given."""
    return Document(
        **{
            "id": document_id,
            "text": text,
            "source": "books",
            "file": "books.jsonl",
            "num_bytes": len(text.encode()),
            "language": "en",
            "language_score": 0.9,
            **fields,
        }
    )


def write_corpus(folder, kept, rejected=(), *, rows_per_file=3):
    """Write the tables; ``rejected`` are documents with their stage, reason and detail. Returns the folder."""
    tables = {
        "documents": documents_table(kept, SCORES),
        "rejected": rejected_table(
            documents_table([each for each, *_ in rejected], SCORES),
            [(stage, Rejection(reason, detail)) for _, stage, reason, detail in rejected],
        ),
    }
    for name, table in tables.items():
        for number, start in enumerate(range(0, max(1, table.num_rows), rows_per_file)):
            write_table(folder / name / f"{number:05d}.arrow", table.slice(start, rows_per_file), rows_per_batch=2)
    write_thresholds(folder, THRESHOLDS)
    return folder
