"""Fabricated input artifacts."""

from typing import Any, cast

from lilpipe.artifact import Artifact, Manifest, content_digest
from lilpipe.schemas.documents import documents_schema
from lilpipe.schemas.examples import DOCUMENT_SCHEMA
from lilpipe.schemas.tables import write_rows
from lilpipe.schemas.tables import write_rows as write_rows_whole


def make_manifest(*, kind, stage, **fields):
    """A manifest of which only some fields matter."""
    files = fields.get("files", {})
    mappings = ("config", "operational", "inputs", "external", "code", "packages", "environment", "metrics")
    defaults: dict[str, Any] = {name: {} for name in mappings} | {
        "step": stage,
        "fingerprint": "f" * 64,
        "git_commit": None,
        "files": files,
        "content_digest": content_digest(files),
        "elapsed_seconds": 1.0,
        "created_at": "2026-01-01T00:00:00Z",
    }
    return Manifest(**{"kind": kind, "stage": stage} | defaults | fields)


def artifact(path):
    """An artifact of which only the files matter."""
    return Artifact(uri=str(path), path=path, manifest=cast(Manifest, None))


def corpus(path, texts, *, source="books", rows_per_file=7, **columns):
    """A Corpus artifact of these texts, in files of a few rows; ``columns`` are further values of all of them."""
    for start in range(0, len(texts), rows_per_file):
        rows: list[dict[str, Any]] = [
            {
                **dict.fromkeys(("name", "version", "licence", "label", "url", "date", "file"), ""),
                "id": f"{source}/{index}",
                "text": texts[index],
                "source": source,
                "row": index,
                "num_bytes": len(texts[index].encode()),
                **columns,
            }
            for index in range(start, min(start + rows_per_file, len(texts)))
        ]
        write_rows(path / "documents" / f"{start // rows_per_file:05d}.arrow", rows, documents_schema(["length.chars"]))
    return artifact(path)


def prompts(path, exercises):
    """A Prompts artifact with these exercises and nothing else."""
    rows = [{"id": f"exercise/{index}", "text": text} for index, text in enumerate(exercises)]
    write_rows_whole(path / "documents.arrow", rows, DOCUMENT_SCHEMA)
    return artifact(path)
