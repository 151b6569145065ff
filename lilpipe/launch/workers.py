"""The interface of launchers: a job and the states of its workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # workers of stages without these settings import this module
    from lilpipe.config.parallel import LaunchConfig

METRICS = "metrics.json"
"""Metrics file, written by rank 0 at the end."""
HEARTBEATS = "heartbeats"
"""Folder of the workers' progress files; cleared before a launch."""


@dataclass(frozen=True)
class Job:
    """A stage to run in one or more processes."""

    file: Path
    """The job file, in the stage's workspace."""
    num_workers: int
    environment: dict[str, str]
    settings: LaunchConfig

    @property
    def work(self) -> Path:
        """The stage's workspace."""
        return self.file.parent

    @property
    def log(self) -> Path:
        """Log of the workers' output."""
        return self.work / "worker.log"

    @property
    def heartbeats(self) -> Path:
        """Folder of the workers' progress files."""
        return self.work / HEARTBEATS

    @property
    def name(self) -> str:
        """Job name: the same for each attempt in this workspace, unique to it, and a valid DNS label."""
        digest = hashlib.sha256(str(self.work.resolve()).encode()).hexdigest()[:12]
        return f"lilpipe-{self.work.parent.name.replace('_', '-').lower()[:24]}-{digest}"

    @property
    def workers_per_node(self) -> int:
        """Number of processes per host."""
        return self.num_workers // self.settings.num_nodes


@dataclass(frozen=True)
class Restarted:
    """All workers have been restarted."""

    cause: str


@dataclass(frozen=True)
class Ended:
    """All workers have ended."""

    problem: str | None
    """Description of the failure; None if they succeeded."""
    trace: str = ""
    """Traceback of the worker that failed first, if it raised an exception."""


class WorkerProcesses(Protocol):
    """The running processes of a stage."""

    def poll(self) -> Restarted | Ended | None:
        """Return what has changed since the last call, without blocking."""

    def stop(self) -> None:
        """Stop all workers: SIGTERM and time to save, then SIGKILL."""
