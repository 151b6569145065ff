"""The corpus stage's folders, tasks and progress."""

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
"""From where to where each step takes the stage's progress: about its share of the time."""


@dataclass(frozen=True)
class Work:
    """Where the stage works, and what runs its tasks."""

    workspace: Workspace
    run_tasks: RunTasks

    def folder(self, name: str) -> Path:
        """A folder that a killed stage finds again."""
        return self.workspace.scratch / name

    def run(self, name: str, step: PipelineStep, num_tasks: int) -> None:
        """Run the tasks of a step of ``PERCENT``, those that are not done yet, and tell of each."""
        start, end = PERCENT[name]

        def tell(done: int) -> None:
            self.workspace.progress(start + (end - start) * done // max(1, num_tasks), 100, "percent")

        self.run_tasks([step], num_tasks=num_tasks, folder=self.folder("tasks") / name.replace(" ", "_"), on_done=tell)
