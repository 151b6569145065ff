"""Artifacts: directories with a ``manifest.json``, which is written last and commits the artifact.

The content digest covers every file outside ``report/`` and ``logs/``. These contain output for people (plots, curves,
times). They are stored and verified like other files, but a new plot of the same data reruns nothing downstream.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError, SchemaVersionError

Kind = Literal["Corpus", "Prompts", "Tokenizer", "TokenShards", "Checkpoint", "Conversations", "Preferences", "Report"]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
"""Version of the manifest's fields; increased with every change of them."""
NOT_CONTENT = ("report", "logs")


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class InputEntry(BaseModel):
    """An input artifact of a role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    stage: str
    fingerprint: str
    content_digest: str


class Manifest(BaseModel):
    """Description and provenance of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    stage: str
    step: str
    fingerprint: str
    config: dict[str, Any]
    """The section as fingerprinted; operational settings are in ``operational``."""
    operational: dict[str, Any]
    inputs: dict[str, list[InputEntry]]
    external: dict[str, str]
    """Digests of data from outside the store (raw files, documentation of the Python environment)."""
    code: dict[str, str]
    """Digest of each module that the stage's output depends on."""
    packages: dict[str, str]
    """Versions of third-party packages that can change the output."""
    git_commit: str | None
    environment: dict[str, Any]
    files: dict[str, FileEntry]
    content_digest: str
    metrics: dict[str, float]
    elapsed_seconds: float
    """Total time of all attempts, including killed ones."""
    created_at: str

    def to_json(self) -> str:
        """Return the manifest as JSON, with a checksum of all fields."""
        fields = json.loads(self.model_dump_json())  # NaN as a string
        return json.dumps({**fields, "sha256": digest_json(fields)}, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A committed artifact whose files are in the local directory ``path``."""

    uri: str
    path: Path
    manifest: Manifest

    @property
    def content_digest(self) -> str:
        """Digest of the artifact's data files."""
        return self.manifest.content_digest


Inputs = Mapping[str, Artifact | tuple[Artifact, ...]]
"""Maps an input role to one artifact, or to several if the stage accepts them."""


def all_inputs(inputs: Inputs, role: str) -> tuple[Artifact, ...]:
    """Return all artifacts of a role."""
    value = inputs.get(role, ())
    return (value,) if isinstance(value, Artifact) else value


def one_input(inputs: Inputs, role: str) -> Artifact:
    """Return the artifact of a required role."""
    (only,) = all_inputs(inputs, role)
    return only


def optional_input(inputs: Inputs, role: str) -> Artifact | None:
    """Return the artifact of an optional role, or None."""
    return one_input(inputs, role) if all_inputs(inputs, role) else None


def digest_json(value: Any) -> str:
    """Return the SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def list_files(directory: Path, sha256: Callable[[Path], str] = digest_file) -> dict[str, FileEntry]:
    """Return an entry for every file below ``directory`` except the manifest, by POSIX path; each file is flushed to
    disk.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[path.relative_to(directory).as_posix()] = FileEntry(size=path.stat().st_size, sha256=sha256(path))
    return entries


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """Return a digest of the names and checksums of the data files."""
    return digest_json({name: entry.sha256 for name, entry in files.items() if name.split("/")[0] not in NOT_CONTENT})


def parse_manifest(text: str | bytes, place: str) -> Manifest:
    """Parse a manifest from JSON; ``place`` names it in errors.

    Raises ``SchemaVersionError`` if a newer version of lilpipe wrote it, and ``ArtifactError`` if it is damaged.
    """
    try:
        fields = json.loads(text)
        version = fields.get("schema_version", SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{place}: got a manifest of schema version {version}, expected at most {SCHEMA_VERSION}; "
                "upgrade lilpipe, or set LILPIPE_STORE to another store"
            )
        if fields.pop("sha256", None) != digest_json(fields):
            raise ValueError("wrong checksum")
        manifest = Manifest.model_validate(fields)
    except (ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{place}: cannot be read as a manifest ({error}); the stage must run again") from error
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a committed artifact.

    Raises ``ArtifactError`` if it is missing, otherwise as ``parse_manifest``.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; the directory contains no committed artifact") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); the stage must run again") from error
    return parse_manifest(text, str(path))


def damage(directory: Path, manifest: Manifest, sha256: Callable[[Path], str] = digest_file) -> dict[str, str]:
    """Return what is wrong with the artifact's files, by name: missing, wrong size or wrong SHA-256."""
    problems = {}
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            if not path.is_file():
                problems[name] = "missing"
            elif (size := path.stat().st_size) != entry.size:
                problems[name] = f"{size} bytes, expected {entry.size}"
            elif sha256(path) != entry.sha256:
                problems[name] = "its SHA-256 differs from the manifest's"
        except OSError as error:
            problems[name] = f"cannot be read ({error.strerror})"
    return problems


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file atomically: a reader sees either the old or the new content; if ``private``, only its owner does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        if private:
            temporary.chmod(0o600)
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
