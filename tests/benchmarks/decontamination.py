"""Speed of the search for evaluation text, of line counting, and of line and paragraph cutting, on one core.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.decontamination [FOLDER] [MEGABYTES]

FOLDER holds the shared data (`../shared/data`). Time is the processor's; each figure is the best of three rounds. The
words are split and hashed before decontamination's clock starts, as the filters before it need them too.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lilpipe.config.corpus import DecontaminationConfig
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.decontamination import DecontaminationFilter, EvaluationSet, write_index
from lilpipe.data.filters.repeated import LineFilter, ParagraphFilter, document_line_keys
from lilpipe.data.survey import KeyCounter, MergeCounts, merged_files, plan_merge

ENGLISH = ("python-peps", "rust-rfcs", "rust-book")
SHORT = ("tldr",)
ROUNDS = 3


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a file."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load(folder: Path, names: tuple[str, ...], num_bytes: float) -> list[Document]:
    """Documents of the files in turn, up to a total of bytes."""
    documents = []
    for rows in zip(*(read(folder, name) for name in names), strict=False):
        for row in rows:
            num_bytes -= len(row["text"].encode())
            documents.append(Document(id=row["id"], text=row["text"], source="", key=len(documents)))
        if num_bytes <= 0:
            break
    return documents


def measure(title: str, documents: list[Document], work: Callable[[list[Document]], object]) -> None:
    """Print the best speed of a few rounds, each on fresh documents whose words are known."""
    num_bytes = sum(len(each.text.encode()) for each in documents)
    seconds = []
    for _ in range(ROUNDS):
        fresh = [replace(each, scores={}) for each in documents]
        start = time.process_time()
        work(fresh)
        seconds.append(time.process_time() - start)
    per_document = min(seconds) / len(documents) * 1e6
    print(f"{title:40} {num_bytes / min(seconds) / 1e6:7.1f} MB/s  {per_document:7.0f} µs a document")


def count_lines(folder: Path, documents: list[Document]) -> None:
    """Survey the lines of one shard."""
    counter = KeyCounter(folder, 0, document_line_keys)
    for each in documents:
        counter.add(each)
    counter.close()


def main() -> None:
    """Print a line for each kind of work and documents."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    num_bytes = float(sys.argv[2] if len(sys.argv) > 2 else 3) * 1e6
    scratch = Path(tempfile.mkdtemp())
    config = DecontaminationConfig()
    questions = [(row["question"][:20], row["question"]) for row in read(folder, "gsm8k-test")]
    write_index(scratch / "index", [EvaluationSet("gsm8k-test", questions)], config)
    for names in (ENGLISH, SHORT):
        documents = load(folder, names, num_bytes)
        print(f"{', '.join(names)}: {len(documents):,} documents")
        for each in documents:
            each.words.hashes  # noqa: B018
        search = DecontaminationFilter(config, scratch / "index")
        measure("decontamination, 660 questions", documents, lambda fresh, search=search: list(map(search, fresh)))
        lines = scratch / names[0]
        measure("lines, counted", documents, lambda fresh, lines=lines: count_lines(lines, fresh))
        tasks = plan_merge(lines, [range(1)])
        MergeCounts(tasks, 6).run(rank=0)
        cut = LineFilter(merged_files(tasks, 0))
        measure("lines, cut", documents, lambda fresh, cut=cut: list(map(cut, fresh)))
        measure("paragraphs, cut", documents, lambda fresh: list(map(ParagraphFilter(), fresh)))


if __name__ == "__main__":
    main()
