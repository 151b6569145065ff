"""The shared English documents, 25 MB, on which several benchmarks run."""

import gzip
import json
import sys
from pathlib import Path

FILES = ("python-peps.jsonl.gz", "rust-rfcs.jsonl.gz", "rust-book.jsonl.gz")


def english_documents() -> tuple[Path, list[dict[str, str]]]:
    """The folder that the command line names first, and their rows of id, source and text."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    if not all((folder / name).exists() for name in FILES):
        sys.exit(f"{folder}: expected the shared documents {', '.join(FILES)}; give their folder")
    lines = [line for name in FILES for line in gzip.decompress((folder / name).read_bytes()).splitlines()]
    return folder, [json.loads(line) for line in lines]
