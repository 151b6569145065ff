"""The store: committed artifacts, work in progress, and the artifacts of each pipeline run.

    <root>/artifacts/<stage>/<fingerprint>/   committed: has a manifest that lists all files
    <root>/work/<stage>/<workspace>/          in progress; a killed stage resumes from here
    <root>/damaged/<stage>/<fingerprint>.N/   artifacts that failed verification
    <root>/refs/<pipeline run>/<step>.json    artifact of a step of a pipeline run
    <root>/digests.jsonl                      SHA-256 of verified files, see ``FileDigests``

``root`` is a local directory or any fsspec URL. With a URL, artifacts, damaged artifacts and refs are remote, and the
manifest is uploaded last. Work and digests stay on the local disk, and artifacts are downloaded to the local ``cache/``
when a stage reads them. The store never deletes an artifact.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from lilpipe.artifact import (
    MANIFEST,
    Artifact,
    Manifest,
    damage,
    parse_manifest,
    read_manifest,
    sync_directory,
    write_atomically,
)
from lilpipe.digests import FileDigests
from lilpipe.errors import ArtifactError, SchemaVersionError, StoreError

DEFAULT_ROOT = ".lilpipe"


@dataclass(frozen=True)
class Lookup:
    """Result of looking up a fingerprint: an artifact, nothing, or the problems of a damaged artifact."""

    artifact: Artifact | None = None
    problems: list[str] = field(default_factory=list)


class Store:
    """Artifacts by stage and fingerprint, on the local disk or at an fsspec URL."""

    def __init__(self, root: str | None = None, *, local: str | None = None) -> None:
        root = root or os.environ.get("LILPIPE_STORE") or DEFAULT_ROOT
        self.remote = "://" in root and not root.startswith("file://")
        self.root = root.rstrip("/") if self.remote else str(Path(root.removeprefix("file://")).resolve())
        default_local = DEFAULT_ROOT if self.remote else self.root
        self.local = Path(local or os.environ.get("LILPIPE_LOCAL") or default_local).resolve()
        self.fs = fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0] if self.remote else None
        self.digests = FileDigests(self.local / "digests.jsonl")
        with _explained(self.root):
            self.local.mkdir(parents=True, exist_ok=True)
            if not os.access(self.local, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.local))

    # --- artifacts ------------------------------------------------------------------------------------------------

    def uri(self, stage: str, fingerprint: str) -> str:
        """Return the path or URL of an artifact, whether or not it exists."""
        return f"{self.root}/artifacts/{stage}/{fingerprint}"

    def find(self, stage: str, fingerprint: str) -> Lookup:
        """Look up a committed artifact, or what is wrong with it. Changes nothing.

        Local files are verified by SHA-256. Remote files are verified by size; ``fetch`` verifies their SHA-256. Raises
        ``SchemaVersionError`` for an artifact of a newer version of lilpipe.
        """
        uri = self.uri(stage, fingerprint)
        try:
            if self.fs is None:
                directory = Path(uri)
                if not directory.exists():
                    return Lookup()
                manifest = read_manifest(directory)
                problems = damage(directory, manifest, self.digests.sha256)
            else:
                directory = self._cache(stage, fingerprint)
                with _explained(uri):
                    sizes = self._sizes(uri)
                    if MANIFEST not in sizes:
                        return Lookup()
                    manifest = parse_manifest(self.fs.cat_file(f"{uri}/{MANIFEST}"), f"{uri}/{MANIFEST}")
                problems = _wrong_sizes(sizes, manifest)
        except ArtifactError as error:
            return Lookup(problems=[str(error)])
        if problems:
            return Lookup(problems=[f"{uri}/{name}: {problem}" for name, problem in problems.items()])
        return Lookup(artifact=Artifact(uri=uri, path=directory, manifest=manifest))

    def fetch(self, artifact: Artifact) -> Artifact:
        """Return the artifact with all its files on the local disk, verified by SHA-256.

        A download that fails verification is retried once. If that fails too, or a local file is damaged, the artifact
        is moved to ``damaged/`` and ``ArtifactError`` is raised.
        """
        problems = damage(artifact.path, artifact.manifest, self.digests.sha256)
        if self.fs is not None:
            for _ in range(2):
                for name in problems:
                    self._download(artifact, name)
                problems = damage(artifact.path, artifact.manifest, self.digests.sha256)
            write_atomically(artifact.path / MANIFEST, artifact.manifest.to_json())
        if problems:
            moved = self.quarantine(artifact.manifest.stage, artifact.manifest.fingerprint)
            found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise ArtifactError(
                f"{artifact.uri}: damaged ({found}); moved to {moved}; run the pipeline again to rebuild it"
            )
        return artifact

    def fetch_file(self, artifact: Artifact, name: str) -> Path:
        """Return the directory on the local disk that holds one verified file of an artifact, without the others.

        Raises ``ArtifactError`` if the file is damaged.
        """
        path, entry = artifact.path / name, artifact.manifest.files[name]
        for _ in range(2):
            if path.is_file() and self.digests.sha256(path) == entry.sha256:
                return artifact.path
            if self.fs is not None:
                self._download(artifact, name)
        raise ArtifactError(f"{artifact.uri}/{name}: damaged, expected SHA-256 {entry.sha256}; run the pipeline again")

    def _download(self, artifact: Artifact, name: str) -> None:
        """Copy a remote file, if it exists, to a temporary name and rename it."""
        assert self.fs is not None
        target, url = artifact.path / name, f"{artifact.uri}/{name}"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with _explained(url):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(url, str(temporary))
            except FileNotFoundError:
                return
            temporary.replace(target)

    def _sizes(self, uri: str) -> dict[str, int]:
        """Return the size in bytes of every remote file below a URL, by relative path."""
        assert self.fs is not None
        try:
            found = self.fs.find(uri, detail=True)
        except FileNotFoundError:
            return {}
        prefix = self.fs._strip_protocol(uri).rstrip("/") + "/"
        return {path.removeprefix(prefix): int(info["size"]) for path, info in found.items()}

    def _cache(self, stage: str, fingerprint: str) -> Path:
        return self.local / "cache" / stage / fingerprint

    def manifests(self, stage: str) -> list[Manifest]:
        """Return all readable manifests of a stage, oldest first. ``find`` reports unreadable ones when a step needs
        them.
        """
        found = []
        for place, text in self._manifest_texts(stage):
            try:
                found.append(parse_manifest(text, place))
            except (ArtifactError, SchemaVersionError):
                continue
        return sorted(found, key=lambda manifest: manifest.created_at)

    def _manifest_texts(self, stage: str) -> Iterator[tuple[str, bytes]]:
        pattern = f"{self.root}/artifacts/{stage}/*/{MANIFEST}"
        with _explained(pattern):
            if self.fs is not None:
                for path in self.fs.glob(pattern):
                    yield path, self.fs.cat_file(path)
            else:
                for path in Path(self.root, "artifacts", stage).glob(f"*/{MANIFEST}"):
                    yield str(path), path.read_bytes()

    def quarantine(self, stage: str, fingerprint: str) -> str:
        """Move a damaged artifact, with all its files, to ``damaged/``; returns its new location."""
        source = self.uri(stage, fingerprint)
        number = 0
        while self._exists(target := f"{self.root}/damaged/{stage}/{fingerprint}.{number}"):
            number += 1
        with _explained(target):
            if self.fs is None:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                Path(source).rename(target)
                sync_directory(Path(source).parent)
            else:
                # Copy all files before removing any. Remove the manifest first: without it there is no artifact.
                names = sorted(self._sizes(source), key=lambda name: name != MANIFEST)
                for name in names:
                    self.fs.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    self.fs.cp_file(f"{source}/{name}", f"{target}/{name}")
                for name in names:
                    self.fs.rm_file(f"{source}/{name}")
                shutil.rmtree(self._cache(stage, fingerprint), ignore_errors=True)
        return target

    def _exists(self, place: str) -> bool:
        return self.fs.exists(place) if self.fs is not None else Path(place).exists()

    # --- work in progress -----------------------------------------------------------------------------------------

    def is_in_progress(self, stage: str, workspace: str) -> bool:
        """Return whether an earlier attempt left this workspace."""
        return (self.local / "work" / stage / workspace).exists()

    def work(self, stage: str, workspace: str) -> Path:
        """Return the directory of a workspace, created if missing."""
        directory = self.local / "work" / stage / workspace
        with _explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def workspaces(self, stage: str) -> list[Path]:
        """Return the directories of all workspaces of a stage, in progress or unfinished."""
        return sorted((self.local / "work" / stage).glob("*/"))

    @contextmanager
    def lock(self, stage: str, workspace: str) -> Iterator[bool]:
        """Lock the stage's workspace exclusively; yields whether it had to wait for another process.

        The kernel releases the lock when its holder dies, so a kill leaves no stale lock.
        """
        path = self.local / "locks" / f"{stage}-{workspace}"
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                waited = False
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_EX)
                waited = True
            yield waited

    def commit(self, work: Path, manifest: Manifest) -> Artifact:
        """Move ``work/output`` to the committed artifact, and delete the rest of the workspace."""
        uri = self.uri(manifest.stage, manifest.fingerprint)
        output = work / "output"
        text = manifest.to_json()
        with _explained(uri):
            if self.fs is not None:
                directory = self._cache(manifest.stage, manifest.fingerprint)
                for name in manifest.files:
                    self.fs.makedirs(f"{uri}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    self.fs.put_file(str(output / name), f"{uri}/{name}")
                self.fs.pipe_file(f"{uri}/{MANIFEST}", text.encode())
            else:
                directory = Path(uri)
            write_atomically(output / MANIFEST, text)
            directory.parent.mkdir(parents=True, exist_ok=True)
            if directory.exists():
                if self.fs is None:
                    self.quarantine(manifest.stage, manifest.fingerprint)
                else:
                    shutil.rmtree(directory)  # local copy of an earlier artifact
            output.rename(directory)
            sync_directory(directory.parent)
            shutil.rmtree(work, ignore_errors=True)
        return Artifact(uri=uri, path=directory, manifest=manifest)

    # --- refs -----------------------------------------------------------------------------------------------------

    def set_ref(self, pipeline_run: str, step: str, artifact: Artifact) -> None:
        """Record the artifact of a step of a pipeline run."""
        ref = {
            "uri": artifact.uri,
            "stage": artifact.manifest.stage,
            "fingerprint": artifact.manifest.fingerprint,
            "content_digest": artifact.content_digest,
        }
        text = json.dumps(ref, indent=2) + "\n"
        with _explained(self.root):
            if self.fs is not None:
                path = f"{self.root}/refs/{pipeline_run}/{step}.json"
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self.fs.pipe_file(path, text.encode())
            else:
                write_atomically(Path(self.root, "refs", pipeline_run, f"{step}.json"), text)

    def refs(self, pipeline_run: str) -> dict[str, dict[str, Any]]:
        """Return the recorded artifact of each step of a pipeline run."""
        if self.fs is not None:
            paths = self.fs.glob(f"{self.root}/refs/{pipeline_run}/*.json")
            return {Path(path).stem: json.loads(self.fs.cat_file(path)) for path in paths}
        return {
            path.stem: json.loads(path.read_text()) for path in Path(self.root, "refs", pipeline_run).glob("*.json")
        }

    def pipeline_runs(self, prefix: str = "") -> list[str]:
        """Return the names of the pipeline runs that have refs."""
        if self.fs is not None:
            return sorted(Path(path).name for path in self.fs.glob(f"{self.root}/refs/{prefix}*"))
        return sorted(path.name for path in Path(self.root, "refs").glob(f"{prefix}*"))


def _wrong_sizes(sizes: dict[str, int], manifest: Manifest) -> dict[str, str]:
    """Return remote files that are missing or have a wrong size, by name."""
    problems = {}
    for name, entry in manifest.files.items():
        if name not in sizes:
            problems[name] = "missing"
        elif sizes[name] != entry.size:
            problems[name] = f"{sizes[name]} bytes, expected {entry.size}"
    return problems


@contextmanager
def _explained(place: object) -> Iterator[None]:
    """Convert an ``OSError`` of the store into a ``StoreError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(explain_os_error(place, error)) from error


def explain_os_error(place: object, error: OSError) -> str:
    """Return a message with the path, the reason and the remedy."""
    where = error.filename or place
    if error.errno == errno.ENOSPC:
        return f"{where}: the disk is full; free some space and run again, finished work is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: cannot be written ({error.strerror}); check its permissions, or change LILPIPE_STORE"
    return f"{where}: {error.strerror or error}; check LILPIPE_STORE"
