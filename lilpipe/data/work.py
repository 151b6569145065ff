"""Folders, tasks and progress of the corpus stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from lilpipe.data.executors.run_tasks import RunTasks
from lilpipe.stage import Workspace

PERCENT = {
    "read": (0, 25),
    "survey": (25, 35),
    "common n-grams": (35, 36),
    "shared lines": (36, 37),
    "addresses": (37, 38),
    "filter": (38, 85),
    "match": (85, 92),
    "write": (92, 100),
}
"""Progress of the stage at the start and end of each step, about its share of the time."""


@dataclass(frozen=True)
class Work:
    """The stage's workspace and the executor of its tasks."""

    workspace: Workspace
    run_tasks: RunTasks

    def folder(self, name: str) -> Path:
        """Return a folder that persists when the stage is killed and resumed."""
        return self.workspace.scratch / name

    def run(self, name: str, step: PipelineStep, num_tasks: int) -> None:
        """Run the pending tasks of a step named in ``PERCENT``, and report the progress."""
        start, end = PERCENT[name]

        def tell(done: int) -> None:
            self.workspace.progress(start + (end - start) * done // max(1, num_tasks), 100, "percent")

        self.run_tasks([step], num_tasks=num_tasks, folder=self.folder("tasks") / name.replace(" ", "_"), on_done=tell)
