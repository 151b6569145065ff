"""How fast the corpus stage is with every filter on: ``python -m tests.benchmarks.corpus FOLDER``.

FOLDER holds `python-peps.jsonl.gz`, `rust-rfcs.jsonl.gz`, `rust-book.jsonl.gz` (25 MB of English documents) and
`gsm8k-test.jsonl.gz` (an evaluation set). One worker; megabytes of text read for each second.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.corpus import STAGE
from lilpipe.stage import Workspace

DOCUMENTS = ("python-peps", "rust-rfcs", "rust-book")
RUNS = 3


def everything_on(folder: Path, *, num_workers: int = 1) -> CorpusConfig:
    """All filters, at thresholds that keep most documents, so that the late filters have work to do."""

    def source(name: str, **others: object) -> dict[str, object]:
        return {"kind": "jsonl", "name": name, "path": str(folder / f"{name}.jsonl.gz"), **others}

    return CorpusConfig.model_validate(
        {
            "sources": [source(name) for name in DOCUMENTS],
            "language": {"min_score": 0.3},
            "quality": {
                "c4": True,
                "min_alpha_word_ratio": 0.5,
                "max_duplicate_ngram_coverage": 0.5,
                "max_dirty_words": 5,
                "max_kl_divergence": 5.0,
            },
            "exact_dedup": {"paragraphs": True, "lines": True},
            "classifier": {
                "good": [source("rust-book", max_bytes=300_000)],
                "bad": [source("python-peps", max_bytes=300_000)],
                "keep_ratio": 0.9,
            },
            "pii": {"phone_numbers": True},
            "decontamination": {"sets": [source("gsm8k-test", columns={"text": "question"})]},
            "num_workers": num_workers,
        }
    )


def main(folder: Path) -> None:
    """Run the stage a few times and print its speed."""
    speeds, metrics = [], {}
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as scratch:
            workspace = Workspace(Path(scratch))
            start = time.perf_counter()
            metrics = STAGE.run(everything_on(folder), {}, workspace)
            elapsed = time.perf_counter() - start
        speeds.append(metrics["bytes_read"] / 1e6 / elapsed)
        print(f"{speeds[-1]:.2f} MB/s: {metrics['bytes_read'] / 1e6:.1f} MB in {elapsed:.1f} s", flush=True)
    print(f"median {statistics.median(speeds):.2f} MB/s, {min(speeds):.2f} to {max(speeds):.2f}, one worker")
    print(json.dumps({name: value for name, value in metrics.items() if name.startswith(("documents", "bytes"))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
