"""What a launcher is given, and what it tells."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lilpipe.config.parallel import LaunchConfig

METRICS = "metrics.json"
"""What rank 0 writes in the end."""
HEARTBEATS = "heartbeats"
"""Where each worker says how far it has come; cleared before a launch."""


@dataclass(frozen=True)
class Job:
    """A stage that is to be run by several processes."""

    file: Path
    """The job file, in the stage's working folder."""
    num_workers: int
    environment: dict[str, str]
    settings: LaunchConfig

    @property
    def work(self) -> Path:
        """The stage's working folder."""
        return self.file.parent

    @property
    def log(self) -> Path:
        """What the workers print."""
        return self.work / "worker.log"

    @property
    def heartbeats(self) -> Path:
        """Where each worker says how far it has come."""
        return self.work / HEARTBEATS

    @property
    def name(self) -> str:
        """The same for each try in this folder, and for no other folder; fit for a label of DNS."""
        digest = hashlib.sha256(str(self.work.resolve()).encode()).hexdigest()[:12]
        return f"lilpipe-{self.work.parent.name.replace('_', '-').lower()[:24]}-{digest}"

    @property
    def workers_per_node(self) -> int:
        """Processes on each host."""
        return self.num_workers // self.settings.num_nodes


@dataclass(frozen=True)
class Restarted:
    """All workers have been started again, because of this."""

    cause: str


@dataclass(frozen=True)
class Ended:
    """No worker is left."""

    problem: str | None
    """How they ended, where it was not well."""
    trace: str = ""
    """The trace-back of the worker that failed first, if it was an exception."""


class Workers(Protocol):
    """The processes of a stage, once a launcher has started them."""

    def poll(self) -> Restarted | Ended | None:
        """What has happened since the last call; returns at once."""

    def stop(self) -> None:
        """End them all: first with a chance to save, then without."""
