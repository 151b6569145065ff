"""The store: committed artifacts, work in progress, and what each pipeline run used.

    <root>/artifacts/<stage>/<fingerprint>/   committed: the manifest is there, whole
    <root>/work/<stage>/<workspace>/          in progress; a killed stage goes on from here
    <root>/damaged/<stage>/<fingerprint>.N/   what was found damaged and taken out of use
    <root>/refs/<pipeline run>/<step>.json    the artifact that a step of a pipeline run ended in

``root`` is a local directory or any fsspec URL. With a URL, artifacts and refs lie there, the manifest uploaded
last; work stays on the local disk, and artifacts are copied to ``cache/`` beside it when a stage reads them.
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
    read_manifest,
    sync_directory,
    write_atomically,
)
from lilpipe.errors import ArtifactError, StoreError

DEFAULT_ROOT = ".lilpipe"


@dataclass(frozen=True)
class Lookup:
    """What the store holds under a fingerprint: an artifact, nothing, or something damaged."""

    artifact: Artifact | None = None
    problems: list[str] = field(default_factory=list)


class Store:
    """Artifacts by stage and fingerprint, on the local disk or behind a URL."""

    def __init__(self, root: str | None = None, *, local: str | None = None) -> None:
        root = root or os.environ.get("LILPIPE_STORE") or DEFAULT_ROOT
        self.remote = "://" in root and not root.startswith("file://")
        self.root = root.rstrip("/") if self.remote else str(Path(root.removeprefix("file://")).resolve())
        default_local = DEFAULT_ROOT if self.remote else self.root
        self.local = Path(local or os.environ.get("LILPIPE_LOCAL") or default_local).resolve()
        self.fs = fsspec.core.url_to_fs(self.root)[0] if self.remote else None
        with _explained(self.root):
            self.local.mkdir(parents=True, exist_ok=True)
            if not os.access(self.local, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.local))

    # --- artifacts ------------------------------------------------------------------------------------------------

    def uri(self, stage: str, fingerprint: str) -> str:
        """Where the artifact lies, or would lie."""
        return f"{self.root}/artifacts/{stage}/{fingerprint}"

    def find(self, stage: str, fingerprint: str, *, checksums: bool = False) -> Lookup:
        """The committed artifact, its files checked by size and on request by SHA-256. Changes nothing."""
        uri = self.uri(stage, fingerprint)
        directory = self._fetch_manifest(uri) if self.remote else Path(uri)
        if directory is None or not directory.exists():
            return Lookup()
        try:
            manifest = read_manifest(directory)
        except ArtifactError as error:
            return Lookup(problems=[str(error)])
        if not self.remote and (problems := damage(directory, manifest, checksums=checksums)):
            return Lookup(problems=[f"{uri}/{problem}" for problem in problems])
        return Lookup(artifact=Artifact(uri=uri, path=directory, manifest=manifest))

    def fetch(self, artifact: Artifact) -> Artifact:
        """The artifact with all its files on the local disk, checked after a copy."""
        if self.fs is None or not (missing := damage(artifact.path, artifact.manifest, checksums=False)):
            return artifact
        for problem in missing:
            name = problem.split(":")[0]
            (artifact.path / name).parent.mkdir(parents=True, exist_ok=True)
            with _explained(f"{artifact.uri}/{name}"):
                self.fs.get_file(f"{artifact.uri}/{name}", str(artifact.path / name))
        if problems := damage(artifact.path, artifact.manifest, checksums=True):
            raise ArtifactError(f"{artifact.uri}: damaged ({'; '.join(problems)}); delete it and run the stage again")
        return artifact

    def _fetch_manifest(self, uri: str) -> Path | None:
        assert self.fs is not None
        if not self.fs.exists(f"{uri}/{MANIFEST}"):
            return None
        directory = self.local / "cache" / uri.rsplit("/artifacts/", 1)[1]
        write_atomically(directory / MANIFEST, self.fs.cat_file(f"{uri}/{MANIFEST}").decode())
        return directory

    def manifests(self, stage: str) -> list[Manifest]:
        """Every readable manifest of a stage, oldest first."""
        if self.fs is not None:
            paths = self.fs.glob(f"{self.root}/artifacts/{stage}/*/{MANIFEST}")
            found = [Manifest.model_validate_json(self.fs.cat_file(path)) for path in paths]
        else:
            found = []
            for path in Path(self.root, "artifacts", stage).glob(f"*/{MANIFEST}"):
                try:
                    found.append(read_manifest(path.parent))
                except ArtifactError:
                    continue  # `find` reports it when a stage needs it
        return sorted(found, key=lambda manifest: manifest.created_at)

    def quarantine(self, stage: str, fingerprint: str) -> Path | None:
        """Take a damaged artifact out of use, keeping it for inspection."""
        if self.fs is not None:
            self.fs.rm(self.uri(stage, fingerprint), recursive=True)
            return None
        for number in range(1_000_000):
            target = Path(self.root, "damaged", stage, f"{fingerprint}.{number}")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(self.uri(stage, fingerprint)).rename(target)
                return target
        raise StoreError(f"{self.root}/damaged/{stage}: full of damaged artifacts; delete them")

    # --- work in progress -----------------------------------------------------------------------------------------

    def is_in_progress(self, stage: str, workspace: str) -> bool:
        """Whether an earlier try has left its workspace."""
        return (self.local / "work" / stage / workspace).exists()

    def work(self, stage: str, workspace: str) -> Path:
        """The directory in which a stage works; made if absent."""
        directory = self.local / "work" / stage / workspace
        with _explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def workspaces(self, stage: str) -> list[Path]:
        """Of all work of a stage that is in progress or was left unfinished, the directories."""
        return sorted((self.local / "work" / stage).glob("*/"))

    @contextmanager
    def lock(self, stage: str, workspace: str) -> Iterator[bool]:
        """Hold the stage's workspace alone; yields whether another process had to be waited for.

        The kernel frees the lock when its holder dies, so that nothing is left behind by a kill.
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
        """Turn ``work/output`` into the committed artifact, and drop the rest of the workspace."""
        uri = self.uri(manifest.stage, manifest.fingerprint)
        output = work / "output"
        text = manifest.model_dump_json(indent=2) + "\n"
        with _explained(uri):
            if self.fs is not None:
                directory = self.local / "cache" / manifest.stage / manifest.fingerprint
                for name in manifest.files:
                    self.fs.makedirs(f"{uri}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    self.fs.put_file(str(output / name), f"{uri}/{name}")
                self.fs.pipe_file(f"{uri}/{MANIFEST}", text.encode())
            else:
                directory = Path(uri)
            write_atomically(output / MANIFEST, text)
            directory.parent.mkdir(parents=True, exist_ok=True)
            if directory.exists():
                shutil.rmtree(directory)
            output.rename(directory)
            sync_directory(directory.parent)
            shutil.rmtree(work, ignore_errors=True)
        return Artifact(uri=uri, path=directory, manifest=manifest)

    # --- refs -----------------------------------------------------------------------------------------------------

    def set_ref(self, pipeline_run: str, step: str, artifact: Artifact) -> None:
        """Record the artifact that a step of a pipeline run ended in."""
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
        """Step to what it ended in, for one pipeline run."""
        if self.fs is not None:
            paths = self.fs.glob(f"{self.root}/refs/{pipeline_run}/*.json")
            return {Path(path).stem: json.loads(self.fs.cat_file(path)) for path in paths}
        return {
            path.stem: json.loads(path.read_text()) for path in Path(self.root, "refs", pipeline_run).glob("*.json")
        }

    def pipeline_runs(self, prefix: str = "") -> list[str]:
        """The pipeline runs that have refs, by name."""
        if self.fs is not None:
            return sorted(Path(path).name for path in self.fs.glob(f"{self.root}/refs/{prefix}*"))
        return sorted(path.name for path in Path(self.root, "refs").glob(f"{prefix}*"))


@contextmanager
def _explained(place: object) -> Iterator[None]:
    """Turn an ``OSError`` of the store into a ``StoreError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(explain_os_error(place, error)) from error


def explain_os_error(place: object, error: OSError) -> str:
    """Where writing failed, why, and the remedy."""
    where = error.filename or place
    if error.errno == errno.ENOSPC:
        return f"{where}: the disk is full; free some space and run again, finished work is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: cannot be written ({error.strerror}); check its permissions, or set LILPIPE_STORE elsewhere"
    return f"{where}: {error.strerror or error}; check LILPIPE_STORE, or set it elsewhere"
