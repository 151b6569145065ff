"""SHA-256 of files, computed once per state of a file and process.

A file's device, inode, size, mtime and ctime tell whether it has changed since it was hashed: every write sets its
ctime, which no program can set back. The states of an artifact's files are also recorded in the local store, so a
cached run costs one ``stat`` per file. Changes below the file system, such as a failing disk, are not detected: delete
the record to hash every file again.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

SETTLED_SECONDS = 0.05
"""A file changed less than this many seconds ago is hashed but not recorded: within one tick of the file system's
clock, a later write could leave the same timestamps."""


class FileState(NamedTuple):
    """Metadata that changes whenever a file's content changes."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


_digests: dict[FileState, str] = {}
"""What this process has hashed."""


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's current content. Raises ``OSError``."""
    state = _state(path)
    if (digest := _digests.get(state)) is not None:
        return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _is_settled(path, state):
        _digests[state] = digest
    return digest


class FileDigests:
    """SHA-256 by file state; the file ``record`` keeps them between processes.

    The record is an append-only JSON Lines file. Unreadable lines are ignored, and it can be deleted at any time.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._known: dict[FileState, str] | None = None

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is read only if its state is not recorded. Raises ``OSError``."""
        known = self._load()
        state = _state(path)
        if (digest := known.get(state)) is not None:
            return digest
        digest = digest_file(path)
        if _is_settled(path, state):
            known[state] = digest
            self._append(state, digest)
        return digest

    def _load(self) -> dict[FileState, str]:
        if self._known is None:
            self._known = {}
            try:
                lines = self._record.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                lines = []
            for line in lines:
                try:
                    *state, digest = json.loads(line)
                    self._known[FileState(*state)] = digest
                except (ValueError, TypeError):
                    continue  # truncated by a kill
        return self._known

    def _append(self, state: FileState, digest: str) -> None:
        """Append one line in a single write; ``O_APPEND`` keeps lines of concurrent processes separate."""
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with self._record.open("ab", buffering=0) as file:
                file.write(f"\n{json.dumps([*state, digest])}\n".encode())
        except OSError:
            pass  # a full disk: the next process hashes the file again


def _is_settled(path: Path, state: FileState) -> bool:
    """Whether a file is as it was, and has not been changed just before."""
    return _state(path) == state and time.time() - state.ctime_ns / 1e9 > SETTLED_SECONDS


def _state(path: Path) -> FileState:
    status = path.stat()
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
