"""Artifacts: directories with a ``manifest.json``, which is written last and is the commit.

The content digest covers every file outside ``report/`` and ``logs/``. Those two hold what people read (pictures,
curves, times); they travel with the artifact and are checked like the rest, but a new drawing of the same data
rebuilds nothing downstream.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lilpipe.errors import ArtifactError

Kind = Literal["Corpus", "Prompts", "Tokenizer", "TokenShards", "Checkpoint", "Conversations", "Preferences", "Report"]

MANIFEST = "manifest.json"
NOT_CONTENT = ("report", "logs")


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class InputEntry(BaseModel):
    """The artifact that filled an input role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    stage: str
    fingerprint: str
    content_digest: str


class Manifest(BaseModel):
    """What an artifact is and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    stage: str
    step: str
    fingerprint: str
    config: dict[str, Any]
    """The section as fingerprinted; operational settings are in ``operational``."""
    operational: dict[str, Any]
    inputs: dict[str, list[InputEntry]]
    external: dict[str, str]
    """Digests of what was read from outside the store (raw files, the environment's documentation)."""
    code: dict[str, str]
    """Digest of each module that the stage's output depends on."""
    packages: dict[str, str]
    """Versions of the third-party packages that can change the output."""
    git_commit: str | None
    environment: dict[str, Any]
    files: dict[str, FileEntry]
    content_digest: str
    metrics: dict[str, float]
    elapsed_seconds: float
    """Time of all tries together, those that were killed included."""
    created_at: str


@dataclass(frozen=True)
class Artifact:
    """A committed artifact whose files lie in the local directory ``path``."""

    uri: str
    path: Path
    manifest: Manifest

    @property
    def content_digest(self) -> str:
        """Digest over the artifact's data files."""
        return self.manifest.content_digest


Inputs = Mapping[str, Artifact | tuple[Artifact, ...]]


def digest_json(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Every file below ``directory`` but the manifest, by POSIX path, each flushed to disk."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[path.relative_to(directory).as_posix()] = FileEntry(
                size=path.stat().st_size, sha256=digest_file(path)
            )
    return entries


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """Digest over the names and checksums of the data files."""
    return digest_json({name: entry.sha256 for name, entry in files.items() if name.split("/")[0] not in NOT_CONTENT})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed artifact. Raises ``ArtifactError`` if there is none that can be read."""
    path = directory / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; the directory holds no committed artifact") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as a manifest ({error}); the stage must run again") from error


def damage(directory: Path, manifest: Manifest, *, checksums: bool) -> list[str]:
    """What is wrong with the artifact's files: missing, of another size, or (``checksums``) of other bytes."""
    problems = []
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif (size := path.stat().st_size) != entry.size:
            problems.append(f"{name}: {size} bytes, expected {entry.size}")
        elif checksums and digest_file(path) != entry.sha256:
            problems.append(f"{name}: its SHA-256 differs from the manifest's")
    return problems


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
