"""The corpus stage's folders, tasks and progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from lilpipe.data.executor import RunTasks
from lilpipe.stage import Workspace


@dataclass(frozen=True)
class Work:
    """Where the stage works, and what runs its tasks."""

    workspace: Workspace
    run_tasks: RunTasks

    def folder(self, name: str) -> Path:
        """A folder that a killed stage finds again."""
        return self.workspace.scratch / name

    def run(self, name: str, step: PipelineStep, num_tasks: int) -> None:
        """Run a step's tasks, those that are not done yet, and tell of each; ``name`` says what is done."""

        def tell(done: int) -> None:
            self.workspace.progress(done, num_tasks, f"tasks: {name}")

        self.run_tasks([step], num_tasks=num_tasks, folder=self.folder("tasks") / name.replace(" ", "_"), on_done=tell)
